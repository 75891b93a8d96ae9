"""Row-gated low-rank adapters: LoRA that applies to the last rows of a pass and leaves the others bit for bit alone.

The base layer computes every row; the low-rank part is added to the scouts, which stand behind the main rows, through a
static slice: a row before it is the base model's, not the base model's plus zero times something, and nothing is
copied or waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from outpace.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class GatedLoRA(nn.Module):
    """Low-rank tails for some linear layers of a target.

    Args:
        shapes: {name of the linear layer in the model: (out features, in features)}.
        rank: rank of each tail. alpha: the tail is scaled by alpha / rank (default: 1).

    The down projection starts random, the up projection at zero, so a fresh adapter changes nothing
    (Hu et al. 2021, section 4.1).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.scale = (alpha if alpha is not None else rank) / rank
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for name, (out_features, in_features) in shapes.items():
            down = torch.empty(rank, in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down[_key(name)] = nn.Parameter(down)
            self.up[_key(name)] = nn.Parameter(torch.zeros(out_features, rank))
        self.names = tuple(shapes)

    @classmethod
    def for_layers(
        cls, model: nn.Module, suffixes: tuple[str, ...], rank: int, alpha: float | None = None
    ) -> GatedLoRA:
        """Tails for every linear layer whose name ends in one of `suffixes` ("q_proj", "down_proj", ...).

        Raises:
            CheckpointError: if no layer of the model matches.
        """
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(suffixes)
        }
        if not shapes:
            raise CheckpointError(f"no linear layer of {type(model).__name__} is named like {', '.join(suffixes)}")
        return cls(shapes, rank, alpha)

    @classmethod
    def for_all_layers(cls, model: nn.Module, rank: int, alpha: float | None = None) -> GatedLoRA:
        """Tails for every linear layer of a causal language model but its head."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
        return cls.for_layers(model, names, rank, alpha)

    def tail(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Down projection [rank, in], up projection [out, rank] and scale of layer `name`."""
        return self.down[_key(name)], self.up[_key(name)], self.scale

    def add(self, name: str, rows: Tensor, output: Tensor, start: int) -> Tensor:
        """Add the low-rank part of layer `name` to output rows `start` and later.

        rows: [B, N, in], what the layer read; output: [B, N, out], what it made of it, overwritten unless start is 0.
        """
        down, up, _ = self.tail(name)
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        if start and rows.shape[0] == 1:  # two calls, of which a pass has hundreds
            output[0, start:].addmm_(torch.mm(rows[0, start:], down.T), up.T, alpha=self.scale)
            return output
        low = F.linear(F.linear(rows[:, start:], down), up)
        if start == 0:
            return torch.add(output, low, alpha=self.scale)
        output[:, start:].add_(low, alpha=self.scale)
        return output

    def delta(self, name: str) -> Tensor:
        """What merging adds to the weight of layer `name`: [out, in] float32 (all processes of a sharded one ask)."""
        down, up, scale = self.tail(name)
        return scale * (whole(up.detach()).float() @ whole(down.detach()).float())


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered (every process must ask at once), a plain one as it is."""
    gather = getattr(value, "full_tensor", None)
    found: Tensor = value if gather is None else gather()
    return found


def _key(name: str) -> str:
    return name.replace(".", "/")


class Gate:
    """Which adapter applies in the pass in flight, if any, and from which row on."""

    def __init__(self) -> None:
        self.adapter: GatedLoRA | None = None
        self.start = 0

    @contextmanager
    def open(self, adapter: GatedLoRA | None, start: int) -> Iterator[None]:
        """Inside the block, `adapter` applies to rows `start` and later, and no other adapter to any."""
        before = self.adapter, self.start
        self.adapter, self.start = adapter, start
        try:
            yield
        finally:
            self.adapter, self.start = before


def check_adapter(model: nn.Module, adapter: GatedLoRA) -> dict[str, nn.Linear]:
    """The model's linear layers an adapter belongs to, by name.

    Raises:
        CheckpointError: if the adapter names a layer the model does not have, or of another shape.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Linear] = {}
    for name in adapter.names:
        module = modules.get(name)
        down, up, _ = adapter.tail(name)
        wanted = (up.shape[0], down.shape[1])
        if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != wanted:
            what = "nothing" if module is None else f"{type(module).__name__} of another shape"
            raise CheckpointError(f"adapter expects a linear layer {name!r} of shape {wanted}, found {what}")
        found[name] = module
    return found


def attach(model: nn.Module, adapter: GatedLoRA, gate: Gate) -> list[Any]:
    """Hook the adapter's tails onto the model's linear layers; returns the handles that take them off again.

    Raises:
        CheckpointError: if the adapter names a layer the model does not have, or of another shape.
    """
    handles: list[Any] = []
    for layer, module in check_adapter(model, adapter).items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = layer) -> Tensor:
            if gate.adapter is not adapter:
                return output
            if output.dim() != 3:
                raise UnsupportedError(
                    f"layer {name!r} works on {output.dim()} dimensions, not on [batch, rows, features]: an adapter "
                    "cannot tell its rows apart. Leave that layer out of the adapter"
                )
            return adapter.add(name, inputs[0], output, gate.start) if gate.start < output.shape[1] else output

        handles.append(module.register_forward_hook(hook))
    return handles
