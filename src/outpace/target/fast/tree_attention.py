"""Attention of a block of rows over the used length of a ragged cache, on CUDA: a Triton kernel with split keys.

A row sees every committed entry of its request (within its window, if the layer slides), and those rows of its own
block that its bits name (or, for a chain, those before it). Keys are split into pieces of a fixed size, so what a
row's sum looks like depends on nothing but its own keys: not on the rows beside it, the batch, or the capacity of the
cache. A second kernel adds the pieces up in order. Scores, weights and sums are float32; weights are rounded to the
model's dtype before the product with the values.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

SHORT: Final = 128  # keys of each of the first pieces
LONG: Final = 768  # keys of each further one
FIRST: Final = 16  # how many are short
TILE_ROWS: Final = 64  # rows of one program, of all query heads of a key head
_KEYS: Final = 64  # keys of one step
_CHUNK: Final = 16  # pieces added up at once
_LOG2_E: Final = 1.4426950408889634
_SHORT: tl.constexpr = tl.constexpr(SHORT)
_LONG: tl.constexpr = tl.constexpr(LONG)
_FIRST: tl.constexpr = tl.constexpr(FIRST)


@triton.jit
def _start_of(piece):
    """First entry of a piece."""
    return tl.minimum(piece, _FIRST) * _SHORT + tl.maximum(piece - _FIRST, 0) * _LONG


@triton.jit
def _step(
    query, KEYS, VALUES, BITS, POSITIONS, base, begin, end, length, row, position, request, R, scale, window,
    largest, mass, acc, SIZE: tl.constexpr, PADDED: tl.constexpr, WORDS: tl.constexpr, BK: tl.constexpr,
    CHAIN: tl.constexpr, WINDOWED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `begin` on. TAIL: some of them may be rows of the block, or beyond `end`."""
    entry = begin + tl.arange(0, BK)
    ds = tl.arange(0, PADDED)
    spot = base + entry[:, None].to(tl.int64) * SIZE + ds[None, :]
    if TAIL:
        there = entry < end
        keep = there[:, None] & (ds < SIZE)[None, :]
        key = tl.load(KEYS + spot, mask=keep, other=0.0)
        value = tl.load(VALUES + spot, mask=keep, other=0.0)
    elif PADDED == SIZE:
        key = tl.load(KEYS + spot)
        value = tl.load(VALUES + spot)
    else:
        key = tl.load(KEYS + spot, mask=(ds < SIZE)[None, :], other=0.0)
        value = tl.load(VALUES + spot, mask=(ds < SIZE)[None, :], other=0.0)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if TAIL:
        node = entry - length
        if CHAIN:
            sees = node[None, :] <= row[:, None]
        else:
            sees = (node < 0)[None, :] & (row < R)[:, None]
            for number in tl.static_range(WORDS):
                word = tl.load(BITS + (request * R + row) * WORDS + number, mask=row < R, other=0)
                bit = (word[:, None] >> (node & 31)[None, :]) & 1
                sees = sees | ((bit != 0) & ((node >= 0) & (node >> 5 == number))[None, :])
        sees = sees & there[None, :]
        if WINDOWED:  # a committed entry is its position; a row of the block has its own
            other = tl.load(POSITIONS + request * R + node, mask=(node >= 0) & there, other=0)
            other = tl.where(node >= 0, other, entry)
            sees = sees & (position[:, None] - other[None, :] < window)
        score = tl.where(sees, score, float("-inf"))
    elif WINDOWED:
        score = tl.where(position[:, None] - entry[None, :] < window, score, float("-inf"))
    highest = tl.maximum(largest, tl.max(score, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(score - safe[:, None])
    fade = tl.exp2(largest - safe)
    mass = mass * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return highest, mass, acc


@triton.jit
def _attention_kernel(
    QUERY, KEYS, VALUES, PARTIAL, STATE, LENGTHS, SLOTS, BITS, POSITIONS, R, span, capacity, splits, scale, window,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WORDS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, CHAIN: tl.constexpr, WINDOWED: tl.constexpr,
    LONGS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = HEADS // KEY_HEADS
    request = tl.program_id(1) // KEY_HEADS
    which = tl.program_id(1) % KEY_HEADS
    split = tl.program_id(2)
    if LONGS:  # come first, so that none of them is left over at the end
        split = (split + _FIRST) % splits
    packed = tl.program_id(0) * BM + tl.arange(0, BM)  # rows of one key head: (row, head of the group)
    row = packed // groups
    inside = row < R
    head = which * groups + packed % groups
    place = ((request * R + row) * HEADS + head) * splits + split
    enter_kernel(PDL)
    length = tl.load(LENGTHS + request)
    slot = tl.load(SLOTS + request).to(tl.int64)
    ds = tl.arange(0, PADDED)
    real = (ds < SIZE)[None, :]
    at = (request * R + row)[:, None] * (HEADS * SIZE) + head[:, None] * SIZE + ds[None, :]
    query = tl.load(QUERY + at, mask=inside[:, None] & real, other=0.0)
    position = tl.load(POSITIONS + request * R + row, mask=inside, other=0)
    total = tl.minimum(length + span, capacity)
    start = _start_of(split)
    largest = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    if start < total:
        acc = tl.zeros([BM, PADDED], tl.float32)
        base = (slot * KEY_HEADS + which) * capacity * SIZE
        end = tl.minimum(_start_of(split + 1), total)
        tail = tl.maximum(tl.minimum(end, length // BK * BK), start)  # from here on, rows of the block
        for begin in range(start, tail, BK):
            largest, mass, acc = _step(
                query, KEYS, VALUES, BITS, POSITIONS, base, begin, end, length, row, position, request, R, scale,
                window, largest, mass, acc, SIZE, PADDED, WORDS, BK, CHAIN, WINDOWED, False,
            )  # fmt: skip
        for begin in range(tail, end, BK):
            largest, mass, acc = _step(
                query, KEYS, VALUES, BITS, POSITIONS, base, begin, end, length, row, position, request, R, scale,
                window, largest, mass, acc, SIZE, PADDED, WORDS, BK, CHAIN, WINDOWED, True,
            )  # fmt: skip
        tl.store(PARTIAL + place[:, None] * SIZE + ds[None, :], acc, mask=inside[:, None] & real)
    tl.store(STATE + place * 2, largest, mask=inside)
    tl.store(STATE + place * 2 + 1, mass, mask=inside)


@triton.jit
def _combine_kernel(
    PARTIAL, STATE, OUT, splits, SIZE: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Add the pieces of one row and head up, CHUNK at a time; a piece without mass holds nothing to read.

    Written out, so that all chunks are fetched at once; as large as they are for any number of pieces, so that the sum
    keeps its bits, however many of the last pieces are empty.
    """
    spot = tl.program_id(0).to(tl.int64)
    ds = tl.arange(0, PADDED)
    real = (ds < SIZE)[None, :]
    enter_kernel(PDL)
    piece = tl.arange(0, CHUNK)
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([PADDED], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        begin = chunk * CHUNK
        there = begin + piece < splits
        at = spot * splits + begin + piece
        part = tl.load(PARTIAL + at[:, None] * SIZE + ds[None, :], mask=there[:, None] & real, other=0.0)
        peak = tl.load(STATE + at * 2, mask=there, other=float("-inf"))
        mass = tl.load(STATE + at * 2 + 1, mask=there, other=0.0)
        highest = tl.maximum(largest, tl.max(peak, 0))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.where(mass > 0, tl.exp2(peak - safe), 0.0)
        fade = tl.exp2(largest - safe)
        total = total * fade + tl.sum(weight * mass, 0)
        acc = acc * fade + tl.sum(tl.where((mass > 0)[:, None], part, 0.0) * weight[:, None], 0)
        largest = highest
    tl.store(OUT + spot * SIZE + ds, (acc / tl.where(total > 0, total, 1.0)).to(OUT.dtype.element_ty), mask=ds < SIZE)


def splits_for(entries: int) -> int:
    """Pieces that the keys of a cache read up to `entries` entries fall into."""
    return min(-(-entries // SHORT), FIRST) + max(0, -(-(entries - FIRST * SHORT) // LONG))


class Workspace:
    """Room for the pieces of one pass, shared by its layers."""

    def __init__(self, rows: int, heads: int, size: int, splits: int, device: torch.device) -> None:
        self.splits = splits
        self.partial = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=device)
        self.state = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=device)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor,
    slots: Tensor,
    positions: Tensor,
    bits: Tensor | None,
    scaling: float,
    window: int | None,
    workspace: Workspace,
    span: int | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of B * R rows; the rows' own keys are already in the cache behind each request's length.

    span: entries behind the length that bits speak of, where those are not the R rows themselves.

    query: [B * R, heads, size]; keys, values: [slots, key heads, capacity, size]; lengths, slots: [B] int64;
    positions: [B * R] int64; bits: [B * R, words] int32, which of the entries behind the length each row sees (None: a
    chain).
    Returns [B * R, heads, size].
    """
    rows, heads, size = query.shape
    key_heads = keys.shape[1]
    batch = lengths.shape[0]
    per_request = rows // batch
    padded = max(16, triton.next_power_of_2(size))
    packed = per_request * (heads // key_heads)
    out = torch.empty_like(query)
    options: dict[str, Any] = launch_options(pdl)
    _attention_kernel[(triton.cdiv(packed, TILE_ROWS), batch * key_heads, workspace.splits)](
        query, keys, values, workspace.partial, workspace.state, lengths, slots, bits, positions, per_request,
        span or per_request, keys.shape[2], workspace.splits, scaling * _LOG2_E, window or 0, HEADS=heads,
        KEY_HEADS=key_heads, SIZE=size, PADDED=padded, WORDS=bits.shape[-1] if bits is not None else 1, BM=TILE_ROWS,
        BK=_KEYS, CHAIN=bits is None, WINDOWED=window is not None, LONGS=workspace.splits > FIRST,
        PDL=pdl, num_warps=4, num_stages=3 if size <= 128 else 2, **options,
    )  # fmt: skip
    _combine_kernel[(rows * heads,)](
        workspace.partial, workspace.state, out, workspace.splits, SIZE=size, PADDED=padded, CHUNK=_CHUNK,
        CHUNKS=triton.cdiv(workspace.splits, _CHUNK), PDL=pdl, num_warps=2, **options,
    )  # fmt: skip
    return out
