"""Seeded standard normals in registers: Philox4x32-10 (Salmon et al., SC11) and Box-Muller.

The arithmetic is that of csrc/philox.h, step by step with the same fused multiply-adds and the same fitted polynomials:
`tl.log` and `tl.cos` become the hardware's approximations, whose error near 1 and near the zeros is far above 4 ulp.
"""

from __future__ import annotations

import triton
import triton.language as tl

# -2 ln(1 + f), sin(2 pi t) and cos(2 pi t); csrc/philox.h says how they were fitted and how exact they are.
LOG0 = tl.constexpr(float.fromhex("-0x1.555554p-1"))
LOG1 = tl.constexpr(float.fromhex("0x1.000226p-1"))
LOG2 = tl.constexpr(float.fromhex("-0x1.99a01cp-2"))
LOG3 = tl.constexpr(float.fromhex("0x1.54728ap-2"))
LOG4 = tl.constexpr(float.fromhex("-0x1.22d92ep-2"))
LOG5 = tl.constexpr(float.fromhex("0x1.0d8242p-2"))
LOG6 = tl.constexpr(float.fromhex("-0x1.055ec6p-2"))
LOG7 = tl.constexpr(float.fromhex("0x1.38c9dep-3"))
MINUS_TWO_LN2_HIGH = tl.constexpr(float.fromhex("-0x1.62e430p+0"))
MINUS_TWO_LN2_LOW = tl.constexpr(float.fromhex("0x1.05c610p-28"))
SIN0 = tl.constexpr(float.fromhex("-0x1.4abbbep+5"))
SIN1 = tl.constexpr(float.fromhex("0x1.465facp+6"))
SIN2 = tl.constexpr(float.fromhex("-0x1.2db5ccp+6"))
TWO_PI_HIGH = tl.constexpr(float.fromhex("0x1.921fb6p+2"))
TWO_PI_LOW = tl.constexpr(float.fromhex("-0x1.777a5cp-23"))
COS0 = tl.constexpr(float.fromhex("-0x1.3bd3ccp+4"))
COS1 = tl.constexpr(float.fromhex("0x1.03c1b0p+6"))
COS2 = tl.constexpr(float.fromhex("-0x1.55b2b4p+6"))
COS3 = tl.constexpr(float.fromhex("0x1.d4f632p+5"))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
TURN = tl.constexpr(2.0**-24)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) for u = ((word >> 9) + 1/2) 2^-23."""
    bits = ((word >> 8) | 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    shifted = bits - SQRT_HALF_BITS
    exponent = shifted >> 23
    f = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    e = (exponent - 24).to(tl.float32)
    p = tl.fma(tl.full(f.shape, LOG7, tl.float32), f, tl.full(f.shape, LOG6, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG5, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG4, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG3, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG2, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG1, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, LOG0, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, 1.0, tl.float32))
    tail = tl.fma(p, f * f, e * MINUS_TWO_LN2_LOW)
    log = tl.fma(
        e,
        tl.full(f.shape, MINUS_TWO_LN2_HIGH, tl.float32),
        tl.fma(tl.full(f.shape, -2.0, tl.float32), f, tail),
    )
    return tl.sqrt_rn(log)


@triton.jit
def _pair(radius, word):
    """(radius cos, radius sin) of 2 pi turn for turn = (word >> 8) 2^-24; zeros are exact."""
    turn = (word >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    t = (turn - (quarter << 22)).to(tl.float32) * TURN
    s = t * t
    sin_tail = tl.fma(tl.full(s.shape, SIN2, tl.float32), s, tl.full(s.shape, SIN1, tl.float32))
    sin_tail = tl.fma(sin_tail, s, tl.full(s.shape, SIN0, tl.float32))
    sin_tail = tl.fma(sin_tail, s, tl.full(s.shape, TWO_PI_LOW, tl.float32))
    sine = tl.fma(t, tl.full(s.shape, TWO_PI_HIGH, tl.float32), t * sin_tail)
    cos_tail = tl.fma(tl.full(s.shape, COS3, tl.float32), s, tl.full(s.shape, COS2, tl.float32))
    cos_tail = tl.fma(cos_tail, s, tl.full(s.shape, COS1, tl.float32))
    cos_tail = tl.fma(cos_tail, s, tl.full(s.shape, COS0, tl.float32))
    cosine = tl.fma(cos_tail, s, tl.full(s.shape, 1.0, tl.float32))
    swapped = (quarter & 1) == 1
    x = tl.where(swapped, sine, cosine)
    y = tl.where(swapped, cosine, sine)
    even = radius * tl.where(((quarter + 1) & 2) == 2, -x, x)
    odd = radius * tl.where((quarter & 2) == 2, -y, y)
    return even, odd


@triton.jit
def normals(seed, stream, sample_id, first_element, BLOCK: tl.constexpr):
    """Float32 normals (BLOCK,) of elements first_element + 0..BLOCK-1 of one sample.

    seed: int64 scalar with the seed's 64 bits. stream: int32 scalar. sample_id: int64 scalar tensor.
    first_element: int64 scalar, a multiple of 4.
    """
    block = first_element // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    counter0 = (block & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], tl.int64)
    counter1 = ((zero + stream) & 0xFFFFFFFF).to(tl.uint32)
    counter2 = ((zero + sample_id) & 0xFFFFFFFF).to(tl.uint32)
    counter3 = (((zero + sample_id) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter0, counter1, counter2, counter3)
    z0, z1 = _pair(_radius(w0), w1)
    z2, z3 = _pair(_radius(w2), w3)
    # (BLOCK / 4, 2, 2) -> (BLOCK,): element 4 k + 2 i + j is z[2 i + j] of block k
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])
