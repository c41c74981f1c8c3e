"""Matrix products: right, and one and the same bits whatever M, tile or algorithm."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# (N, K): odd sizes, then linears of SmolLM2, Qwen2.5-0.5B and Phi-3-mini.
SHAPES = [(1, 8), (7, 24), (33, 40), (100, 1000), (129, 136), (960, 576), (576, 1536)]
REAL_SHAPES = [(1152, 896), (896, 4864), (9216, 3072), (3072, 3072), (3072, 8192)]
ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 128, 129, 300)


def operands(rows: int, n: int, k: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    rng = np.random.default_rng([n, k])
    w = (rng.standard_normal((n, k), np.float32) * 0.05).astype(np.float16)
    return rng.standard_normal((rows, k), np.float32).astype(np.float16), w


def run_linear(ops: Any, x: NDArray[np.float16], weight: Any) -> NDArray[np.float32]:
    (placed,) = ops.staging.place("linear_test_x", [x])
    return ops.to_host(ops.linear(placed, weight))


def run_tile(ops: Any, x: NDArray[np.float16], weight: Any, tile: Any) -> NDArray[np.float32]:
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.gemm_k16 import gemm_k16

    (placed,) = ops.staging.place("linear_test_x", [x])
    y = ops.workspace.take("linear_test_y", (x.shape[0], weight.shape[0]), FP32)
    gemm_k16(ops.kernels, placed, weight, y, tile)
    return ops.to_host(y)


def put_weight(ops: Any, w: NDArray[np.float16]) -> Any:
    (placed,) = ops.staging.place(f"linear_test_w{w.shape}", [w])
    return placed


@pytest.mark.parametrize(("n", "k"), SHAPES + REAL_SHAPES)
def test_every_product_has_the_bits_of_one_row_alone(ops: Any, n: int, k: int) -> None:
    from orcd_batch.backend.cuda.gemm_k16 import TILES

    x, w = operands(max(ROWS), n, k)
    weight = put_weight(ops, w)
    expected = run_tile(ops, x, weight, TILES[0])
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    scale = np.sqrt((x.astype(np.float64) ** 2) @ (w.astype(np.float64) ** 2).T)
    assert np.max(np.abs(expected - exact) / scale) < 2e-6 * np.sqrt(k)
    for tile in TILES[1:]:
        np.testing.assert_array_equal(run_tile(ops, x, weight, tile), expected)
    for rows in ROWS:
        np.testing.assert_array_equal(run_linear(ops, x[:rows], weight), expected[:rows])
    np.testing.assert_array_equal(run_linear(ops, x[9:10], weight), expected[9:10])


def test_nothing_of_split_k_or_algorithm_16_is_in_use(ops: Any) -> None:
    for w_shape in SHAPES[-2:]:
        x, w = operands(4, *w_shape)
        run_linear(ops, x, put_weight(ops, w))
    records = ops.manifest()["linear"]["shapes"]
    algorithms = [record["algorithm"] for record in records.values()]
    assert algorithms
    for algorithm in algorithms:
        assert algorithm == "gemm_k16" or (algorithm["SPLITK_NUM"] <= 1 and algorithm["ID"] != 16)


def test_an_algorithm_that_disagrees_is_dropped(device: Any) -> None:
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.self_test import SelfTest
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    kernels, workspace = Kernels(device), Workspace(device)
    staging = Staging(device, workspace)
    _, w = operands(1, 576, 1536)
    (weight,) = staging.place("w", [w])
    y = workspace.take("y", (4, 576), FP32)
    test = SelfTest(device, kernels, [weight], y)
    best, record = test.choose(_WrongLibrary(), 3, 4)  # type: ignore[arg-type]
    assert best is None
    assert record["algorithm"] == "gemm_k16"
    assert record["candidates"] == 1
    assert record["dropped"] == [{"ID": 1}]
    test.close()
    staging.close()


def test_the_self_test_finds_algorithm_16_by_itself(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import cublas
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.self_test import SelfTest
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    monkeypatch.setattr(cublas, "EXCLUDED_IDS", frozenset())
    kernels, workspace = Kernels(device), Workspace(device)
    staging, library = Staging(device, workspace), cublas.CublasLt(device)
    _, w = operands(1, 896, 4864)
    (weight,) = staging.place("w", [w])
    test = SelfTest(device, kernels, [weight], workspace.take("y", (16, 896), FP32))
    if not [a for a in library.candidates(16, w.shape) if a.config["ID"] == 16]:
        pytest.skip("this cuBLASLt does not offer algorithm 16 for this shape")
    best, _ = test.choose(library, 9, 16)
    assert best is None or best.config["ID"] != 16
    for resource in (test, library, staging):
        resource.close()


class _WrongLibrary:
    """Offers one algorithm that writes nothing and one that refuses."""

    def candidates(self, num_rows: int, weight_shape: tuple[int, int]) -> list[Any]:
        from orcd_batch.backend.cuda.cublas import Algorithm

        return [Algorithm("00", {"ID": 1}), Algorithm("01", {"ID": 2})]

    def run(self, algorithm: Any, x: Any, weight: Any, y: Any) -> None:
        from orcd_batch.errors import DeviceError

        if algorithm.config["ID"] == 2:
            raise DeviceError("not supported")


def test_a_product_of_no_rows_is_empty(ops: Any) -> None:
    _, w = operands(1, 64, 64)
    assert run_linear(ops, np.empty((0, 64), np.float16), put_weight(ops, w)).shape == (0, 64)


def test_a_stored_choice_is_used_again_without_a_test(
    device: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import linear as module
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    monkeypatch.setenv("ORCD_BATCH_CACHE", str(tmp_path))
    kernels, workspace = Kernels(device), Workspace(device)
    staging = Staging(device, workspace)
    x, w = operands(4, 576, 1536)
    placed_x, weight = staging.place("xw", [x, w])
    first = module.Linear(device, kernels, workspace)
    expected = staging.fetch(first(placed_x, weight))
    first_record = first.manifest()["shapes"]
    first.close()

    monkeypatch.setattr(module, "SelfTest", None)
    second = module.Linear(device, kernels, workspace)
    np.testing.assert_array_equal(staging.fetch(second(placed_x, weight)), expected)
    assert second.manifest()["shapes"] == first_record
    second.close()
    staging.close()


def test_a_graph_replays_a_product_with_the_same_bits(ops: Any) -> None:
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.graph import Graph

    x, w = operands(16, 960, 576)
    weight = put_weight(ops, w)
    expected = run_linear(ops, x, weight)
    (placed,) = ops.staging.place("linear_test_x", [x])
    graph = Graph(ops.device, lambda: ops.linear(placed, weight))
    ops.staging.place("linear_960", [np.zeros((16, 960), np.float32)])
    for _ in range(3):
        graph.launch()
    y = ops.workspace.take("linear_960", (16, 960), FP32)
    np.testing.assert_array_equal(ops.to_host(y), expected)
    graph.close()
