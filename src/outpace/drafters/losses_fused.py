"""Soft cross-entropy and its gradient in one kernel: two readings of the logits, one writing.

Equal to `losses.row_losses` for "soft" and "kl" with a renormalised teacher (tests/gpu holds it to that): the gradient
with respect to the logits is q - p for both, and takes their place in memory. In eager mode the same costs a dozen
passes over chunk x vocabulary numbers, and more time than the products around it.
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
def _soft_rows(logits, teacher, loss, best, stride, size: tl.constexpr, entropy: tl.constexpr, block: tl.constexpr):  # noqa: ANN001, ANN202
    """One row a program: logits become the gradient q - p, loss the cross-entropy (less p's own if asked)."""
    row = tl.program_id(0).to(tl.int64)
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
        t = tl.load(t_row + place, mask=inside, other=float("-inf")).to(tl.float32)
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
        t = tl.load(t_row + place, mask=inside, other=0.0).to(tl.float32) - t_norm
        p = tl.where(inside, tl.exp(t), 0.0)
        if entropy:
            total += tl.sum(p * tl.where(inside, t - z, 0.0), 0)
        else:
            total -= tl.sum(p * tl.where(inside, z, 0.0), 0)
        tl.store(z_row + place, (tl.exp(z) - p).to(logits.dtype.element_ty), mask=inside)
    tl.store(loss + row, total)
    tl.store(best + row, at)


def soft_rows(logits: Tensor, teacher: Tensor, *, divergence: bool) -> tuple[Tensor, Tensor]:
    """(loss [n] float32, most likely id [n] int64); `logits` [n, Vd] then hold the gradient of the summed loss.

    logits, teacher: contiguous, of one shape. divergence: KL(p || q) instead of the cross-entropy.
    """
    rows, size = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(size))
    _soft_rows[(rows,)](
        logits, teacher, loss, best, logits.stride(0), size=size, entropy=divergence, block=block, num_warps=8
    )
    return loss, best
