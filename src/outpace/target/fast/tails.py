"""Low-rank tails of an adapter as the kernels of few rows take them: part of the product they join.

A joined product (queries, keys and values; gate and up) has one tail a part. Their down projections lie one behind the
other, and so do their up projections, in the order of the product's weight rows; the adapter's parameters become views
of both, so that what is written to them later counts here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from outpace.target.fast.linear import choose_tile
from outpace.target.fast.plan import join_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.fast.plan import Joined, Plan

MOST_RANK: Final = 64


@dataclass(frozen=True, slots=True)
class Tail:
    """What joins a product [N, K].

    Attributes:
        down: [parts * rank, K]. up: [N, rank]. scale: factor of their product.
        ends: weight rows at which the second and the third part begin (N where there is none).
    """

    down: Tensor
    up: Tensor
    rank: int
    scale: float
    ends: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TailRows:
    """A tail, and the rows it joins: of every `per` rows those from `start` on."""

    tail: Tail
    per: int
    start: int


def make_tails(adapter: GatedLoRA, names: list[dict[str, Joined]], plan: Plan) -> list[dict[str, Tail]] | None:
    """The tails of every layer's products by their names in `joined_names`, or None if kernels cannot take them.

    They can where all parts of a product have a tail or none has, ranks are small, weights are of the pass's dtype, and
    no program of a plain product has columns of two parts.
    """
    if adapter.rank > MOST_RANK or any(p.dtype != plan.dtype for p in adapter.parameters()):
        return None
    known = set(adapter.names)
    found = []
    for index, layer in enumerate(names):
        tails = {}
        columns = choose_tile(plan.layers[index].qkv.weight).columns if plan.query_key_norm != "none" else 1
        if any(width % columns for _, width in layer["qkv"]):
            return None
        for part, joined in layer.items():
            present = [name for name, _ in joined if name in known]
            if not present:
                continue
            if len(present) < len(joined):
                return None
            parameters: Any = [adapter.tail(name)[:2] for name in present]
            downs, ups = zip(*parameters, strict=True)
            up = join_parameters(ups)
            starts = [*accumulate(width for _, width in joined), up.shape[0], up.shape[0]]
            tails[part] = Tail(join_parameters(downs), up, adapter.rank, adapter.scale, (starts[0], starts[1]))
        found.append(tails)
    return found
