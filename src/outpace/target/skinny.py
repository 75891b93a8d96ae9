"""Products of a few rows on a CPU in float32, taken the other way round.

With 2 to 16 rows the library's kernel for x @ weight.T takes twice as long as one row does, or longer (docs/log.md);
weight @ x.T, padded to a multiple of four rows, takes little longer than reading the weight. In bfloat16 PyTorch's
kernels read once, and give a row the same bits whatever stands beside it, so they are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS: Final = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., K], [N, K], [N] -> [..., N]."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    flat = F.pad(flat, (0, 0, 0, -rows % 4)) if rows % 4 else flat
    out = torch.mm(weight, flat.T).T[:rows].contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """A linear layer that takes its product so."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)
