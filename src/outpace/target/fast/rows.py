"""Kernels that work on one row at a time: norms, head norms with rotary embedding and cache write, activation.

They serve families whose parts cannot be folded into a product (norms behind a block, norms of queries and keys),
passes with adapters, and passes over many rows, whose products are cuBLAS's.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel, launch_options
from outpace.target.fast.linear import Scaled, activate

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _norm_kernel(
    X, OUT, GAMMA, RESIDUAL, NEXT, SCALED, SQUARES, stride, out_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    FOLLOWED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    enter_kernel(PDL)
    y = tl.load(X + row * stride + at, mask=real, other=0.0).to(tl.float32)
    if NORM:
        gamma = tl.load(GAMMA + at, mask=real, other=0.0).to(tl.float32) + SHIFT
        y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps) * gamma
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + row * out_stride + at, mask=real, other=0.0).to(tl.float32)
    rounded = y.to(OUT.dtype.element_ty)
    tl.store(OUT + row * out_stride + at, rounded, mask=real)
    if FOLLOWED:
        y = rounded.to(tl.float32)
        gamma = tl.load(NEXT + at, mask=real, other=0.0).to(tl.float32) + SHIFT
        tl.store(SCALED + row * SIZE + at, (y * gamma).to(SCALED.dtype.element_ty), mask=real)
        tl.store(SQUARES + row, tl.sum(y * y, 0))


@triton.jit
def _place_kernel(
    QKV, QUERY, KEYS, VALUES, NORM_QUERY, NORM_KEY, COS, SIN, POSITIONS, LENGTHS, SLOTS, R, capacity, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = SIZE // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    real = at < half
    enter_kernel(PDL)
    source = QKV + (row.to(tl.int64) * (HEADS + 2 * KEY_HEADS) + head) * SIZE + at
    one = tl.load(source, mask=real, other=0.0).to(tl.float32)
    two = tl.load(source + half, mask=real, other=0.0).to(tl.float32)
    if head < HEADS + KEY_HEADS:
        if NORM:
            scale = tl.rsqrt((tl.sum(one * one, 0) + tl.sum(two * two, 0)) / SIZE + eps)
            if head < HEADS:  # noqa: SIM108  # Triton has no conditional expression over pointers
                gamma = NORM_QUERY
            else:
                gamma = NORM_KEY
            one *= scale * (tl.load(gamma + at, mask=real, other=0.0).to(tl.float32) + SHIFT)
            two *= scale * (tl.load(gamma + half + at, mask=real, other=0.0).to(tl.float32) + SHIFT)
        angle = tl.load(POSITIONS + row) * half + at
        cos = tl.load(COS + angle, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(SIN + angle, mask=real, other=0.0).to(tl.float32)
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if head < HEADS:
        out = QUERY + (row.to(tl.int64) * HEADS + head) * SIZE + at
        tl.store(out, one.to(QUERY.dtype.element_ty), mask=real)
        tl.store(out + half, two.to(QUERY.dtype.element_ty), mask=real)
    else:
        entry = tl.load(LENGTHS + row // R) + row % R
        slot = tl.load(SLOTS + row // R)
        which = (head - HEADS) % KEY_HEADS
        to = ((slot * KEY_HEADS + which) * capacity + entry) * SIZE + at
        keep = real & (entry < capacity)
        if head < HEADS + KEY_HEADS:
            tl.store(KEYS + to, one.to(KEYS.dtype.element_ty), mask=keep)
            tl.store(KEYS + to + half, two.to(KEYS.dtype.element_ty), mask=keep)
        else:
            tl.store(VALUES + to, one.to(VALUES.dtype.element_ty), mask=keep)
            tl.store(VALUES + to + half, two.to(VALUES.dtype.element_ty), mask=keep)


@triton.jit
def _activation_kernel(X, OUT, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < SIZE
    enter_kernel(PDL)
    gate = tl.load(X + row * 2 * SIZE + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(X + row * 2 * SIZE + SIZE + at, mask=real, other=0.0).to(tl.float32)
    tl.store(OUT + row * SIZE + at, activate(gate, up, GELU).to(OUT.dtype.element_ty), mask=real)


def norm_rows(
    x: Tensor,
    gamma: Tensor | None,
    out: Tensor,
    *,
    eps: float,
    shift: float,
    residual: Tensor | None = None,
    follow: Tensor | None = None,
    pdl: bool = False,
) -> Scaled | None:
    """RMS norm of each row of x [M, size] (gamma None: left alone), plus a residual, into `out`.

    Rows may be strided, `out` may be `x` or `residual`. follow: gamma of the norm behind, for which the result is then
    scaled as well (see `linear.Scaled`).
    """
    rows, size = x.shape
    scaled = None
    if follow is not None:
        squares = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
        scaled = Scaled(torch.empty(rows, size, dtype=out.dtype, device=x.device), squares)
    _norm_kernel[(rows,)](
        x, out, gamma, residual, follow, scaled.rows if scaled else None, scaled.squares if scaled else None,
        x.stride(0), out.stride(0), eps, SIZE=size, BLOCK=triton.next_power_of_2(size), SHIFT=shift,
        NORM=gamma is not None, HAS_RESIDUAL=residual is not None, FOLLOWED=follow is not None, PDL=pdl,
        num_warps=4 if size <= 4096 else 8, **launch_options(pdl),
    )  # fmt: skip
    return scaled


def place_heads(
    joined: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    shift: float,
    pdl: bool = False,
) -> None:
    """Norm each head (if asked), rotate, and put queries in `query`, keys and values into the cache.

    joined: [M, (heads + 2 key heads) * size]; the rest as in `linear.query_key_value`.
    """
    size, heads, key_heads = query.shape[-1], query.shape[1], keys.shape[1]
    first, second = norms if norms is not None else (joined, joined)
    rows = joined.shape[0]
    _place_kernel[(rows, heads + 2 * key_heads)](
        joined, query, keys, values, first, second, rotary[0], rotary[1], positions, lengths, slots,
        rows // lengths.shape[0], keys.shape[2], eps, HEADS=heads, KEY_HEADS=key_heads, SIZE=size,
        BLOCK=triton.next_power_of_2(size // 2), NORM=norms is not None, SHIFT=shift, PDL=pdl, num_warps=1,
        **launch_options(pdl),
    )  # fmt: skip


def activate_rows(x: Tensor, out: Tensor, *, gelu: bool, pdl: bool = False) -> Tensor:
    """Gated activation of x [M, 2 * size], gate first: [M, size]."""
    size = out.shape[1]
    block = min(1024, triton.next_power_of_2(size))
    _activation_kernel[(x.shape[0], triton.cdiv(size, block))](
        x, out, SIZE=size, BLOCK=block, GELU=gelu, PDL=pdl, num_warps=4, **launch_options(pdl)
    )
    return out
