"""Which splits of which decoding sequences are the same cache blocks, so that they are read once.

Found on the host from the block tables, and laid out as kernels/attention_decode.cu takes it. Only
who reads a block together depends on it, no bit of any result.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.attention import CHUNK_MEMBERS, SPLIT_TILES
from orcd_batch.backend.ops import BLOCK_SIZE, Batch

Ints = NDArray[np.int32]
SPLIT_POSITIONS = SPLIT_TILES * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class SharedSplits:
    """Sequences by the leading splits that they share, in chunks of up to CHUNK_MEMBERS.

    num_shared: (B,), leading splits of each that are in a chunk. num_chunks: (1,). members:
    sequences, chunk after chunk. chunk_start: (C + 1,), where each chunk's begin. chunk_split:
    (C,), which split it is. Padded to sizes that follow from the block tables' shape alone.
    """

    num_shared: Any
    num_chunks: Any
    members: Any
    chunk_start: Any
    chunk_split: Any

    @property
    def is_empty(self) -> bool:
        """Whether no two sequences share a split; for arrays on the host."""
        return not self.num_chunks[0]

    @classmethod
    def none(cls, num_seqs: int, width: int) -> "SharedSplits":
        """Nothing shared among sequences with block tables of this shape."""
        most = num_seqs * (width // SPLIT_TILES)
        sizes = (num_seqs, 1, most, most // 2 + 1, most // 2)
        return cls(*(np.zeros(size, np.int32) for size in sizes))


class SharedSplitFinder:
    """Finds them; remembers the last answer, which holds until a sequence comes, goes or grows into
    another split."""

    def __init__(self) -> None:
        self._known: tuple[Ints, Ints, SharedSplits] | None = None

    def find(self, batch: Batch) -> SharedSplits | None:
        """None where there are no sequences."""
        if not len(batch.context_lens):
            return None
        tables = batch.block_tables
        num_whole = whole_splits(batch)
        if self._known is not None:
            known_tables, known_whole, found = self._known
            if np.array_equal(known_whole, num_whole) and np.array_equal(known_tables, tables):
                return found
        found = find_shared_splits(tables, num_whole)
        self._known = (tables.copy(), num_whole, found)
        return found


def whole_splits(batch: Batch) -> Ints:
    """(B,) splits that a sequence of one query has behind it entirely; 0 for longer ones."""
    is_single = np.diff(batch.query_start) == 1
    whole: Ints = np.where(is_single, batch.context_lens // SPLIT_POSITIONS, 0)
    return whole


def find_shared_splits(block_tables: Ints, num_whole: Ints) -> SharedSplits:
    """From block tables (B, max_blocks) and whole splits (B,); see `SharedSplits`.

    A split is shared by sequences that share all those before it.
    """
    num_seqs, width = block_tables.shape
    found = SharedSplits.none(num_seqs, width)
    rows = np.arange(num_seqs)
    num_members = num_chunks = 0
    for split in range(width // SPLIT_TILES):
        rows = rows[num_whole[rows] > split]
        columns = block_tables[:, split * SPLIT_TILES : (split + 1) * SPLIT_TILES]
        rows, sizes = _groups(rows, columns)
        if not rows.size:
            break
        found.num_shared[rows] = split + 1
        found.members[num_members : num_members + len(rows)] = rows
        ends = num_members + np.cumsum(_chunk_sizes(sizes))
        found.chunk_start[num_chunks + 1 : num_chunks + len(ends) + 1] = ends
        found.chunk_split[num_chunks : num_chunks + len(ends)] = split
        num_members, num_chunks = int(ends[-1]), num_chunks + len(ends)
    found.num_chunks[0] = num_chunks
    return found


def _groups(rows: NDArray[np.int64], columns: Ints) -> tuple[NDArray[np.int64], Ints]:
    """Those of rows (n,) whose columns (B, SPLIT_TILES) another one has too, equals together, and
    the sizes of the groups that they form."""
    ordered = rows[np.argsort(columns[rows, -1], kind="stable")]
    keys = columns[ordered]
    is_first = np.ones(len(ordered) + 1, np.bool_)
    is_first[1:-1] = (keys[1:] != keys[:-1]).any(axis=1)
    sizes = np.diff(np.flatnonzero(is_first))
    is_group = sizes > 1
    return ordered[np.repeat(is_group, sizes)], sizes[is_group].astype(np.int32)


def _chunk_sizes(sizes: Ints) -> Ints:
    """Groups cut into chunks: full ones, then what is left."""
    counts = -(-sizes // CHUNK_MEMBERS)
    chunks = np.full(counts.sum(), CHUNK_MEMBERS, np.int32)
    chunks[np.cumsum(counts) - 1] = sizes - (counts - 1) * CHUNK_MEMBERS
    return chunks
