"""Attention of windows of rows behind a frozen reading, one kernel each way: `behind.Spans` without its mask.

A window sees one range of the reading and itself, so a program that holds some whole windows, with query heads of one
key head, walks over the union of their ranges once and over their own rows last. Backwards it finishes everything
itself: gradients of its queries, and of its own keys and values. The reading wants none, which is most of what a kernel
that knows no better spends its time on.

Scores and sums are float32; weights are rounded to the keys' dtype before products, as flash attention does.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.behind import Range

_LOG2_E: Final = 1.4426950408889634
_KEYS: Final = 64  # entries of one step
_KEYS_BACK: Final = 32  # backwards, where registers are what programs have least of


@triton.jit
def _rows_of(R, BM: tl.constexpr, BW: tl.constexpr, NQ: tl.constexpr, G: tl.constexpr, GB: tl.constexpr,
             KEY_HEADS: tl.constexpr):  # fmt: skip
    """Batch index, key head and part of the group; of each line (row, head; heads fastest): row here, row, head, is."""
    parts: tl.constexpr = (G + GB - 1) // GB
    part = tl.program_id(1) % parts
    key_head = tl.program_id(1) // parts % KEY_HEADS
    batch = (tl.program_id(1) // parts // KEY_HEADS).to(tl.int64)
    line = tl.arange(0, BM)
    local = line // GB
    member = part * GB + line % GB
    row = tl.program_id(0) * (BW * NQ) + local
    inside = (local < BW * NQ) & (row < R) & (member < G)
    return batch, key_head, part, local, row, key_head * G + member, inside


@triton.jit
def _own_of(local, windows, window, BW: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, BO: tl.constexpr):
    """Own keys of this program: their row, whether they exist [BO], and who sees them [BM, BO]."""
    key = tl.arange(0, BO)
    row = tl.program_id(0) * (BW * NK) + key
    there = (key < BW * NK) & (row < windows * NK)
    behind = (local % NQ + (NK - NQ))[:, None] - (key % NK)[None, :]
    sees = (local // NQ)[:, None] == (key // NK)[None, :]
    return row, there, sees & (behind >= 0) & (behind < window) & there[None, :]


@triton.jit
def _take(query, KEYS, VALUES, offset, there, sees, dim, D: tl.constexpr, scale, largest, mass, acc):
    """One step of the online softmax, in powers of two."""
    mask = there[:, None] & (dim < D)[None, :]
    key = tl.load(KEYS + offset, mask=mask, other=0.0)
    value = tl.load(VALUES + offset, mask=mask, other=0.0)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(sees, score, float("-inf"))
    highest = tl.maximum(largest, tl.max(score, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(score - safe[:, None])
    fade = tl.exp2(largest - safe)
    mass = mass * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return highest, mass, acc


@triton.jit
def _forward_kernel(
    Q, KEYS, VALUES, OWN_KEYS, OWN_VALUES, OUT, LSE, LOWS, STARTS, R, windows, window, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, o_batch, o_row, o_head,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, KEY_HEADS: tl.constexpr, NQ: tl.constexpr,
    NK: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    batch, key_head, _part, local, row, head, inside = _rows_of(R, BM, BW, NQ, G, GB, KEY_HEADS)
    dim = tl.arange(0, DP)
    full = inside[:, None] & (dim < D)[None, :]
    query = tl.load(
        Q + batch * q_batch + row[:, None].to(tl.int64) * q_row + head[:, None] * q_head + dim[None, :],
        mask=full, other=0.0,
    )  # fmt: skip
    start = tl.load(STARTS + batch * windows + row // NQ, mask=inside, other=0)
    low = tl.load(LOWS + batch * R + row, mask=inside, other=2147483647)
    largest = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    base = batch * k_batch + key_head * k_head
    stop = tl.max(start, 0)
    for begin in range(tl.min(low, 0), stop, BN):
        entry = begin + tl.arange(0, BN)
        offset = base + entry[:, None].to(tl.int64) * k_row + dim[None, :]
        sees = (entry[None, :] >= low[:, None]) & (entry[None, :] < start[:, None])
        largest, mass, acc = _take(
            query, KEYS, VALUES, offset, entry < stop, sees, dim, D, scale, largest, mass, acc
        )  # fmt: skip
    if NK > 0:
        own, there, sees = _own_of(local, windows, window, BW, NQ, NK, BO)
        offset = batch * o_batch + key_head * o_head + own[:, None].to(tl.int64) * o_row + dim[None, :]
        largest, mass, acc = _take(
            query, OWN_KEYS, OWN_VALUES, offset, there, sees, dim, D, scale, largest, mass, acc
        )  # fmt: skip
    mass = tl.where(mass > 0, mass, 1.0)  # lines that do not exist
    flat = (batch * R + row) * (KEY_HEADS * G) + head
    tl.store(LSE + flat, largest + tl.log2(mass), mask=inside)
    tl.store(OUT + flat[:, None] * D + dim[None, :], (acc / mass[:, None]).to(OUT.dtype.element_ty), mask=full)


@triton.jit
def _slope(query, grad, key, value, sees, scale, lse, delta):
    """Weights of the softmax and gradients of the scores, [BM, keys] float32."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    weight = tl.where(sees, tl.exp2(score - lse[:, None]), 0.0)
    slope = weight * (tl.dot(grad, tl.trans(value), input_precision="ieee") - delta[:, None])
    return weight, slope


@triton.jit
def _backward_kernel(
    Q, KEYS, VALUES, OWN_KEYS, OWN_VALUES, OUT, LSE, LOWS, STARTS, GRAD, DQ, DKEYS, DVALUES, R, windows, window, scale,
    natural, q_batch, q_row, q_head, k_batch, k_row, k_head, o_batch, o_row, o_head, part_size,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, KEY_HEADS: tl.constexpr, NQ: tl.constexpr,
    NK: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    batch, key_head, part, local, row, head, inside = _rows_of(R, BM, BW, NQ, G, GB, KEY_HEADS)
    dim = tl.arange(0, DP)
    full = inside[:, None] & (dim < D)[None, :]
    query = tl.load(
        Q + batch * q_batch + row[:, None].to(tl.int64) * q_row + head[:, None] * q_head + dim[None, :],
        mask=full, other=0.0,
    )  # fmt: skip
    flat = (batch * R + row) * (KEY_HEADS * G) + head
    spot = flat[:, None] * D + dim[None, :]
    grad = tl.load(GRAD + spot, mask=full, other=0.0)
    out = tl.load(OUT + spot, mask=full, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(LSE + flat, mask=inside, other=float("inf"))
    start = tl.load(STARTS + batch * windows + row // NQ, mask=inside, other=0)
    low = tl.load(LOWS + batch * R + row, mask=inside, other=2147483647)
    slopes = tl.zeros([BM, DP], tl.float32)
    base = batch * k_batch + key_head * k_head
    stop = tl.max(start, 0)
    for begin in range(tl.min(low, 0), stop, BN):
        entry = begin + tl.arange(0, BN)
        offset = base + entry[:, None].to(tl.int64) * k_row + dim[None, :]
        there = (entry < stop)[:, None] & (dim < D)[None, :]
        key = tl.load(KEYS + offset, mask=there, other=0.0)
        value = tl.load(VALUES + offset, mask=there, other=0.0)
        sees = (entry[None, :] >= low[:, None]) & (entry[None, :] < start[:, None])
        weight, slope = _slope(query, grad, key, value, sees, scale, lse, delta)
        slopes = tl.dot(slope.to(key.dtype), key, slopes, input_precision="ieee")
    own, there, sees = _own_of(local, windows, window, BW, NQ, NK, BO)
    mask = there[:, None] & (dim < D)[None, :]
    offset = batch * o_batch + key_head * o_head + own[:, None].to(tl.int64) * o_row + dim[None, :]
    key = tl.load(OWN_KEYS + offset, mask=mask, other=0.0)
    value = tl.load(OWN_VALUES + offset, mask=mask, other=0.0)
    weight, slope = _slope(query, grad, key, value, sees & inside[:, None], scale, lse, delta)
    slopes = tl.dot(slope.to(key.dtype), key, slopes, input_precision="ieee")
    tl.store(DQ + spot, (slopes * natural).to(DQ.dtype.element_ty), mask=full)
    dkey = tl.dot(tl.trans(slope.to(query.dtype)), query, input_precision="ieee") * natural
    dvalue = tl.dot(tl.trans(weight.to(grad.dtype)), grad, input_precision="ieee")
    place = part.to(tl.int64) * part_size + ((batch * windows * NK + own) * KEY_HEADS + key_head)[:, None] * D
    tl.store(DKEYS + place + dim[None, :], dkey.to(DKEYS.dtype.element_ty), mask=mask)
    tl.store(DVALUES + place + dim[None, :], dvalue.to(DVALUES.dtype.element_ty), mask=mask)


def tile_sizes(rows: int, own: int, groups: int, size: int, bytes_each: int) -> dict[str, int]:
    """How programs are cut for windows of `rows` rows and `own` keys of their own.

    A program has whole windows (BW) and GB of the group's query heads: BW * rows * GB lines of BM. Heads of more than
    128 (size) would not leave room for so many.
    """
    most = 32 if bytes_each == 4 else (128 if size <= 128 else 64)
    lines = max(most, triton.next_power_of_2(rows))
    heads = min(groups, lines // rows)
    windows = lines // (rows * heads)
    if own:
        windows = max(1, min(windows, lines // own))
    return {
        "G": groups, "GB": heads, "NQ": rows, "NK": own, "BW": windows, "BM": lines, "BN": _KEYS if bytes_each == 2
        else 32, "BO": max(16, triton.next_power_of_2(max(1, windows * own))),
    }  # fmt: skip


def attend(
    q: Tensor, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor] | None, seen: Range, scale: float
) -> Tensor:
    """Attention of rows q [B, R, heads, D] -> [B, R, heads, D], contiguous.

    keys, values: [B, T, key heads, D], the reading's, which get no gradient. own: keys and values [B, W * M, key
    heads, D] of the windows, of whose M rows the last R / W are the queries', or None if rows see the reading alone.
    """
    own_keys, own_values = own if own is not None else (None, None)
    return _Behind.apply(q, own_keys, own_values, keys.detach(), values.detach(), seen, scale)  # type: ignore[no-any-return]


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        own_keys: Tensor | None,
        own_values: Tensor | None,
        keys: Tensor,
        values: Tensor,
        seen: Range,
        scale: float,
    ) -> Tensor:
        q = _plain(q)
        keys, values = _alike(keys, values)
        if own_keys is None or own_values is None:
            own_count, own_keys, own_values = 0, keys, values  # not read
        else:
            own_count = own_keys.shape[1]
            own_keys, own_values = _alike(own_keys, own_values)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        sizes = _sizes(q, keys, own_count, seen)
        _forward_kernel[_grid(q, keys, seen, sizes)](
            q, keys, values, own_keys, own_values, out, lse, seen.lows, seen.starts, q.shape[1], seen.starts.shape[1],
            seen.window, scale * _LOG2_E, *q.stride()[:3], *keys.stride()[:3], *own_keys.stride()[:3], **sizes,
            num_warps=_warps(sizes), num_stages=2,
        )  # fmt: skip
        ctx.save_for_backward(q, own_keys, own_values, keys, values, out, lse)
        ctx.seen, ctx.scale, ctx.sizes = seen, scale, {**sizes, "BN": min(sizes["BN"], _KEYS_BACK)}
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, own_keys, own_values, keys, values, out, lse = ctx.saved_tensors
        seen, sizes = ctx.seen, ctx.sizes
        assert sizes["NK"] > 0  # a reading is read without gradient
        grad = gradients[0].contiguous()
        parts = -(-sizes["G"] // sizes["GB"])
        dtype = own_keys.dtype if parts == 1 else torch.float32
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dkeys, dvalues = (torch.empty((parts, *own_keys.shape), dtype=dtype, device=q.device) for _ in range(2))
        _backward_kernel[_grid(q, keys, seen, sizes)](
            q, keys, values, own_keys, own_values, out, lse, seen.lows, seen.starts, grad, dq, dkeys, dvalues,
            q.shape[1], seen.starts.shape[1], seen.window, ctx.scale * _LOG2_E, ctx.scale, *q.stride()[:3],
            *keys.stride()[:3], *own_keys.stride()[:3], own_keys.numel(), **sizes, num_warps=_warps(sizes),
            num_stages=2,
        )  # fmt: skip
        dk, dv = (x[0] if parts == 1 else x.sum(0).to(own_keys.dtype) for x in (dkeys, dvalues))
        return dq, dk, dv, None, None, None, None


def _sizes(q: Tensor, keys: Tensor, own_count: int, seen: Range) -> dict[str, int]:
    windows, size, key_heads = seen.starts.shape[1], q.shape[3], keys.shape[2]
    tiles = tile_sizes(q.shape[1] // windows, own_count // windows, q.shape[2] // key_heads, size, q.element_size())
    return {"D": size, "DP": max(16, triton.next_power_of_2(size)), "KEY_HEADS": key_heads, **tiles}


def _grid(q: Tensor, keys: Tensor, seen: Range, sizes: dict[str, int]) -> tuple[int, int]:
    return -(-seen.starts.shape[1] // sizes["BW"]), q.shape[0] * keys.shape[2] * -(-sizes["G"] // sizes["GB"])


def _warps(sizes: dict[str, int]) -> int:
    return 8 if sizes["BM"] * sizes["DP"] >= 128 * 64 else 4


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one layout."""
    if a.stride() == b.stride() and a.stride(3) == 1:
        return a, b
    return a.contiguous(), b.contiguous()
