"""Frequency divisors of Llama 3.1's rope scaling, as its converter writes them."""

import numpy as np
from numpy.typing import NDArray


def llama3_rope_freqs(
    head_dim: int,
    rope_theta: float,
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_context_length: int = 8192,
) -> NDArray[np.float32]:
    """The (head_dim / 2,) divisors that Llama 3.1's converter writes as `rope_freqs.weight`.

    Wavelengths beyond original / low are divided by factor, those under original / high are left
    alone, and in between the two are blended (Llama 3.1's "llama3" rope scaling).
    """
    wavelength = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_context_length / wavelength
    blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = 1 / ((1 - blend) / factor + blend)
    freqs = np.where(turns < low_freq_factor, factor, blended)
    return np.where(turns > high_freq_factor, 1.0, freqs).astype(np.float32)
