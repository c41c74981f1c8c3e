"""Matrix products: right, and one and the same bits whatever M, tile or algorithm."""

from functools import partial
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


def place(ops: Any, x: NDArray[Any], name: str = "x") -> Any:
    (placed,) = ops.staging.place(f"linear_test_{name}", [x])
    return placed


def run_logits(ops: Any, x: NDArray[np.float16], weight: Any) -> NDArray[np.float32]:
    return ops.to_host(ops.logits(place(ops, x), weight))


def run_linear(ops: Any, x: NDArray[np.float16], weight: Any) -> NDArray[np.float32]:
    return ops.to_host(ops.linear(place(ops, x), weight))


def run_add(
    ops: Any, x: NDArray[np.float16], weight: Any, residual: NDArray[np.float32]
) -> NDArray[np.float32]:
    placed = place(ops, residual, "residual")
    ops.linear_add(place(ops, x), weight, placed)
    return ops.to_host(placed)


def run_tile(ops: Any, x: NDArray[np.float16], weight: Any, tile: Any) -> NDArray[np.float32]:
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.gemm_k16 import gemm_k16

    y = ops.workspace.take("linear_test_y", (x.shape[0], weight.shape[0]), FP32)
    gemm_k16(ops.kernels, place(ops, x), weight, y, tile=tile)
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
    rounded = expected.astype(np.float16).astype(np.float32)
    residual = np.random.default_rng(n).standard_normal(expected.shape, np.float32)
    for rows in (slice(0, count) for count in ROWS):
        np.testing.assert_array_equal(run_logits(ops, x[rows], weight), expected[rows])
    for rows in (slice(0, count) for count in (1, 3, 8, 17, 300)):
        np.testing.assert_array_equal(run_linear(ops, x[rows], weight), rounded[rows])
        added = run_add(ops, x[rows], weight, residual[rows])
        np.testing.assert_array_equal(added, expected[rows] + residual[rows])
    np.testing.assert_array_equal(run_logits(ops, x[9:10], weight), expected[9:10])


@pytest.mark.parametrize("output", ["FP32", "FP16", "ADD"])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1000, 320), (33, 64), *REAL_SHAPES, (32064, 576)])
def test_the_product_for_few_rows_has_the_bits_of_gemm_k16(
    ops: Any, n: int, k: int, output: str
) -> None:
    from orcd_batch.backend.cuda.few_rows import MAX_ROWS, few_rows, few_rows_shape
    from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
    from orcd_batch.backend.cuda.product import Output

    kind = Output[output]
    if ops.device.compute_capability < (9, 0):
        pytest.skip("few_rows needs bulk copies, which come with sm_90")
    assert (few_rows_shape(ops.device, (n, k), 1) is None) == (n % 8 != 0)
    assert few_rows_shape(ops.device, (n, k), MAX_ROWS + 1) is None
    x, w = operands(MAX_ROWS, n, k)
    weight = put_weight(ops, w)
    before = np.random.default_rng(k).standard_normal((MAX_ROWS, n), np.float32)
    for rows in range(1, MAX_ROWS + 1):
        layout = few_rows_shape(ops.device, (n, k), rows)
        if layout is None:
            continue
        found = []
        for run in (
            lambda *args, layout=layout: few_rows(ops.kernels, layout, *args, kind),
            lambda *args: gemm_k16(ops.kernels, *args, kind),
        ):
            y = place(ops, before[:rows].astype(kind.dtype), "y")
            run(place(ops, x[:rows]), weight, y)
            found.append(ops.to_host(y))
        np.testing.assert_array_equal(found[0], found[1])


# (F, K): a part of a tile, a tile and a bit, models for tests, SmolLM2, Qwen2.5-0.5B, Phi-3-mini.
GATED_SHAPES = [(72, 64), (136, 200), (256, 128), (1536, 576), (4864, 896), (8192, 3072)]


@pytest.mark.parametrize(("size", "k"), GATED_SHAPES)
def test_every_way_to_gate_has_the_bits_of_gemm_k16_and_swiglu(ops: Any, size: int, k: int) -> None:
    from orcd_batch.backend.cuda.array import FP16
    from orcd_batch.backend.cuda.gated_linear import TILES, gated_linear, swiglu
    from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
    from orcd_batch.backend.cuda.product import Output

    x, w = operands(300, 2 * size, k)
    x[5] = 60_000  # rows 5 and 70 overflow, alone
    x[70, 0] = np.inf
    weight = put_weight(ops, w)
    tiles = TILES if ops.device.compute_capability == (9, 0) else ()
    for rows in (1, 8, 63, 64, 65, 128, 129, 300):
        placed = place(ops, x[:rows])
        gate_up = ops.workspace.take("linear_test_gate_up", (rows, 2 * size), FP16)
        y = ops.workspace.take("linear_test_gated", (rows, size), FP16)
        gemm_k16(ops.kernels, placed, weight, gate_up, Output.FP16)
        swiglu(ops.kernels, gate_up, y)
        expected = ops.staging.fetch(y).view(np.uint16)
        assert np.isfinite(expected[: min(rows, 5)].view(np.float16)).all()
        for tile in tiles:
            ops.device.fill(y.ptr, y.nbytes, 0xFE)
            gated_linear(ops.kernels, tile, placed, weight, y)
            np.testing.assert_array_equal(ops.staging.fetch(y).view(np.uint16), expected)
        chosen = ops.staging.fetch(ops.gated_linear(placed, weight))
        np.testing.assert_array_equal(chosen.view(np.uint16), expected)


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_an_output_beyond_fp16_is_infinite_and_its_neighbours_are_not(ops: Any, rows: int) -> None:
    x, w = operands(rows, 576, 1536)
    w[5], w[6] = 60_000, -60_000
    x[:] = np.abs(x)
    y = run_linear(ops, x, put_weight(ops, w))
    assert (y[:, 5] == np.inf).all()
    assert (y[:, 6] == -np.inf).all()
    assert np.isfinite(np.delete(y, [5, 6], axis=1)).all()


def test_nothing_of_split_k_or_algorithm_16_is_in_use(ops: Any) -> None:
    for w_shape in SHAPES[-2:]:
        x, w = operands(4, *w_shape)
        run_linear(ops, x, put_weight(ops, w))
        ops.gated_linear(place(ops, x), put_weight(ops, w))
    records = ops.manifest()["linear"]["shapes"]
    algorithms = [record["algorithm"] for record in records.values()]
    assert algorithms
    for algorithm in algorithms:
        if isinstance(algorithm, str):
            assert algorithm.split()[0] in ("gemm_k16", "few_rows", "gated_linear_sm90a")
        else:
            assert algorithm["SPLITK_NUM"] <= 1
            assert algorithm["ID"] != 16


@pytest.mark.parametrize("output", ["FP32", "FP16", "ADD"])
def test_a_product_that_disagrees_is_dropped(device: Any, output: str) -> None:
    from orcd_batch.backend.cuda.product import Output
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.self_test import Candidate, SelfTest
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace
    from orcd_batch.errors import DeviceError

    def refuse(*_: Any) -> None:
        raise DeviceError("not supported")

    kind = Output[output]
    kernels, workspace = Kernels(device), Workspace(device)
    staging = Staging(device, workspace)
    _, w = operands(1, 576, 1536)
    (weight,) = staging.place("w", [w])
    y = workspace.take("y", (4, 576), kind.dtype)
    test = SelfTest(device, kernels, [weight], y, kind)
    wrong = [Candidate("00", {"ID": 1}, lambda *_: None), Candidate("01", {"ID": 2}, refuse)]
    best, record = test.choose(wrong, 3, 4)
    assert best is None
    assert record["algorithm"] == "gemm_k16"
    assert record["candidates"] == 1
    assert record["dropped"] == [{"ID": 1}]
    best, record = test.choose([*wrong, Candidate("02", {"ID": 3}, test.reference)], 3, 4)
    assert best is not None
    assert best.code == "02"
    assert record["equal_to_gemm_k16"] == 1
    test.close()
    staging.close()


def test_an_activation_of_what_was_there_before_is_dropped(device: Any) -> None:
    """Its product leaves nothing: what lies between is not the reference's from before."""
    from orcd_batch.backend.cuda.array import FP16
    from orcd_batch.backend.cuda.candidates import Candidates
    from orcd_batch.backend.cuda.product import Output, buffer_name
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.self_test import Candidate, SelfTest
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    kernels, workspace = Kernels(device), Workspace(device)
    staging = Staging(device, workspace)
    _, w = operands(1, 576, 1536)
    (weight,) = staging.place("w", [w])
    ways = Candidates(device, kernels, workspace)
    between = workspace.take(buffer_name(576, Output.FP16), (4, 576), FP16)
    y = workspace.take("y", (4, 288), FP16)
    reference = ways.reference(Output.GATED)
    test = SelfTest(device, kernels, [weight], y, Output.GATED, reference, between)
    idle = ways.gated(Candidate("00", {"ID": 1}, lambda *_: None))
    best, record = test.choose([idle, Candidate("01", {"ID": 2}, reference)], 3, 4)
    assert best is not None
    assert best.code == "01"
    assert record["dropped"] == [{"ID": 1}]
    test.close()
    ways.close()
    staging.close()


def test_a_large_product_is_chosen_by_its_time_when_it_lasts(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import self_test
    from orcd_batch.backend.cuda.product import Output
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    for name, value in {"_LASTING_ROWS": 64, "_LASTING_FLOPS": 0, "_NEAR": 100}.items():
        monkeypatch.setattr(self_test, name, value)
    kernels, workspace = Kernels(device), Workspace(device)
    staging = Staging(device, workspace)
    _, w = operands(1, 960, 576)
    (weight,) = staging.place("w", [w])
    y = workspace.take("y", (256, 960), Output.FP16.dtype)
    test = self_test.SelfTest(device, kernels, [weight], y, Output.FP16)

    def thrice(*args: Any) -> None:
        for _ in range(3):
            test.reference(*args)

    asked: list[list[str]] = []
    lasting_times = test.lasting_times

    def remembering(candidates: Any, num_rows: int) -> list[float]:
        asked.append([candidate.code for candidate in candidates])
        return lasting_times(candidates, num_rows)

    monkeypatch.setattr(test, "lasting_times", remembering)
    slow, fast = (
        self_test.Candidate("slow", {}, thrice),
        self_test.Candidate("fast", {}, test.reference),
    )
    for num_rows in (32, 256):
        best, _ = test.choose([slow, fast], num_rows, num_rows)
        assert best is fast
    assert asked == [["fast", "slow"]]
    test.close()
    staging.close()


def test_the_self_test_finds_algorithm_16_by_itself(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import cublas
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.product import Output
    from orcd_batch.backend.cuda.program import Kernels
    from orcd_batch.backend.cuda.self_test import Candidate, SelfTest
    from orcd_batch.backend.cuda.staging import Staging
    from orcd_batch.backend.cuda.workspace import Workspace

    monkeypatch.setattr(cublas, "EXCLUDED_IDS", frozenset())
    kernels, workspace = Kernels(device), Workspace(device)
    staging, library = Staging(device, workspace), cublas.CublasLt(device)
    _, w = operands(1, 896, 4864)
    (weight,) = staging.place("w", [w])
    test = SelfTest(device, kernels, [weight], workspace.take("y", (16, 896), FP32))
    candidates = [
        Candidate(a.code, a.config, partial(library.run, a))
        for a in library.candidates(16, w.shape, Output.FP32)
    ]
    if not [candidate for candidate in candidates if candidate.config["ID"] == 16]:
        pytest.skip("this cuBLASLt does not offer algorithm 16 for this shape")
    best, _ = test.choose(candidates, 9, 16)
    assert best is None or best.config["ID"] != 16
    for resource in (test, library, staging):
        resource.close()


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
    from orcd_batch.backend.cuda.array import FP16
    from orcd_batch.backend.cuda.graph import Graph

    x, w = operands(16, 960, 576)
    weight = put_weight(ops, w)
    expected = run_linear(ops, x, weight)
    (placed,) = ops.staging.place("linear_test_x", [x])
    graph = Graph(ops.device, lambda: ops.linear(placed, weight))
    ops.staging.place("linear_960_fp16", [np.zeros((16, 960), np.float16)])
    for _ in range(3):
        graph.launch()
    y = ops.workspace.take("linear_960_fp16", (16, 960), FP16)
    np.testing.assert_array_equal(ops.to_host(y), expected)
    graph.close()
