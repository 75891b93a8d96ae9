"""Optimizer states in 8 bits: groups of 32 elements share a scale, and a curve spends the codes where states live."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from outpace.optim.settings import Scales, States

SMALLEST_SCALE: Final = 2.0**-80  # of moments; whatever is far below counts as zero
SMALLEST_ROOT: Final = 2.0**-50  # of square roots of variances, so that the square of a code never underflows
PUBLISHED_SMALLEST: Final = 1e-12  # the floor of the published scheme, used with fp16 scales only
UNIT: Final = 65793 / 2**24  # the largest number of 17 bits whose 255-fold is at most 1
SCALE_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def exact_ratio(x: Tensor, by: float) -> Tensor:
    """The ratio x / by, rounded correctly on every device: torch on CUDA multiplies by 1 / by, if a number."""
    return x / torch.full((), by, device=x.device)


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root; torch on the CPU is off by one unit at times, float64 decides."""
    return x.double().sqrt().float()


def encode_momentum(m: Tensor, states: States, scales: Scales, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Signed states to int8 codes and one scale per group.

    m: [groups, 32] float32, finite; draws: int32 [groups] in 0..65535, to round bf16 scales by, None for nearest
    Returns codes [groups, 32] int8 in -127..127 and scales [groups].
    The curve is 2y / (1 + |y|) of y = m / largest, computed as 2m / (largest + |m|): one reciprocal, no division.
    Source: FlashOptim (arXiv 2602.23349), section 4; with scales="fp16" in its very order of operations.
    """
    largest = m.abs().amax(-1)
    if scales == "fp16":
        divisor, scale = _published_scale(largest)
        y = m / divisor[:, None]
        if states == "companded8":
            y = (y * 2.0) / (y.abs() + 1.0)
        return (y * 127.0 + 0.5).floor_().to(torch.int8), scale
    largest = largest.clamp_min(SMALLEST_SCALE)
    below = largest[:, None]
    code = m * (below + m.abs()).reciprocal() * 254.0 if states == "companded8" else m / below * 127.0
    return code.round_().to(torch.int8), _stored_scale(largest, scales, draws)


def decode_momentum(code: Tensor, scale: Tensor, states: States) -> Tensor:
    """Codes [groups, 32] int8 and scales [groups] to float32."""
    q, s = code.float(), scale.float()[:, None]
    if scale.dtype != torch.float16:
        return (q * s) * (254.0 - q.abs()).reciprocal() if states == "companded8" else exact_ratio(q * s, 127.0)
    z = exact_ratio(q, 127.0)
    if states == "companded8":
        z = z / (2.0 - z.abs())
    return z * s


def encode_variance(
    v: Tensor, states: States, scales: Scales, floor: bool, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Non-negative states to uint8 codes of their square root, and one scale per group.

    v: [groups, 32] float32, finite; draws: as for `encode_momentum`
    Returns codes [groups, 32] uint8 and scales [groups].
    floor: a positive v gets at least code 1. At code 0 the next step divides by almost nothing: an element beside a
    noisy neighbour was measured to move 75 times too far; with the floor it moves at most as far as it should.
    """
    return encode_root(exact_sqrt(v) if states == "companded8" else v, states, scales, floor, draws)


def encode_root(
    root: Tensor, states: States, scales: Scales, floor: bool, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `encode_variance`, from what the codes are of: the square root, or with states="linear8" the variance."""
    largest = root.amax(-1)
    if scales == "fp16":
        divisor, scale = _published_scale(largest)
        code = (root / divisor[:, None] * 255.0 + 0.5).floor_()
    else:
        largest = largest.clamp_min(SMALLEST_ROOT if states == "companded8" else SMALLEST_SCALE)
        scale = _stored_scale(largest, scales, draws)
        code = (root * (largest.reciprocal() * 255.0)[:, None]).round_()
    if floor:
        code = torch.where(root > 0, code.clamp_min(1.0), code)
    return code.to(torch.uint8), scale


def decode_variance(code: Tensor, scale: Tensor, states: States) -> Tensor:
    """Codes [groups, 32] uint8 and scales [groups] to float32."""
    root = decode_root(code, scale)
    return root * root if states == "companded8" else root


def decode_root(code: Tensor, scale: Tensor) -> Tensor:
    """What the codes are of, see `encode_root`.

    Code 255 never decodes above the scale, or encoding it again would take the next scale.
    """
    q, s = code.float(), scale.float()[:, None]
    return exact_ratio(q, 255.0) * s if scale.dtype == torch.float16 else q * (s * UNIT)


def _published_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(what to divide by, what to store) as published; a scale that would be infinite saturates."""
    largest = largest.clamp_min(PUBLISHED_SMALLEST)
    return largest, largest.clamp(max=torch.finfo(torch.float16).max).half()


def _stored_scale(largest: Tensor, scales: Scales, draws: Tensor | None) -> Tensor:
    """The scale of groups whose largest magnitude is given.

    Codes are taken relative to the exact largest magnitude and decoded by the stored scale. Rounded stochastically, it
    is right on average: a state that shrinks by 0.05 % a step does shrink, though bf16 has only steps of 0.4 %. Rounded
    up or to nearest it would stay for ever, as the variance of an idle group then did.
    """
    if scales == "fp32":
        return largest
    if draws is None:
        return largest.clamp_max(torch.finfo(torch.bfloat16).max).bfloat16()
    rounded = ((largest.view(torch.int32) + draws) & -0x10000).clamp_max(0x7F7F0000)
    return rounded.view(torch.float32).bfloat16()
