"""Linear products: right, and the same bits for a row whatever is computed beside it."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_batch.backend import numpy_linear
from orcd_batch.backend.blas_limit import BlasLimit
from orcd_batch.backend.numpy_linear import PanelWeight, Plan, TileShape, choose_plan, linear
from orcd_batch.backend.numpy_threads import Workers

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def blas_kernel() -> Iterator[str]:
    limit = BlasLimit()
    yield limit.kernel
    limit.release()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight_of(rows: Floats, plan: Plan) -> PanelWeight:
    padding = -len(rows) % plan.tile.panel_rows
    padded = np.concatenate([rows, np.zeros((padding, rows.shape[1]), np.float32)])
    return PanelWeight(padded, len(rows), plan)


@pytest.mark.parametrize(("n", "k"), [(100, 64), (96, 576), (70, 1000), (300, 2000), (33, 3072)])
def test_a_row_has_the_same_bits_in_every_batch_and_thread_count(
    blas_kernel: str, n: int, k: int
) -> None:
    weight = weight_of(normal(n, k), choose_plan(k, blas_kernel))
    x = normal(200, k, seed=1)
    alone = Workers(1)
    expected = np.concatenate([linear(x[i : i + 1], weight, alone) for i in range(len(x))])
    for num_threads in (1, 2, 3):
        workers = Workers(num_threads)
        for num_rows in (2, 15, 16, 17, 33, 64, 65, 150, 200):
            got = linear(x[-num_rows:], weight, workers)
            assert np.array_equal(got, expected[-num_rows:]), (num_threads, num_rows)
        workers.close()


@pytest.mark.parametrize("kernel", ["SkylakeX", "Haswell", ""])
@pytest.mark.parametrize(("n", "k"), [(100, 64), (300, 2000)])
def test_products_are_those_of_double_precision(kernel: str, n: int, k: int) -> None:
    rows, x = normal(n, k), normal(150, k, seed=1)
    got = linear(x, weight_of(rows, choose_plan(k, kernel)), Workers(1))
    exact = x.astype(np.float64) @ rows.T.astype(np.float64)
    assert np.abs(got - exact).max() < 1e-5 * k**0.5 * 10


def test_a_neighbour_full_of_nan_leaves_a_row_alone(blas_kernel: str) -> None:
    weight = weight_of(normal(64, 128), choose_plan(128, blas_kernel))
    x = normal(40, 128, seed=2)
    expected = linear(x, weight, Workers(1))
    x[7], x[39] = np.nan, np.inf
    got = linear(x, weight, Workers(1))
    others = np.delete(np.arange(40), [7, 39])
    assert np.array_equal(got[others], expected[others])


def test_where_bits_depend_on_the_place_in_the_tile_one_row_at_a_time_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = numpy_linear.multiply

    def partial(x: Floats, rows: Floats, shape: TileShape) -> Floats:
        out = honest(x, rows, shape)
        if shape.tile_rows > 1:
            out[shape.tile_rows - 1 :: shape.tile_rows] += np.float32(1e-3)
        return out

    monkeypatch.setattr(numpy_linear, "multiply", partial)
    plan = choose_plan(64, "SkylakeX")
    assert plan.tile.tile_rows == 1
    assert plan.bulk is None
    rows, x = normal(40, 64), normal(5, 64, seed=1)
    got = linear(x, weight_of(rows, plan), Workers(1))
    assert np.allclose(got, x @ rows.T, atol=1e-4)


def test_a_large_tile_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = numpy_linear.multiply

    def other(x: Floats, rows: Floats, shape: TileShape) -> Floats:
        out = honest(x, rows, shape)
        return np.nextafter(out, np.float32(0)) if shape.tile_rows > 16 else out

    monkeypatch.setattr(numpy_linear, "multiply", other)
    plan = choose_plan(64, "SkylakeX")
    assert (plan.tile.tile_rows, plan.bulk) == (16, None)


def test_no_rows_give_no_rows(blas_kernel: str) -> None:
    weight = weight_of(normal(64, 128), choose_plan(128, blas_kernel))
    assert linear(np.zeros((0, 128), np.float32), weight, Workers(1)).shape == (0, 64)
