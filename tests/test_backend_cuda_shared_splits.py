"""Which splits are read once: exactly those that several sequences share, each by everyone once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.backend.cuda.attention import CHUNK_MEMBERS, SPLIT_TILES
from orcd_batch.backend.cuda.placed_batch import batch_bytes, place_batch
from orcd_batch.backend.cuda.shared_splits import (
    SPLIT_POSITIONS,
    SharedSplitFinder,
    SharedSplits,
    find_shared_splits,
)
from orcd_batch.backend.ops import Batch

WIDTH = 3 * SPLIT_TILES + 1


def tables_of(prefixes: list[tuple[int, ...]]) -> np.ndarray:
    """Block tables in which the splits of equal prefixes, and no others, are the same blocks."""
    tables = np.zeros((len(prefixes), WIDTH), np.int32)
    numbers: dict[tuple[int, ...], int] = {}
    for row, prefix in enumerate(prefixes):
        for split in range(len(prefix)):
            number = numbers.setdefault(prefix[: split + 1], len(numbers) + 1)
            first = split * SPLIT_TILES
            tables[row, first : first + SPLIT_TILES] = SPLIT_TILES * number + np.arange(SPLIT_TILES)
    return tables


def chunks_of(found: SharedSplits) -> list[tuple[int, tuple[int, ...]]]:
    """(split, sequences) of every chunk, read as the kernel reads them."""
    chunks = []
    for chunk in range(int(found.num_chunks[0])):
        first, last = found.chunk_start[chunk : chunk + 2]
        members = tuple(found.members[first:last].tolist())
        chunks.append((int(found.chunk_split[chunk]), members))
    return chunks


@given(st.lists(st.lists(st.integers(0, 2), max_size=3).map(tuple), min_size=1, max_size=90))
def test_chunks_hold_every_shared_split_of_every_sequence_once(
    prefixes: list[tuple[int, ...]],
) -> None:
    tables = tables_of(prefixes)
    found = find_shared_splits(tables, np.array([len(prefix) for prefix in prefixes]))
    expected = [
        next(
            (s for s in range(len(p)) if sum(p[: s + 1] == q[: s + 1] for q in prefixes) < 2),
            len(p),
        )
        for p in prefixes
    ]
    assert found.is_empty == (not any(expected))
    assert found.num_shared.tolist() == expected
    chunks = chunks_of(found)
    pairs = [(split, member) for split, members in chunks for member in members]
    assert sorted(pairs) == sorted((s, b) for b, count in enumerate(expected) for s in range(count))
    for split, members in chunks:
        assert len(members) <= CHUNK_MEMBERS
        assert len({prefixes[member][: split + 1] for member in members}) == 1
    groups = {(s, prefixes[b][: s + 1]) for s, b in pairs}
    sizes = [
        sum(prefixes[b][: s + 1] == prefix for b in range(len(prefixes))) for s, prefix in groups
    ]
    assert len(chunks) == sum(-(-size // CHUNK_MEMBERS) for size in sizes)


def test_sizes_follow_from_the_tables_shape_so_that_graphs_can_be_replayed() -> None:
    shapes = set()
    for prefixes in ([(1,), (1,), ()], [(1, 2, 1), (1, 2, 1), (1, 2, 1)]):
        found = find_shared_splits(tables_of(prefixes), np.array([len(p) for p in prefixes]))
        shapes.add(tuple(getattr(found, name).shape for name in SharedSplits.__slots__))
    assert shapes == {((3,), (1,), (9,), (5,), (4,))}


def batch_of(prefixes: list[tuple[int, ...]], contexts: list[int], queries: list[int]) -> Batch:
    num_tokens = sum(queries)
    zeros = np.zeros(num_tokens, np.int32)
    start = np.cumsum([0, *queries]).astype(np.int32)
    lengths = np.array(contexts, np.int32)
    return Batch(zeros, zeros, zeros, start, lengths, tables_of(prefixes), zeros[:1])


def test_a_split_is_shared_only_by_decoding_sequences_that_have_all_of_it() -> None:
    finder = SharedSplitFinder()
    prefixes = [(1, 1)] * 3
    whole = 2 * SPLIT_POSITIONS
    for contexts, queries, expected in (
        ([whole, whole + 9, whole], [1, 1, 1], [2, 2, 2]),
        ([whole - 1, whole, whole], [1, 1, 1], [1, 2, 2]),
        ([whole, whole, whole], [1, 5, 1], [2, 0, 2]),
    ):
        found = finder.find(batch_of(prefixes, contexts, queries))
        assert found is not None
        assert found.num_shared.tolist() == expected
    for batch in (
        batch_of(prefixes, [whole, 4, 4], [1, 1, 1]),
        batch_of([(1, 1)], [whole], [1]),
    ):
        found = finder.find(batch)
        assert found is not None
        assert found.is_empty
        assert not found.num_shared.any()


def test_the_answer_is_kept_until_the_sequences_change() -> None:
    finder = SharedSplitFinder()
    batch = batch_of([(1, 2)] * 2, [700, 600], [1, 1])
    first = finder.find(batch)
    assert finder.find(batch_of([(1, 2)] * 2, [701, 601], [1, 1])) is first
    batch.block_tables[1, 2] += 100
    changed = finder.find(batch)
    assert changed is not None
    assert changed.is_empty


class Recorder:
    """Takes what is placed and gives it back as it is."""

    def place(self, name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        self.num_bytes = sum(-(-array.nbytes // 16) * 16 for array in arrays)
        return arrays


@pytest.mark.parametrize("num_seqs", [2, 33, 64])
def test_the_largest_batch_fits_the_room_reserved_for_it(num_seqs: int) -> None:
    batch = batch_of([(1, 2, 3)] * num_seqs, [3 * SPLIT_POSITIONS] * num_seqs, [1] * num_seqs)
    shared = SharedSplitFinder().find(batch)
    recorder = Recorder()
    placed = place_batch(recorder, batch, shared)  # type: ignore[arg-type]
    assert placed.shared is not None
    assert chunks_of(placed.shared) == chunks_of(shared)  # type: ignore[arg-type]
    assert recorder.num_bytes <= batch_bytes(num_seqs, num_seqs, WIDTH)
