"""Edges of tokens' intervals, and draws, straight from logits: a law is summed up and never stored.

What `laws.intervals` and `rows.draw_scored` say of softmax(logits / temperature), without truncation. Exponentials are
float32 and sums float64, as there; but there the law is divided by its sum in float32 first, so edges differ by about
1e-7. A number nearer to an edge than that may draw the neighbour.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from outpace.drafters.losses_fused import block_size

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _mass_below(row, token, heat, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row of logits: its largest, and relative to that the mass of all ids and of those below a token."""
    top = float("-inf")
    total = tl.full((), 0.0, tl.float64)
    below = tl.full((), 0.0, tl.float64)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        z = tl.load(row + place, mask=place < SIZE, other=float("-inf")).to(tl.float32) / heat
        higher = tl.maximum(top, tl.max(z, 0))
        fade = tl.exp((top - higher).to(tl.float64))
        weight = tl.exp(z - higher).to(tl.float64)
        total = total * fade + tl.sum(weight, 0)
        below = below * fade + tl.sum(tl.where(place < token, weight, 0.0), 0)
        top = higher
    return top, total, below


@triton.jit
def _edges_kernel(LOGITS, TOKENS, HEAT, LOW, HIGH, TOTAL, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    row = LOGITS + at * stride
    token = tl.load(TOKENS + at)
    heat = tl.load(HEAT + at)
    top, total, below = _mass_below(row, token, heat, SIZE, BLOCK)
    own = tl.exp(tl.load(row + token).to(tl.float32) / heat - top).to(tl.float64)
    tl.store(LOW + at, below)
    tl.store(HIGH + at, below + own)
    tl.store(TOTAL + at, total)


@triton.jit
def _draw_kernel(LOGITS, NUMBERS, TOKENS, LEFT, RIGHT, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    row = LOGITS + at * stride
    top, total, _ = _mass_below(row, 0, 1.0, SIZE, BLOCK)
    goal = tl.load(NUMBERS + at) * total
    token = SIZE - 1
    left = total
    right = total
    before = tl.full((), 0.0, tl.float64)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        z = tl.load(row + place, mask=place < SIZE, other=float("-inf")).to(tl.float32)
        weight = tl.exp(z - top).to(tl.float64)
        after = before + tl.sum(weight, 0)
        if (before <= goal) & (after > goal):  # of all blocks one: the sums in between are needed there alone
            edges = before + tl.cumsum(weight, 0)
            passed = edges <= goal
            token = tl.minimum(start + tl.sum(passed.to(tl.int32), 0), SIZE - 1)
            left = tl.max(tl.where(passed, edges, before), 0)
            right = tl.min(tl.where(passed, after, edges), 0)
        before = after
    tl.store(TOKENS + at, token)
    tl.store(LEFT + at, left / total)
    tl.store(RIGHT + at, right / total)


def token_edges(logits: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass of the ids below each token, of those up to and with it, and of all: [n] float64 each, in a unit of the row.

    logits: [n, V], rows contiguous; tokens: [n] int64; temperature: [n] float32, above 0.
    """
    low, high, total = (torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device) for _ in range(3))
    _edges_kernel[(logits.shape[0],)](
        logits, tokens, temperature, low, high, total, logits.stride(0), SIZE=logits.shape[1],
        BLOCK=block_size(logits.shape[1]), num_warps=8,
    )  # fmt: skip
    return low, high, total


def draw_rows(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The draw from each row's softmax with u [n] float64: (tokens [n] int64, their intervals' edges, [n] float64).

    logits: [n, V], rows contiguous.
    """
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    left, right = torch.empty_like(u), torch.empty_like(u)
    _draw_kernel[(logits.shape[0],)](
        logits, u, tokens, left, right, logits.stride(0), SIZE=logits.shape[1], BLOCK=block_size(logits.shape[1]),
        num_warps=8,
    )  # fmt: skip
    return tokens, left, right
