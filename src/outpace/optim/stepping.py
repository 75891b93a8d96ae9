"""Which parameters step together, and what is remembered between steps so that a step costs little Python.

A plan is made once for a set of parameters and kept while nothing about them changes: on CUDA it is a few launches for
all of them, elsewhere the reference one by one. It holds no tensor that the optimizer does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from outpace.errors import UnsupportedError
from outpace.optim import shards
from outpace.optim.draws import draw_key, parameter_key, step_key
from outpace.optim.reference import Stored, reference_step
from outpace.optim.rules import Numbers, Rule
from outpace.optim.settings import Storage

if TYPE_CHECKING:
    from outpace.optim.base import FlashOptimizer, Group

_KEPT: Final = 64  # plans beyond the number of parameters: a model that uses other parts of itself at every step


class _Launch(Protocol):
    def run(self, addresses: list[int], held: Tensor, numbers: Numbers, step: int, scale: Tensor | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a plan: its place among all, its param group, its state and its own key (`draws`)."""

    position: int
    param: Tensor
    group: Group
    state: dict[str, Any]
    names: tuple[str, ...]  # of the state's tensors: residual, first moment and scale, second moment and scale, or ""
    key: int
    sharded: bool

    def stored(self, weight: Tensor, held: Tensor) -> Stored:
        """Its local parts; weight: contiguous."""
        residual, first, first_scale, second, second_scale = (
            shards.local(self.state[name]) if name else None for name in self.names
        )
        return Stored(
            weight=weight,
            residual=residual,
            first=first,
            first_scale=None if first_scale is None else first_scale.view(-1),
            second=second,
            second_scale=None if second_scale is None else second_scale.view(-1),
            held=held,
            first_slot=shards.first_slot(self.param),
        )


@dataclass(slots=True)
class _Together:
    """Members that take the same step. Their states share one count of steps, so that one addition serves them all.

    dtypes: of weights and gradients; launch: None where the reference steps them
    """

    rule: Rule
    storage: Storage
    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    count: Tensor
    members: list[Member]
    launch: _Launch | None


class Plan:
    """See above. `fits` tells whether it still describes the parameters it was made for; `run` steps them."""

    def __init__(self, optimizer: FlashOptimizer, ready: Sequence[tuple[int, Tensor, Group]]) -> None:
        self._optimizer = optimizer
        parts: dict[Any, _Together] = {}
        for position, param, group in ready:
            rule, storage = optimizer._settings_of(group)
            state = optimizer._state_of(param, group)
            kept = ("master" if "master" in state else "residual", *_moments(rule.first), *_moments(rule.second))
            names = tuple(name if name in state else "" for name in kept)
            key = parameter_key(group["seed"], position)
            member = Member(position, param, group, state, names, key, shards.as_dtensor(param) is not None)
            weight, gradient = shards.local(param), gradient_of(param)
            if gradient.layout != torch.strided:
                raise UnsupportedError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} is sparse; build its module with "
                    "sparse=False, or give it to torch.optim.SparseAdam"
                )
            fused = weight.numel() > 0 and takes_kernel(group["backend"], weight.device)
            variant: Any = None
            if fused and weight.is_contiguous():
                from outpace.optim.fused.launch import variant_of

                variant = variant_of(member.stored(weight, weight), gradient.dtype, storage)
            elif fused:
                variant = position  # a copy of the weight is stepped, alone
            alike = (id(group), weight.device, weight.dtype, gradient.dtype, int(state["step"]), fused, variant)
            if alike not in parts:
                dtypes = (weight.dtype, gradient.dtype)
                count = torch.tensor(int(state["step"]), dtype=torch.int64)
                parts[alike] = _Together(rule, storage, group["backend"], weight.device, dtypes, count, [], None)
            parts[alike].members.append(member)
            state["step"] = parts[alike].count
            if fused:
                parts[alike].launch = _PENDING
        self._parts = list(parts.values())
        for part, alike in zip(self._parts, parts, strict=True):
            if part.launch is not None:
                part.launch = self._batch(part, alike[-1])

    def _batch(self, part: _Together, variant: Any) -> _Launch:
        from outpace.optim.fused.launch import Batch, variant_of

        shapes = []
        for member in part.members:
            weight = shards.local(member.param).contiguous()
            shapes.append(member.stored(weight, weight))
        if isinstance(variant, int):
            variant = variant_of(shapes[0], part.dtypes[1], part.storage)
        return Batch(part.rule, part.storage, variant, shapes, [m.key for m in part.members])

    def fits(self) -> bool:
        """Whether settings, states, devices, dtypes and counts of steps are still what the plan was made from."""
        states = self._optimizer.state
        for part in self._parts:
            first = part.members[0]
            if self._optimizer._settings_of(first.group) != (part.rule, part.storage):
                return False
            if first.group["backend"] != part.backend or first.key != parameter_key(
                first.group["seed"], first.position
            ):
                return False
            for member in part.members:
                grad = member.param.grad
                if (
                    states.get(member.param) is not member.state
                    or member.state["step"] is not part.count
                    or grad is None
                    or grad.layout != torch.strided
                    or (member.param.dtype, grad.dtype) != part.dtypes
                    or member.param.device != part.device
                ):
                    return False
        return True

    def run(self, scale: Tensor | None) -> None:
        """One step of all of them. scale: float32 [], what gradients are multiplied by, or None."""
        for part in self._parts:
            part.count += 1
            step = int(part.count)
            group = part.members[0].group
            numbers, word, factor = part.rule.numbers(group, step), step_key(step), scale
            if group["maximize"]:
                factor = torch.full((), -1.0, device=part.device) if scale is None else -scale
            held = self._optimizer._flag(part.device)
            if part.launch is None:
                for member in part.members:
                    _reference(part, member, held, numbers, word, factor)
            else:
                _fused(part.launch, part.members, held, numbers, word, factor)


class _Pending:
    def run(self, addresses: list[int], held: Tensor, numbers: Numbers, step: int, scale: Tensor | None) -> None:
        raise AssertionError("replaced before the plan is used")


_PENDING: Final = _Pending()


def step_parameters(
    optimizer: FlashOptimizer, ready: Sequence[tuple[int, Tensor, Group]], scale: Tensor | None = None
) -> None:
    """Step these parameters (position, parameter, param group), which all have a gradient; scale multiplies it."""
    plans: dict[tuple[int, ...], Plan] = optimizer.__dict__.setdefault("_plans", {})
    positions = tuple([position for position, _, _ in ready])
    plan = plans.get(positions)
    if plan is None or not plan.fits():
        if len(plans) > sum(len(g["params"]) for g in optimizer.param_groups) + _KEPT:
            plans.clear()
        plan = plans[positions] = Plan(optimizer, ready)
    plan.run(scale)


def _reference(
    part: _Together, member: Member, held: Tensor, numbers: Numbers, step: int, scale: Tensor | None
) -> None:
    weight = shards.local(member.param)
    if weight.numel() == 0:
        return
    stored = member.stored(weight.contiguous(), held)
    grad = shards.local(gradient_of(member.param)).contiguous()
    reference_step(part.rule, part.storage, stored, grad, numbers, draw_key(member.key, step), scale)
    if stored.weight is not weight and not weight.is_contiguous():
        weight.copy_(stored.weight)


def _fused(
    launch: _Launch, members: list[Member], held: Tensor, numbers: Numbers, step: int, scale: Tensor | None
) -> None:
    addresses: list[int] = []
    kept: list[Tensor] = []  # copies that must live until the launch
    back: list[tuple[Tensor, Tensor]] = []
    for member in members:
        weight, grad = member.param, gradient_of(member.param)
        if member.sharded:
            weight, grad = shards.local(weight), shards.local(grad)
        if not weight.is_contiguous():
            back.append((weight, weight.contiguous()))
            weight = back[-1][1]
        if not grad.is_contiguous():
            grad = grad.contiguous()
            kept.append(grad)
        addresses.append(weight.data_ptr())
        addresses.append(grad.data_ptr())
        for name in member.names:
            if not name:
                addresses.append(0)
            elif member.sharded:
                addresses.append(shards.local(member.state[name]).data_ptr())
            else:
                addresses.append(member.state[name].data_ptr())
    launch.run(addresses, held, numbers, step, scale)
    for target, source in back:
        target.copy_(source)


def _moments(name: str | None) -> tuple[str, str]:
    return ("", "") if name is None else (name, f"{name}_scale")


def gradient_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    if param.grad is None:
        raise AssertionError("only parameters with a gradient are stepped")
    return param.grad


def takes_kernel(asked: str, device: torch.device) -> bool:
    """Whether the fused kernel steps a parameter on this device.

    Raises UnsupportedError if it was asked for and cannot.
    """
    if asked == "reference" or (asked == "auto" and device.type != "cuda"):
        return False
    if device.type != "cuda":
        raise UnsupportedError(
            f"backend='triton' runs on CUDA and a parameter is on {device}; move the model, or use backend='auto'"
        )
    try:
        import_module("outpace.optim.fused.launch")
    except ImportError as missing:
        raise UnsupportedError(
            f"the fused kernels need Triton, which comes with torch for CUDA ({missing}); install it, or use "
            "backend='reference'"
        ) from missing
    return True
