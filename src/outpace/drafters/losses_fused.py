"""Cross-entropies and their gradients, one kernel each: two readings of the logits, one writing.

Equal to `losses.row_losses` for "hard", and for "soft" and "kl" with a renormalised teacher (tests hold them to that):
the gradient with respect to the logits is q - p for all, and takes their place in memory. In eager mode the same costs
a dozen passes over chunk x vocabulary numbers, and more time than the products around it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 4096


@triton.jit
def _soft_rows(  # noqa: ANN202
    logits, teacher, heat, loss, best, top, stride,  # noqa: ANN001
    size: tl.constexpr, entropy: tl.constexpr, warm: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row a program: logits become the gradient q - p, loss the cross-entropy (less p's own if asked)."""
    row = tl.program_id(0).to(tl.int64)
    colder = 1.0
    if warm:
        colder = 1.0 / tl.load(heat + row)
    z_row, t_row = logits + row * stride, teacher + row * stride
    z_max = float("-inf")
    t_max = float("-inf")
    z_sum = 0.0
    t_sum = 0.0
    at = 0
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        z = tl.load(z_row + place, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + place, mask=inside, other=float("-inf")).to(tl.float32) * colder
        z_top = tl.max(z, 0)
        here = tl.min(tl.where(z == z_top, place, size), 0)
        at = tl.where(z_top > z_max, here, at)
        z_new = tl.maximum(z_max, z_top)
        t_new = tl.maximum(t_max, tl.max(t, 0))
        z_sum = z_sum * tl.exp(z_max - z_new) + tl.sum(tl.exp(z - z_new), 0)
        t_sum = t_sum * tl.exp(t_max - t_new) + tl.sum(tl.exp(t - t_new), 0)
        z_max = z_new
        t_max = t_new
    z_norm = z_max + tl.log(z_sum)
    t_norm = t_max + tl.log(t_sum)
    total = 0.0
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        z = tl.load(z_row + place, mask=inside, other=0.0).to(tl.float32) - z_norm
        t = tl.load(t_row + place, mask=inside, other=0.0).to(tl.float32) * colder - t_norm
        p = tl.where(inside, tl.exp(t), 0.0)
        if entropy:
            total += tl.sum(p * tl.where(inside, t - z, 0.0), 0)
        else:
            total -= tl.sum(p * tl.where(inside, z, 0.0), 0)
        tl.store(z_row + place, (tl.exp(z) - p).to(logits.dtype.element_ty), mask=inside)
    tl.store(loss + row, total)
    tl.store(best + row, at)
    tl.store(top + row, 1.0 / z_sum)


@triton.jit
def _hard_rows(logits, tokens, loss, best, top, stride, size: tl.constexpr, block: tl.constexpr):  # noqa: ANN001, ANN202
    """One row a program: logits become the gradient q - p of the one-hot law p, loss is -log q of its token."""
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    token = tl.load(tokens + row)
    z_max = float("-inf")
    z_sum = 0.0
    z_token = 0.0
    at = 0
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        z = tl.load(z_row + place, mask=place < size, other=float("-inf")).to(tl.float32)
        z_top = tl.max(z, 0)
        here = tl.min(tl.where(z == z_top, place, size), 0)
        at = tl.where(z_top > z_max, here, at)
        z_new = tl.maximum(z_max, z_top)
        z_sum = z_sum * tl.exp(z_max - z_new) + tl.sum(tl.exp(z - z_new), 0)
        z_token += tl.sum(tl.where(place == token, z, 0.0), 0)
        z_max = z_new
    z_norm = z_max + tl.log(z_sum)
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        z = tl.load(z_row + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.exp(z - z_norm) - tl.where(place == token, 1.0, 0.0)
        tl.store(z_row + place, slope.to(logits.dtype.element_ty), mask=inside)
    tl.store(loss + row, z_norm - z_token)
    tl.store(best + row, at)
    tl.store(top + row, 1.0 / z_sum)


def soft_rows(
    logits: Tensor, teacher: Tensor, *, divergence: bool, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], most likely id [n] int64, its probability [n]); `logits` [n, Vd] then hold the loss's gradient.

    logits, teacher: contiguous, of one shape. divergence: KL(p || q) instead of the cross-entropy. temperature: [n]
    float32, of the teacher's law.
    """
    rows, size = logits.shape
    loss, best, top = _results(logits)
    heat = loss if temperature is None else temperature
    _soft_rows[(rows,)](
        logits, teacher, heat, loss, best, top, logits.stride(0), size=size, entropy=divergence,
        warm=temperature is not None, block=block_size(size), num_warps=8,
    )  # fmt: skip
    return loss, best, top


def hard_rows(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], most likely id [n] int64, its probability [n]); `logits` [n, V] then hold the loss's gradient.

    logits: contiguous; tokens: [n] int64, the right ones.
    """
    rows, size = logits.shape
    loss, best, top = _results(logits)
    _hard_rows[(rows,)](
        logits, tokens, loss, best, top, logits.stride(0), size=size, block=block_size(size), num_warps=8
    )
    return loss, best, top


def _results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, top = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(2))
    return loss, torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device), top


def block_size(size: int) -> int:
    """Logits of a row that a kernel reads at once."""
    return min(_BLOCK, int(triton.next_power_of_2(size)))
