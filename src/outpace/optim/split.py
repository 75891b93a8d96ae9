"""Float splitting: an fp32 weight as a 16-bit weight the model computes with, plus an 8- or 16-bit residual code.

Rounding to nearest leaves an error of at most half a unit in the last place of the narrow number. The residual is the
position inside that interval, so its exponent need not be stored: the narrow number has it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from outpace.errors import UnsupportedError

# Per narrow dtype: mantissa bits, and the exponent field (in place, as fp32 bits) of its smallest normal number.
FORMATS: Final = {torch.bfloat16: (7, 1 << 23), torch.float16: (10, (127 - 14) << 23)}
CODES: Final = {8: torch.int8, 16: torch.int16}


def half_ulp(narrow: Tensor) -> Tensor:
    """Half a unit in the last place of every element of a bf16 or fp16 tensor, as float32, exactly.

    Zero and subnormals share the unit of the smallest normal number. Raises UnsupportedError on another dtype.
    """
    mantissa, _ = _format(narrow.dtype)
    return _exponent_bits(narrow).view(torch.float32) * 2.0 ** -(mantissa + 1)


def split(theta: Tensor, dtype: torch.dtype, bits: int, *, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode fp32 weights as (narrow weight, residual code in -N..N), N = 127 or 32767.

    theta: float32, any shape; uniform: draws in [0, 1) of the same shape for stochastic rounding, None for nearest
    Finite values beyond the narrow format saturate at its largest number; inf and NaN stay what they are, with code 0.
    Raises UnsupportedError for a dtype that is neither bf16 nor fp16.
    Source: FlashOptim (arXiv 2602.23349), section 3; half-way cases of the nearest rounding go away from zero.
    """
    mantissa, _ = _format(dtype)
    largest = torch.finfo(dtype).max
    narrow = torch.where(theta.abs() < torch.inf, theta.clamp(-largest, largest), theta).to(dtype)
    # 2^(128 - e) is always a normal fp32 number; dividing by half a unit at once would overflow.
    inverse = (0x7F800000 - _exponent_bits(narrow)).view(torch.float32)
    full = 2 ** (bits - 1) - 1
    place = (theta - narrow.float()) * inverse * 2.0**mantissa
    place = torch.nan_to_num(place, nan=0.0).clamp_(-1.0, 1.0) * full
    if uniform is None:
        code = place.sign() * (place.abs() + 0.5).floor()
    else:
        code = (place + uniform).floor().clamp_(-full, full)
    return narrow, code.to(CODES[bits])


def merge(narrow: Tensor, code: Tensor) -> Tensor:
    """Decode (narrow weight, residual code) to float32. The inverse of `split`, up to half a code step."""
    full = torch.full((), float(torch.iinfo(code.dtype).max), device=code.device)  # see `compand.exact_ratio`
    return narrow.float() + code.float() / full * half_ulp(narrow)


def split_ordinal(theta: Tensor, bits: int, *, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split the bit pattern of fp32 itself: bf16 is its top half. 16 bits lose nothing, not even the sign of zero.

    theta: float32, any shape; draws: int32 in 0..255 of the same shape to round 8 bits stochastically, None for nearest
    Saturation and special values as `split`; the narrow weight may be the other neighbour at a near-tie.
    """
    pattern = theta.view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    if bits == 16:
        high = (magnitude + 0x8000) >> 16
        low = magnitude - (high << 16)
    else:
        coarse = (magnitude + (0x80 if draws is None else draws)) >> 8
        high = (coarse + 0x80) >> 8
        low = coarse - (high << 8)
    finite = magnitude < 0x7F800000
    over = finite & (high > 0x7F7F)
    low = torch.where(over, torch.iinfo(CODES[bits]).max, low.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    high = torch.where(over, 0x7F7F, high)
    signed = torch.where(pattern < 0, high - 0x8000, high)  # the sign bit of a 16-bit pattern
    narrow = torch.where(finite, signed.to(torch.int16).view(torch.bfloat16), theta.to(torch.bfloat16))
    return narrow, torch.where(finite, low, 0).to(CODES[bits])


def merge_ordinal(narrow: Tensor, code: Tensor) -> Tensor:
    """Decode what `split_ordinal` stored, to float32."""
    pattern = narrow.view(torch.int16).to(torch.int32)
    magnitude = ((pattern & 0x7FFF) << 16) + (code.to(torch.int32) << (16 - torch.iinfo(code.dtype).bits))
    # A code of -1 on a zero cannot come out of `split_ordinal`; it is clamped so that no pattern turns negative.
    return (magnitude.clamp_min(0) | (pattern & -0x80000000)).view(torch.float32)


def _format(dtype: torch.dtype) -> tuple[int, int]:
    if dtype not in FORMATS:
        raise UnsupportedError(
            f"splitting stores bfloat16 or float16 weights, and this tensor is {dtype}; cast the model with "
            "model.to(torch.bfloat16), or keep this parameter in float32"
        )
    return FORMATS[dtype]


def _exponent_bits(narrow: Tensor) -> Tensor:
    """The exponent field of the narrow number, left where fp32 has it, at least that of the smallest normal."""
    _, smallest = _format(narrow.dtype)
    return (narrow.float().view(torch.int32) & 0x7F800000).clamp_min_(smallest)
