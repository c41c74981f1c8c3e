"""A step's arrays on the GPU, with what the host knows of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.attention import SPLIT_TILES
from orcd_batch.backend.cuda.shared_splits import SharedSplits
from orcd_batch.backend.cuda.staging import Staging
from orcd_batch.backend.ops import Batch


@dataclass(frozen=True, slots=True)
class PlacedBatch(Batch):
    """num_leading: sequences of one token at the front, which attention need not look for among
    the longer ones. shared: which splits decoding sequences share; None without sequences.
    has_chunks: whether there are any."""

    num_leading: int
    shared: SharedSplits | None = None
    has_chunks: bool = False

    @property
    def long_sequences(self) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """query_start, context_lens and block_tables from the first longer sequence on."""
        first, count = self.num_leading, self.context_lens.shape[0]
        arrays: tuple[Any, ...] = (self.query_start, self.context_lens, self.block_tables)
        start, lengths, tables = arrays
        return start.rows(first, count + 1), lengths.rows(first, count), tables.rows(first, count)


def place_batch(staging: Staging, batch: Batch, shared: SharedSplits | None = None) -> PlacedBatch:
    """The same batch, and what it shares, on the GPU: one asynchronous copy of all arrays."""
    names = Batch.__slots__
    arrays = [np.ascontiguousarray(getattr(batch, name), np.int32) for name in names]
    if shared is not None:
        arrays += [getattr(shared, name) for name in SharedSplits.__slots__]
    longer = np.flatnonzero(np.diff(batch.query_start) != 1)
    num_leading = int(longer[0]) if longer.size else len(batch.context_lens)
    placed = staging.place("batch", arrays)
    on_device = None if shared is None else SharedSplits(*placed[len(names) :])
    fields = dict(zip(names, placed, strict=False))
    has_chunks = shared is not None and not shared.is_empty
    return PlacedBatch(**fields, num_leading=num_leading, shared=on_device, has_chunks=has_chunks)


def batch_bytes(max_tokens: int, max_seqs: int, max_blocks: int) -> int:
    """Bytes of the largest batch that `place_batch` places."""
    splits = max_seqs * (max_blocks // SPLIT_TILES)
    values = 3 * max_tokens + 4 * (max_seqs + 1) + max_seqs * max_blocks + 2 * splits + 2
    return 4 * values + 16 * (len(Batch.__slots__) + len(SharedSplits.__slots__))
