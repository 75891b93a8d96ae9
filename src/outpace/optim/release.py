"""Gradient release: step every parameter inside the backward pass and drop its gradient at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from outpace.errors import ConfigError, UnsupportedError
from outpace.optim import shards
from outpace.optim.base import FlashOptimizer, Group
from outpace.optim.stepping import step_parameters

Clip = Literal["running", "two_pass"]


class GradientRelease:
    """Handle on an optimizer that steps during backward; made by `release_gradients`. `remove()` ends it."""

    def __init__(
        self, model: torch.nn.Module, optimizer: FlashOptimizer, accumulate: int, max_norm: float | None, clip: Clip
    ) -> None:
        self.accumulate = accumulate
        self.max_norm = max_norm
        self.clip = clip
        self._optimizer = optimizer
        self._counts: dict[int, int] = {}  # position of the parameter -> backward passes since the last step()
        self._measuring = False
        self._square: Tensor | None = None  # of the gradients seen in this pass
        self._before: Tensor | None = None  # of the pass that decides the clipping: the last one, or the measured one
        self._last: Tensor | None = None
        trainable = {p for p in model.parameters() if p.requires_grad}
        self._handles = [
            param.register_post_accumulate_grad_hook(self._hook(position, group))  # type: ignore[no-untyped-call]
            for position, param, group in optimizer._places()
            if param in trainable
        ]
        self._sharded = any(shards.as_dtensor(p) is not None for p in trainable)

    def remove(self) -> None:
        """Go back to ordinary steps."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.__dict__.pop("_release", None)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Inside, backward passes measure the global norm and drop the gradients; nothing is stepped.

        Raises ConfigError unless clip="two_pass", or if a backward pass is already half done.
        """
        if self.max_norm is None or self.clip != "two_pass":
            raise ConfigError("measure() is the first pass of clip='two_pass'; pass max_norm=... and clip='two_pass'")
        if self._counts:
            raise ConfigError("measure() must come before the backward pass that steps; call optimizer.step() first")
        self._start_measuring()
        try:
            yield
        finally:
            self._measuring, self._counts = False, {}
        if self._square is None:
            raise ConfigError("measure() saw no gradient; run the backward pass inside it")
        self._before, self._square = self._over_ranks(self._square), None

    def _start_measuring(self) -> None:
        self._measuring, self._square = True, None

    def norm(self) -> Tensor | None:
        """The global gradient norm of the last closed step, float32 []; None before the first."""
        return None if self._last is None else self._last.sqrt()

    def finish(self) -> None:
        """Close a step; `optimizer.step()` calls it.

        Raises ConfigError between the backward passes of one accumulation.
        """
        short = [count for count in self._counts.values() if count < self.accumulate]
        if short:
            raise ConfigError(
                f"step() came after {short[0]} of accumulate={self.accumulate} backward passes; call it after the last"
            )
        self._counts = {}
        if self.max_norm is not None:
            self._last = self._before if self.clip == "two_pass" else self._square
            self._before = None if self.clip == "two_pass" else self._square
            self._square = None

    def forget(self) -> None:
        """The gradients of an unfinished accumulation were dropped; `optimizer.zero_grad()` calls it."""
        self._counts = {k: count for k, count in self._counts.items() if count >= self.accumulate}

    def _hook(self, position: int, group: Group) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            count = self._counts.get(position, 0) + 1
            if count > self.accumulate:
                raise ConfigError(
                    f"a {'second' if count == 2 else f'{count}th'} backward pass reached a parameter of shape "
                    f"{tuple(param.shape)} before optimizer.step(): it was stepped already and its gradient is gone. "
                    "Call optimizer.step() after every backward pass, or release_gradients(..., accumulate=n) to sum n"
                )
            self._counts[position] = count
            if count < self.accumulate:
                return
            if self._measuring:
                self._add_square(param)
            else:
                ready = [(position, param, group)]
                self._optimizer._refuse_nonfinite(ready)
                step_parameters(self._optimizer, ready, self._scale(param))
            param.grad = None

        return hook

    @torch.no_grad()
    def _add_square(self, param: Tensor) -> Tensor:
        if param.grad is None:
            raise AssertionError("the hook runs after the gradient was accumulated")
        square = torch.linalg.vector_norm(shards.local(param.grad), dtype=torch.float32) ** 2
        self._square = square if self._square is None else self._square + square.to(self._square.device)
        return self._square

    def _scale(self, param: Tensor) -> Tensor | None:
        """What to multiply this gradient by, float32 []; on the device, so that nothing waits for it."""
        if self.max_norm is None:
            return None
        if self.clip == "two_pass":
            if self._before is None:
                raise ConfigError("clip='two_pass' needs the norm first: run the same backward pass inside measure()")
            square = self._before
        else:
            square = self._add_square(param)
            if self._before is not None:
                square = torch.maximum(square, self._before.to(square.device))
        return (self.max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0).to(shards.local(param).device)

    def _over_ranks(self, square: Tensor) -> Tensor:
        if self._sharded:
            from torch.distributed import all_reduce

            sharded = [shards.as_dtensor(p) for _, p, _ in self._optimizer._places()]
            meshes = {p.device_mesh for p in sharded if p is not None}
            if len(meshes) != 1 or (mesh := meshes.pop()).ndim != 1:
                raise UnsupportedError(
                    "max_norm with parameters on several device meshes, or one of several dimensions"
                )
            all_reduce(square, group=mesh.get_group())
        return square


def release_gradients(
    model: torch.nn.Module,
    optimizer: FlashOptimizer,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    clip: Clip = "running",
) -> GradientRelease:
    """Let `optimizer` step each parameter of `model` as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is: `backward()`, then `optimizer.step()`, which now only closes the step.
    accumulate: backward passes summed before a step; their gradients live until the last one
    max_norm: clip to this global norm. The norm is known only when all gradients have been, so there are two schemes:
        "two_pass" is exact: run the backward pass twice, first inside `with handle.measure():`
        "running" is free: each gradient is scaled by max_norm / max(norm of the previous pass, norm so far in this one)
    Raises ConfigError if the model's trainable parameters are not those of the optimizer, or a setting cannot be;
    UnsupportedError under DistributedDataParallel, and for clip="running" with sharded parameters.
    """
    parallel = sys.modules.get("torch.nn.parallel.distributed")
    if parallel is not None and isinstance(model, parallel.DistributedDataParallel):
        raise UnsupportedError(
            "DistributedDataParallel copies its buckets back into the gradients after the hooks have run; use FSDP2 "
            "(fully_shard), or step without release"
        )
    if "_release" in optimizer.__dict__:
        raise ConfigError("this optimizer releases gradients already; call remove() on the first handle")
    if accumulate < 1:
        raise ConfigError(f"accumulate={accumulate} must be 1 or more backward passes")
    if clip not in ("running", "two_pass"):
        raise ConfigError(f"clip={clip!r} must be 'running' or 'two_pass'")
    if max_norm is None and clip == "two_pass":
        raise ConfigError("clip='two_pass' has no effect without max_norm")
    if max_norm is not None and not 0.0 < max_norm < float("inf"):
        raise ConfigError(f"max_norm={max_norm!r} must be a positive number")
    mine: set[Any] = {p for _, p, _ in optimizer._places() if p.requires_grad}
    theirs: set[Any] = {p for p in model.parameters() if p.requires_grad}
    if mine != theirs:
        raise ConfigError(
            f"{len(theirs - mine)} trainable parameters of the model are not in the optimizer and {len(mine - theirs)} "
            "of the optimizer are not in the model; they would never be stepped. Freeze them, or use one list"
        )
    if any(p.grad is not None for p in mine):
        raise ConfigError("some parameters hold gradients already; call optimizer.zero_grad() first")
    if clip == "running" and max_norm is not None and any(shards.as_dtensor(p) is not None for p in mine):
        raise UnsupportedError("clip='running' would scale each shard by another norm; use clip='two_pass'")
    handle = GradientRelease(model, optimizer, accumulate, max_norm, clip)
    optimizer.__dict__["_release"] = handle
    return handle
