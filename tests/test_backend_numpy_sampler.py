"""The sampler against a scalar reading of its own page, and against probability theory."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orcd_batch.backend.elementary import expf_fixed, logf_fixed
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.backend.numpy_sampler import (
    MAX_GUMBEL,
    gumbel,
    gumbel_max,
    logits_fingerprint,
    sample_row,
)
from orcd_batch.backend.ops import SampleBatch
from orcd_batch.backend.philox import philox4x32, philox_word

f32 = np.float32
Floats = NDArray[np.float32]


def one_row(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalty: float = 1.0,
    seed: int = 0,
    stream: int = 0,
    position: int = 0,
    seen: tuple[int, ...] = (),
    rows: int = 1,
) -> SampleBatch:
    def repeat(value: Any, dtype: type) -> NDArray[Any]:
        return np.full(rows, value, dtype)

    return SampleBatch(
        temperature=repeat(temperature, f32),
        top_k=repeat(top_k, np.int32),
        top_p=repeat(top_p, f32),
        min_p=repeat(min_p, f32),
        repetition_penalty=repeat(penalty, f32),
        seed=repeat(seed, np.uint64),
        stream=repeat(stream, np.uint64),
        position=np.arange(position, position + rows).astype(np.uint32),
        seen_ids=np.array(seen * rows, np.int32),
        seen_start=(np.arange(rows + 1) * len(seen)).astype(np.int32),
    )


def token_by_the_page(raw: Floats, batch: SampleBatch) -> int:
    """Steps 1 to 6 one token at a time, with sorting instead of selection."""
    logits = [f32(value) for value in raw]
    penalty = batch.repetition_penalty[0]
    if penalty != 1:
        for i in set(batch.seen_ids.tolist()):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
    if batch.temperature[0] == 0:
        return logits.index(max(logits))
    z = [f32((value - max(logits)) / batch.temperature[0]) + f32(0) for value in logits]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if batch.top_k[0] > 0:
        order = order[: batch.top_k[0]]
    exp = {i: expf_fixed(np.array([z[i]]))[0] for i in order}
    if batch.top_p[0] < 1:
        weights = [int(float(exp[i]) * 2**34) for i in order]
        target = math.ceil(float(batch.top_p[0]) * float(sum(weights)))
        order = [i for n, i in enumerate(order) if n == 0 or sum(weights[:n]) < target]
    order = [i for i in order if batch.min_p[0] == 0 or exp[i] >= batch.min_p[0]]
    scores = {i: f32(z[i] + noise(batch, i)) for i in order}
    return min(scores, key=lambda i: (-scores[i], i))


def noise(batch: SampleBatch, token: int) -> np.float32:
    seed, stream = int(batch.seed[0]), int(batch.stream[0])
    counter = (stream & 0xFFFFFFFF, stream >> 32, int(batch.position[0]), token)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    x = int(philox4x32((c0, c1, c2, c3), (seed & 0xFFFFFFFF, seed >> 32))[0])
    h = f32(f32(f32(x if x < 2**31 else 2**32 - 1 - x) + f32(0.5)) * f32(2**-32))
    if x < 2**31:
        y = f32(1) - h
        e = f32(f32(h - f32(f32(1) - y)) - logf_fixed(np.array([y]))[0])
    else:
        e = f32(f32(0) - logf_fixed(np.array([h]))[0])
    return f32(f32(0) - logf_fixed(np.array([e]))[0])


@settings(max_examples=200)
@given(
    logits=st.lists(st.integers(-6, 6).map(lambda i: i / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5, 1e-38]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)
def test_the_choice_is_the_page_read_literally(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seed: int,
    stream: int,
    position: int,
) -> None:
    raw = np.array(logits, f32)
    seen = tuple(range(0, len(raw), 3))
    batch = one_row(temperature, top_k, top_p, min_p, penalty, seed, stream, position, seen)
    with np.errstate(over="ignore"):
        expected = token_by_the_page(raw, batch)
    assert sample_row(raw, batch, 0)[0] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 3}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.3}, [2 / 3, 1 / 3, 0, 0]),
        ({"penalty": 2.0, "seen": (0, 1)}, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_tokens_come_with_the_probabilities_they_should(
    options: dict[str, Any], expected: list[float]
) -> None:
    count = 3000
    raw = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(f32) + f32(math.log(8))
    if "penalty" in options:
        raw = np.array([2.0, 2.0, 1.0, 1.0], f32)
    batch = one_row(rows=count, seed=11, **options)
    counts = np.bincount([sample_row(raw, batch, i)[0] for i in range(count)], minlength=4)
    wanted = np.array(expected) * count
    assert not counts[wanted == 0].any()
    kept = wanted > 0
    chi_square = float((((counts - wanted) ** 2)[kept] / wanted[kept]).sum())
    assert chi_square < 21.1, f"{counts} against {wanted}: less likely than 1 in 10,000"


def test_a_large_vocabulary_is_sampled_fairly_across_chunk_borders() -> None:
    raw = np.zeros(20_000, f32)
    batch = one_row(rows=400, seed=5)
    tokens = np.array([sample_row(raw, batch, i)[0] for i in range(400)])
    quarters = np.bincount(tokens // 5_000, minlength=4)
    assert float(((quarters - 100) ** 2 / 100).sum()) < 21.1


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 5.0, 100.0])
def test_noise_that_could_not_win_may_be_left_out(temperature: float) -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        logits = generator.normal(0, 6, 3000).astype(f32)
        z = (logits - logits.max()) / f32(temperature) + f32(0.0)
        words = philox_word((seed, 0, 7), np.arange(3000, dtype=np.uint64), (seed, 0))
        literal = int((z + gumbel(words)).argmax())
        assert gumbel_max(z, None, seed, seed, 7) == literal


def test_no_noise_is_larger_than_the_bound_that_leaves_candidates_out() -> None:
    words = np.concatenate([np.arange(100_000), 2**32 - 1 - np.arange(100_000)])
    middle = 2**31 - 50_000 + np.arange(100_000)
    assert gumbel(np.concatenate([words, middle]).astype(np.uint64)).max() < MAX_GUMBEL


def test_equal_logits_give_the_lowest_id_when_greedy() -> None:
    raw = np.array([1.0, 3.0, 3.0, -2.0], f32)
    token, _, margin, _, finite = sample_row(raw, one_row(temperature=0), 0)
    assert (token, margin, finite) == (1, 0.0, True)


def test_a_tiny_temperature_acts_like_greedy_and_stays_finite() -> None:
    raw = np.array([-3e38, 1.0, 3e38, 2.0], f32)
    assert sample_row(raw, one_row(temperature=1e-38), 0)[0] == 2


def test_an_extreme_penalty_overflows_to_the_border_and_no_further() -> None:
    raw = np.array([5.0, 4.0], f32)
    assert sample_row(raw, one_row(penalty=1e-38, seen=(0, 1), temperature=1.0), 0)[0] in (0, 1)
    assert sample_row(-raw, one_row(penalty=3e38, seen=(0,), temperature=1.0), 0)[0] == 1


def test_logprob_is_the_log_softmax_of_the_raw_logits() -> None:
    raw = np.random.default_rng(3).normal(0, 4, 5000).astype(f32)
    token, logprob, margin, _, _ = sample_row(raw, one_row(temperature=0.7, penalty=1.2), 0)
    exact = raw.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    assert logprob == pytest.approx(exact[token], abs=1e-5)
    first, second = np.sort(raw)[::-1][:2]
    assert margin == float(first - second)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_row_with_an_infinity_or_nan_is_reported_and_its_neighbours_are_not(bad: float) -> None:
    ops = NumpyOps(2)
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(f32)
    logits[1, 49] = bad
    sampled = ops.sample(logits, one_row(rows=3))
    ops.close()
    assert sampled.finite.tolist() == [True, False, True]
    assert sampled.fingerprints[1] == 0


def splitmix64(i: int) -> int:
    mask = 2**64 - 1
    s = (i + 1) * 0x9E3779B97F4A7C15 & mask
    s = (s ^ (s >> 30)) * 0xBF58476D1CE4E5B9 & mask
    s = (s ^ (s >> 27)) * 0x94D049BB133111EB & mask
    return s ^ (s >> 31)


def test_splitmix64_is_the_published_one() -> None:
    assert [splitmix64(i) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_the_fingerprint_is_its_formula(patterns: list[int]) -> None:
    total = len(patterns) * 0x9E3779B97F4A7C15
    total += sum((splitmix64(i) | 1) * bits for i, bits in enumerate(patterns))
    row = np.array(patterns, np.uint32).view(f32)
    assert logits_fingerprint(row) % 2**64 == total % 2**64
    assert -(2**63) <= logits_fingerprint(row) < 2**63


@given(st.integers(0, 99), st.integers(0, 31))
def test_one_flipped_bit_of_one_logit_changes_the_fingerprint(index: int, bit: int) -> None:
    row = np.linspace(-5, 5, 100).astype(f32)
    changed = row.copy()
    changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
    assert logits_fingerprint(row) != logits_fingerprint(changed)


def test_the_same_row_gets_the_same_result_in_any_company() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(9, 3000)).astype(f32)
    alone = [sample_row(logits[i], one_row(rows=9, seed=7, stream=3), i) for i in range(9)]
    for num_threads in (1, 2, 3):
        ops = NumpyOps(num_threads)
        sampled = ops.sample(logits, one_row(rows=9, seed=7, stream=3))
        ops.close()
        assert sampled.token_ids.tolist() == [result[0] for result in alone]
        assert sampled.fingerprints.tolist() == [result[3] for result in alone]
