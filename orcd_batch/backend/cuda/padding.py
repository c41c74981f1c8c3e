"""Decode steps brought to a few fixed shapes, so that a graph recorded for one serves many.

What is added is invisible: a sequence with an empty context that writes no cache, whose row is
sampled greedily and read by nobody; and unused columns of the block tables. No bit of the other
rows depends on it.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import Batch, SampleBatch

# Widths of block tables come in powers of two from here on: one split of attention.
MIN_TABLE_WIDTH = 4

# Numbers of sequences up to these two; beyond them multiples of 64, half a tile of a product's
# rows, and of 128. Each is a graph to record, which costs a small model more than some rows more.
_FEW_SEQS, _MANY_SEQS = (1, 2, 4, 8, 16, 24, 32, 48, 64), 512

_PADDING_SAMPLING: Mapping[str, float] = {"top_p": 1.0, "repetition_penalty": 1.0}


def is_decode(batch: Batch, sampling: SampleBatch) -> bool:
    """Whether every sequence computes one token and gets one."""
    return len(batch.token_ids) == len(batch.context_lens) == len(sampling.position)


def step_sizes(max_seqs: int) -> list[int]:
    """The numbers of sequences that decode steps are padded to, ascending, up to max_seqs."""
    step = _FEW_SEQS[-1]
    sizes = (
        *_FEW_SEQS,
        *range(2 * step, _MANY_SEQS, step),
        *range(_MANY_SEQS, max_seqs, 2 * step),
    )
    return [*(size for size in sizes if size < max_seqs), max_seqs]


def table_width(width: int, max_blocks: int) -> int:
    """Columns of the padded block tables for tables of so many."""
    padded = MIN_TABLE_WIDTH
    while padded < width:
        padded *= 2
    return max(min(padded, max_blocks), width)


def pad_step(
    batch: Batch, sampling: SampleBatch, sizes: Sequence[int], max_blocks: int
) -> tuple[Batch, SampleBatch]:
    """The decode step at the next of `step_sizes`, its block tables as `table_width` has them."""
    num_seqs = sizes[bisect_left(sizes, len(batch.context_lens))]
    width = table_width(batch.block_tables.shape[1], max_blocks)
    return pad_decode(batch, num_seqs, width), pad_sampling(sampling, num_seqs)


def pad_decode(batch: Batch, num_seqs: int, width: int) -> Batch:
    """The decode step with num_seqs sequences and block tables (num_seqs, width)."""
    old_seqs, old_width = batch.block_tables.shape
    tables = np.zeros((num_seqs, width), np.int32)
    tables[:old_seqs, :old_width] = batch.block_tables
    return Batch(
        token_ids=_padded(batch.token_ids, num_seqs),
        positions=_padded(batch.positions, num_seqs),
        slot_mapping=_padded(batch.slot_mapping, num_seqs, -1),
        query_start=np.arange(num_seqs + 1, dtype=np.int32),
        context_lens=_padded(batch.context_lens, num_seqs),
        block_tables=tables,
        logits_rows=np.arange(num_seqs, dtype=np.int32),
    )


def pad_sampling(sampling: SampleBatch, num_rows: int) -> SampleBatch:
    """Greedy rows up to num_rows; seen_ids keep their length."""
    columns = {
        name: _padded(getattr(sampling, name), num_rows, _PADDING_SAMPLING.get(name, 0))
        for name in SampleBatch.__slots__
        if not name.startswith("seen_")
    }
    start = _padded(sampling.seen_start, num_rows + 1, len(sampling.seen_ids))
    return SampleBatch(**columns, seen_ids=sampling.seen_ids, seen_start=start)


def _padded(array: NDArray[np.generic], size: int, value: float = 0) -> NDArray[np.generic]:
    padded = np.full(size, value, array.dtype)
    padded[: len(array)] = array
    return padded
