"""Products of a few rows on a CPU that are not part of a compiled pass: drafters', and those of passes that train.

They take the compiled kernels (`target.native`) where there are some and they are quicker: in float32, and in bfloat16
on processors that do not multiply it. Without, in float32: with 2 to 16 rows the library's kernel for x @ weight.T
takes twice as long as one row does, or longer (docs/log.md); weight @ x.T, padded to a multiple of four rows, takes
little longer than reading the weight. In bfloat16 PyTorch's kernels read once, and give a row the same bits whatever stands
beside it, so they are left alone.

A drafter's weights may be rounded to eight bits besides (`round_weights`): a guess that is a little off costs no token,
and a quarter of the bytes is read. Never a target's.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn import functional as F

from outpace.target.native.build import has_bfloat16_products
from outpace.target.native.product import product

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS: Final = 16  # padded and taken the other way round
_MOST_COMPILED: Final = 64
LEAST: Final = 1 << 16  # numbers of a weight worth rounding
MOST_EIGHT: Final = 8  # rows whose product is quicker in eight bits


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, eight: Eight | None = None) -> Tensor:
    """[..., K], [N, K], [N] -> [..., N]; `eight` is weight and bias in eight bits, taken where that is quicker."""
    if eight is not None and eight.serves(x):
        return eight(x)
    rows = x.numel() // x.shape[-1]
    flat = x.reshape(rows, x.shape[-1])  # a slice of a batch of one would be multiplied as a batch, far more slowly
    if x.device.type != "cpu" or torch.is_grad_enabled() or not 0 < rows <= _MOST_COMPILED:
        return F.linear(flat, weight, bias).view(*x.shape[:-1], -1)
    if x.dtype == torch.float32 or not has_bfloat16_products():
        compiled = product(flat.contiguous(), weight, bias)
        if compiled is not None:
            return compiled.view(*x.shape[:-1], -1)
    if x.dtype != torch.float32 or rows > MOST_ROWS:
        return F.linear(flat, weight, bias).view(*x.shape[:-1], -1)
    flat = F.pad(flat, (0, 0, 0, -rows % 4)) if rows % 4 else flat
    out = torch.mm(weight, flat.T).T[:rows].contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


def same_product(rows: int, more: int) -> bool:
    """Whether so many rows, or more of them, are padded to a product of one shape."""
    return -(-rows // 4) == -(-more // 4) and more <= MOST_ROWS


class Eight:
    """A weight in eight bits, a scale per output, read by bfloat16 inputs; sums are float32.

    Args:
        weight: [N, K] float32. bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        self.rounded = (weight / scales[:, None]).round().to(torch.int8)
        self.scales, self.bias = scales.bfloat16(), None if bias is None else bias.detach()

    def serves(self, x: Tensor) -> bool:
        """Whether it may take this product: of few rows, on a CPU in float32, without gradients."""
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
            return False
        return 0 < x.numel() <= MOST_EIGHT * x.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] float32 -> [..., N]."""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        out: Tensor = torch._weight_int8pack_mm(flat, self.rounded, self.scales).float()
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


def takes_eight(weight: Tensor) -> bool:
    """Whether products with a weight are quicker in eight bits here: on an x86 CPU in float32, unless switched off."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch, "_weight_int8pack_mm")
        and os.environ.get("OUTPACE_INT8", "on") != "off"
    )


def round_weights(module: nn.Module) -> None:
    """Let every layer of a module that can be, be read in eight bits where no gradients are asked for."""
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "eight") and isinstance(weight, torch.Tensor) and takes_eight(weight):
            setattr(layer, "eight", Eight(weight, getattr(layer, "bias", None)))  # noqa: B010  # of both classes


class Linear(nn.Linear):
    """A linear layer that takes its product so.

    Attributes:
        eight: its weight in eight bits, if that is what reads it.
    """

    eight: Eight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias, self.eight)
