"""The rotary table: cosine and sine of every position and pair, the same bits on every CPU.

numpy's own sin, cos and power differ in the last bit between CPU kinds, which would make a GPU's
results depend on the host. Here the frequencies come from decimal arithmetic, correctly rounded,
and the angles' sine and cosine from fp64 additions and multiplications alone.
"""

from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from orcd_batch.checkpoint.model_config import ModelConfig
from orcd_batch.errors import CheckpointError

Doubles = NDArray[np.float64]

# pi/2 in three parts of 33, 33 and 53 bits: k times one of the first two is exact for k < 2**20.
_HALF_PI = tuple(
    float.fromhex(text)
    for text in ("0x1.921fb5440p+0", "0x1.0b4611a60p-34", "0x1.3198a2e037073p-69")
)
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_MAX_QUARTERS = 2.0**20
# Positions at a time, so that the work arrays stay in the CPU's cache.
_CHUNK = 512
# Taylor series of sin(r)/r and cos(r) in r * r; the first term left out is below 1e-17 at pi/4.
_SIN_TERMS = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800,
              -1 / 1307674368000, 1 / 355687428096000)  # fmt: skip
_COS_TERMS = (1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600,
              -1 / 87178291200, 1 / 20922789888000, -1 / 6402373705728000)  # fmt: skip


def rope_table(
    config: ModelConfig, num_positions: int, rope_freqs: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """(num_positions, 2, D/2) fp32: cos, then sin, of position / scaling * theta^(-2i/D).

    rope_freqs: (D/2,), divides the frequencies (Llama 3.1 and later). Source: Su et al. 2021,
    "RoFormer", with pairs (i, i + D/2).
    """
    frequencies = _frequencies(config.rope_theta, config.head_dim // 2)
    if rope_freqs is not None:
        with np.errstate(divide="ignore"):
            frequencies /= rope_freqs.astype(np.float64)
    if not np.isfinite(frequencies).all():
        raise CheckpointError(
            "The tensor rope_freqs.weight holds a zero or no number: convert the model again."
        )
    table = np.empty((num_positions, 2, len(frequencies)), np.float32)
    for first in range(0, num_positions, _CHUNK):
        chunk = table[first : first + _CHUNK]
        positions = np.arange(first, first + len(chunk)) / config.rope_scaling_factor
        chunk[:, 0], chunk[:, 1] = cos_sin(positions[:, None] * frequencies)
    return table


def cos_sin(angles: Doubles) -> tuple[Doubles, Doubles]:
    """cos and sin of angles in radians, within 1e-15 for |angle| < 1.6 million.

    Raises CheckpointError beyond that, where the reduction would no longer be exact.
    Cody-Waite reduction to [-pi/4, pi/4], then Taylor polynomials.
    """
    quarters = np.rint(angles * _TWO_OVER_PI)
    if not np.abs(quarters).max(initial=0.0) < _MAX_QUARTERS:
        raise CheckpointError(
            f"The rotary angles reach {np.abs(angles).max():g}: the file's rope.freq_base, "
            "rope.scaling.factor or rope_freqs.weight is not sane; convert the model again."
        )
    r = angles - quarters * _HALF_PI[0]
    r -= quarters * _HALF_PI[1]
    r -= quarters * _HALF_PI[2]
    square = r * r
    sine, cosine = r * _polynomial(square, _SIN_TERMS), _polynomial(square, _COS_TERMS)
    quadrant = quarters.astype(np.int64) & 3
    swapped = quadrant & 1 == 1
    cos = np.where(swapped, sine, cosine)
    sin = np.where(swapped, cosine, sine)
    return (
        np.where((quadrant == 1) | (quadrant == 2), -cos, cos),
        np.where(quadrant >= 2, -sin, sin),
    )


def _frequencies(theta: float, half: int) -> Doubles:
    """(half,) theta^(-i / half), each rounded once from 40 digits."""
    with localcontext() as context:
        context.prec = 40
        base = Decimal(theta)
        return np.array([float(base ** (Decimal(-i) / Decimal(half))) for i in range(half)])


def _polynomial(x: Doubles, terms: tuple[float, ...]) -> Doubles:
    result = np.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        result = result * x + term
    return result
