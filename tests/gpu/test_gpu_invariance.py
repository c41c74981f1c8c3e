"""A row's bits depend on nothing but the row: not on its neighbours, its place, or how it runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.attention_problem import AttentionProblem, attention_problem

from orcd_batch.backend.ops import Batch, KVCache, SampleBatch

Bits = NDArray[np.uint32]

HEADS = [(32, 32, 96), (14, 2, 64), (9, 3, 64), (32, 8, 128), (24, 1, 64), (4, 2, 32)]


def put(ops: Any, name: str, array: NDArray[Any]) -> Any:
    (placed,) = ops.staging.place(f"invariance_{name}", [array])
    return placed


def bits(ops: Any, x: Any) -> Bits:
    """The values as bit patterns, so that zeros of different sign differ."""
    return np.ascontiguousarray(ops.to_host(x)).view(np.uint32)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gated_linear(ops: Any, x: NDArray[np.float16]) -> Any:
    weight = (normal(3, 144, x.shape[1]) * 0.1).astype(np.float16)
    return ops.gated_linear(put(ops, "x16", x), put(ops, "gate_up", weight))


ROW_OPS = {
    "rms_norm": lambda ops, x, w: ops.rms_norm(x, w, 1e-5),
    "gated_linear": lambda ops, x, w: gated_linear(ops, ops.to_host(x).astype(np.float16)),
}


@pytest.mark.parametrize("name", ROW_OPS)
@pytest.mark.parametrize("hidden", [64, 896, 3072])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(ops: Any, name: str, hidden: int) -> None:
    x, weight = normal(1, 200, hidden), put(ops, "weight", normal(2, hidden))
    run = ROW_OPS[name]
    whole = bits(ops, run(ops, put(ops, "x", x), weight))
    for rows in (slice(0, 1), slice(77, 78), slice(13, 150), slice(199, 200)):
        part = bits(ops, run(ops, put(ops, "x", x[rows]), weight))
        np.testing.assert_array_equal(part, whole[rows])


def attend(ops: Any, problem: AttentionProblem, window: int = 0) -> Bits:
    cache = KVCache(put(ops, "keys", problem.keys), put(ops, "values", problem.values))
    out = ops.attention(put(ops, "q", problem.q), cache, ops.place(problem.batch), window)
    return bits(ops, out)


def as_chunk(problem: AttentionProblem, first: int, count: int) -> AttentionProblem:
    """Of a prompt's step, the step that prefills `count` tokens from `first` on."""
    batch = replace(
        problem.batch,
        query_start=np.array([0, count], np.int32),
        context_lens=np.array([first + count], np.int32),
        positions=problem.batch.positions[first : first + count],
    )
    return replace(problem, q=problem.q[first : first + count], batch=batch)


def as_decodes(problem: AttentionProblem, positions: NDArray[np.int64]) -> AttentionProblem:
    """The same rows as decode steps: one sequence of one query for each position."""
    batch = Batch(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=np.zeros(len(positions), np.int32),
        query_start=np.arange(len(positions) + 1, dtype=np.int32),
        context_lens=(positions + 1).astype(np.int32),
        block_tables=np.repeat(problem.batch.block_tables, len(positions), axis=0),
        logits_rows=np.zeros(0, np.int32),
    )
    return replace(problem, q=problem.q[positions], batch=batch)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [0, 100, 300])
def test_prefill_and_decode_give_the_same_bits_for_every_position(
    ops: Any, num_heads: int, num_kv_heads: int, head_dim: int, window: int
) -> None:
    length = 830
    problem = attention_problem(num_heads, num_kv_heads, head_dim, [(length, length)])
    whole = attend(ops, problem, window)
    positions = np.arange(length)
    np.testing.assert_array_equal(attend(ops, as_decodes(problem, positions), window), whole)
    for size in (2, 37, 64, 512):
        for first in range(0, length, size if size > 30 else 191):
            count = min(size, length - first)
            part = attend(ops, as_chunk(problem, first, count), window)
            np.testing.assert_array_equal(part, whole[first : first + count])


def test_zeros_have_one_pattern_however_a_row_is_run(ops: Any) -> None:
    problem = attention_problem(4, 2, 64, [(600, 600)], scale=20.0)
    problem.values[...] = np.where(np.isfinite(problem.values), -1e-7, problem.values)
    whole = attend(ops, problem)
    np.testing.assert_array_equal(attend(ops, as_decodes(problem, np.arange(600))), whole)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS[:4])
def test_attention_does_not_depend_on_the_other_sequences_or_their_order(
    ops: Any, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    sequences = [(700, 1), (3, 3), (64, 1), (300, 40), (1, 1), (1500, 1), (129, 129), (256, 1)]
    problem = attention_problem(num_heads, num_kv_heads, head_dim, sequences)
    whole = attend(ops, problem)
    start = problem.batch.query_start
    for chosen in ([s] for s in range(len(sequences))):
        rows = slice(start[chosen[0]], start[chosen[0] + 1])
        np.testing.assert_array_equal(attend(ops, problem.take(chosen)), whole[rows])
    order = [6, 2, 7, 0, 5, 1, 4, 3]
    rows = np.concatenate([np.arange(start[s], start[s + 1]) for s in order])
    np.testing.assert_array_equal(attend(ops, problem.take(order)), whole[rows])


@pytest.mark.parametrize(("warps", "stages", "sm_count"), [(1, 2, 132), (2, 3, 5), (4, 3, 1)])
def test_attention_does_not_depend_on_how_it_is_laid_out(
    ops: Any, monkeypatch: pytest.MonkeyPatch, warps: int, stages: int, sm_count: int
) -> None:
    from orcd_batch.backend.cuda import attention as layout

    problem = attention_problem(14, 2, 64, [(900, 1), (400, 400), (65, 1), (2000, 1)])
    whole = attend(ops, problem)
    monkeypatch.setattr(layout, "USE_WGMMA", False)
    monkeypatch.setattr(layout, "MAX_DECODE_WARPS", warps)
    monkeypatch.setattr(layout, "DECODE_STAGES", stages)
    monkeypatch.setattr(layout, "FEW_DECODE_STAGES", stages)
    monkeypatch.setattr(layout, "PREFILL_WARPS", warps)
    monkeypatch.setattr(layout, "PREFILL_STAGES", stages)
    monkeypatch.setattr(ops.device, "sm_count", sm_count)
    np.testing.assert_array_equal(attend(ops, problem), whole)


def test_attention_does_not_depend_on_the_row_tiles_of_a_warp(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import attention as layout

    problem = attention_problem(9, 3, 64, [(500, 500), (70, 2)])
    whole = attend(ops, problem)
    monkeypatch.setattr(layout, "USE_WGMMA", False)
    monkeypatch.setattr(layout, "PREFILL_ROW_TILES", 2)
    np.testing.assert_array_equal(attend(ops, problem), whole)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [*HEADS, (2, 2, 112), (3, 3, 16)]
)
@pytest.mark.parametrize("window", [0, 1, 65, 300])
def test_prefill_with_wgmma_gives_the_bits_of_the_generic_kernel(
    ops: Any,
    monkeypatch: pytest.MonkeyPatch,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
) -> None:
    from orcd_batch.backend.cuda import attention as layout

    if ops.device.compute_capability != (9, 0):
        pytest.skip("wgmma is Hopper's")
    sequences = [(1, 1), (2, 2), (65, 65), (300, 1), (513, 2), (200, 7), (130, 130), (1500, 777)]
    problem = attention_problem(num_heads, num_kv_heads, head_dim, sequences)
    monkeypatch.setattr(layout, "USE_WGMMA", False)
    generic = attend(ops, problem, window)
    monkeypatch.setattr(layout, "USE_WGMMA", True)
    for _ in range(3):
        np.testing.assert_array_equal(attend(ops, problem, window), generic)


def test_attention_repeats_itself(ops: Any) -> None:
    problem = attention_problem(9, 3, 64, [(3000, 1), (800, 30), (257, 1)])
    whole = attend(ops, problem)
    for _ in range(10):
        np.testing.assert_array_equal(attend(ops, problem), whole)


def test_a_captured_graph_replays_the_same_bits(ops: Any) -> None:
    from orcd_batch.backend.cuda.graph import Graph

    problem = attention_problem(9, 3, 64, [(700, 1), (65, 1), (300, 1)])
    cache = KVCache(put(ops, "keys", problem.keys), put(ops, "values", problem.values))
    q, batch = put(ops, "q", problem.q), ops.place(problem.batch)
    weight = put(ops, "weight", normal(3, 9 * 64))
    x = put(ops, "x", normal(4, 3, 9 * 64))

    def step() -> tuple[Any, Any]:
        return ops.attention(q, cache, batch, 0), ops.rms_norm(x, weight, 1e-5)

    expected = [bits(ops, out) for out in step()]
    outs: list[Any] = []
    graph = Graph(ops.device, lambda: outs.extend(step()))
    try:
        for _ in range(3):
            for out in outs:
                poison = np.full(out.shape, np.nan, out.dtype)
                (poisoned,) = ops.staging.place("invariance_poison", [poison])
                copy(ops, out, poisoned)
            graph.launch()
            for out, known in zip(outs, expected, strict=True):
                np.testing.assert_array_equal(bits(ops, out), known)
    finally:
        graph.close()


def copy(ops: Any, target: Any, source: Any) -> None:
    from cuda.bindings import driver

    from orcd_batch.backend.cuda.driver import call

    handle = ops.device.stream.handle
    call(driver.cuMemcpyDtoDAsync(target.ptr, source.ptr, target.nbytes, handle))


def test_sampling_does_not_depend_on_the_other_rows_or_their_order(ops: Any) -> None:
    num_rows, vocab_size = 30, 32064
    rng = np.random.default_rng(5)
    logits = normal(6, num_rows, vocab_size) * np.float32(4.0)
    batch = SampleBatch(
        temperature=rng.choice([0.0, 0.8, 1.3], num_rows).astype(np.float32),
        top_k=rng.choice([0, 50], num_rows).astype(np.int32),
        top_p=rng.choice([1.0, 0.9], num_rows).astype(np.float32),
        min_p=rng.choice([0.0, 0.02], num_rows).astype(np.float32),
        repetition_penalty=np.ones(num_rows, np.float32),
        seed=rng.integers(0, 2**64, num_rows, np.uint64),
        stream=rng.integers(0, 2**64, num_rows, np.uint64),
        position=rng.integers(0, 2**32, num_rows, np.uint32),
        seen_ids=np.zeros(0, np.int32),
        seen_start=np.zeros(num_rows + 1, np.int32),
    )

    def run(rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        columns = {
            name: getattr(batch, name)[rows]
            for name in batch.__slots__
            if not name.startswith("seen")
        }
        part = replace(batch, **columns, seen_start=np.zeros(len(rows) + 1, np.int32))
        placed = ops.sampling.place(part)
        sampled = ops.sampling.fetch(ops.sample(put(ops, "logits", logits[rows]), placed))
        return [getattr(sampled, name) for name in sampled.__slots__]

    whole = run(np.arange(num_rows))
    for rows in (rng.permutation(num_rows), np.array([17]), np.arange(5, 9)):
        for part, column in zip(run(rows), whole, strict=True):
            np.testing.assert_array_equal(part.view(np.uint8), column[rows].view(np.uint8))
