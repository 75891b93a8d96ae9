"""Operations of the fused step that give the bits of torch's, in fewer instructions.

- Reciprocals and square roots are correctly rounded but short: the hardware's estimate and one exact remainder
  (Markstein 1990). The sequence for 1 / b is the compiler's own without its handling of extreme exponents, which the
  definition keeps away: divisors lie between 2^-100 and 2^100, squares between 2^-102 and 2^126 (or are 0).
- Codes become float32 by placing the byte into the pattern of 2^23, and integers again by adding 1.5 * 2^23, after
  which the low bits of the pattern are the integer. Four codes share one register.
- A code divided by 127 or 32767 is code * high + code * low with one fused multiply-add, checked for every code.
- Everything else is rounded operation by operation (the kernel is compiled without fusing).

With EXACT the compiler's own operations are taken instead: what the short ones are tested against, and all that
Triton's interpreter can run.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from fractions import Fraction

import torch
import triton
import triton.language as tl

from outpace.optim.draws import MIX1, MIX2

_MIX1: tl.constexpr = tl.constexpr(MIX1)
_MIX2: tl.constexpr = tl.constexpr(MIX2 + (1 << 32))
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


def reciprocal_pair(by: int) -> tuple[float, float]:
    """1 / by as the sum of two float32 numbers."""
    high = torch.tensor(1.0 / by, dtype=torch.float32).item()
    low = torch.tensor(float(Fraction(1, by) - Fraction(high)), dtype=torch.float32).item()
    return high, low


_R127: tl.constexpr = tl.constexpr(reciprocal_pair(127))
_R32767: tl.constexpr = tl.constexpr(reciprocal_pair(32767))


@triton.jit
def reciprocal(b, EXACT: tl.constexpr):
    """1 / b, correctly rounded."""
    if EXACT:
        return tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(r, tl.fma(-b, r, 1.0), r)


@triton.jit
def root(x, EXACT: tl.constexpr):
    """The square root, correctly rounded."""
    if EXACT:
        return tl.sqrt_rn(x)
    s = tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(x, 1e-33)], dtype=tl.float32, is_pure=True, pack=1
    )
    y = x * s
    return tl.fma(tl.fma(-y, y, x), 0.5 * s, y)


@triton.jit
def ratio(a, by: tl.constexpr):
    """The ratio a / by, correctly rounded, for a constant."""
    return tl.div_rn(a, tl.full(a.shape, by, tl.float32))


@triton.jit
def place_of(code, BITS: tl.constexpr, EXACT: tl.constexpr):
    """An integer residual code divided by 127 or 32767, correctly rounded."""
    q = code.to(tl.float32)
    if EXACT:
        return ratio(q, (1 << (BITS - 1)) - 1.0)
    if BITS == 8:
        return tl.fma(q, _R127[0], q * _R127[1])
    return tl.fma(q, _R32767[0], q * _R32767[1])


@triton.jit
def floor(x, EXACT: tl.constexpr):
    """The largest integer not above x, |x| < 2^21, in the low bits of an int32 above the pattern of 1.5 * 2^23."""
    if EXACT:
        return (tl.floor(x) + _MAGIC).to(tl.int32, bitcast=True)
    y = tl.inline_asm_elementwise("add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y.to(tl.int32, bitcast=True)


@triton.jit
def nearest(x):
    """The integer nearest to x, ties to even, as `floor` gives it."""
    return (x + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def one_if_positive(x, EXACT: tl.constexpr):
    """1.0 where x > 0, 0.0 where it is 0, for x that is 0 or at least 2^-120."""
    if EXACT:
        return tl.where(x > 0, 1.0, 0.0)
    return tl.inline_asm_elementwise(
        "mul.sat.f32 $0, $1, 0f7E800000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def square(g, EXACT: tl.constexpr):
    """The square, or 0 where that is below the smallest normal float32."""
    if EXACT:
        g2 = g * g
        return tl.where(g2 < 2.0**-126, 0.0, g2)
    return tl.inline_asm_elementwise("mul.rn.ftz.f32 $0, $1, $1;", "=f,f", [g], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def worse(a, b):
    """The larger of two numbers, or NaN if one of them is: the combination of a maximum that hides nothing."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def signed(code, EXACT: tl.constexpr):
    """An int8 code as float32."""
    if EXACT:
        return code.to(tl.float32)
    return (
        tl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4B000000, 0x7650;
            prmt.b32 $1, u, 0x4B000000, 0x7651;
            prmt.b32 $2, u, 0x4B000000, 0x7652;
            prmt.b32 $3, u, 0x4B000000, 0x7653;
            }""",
            "=f,=f,=f,=f,r",
            [code],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
        - 8388736.0
    )


@triton.jit
def times_unsigned(code, unit, EXACT: tl.constexpr):
    """A uint8 code times one number per group, rounded once."""
    if EXACT:
        return code.to(tl.float32) * unit[:, None]
    lifted = tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, 0x4B000000, 0x7650;
        prmt.b32 $1, $4, 0x4B000000, 0x7651;
        prmt.b32 $2, $4, 0x4B000000, 0x7652;
        prmt.b32 $3, $4, 0x4B000000, 0x7653;
        """,
        "=f,=f,=f,=f,r",
        [code],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )
    # (2^23 + code) * unit - 2^23 * unit: the last product is exact, so the sum is rounded once.
    return tl.fma(lifted, wide(unit, lifted), wide(unit * -8388608.0, lifted))


@triton.jit
def low_bytes(x, BYTE: tl.constexpr, EXACT: tl.constexpr):
    """Byte 0 or 1 of every int32, as int8."""
    if EXACT:
        return (x >> (8 * BYTE)).to(tl.int8)
    if BYTE == 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, v;
            prmt.b32 u, $1, $2, 0x0040;
            prmt.b32 v, $3, $4, 0x0040;
            prmt.b32 $0, u, v, 0x5410;
            }""",
            "=r,r,r,r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:  # a constant condition is a branch to Triton: it reads on after a return
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, v;
            prmt.b32 u, $1, $2, 0x0051;
            prmt.b32 v, $3, $4, 0x0051;
            prmt.b32 $0, u, v, 0x5410;
            }""",
            "=r,r,r,r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def high_halves(x, EXACT: tl.constexpr):
    """The upper 16 bits of every int32, as int16."""
    if EXACT:
        return (x >> 16).to(tl.int16)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [x], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def joined(high, low, EXACT: tl.constexpr):
    """(high << 16) + (low << 8) of an int16 and an int8, as int32."""
    if EXACT:
        return (high.to(tl.int32) << 16) + (low.to(tl.int32) << 8)
    return (
        tl.inline_asm_elementwise(
            """{
            .reg .b32 u, v, w;
            xor.b32 u, $6, 0x80808080;
            and.b32 v, u, 0x00FF00FF;
            and.b32 w, u, 0xFF00FF00;
            prmt.b32 $0, v, $4, 0x5401;
            prmt.b32 $1, w, $4, 0x7610;
            prmt.b32 $2, v, $5, 0x5421;
            prmt.b32 $3, w, $5, 0x7630;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        - 0x8000
    )


@triton.jit
def widen(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """A loaded weight, gradient or scale as float32; bf16 comes as its int16 pattern, neighbours in one register."""
    if KIND != 1:
        return x.to(tl.float32)
    if EXACT:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def narrow(x, KIND: tl.constexpr, EXACT: tl.constexpr):
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
def mixed(x):
    """See `draws._mixed`."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return x


@triton.jit
def wide(b, like):
    """One number per group, for every element of it."""
    return tl.broadcast_to(b[:, None], like.shape)
