"""The rotary table, from its definition, and the rotation it drives."""

from dataclasses import replace

import numpy as np
import pytest
from support.fake_ops import CONFIG

from orcd_batch.errors import CheckpointError
from orcd_batch.model import rope_table
from orcd_batch.model.rope import cos_sin


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_the_table_holds_cosine_and_sine_of_each_pairs_angle(scaling: float) -> None:
    config = replace(CONFIG, head_dim=8, rope_theta=500.0, rope_scaling_factor=scaling)
    table = rope_table(config, 20)
    assert table.shape == (20, 2, 4)
    assert table.dtype == np.float32
    for position in (0, 1, 19):
        for pair in range(4):
            angle = position / scaling / 500.0 ** (2 * pair / 8)
            assert table[position, 0, pair] == np.float32(np.cos(angle))
            assert table[position, 1, pair] == np.float32(np.sin(angle))


def test_rope_freqs_divide_the_frequencies() -> None:
    factors = np.array([1, 2, 4, 8], np.float32)
    plain, divided = rope_table(CONFIG, 9), rope_table(CONFIG, 9, factors)
    assert np.array_equal(divided[:, :, 0], plain[:, :, 0])
    assert np.allclose(divided[8, :, 3], plain[1, :, 3])


def test_late_positions_are_as_exact_as_early_ones() -> None:
    table = rope_table(replace(CONFIG, head_dim=4), 100_001)
    assert table[100_000, 0, 0] == np.float32(np.cos(100_000.0))


def test_cosine_and_sine_are_those_of_numpy_to_the_last_bits() -> None:
    angles = np.concatenate(
        [np.linspace(-10, 10, 2001), np.linspace(0, 1.5e6, 20_011), np.arange(1 << 17)]
    )
    cos, sin = cos_sin(angles)
    assert np.abs(cos - np.cos(angles)).max() < 1e-15
    assert np.abs(sin - np.sin(angles)).max() < 1e-15
    assert np.abs(cos * cos + sin * sin - 1).max() < 1e-15


@pytest.mark.parametrize("factor", [0.0, 1e-12, np.nan])
def test_frequencies_that_make_no_sense_are_refused(factor: float) -> None:
    with pytest.raises(CheckpointError, match="rope_freqs"):
        rope_table(CONFIG, 9, np.array([1, 1, 1, factor], np.float32))
