"""Passes over many rows at once, with gradients or without: what training runs of a frozen model.

Through a small model's modules such a pass is bound by elementwise steps: each reads and writes every row, and there
are thirty a layer. Here the two halves of a layer (`fast.layer`) are compiled, once for all layers; attention is the
caller's, between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from outpace.target.fast.layer import heads, rest

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.fast.plan import LayerPlan, Plan
    from outpace.target.model import Target

Attend = Callable[[int, "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(layer, queries [B, R, heads, D], keys and values [B, R, key heads, D]) -> [B, R, heads, D]."""
Tails = dict[str, list[tuple[int, int, "Tensor", "Tensor", float]]]
"""Of a joined product: columns [from, to) of each module with a low-rank part, down, up, scale."""

COMPILED_ROWS: Final = 8192  # passes over fewer rows are over before a compiler would be


class WidePass:
    """Passes of one model without its decoding cache.

    Args:
        plan: the model's. names: of the modules behind each joined product (`plan.joined_names`).
    """

    def __init__(self, plan: Plan, names: Sequence[dict[str, tuple[tuple[str, int], ...]]]) -> None:
        self.plan = plan
        self.names = names

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        adapter: GatedLoRA | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Run rows [B, R, H] at positions [B, R] through all layers; returns what the final norm reads.

        adapter: applies to every row. visit: is shown the state entering each layer.
        """
        plan = self.plan
        before, behind = _halves(hidden.is_cuda and positions.numel() >= COMPILED_ROWS)
        angles = {kind: tuple(table[positions][:, :, None] for table in tables) for kind, tables in plan.rotary.items()}
        for index, layer in enumerate(plan.layers):
            if visit is not None:
                visit(index, hidden)
            tails = self._tails(index, adapter)
            cos, sin = angles[layer.kind]
            attended = attend(index, *before(plan, layer, hidden, cos, sin, tails))
            hidden = behind(plan, layer, hidden, attended.flatten(2), tails)
        return hidden

    def _tails(self, index: int, adapter: GatedLoRA | None) -> Tails:
        if adapter is None:
            return {}
        found: Tails = {}
        for part, modules in self.names[index].items():
            at = 0
            for name, width in modules:
                if name in adapter.names:
                    found.setdefault(part, []).append((at, at + width, *adapter.tail(name)))
                at += width
        return found


def wide_pass(target: Target, reach: int) -> WidePass | None:
    """The wide pass of a model whose weights are frozen, or None where its modules have to do.

    reach: positions of all rows lie below it.
    """
    fast = target.fast
    if fast is None or target.layer_ids != tuple(range(target.layers_total)):
        return None
    if reach > min(cos.shape[0] for cos, _ in fast.plan.rotary.values()):
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in target.model.parameters()):
        return None
    return WidePass(fast.plan, fast.names)


def _before(
    plan: Plan, layer: LayerPlan, hidden: Tensor, cos: Tensor, sin: Tensor, tails: Tails
) -> tuple[Tensor, Tensor, Tensor]:
    return heads(plan, layer, hidden, cos, sin, lambda part, x: _product(layer, part, x, tails))


def _behind(plan: Plan, layer: LayerPlan, hidden: Tensor, attended: Tensor, tails: Tails) -> Tensor:
    return rest(plan, layer, hidden, attended, lambda part, x: _product(layer, part, x, tails))


def _product(layer: LayerPlan, part: str, x: Tensor, tails: Tails) -> Tensor:
    projection = getattr(layer, part)
    out = F.linear(x, projection.weight, projection.bias)
    found = tails.get(part)
    if not found:
        return out
    down = torch.cat([down for _, _, down, _, _ in found])
    return out + F.linear(F.linear(x, down.to(x.dtype)), _diagonal(found, out.shape[-1]).to(x.dtype))


def _diagonal(found: list[tuple[int, int, Tensor, Tensor, float]], width: int) -> Tensor:
    """The up projections of a joined product as one, [width, ranks]: each reads its own part of the joined low states.

    Two products instead of two for each module; zeros cost less than reading and writing all rows again.
    """
    total, at, rows, before = sum(up.shape[1] for _, _, _, up, _ in found), 0, [], 0
    for start, stop, _, up, scale in found:
        if start > at:
            rows.append(up.new_zeros(start - at, total))
        rows.append(F.pad(up * scale, (before, total - before - up.shape[1])))
        at, before = stop, before + up.shape[1]
    if width > at:
        rows.append(found[0][3].new_zeros(width - at, total))
    return torch.cat(rows)


@functools.cache
def _halves(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions, compiled for each shape and structure they meet, or as they are."""
    if not compiled:
        return _before, _behind
    return torch.compile(_before, fullgraph=True, dynamic=False), torch.compile(_behind, fullgraph=True, dynamic=False)
