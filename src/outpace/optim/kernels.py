"""The fused step on CUDA: one Triton kernel per rule reads and writes every stored byte once, with no fp32 temporary.

It equals `reference_step` bit for bit. What that takes, operation by operation:

- Multiplications and additions are rounded one by one (`enable_fp_fusion=False`), as separate torch kernels round.
- Division and square root are correctly rounded but cheap: hardware estimate, one Newton step, one exact remainder
  (Markstein 1990). Operands are kept where no remainder underflows: scales >= 2^-80, moments 0 or >= 2^-100, squares
  scaled by 2^48. `exact=True` takes the compiler's own (slower) division instead; both are tested against torch.
- A code divided by 127 or 32767 is code * high + code * low with one fused multiply-add, checked for every code.
- Codes are turned to and from float32 by adding 1.5 * 2^23, after which the low bits of the pattern are the integer.
- bf16 numbers travel as int16 patterns, so subnormals survive and the interpreter can run the kernel.

It is never autotuned: a trial run would apply the update. This module imports Triton, and is imported on CUDA only.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803, N806
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from outpace.errors import UnsupportedError
from outpace.optim.compand import PUBLISHED_SMALLEST, SMALLEST_ROOT, SMALLEST_SCALE
from outpace.optim.draws import MIX1, MIX2, SCALES
from outpace.optim.reference import Stored, row_length
from outpace.optim.rules import LARGEST_GRADIENT, SMALLEST_MOMENT, Numbers, Rule
from outpace.optim.settings import GROUP, Storage
from outpace.optim.split import FORMATS

GROUPS_PER_PROGRAM: Final = 64
WARPS: Final = 4
_RULES: Final = {"adamw": 0, "lion": 1, "sgd": 2}
_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_G: tl.constexpr = tl.constexpr(GROUP)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
_PUBLISHED_SMALLEST: tl.constexpr = tl.constexpr(PUBLISHED_SMALLEST)
_LARGEST_GRADIENT: tl.constexpr = tl.constexpr(LARGEST_GRADIENT)
_SMALLEST_MOMENT: tl.constexpr = tl.constexpr(SMALLEST_MOMENT)
_SMALLEST_ROOT: tl.constexpr = tl.constexpr(SMALLEST_ROOT)
_MIX1: tl.constexpr = tl.constexpr(MIX1)
_MIX2: tl.constexpr = tl.constexpr(MIX2 + (1 << 32))


def reciprocal(by: int) -> tuple[float, float]:
    """1 / by as the sum of two float32 numbers."""
    high = torch.tensor(1.0 / by, dtype=torch.float32).item()
    low = torch.tensor(float(Fraction(1, by) - Fraction(high)), dtype=torch.float32).item()
    return high, low


_R127: tl.constexpr = tl.constexpr(reciprocal(127))
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
_R32767: tl.constexpr = tl.constexpr(reciprocal(32767))


@triton.jit
def _ratio(a, b, EXACT: tl.constexpr, NEWTON: tl.constexpr = True):
    """The ratio a / b, correctly rounded. NEWTON may be False where no quotient is near a tie."""
    if EXACT:
        return tl.div_rn(a, b)
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    if NEWTON:
        r = tl.fma(r, tl.fma(-b, r, 1.0), r)
    q = a * r
    return tl.fma(tl.fma(-b, q, a), r, q)


@triton.jit
def _root(v, EXACT: tl.constexpr):
    """2^24 times the square root, correctly rounded, of any v from 0 to 2^78."""
    x = v * 281474976710656.0
    if EXACT:
        return tl.sqrt_rn(x)
    s = tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(x, 1e-33)], dtype=tl.float32, is_pure=True, pack=1
    )
    y = x * s
    return tl.fma(tl.fma(-y, y, x), 0.5 * s, y)


@triton.jit
def _by_constant(code, high: tl.constexpr, low: tl.constexpr, by: tl.constexpr, EXACT: tl.constexpr):
    """An integer code, as float32, divided by a constant, correctly rounded."""
    if EXACT:
        return tl.div_rn(code, tl.full(code.shape, by, tl.float32))
    return tl.fma(code, high, code * low)


@triton.jit
def _floor(x, EXACT: tl.constexpr):
    """The largest integer not above x, |x| < 2^21, in the low bits of an int32 above the pattern of 1.5 * 2^23."""
    if EXACT:
        return (tl.floor(x) + _MAGIC).to(tl.int32, bitcast=True)
    y = tl.inline_asm_elementwise("add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y.to(tl.int32, bitcast=True)


@triton.jit
def _nearest(x):
    """The integer nearest to x, ties to even, as `_floor` gives it."""
    return (x + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _signed(code):
    """An int8 or int16 code as float32."""
    if code.dtype == tl.int8:
        bits = (code.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    return code.to(tl.float32)


@triton.jit
def _unsigned(code):
    """A uint8 code as float32."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _widen(x, KIND: tl.constexpr):
    """A loaded weight, gradient or scale as float32; bf16 comes as its int16 pattern."""
    if KIND == 1:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrow(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Float32 to fp16, or to the int16 pattern of bf16, rounded to nearest even; and that value as float32."""
    if KIND == 2:
        stored = x.to(tl.float16)
        value = stored.to(tl.float32)
    elif EXACT:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        stored = (bits >> 16).to(tl.int16)
        value = bits.to(tl.float32, bitcast=True)
    else:
        stored = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.int16, is_pure=True, pack=2
        )
        value = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return stored, value


@triton.jit
def _draws(gid, key, G: tl.constexpr):
    """See `draws.uniforms`: one 32-bit hash for two neighbours, 16 bits each; here as bits 7 to 22."""
    pair = gid[:, None] * (_G // 2) + tl.arange(0, _G // 2)[None, :]
    x = (pair.to(tl.int32) + key).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return tl.reshape(tl.join((x << 7) & 0x7FFF80, (x >> 9) & 0x7FFF80), [G, _G])


@triton.jit
def _scale_draws(gid, key):
    """See `draws.scale_draws`."""
    x = (gid.to(tl.int32) + key).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return (x & 0xFFFF).to(tl.int32, bitcast=True), (x >> 16).to(tl.int32, bitcast=True)


@triton.jit
def _scale_of(largest, smallest: tl.constexpr, draw, SCALES: tl.constexpr, STOCHASTIC: tl.constexpr):
    """(what to divide by, what to store, as its pattern) of a group whose largest magnitude is given."""
    if SCALES == 2:
        divisor = tl.maximum(largest, _PUBLISHED_SMALLEST)
        stored = tl.minimum(divisor, 65504.0).to(tl.float16)
    elif SCALES == 0:
        divisor = tl.maximum(largest, smallest)
        stored = divisor
    else:
        divisor = tl.maximum(largest, smallest)
        bits = divisor.to(tl.int32, bitcast=True)
        if STOCHASTIC:  # noqa: SIM108  # a constant condition is a branch to Triton, not a choice of values
            bits = bits + draw
        else:
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
        stored = tl.minimum(bits >> 16, 0x7F7F).to(tl.int16)
    return divisor, stored


@triton.jit
def _wide(b, like):
    """One number per group, for every element of it."""
    return tl.broadcast_to(b[:, None], like.shape)


@triton.jit
def _decode_momentum(code, s, CODED: tl.constexpr, SCALES: tl.constexpr, EXACT: tl.constexpr):
    q = _signed(code)
    s = _wide(s, q)
    if SCALES == 2:
        z = _by_constant(q, _R127[0], _R127[1], 127.0, EXACT)
        if CODED == 1:
            z = _ratio(z, 2.0 - tl.abs(z), EXACT)
        return z * s
    if CODED == 1:
        # With a bf16 scale the product has 15 bits and the divisor 8: no quotient is within 2^-33 of a tie.
        return _ratio(q * s, 254.0 - tl.abs(q), EXACT, SCALES == 0)
    return _ratio(q * s, tl.full(q.shape, 127.0, tl.float32), EXACT)


@triton.jit
def _encode_momentum(m, draw, CODED: tl.constexpr, SCALES: tl.constexpr, STOCHASTIC: tl.constexpr, EXACT: tl.constexpr):
    divisor, kept = _scale_of(tl.max(tl.abs(m), axis=1), _SMALLEST_SCALE, draw, SCALES, STOCHASTIC)
    s = _wide(divisor, m)
    if SCALES == 2:
        y = tl.div_rn(m, s)
        if CODED == 1:
            y = tl.div_rn(y * 2.0, tl.abs(y) + 1.0)
        return _floor(y * 127.0 + 0.5, EXACT), kept
    if CODED == 1:
        return _nearest(_ratio(m, s + tl.abs(m), EXACT) * 254.0), kept
    return _nearest(_ratio(m, s, EXACT) * 127.0), kept


@triton.jit
def _decode_root(code, s, SCALES: tl.constexpr, EXACT: tl.constexpr):
    """The square root of the variance; the variance itself where states are linear."""
    q = _unsigned(code)
    if SCALES == 2:
        return tl.div_rn(q, tl.full(q.shape, 255.0, tl.float32)) * _wide(s, q)
    unit = tl.div_rn(s, tl.full(s.shape, 255.0, tl.float32))
    unit = (unit.to(tl.int32, bitcast=True) - (unit * 255.0 > s).to(tl.int32)).to(tl.float32, bitcast=True)
    return q * _wide(unit, q)


@triton.jit
def _encode_root(
    r,
    draw,
    UNIT: tl.constexpr,
    smallest: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Codes of r / UNIT, UNIT a power of two."""
    divisor, kept = _scale_of(tl.max(r, axis=1) / UNIT, smallest, draw, SCALES, STOCHASTIC)
    if SCALES == 2:
        q = _floor(tl.div_rn(r, _wide(divisor * UNIT, r)) * 255.0 + 0.5, EXACT)
    else:
        q = _nearest(r * _wide(tl.div_rn(tl.full(divisor.shape, 255.0, tl.float32), divisor) / UNIT, r))
    if FLOOR:
        q = tl.where(r > 0, tl.maximum(q, 0x4B400001), q)
    return q, kept


@triton.jit(do_not_specialize=["key", "scale_key"])
def _step_kernel(
    weight_ptr,
    residual_ptr,
    grad_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    held_ptr,
    clip_ptr,
    groups,
    groups_per_row,
    cols,
    key,
    scale_key,
    decay,
    step,
    beta1,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    coupled,
    RULE: tl.constexpr,  # 0 AdamW, 1 Lion, 2 SGD
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,  # there is a first moment
    KIND: tl.constexpr,  # of the weight: 0 fp32, 1 bf16, 2 fp16
    GRAD: tl.constexpr,  # of the gradient, likewise
    MASTER: tl.constexpr,  # 0 the weight itself, 1 ulp residual, 2 ordinal residual, 3 fp32 master
    BITS: tl.constexpr,  # of the residual
    STOCHASTIC: tl.constexpr,
    CODED: tl.constexpr,  # moments: 0 fp32, 1 companded, 2 linear
    SCALES: tl.constexpr,  # 0 fp32, 1 bf16, 2 fp16 as published
    FLOOR: tl.constexpr,
    ALIGNED: tl.constexpr,  # groups follow each other without gaps
    CLIP: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
    G: tl.constexpr,
):
    pid = tl.program_id(0)
    local = tl.arange(0, G)
    lane = tl.arange(0, _G)[None, :]
    if ALIGNED:
        gid = pid * G + local
        start = pid.to(tl.int64) * (G * _G)
        off = local[:, None] * _G + lane
        mask = tl.broadcast_to((gid < groups)[:, None], [G, _G])
    else:
        gid = pid.to(tl.int64) * G + local
        start = pid.to(tl.int64) * 0
        row = gid // groups_per_row
        column = (gid - row * groups_per_row)[:, None] * _G + lane
        off = row[:, None] * cols + column
        mask = (gid < groups)[:, None] & (column < cols)
    gmask = gid < groups

    stored = tl.load(weight_ptr + start + off, mask=mask, other=0)
    g = _widen(tl.load(grad_ptr + start + off, mask=mask, other=0), GRAD)
    if CLIP:
        g = g * tl.load(clip_ptr)

    # decode
    n = _widen(stored, KIND)
    theta = n
    if MASTER == 3:
        code = tl.load(residual_ptr + start + off, mask=mask, other=0)
        theta = code
    if MASTER == 1:
        code = tl.load(residual_ptr + start + off, mask=mask, other=0)
        field = tl.maximum(n.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
        half_ulp = field.to(tl.float32, bitcast=True) * (0.5 / (1 << MANTISSA))
        if BITS == 8:
            place = _by_constant(code.to(tl.float32), _R127[0], _R127[1], 127.0, EXACT)
        else:
            place = _by_constant(code.to(tl.float32), _R32767[0], _R32767[1], 32767.0, EXACT)
        theta = n + place * half_ulp
    if MASTER == 2:
        code = tl.load(residual_ptr + start + off, mask=mask, other=0)
        pattern = stored.to(tl.int32)
        magnitude = ((pattern & 0x7FFF) << 16) + (code.to(tl.int32) << (16 - BITS))
        magnitude = tl.maximum(magnitude, 0) | (pattern & -0x80000000)
        theta = magnitude.to(tl.float32, bitcast=True)

    m = theta
    if FIRST:
        first = tl.load(first_ptr + start + off, mask=mask, other=0)
        if CODED == 0:
            m = first
        else:
            scale = _widen(tl.load(first_scale_ptr + gid, mask=gmask, other=0), SCALES)
            m = _decode_momentum(first, scale, CODED, SCALES, EXACT)
    v = theta
    if RULE == 0:
        second = tl.load(second_ptr + start + off, mask=mask, other=0)
        if CODED == 0:
            v = second
        else:
            scale = _widen(tl.load(second_scale_ptr + gid, mask=gmask, other=0), SCALES)
            old_root = _decode_root(second, scale, SCALES, EXACT)
            v = old_root * old_root if CODED == 1 else old_root

    # ordinary update
    new_m = m
    new_v = v
    if RULE == 0:
        new_m = m * beta1 + g * rest1
        new_m = tl.where(tl.abs(new_m) >= _SMALLEST_MOMENT, new_m, 0.0)
        new_v = v * beta2 + (g * g) * rest2
        new_root = _root(new_v, EXACT)  # 2^24 times the root; exact factors take it back out
        new_theta = theta * decay - _ratio(new_m, new_root * (root / 16777216.0) + eps, EXACT) * step
    if RULE == 1:
        direction = m * beta1 + g * rest1
        direction = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
        new_theta = theta * decay - direction * step
        new_m = m * beta2 + g * rest2
    if RULE == 2:
        d = g + theta * coupled
        if FIRST:
            new_m = m * beta1 + d * rest1
            d = d + new_m * beta1 if NESTEROV else new_m
        new_theta = theta * decay - d * step
    fine = (tl.abs(g) < _LARGEST_GRADIENT) & (tl.abs(new_theta) <= LARGEST)
    tl.store(held_ptr + tl.zeros([G, _G], tl.int32), tl.full([G, _G], 1, tl.int8), mask=fine == 0)
    moved = fine
    if STOCHASTIC:
        moved = fine & (new_theta != theta)

    # encode
    if MASTER == 0:
        tl.store(weight_ptr + start + off, tl.where(moved, new_theta, stored), mask=mask)
    if MASTER == 3:
        new_stored, rounded = _narrow(new_theta, KIND, EXACT)
        tl.store(weight_ptr + start + off, tl.where(moved, new_stored, stored), mask=mask)
        tl.store(residual_ptr + start + off, tl.where(moved, new_theta, theta), mask=mask)
    if MASTER == 1:
        new_stored, rounded = _narrow(new_theta, KIND, EXACT)
        field = tl.maximum(rounded.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
        inverse = (0x7F800000 - field).to(tl.float32, bitcast=True)
        FULL: tl.constexpr = (1 << (BITS - 1)) - 1
        # Scaling by a power of two is exact, so it can be merged with the multiplication by FULL. Rounding to nearest
        # leaves at most half a unit, so there is nothing to clamp.
        place = ((new_theta - rounded) * inverse) * ((1 << MANTISSA) * FULL * 1.0)
        if STOCHASTIC:
            draw = (_draws(gid, key, G).to(tl.int32, bitcast=True) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
            new_code = _floor(place + draw, EXACT)
            if BITS == 16:
                new_code = tl.minimum(new_code, 0x4B400000 + FULL)
        else:
            new_code = _floor(tl.abs(place) + 0.5, EXACT) - 0x4B400000
            new_code = tl.where(place < 0, -new_code, new_code)
        tl.store(weight_ptr + start + off, tl.where(moved, new_stored, stored), mask=mask)
        tl.store(residual_ptr + start + off, tl.where(moved, new_code, code.to(tl.int32)).to(code.dtype), mask=mask)
    if MASTER == 2:
        pattern = new_theta.to(tl.int32, bitcast=True)
        magnitude = pattern & 0x7FFFFFFF
        if BITS == 16:
            high = (magnitude + 0x8000) >> 16
            low = magnitude - (high << 16)
        else:
            if STOCHASTIC:
                coarse = (magnitude + (_draws(gid, key, G) >> 15).to(tl.int32, bitcast=True)) >> 8
            else:
                coarse = (magnitude + 0x80) >> 8
            high = (coarse + 0x80) >> 8
            low = coarse - (high << 8)
        over = high > 0x7F7F
        low = tl.where(over, (1 << (BITS - 1)) - 1, tl.minimum(low, (1 << (BITS - 1)) - 1))
        high = tl.where(over, 0x7F7F, high)
        new_stored = (high | ((pattern >> 16) & 0x8000)).to(tl.int16)
        tl.store(weight_ptr + start + off, tl.where(moved, new_stored, stored), mask=mask)
        tl.store(residual_ptr + start + off, tl.where(moved, low, code.to(tl.int32)).to(code.dtype), mask=mask)

    first_draw, second_draw = _scale_draws(gid, scale_key)
    if FIRST:
        m = tl.where(fine, new_m, m)
        if CODED == 0:
            tl.store(first_ptr + start + off, m, mask=mask)
        else:
            codes, kept = _encode_momentum(m, first_draw, CODED, SCALES, STOCHASTIC, EXACT)
            tl.store(first_ptr + start + off, codes.to(tl.int8), mask=mask)
            tl.store(first_scale_ptr + gid, kept, mask=gmask)
    if RULE == 0:
        if CODED == 0:
            tl.store(second_ptr + start + off, tl.where(fine, new_v, v), mask=mask)
        else:
            if CODED == 1:
                # The root of a square that was rounded is the number that was squared.
                r = tl.where(fine, new_root, old_root * 16777216.0)
                codes, kept = _encode_root(r, second_draw, 16777216.0, _SMALLEST_ROOT, FLOOR, SCALES, STOCHASTIC, EXACT)
            else:
                codes, kept = _encode_root(
                    tl.where(fine, new_v, v), second_draw, 1.0, _SMALLEST_SCALE, FLOOR, SCALES, STOCHASTIC, EXACT
                )
            tl.store(second_ptr + start + off, codes.to(tl.uint8), mask=mask)
            tl.store(second_scale_ptr + gid, kept, mask=gmask)


def _int32(number: int) -> int:
    """The number as 32-bit arithmetic would leave it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def fused_step(
    rule: Rule,
    storage: Storage,
    stored: Stored,
    grad: Tensor,
    numbers: Numbers,
    key: int,
    scale: Tensor | None = None,
    *,
    exact: bool = False,
) -> None:
    """As `reference_step`, in one kernel launch.

    exact: use the compiler's correctly rounded division and square root instead of the short sequences above
    Raises UnsupportedError on an AMD GPU, for which nothing here was tested.
    """
    if torch.version.hip is not None:
        raise UnsupportedError("the fused kernels are written for NVIDIA GPUs; use backend='reference'")
    weight, dummy = stored.weight, stored.held.view(torch.int8)
    row = row_length(weight, storage)
    aligned = row % GROUP == 0 or row == weight.numel()
    per_row = -(-row // GROUP)
    groups = weight.numel() // row * per_row
    coded = 0 if stored.first_scale is None else 1 if storage.states == "companded8" else 2
    master = 0
    if stored.residual is not None:
        master = 3 if stored.residual.dtype == torch.float32 else 2 if storage.residual == "ordinal" else 1
    mantissa, smallest = FORMATS.get(weight.dtype, (7, 1 << 23))
    # A flat or one-row tensor may end inside a group: it takes the masked addressing.
    aligned = aligned and weight.numel() % GROUP == 0
    residual_key = _int32(key + stored.first_slot // 2)
    scale_key = _int32((key ^ SCALES) + stored.first_slot // GROUP)
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}

    def plain(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return dummy
        return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

    with torch.cuda.device(weight.device):
        _step_kernel[(triton.cdiv(groups, GROUPS_PER_PROGRAM),)](
            plain(weight),
            plain(stored.residual),
            plain(grad),
            plain(stored.first),
            plain(stored.first_scale),
            plain(stored.second),
            plain(stored.second_scale),
            dummy,
            dummy if scale is None else scale,
            groups,
            per_row,
            row,
            residual_key,
            scale_key,
            *numbers,
            RULE=_RULES[rule.name],
            NESTEROV=rule.nesterov,
            FIRST=rule.first is not None,
            KIND=_KINDS[weight.dtype],
            GRAD=_KINDS[grad.dtype],
            MASTER=master,
            BITS=storage.residual_bits if master in (1, 2) else 8,
            STOCHASTIC=storage.rounding == "stochastic",
            CODED=coded,
            SCALES={"fp32": 0, "bf16": 1, "fp16": 2}[storage.scales],
            FLOOR=storage.variance_floor,
            ALIGNED=aligned,
            CLIP=scale is not None,
            MANTISSA=mantissa,
            SMALLEST=smallest,
            LARGEST=torch.finfo(weight.dtype).max,
            EXACT=exact,
            G=GROUPS_PER_PROGRAM,
            **options,
        )
