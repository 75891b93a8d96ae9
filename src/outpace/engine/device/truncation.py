"""Top-k, top-p and min-p on the device: which ids of a row stay, as a threshold.

What `laws.warp` keeps of a row are its largest logits, so two numbers say it: the order key of the smallest logit
kept, and the last id of those that tie with it. One program finds them for a row. Each search looks at all logits with
sixteen thresholds at a time and goes on between the two that hold the goal, until they are neighbours; nothing is
sorted, and a row that is not truncated is not read.

Weights are exp((logit - largest) / temperature) in float32, summed in float64: an id whose cumulated mass is within
about 1e-7 of top-p may fall on the other side than in torch.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws import Settings

_BLOCK: Final = 1024
_WARPS: Final = 8
_SHIFTS: Final = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits that a widened number never uses


class Truncation(NamedTuple):
    """Of each request, [B] each: top_k int64 (0: none), top_p float64 (1: none), min_p float32 (0: none)."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def room(cls, batch: int, device: torch.device) -> Truncation:
        """Static tensors that truncate nothing."""
        return cls(
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.ones(batch, dtype=torch.float64, device=device),
            torch.zeros(batch, dtype=torch.float32, device=device),
        )

    def load(self, settings: Sequence[Settings]) -> bool:
        """Whether one of these requests truncates; their settings are put there then, and read by nobody else."""
        if not any(s.truncates for s in settings):
            return False
        spare = self.top_k.shape[0] - len(settings)
        for tensor, values, nothing in (
            (self.top_k, [s.top_k or 0 for s in settings], 0),
            (self.top_p, [1.0 if s.top_p is None else s.top_p for s in settings], 1.0),
            (self.min_p, [s.min_p or 0.0 for s in settings], 0.0),
        ):
            tensor.copy_(torch.tensor([*values, *([nothing] * spare)], dtype=tensor.dtype), non_blocking=True)
        return True


@triton.jit
def kept(logits, at, cut, last, SHIFT: tl.constexpr):  # noqa: ANN201  # Triton's language
    """Whether ids `at` with these logits (float32) stay."""
    key = _order(logits, SHIFT)
    return (key > cut) | ((key == cut) & (at <= last))


@triton.jit
def _order(x, SHIFT: tl.constexpr):
    """An int32 that orders as x does; -0 and 0 are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The number with an order key."""
    bits = key << SHIFT
    bits = tl.where(bits < 0, (bits ^ 0x7FFFFFFF) & ~((1 << SHIFT) - 1), bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weights(ROW, start, V, heat, top, floor, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Order keys of a tile, and weights of what is not below `floor`."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(ROW + at, mask=at < V, other=float("-inf")).to(tl.float32)
    key = _order(x, SHIFT)
    weight = tl.where((at < V) & (key >= floor), tl.exp(x / heat - top / heat), 0.0)
    return key, weight


@triton.jit
def _search(
    ROW, V, low, high, goal, heat, top, floor,
    COUNTS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from which on ids hold `goal`, and what those above it hold.

    low, high: int64 keys; ids from `low` on hold it, those from `high` on do not. COUNTS: ids count, not their mass.
    """
    above = tl.full([], 0.0, tl.float64)
    while high - low > 1:
        step = (high - low + 15) // 16
        pivots = low + step * (1 + tl.arange(0, 16).to(tl.int64))
        sums = tl.zeros([BLOCK, 16], tl.float32)
        for start in range(0, V, BLOCK):
            key, weight = _weights(ROW, start, V, heat, top, floor, SHIFT, BLOCK)
            if COUNTS:
                weight = tl.where(start + tl.arange(0, BLOCK) < V, 1.0, 0.0)
            sums += tl.where(key.to(tl.int64)[:, None] >= pivots[None, :], weight[:, None], 0.0)
        held = tl.sum(sums.to(tl.float64), 0)
        reached = tl.sum(((held >= goal) & (pivots < high)).to(tl.int64), 0)
        next_pivot = low + step * (reached + 1)
        above = tl.where(next_pivot < high, tl.sum(tl.where(pivots == next_pivot, held, 0.0), 0), above)
        high = tl.minimum(high, next_pivot)
        low += step * reached
    return low, above


@triton.jit
def _cut_kernel(
    LOGITS, TEMPERATURE, TOP_K, TOP_P, MIN_P, CUTS, LASTS, R, V, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Threshold and last tied id of one row."""
    row = tl.program_id(0)
    request = row // R
    heat = tl.load(TEMPERATURE + request)
    top_k = tl.load(TOP_K + request)
    top_p = tl.load(TOP_P + request)
    min_p = tl.load(MIN_P + request)
    cut = tl.full([], -(1 << 31), tl.int32) >> SHIFT
    last = tl.full([], 0, tl.int32) + V
    if (heat > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0)):
        base = LOGITS + row.to(tl.int64) * V
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(base + at, mask=at < V, other=float("-inf")).to(tl.float32))
        top = tl.max(best, 0)
        best_key = _order(top, SHIFT).to(tl.int64)
        if (top_k > 0) & (top_k < V):
            found, _above = _search(
                base, V, cut.to(tl.int64), best_key + 1, top_k.to(tl.float64), heat, top, cut, True, SHIFT, BLOCK
            )
            cut = found.to(tl.int32)
        if top_p < 1:
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                _key, weight = _weights(base, start, V, heat, top, cut, SHIFT, BLOCK)
                sums += weight
            total = tl.sum(sums.to(tl.float64), 0)
            goal = top_p * total
            rare = (0.5 * (1 - top_p) * total / V).to(tl.float32)  # ids that weigh less can all be left out together
            low = tl.maximum(cut, _order(top + heat * tl.log(rare), SHIFT)).to(tl.int64)
            found, above = _search(base, V, low, best_key + 1, goal, heat, top, cut, False, SHIFT, BLOCK)
            cut = found.to(tl.int32)
            each = tl.exp(_value(cut, SHIFT) / heat - top / heat).to(tl.float64)
            wanted = tl.maximum(tl.ceil((goal - above) / each), 1.0)
            before = tl.full([], 0.0, tl.float64)
            for start in range(0, V, BLOCK):  # the id at which enough of those that tie have been met
                key, _weight = _weights(base, start, V, heat, top, cut, SHIFT, BLOCK)
                ties = ((key == cut) & (start + tl.arange(0, BLOCK) < V)).to(tl.int32)
                met = before + tl.cumsum(ties, 0).to(tl.float64)
                here = tl.min(tl.where((ties > 0) & (met >= wanted), start + tl.arange(0, BLOCK), V), 0)
                last = tl.minimum(last, here)
                before += tl.sum(ties, 0).to(tl.float64)
        if min_p > 0:
            low = cut.to(tl.int64) - 1  # not kept, or not likely enough
            high = best_key
            while high - low > 1:
                middle = (low + high) // 2
                likely = tl.exp(_value(middle.to(tl.int32), SHIFT) / heat - top / heat) >= min_p
                high = tl.where(likely, middle, high)
                low = tl.where(likely, low, middle)
            last = tl.where(high > cut, V, last)
            cut = high.to(tl.int32)
    tl.store(CUTS + row, cut)
    tl.store(LASTS + row, last)


def shift_of(logits: Tensor) -> int:
    """Bits that order keys of such logits leave out."""
    return _SHIFTS[logits.dtype]


def cut_rows(logits: Tensor, temperature: Tensor, truncation: Truncation, cuts: Tensor, lasts: Tensor) -> None:
    """Find what stays of every row; see `kept`.

    logits: [B, R, V] contiguous; temperature: [B] float32. Written: cuts, lasts [B * R] int32.
    """
    batch, rows, vocabulary = logits.shape
    _cut_kernel[(batch * rows,)](
        logits, temperature, *truncation, cuts, lasts, rows, vocabulary, SHIFT=shift_of(logits),
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=_WARPS,
    )  # fmt: skip
