"""A product of few rows alone, through the compiled kernels of passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outpace.target.native.build import load, why_not
from outpace.target.native.structs import MOST_ROWS

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
