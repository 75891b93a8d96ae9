"""Products of a few rows with large weights, on CUDA: Triton kernels that read every weight once.

Three kernels share the inner loops. A row's result does not depend on how many rows stand beside it: tiles always have
`TILE_ROWS` rows, and a row is multiplied by 16-deep tensor-core steps in rising order of K. Around the product:

- RMS norm in front. What writes the residual stream also writes it times gamma, and each program the squares of its
  columns; the product takes the former and multiplies its result by 1 / rms, from the latter.
- Rotary embedding and the cache write, the gated activation, bias and residual behind.
- Low-rank tails of an adapter (`tails`), added to the scout rows of a tile; a small kernel in front has multiplied by
  the down projections. A row without a tail keeps the sum it has without an adapter.

A drafter's large weights are bytes with a scale per row (`Projection.scales`); a second inner loop reads them. Rows of
a draft may depend on how many stand beside them, so tiles are as low there as rows allow.

Sums are float32 and rounded once, at the store; the modules of transformers round more often (after the norm, before
rotary, before the activation), so the two agree up to rounding.

`launch_pdl` starts a kernel while its predecessor drains; it then fetches its weights into L2 and waits.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.plan import Projection
    from outpace.target.fast.tails import TailRows


_LOW_DEPTH: Final = 128  # columns of a step of a down projection
_MOST_PIECES: Final = 16
TILE_ROWS: Final = 32  # of every program: a row's sums are then laid out alike in every pass
_FEW_ROWS: Final = 16  # of a program that reads bytes, where no more are there


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut up: weight rows of a program (per half, for paired kernels), columns of a step, and so on.

    early: whether the kernel starts early and asks for its first weights then. That helps where launching takes longer
    than reading, and disturbs the reading of large weights.
    """

    columns: int
    depth: int
    warps: int
    stages: int
    early: bool


@triton.jit
def _prefetch(W, wrows, K: tl.constexpr, LINES: tl.constexpr):
    """Ask for the first LINES cache lines (128 bytes) of some weight rows."""
    if LINES > 0:
        size: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth
        at = W + wrows[:, None].to(tl.int64) * K + tl.minimum(tl.arange(0, LINES) * size, K - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _products(
    X, W, rows, inside, first, second, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """Rows of X times weight rows `first` (and `second`): two [BM, BN] float32 tiles."""
    one = tl.zeros([BM, BN], tl.float32)
    two = tl.zeros([BM, BN], tl.float32)
    steps: tl.constexpr = (K + BK - 1) // BK
    even: tl.constexpr = K % BK == 0
    for step in range(steps):
        ks = step * BK + tl.arange(0, BK)
        if even:
            x = tl.load(X + rows[:, None] * K + ks[None, :], mask=inside[:, None], other=0.0)
            w = tl.load(W + first[:, None] * K + ks[None, :])
        else:
            x = tl.load(X + rows[:, None] * K + ks[None, :], mask=inside[:, None] & (ks < K)[None, :], other=0.0)
            w = tl.load(W + first[:, None] * K + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        one = tl.dot(x, tl.trans(w), one, input_precision="ieee")
        if PAIR:
            if even:
                v = tl.load(W + second[:, None] * K + ks[None, :])
            else:
                v = tl.load(W + second[:, None] * K + ks[None, :], mask=(ks < K)[None, :], other=0.0)
            two = tl.dot(x, tl.trans(v), two, input_precision="ieee")
    return one, two


@triton.jit
def _eight_products(
    X, W, SCALES, rows, inside, first, second, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """`_products` with weights in eight bits: whole numbers, which every dtype of rows holds, and a scale per row.

    Two halves are columns of one product, in turns: of two products, every warp would take, and convert, all columns.
    """
    columns = tl.interleave(first, second) if PAIR else first
    both = tl.zeros([BM, 2 * BN if PAIR else BN], tl.float32)
    steps: tl.constexpr = (K + BK - 1) // BK
    even: tl.constexpr = K % BK == 0
    for step in range(steps):
        ks = step * BK + tl.arange(0, BK)
        if even:
            x = tl.load(X + rows[:, None] * K + ks[None, :], mask=inside[:, None], other=0.0)
            w = tl.load(W + columns[:, None] * K + ks[None, :])
        else:
            x = tl.load(X + rows[:, None] * K + ks[None, :], mask=inside[:, None] & (ks < K)[None, :], other=0.0)
            w = tl.load(W + columns[:, None] * K + ks[None, :], mask=(ks < K)[None, :], other=0)
        both = tl.dot(x, tl.trans(w.to(x.dtype)), both, input_precision="ieee")
    both *= tl.load(SCALES + columns)[None, :]
    if PAIR:
        one, two = tl.split(tl.reshape(both, [BM, BN, 2]))
    else:
        one, two = both, both
    return one, two


@triton.jit
def _low_kernel(
    X, DOWN, LOWS, per, start, scouts, parts, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    RANK: tl.constexpr, LOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A piece of K of the down projections of one part: LOWS [pieces, parts, scouts, LOW] float32."""
    scout = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    piece = tl.program_id(2)
    inside = scout < scouts
    many = per - start
    rows = scout // many * per + start + scout % many
    ranks = tl.arange(0, LOW)
    enter_kernel(PDL)
    low = tl.zeros([BM, LOW], tl.float32)
    for step in range(STEPS):
        ks = (piece * STEPS + step) * BK + tl.arange(0, BK)
        x = tl.load(X + rows[:, None] * K + ks[None, :], mask=inside[:, None] & (ks < K)[None, :], other=0.0)
        some = (ranks < RANK)[:, None] & (ks < K)[None, :]
        down = tl.load(DOWN + (part * RANK + ranks)[:, None] * K + ks[None, :], mask=some, other=0.0)
        low = tl.dot(x, tl.trans(down), low, input_precision="ieee")
    to = ((piece * parts + part) * scouts + scout)[:, None] * LOW + ranks[None, :]
    tl.store(LOWS + to, low, mask=inside[:, None])


@triton.jit
def _squares(SQUARES, rows, inside, PARTS: tl.constexpr):
    """What is known of the rows' squares: [BM, PARTS rounded up]."""
    block: tl.constexpr = triton.next_power_of_2(PARTS)
    at = tl.arange(0, block)
    keep = inside[:, None] & (at < PARTS)[None, :]
    return tl.load(SQUARES + rows[:, None] * PARTS + at[None, :], mask=keep, other=0.0)


@triton.jit
def _part(row, one_end, two_end):
    """Which part of a joined product a weight row belongs to."""
    return (row >= one_end).to(tl.int32) + (row >= two_end).to(tl.int32)


@triton.jit
def _tailed(
    acc, LOWS, UP, rows, inside, columns, part, scale, per, start, scouts, tails, tail_scale,
    BM: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A tile with the tail of weight rows `columns` added to its scout rows; scale: of every row, as of the product."""
    within = rows % per
    scout = (within >= start) & inside
    at = rows // per * (per - start) + within - start
    ranks = tl.arange(0, LOW)
    low = tl.zeros([BM, LOW], tl.float32)
    for piece in range(PIECES):
        place = ((piece * tails + part) * scouts + at)[:, None] * LOW + ranks[None, :]
        low += tl.load(LOWS + place, mask=scout[:, None], other=0.0)
    low *= scale
    up = tl.load(UP + columns[:, None] * RANK + ranks[None, :], mask=(ranks < RANK)[None, :], other=0.0)
    tail = tl.dot(low.to(up.dtype), tl.trans(up), input_precision="ieee")
    return tl.where(scout[:, None], acc + tail_scale * tail, acc)


@triton.jit
def _linear_kernel(
    X, W, SCALES, OUT, SQUARES, BIAS, RESIDUAL, GAMMA, SCALED, SQUARES_OUT, LOWS, UP, M, eps, per, start, scouts,
    tails, tail_scale, one_end, two_end,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FOLLOWED: tl.constexpr,
    SHIFT: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, PIECES: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    weights = tl.minimum(columns, N - 1)
    inside = rows < M
    _prefetch(W, weights, K, LINES)
    enter_kernel(PDL)
    if PARTS > 0:
        squares = _squares(SQUARES, rows, inside, PARTS)
    if EIGHT:
        acc, _ = _eight_products(X, W, SCALES, rows, inside, weights, weights, K, BM, BN, BK, False)
    else:
        acc, _ = _products(X, W, rows, inside, weights, weights, K, BM, BN, BK, False)
    scale = 1.0
    if PARTS > 0:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        acc *= scale
    if RANK > 0:
        part = _part(tl.program_id(1) * BN, one_end, two_end)
        acc = _tailed(
            acc, LOWS, UP, rows, inside, weights, part, scale, per, start, scouts, tails, tail_scale, BM, RANK, LOW,
            PIECES,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(BIAS + weights).to(tl.float32)[None, :]
    keep = inside[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(RESIDUAL + at, mask=keep, other=0.0).to(tl.float32)
    rounded = acc.to(OUT.dtype.element_ty)
    tl.store(OUT + at, rounded, mask=keep)
    if FOLLOWED:
        value = tl.where(keep, rounded.to(tl.float32), 0.0)
        gamma = tl.load(GAMMA + weights).to(tl.float32) + SHIFT
        tl.store(SCALED + at, (value * gamma[None, :]).to(SCALED.dtype.element_ty), mask=keep)
        parts: tl.constexpr = (N + BN - 1) // BN
        tl.store(SQUARES_OUT + rows * parts + tl.program_id(1), tl.sum(value * value, 1), mask=inside)


@triton.jit
def activate(gate, up, GELU: tl.constexpr):  # noqa: ANN201  # Triton's language
    """The gated activation: silu(gate) * up, or with the tanh form of gelu."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)  # 0.5 * g * (1 + tanh(a)) = g * sigmoid(2a)
    else:
        gate = gate * tl.sigmoid(gate)
    return gate * up


@triton.jit
def _pair(
    X, W, SCALES, SQUARES, BIAS, LOWS, UP, rows, inside, first, second, lower, upper, eps, per, start, scouts, tails,
    tail_scale,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, PIECES: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """What every paired kernel begins with: norm(X) times weight rows `first` and `second`, with tails and biases."""
    _prefetch(W, first, K, LINES)
    _prefetch(W, second, K, LINES)
    enter_kernel(PDL)
    if PARTS > 0:
        squares = _squares(SQUARES, rows, inside, PARTS)
    if EIGHT:
        one, two = _eight_products(X, W, SCALES, rows, inside, first, second, K, BM, BN, BK, True)
    else:
        one, two = _products(X, W, rows, inside, first, second, K, BM, BN, BK, True)
    scale = 1.0
    if PARTS > 0:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        one *= scale
        two *= scale
    if RANK > 0:
        one = _tailed(
            one, LOWS, UP, rows, inside, first, lower, scale, per, start, scouts, tails, tail_scale, BM, RANK, LOW,
            PIECES,
        )  # fmt: skip
        two = _tailed(
            two, LOWS, UP, rows, inside, second, upper, scale, per, start, scouts, tails, tail_scale, BM, RANK, LOW,
            PIECES,
        )  # fmt: skip
    if HAS_BIAS:
        one += tl.load(BIAS + first).to(tl.float32)[None, :]
        two += tl.load(BIAS + second).to(tl.float32)[None, :]
    return one, two


@triton.jit
def _gated_kernel(
    X, W, SCALES, OUT, SQUARES, BIAS, LOWS, UP, M, eps, per, start, scouts, tails, tail_scale, one_end, two_end,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, PIECES: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < M
    gates = tl.minimum(columns, N - 1)
    ups = gates + N
    first = tl.program_id(1) * BN
    lower, upper = _part(first, one_end, two_end), _part(first + N, one_end, two_end)
    gate, up = _pair(
        X, W, SCALES, SQUARES, BIAS, LOWS, UP, rows, inside, gates, ups, lower, upper, eps, per, start, scouts, tails,
        tail_scale, K, BM, BN, BK, PARTS, HAS_BIAS, RANK, LOW, PIECES, LINES, PDL, EIGHT,
    )  # fmt: skip
    keep = inside[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(OUT + at, activate(gate, up, GELU).to(OUT.dtype.element_ty), mask=keep)


@triton.jit
def _query_key_value_kernel(
    X, W, SCALES, QUERY, KEYS, VALUES, SQUARES, BIAS, LOWS, UP, COS, SIN, POSITIONS, LENGTHS, SLOTS, M, R, capacity,
    eps, start, scouts, tails, tail_scale, one_end, two_end,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, PIECES: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = SIZE // 2
    parts: tl.constexpr = half // BN
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1) // parts
    inner = tl.program_id(1) % parts * BN + tl.arange(0, BN)
    inside = rows < M
    first = head * SIZE + inner
    second = first + half
    part = _part(head * SIZE, one_end, two_end)
    one, two = _pair(
        X, W, SCALES, SQUARES, BIAS, LOWS, UP, rows, inside, first, second, part, part, eps, R, start, scouts, tails,
        tail_scale, K, BM, BN, BK, PARTS, HAS_BIAS, RANK, LOW, PIECES, LINES, PDL, EIGHT,
    )  # fmt: skip
    keep = inside[:, None]
    if head < HEADS + KEY_HEADS:
        at = tl.load(POSITIONS + rows, mask=inside, other=0)[:, None] * half + inner[None, :]
        cos = tl.load(COS + at, mask=keep, other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=keep, other=0.0).to(tl.float32)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        out = QUERY + (rows[:, None] * HEADS + head) * SIZE + inner[None, :]
        tl.store(out, one.to(QUERY.dtype.element_ty), mask=keep)
        tl.store(out + half, two.to(QUERY.dtype.element_ty), mask=keep)
    else:
        request = rows // R
        entry = tl.load(LENGTHS + request, mask=inside, other=0) + rows % R
        slot = tl.load(SLOTS + request, mask=inside, other=0)
        which = (head - HEADS) % KEY_HEADS
        to = ((slot * KEY_HEADS + which) * capacity + entry)[:, None] * SIZE + inner[None, :]
        keep = keep & (entry < capacity)[:, None]
        if head < HEADS + KEY_HEADS:
            tl.store(KEYS + to, one.to(KEYS.dtype.element_ty), mask=keep)
            tl.store(KEYS + to + half, two.to(KEYS.dtype.element_ty), mask=keep)
        else:
            tl.store(VALUES + to, one.to(VALUES.dtype.element_ty), mask=keep)
            tl.store(VALUES + to + half, two.to(VALUES.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows that only lack their division by rms: x [M, K] times gamma, and squares [M, parts] that add up to |x|^2."""

    rows: Tensor
    squares: Tensor


@dataclass(frozen=True, slots=True)
class Follow:
    """The norm behind a product: its gamma [N] (plus shift)."""

    gamma: Tensor
    shift: float


def _common(
    source: Tensor, projection: Projection, tile: Tile, pdl: bool, halves: int, squares: Tensor | None,
    tail: _TailArguments,
) -> dict[str, Any]:  # fmt: skip
    weight, eight = projection.weight, projection.scales is not None
    few = eight and source.shape[0] <= _FEW_ROWS
    depth = min(tile.depth, max(16, triton.next_power_of_2(weight.shape[1])))
    lines = triton.cdiv(weight.shape[1] * weight.element_size(), 128)
    pdl = pdl and tile.early
    most = max(1, 512 // (tile.columns * halves))  # lines per weight row: enough to start with, few instructions
    return {
        "K": weight.shape[1],
        "BM": _FEW_ROWS if few else TILE_ROWS,
        "BK": depth,
        "PARTS": squares.shape[1] if squares is not None else 0,
        "RANK": tail.rank,
        "LOW": tail.low,
        "PIECES": tail.pieces,
        "LINES": triton.next_power_of_2(min(lines, most)) if pdl else 0,
        "PDL": pdl,
        "EIGHT": eight,
        **launch_options(pdl),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


class _TailArguments(NamedTuple):
    """What a product's kernel is told of its tail; without one, nothing that it reads.

    numbers: rows per request, the first with a tail, rows with one, parts, the tail's factor, where its second and
    third part begin.
    """

    lows: Tensor | None = None
    up: Tensor | None = None
    numbers: tuple[Any, ...] = (1, 0, 0, 1, 0.0, 0, 0)
    rank: int = 0
    low: int = 16
    pieces: int = 1


def _tail_arguments(source: Tensor, tailed: TailRows | None, pdl: bool) -> _TailArguments:
    """Multiply scout rows by the down projections, in pieces of K that run side by side."""
    if tailed is None:
        return _TailArguments()
    tail, per, start = tailed.tail, tailed.per, tailed.start
    scouts, parts = source.shape[0] // per * (per - start), tail.down.shape[0] // tail.rank
    low = max(16, triton.next_power_of_2(tail.rank))
    steps = triton.cdiv(source.shape[1], _LOW_DEPTH)
    each = max(2, triton.cdiv(steps, _MOST_PIECES))
    pieces = triton.cdiv(steps, each)
    lows = torch.empty(pieces, parts, scouts, low, dtype=torch.float32, device=source.device)
    _low_kernel[(triton.cdiv(scouts, 16), parts, pieces)](
        source, tail.down, lows, per, start, scouts, parts, K=source.shape[1], BM=16, BK=_LOW_DEPTH, STEPS=each,
        RANK=tail.rank, LOW=low, PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return _TailArguments(lows, tail.up, (per, start, scouts, parts, tail.scale, *tail.ends), tail.rank, low, pieces)


def _taken(x: Tensor | Scaled) -> tuple[Tensor, Tensor | None]:
    return (x.rows, x.squares) if isinstance(x, Scaled) else (x, None)


def linear(
    x: Tensor | Scaled,
    projection: Projection,
    *,
    tile: Tile,
    residual: Tensor | None = None,
    follow: Follow | None = None,
    eps: float = 0.0,
    tailed: TailRows | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Scaled | None]:
    """norm(x) [M, K] @ weight.T + tail + bias + residual -> [M, N]; with `follow`, also scaled for the norm behind."""
    source, squares = _taken(x)
    weight, bias = projection.weight, projection.bias
    rows, count = source.shape[0], weight.shape[0]
    out = source.new_empty(rows, count)
    pieces = triton.cdiv(count, tile.columns)
    tail = _tail_arguments(source, tailed, pdl)
    scaled = None
    if follow is not None:
        scaled = Scaled(torch.empty_like(out), torch.empty(rows, pieces, dtype=torch.float32, device=out.device))
    _linear_kernel[(triton.cdiv(rows, TILE_ROWS), pieces)](
        source, weight, projection.scales, out, squares, bias, residual, follow.gamma if follow else None,
        scaled.rows if scaled else None, scaled.squares if scaled else None, tail.lows, tail.up, rows, eps,
        *tail.numbers, N=count, BN=tile.columns, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        FOLLOWED=follow is not None, SHIFT=follow.shift if follow else 0.0,
        **_common(source, projection, tile, pdl, 1, squares, tail),
    )  # fmt: skip
    return out, scaled


def gated_linear(
    x: Tensor | Scaled,
    projection: Projection,
    *,
    tile: Tile,
    gelu: bool,
    eps: float = 0.0,
    tailed: TailRows | None = None,
    pdl: bool = False,
) -> Tensor:
    """act(norm(x) @ gate.T) * (norm(x) @ up.T) -> [M, N], each with its tail; weight [2N, K] holds gate above up."""
    source, squares = _taken(x)
    weight, bias = projection.weight, projection.bias
    rows, count = source.shape[0], weight.shape[0] // 2
    out = source.new_empty(rows, count)
    tail = _tail_arguments(source, tailed, pdl)
    _gated_kernel[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(count, tile.columns))](
        source, weight, projection.scales, out, squares, bias, tail.lows, tail.up, rows, eps, *tail.numbers, N=count,
        BN=tile.columns, HAS_BIAS=bias is not None, GELU=gelu,
        **_common(source, projection, tile, pdl, 2, squares, tail),
    )  # fmt: skip
    return out


def query_key_value(
    x: Tensor | Scaled,
    projection: Projection,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    *,
    tile: Tile,
    eps: float,
    tailed: TailRows | None = None,
    pdl: bool = False,
) -> None:
    """Norm, project with tails, rotate; queries [M, heads, size] out, keys and values behind each request's length.

    keys, values: [slots, key heads, capacity, size]; positions: [M]; lengths, slots: [B], with M = B * R rows.
    """
    source, squares = _taken(x)
    weight, bias = projection.weight, projection.bias
    size, heads, key_heads = query.shape[-1], query.shape[1], keys.shape[1]
    columns = min(tile.columns, (size // 2) & -(size // 2))
    rows = source.shape[0]
    tail = _tail_arguments(source, tailed, pdl)
    assert tailed is None or tailed.per == rows // lengths.shape[0]
    _query_key_value_kernel[(triton.cdiv(rows, TILE_ROWS), (heads + 2 * key_heads) * (size // 2 // columns))](
        source, weight, projection.scales, query, keys, values, squares, bias, tail.lows, tail.up, rotary[0],
        rotary[1], positions, lengths, slots, rows, rows // lengths.shape[0], keys.shape[2], eps, *tail.numbers[1:],
        HEADS=heads, KEY_HEADS=key_heads, SIZE=size, BN=columns, HAS_BIAS=bias is not None,
        **_common(source, projection, tile, pdl, 2, squares, tail),
    )  # fmt: skip


def choose_tile(weight: Tensor, halves: int = 1, *, rows: int = 1) -> Tile:
    """Tile sizes for a weight [N, K] (`benchmarks/roofline.py --section tiles`).

    halves: 2 for paired kernels. rows: how many there are, which matters for weights in eight bits only: a target's
    rows have their bits from tiles that depend on nothing else.
    """
    size = weight.numel() * weight.element_size()
    if weight.dtype == torch.int8:
        return _choose_eight(weight.shape[0], halves, rows)
    if size < 16 << 20:
        return Tile(8 if halves == 2 and weight.shape[0] < 2048 else 16, 128, 2 if halves == 2 else 4, 6, True)
    if weight.shape[0] > 16 * weight.shape[1]:  # a head
        if size < 32 << 20:
            return Tile(64, 64, 4, 5, False)
        return Tile(32, 128, 4, 4, False) if size < 256 << 20 else Tile(16, 256, 2, 4, False)
    return Tile(16, 256, 4, 4, False) if weight.shape[1] > 8192 else Tile(16, 128, 2, 6, False)


def _choose_eight(width: int, halves: int, rows: int) -> Tile:
    """The same for a weight in eight bits [width, K]: half as many bytes wait for as many products."""
    wide, few = width >= 16384, rows <= _FEW_ROWS
    if halves == 2:
        return Tile(16, 256, 4, 3 if wide else 4, False) if few else Tile(32, 256, 4, 3, False)
    if wide:
        return Tile(32, 256, 4, 3, False) if few else Tile(64, 256, 8, 3, False)
    return Tile(16, 256, 2, 6, False) if few else Tile(32, 256, 4, 4, False)


def is_float(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)
