"""How gate and up with their activation are laid out on a card, decided without one."""

from types import SimpleNamespace
from typing import Any

import pytest

from orcd_batch.backend.cuda.gated_linear import TILES, GatedTile, gated_tiles

# (N, K) of Phi-3-mini, Qwen2.5-0.5B and SmolLM2.
SHAPES = [(16384, 3072), (9728, 896), (3072, 576)]


def card(capability: tuple[int, int] = (9, 0)) -> Any:
    return SimpleNamespace(compute_capability=capability)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.code)
def test_a_tile_fits_hoppers_shared_memory_and_registers(tile: GatedTile) -> None:
    assert tile.shared_bytes <= 227 << 10
    assert tile.stages * (tile.rows + 2 * tile.columns) * 128 < tile.shared_bytes
    accumulators = tile.columns // 2
    packed = tile.columns // 4
    assert accumulators + packed + 40 <= 240
    assert tile.threads == (tile.row_groups + 1) * 128


def test_a_stored_choice_finds_its_tile_again() -> None:
    assert len({tile.code for tile in TILES}) == len(TILES)
    assert all(tile.code.startswith("gated_linear_sm90a ") for tile in TILES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 8, 64, 65, 128, 129, 512, 8192])
def test_few_rows_are_not_spread_over_tiles_twice_as_high(
    shape: tuple[int, int], num_rows: int
) -> None:
    tiles = gated_tiles(card(), shape, num_rows)
    assert tiles
    smallest = min(tile.rows for tile in TILES)
    assert all(t.rows * t.cluster < 2 * max(num_rows, smallest) for t in tiles)


def test_what_the_kernel_cannot_do_has_no_tile() -> None:
    assert gated_tiles(card((8, 9)), SHAPES[0], 512) == ()
    assert gated_tiles(card((10, 0)), SHAPES[0], 512) == ()
    assert gated_tiles(card(), (112, 3072), 512) == ()
    assert gated_tiles(card(), (256, 32), 512) == ()
    assert gated_tiles(card(), (264, 3072), 512) == ()
    assert gated_tiles(card(), (272, 3072), 512)
