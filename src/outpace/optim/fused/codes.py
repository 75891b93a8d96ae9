"""What is stored, to and from float32, inside the kernel: weights with residuals, moments with scales.

Each function is the twin of one in `split` or `compand`, with the storage settings known when it is compiled.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN201, N803, N806, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from outpace.optim.compand import PUBLISHED_SMALLEST, SMALLEST_ROOT, SMALLEST_SCALE, UNIT
from outpace.optim.fused.arithmetic import (
    floor,
    high_halves,
    joined,
    low_bytes,
    mixed,
    narrow,
    nearest,
    one_if_positive,
    place_of,
    ratio,
    reciprocal,
    signed,
    times_unsigned,
    wide,
    widen,
)
from outpace.optim.rules import LIFT
from outpace.optim.settings import GROUP

_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
_SMALLEST_ROOT: tl.constexpr = tl.constexpr(SMALLEST_ROOT)
_PUBLISHED_SMALLEST: tl.constexpr = tl.constexpr(PUBLISHED_SMALLEST)
_UNIT: tl.constexpr = tl.constexpr(UNIT)
_LIFT: tl.constexpr = tl.constexpr(LIFT**0.5)
_G: tl.constexpr = tl.constexpr(GROUP)


@triton.jit
def decode_weight(stored, code, KIND: tl.constexpr, MASTER: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr):
    """The float32 weight. MASTER: 0 the weight itself, 1 ulp residual, 2 ordinal residual, 3 fp32 master."""
    if MASTER == 0:
        return widen(stored, KIND, EXACT)
    elif MASTER == 3:
        return code
    elif MASTER == 1:
        n = widen(stored, KIND, EXACT)
        MANTISSA: tl.constexpr = 7 if KIND == 1 else 10
        SMALLEST: tl.constexpr = 1 << 23 if KIND == 1 else 113 << 23
        field = tl.maximum(n.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
        half_ulp = field.to(tl.float32, bitcast=True) * (0.5 / (1 << MANTISSA))
        return n + place_of(code, BITS, EXACT) * half_ulp
    elif BITS == 8:
        return joined(stored, code, EXACT).to(tl.float32, bitcast=True)
    else:
        return ((stored.to(tl.int32) << 16) + code.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def encode_weight(
    theta,
    group,
    place,
    key,
    KIND: tl.constexpr,
    MASTER: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(narrow weight, residual code) of a float32 weight that fits the narrow format; see `split`.

    group: int32 [G]; place: int32 [1, 32], counted from the start of the group: together they say which draw to take
    """
    if MASTER == 0:
        return theta, theta
    elif MASTER == 3:
        stored, value = narrow(theta, KIND, EXACT)
        return stored, theta
    elif MASTER == 1:
        MANTISSA: tl.constexpr = 7 if KIND == 1 else 10
        SMALLEST: tl.constexpr = 1 << 23 if KIND == 1 else 113 << 23
        FULL: tl.constexpr = (1 << (BITS - 1)) - 1
        stored, value = narrow(theta, KIND, EXACT)
        field = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
        inverse = (0x7F800000 - field).to(tl.float32, bitcast=True)
        # Scaling by a power of two is exact, so it can be merged with the multiplication by FULL. Rounding to nearest
        # leaves at most half a unit, so there is nothing to clamp.
        position = ((theta - value) * inverse) * ((1 << MANTISSA) * FULL * 1.0)
        if STOCHASTIC:
            half = mixed(group[:, None] * (_G // 2) + (place >> 1) + key) >> ((place & 1) * 16).to(tl.uint32)
            draw = (((half & 0xFFFF) << 7).to(tl.int32, bitcast=True) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
            new_code = floor(position + draw, EXACT)
            if BITS == 16:
                new_code = tl.minimum(new_code, 0x4B400000 + FULL)
        else:
            new_code = floor(tl.abs(position) + 0.5, EXACT) - 0x4B400000
            new_code = tl.where(position < 0, -new_code, new_code)
        if BITS == 8:
            return stored, low_bytes(new_code, 0, EXACT)
        else:
            return stored, new_code.to(tl.int16)
    elif BITS == 8:
        # The sign stands above the magnitude, so adding to the pattern adds to the magnitude.
        pattern = theta.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            hashed = mixed(group[:, None] * (_G // 4) + (place >> 2) + key)
            coarse = pattern + ((hashed >> ((place & 3) * 8).to(tl.uint32)) & 0xFF).to(tl.int32, bitcast=True)
        else:
            coarse = pattern + 0x80
        return high_halves(coarse + 0x8000, EXACT), low_bytes(coarse, 1, EXACT)
    else:
        pattern = theta.to(tl.int32, bitcast=True)
        return high_halves(pattern + 0x8000, EXACT), pattern.to(tl.int16)


@triton.jit
def scale_draws(group, key):
    """See `draws.scale_draws`."""
    x = mixed(group + key)
    return (x & 0xFFFF).to(tl.int32, bitcast=True), (x >> 16).to(tl.int32, bitcast=True)


@triton.jit
def stored_scale(largest, draw, SCALES: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What is stored of a scale. SCALES: 0 fp32, 1 the int16 pattern of bf16, 2 fp16 as published."""
    if SCALES == 0:
        return largest
    elif SCALES == 2:
        return tl.minimum(largest, 65504.0).to(tl.float16)
    else:
        bits = largest.to(tl.int32, bitcast=True)
        if STOCHASTIC:  # a constant condition is a branch to Triton, not a choice of values
            bits = bits + draw
        else:
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return tl.minimum(bits >> 16, 0x7F7F).to(tl.int16)


@triton.jit
def decode_momentum(code, s, CODED: tl.constexpr, SCALES: tl.constexpr, EXACT: tl.constexpr):
    """CODED: 1 companded, 2 linear."""
    q = signed(code, EXACT)
    if SCALES == 2:
        z = ratio(q, 127.0)
        if CODED == 1:
            z = tl.div_rn(z, 2.0 - tl.abs(z))
        return z * wide(s, q)
    elif CODED == 1:
        return (q * wide(s, q)) * reciprocal(254.0 - tl.abs(q), EXACT)
    else:
        return ratio(q * wide(s, q), 127.0)


@triton.jit
def encode_momentum(
    m, largest, draw, CODED: tl.constexpr, SCALES: tl.constexpr, STOCHASTIC: tl.constexpr, EXACT: tl.constexpr
):
    """(codes, stored scales) of moments, given the largest magnitude of each group."""
    if SCALES == 2:
        largest = tl.maximum(largest, _PUBLISHED_SMALLEST)
        y = tl.div_rn(m, wide(largest, m))
        if CODED == 1:
            y = tl.div_rn(y * 2.0, tl.abs(y) + 1.0)
        code = floor(y * 127.0 + 0.5, EXACT)
    else:
        largest = tl.maximum(largest, _SMALLEST_SCALE)
        s = wide(largest, m)
        if CODED == 1:
            code = nearest(m * reciprocal(s + tl.abs(m), EXACT) * 254.0)
        else:
            code = nearest(tl.div_rn(m, s) * 127.0)
    return low_bytes(code, 0, EXACT), stored_scale(largest, draw, SCALES, STOCHASTIC)


@triton.jit
def decode_root(code, s, LIFTED: tl.constexpr, SCALES: tl.constexpr, EXACT: tl.constexpr):
    """2^24 times the square root of the variance if LIFTED; else what linear states keep: the variance itself."""
    LIFT: tl.constexpr = _LIFT if LIFTED else 1.0
    if SCALES == 2:
        q = code.to(tl.float32)
        return ratio(q, 255.0) * wide(s * LIFT, q)
    else:
        return times_unsigned(code, s * _UNIT * LIFT, EXACT)


@triton.jit
def encode_root(
    r,
    largest,
    draw,
    LIFTED: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The inverse of `decode_root`, given the largest of each group: (codes, stored scales)."""
    LIFT: tl.constexpr = _LIFT if LIFTED else 1.0
    DROP: tl.constexpr = 1.0 / LIFT
    SMALLEST: tl.constexpr = _PUBLISHED_SMALLEST if SCALES == 2 else _SMALLEST_ROOT if LIFTED else _SMALLEST_SCALE
    largest = tl.maximum(largest * DROP, SMALLEST)
    if SCALES == 2:
        code = floor(tl.div_rn(r, wide(largest * LIFT, r)) * 255.0 + 0.5, EXACT)
        if FLOOR:
            code = tl.maximum(code, 0x4B400000 + one_if_positive(r, EXACT).to(tl.int32))
    else:
        place = r * wide(reciprocal(largest, EXACT) * 255.0 * DROP, r)
        if FLOOR:
            place = tl.maximum(place, one_if_positive(r, EXACT))
        code = nearest(place)
    return low_bytes(code, 0, EXACT).to(tl.uint8, bitcast=True), stored_scale(largest, draw, SCALES, STOCHASTIC)
