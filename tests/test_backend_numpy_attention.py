"""Attention against the textbook in double precision, and bit for bit against itself."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, KVCache

Floats = NDArray[np.float32]
BLOCKS = 12


@pytest.fixture(scope="module")
def ops() -> Iterator[NumpyOps]:
    built = NumpyOps(2)
    yield built
    built.close()


class Sequence:
    """Random q, k, v of one sequence and the cache blocks it lives in."""

    def __init__(
        self, length: int, blocks: list[int], heads: tuple[int, int, int], seed: int
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        generator = np.random.default_rng(seed)
        self.length, self.blocks = length, blocks
        self.q = generator.standard_normal((length, num_heads, head_dim), np.float32)
        self.kv = generator.standard_normal((2, length, num_kv_heads, head_dim), np.float32)

    def textbook(self, window: int) -> NDArray[np.float64]:
        q, (k, v) = self.q.astype(np.float64), self.kv.astype(np.float64)
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
        i, j = np.arange(self.length)[:, None], np.arange(self.length)
        visible = (j <= i) & (j > i - window if window else True)
        scores[:, ~visible] = -np.inf
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        return np.einsum("hij,jhd->ihd", p, v).reshape(self.length, -1)


def cache_of(sequences: list[Sequence], stale: float) -> KVCache:
    """The sequences in their blocks; every other block as a predecessor left it."""
    _, _, num_kv_heads, head_dim = sequences[0].kv.shape
    shape = (BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    cache = KVCache(np.full(shape, stale, np.float32), np.full(shape, stale, np.float32))
    for sequence in sequences:
        for position in range(sequence.length):
            block, offset = sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
            if offset == 0:
                cache.keys[block] = cache.values[block] = 0.0
            cache.keys[block, :, offset], cache.values[block, :, offset] = sequence.kv[:, position]
    return cache


def attend(
    ops: NumpyOps,
    cache: KVCache,
    spans: list[tuple[Sequence, int, int]],
    window: int,
) -> list[Floats]:
    """Attention of tokens first … last of each sequence, all in one batch."""
    lengths = [last - first for _, first, last in spans]
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(a, b) for _, a, b in spans]).astype(np.int32)
    tables = np.zeros((len(spans), BLOCKS), np.int32)
    for row, (sequence, _, _) in zip(tables, spans, strict=True):
        row[: len(sequence.blocks)] = sequence.blocks
    none = np.zeros(0, np.int32)
    lasts = np.array([b for _, _, b in spans], np.int32)
    batch = ops.place(Batch(positions, positions, positions, start, lasts, tables, none))
    q = np.concatenate([sequence.q[a:b] for sequence, a, b in spans])
    out = ops.attention(q, cache, batch, window)
    return [out[a:b] for a, b in pairwise(start)]


HEADS = [(9, 3, 64), (4, 4, 96), (14, 2, 64), (2, 1, 128), (6, 6, 32)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 1, 50, 64, 100])
def test_attention_is_the_textbooks(
    ops: NumpyOps, heads: tuple[int, int, int], window: int
) -> None:
    sequence = Sequence(200, [3, 4, 8, 1], heads, seed=0)
    (got,) = attend(ops, cache_of([sequence], 0.0), [(sequence, 0, 200)], window)
    assert np.abs(got - sequence.textbook(window)).max() < 2e-6


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 70])
def test_a_token_has_the_same_bits_in_any_chunk_and_company(
    ops: NumpyOps, heads: tuple[int, int, int], window: int
) -> None:
    a = Sequence(150, [0, 1, 2], heads, seed=1)
    b = Sequence(70, [9, 5], heads, seed=2)
    c = Sequence(300, [11, 3, 4, 6, 10], heads, seed=3)
    cache = cache_of([a, b, c], stale=np.nan)
    (whole,) = attend(ops, cache, [(a, 0, 150)], window)
    for first, last in ((0, 1), (0, 63), (63, 64), (64, 65), (10, 75), (130, 150), (149, 150)):
        span, single, _ = attend(ops, cache, [(a, first, last), (b, 69, 70), (c, 0, 300)], window)
        assert np.array_equal(span, whole[first:last]), (first, last)
        assert np.array_equal(single, attend(ops, cache, [(b, 69, 70)], window)[0])
    rows = attend(ops, cache, [(s, s.length - 1, s.length) for s in (c, a, b)], window)
    assert np.array_equal(rows[1], whole[149:])
    assert not any(np.isnan(row).any() for row in rows)


def test_where_the_blocks_lie_does_not_matter(ops: NumpyOps) -> None:
    together = Sequence(250, [2, 3, 4, 5], (9, 3, 64), seed=4)
    apart = Sequence(250, [11, 0, 7, 3], (9, 3, 64), seed=4)
    spans = [(0, 250), (249, 250)]
    for first, last in spans:
        (x,) = attend(ops, cache_of([together], 0.0), [(together, first, last)], 0)
        (y,) = attend(ops, cache_of([apart], np.inf), [(apart, first, last)], 0)
        assert np.array_equal(x, y)


def test_beginning_a_block_clears_what_its_last_holder_left(ops: NumpyOps) -> None:
    cache = KVCache(*(np.full((2, 1, BLOCK_SIZE, 8), np.nan, np.float32) for _ in range(2)))
    table = np.stack([np.ones((4, 4)), np.zeros((4, 4))], axis=1).astype(np.float32)
    none = np.zeros(0, np.int32)
    positions, slots = np.arange(3, dtype=np.int32), np.array([64, 65, 66], np.int32)
    batch = ops.place(Batch(none, positions, slots, none, none, none, none))
    qkv = np.ones((3, 24), np.float32)
    ops.rope_and_cache(qkv, np.zeros(24, np.float32), table[[0, 0, 0]], cache, batch)
    assert np.isnan(cache.values[0]).all()
    assert cache.values[1, 0, :3].min() == 1.0
    assert not cache.values[1, 0, 3:].any()


def test_the_beginning_of_a_block_is_copied_in_every_layer_and_the_rest_is_clear() -> None:
    ops = NumpyOps(1)
    caches = ops.allocate_kv_cache(2, 4, 2, 16)
    rng = np.random.default_rng(0)
    for cache in caches:
        for blocks in (cache.keys, cache.values):
            blocks[:2] = rng.standard_normal(blocks[:2].shape)
            blocks[0, :, 50:] = np.nan  # what its owner wrote behind the prompt
            blocks[3] = np.inf
    ops.copy_blocks(caches, np.array([[0, 2, 50], [1, 3, 7]], np.int32))
    for cache in caches:
        for blocks in (cache.keys, cache.values):
            for source, target, count in ((0, 2, 50), (1, 3, 7)):
                np.testing.assert_array_equal(blocks[target, :, :count], blocks[source, :, :count])
                assert not blocks[target, :, count:].any()
    ops.close()
