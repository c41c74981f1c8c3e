"""Prompts computed once and read once: the bits of those who share are those of one alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.attention_problem import AttentionProblem, shared_problem
from support.cache_contents import contents, fill
from support.gguf_factory import write_model

from orcd_batch import SamplingParams
from orcd_batch.backend.cuda import attention as layout
from orcd_batch.backend.cuda.placed_batch import place_batch
from orcd_batch.backend.cuda.shared_splits import SharedSplitFinder, SharedSplits
from orcd_batch.backend.ops import BLOCK_SIZE, KVCache
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine import Request
from orcd_batch.engine_factory import BuiltEngine, OpenModel, build_engine, choose_engine

Bits = NDArray[np.uint32]
HEADS = [(3, 3, 96), (14, 2, 64), (9, 3, 64), (8, 2, 128), (24, 1, 64), (4, 2, 32), (2, 2, 112)]
GROUP_SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 40)


def put(ops: Any, name: str, array: NDArray[Any]) -> Any:
    (placed,) = ops.staging.place(f"shared_{name}", [array])
    return placed


def poison(ops: Any) -> None:
    """NaN wherever attention leaves something."""
    from cuda.bindings import driver

    from orcd_batch.backend.cuda.driver import call

    for name in ("attention", "attention_partials"):
        held = ops.workspace._buffers.get(name)
        if held is not None:
            stream = ops.device.stream.handle
            call(driver.cuMemsetD8Async(held.ptr, 0xFF, held.num_bytes, stream))


def attend(ops: Any, problem: AttentionProblem, window: int, *, grouped: bool) -> Bits:
    cache = KVCache(put(ops, "keys", problem.keys), put(ops, "values", problem.values))
    q = put(ops, "q", problem.q)
    shared = SharedSplits.none(*problem.batch.block_tables.shape)
    if grouped:
        shared = SharedSplitFinder().find(problem.batch)
        assert not shared.is_empty
    batch = place_batch(ops.staging, problem.batch, shared)
    ops.attention(q, cache, batch, window)
    poison(ops)
    out = ops.to_host(ops.attention(q, cache, batch, window))
    assert not np.isnan(out).any()
    return np.ascontiguousarray(out).view(np.uint32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [0, 100, 300, 700])
def test_a_shared_split_gives_the_bits_it_gives_alone(
    ops: Any, num_heads: int, num_kv_heads: int, head_dim: int, window: int
) -> None:
    rng = np.random.default_rng(window)
    groups = []
    for size in GROUP_SIZES:
        shared = int(rng.integers(3, 14))
        least = shared * BLOCK_SIZE
        groups.append((shared, (least + rng.integers(0, 400, size)).tolist()))
    groups.append((4, [256, 256, 257, 300]))
    groups.append((8, [512, 513, 600]))
    problem = shared_problem(num_heads, num_kv_heads, head_dim, groups, seed=window)
    alone = attend(ops, problem, window, grouped=False)
    np.testing.assert_array_equal(attend(ops, problem, window, grouped=True), alone)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_shared_splits_have_their_bits_without_wgmma(
    ops: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [(8, [600] * 19), (5, [900, 320, 512]), (4, [256] * 2)]
    problem = shared_problem(num_heads, num_kv_heads, head_dim, groups)
    usual = attend(ops, problem, 300, grouped=True)
    monkeypatch.setattr(layout, "USE_WGMMA", False)
    np.testing.assert_array_equal(attend(ops, problem, 300, grouped=True), usual)


def test_a_split_shared_by_all_and_another_by_some(ops: Any) -> None:
    contexts = [1100 + 3 * i for i in range(40)]
    problem = shared_problem(8, 2, 64, [(4, contexts)])
    tables = problem.batch.block_tables
    for first in range(0, 40, 5):
        tables[first : first + 5, :16] = tables[first, :16]
    alone = attend(ops, problem, 0, grouped=False)
    np.testing.assert_array_equal(attend(ops, problem, 0, grouped=True), alone)


@pytest.mark.parametrize(("warps", "stages", "sm_count"), [(1, 1, 132), (2, 3, 3), (12, 1, 1)])
def test_grouping_does_not_depend_on_how_it_is_laid_out(
    ops: Any, monkeypatch: pytest.MonkeyPatch, warps: int, stages: int, sm_count: int
) -> None:
    problem = shared_problem(14, 2, 64, [(8, [600] * 19), (5, [900] * 3)])
    alone = attend(ops, problem, 0, grouped=False)
    monkeypatch.setattr(layout, "MAX_DECODE_WARPS", warps)
    monkeypatch.setattr(layout, "FEW_DECODE_STAGES", stages)
    monkeypatch.setattr(ops.device, "sm_count", sm_count)
    np.testing.assert_array_equal(attend(ops, problem, 0, grouped=True), alone)


def test_the_beginnings_of_blocks_are_copied_in_every_layer(device: Any) -> None:
    from orcd_batch.backend.cuda.ops import CudaOps

    ops = CudaOps()
    try:
        rng = np.random.default_rng(0)
        caches = ops.allocate_kv_cache(3, 9, 2, 64)
        before = rng.integers(0, 1 << 16, (3, 2, 9, 2, BLOCK_SIZE, 64)).astype(np.uint16)
        fill(ops, caches, before)
        copies = np.array([[0, 5, 63], [0, 7, 1], [3, 2, 33], [8, 6, 64]], np.int32)
        ops.copy_blocks(caches, copies)
        for source, target, count in copies.tolist():
            before[:, :, target, :, :count] = before[:, :, source, :, :count]
        np.testing.assert_array_equal(contents(ops, caches), before)
    finally:
        ops.close()


MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 384, "num_heads": 4, "num_kv_heads": 4, "tensor_type": "F16"},
    "qwen2": {"hidden_size": 896, "num_heads": 14, "num_kv_heads": 2, "tensor_type": "F16"},
}


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shared") / f"{request.param}.gguf"
    facts = MODELS[request.param]
    write_model(
        target, request.param, num_layers=2, intermediate_size=512, context_length=1024, **facts
    )
    return target


def build(path: Path, **options: Any) -> BuiltEngine:
    with GGUFFile.open(path) as gguf:
        model = OpenModel(gguf, read_model_config(gguf))
        return build_engine(model, EngineOptions(kind="cuda", **options), choose_engine("cuda"))


def requests() -> list[Request]:
    """Samples of five prompts, with and without an end, and one long beginning in common."""
    rng = np.random.default_rng(1)
    common = rng.integers(5, 200, 300)
    found = []
    for row, length in enumerate((3, 64, 256, 290, 340)):
        prompt = np.concatenate([common if row > 2 else [], rng.integers(5, 200, length)])
        ids = tuple(int(i) for i in prompt)
        for sample in range(9):
            params = SamplingParams(max_tokens=12 + row, temperature=1.0, seed=3, ignore_eos=True)
            found.append(Request((row, sample), ids, params, stream=100 * row + sample))
    return found


def run(engine: Any, todo: list[Request]) -> dict[object, tuple[list[int], list[int]]]:
    done: dict[object, tuple[list[int], list[int]]] = {}
    for request in todo:
        engine.add(request)
    while engine.has_unfinished:
        for completion in engine.step():
            assert completion.error is None
            done[completion.key] = (completion.token_ids, completion.fingerprints)
    return done


def test_samples_have_the_bits_they_have_alone(path: Path) -> None:
    todo = requests()
    with build(path, max_num_seqs=1, prefix_caching=False) as built:
        alone = run(built.engine, todo)
    for options in (
        {"max_num_seqs": 64},
        {"max_num_seqs": 7},
        {"max_num_seqs": 64, "graphs": False},
    ):
        with build(path, **options) as built:
            shuffled = [todo[i] for i in np.random.default_rng(2).permutation(len(todo))]
            assert run(built.engine, shuffled) == alone
            if options["max_num_seqs"] == 64:
                distinct = {request.prompt_token_ids for request in todo}
                prefilled = built.engine.statistics()["prefill_tokens"]
                assert prefilled <= sum(map(len, distinct)) + len(todo)


def test_grouping_can_be_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [replace(request, stream=7) for request in requests()]
    with build(path, max_num_seqs=64) as built:
        grouped = run(built.engine, todo)
    monkeypatch.setattr(
        SharedSplitFinder,
        "find",
        lambda self, batch: SharedSplits.none(*batch.block_tables.shape),
    )
    with build(path, max_num_seqs=64) as built:
        assert run(built.engine, todo) == grouped
