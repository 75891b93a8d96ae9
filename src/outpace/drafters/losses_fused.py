"""Cross-entropies and their gradients, one kernel each: two readings of the logits, one writing.

Equal to `losses.row_losses` for "hard", for "soft" and "kl" with a renormalised teacher, and for "race" (tests hold
them to that): the gradient with respect to the logits is q - p for all, and takes their place in memory. In eager mode
the same costs a dozen passes over chunk x vocabulary numbers, and more time than the products around it.
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


@triton.jit
def _gumbel(seed, row, start, quads: tl.constexpr, block: tl.constexpr):  # noqa: ANN001, ANN202
    """Noise of ids start to start + block - 1 of a row; a Philox evaluation gives four of them theirs."""
    counter = row.to(tl.int32) * quads + start // 4 + tl.arange(0, block // 4)
    u0, u1, u2, u3 = tl.rand4x(seed, counter)
    return -tl.log(-tl.log(tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))))


@triton.jit(do_not_specialize=["seed"])
def _race_rows(  # noqa: ANN202
    logits, teacher, norms, loss, best, top, seed, stride,  # noqa: ANN001
    size: tl.constexpr, quads: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row a program: the winner of the target's race, then q - p of the one-hot law p, q with the same noise."""
    row = tl.program_id(0).to(tl.int64)
    norm = tl.load(norms + row)
    z_row, t_row = logits + row * stride, teacher + row * stride
    z_max, s_max, t_max = float("-inf"), float("-inf"), float("-inf")
    z_sum, s_sum, covered = 0.0, 0.0, 0.0
    s_won = 0.0
    at, winner = 0, 0
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        noise = _gumbel(seed, row, start, quads, block)
        z = tl.load(z_row + place, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + place, mask=inside, other=float("-inf")).to(tl.float32) - norm
        covered += tl.sum(tl.exp(t), 0)
        z_top = tl.max(z, 0)
        at = tl.where(z_top > z_max, tl.min(tl.where(z == z_top, place, size), 0), at)
        z_new = tl.maximum(z_max, z_top)
        z_sum = z_sum * tl.exp(z_max - z_new) + tl.sum(tl.exp(z - z_new), 0)
        z_max = z_new
        s = z + noise
        s_new = tl.maximum(s_max, tl.max(s, 0))
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.exp(s - s_new), 0)
        s_max = s_new
        raced = t + noise
        t_top = tl.max(raced, 0)
        first = tl.min(tl.where(raced == t_top, place, size), 0)
        winner = tl.where(t_top > t_max, first, winner)
        s_won = tl.where(t_top > t_max, tl.sum(tl.where(place == first, s, 0.0), 0), s_won)
        t_max = tl.maximum(t_max, t_top)
    other = tl.rand(seed, row.to(tl.int32) * quads + quads - 1)
    alive = t_max > tl.log(tl.maximum(1 - covered, 0.0)) - tl.log(-tl.log(other))
    s_norm = s_max + tl.log(s_sum)
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        z = tl.load(z_row + place, mask=inside, other=float("-inf")).to(tl.float32)
        slope = tl.exp(z + _gumbel(seed, row, start, quads, block) - s_norm) - tl.where(place == winner, 1.0, 0.0)
        tl.store(z_row + place, tl.where(alive, slope, 0.0).to(logits.dtype.element_ty), mask=inside)
    tl.store(loss + row, tl.where(alive, s_norm - s_won, 0.0))
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


def race_rows(logits: Tensor, teacher: Tensor, norms: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], most likely id [n] int64, its probability [n]); `logits` [n, Vd] then hold the loss's gradient.

    logits, teacher: contiguous, of one shape, at most 2^31 numbers. norms: [n] float32, log of the sum of exp of the
    teacher's logits, of ids outside too. seed: of the noise, int32; the most likely id is that without noise.
    """
    rows, size = logits.shape
    loss, best, top = _results(logits)
    _race_rows[(rows,)](
        logits, teacher, norms, loss, best, top, seed, logits.stride(0), size=size, quads=triton.cdiv(size, 4) + 1,
        block=max(4, block_size(size)), num_warps=8,
    )  # fmt: skip
    return loss, best, top


def _results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, top = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(2))
    return loss, torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device), top


def block_size(size: int) -> int:
    """Logits of a row that a kernel reads at once."""
    return min(_BLOCK, int(triton.next_power_of_2(size)))
