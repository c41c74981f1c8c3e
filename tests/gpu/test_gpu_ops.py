"""Every op on the GPU against its numpy twin, in the order of the ops protocol."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.attention_problem import AttentionProblem, attention_problem

from orcd_batch.backend.numpy_ops import NumpyOps, swiglu
from orcd_batch.backend.numpy_sampler import sample_row
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, KVCache, SampleBatch, Sampled, TensorPart
from orcd_batch.errors import DeviceError

Floats = NDArray[np.float32]

HIDDEN_SIZES = (8, 40, 64, 576, 896, 3072, 4104)
# (H, Hkv, D): Phi-3, Qwen2.5-0.5B, SmolLM2, Llama-3, then odd ones; groups of 1, 7, 3, 4, 24, 5, 2.
HEADS = [
    (32, 32, 96),
    (14, 2, 64),
    (9, 3, 64),
    (32, 8, 128),
    (24, 1, 64),
    (5, 1, 80),
    (4, 2, 32),
    (3, 3, 16),
    (2, 2, 112),
]
HALF_ULP = 2.0**-11


@pytest.fixture(scope="module")
def twin() -> Iterator[NumpyOps]:
    opened = NumpyOps(num_threads=1)
    yield opened
    opened.close()


def put(ops: Any, name: str, array: NDArray[Any]) -> Any:
    (placed,) = ops.staging.place(f"test_{name}", [array])
    return placed


def normal(seed: list[int], *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_rounded(actual: NDArray[Any], exact: NDArray[Any], ulps: float = 1.01) -> None:
    """actual is exact rounded to fp16, but for `ulps` half-units in the last place."""
    tolerance = ulps * HALF_ULP * np.maximum(np.abs(exact), 2.0**-14)
    assert actual.shape == exact.shape
    assert np.all(np.abs(actual.astype(np.float64) - exact) <= tolerance)


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("num_tokens", [1, 3, 130])
def test_embedding_copies_the_rows_of_the_ids(ops: Any, hidden: int, num_tokens: int) -> None:
    table = normal([hidden], 301, hidden).astype(np.float16)
    ids = np.random.default_rng(num_tokens).integers(0, 301, num_tokens).astype(np.int32)
    x = ops.embedding(put(ops, "ids", ids), put(ops, "table", table))
    np.testing.assert_array_equal(ops.to_host(x), table[ids].astype(np.float32))


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize(("num_tokens", "scale"), [(1, 1.0), (7, 1e-3), (65, 2e4)])
def test_rms_norm_is_the_twins_rounded(
    ops: Any, twin: NumpyOps, hidden: int, num_tokens: int, scale: float
) -> None:
    x, weight = normal([1, hidden], num_tokens, hidden) * scale, normal([2, hidden], hidden)
    y = ops.to_host(ops.rms_norm(put(ops, "x", x), put(ops, "weight", weight), 1e-5))
    assert_rounded(y, twin.rms_norm(x, weight, 1e-5))


def test_a_row_of_infinities_leaves_the_other_rows_alone(ops: Any) -> None:
    x, weight = normal([6], 3, 896), put(ops, "weight", normal([7], 896))
    expected = ops.to_host(ops.rms_norm(put(ops, "x", x), weight, 1e-5))
    x[1, 5] = np.inf
    y = ops.to_host(ops.rms_norm(put(ops, "x", x), weight, 1e-5))
    assert not np.isfinite(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("num_tokens", [1, 9, 150])
def test_rope_and_cache_rotates_queries_and_fills_just_the_slots(
    ops: Any, twin: NumpyOps, num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int
) -> None:
    rng = np.random.default_rng([num_heads, head_dim, num_tokens])
    width, num_blocks = (num_heads + 2 * num_kv_heads) * head_dim, 8
    qkv = normal([8, width], num_tokens, width).astype(np.float16)
    bias = normal([9, width], width)
    angles = np.arange(700)[:, None] * 0.3 ** np.arange(head_dim // 2)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    slots = rng.permutation(num_blocks * BLOCK_SIZE)[:num_tokens].astype(np.int32)
    positions = rng.integers(0, 700, num_tokens).astype(np.int32)
    empty = np.zeros(0, np.int32)
    batch = Batch(empty, positions, slots, empty, empty, empty, empty)
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)

    untouched = np.full(shape, 7.0, np.float16)
    cache = KVCache(put(ops, "keys", untouched), put(ops, "values", untouched))
    placed = ops.place(batch)
    q = ops.rope_and_cache(
        put(ops, "qkv", qkv), put(ops, "bias", bias), put(ops, "table", table), cache, placed
    )
    twin_cache = KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    twin_q = twin.rope_and_cache(qkv.astype(np.float32), bias, table, twin_cache, twin.place(batch))

    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    assert_rotated(ops.to_host(q), twin_q)
    keys, values = ops.to_host(cache.keys), ops.to_host(cache.values)
    assert_rotated(keys[block, :, offset], twin_cache.keys[block, :, offset])
    rounded = twin_cache.values[block, :, offset].astype(np.float16)
    np.testing.assert_array_equal(values[block, :, offset], rounded.astype(np.float32))
    keys[block, :, offset] = values[block, :, offset] = 7.0
    assert (keys == 7.0).all()
    assert (values == 7.0).all()


def assert_rotated(actual: Floats, expected: Floats) -> None:
    """Equal but for the rounding to fp16 and to fp32 in between."""
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= 1.01 * HALF_ULP * np.abs(expected) + 1e-6)


def test_rope_and_cache_takes_no_bias_and_skips_padding_tokens(ops: Any) -> None:
    qkv = normal([10], 2, 3 * 64).astype(np.float16)
    slots = np.array([-1, 5], np.int32)
    empty = np.zeros(0, np.int32)
    batch = ops.place(Batch(empty, np.zeros(2, np.int32), slots, empty, empty, empty, empty))
    still = np.stack([np.ones((1, 32)), np.zeros((1, 32))], axis=1).astype(np.float32)
    zeros = np.zeros((1, 1, BLOCK_SIZE, 64), np.float16)
    cache = KVCache(put(ops, "keys", zeros), put(ops, "values", zeros))
    q = ops.rope_and_cache(put(ops, "qkv", qkv), None, put(ops, "table", still), cache, batch)
    halves = qkv.astype(np.float32)
    np.testing.assert_array_equal(ops.to_host(q)[:, 0], halves[:, :64])
    keys, values = ops.to_host(cache.keys), ops.to_host(cache.values)
    np.testing.assert_array_equal(keys[0, 0, 5], halves[1, 64:128])
    np.testing.assert_array_equal(values[0, 0, 5], halves[1, 128:])
    keys[0, 0, 5] = values[0, 0, 5] = 0.0
    assert not keys.any()
    assert not values.any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 65504.0])  # the last with the bias
def test_a_value_beyond_fp16_reaches_who_sees_it_and_nobody_else(ops: Any, bad: float) -> None:
    length, at, dim = 100, 70, 64
    qkv = normal([20], length, 3 * dim).astype(np.float16)
    column = 2 * dim + 5
    bias = np.zeros(3 * dim, np.float32)
    bias[column] = 30.0
    still = np.tile(np.stack([np.ones(32), np.zeros(32)]), (length, 1, 1)).astype(np.float32)
    batch = ops.place(
        Batch(
            token_ids=np.zeros(length, np.int32),
            positions=np.arange(length, dtype=np.int32),
            slot_mapping=np.arange(length, dtype=np.int32),
            query_start=np.array([0, length], np.int32),
            context_lens=np.array([length], np.int32),
            block_tables=np.array([[0, 1]], np.int32),
            logits_rows=np.zeros(0, np.int32),
        )
    )
    zeros = np.zeros((2, 1, BLOCK_SIZE, dim), np.float16)
    cache = KVCache(put(ops, "keys", zeros), put(ops, "values", zeros))
    table = put(ops, "table", still)

    def run() -> Floats:
        placed = put(ops, "qkv", qkv), put(ops, "bias", bias)
        q = ops.rope_and_cache(*placed, table, cache, batch)
        return ops.to_host(ops.attention(q, cache, batch, 0))

    expected = run()
    qkv[at, column] = bad
    actual = run()
    np.testing.assert_array_equal(actual[:at], expected[:at])
    assert np.isnan(actual[at:]).any(axis=1).all()
    assert np.isfinite(ops.to_host(cache.values)).all()
    qkv[at, column] = 65472.0 * np.sign(bad) if bad == bad else 1.0
    assert np.isfinite(run()).all()


SEQUENCES = [
    [(1, 1)],
    [(64, 64)],
    [(65, 65), (1, 1)],
    [(1, 1), (63, 1), (64, 1), (65, 1), (256, 1), (257, 1), (1000, 1)],
    [(130, 130), (300, 1), (200, 7), (513, 2), (128, 1), (700, 300)],
]


def run_attention(ops: Any, problem: AttentionProblem, window: int = 0) -> Floats:
    cache = KVCache(put(ops, "keys", problem.keys), put(ops, "values", problem.values))
    q = put(ops, "q", problem.q)
    return ops.to_host(ops.attention(q, cache, ops.place(problem.batch), window))


def assert_attends_as_twin(
    ops: Any, twin: NumpyOps, problem: AttentionProblem, window: int
) -> None:
    cache = KVCache(problem.clean(problem.keys), problem.clean(problem.values))
    q = problem.q.astype(np.float32)
    expected = twin.attention(q, cache, twin.place(problem.batch), window)
    actual = run_attention(ops, problem, window)
    assert actual.shape == (problem.q.shape[0], problem.q.shape[1] * problem.q.shape[2])
    # The weights are rounded to fp16 (by up to 2^-11 each, at random) and so is the result.
    largest, expected = np.abs(cache.values).max(), expected.reshape(actual.shape)
    np.testing.assert_allclose(actual, expected, atol=3e-4 * largest, rtol=6e-4)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("sequences", SEQUENCES, ids=lambda s: "+".join(f"{c}.{q}" for c, q in s))
def test_attention_is_the_twins(
    ops: Any,
    twin: NumpyOps,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sequences: list[tuple[int, int]],
) -> None:
    problem = attention_problem(num_heads, num_kv_heads, head_dim, sequences)
    assert_attends_as_twin(ops, twin, problem, 0)


@pytest.mark.parametrize("window", [1, 2, 50, 64, 65, 256, 300, 5000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [HEADS[0], HEADS[1]])
def test_attention_sees_the_sliding_window_only(
    ops: Any, twin: NumpyOps, num_heads: int, num_kv_heads: int, head_dim: int, window: int
) -> None:
    problem = attention_problem(num_heads, num_kv_heads, head_dim, SEQUENCES[-1])
    assert_attends_as_twin(ops, twin, problem, window)


def test_attention_with_scores_in_the_thousands_stays_finite(ops: Any, twin: NumpyOps) -> None:
    problem = attention_problem(4, 2, 64, [(300, 1), (200, 200)], scale=30.0)
    actual = run_attention(ops, problem)
    assert np.isfinite(actual).all()
    cache = KVCache(problem.clean(problem.keys), problem.clean(problem.values))
    q = problem.q.astype(np.float32)
    expected = twin.attention(q, cache, twin.place(problem.batch), 0).reshape(actual.shape)
    np.testing.assert_allclose(actual, expected, atol=2e-2, rtol=0)


def test_a_head_dim_the_kernel_does_not_have_is_refused(ops: Any) -> None:
    problem = attention_problem(2, 2, 24, [(3, 1)])
    with pytest.raises(DeviceError, match="head dim is 24"):
        run_attention(ops, problem)


def run_swiglu(ops: Any, gate_up: NDArray[np.float16]) -> Floats:
    from orcd_batch.backend.cuda.array import FP16
    from orcd_batch.backend.cuda.gated_linear import swiglu as queue_swiglu

    y = ops.workspace.take("test_gated", (len(gate_up), gate_up.shape[1] // 2), FP16)
    queue_swiglu(ops.kernels, put(ops, "gate_up", gate_up), y)
    return ops.to_host(y)


@pytest.mark.parametrize(("size", "k"), [(8, 8), (72, 64), (1536, 576), (4864, 896)])
@pytest.mark.parametrize("num_tokens", [1, 3, 70, 300])
def test_gated_linear_is_the_twins_activation_of_the_rounded_product(
    ops: Any, size: int, k: int, num_tokens: int
) -> None:
    x = put(ops, "x", normal([29, k], num_tokens, k).astype(np.float16))
    weight = put(ops, f"w_{size}", (normal([30, k], 2 * size, k) * 0.1).astype(np.float16))
    product = ops.to_host(ops.linear(x, weight))
    assert_rounded(ops.to_host(ops.gated_linear(x, weight)), swiglu(product), ulps=1.02)


@pytest.mark.parametrize("size", [8, 64, 192, 1536, 4864, 8192])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_swiglu_is_the_twins_rounded(ops: Any, size: int, num_tokens: int) -> None:
    gate_up = normal([11, size], num_tokens, 2 * size) * 4
    edges = np.array([0.0, -0.0, 90.0, -90.0, 200.0, -200.0, 1e-30, -1e4], np.float32)
    gate_up[0, :8] = edges
    halves = gate_up.astype(np.float16)
    assert_rounded(run_swiglu(ops, halves), swiglu(halves.astype(np.float32)), ulps=1.02)


@pytest.mark.parametrize(("gate", "up"), [(np.inf, 0), (-np.inf, 1), (1, -np.inf), (-90, np.inf)])
def test_swiglu_never_makes_an_overflow_finite(ops: Any, gate: float, up: float) -> None:
    gate_up = normal([28], 3, 64).astype(np.float16)
    expected = run_swiglu(ops, gate_up)
    gate_up[1, 7], gate_up[1, 39] = gate, up
    y = run_swiglu(ops, gate_up)
    assert not np.isfinite(y[1, 7])
    y[1, 7] = expected[1, 7]
    np.testing.assert_array_equal(y, expected)


def test_every_gate_has_the_bits_of_the_plain_division(ops: Any) -> None:
    """gated.cuh divides near gates without the compiler's branches."""
    from cuda.core import LaunchConfig, Program, ProgramOptions, launch

    from orcd_batch.backend.cuda.program import kernel_source

    source = (
        kernel_source("swiglu")
        + """
    extern "C" __global__ void compare(u16* plain, u16* branchless, u32 up) {
        const u32 gate = blockIdx.x * blockDim.x + threadIdx.x;
        u32 y[1];
        gate_words({gate | gate << 16}, {up | up << 16}, y);
        plain[gate] = gated_two(gate, up);
        branchless[gate] = y[0] >> 16;
    }"""
    )
    macros = [("INTERMEDIATE", "64"), ("THREADS", "256")]
    options = ProgramOptions(arch=ops.device.arch, std="c++17", define_macro=macros)
    kernel = Program(source, "c++", options).compile("cubin").get_kernel("compare")
    found = [ops.workspace.take(f"gates_{i}", (1 << 16,), np.dtype(np.float16)) for i in range(2)]
    config = LaunchConfig(grid=256, block=256)
    for up in np.array([1, -1, 1 / 3, 60_000, 2**-24, 0, np.inf, np.nan], np.float16):
        addresses = [array.ptr for array in found]
        launch(ops.device.stream, config, kernel, *addresses, up.view(np.uint16).astype(np.uint32))
        plain, branchless = (ops.staging.fetch(array).view(np.uint16) for array in found)
        np.testing.assert_array_equal(branchless, plain)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_take_rows_moves_bytes(ops: Any, hidden: int, dtype: Any) -> None:
    x = normal([12, hidden], 50, hidden).astype(dtype)
    for rows in ([49], [0, 0, 7, 3], list(range(50)), []):
        taken = ops.take_rows(put(ops, "x", x), put(ops, "rows", np.array(rows, np.int32)))
        np.testing.assert_array_equal(ops.to_host(taken), x[rows].astype(np.float32))


# Sampling: the numpy sampler is the specification, bit for bit.


def sample_batch(num_rows: int, vocab_size: int, seed: int, **fixed: Any) -> SampleBatch:
    """Parameters drawn so that every filter is sometimes off, sometimes mild, sometimes extreme."""
    rng = np.random.default_rng([seed, vocab_size])

    def pick(*choices: float) -> NDArray[Any]:
        return rng.choice(np.array(choices), num_rows)

    drawn: dict[str, Any] = {
        "temperature": pick(0.0, 0.3, 0.7, 1.0, 1.0, 2.5),
        "top_k": pick(0, 0, 1, 2, 40, vocab_size - 1, vocab_size, 10**6),
        "top_p": pick(1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.95, 0.999),
        "min_p": pick(0.0, 0.0, 1e-6, 0.05, 0.5, 1.0),
        "repetition_penalty": pick(1.0, 1.0, 1.1, 1.3, 0.8, 5.0),
        "seed": rng.integers(0, 2**64, num_rows, np.uint64),
        "stream": rng.integers(0, 2**64, num_rows, np.uint64),
        "position": rng.integers(0, 2**32, num_rows, np.uint32),
    }
    drawn.update({name: np.full(num_rows, value) for name, value in fixed.items()})
    seen = [
        rng.choice(vocab_size, min(vocab_size, rng.integers(0, 200)), replace=False)
        if penalty != 1.0
        else np.zeros(0, np.int64)
        for penalty in drawn["repetition_penalty"]
    ]
    start = np.cumsum([0, *map(len, seen)])
    types = {"top_k": np.int32, "seed": np.uint64, "stream": np.uint64, "position": np.uint32}
    columns = {name: value.astype(types.get(name, np.float32)) for name, value in drawn.items()}
    return SampleBatch(
        **columns,
        seen_ids=np.concatenate([np.zeros(0), *seen]).astype(np.int32),
        seen_start=start.astype(np.int32),
    )


def sample(ops: Any, logits: Any, batch: SampleBatch) -> Sampled:
    return ops.sampling.fetch(ops.sample(logits, ops.sampling.place(batch)))


def check_sample(ops: Any, logits: Floats, batch: SampleBatch) -> Sampled:
    """Compares with the numpy sampler, clustered and generic kernel both; returns the results."""
    sampling = ops.sampling
    placed = put(ops, "logits", logits)
    sampled = sample(ops, placed, batch)
    generic = sampling.fetch(sampling.choose(placed, sampling.place(batch), generic=True))
    for name in ("token_ids", "logprobs", "margins", "fingerprints", "finite"):
        np.testing.assert_array_equal(getattr(generic, name), getattr(sampled, name), name)
    for row, raw in enumerate(logits):
        token, logprob, margin, fingerprint, finite = sample_row(raw, batch, row)
        where = f"row {row}: {[(n, getattr(batch, n)[row]) for n in batch.__slots__[:5]]}"
        assert sampled.finite[row] == finite, where
        assert sampled.fingerprints[row] == fingerprint, where
        assert sampled.token_ids[row] == token, where
        assert sampled.margins[row] == np.float32(margin), where
        assert abs(sampled.logprobs[row] - logprob) <= 2e-6 * max(1.0, abs(logprob)), where
    return sampled


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 100, 511, 4099, 32064])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_sample_chooses_as_the_numpy_sampler(ops: Any, vocab_size: int, scale: float) -> None:
    num_rows = 40 if vocab_size < 10_000 else 16
    for seed in range(3):
        logits = normal([13, vocab_size, seed], num_rows, vocab_size) * np.float32(scale)
        check_sample(ops, logits, sample_batch(num_rows, vocab_size, seed))


@pytest.mark.parametrize("vocab_size", [49152, 151936, 262144])
def test_sample_chooses_as_the_numpy_sampler_from_large_vocabularies(
    ops: Any, vocab_size: int
) -> None:
    logits = normal([14, vocab_size], 10, vocab_size) * np.float32(3.0)
    check_sample(ops, logits, sample_batch(10, vocab_size, 5))


def test_sample_orders_equal_logits_by_id(ops: Any) -> None:
    rng = np.random.default_rng(15)
    for vocab_size in (50, 33000):
        for levels in (1, 2, 40):
            logits = rng.integers(0, levels, (12, vocab_size)).astype(np.float32)
            logits[rng.random(logits.shape) < 0.3] *= -1.0  # zeros of both signs
            check_sample(ops, logits, sample_batch(12, vocab_size, levels))


def test_sample_sums_equal_weights_of_a_whole_large_vocabulary(ops: Any) -> None:
    logits = np.zeros((3, 262144), np.float32)
    check_sample(ops, logits, sample_batch(3, 262144, 1, temperature=1.0, top_k=0, top_p=0.7))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e5, 1e30])
def test_sample_keeps_to_the_specification_at_extreme_temperatures(
    ops: Any, temperature: float
) -> None:
    logits = normal([16], 24, 3000) * np.float32(4.0)
    check_sample(ops, logits, sample_batch(24, 3000, 2, temperature=temperature))


@pytest.mark.parametrize("penalty", [1e-30, 1e30])
def test_sample_clips_what_an_extreme_penalty_makes_of_the_logits(ops: Any, penalty: float) -> None:
    logits = normal([17], 16, 500) * np.float32(1e10)
    check_sample(ops, logits, sample_batch(16, 500, 3, repetition_penalty=penalty))


def test_sample_handles_logits_at_the_ends_of_fp32(ops: Any) -> None:
    logits = normal([18], 16, 900)
    logits[:, ::7] = 3.4e38
    logits[:, 3::7] = -3.4e38
    logits[:, 5::7] = 1e-44
    check_sample(ops, logits, sample_batch(16, 900, 4))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_sample_flags_a_row_that_is_not_finite_and_no_other(ops: Any, bad: float) -> None:
    logits = normal([19], 4, 1200)
    logits[1, 1199] = logits[2, 0] = bad
    sampled = check_sample(ops, logits, sample_batch(4, 1200, 6))
    assert sampled.finite.tolist() == [True, False, False, True]


def test_sample_of_no_rows_is_empty(ops: Any) -> None:
    logits = put(ops, "logits", np.zeros((0, 100), np.float32))
    sampled = sample(ops, logits, sample_batch(0, 100, 7))
    assert len(sampled.token_ids) == 0


def test_a_vocabulary_beyond_the_samplers_sums_is_refused(ops: Any) -> None:
    logits = np.zeros((1, (1 << 18) + 1), np.float32)
    with pytest.raises(DeviceError, match="262,145 tokens"):
        sample(ops, put(ops, "logits", logits), sample_batch(1, 100, 8))


def test_the_reserved_work_space_serves_the_largest_step() -> None:
    from orcd_batch.backend.cuda.ops import CudaOps
    from orcd_batch.backend.cuda.plan import ModelShape

    tokens, rows, length, vocab_size = 300, 20, 700, 1000
    problem = attention_problem(8, 2, 32, [(length, 1)] * 19 + [(281, 281)])
    tables = np.ascontiguousarray(problem.batch.block_tables[:, :11])
    batch = replace(problem.batch, block_tables=tables, logits_rows=np.arange(rows, dtype=np.int32))
    seen = np.tile(np.arange(length, dtype=np.int32), rows)
    start = np.arange(rows + 1, dtype=np.int32) * length
    sampling = replace(
        sample_batch(rows, vocab_size, 9, repetition_penalty=1.5), seen_ids=seen, seen_start=start
    )
    ops = CudaOps()
    try:
        x, weight = put(ops, "x", normal([21], tokens, 256)), put(ops, "w", normal([22], 256))
        qkv, table = (
            put(ops, "qkv", normal([23], tokens, 384).astype(np.float16)),
            put(ops, "t", normal([24], 701, 32)),
        )
        values = normal([28], 1024, 256).view(np.uint8).reshape(-1)
        gate_up = TensorPart("ffn_gate_up.weight", values, "F32", (1024, 256))
        wide = put(ops, "wide", normal([25], tokens, 1024).astype(np.float16))
        logits = put(ops, "logits", normal([26], rows, vocab_size))
        embedding = put(ops, "embedding", normal([27], 50, 256).astype(np.float16))
        cache = KVCache(put(ops, "keys", problem.keys), put(ops, "values", problem.values))
        gate_up_weight = ops.load_linear([gate_up])
        ops.prepare(ModelShape(1, 256, 512, 8, 2, 32, vocab_size, length), tokens, rows)
        placed = ops.place(batch)
        ops.embedding(placed.token_ids, embedding)
        q = ops.rope_and_cache(qkv, None, table, cache, placed)
        ops.attention(q, cache, placed, 0)
        normed = ops.rms_norm(x, weight, 1e-5)
        assert ops.gated_linear(normed, gate_up_weight).shape == (tokens, 512)
        assert ops.take_rows(normed, placed.logits_rows).shape == (rows, 256)
        assert len(sample(ops, logits, sampling).token_ids) == rows
        with pytest.raises(DeviceError, match="max_num_batched_tokens"):
            ops.rms_norm(wide, weight, 1e-5)
    finally:
        ops.close()
