"""Optimizer states in 8 bits: groups of 32 elements share a scale, and a curve spends the codes where states live."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from outpace.optim.settings import Scales, States

SMALLEST_SCALE: Final = 2.0**-100  # below this a group counts as zero; far under any gradient that matters
PUBLISHED_SMALLEST: Final = 1e-12  # the floor of the published scheme, used with fp16 scales only
SCALE_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def exact_ratio(x: Tensor, by: float) -> Tensor:
    """The ratio x / by, rounded correctly on every device: torch on CUDA multiplies by 1 / by, if a number."""
    return x / torch.full((), by, device=x.device)


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root; torch on the CPU is off by one unit at times, float64 decides."""
    return x.double().sqrt().float()


def encode_momentum(m: Tensor, states: States, scales: Scales) -> tuple[Tensor, Tensor]:
    """Signed states to int8 codes and one scale per group.

    m: [groups, 32] float32, finite. Returns codes [groups, 32] int8 in -127..127 and scales [groups].
    Source: FlashOptim (arXiv 2602.23349), section 4; the curve is 2y / (1 + |y|) of y = m / scale.
    """
    divisor, scale = _scale(m.abs().amax(-1), scales)
    y = (m / divisor[:, None]).clamp_(-1.0, 1.0)
    if states == "companded8":
        y = (y * 2.0) / (y.abs() + 1.0)
    return (y * 127.0 + 0.5).floor_().to(torch.int8), scale


def decode_momentum(code: Tensor, scale: Tensor, states: States) -> Tensor:
    """Codes [groups, 32] int8 and scales [groups] to float32."""
    z = exact_ratio(code.float(), 127.0)
    if states == "companded8":
        z = z / (2.0 - z.abs())
    return z * scale.float()[:, None]


def encode_variance(v: Tensor, states: States, scales: Scales, floor: bool) -> tuple[Tensor, Tensor]:
    """Non-negative states to uint8 codes of their square root, and one scale per group.

    v: [groups, 32] float32, finite, 0 or a normal number. Returns codes [groups, 32] uint8 and scales [groups].
    floor: a positive v gets at least code 1. At code 0 the next step divides by almost nothing: an element beside a
    noisy neighbour was measured to move 75 times too far; with the floor it moves at most as far as it should.
    """
    root = exact_sqrt(v) if states == "companded8" else v
    divisor, scale = _scale(root.amax(-1), scales)
    code = ((root / divisor[:, None]).clamp_(max=1.0) * 255.0 + 0.5).floor_()
    if floor:
        code = torch.where(v > 0, code.clamp_min(1.0), code)
    return code.to(torch.uint8), scale


def decode_variance(code: Tensor, scale: Tensor, states: States) -> Tensor:
    """Codes [groups, 32] uint8 and scales [groups] to float32."""
    root = exact_ratio(code.float(), 255.0) * scale.float()[:, None]
    return root * root if states == "companded8" else root


def _scale(largest: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """(what to divide by, what to store) for groups whose largest magnitude is given, both finite."""
    if scales == "fp16":
        largest = largest.clamp_min(PUBLISHED_SMALLEST)
        return largest, largest.clamp(max=torch.finfo(torch.float16).max).half()
    largest = largest.clamp_min(SMALLEST_SCALE)
    if scales == "fp32":
        return largest, largest
    # Rounding up keeps |y| <= 1, and dividing by the stored scale leaves no mismatch between the two directions.
    up = ((largest.view(torch.int32) + 0xFFFF) & -0x10000).clamp_max(0x7F7F0000).view(torch.float32)
    return up, up.bfloat16()
