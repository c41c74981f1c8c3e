"""A step's arrays on the GPU, with what the host knows of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.staging import Staging
from orcd_batch.backend.ops import Batch


@dataclass(frozen=True, slots=True)
class PlacedBatch(Batch):
    """num_leading: sequences of one token at the front, which attention need not look for among
    the longer ones."""

    num_leading: int

    @property
    def long_sequences(self) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """query_start, context_lens and block_tables from the first longer sequence on."""
        first, count = self.num_leading, self.context_lens.shape[0]
        arrays: tuple[Any, ...] = (self.query_start, self.context_lens, self.block_tables)
        start, lengths, tables = arrays
        return start.rows(first, count + 1), lengths.rows(first, count), tables.rows(first, count)


def place_batch(staging: Staging, batch: Batch) -> PlacedBatch:
    """The same batch on the GPU: one asynchronous copy of all seven arrays."""
    names = Batch.__slots__
    arrays = [np.ascontiguousarray(getattr(batch, name), np.int32) for name in names]
    longer = np.flatnonzero(np.diff(batch.query_start) != 1)
    num_leading = int(longer[0]) if longer.size else len(batch.context_lens)
    placed = dict(zip(names, staging.place("batch", arrays), strict=True))
    return PlacedBatch(**placed, num_leading=num_leading)
