"""Products of a few rows with large weights, on CUDA: Triton kernels that read every weight once.

Three kernels share one inner loop. A row's result does not depend on how many rows stand beside it: tiles always have
`TILE_ROWS` rows, and a row is multiplied by 16-deep tensor-core steps in rising order of K. Around the product:

- RMS norm in front. What writes the residual stream also writes it times gamma, and each program the squares of its
  columns; the product takes the former and multiplies its result by 1 / rms, from the latter.
- Rotary embedding and the cache write, the gated activation, bias and residual behind.
- Low-rank tails of an adapter (`tails`), added to the scout rows of a tile: their down projection rides along in the
  loop over K, and a row without a tail keeps the sum it has without an adapter.

Sums are float32 and rounded once, at the store; the modules of transformers round more often (after the norm, before
rotary, before the activation), so the two agree up to rounding.

`launch_pdl` starts a kernel while its predecessor drains; it then fetches its weights into L2 and waits.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.plan import Projection
    from outpace.target.fast.tails import TailRows


TILE_ROWS: Final = 32  # of every program: a row's sums are then laid out alike in every pass


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
    X, W, DOWN, rows, inside, first, second, lower, upper, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PAIR: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, LOWS: tl.constexpr,
):  # fmt: skip
    """Rows of X times weight rows `first` (and `second`): two [BM, BN] float32 tiles.

    And, times the down projections of parts `lower` (and `upper`, where LOWS is 2), two [BM, LOW] ones.
    """
    one = tl.zeros([BM, BN], tl.float32)
    two = tl.zeros([BM, BN], tl.float32)
    low = tl.zeros([BM, LOW], tl.float32)
    lowest = tl.zeros([BM, LOW], tl.float32)
    ranks = tl.arange(0, LOW)
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
        if RANK > 0:
            some = (ranks < RANK)[:, None] & (ks < K)[None, :]
            a = tl.load(DOWN + (lower * RANK + ranks)[:, None] * K + ks[None, :], mask=some, other=0.0)
            low = tl.dot(x, tl.trans(a), low, input_precision="ieee")
            if LOWS == 2:
                b = tl.load(DOWN + (upper * RANK + ranks)[:, None] * K + ks[None, :], mask=some, other=0.0)
                lowest = tl.dot(x, tl.trans(b), lowest, input_precision="ieee")
    return one, two, low, lowest


@triton.jit
def _part(row, one_end, two_end):
    """Which part of a joined product a weight row belongs to."""
    return (row >= one_end).to(tl.int32) + (row >= two_end).to(tl.int32)


@triton.jit
def _tailed(
    acc, low, UP, columns, scout, tail_scale, RANK: tl.constexpr, LOW: tl.constexpr
):  # fmt: skip
    """A tile with the tail of weight rows `columns` added to its scout rows; low is what the down projection gave."""
    ranks = tl.arange(0, LOW)
    up = tl.load(UP + columns[:, None] * RANK + ranks[None, :], mask=(ranks < RANK)[None, :], other=0.0)
    tail = tl.dot(low.to(up.dtype), tl.trans(up), input_precision="ieee")
    return tl.where(scout[:, None], acc + tail_scale * tail, acc)


@triton.jit
def _squares(SQUARES, rows, inside, PARTS: tl.constexpr):
    """What is known of the rows' squares: [BM, PARTS rounded up]."""
    block: tl.constexpr = triton.next_power_of_2(PARTS)
    at = tl.arange(0, block)
    keep = inside[:, None] & (at < PARTS)[None, :]
    return tl.load(SQUARES + rows[:, None] * PARTS + at[None, :], mask=keep, other=0.0)


@triton.jit
def _linear_kernel(
    X, W, OUT, SQUARES, BIAS, RESIDUAL, GAMMA, SCALED, SQUARES_OUT, DOWN, UP, M, eps, per, start, tail_scale, one_end,
    two_end, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FOLLOWED: tl.constexpr,
    SHIFT: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    weights = tl.minimum(columns, N - 1)
    inside = rows < M
    _prefetch(W, weights, K, LINES)
    enter_kernel(PDL)
    if PARTS > 0:
        squares = _squares(SQUARES, rows, inside, PARTS)
    part = _part(tl.program_id(1) * BN, one_end, two_end)
    acc, _, low, _ = _products(
        X, W, DOWN, rows, inside, weights, weights, part, part, K, BM, BN, BK, False, RANK, LOW, 1
    )  # fmt: skip
    if PARTS > 0:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        acc *= scale
        low *= scale
    if RANK > 0:
        acc = _tailed(acc, low, UP, weights, rows % per >= start, tail_scale, RANK, LOW)
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
    X, W, SQUARES, BIAS, DOWN, UP, rows, inside, first, second, lower, upper, eps, per, start, tail_scale,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, LOWS: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What every paired kernel begins with: norm(X) times weight rows `first` and `second`, with tails and biases."""
    _prefetch(W, first, K, LINES)
    _prefetch(W, second, K, LINES)
    enter_kernel(PDL)
    if PARTS > 0:
        squares = _squares(SQUARES, rows, inside, PARTS)
    one, two, low, lowest = _products(
        X, W, DOWN, rows, inside, first, second, lower, upper, K, BM, BN, BK, True, RANK, LOW, LOWS
    )  # fmt: skip
    if PARTS > 0:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        one *= scale
        two *= scale
        low *= scale
        lowest *= scale
    if RANK > 0:
        scout = rows % per >= start
        one = _tailed(one, low, UP, first, scout, tail_scale, RANK, LOW)
        if LOWS == 1:
            lowest = low
        two = _tailed(two, lowest, UP, second, scout, tail_scale, RANK, LOW)
    if HAS_BIAS:
        one += tl.load(BIAS + first).to(tl.float32)[None, :]
        two += tl.load(BIAS + second).to(tl.float32)[None, :]
    return one, two


@triton.jit
def _gated_kernel(
    X, W, OUT, SQUARES, BIAS, DOWN, UP, M, eps, per, start, tail_scale, one_end, two_end,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < M
    gates = tl.minimum(columns, N - 1)
    ups = gates + N
    first = tl.program_id(1) * BN
    lower, upper = _part(first, one_end, two_end), _part(first + N, one_end, two_end)
    gate, up = _pair(
        X, W, SQUARES, BIAS, DOWN, UP, rows, inside, gates, ups, lower, upper, eps, per, start, tail_scale, K, BM, BN,
        BK, PARTS, HAS_BIAS, RANK, LOW, 2, LINES, PDL,
    )  # fmt: skip
    keep = inside[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(OUT + at, activate(gate, up, GELU).to(OUT.dtype.element_ty), mask=keep)


@triton.jit
def _query_key_value_kernel(
    X, W, QUERY, KEYS, VALUES, SQUARES, BIAS, DOWN, UP, COS, SIN, POSITIONS, LENGTHS, SLOTS, M, R, capacity, eps,
    start, tail_scale, one_end, two_end,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
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
        X, W, SQUARES, BIAS, DOWN, UP, rows, inside, first, second, part, part, eps, R, start, tail_scale, K, BM, BN,
        BK, PARTS, HAS_BIAS, RANK, LOW, 1, LINES, PDL,
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
    weight: Tensor, tile: Tile, pdl: bool, halves: int, squares: Tensor | None, tailed: TailRows | None
) -> dict[str, Any]:
    rank = 0 if tailed is None else tailed.tail.rank
    depth = min(tile.depth, max(16, triton.next_power_of_2(weight.shape[1])))
    lines = triton.cdiv(weight.shape[1] * weight.element_size(), 128)
    pdl = pdl and tile.early
    most = max(1, 512 // (tile.columns * halves))  # lines per weight row: enough to start with, few instructions
    return {
        "K": weight.shape[1],
        "BM": TILE_ROWS,
        "BK": depth,
        "PARTS": squares.shape[1] if squares is not None else 0,
        "RANK": rank,
        "LOW": max(16, triton.next_power_of_2(rank)),
        "LINES": triton.next_power_of_2(min(lines, most)) if pdl else 0,
        "PDL": pdl,
        **launch_options(pdl),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _gate(tailed: TailRows | None) -> tuple[Any, ...]:
    """Down, up; rows per request, the first with a tail, its factor, where its second and third part begin."""
    if tailed is None:
        return None, None, 1, 0, 0.0, 0, 0
    tail = tailed.tail
    return tail.down, tail.up, tailed.per, tailed.start, tail.scale, *tail.ends


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
    down, up, *gate = _gate(tailed)
    scaled = None
    if follow is not None:
        scaled = Scaled(torch.empty_like(out), torch.empty(rows, pieces, dtype=torch.float32, device=out.device))
    _linear_kernel[(triton.cdiv(rows, TILE_ROWS), pieces)](
        source, weight, out, squares, bias, residual, follow.gamma if follow else None,
        scaled.rows if scaled else None, scaled.squares if scaled else None, down, up, rows, eps, *gate, N=count,
        BN=tile.columns, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, FOLLOWED=follow is not None,
        SHIFT=follow.shift if follow else 0.0, **_common(weight, tile, pdl, 1, squares, tailed),
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
    down, up, *gate = _gate(tailed)
    _gated_kernel[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(count, tile.columns))](
        source, weight, out, squares, bias, down, up, rows, eps, *gate, N=count, BN=tile.columns,
        HAS_BIAS=bias is not None, GELU=gelu, **_common(weight, tile, pdl, 2, squares, tailed),
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
    down, up, per, *gate = _gate(tailed)
    assert tailed is None or per == rows // lengths.shape[0]
    _query_key_value_kernel[(triton.cdiv(rows, TILE_ROWS), (heads + 2 * key_heads) * (size // 2 // columns))](
        source, weight, query, keys, values, squares, bias, down, up, rotary[0], rotary[1], positions, lengths, slots,
        rows, rows // lengths.shape[0], keys.shape[2], eps, *gate, HEADS=heads, KEY_HEADS=key_heads, SIZE=size,
        BN=columns, HAS_BIAS=bias is not None, **_common(weight, tile, pdl, 2, squares, tailed),
    )  # fmt: skip


def choose_tile(weight: Tensor, halves: int = 1) -> Tile:
    """Tile sizes for a weight [N, K] (`benchmarks/roofline.py --section tiles`); they depend on nothing else.

    halves: 2 for paired kernels.
    """
    size = weight.numel() * weight.element_size()
    if size < 16 << 20:
        return Tile(8 if halves == 2 and weight.shape[0] < 2048 else 16, 128, 2 if halves == 2 else 4, 6, True)
    if weight.shape[0] > 16 * weight.shape[1]:  # a head
        return Tile(32, 128, 4, 4, False) if size < 256 << 20 else Tile(16, 256, 2, 4, False)
    return Tile(16, 256, 4, 4, False) if weight.shape[1] > 8192 else Tile(16, 128, 2, 6, False)


def is_float(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)
