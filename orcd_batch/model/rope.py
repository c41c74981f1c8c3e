"""The rotary table: cosine and sine of every position and pair, computed once in fp64."""

import numpy as np
from numpy.typing import NDArray

from orcd_batch.checkpoint.model_config import ModelConfig


def rope_table(
    config: ModelConfig, num_positions: int, rope_freqs: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """(num_positions, 2, D/2) fp32: cos, then sin, of position / scaling * theta^(-2i/D).

    rope_freqs: (D/2,), divides the frequencies (Llama 3.1 and later). Source: Su et al. 2021,
    "RoFormer", with pairs (i, i + D/2).
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if rope_freqs is not None:
        frequencies /= rope_freqs.astype(np.float64)
    positions = np.arange(num_positions, dtype=np.float64) / config.rope_scaling_factor
    angles = positions[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
