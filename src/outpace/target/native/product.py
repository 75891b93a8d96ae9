"""Products of few rows alone, and the blocks of drafters, through the compiled kernels of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from outpace.target.native.build import load, why_not
from outpace.target.native.structs import MOST_ROWS, Weight

if TYPE_CHECKING:
    from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Rows x [M, K] @ weight.T [K, N] + bias [N] of one dtype on a CPU; None where it cannot be taken so.

    A row's bits do not depend on the rows beside it. Without gradients.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if why_not(x.dtype) is not None or any(t.dtype != x.dtype or not t.is_contiguous() for t in tensors):
        return None
    (rows, depth), width = x.shape, weight.shape[0]
    if rows > MOST_ROWS:
        return None
    out = x.new_empty(rows, width)
    at = [t.data_ptr() if t is not None else None for t in (x, weight, bias, out)]
    failed = load(x.dtype).outpace_product(*at, rows, width, depth, torch.get_num_threads())
    return None if failed else out


def apply(x: Tensor, weight: Weight) -> Tensor | None:
    """Rows x [M, K] float32 through a drafter's weight -> [M, N]; None where it cannot be taken so."""
    if why_not(torch.float32) is not None:
        return None
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.width)
    load(torch.float32).outpace_apply(weight, x.data_ptr(), out.data_ptr(), x.shape[0], torch.get_num_threads())
    return out


def project_heads(
    weights: Sequence[Weight], x: Tensor, cos: Tensor, sin: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [M, width] of x [M, K], the first two rotated by angles [M, size]; all float32."""
    rows = x.shape[0]
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    q, k, v = (x.new_empty(rows, weight.width) for weight in weights)
    at = [t.data_ptr() for t in (x, cos, sin, q, k, v)]
    load(torch.float32).outpace_heads((Weight * 3)(*weights), *at, rows, size, torch.get_num_threads())
    return q, k, v


def finish_block(weights: Sequence[Weight], residual: Tensor, attended: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """Residual [M, H] + out(attended [M, A]), and the gated part behind its norm added; all float32.

    weights: of the attention's output, gate, up, down.
    """
    rows, inner = residual.shape[0], weights[1].width
    residual, attended = residual.contiguous(), attended.contiguous()
    out = torch.empty_like(residual)
    space = residual.new_empty(2 * rows * (residual.shape[1] + inner))
    at = [t.data_ptr() for t in (residual, attended, gamma)]
    threads = torch.get_num_threads()
    load(torch.float32).outpace_finish(
        (Weight * 4)(*weights), *at, eps, out.data_ptr(), space.data_ptr(), rows, threads
    )
    return out
