"""How the product for few rows is laid out on a card, decided without one."""

from types import SimpleNamespace
from typing import Any

import pytest

from orcd_batch.backend.cuda.few_rows import MAX_ROWS, MAX_WARPS, few_rows_shape

# Linears of Phi-3-mini, Qwen2.5-0.5B and SmolLM2: (N, K).
PHI3 = [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192), (32064, 3072)]
SMALL = [(1152, 896), (896, 4864), (151936, 896), (960, 576), (576, 1536)]


def card(capability: tuple[int, int] = (9, 0), shared_memory: int = 227 << 10) -> Any:
    return SimpleNamespace(
        sm_count=132, max_shared_memory=shared_memory, compute_capability=capability
    )


@pytest.mark.parametrize("shared_memory", [99 << 10, 227 << 10])
@pytest.mark.parametrize("shape", PHI3 + SMALL)
def test_a_layout_covers_every_tile_and_fits_shared_memory(
    shape: tuple[int, int], shared_memory: int
) -> None:
    n, k = shape
    for rows in range(1, MAX_ROWS + 1):
        layout = few_rows_shape(card(shared_memory=shared_memory), shape, rows)
        if layout is None:
            assert shared_memory < 227 << 10
            continue
        chains = layout.grid * layout.num_warps
        rounds = -(-(n // 8) // chains)
        assert chains * rounds >= n // 8
        assert layout.grid <= 132
        assert layout.num_warps <= MAX_WARPS
        assert 1 <= layout.num_producers <= layout.num_warps
        assert layout.num_stages >= min(2, -(-k // 256))
        ring = layout.num_warps * layout.num_stages * (8 * (512 + 16) + 16)
        assert 32 + ring + rows * (2 * k + 16) <= layout.shared_bytes <= shared_memory


@pytest.mark.parametrize("shape", PHI3[:4])
def test_a_layers_products_are_balanced_within_four_percent(shape: tuple[int, int]) -> None:
    layout = few_rows_shape(card(), shape, 1)
    assert layout is not None
    assert shape[0] // 8 / (layout.num_warps * 132) > 0.96


def test_what_the_kernel_cannot_do_has_no_layout() -> None:
    assert few_rows_shape(card(), (3072, 3072), MAX_ROWS + 1) is None
    assert few_rows_shape(card(), (3073, 3072), 1) is None
    assert few_rows_shape(card(), (3072, 3080), 1) is None
    assert few_rows_shape(card((8, 9)), (3072, 3072), 1) is None
