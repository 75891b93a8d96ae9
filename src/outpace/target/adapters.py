"""Row-gated low-rank adapters: LoRA that applies to some rows of a pass and leaves the others bit for bit alone.

The base layer computes every row; the low-rank tail is added to the gated rows only, by index, so that a row outside
the gate is the base model's, not the base model's plus zero times something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outpace.errors import CheckpointError

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

    def tail(self, name: str, rows: Tensor) -> Tensor:
        """The low-rank addition for some rows: [..., in] -> [..., out]."""
        down, up = self.down[_key(name)], self.up[_key(name)]
        added: Tensor = (rows.to(down.dtype) @ down.T @ up.T * self.scale).to(rows.dtype)
        return added


def _key(name: str) -> str:
    return name.replace(".", "/")


class Gate:
    """The adapter that is attached, and the rows of the pass in flight to which it applies: [B, rows] bool, or None."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.adapter: GatedLoRA | None = None


def attach(model: nn.Module, adapter: GatedLoRA, gate: Gate) -> list[Any]:
    """Hook the adapter's tails onto the model's linear layers; returns the handles that take them off again.

    Raises:
        CheckpointError: if the adapter names a layer the model does not have, or of another shape.
    """
    modules = dict(model.named_modules())
    handles: list[Any] = []
    for name in adapter.names:
        module = modules.get(name)
        wanted = (adapter.up[_key(name)].shape[0], adapter.down[_key(name)].shape[1])
        if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != wanted:
            found = "nothing" if module is None else f"{type(module).__name__} of another shape"
            for handle in handles:
                handle.remove()
            raise CheckpointError(f"adapter expects a linear layer {name!r} of shape {wanted}, found {found}")

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
            rows = gate.rows
            if rows is None:
                return output
            rows = rows[:, : output.shape[1]]
            output = output.clone()
            output[rows] = output[rows] + adapter.tail(name, inputs[0][rows])
            return output

        handles.append(module.register_forward_hook(hook))
    return handles
