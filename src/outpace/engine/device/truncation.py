"""Top-k, top-p and min-p on the device: which ids of a row stay, as a threshold.

What `laws.warp` keeps of a row are its largest logits, so two numbers say it: the order key of the smallest logit
kept, and the last id of those that tie with it. Searches find them: one for top-k, one behind it for top-p. At each
level, programs for all chunks of a row measure what ids hold from each of sixteen keys on, and the next level goes on
between the two keys that the goal lies between: four levels for the 65 536 keys of bfloat16, eight for float32. Nothing
is sorted; a row that is not truncated is read once.

Of V ids, those whose weight is below (1 - p) / V of the largest hold less than 1 - p together, so the search for top-p
begins above them; and a chunk whose largest logit lies below what is searched is not read again. Most are not.

Weights are exp((logit - largest) / temperature) in float32, summed in float64: an id whose cumulated mass is within
about 1e-7 of top-p may fall on the other side than in torch.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import dependent_launch, enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws import Settings

_CHUNK: Final = 2048  # ids of one program
_BLOCK: Final = 512  # ids that are compared with sixteen keys at a time
_SHIFTS: Final = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits that a widened number never uses


class Cuts(NamedTuple):
    """By what some request of a batch truncates. False where none does."""

    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    def __bool__(self) -> bool:
        return self.top_k or self.top_p or self.min_p


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

    def load(self, settings: Sequence[Settings]) -> Cuts:
        """By what these requests truncate; their settings are put there then, and read by nobody else."""
        drawn = [s for s in settings if s.temperature > 0]
        cuts = Cuts(
            any(s.top_k is not None for s in drawn),
            any(s.top_p is not None and s.top_p < 1 for s in drawn),
            any(bool(s.min_p) for s in drawn),
        )
        if not cuts:
            return cuts
        spare = self.top_k.shape[0] - len(settings)
        for tensor, values, nothing in (
            (self.top_k, [s.top_k or 0 for s in settings], 0),
            (self.top_p, [1.0 if s.top_p is None else s.top_p for s in settings], 1.0),
            (self.min_p, [s.min_p or 0.0 for s in settings], 0.0),
        ):
            tensor.copy_(torch.tensor([*values, *([nothing] * spare)], dtype=tensor.dtype), non_blocking=True)
        return cuts


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
def _keys(LOGITS, row, at, V, SHIFT: tl.constexpr):
    """Order keys of a row's ids, and the logits."""
    x = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    return _order(x, SHIFT), x


@triton.jit
def _top(TOPS, row, T, WIDTH: tl.constexpr):
    """The largest logit of a row."""
    at = tl.arange(0, WIDTH)
    return tl.max(tl.load(TOPS + row * T + at, mask=at < T, other=float("-inf")), 0)


@triton.jit
def _whole(MASSES, row, T, WIDTH: tl.constexpr):
    """What all ids of a row hold that top-k leaves."""
    at = tl.arange(0, WIDTH)
    return tl.sum(tl.load(MASSES + row * T + at, mask=at < T, other=0.0), 0)


@triton.jit
def _narrowed(EDGES, ABOVES, PARTS, place, T, goal, WIDTH: tl.constexpr):
    """Between which keys the goal lies, once a level's sums are there: (low, high, held above high).

    place: of the level's row. goal: what ids from the sought key on hold.
    """
    at = tl.arange(0, 16)
    tile = tl.arange(0, WIDTH)
    low = tl.load(EDGES + place * 2)
    high = tl.load(EDGES + place * 2 + 1)
    parts = PARTS + place * T * 16 + tile[:, None] * 16 + at[None, :]
    held = tl.sum(tl.load(parts, mask=(tile < T)[:, None], other=0.0), 0)
    step = (high - low + 15) // 16
    pivots = low + step * at
    reached = tl.maximum(tl.sum(((held >= goal) & (pivots < high)).to(tl.int64), 0), 1)
    upper = low + step * reached
    above = tl.where(upper < high, tl.sum(tl.where(at == reached, held, 0.0), 0), tl.load(ABOVES + place))
    return low + step * (reached - 1), tl.minimum(high, upper), above


@triton.jit
def _tops_kernel(LOGITS, TOPS, V, T, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """The largest logit of a chunk."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    enter_kernel(PDL)
    at = tile * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    tl.store(TOPS + row * T + tile, tl.max(x, 0))


@triton.jit(do_not_specialize=["LEVEL"])
def _level_kernel(
    LOGITS, TEMPERATURE, TOP_K, TOP_P, TOPS, FLOORS, MASSES, EDGES, ABOVES, PARTS, R, V, T, M, LEVEL,
    MASS: tl.constexpr, FIRST: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What ids of a chunk hold from each of sixteen keys on, the keys between which the level before has put the goal.

    MASS: they hold their weight, and the goal is top_p of all; otherwise their number, and it is top_k. FIRST: all keys
    are possible that the search before has left and that can matter.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    request = row // R
    enter_kernel(PDL)
    heat = tl.load(TEMPERATURE + request)
    top_k = tl.load(TOP_K + request)
    top_p = tl.load(TOP_P + request)
    counts = (top_k > 0) & (top_k < V)
    if (heat > 0) & ((top_p < 1) if MASS else counts):
        now = (LEVEL % 2) * M + row
        before = M - now + 2 * row
        top = _top(TOPS, row, T, WIDTH)
        floor = tl.full([], -(1 << 31), tl.int32) >> SHIFT
        if FIRST:
            if MASS:
                if counts:
                    found, _high, _above = _narrowed(EDGES, ABOVES, PARTS, before, T, top_k.to(tl.float64), WIDTH)
                    floor = found.to(tl.int32)
                tl.store(FLOORS + row, floor, mask=tile == 0)
            low = floor.to(tl.int64)
            high = _order(top, SHIFT).to(tl.int64) + 1
            above = tl.full([], 0.0, tl.float64)
            if MASS:
                reach = heat * (1 + tl.log((V / (1 - top_p)).to(tl.float32)))
                least = _order(top - reach, SHIFT).to(tl.int64)
                low = tl.where((least > low) & (least < high), least, low)
                total = tl.zeros([BLOCK], tl.float32)
                for start in range(0, CHUNK, BLOCK):
                    at = tile * CHUNK + start + tl.arange(0, BLOCK)
                    key, x = _keys(LOGITS, row, at, V, SHIFT)
                    total += tl.where((at < V) & (key >= floor), tl.exp(x / heat - top / heat), 0.0)
                tl.store(MASSES + row * T + tile, tl.sum(total.to(tl.float64), 0))
        else:
            goal = top_k.to(tl.float64)
            if MASS:
                floor = tl.load(FLOORS + row)
                goal = top_p * _whole(MASSES, row, T, WIDTH)
            low, high, above = _narrowed(EDGES, ABOVES, PARTS, before, T, goal, WIDTH)
        tl.store(EDGES + now * 2, low, mask=tile == 0)
        tl.store(EDGES + now * 2 + 1, high, mask=tile == 0)
        tl.store(ABOVES + now, above, mask=tile == 0)
        held = tl.zeros([16], tl.float64)
        if (high - low > 1) & (_order(tl.load(TOPS + row * T + tile), SHIFT) >= low):
            pivots = low + (high - low + 15) // 16 * tl.arange(0, 16)
            sums = tl.zeros([BLOCK, 16], tl.float32)
            for start in range(0, CHUNK, BLOCK):
                at = tile * CHUNK + start + tl.arange(0, BLOCK)
                key, x = _keys(LOGITS, row, at, V, SHIFT)
                weight = tl.where((at < V) & (key >= floor), tl.exp(x / heat - top / heat) if MASS else 1.0, 0.0)
                sums += tl.where(key.to(tl.int64)[:, None] >= pivots[None, :], weight[:, None], 0.0)
            held = tl.sum(sums.to(tl.float64), 0)
        tl.store(PARTS + (now * T + tile) * 16 + tl.arange(0, 16), held)


@triton.jit
def _ties_kernel(
    LOGITS, TEMPERATURE, TOP_K, TOP_P, TOPS, MASSES, EDGES, ABOVES, PARTS, CUTS, WANTED, TIES, R, V, T, M,
    LEVELS: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The smallest key that stays, how many of those that tie with it do, and how many there are in a chunk."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    request = row // R
    enter_kernel(PDL)
    heat = tl.load(TEMPERATURE + request)
    top_k = tl.load(TOP_K + request)
    top_p = tl.load(TOP_P + request)
    cut = tl.full([], -(1 << 31), tl.int32) >> SHIFT
    wanted = tl.full([], float("inf"), tl.float64)
    if (heat > 0) & (top_p < 1):
        goal = top_p * _whole(MASSES, row, T, WIDTH)
        place = (2 * LEVELS - 1) % 2 * M + row
        low, _high, above = _narrowed(EDGES, ABOVES, PARTS, place, T, goal, WIDTH)
        cut = low.to(tl.int32)
        each = tl.exp(_value(cut, SHIFT) / heat - _top(TOPS, row, T, WIDTH) / heat).to(tl.float64)
        wanted = tl.maximum(tl.ceil((goal - above) / each), 1.0)
        ties = tl.full([], 0, tl.int32)
        if _order(tl.load(TOPS + row * T + tile), SHIFT) >= cut:
            at = tile * CHUNK + tl.arange(0, CHUNK)
            key, _x = _keys(LOGITS, row, at, V, SHIFT)
            ties = tl.sum(((key == cut) & (at < V)).to(tl.int32), 0)
        tl.store(TIES + row * T + tile, ties)
    elif (heat > 0) & (top_k > 0) & (top_k < V):
        place = (LEVELS - 1) % 2 * M + row
        low, _high, _above = _narrowed(EDGES, ABOVES, PARTS, place, T, top_k.to(tl.float64), WIDTH)
        cut = low.to(tl.int32)
    tl.store(CUTS + row, cut, mask=tile == 0)
    tl.store(WANTED + row, wanted, mask=tile == 0)


@triton.jit
def _last_kernel(
    LOGITS, TEMPERATURE, MIN_P, TOPS, CUTS, LASTS, WANTED, TIES, R, V, T,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last id that stays of those that tie, and min-p."""
    row = tl.program_id(0)
    request = row // R
    enter_kernel(PDL)
    heat = tl.load(TEMPERATURE + request)
    min_p = tl.load(MIN_P + request)
    cut = tl.load(CUTS + row)
    wanted = tl.load(WANTED + row)
    last = tl.full([], 0, tl.int32) + V
    if wanted < float("inf"):
        tile = tl.arange(0, WIDTH)
        ties = tl.load(TIES + row * T + tile, mask=tile < T, other=0)
        met = tl.cumsum(ties, 0)
        chunk = tl.min(tl.where((met.to(tl.float64) >= wanted) & (tile < T), tile, T), 0)
        before = tl.sum(tl.where(tile < chunk, ties, 0), 0)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        key, _x = _keys(LOGITS, row, at, V, SHIFT)
        tied = ((key == cut) & (at < V)).to(tl.int32)
        enough = (tied > 0) & ((before + tl.cumsum(tied, 0)).to(tl.float64) >= wanted)
        last = tl.min(tl.where(enough, at, V), 0)
    if (heat > 0) & (min_p > 0):
        top = _top(TOPS, row, T, WIDTH)
        low = cut.to(tl.int64) - 1  # not kept, or not likely enough
        high = _order(top, SHIFT).to(tl.int64)
        while high - low > 1:
            middle = (low + high) // 2
            likely = tl.exp(_value(middle.to(tl.int32), SHIFT) / heat - top / heat) >= min_p
            high = tl.where(likely, middle, high)
            low = tl.where(likely, low, middle)
        last = tl.where(high > cut, V, last)
        tl.store(CUTS + row, high.to(tl.int32))
    tl.store(LASTS + row, last)


def shift_of(logits: Tensor) -> int:
    """Bits that order keys of such logits leave out."""
    return _SHIFTS[logits.dtype]


class Cutter:
    """Room for truncating M rows of a vocabulary, and finding what stays of them.

    Attributes:
        cuts, lasts: [M] int32, see `kept`.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device, *, chunk: int = _CHUNK) -> None:
        self.rows, self.chunk, self.chunks = rows, chunk, -(-vocabulary // chunk)

        def room(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.cuts, self.lasts = room(torch.int32, rows), room(torch.int32, rows)
        self._tops, self._ties = room(torch.float32, rows, self.chunks), room(torch.int32, rows, self.chunks)
        self._floors, self._wanted = room(torch.int32, rows), room(torch.float64, rows)
        self._masses = room(torch.float64, rows, self.chunks)
        # two levels of a search: the one that is read, and the one that is written
        self._edges, self._aboves = room(torch.int64, 2, rows, 2), room(torch.float64, 2, rows)
        self._parts = room(torch.float64, 2, rows, self.chunks, 16)
        self.pdl = dependent_launch(device)

    def __call__(self, logits: Tensor, temperature: Tensor, truncation: Truncation, by: Cuts) -> None:
        """Write cuts and lasts of the first B * R rows.

        logits: [B, R, V] contiguous; temperature: [B] float32; by: what may truncate; other searches are left out.
        """
        batch, rows, vocabulary = logits.shape
        shift = shift_of(logits)
        levels = -(-(32 - shift) // 4)
        grid = (batch * rows, self.chunks)
        top_k, top_p, min_p = truncation
        options: dict[str, Any] = {"CHUNK": self.chunk, "PDL": self.pdl, "num_warps": 4, **launch_options(self.pdl)}
        sized = options | {"SHIFT": shift, "WIDTH": triton.next_power_of_2(self.chunks)}
        search = (self._edges, self._aboves, self._parts)
        _tops_kernel[grid](logits, self._tops, vocabulary, self.chunks, **options)
        for level in range(0 if by.top_k else levels, 2 * levels if by.top_p else levels):
            _level_kernel[grid](
                logits, temperature, top_k, top_p, self._tops, self._floors, self._masses, *search, rows, vocabulary,
                self.chunks, self.rows, level, MASS=level >= levels, FIRST=level % levels == 0,
                BLOCK=min(_BLOCK, self.chunk), **sized,
            )  # fmt: skip
        _ties_kernel[grid](
            logits, temperature, top_k, top_p, self._tops, self._masses, *search, self.cuts, self._wanted, self._ties,
            rows, vocabulary, self.chunks, self.rows, LEVELS=levels, **sized,
        )  # fmt: skip
        _last_kernel[(batch * rows,)](
            logits, temperature, min_p, self._tops, self.cuts, self.lasts, self._wanted, self._ties, rows, vocabulary,
            self.chunks, **sized,
        )  # fmt: skip
