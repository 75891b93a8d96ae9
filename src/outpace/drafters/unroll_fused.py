"""The diagonal part of unrolled attention in one kernel each way: every number is read once and written once.

Written out in tensors (`unroll`), the same is a dozen float32 passes over [rows, heads, D] per step and direction, and
takes longer than the products around it. One program holds some rows of one key head, with all query heads of its
group.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_ROWS: Final = 16


@triton.jit
def _places(N, HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BR: tl.constexpr):  # fmt: skip
    """Offsets of this program's part of [N, heads, D], [N, heads] and [N, key heads, D], and what of them exists."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    group = tl.arange(0, GP)
    dim = tl.arange(0, DP)
    head = tl.program_id(1) * G + group
    there = (rows < N)[:, None] & (group < G)[None, :]
    flat = rows[:, None].to(tl.int64) * HEADS + head[None, :]
    wide = flat[:, :, None] * D + dim[None, None, :]
    keys: tl.constexpr = HEADS // G
    own = (rows[:, None].to(tl.int64) * keys + tl.program_id(1)) * D + dim[None, :]
    inside = (rows < N)[:, None] & (dim < D)[None, :]
    return flat, there, wide, there[:, :, None] & (dim < D)[None, None, :], own, inside


@triton.jit
def _merge_kernel(
    Q, OUT, LSE, KEYS, VALUES, MERGED, MERGED_LSE, N, scale, STEPS: tl.constexpr,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    flat, there, wide, full, own, inside = _places(N, HEADS, G, GP, D, DP, BR)
    q = tl.load(Q + wide, mask=full, other=0.0).to(tl.float32)
    acc = tl.load(OUT + wide, mask=full, other=0.0).to(tl.float32)
    lse = tl.load(LSE + flat, mask=there, other=0.0)
    size = N.to(tl.int64) * (HEADS // G) * D
    for step in tl.static_range(STEPS):
        k = tl.load(KEYS + step * size + own, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(VALUES + step * size + own, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(q * k[:, None, :], 2) * scale
        top = tl.maximum(lse, score)
        both = top + tl.log(tl.exp(lse - top) + tl.exp(score - top))
        acc = acc * tl.exp(lse - both)[:, :, None] + tl.exp(score - both)[:, :, None] * v[:, None, :]
        lse = both
    tl.store(MERGED + wide, acc.to(MERGED.dtype.element_ty), mask=full)
    tl.store(MERGED_LSE + flat, lse, mask=there)


@triton.jit
def _slopes_kernel(
    GRAD, Q, OUT, LSE, KEYS, VALUES, DQ, DKEYS, DVALUES, N, scale, STEPS: tl.constexpr,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    flat, there, wide, full, own, inside = _places(N, HEADS, G, GP, D, DP, BR)
    q = tl.load(Q + wide, mask=full, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + wide, mask=full, other=0.0).to(tl.float32)
    out = tl.load(OUT + wide, mask=full, other=0.0).to(tl.float32)
    lse = tl.load(LSE + flat, mask=there, other=float("inf"))
    delta = tl.sum(grad * out, 2)
    dq = tl.load(DQ + wide, mask=full, other=0.0).to(tl.float32)
    size = N.to(tl.int64) * (HEADS // G) * D
    for step in tl.static_range(STEPS):
        k = tl.load(KEYS + step * size + own, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(VALUES + step * size + own, mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(q * k[:, None, :], 2) * scale - lse)
        slope = weight * (tl.sum(grad * v[:, None, :], 2) - delta) * scale
        dq += slope[:, :, None] * k[:, None, :]
        tl.store(DKEYS + step * size + own, tl.sum(slope[:, :, None] * q, 1).to(DKEYS.dtype.element_ty), mask=inside)
        tl.store(DVALUES + step * size + own, tl.sum(weight[:, :, None] * grad, 1).to(DVALUES.dtype.element_ty),
                 mask=inside)  # fmt: skip
    tl.store(DQ + wide, dq.to(DQ.dtype.element_ty), mask=full)


def _sizes(q: Tensor, keys: Tensor) -> dict[str, int]:
    heads, size = q.shape[1:]
    groups = heads // keys.shape[2]
    return {
        "STEPS": keys.shape[0], "HEADS": heads, "G": groups, "GP": triton.next_power_of_2(groups), "D": size,
        "DP": triton.next_power_of_2(size), "BR": _ROWS,
    }  # fmt: skip


def merge(q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax over causal keys (out, lse) extended by each row's own keys: (out, lse) of the whole.

    q, out: [N, heads, D] contiguous; lse: [N, heads] float32; keys, values: [K, N, key heads, D] contiguous.
    """
    merged, normaliser = torch.empty_like(out), torch.empty_like(lse)
    grid = (-(-q.shape[0] // _ROWS), keys.shape[2])
    _merge_kernel[grid](
        q, out, lse, keys, values, merged, normaliser, q.shape[0], scale, **_sizes(q, keys), num_warps=4
    )
    return merged, normaliser


def slopes(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, dq: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows' own keys and values, [K, N, key heads, D]; `dq` gets their part added.

    grad, q, out, dq: [N, heads, D] contiguous; out, lse: of the whole softmax; keys, values as in `merge`.
    """
    dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
    grid = (-(-q.shape[0] // _ROWS), keys.shape[2])
    _slopes_kernel[grid](
        grad, q, out, lse, keys, values, dq, dkeys, dvalues, q.shape[0], scale, **_sizes(q, keys), num_warps=4
    )
    return dkeys, dvalues
