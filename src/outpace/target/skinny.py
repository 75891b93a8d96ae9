"""Products of a few rows on a CPU that are not part of a compiled pass: drafters', and those of other passes.

They take the compiled kernels (`target.native`) where there are some and they are quicker: in float32, and in bfloat16
on processors that do not multiply it. Without, in float32: with 2 to 16 rows the library's kernel for x @ weight.T
takes twice as long as one row does, or longer (docs/log.md); weight @ x.T, padded to a multiple of four rows, takes
little longer than reading the weight. PyTorch's bfloat16 kernels read once, and give a row the same bits whatever
stands beside it, so they are left alone.

A drafter's weights may be rounded to eight bits besides (`round_weights`): a guess that is a little off costs no token,
and a quarter of the bytes is read. Never a target's. On a GPU, fused drafts round theirs (`drafters.device.plan`).
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn import functional as F

from outpace.compiler import has_bfloat16_products
from outpace.target.native.build import why_not
from outpace.target.native.product import apply, product
from outpace.target.native.structs import Weight

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS: Final = 16  # padded and taken the other way round
_MOST_COMPILED: Final = 64
LEAST: Final = 1 << 16  # numbers of a weight worth rounding
MOST_EIGHT: Final = 8  # rows whose product is quicker in eight bits
_MOST_EIGHT_COMPILED: Final = 16
_AT_ONCE: Final = 4096  # rows of a weight that are rounded at once


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
    """A weight in eight bits, a scale per output; sums are float32.

    Inputs are float32 where kernels are compiled (`target.native`); PyTorch's, taken elsewhere, round them to bfloat16.

    Args:
        weight: [N, K]. bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.rounded, self.scales = in_eight_bits(weight.detach())
        self.bias = None if bias is None else bias.detach().float()

    @property
    def weight(self) -> Weight:
        """Where compiled kernels find it."""
        width, depth = self.rounded.shape
        bias = None if self.bias is None else self.bias.data_ptr()
        return Weight(bytes=self.rounded.data_ptr(), scales=self.scales.data_ptr(), bias=bias, width=width, depth=depth)

    def serves(self, x: Tensor) -> bool:
        """Whether it may take this product: of few rows, on a CPU, without gradients."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return False
        most = _MOST_EIGHT_COMPILED if why_not(torch.float32, "rows") is None else MOST_EIGHT
        return 0 < x.numel() <= most * x.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of x."""
        flat = x.reshape(-1, x.shape[-1])
        out = apply(flat.float(), self.weight)
        if out is None:
            out = torch._weight_int8pack_mm(flat.bfloat16(), self.rounded, self.scales.bfloat16()).float()
            if self.bias is not None:
                out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> numbers of -127..127 [N, K] int8, and scales [N] float32: a row is its numbers times its scale."""
    scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-12)
    rounded = torch.empty_like(weight, dtype=torch.int8)
    for at in range(0, weight.shape[0], _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        rounded[some] = (weight[some].float() / scales[some, None]).round()
    return rounded, scales


def allows_eight() -> bool:
    """Whether a drafter's weights may be rounded at all."""
    return os.environ.get("OUTPACE_INT8", "on") != "off"


def takes_eight(weight: Tensor) -> bool:
    """Whether products with a weight are quicker in eight bits here: on an x86 CPU, unless switched off.

    In float32; and in bfloat16 where kernels are compiled.
    """
    return (
        weight.device.type == "cpu"
        and weight.numel() >= LEAST
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch, "_weight_int8pack_mm")
        and allows_eight()
        and (
            weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and why_not(torch.float32, "rows") is None)
        )
    )


def round_weights(module: nn.Module) -> None:
    """Let every layer of a module that can be, be read in eight bits where no gradients are asked for.

    A part that has a quicker form of its own (`quicken`, which says whether it has) takes that with all that is in it.
    """
    quicken = getattr(module, "quicken", None)
    if quicken is not None and quicken():
        return
    weight = getattr(module, "weight", None)
    if hasattr(module, "eight") and isinstance(weight, torch.Tensor) and takes_eight(weight):
        setattr(module, "eight", Eight(weight, getattr(module, "bias", None)))  # noqa: B010  # of both classes
    for part in module.children():
        round_weights(part)


class Linear(nn.Linear):
    """A linear layer that takes its product so.

    Attributes:
        eight: its weight in eight bits, if that is what reads it.
    """

    eight: Eight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias, self.eight)
