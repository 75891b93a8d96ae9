"""Products of few rows alone, through compiled kernels."""

from __future__ import annotations

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
    if why_not(torch.float32, "rows") is not None:
        return None
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.width)
    load(torch.float32, "rows").outpace_apply(weight, x.data_ptr(), out.data_ptr(), x.shape[0], torch.get_num_threads())
    return out
