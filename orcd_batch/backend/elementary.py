"""exp and log as fixed sequences of IEEE fp32 operations, so that any device gives the same bits.

Every step below is one fp32 operation rounded to nearest even, in the order written, never
contracted into a fused multiply-add (CUDA: __fadd_rn, __fmul_rn, __fsub_rn, __fdiv_rn). All
constants are fp32 and given in hexadecimal. Polynomials: least-squares fits at Chebyshev nodes,
coefficients rounded to fp32. Reduction: Tang 1989 (exp), the atanh series in s = f / (2 + f) (log).

    expf_fixed(z), for z <= 0 or -inf:              (exact at 0; within 1 ulp elsewhere)
        z < -86  ->  +0.0, otherwise
        n = (z * LOG2E + MAGIC) - MAGIC                  nearest integer, -125 <= n <= 0
        r = (z - n * LN2_HI) - n * LN2_LO
        q = E0 + r*(E1 + r*(E2 + r*(E3 + r*(E4 + r*E5))))
        p = 1 + (r + (r*r)*q)
        result = p * 2^n, where 2^n has the bit pattern ((int)n + 127) << 23

    logf_fixed(y), for positive normal y:           (exact at 1; within 1 ulp elsewhere)
        i = bits of y as int32;  k = (i - 0x3F3504F3) >> 23  (arithmetic shift)
        m = float with bits i - (k << 23)                sqrt(1/2) <= m < sqrt(2)
        f = m - 1;  s = f / (2 + f);  w = s * s
        t = w*(L0 + w*(L1 + w*(L2 + w*L3)))
        g = f - s*(f - t)
        result = (float)k * LN2_HI + ((float)k * LN2_LO + g)
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _hex(text: str) -> np.float32:
    return np.float32(float.fromhex(text))


LOG2E = _hex("0x1.715476p+0")
LN2_HI = _hex("0x1.63p-1")
LN2_LO = _hex("-0x1.bd0106p-13")
MAGIC = np.float32(12582912.0)
EXP_CUTOFF = np.float32(-86.0)
EXP_COEFFICIENTS = (
    _hex("0x1.000000p-1"),
    _hex("0x1.555554p-3"),
    _hex("0x1.555484p-5"),
    _hex("0x1.1111eep-7"),
    _hex("0x1.6d9408p-10"),
    _hex("0x1.9fb882p-13"),
)
LOG_COEFFICIENTS = (
    _hex("0x1.555556p-1"),
    _hex("0x1.9999ecp-2"),
    _hex("0x1.245bd2p-2"),
    _hex("0x1.dde530p-3"),
)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_ONE, _TWO = np.float32(1.0), np.float32(2.0)


def expf_fixed(z: Floats) -> Floats:
    """exp(z) elementwise for z <= 0 (fp32, -inf allowed), as the module's docstring spells out."""
    clamped = np.maximum(z, EXP_CUTOFF)
    n = clamped * LOG2E
    n += MAGIC
    n -= MAGIC
    r = clamped
    r -= n * LN2_HI
    r -= n * LN2_LO
    result = r * r
    result *= _polynomial(r, EXP_COEFFICIENTS)
    result += r
    result += _ONE
    powers = n.astype(np.int32)
    powers += np.int32(127)
    powers <<= np.int32(23)
    result *= powers.view(np.float32)
    result[z < EXP_CUTOFF] = 0.0
    return result


def logf_fixed(y: Floats) -> Floats:
    """log(y) elementwise for positive normal fp32 y, as the module's docstring spells out."""
    bits = y.view(np.int32)
    k = bits - _SQRT_HALF_BITS
    k >>= np.int32(23)
    f = (bits - (k << np.int32(23))).view(np.float32)
    f -= _ONE
    s = f / (_TWO + f)
    w = s * s
    w *= _polynomial(w, LOG_COEFFICIENTS)
    np.subtract(f, w, out=w)
    w *= s
    f -= w
    exponent = k.astype(np.float32)
    f += exponent * LN2_LO
    exponent *= LN2_HI
    f += exponent
    return f


def _polynomial(x: Floats, coefficients: tuple[np.float32, ...]) -> Floats:
    """c0 + x*(c1 + x*(c2 + ...)), evaluated from the inside out."""
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result += coefficient
        result *= x
    result += coefficients[0]
    return result
