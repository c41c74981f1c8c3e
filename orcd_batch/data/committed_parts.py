"""The directory of committed parts: rows are added in any order and read back in input order."""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orcd_batch.data.durable import TEMPORARY_SUFFIX, put
from orcd_batch.data.location import Location
from orcd_batch.data.part_file import PART_SCHEMA, encode_part, read_part, retries
from orcd_batch.data.part_index import PartIndex
from orcd_batch.errors import OutputError

_PART_NAME = re.compile(r"part-(\d{6,})\.arrow")
_MAX_OPEN_PARTS = 8
_RECORD_COLUMNS = (
    *("row_index", "id", "sample_index", "token_hash", "numerics_hash"),
    *("completion_tokens", "error_kind"),
)


class CommittedParts:
    """Parts `part-000000.arrow`, … in one directory; a row that is in several counts in the newest.

    Raises OutputError for a damaged part, OSError where the file system fails.
    """

    def __init__(self, directory: Location) -> None:
        self.directory = directory
        self.index = PartIndex()
        self._num_rows = 0
        self._num_bytes = 0
        self._next = 0
        self._open: OrderedDict[int, Any] = OrderedDict()

    def numbers(self) -> list[int]:
        """The numbers of the parts there are, ascending."""
        names = [file.name for file in self.directory.files_below(recursive=False)]
        return sorted(int(match[1]) for match in map(_PART_NAME.fullmatch, names) if match)

    def load(self) -> None:
        """Indexes the parts of an earlier run and removes what it left half written."""
        self._remove_temporary()
        for number in self.numbers():
            batch = read_part(self._location(number), ["row_index", "error_kind"])
            self._index(number, batch.column(0).to_numpy(), retries(batch.column(1)))
            self._num_bytes += self._location(number).info().size

    def add(self, batch: Any) -> None:
        """Commits a RecordBatch of PART_SCHEMA, sorted by row, as the next part."""
        data = encode_part(batch)
        put(self._location(self._next), data)
        self._num_bytes += len(data)
        self._index(
            self._next, batch.column("row_index").to_numpy(), retries(batch.column("error_kind"))
        )

    @property
    def bytes_per_row(self) -> int:
        return self._num_bytes // max(1, self._num_rows) + 1

    def gather(self, first: int, end: int) -> Any:
        """The results of input rows first … end - 1, as a Table sorted by row and sample.

        Raises OutputError when a row has no result.
        """
        places = self.index.parts_of(np.arange(first, end))
        if (places < 0).any():
            row = first + int(np.argmax(places < 0))
            raise OutputError(f"Row {row} has no result yet: run the same command again.")
        slices = [self._slice(int(number), first, end) for number in np.unique(places)]
        table = pa.Table.from_batches(slices, PART_SCHEMA)
        if len(slices) == 1:
            return table
        rows = table.column("row_index").to_numpy()
        return table.combine_chunks().take(pa.array(np.argsort(rows, kind="stable")))

    def record_batches(self) -> Iterator[Any]:
        """What the run hash and the totals need of every result, a RecordBatch a part.

        Ids are as a part has them; of a row in several parts only the newest counts.
        """
        for number in self.numbers():
            batch = read_part(self._location(number), _RECORD_COLUMNS)
            newest = self.index.parts_of(batch.column("row_index").to_numpy()) == number
            yield batch if newest.all() else batch.filter(pa.array(newest))

    def clear(self) -> None:
        """Deletes the parts and what was left half written; of other files nothing."""
        self._open.clear()
        self._remove_temporary()
        for number in self.numbers():
            self.directory.filesystem.delete_file(self._location(number).path)

    def _remove_temporary(self) -> None:
        if self.directory.local:
            for file in self.directory.files_below(recursive=False):
                if file.name.endswith(TEMPORARY_SUFFIX):
                    os.unlink(file.path)

    def _location(self, number: int) -> Location:
        return self.directory.child(f"part-{number:06d}.arrow")

    def _index(self, number: int, rows: NDArray[np.int64], retry: NDArray[np.bool_]) -> None:
        if len(rows) and (rows[0] < 0 or (np.diff(rows) < 0).any()):
            raise OutputError(
                f"The part {self._location(number)} is damaged (its rows are not in order): "
                "delete it to recompute it."
            )
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self.index.mark_all(rows[starts], np.unique(rows[retry]))
        self.index.place(rows, number)
        self._num_rows += len(starts)
        self._next = number + 1

    def _slice(self, number: int, first: int, end: int) -> Any:
        """The part's rows in range, without those that a newer part holds again."""
        if number not in self._open:
            self._open[number] = read_part(self._location(number))
        self._open.move_to_end(number)
        while len(self._open) > _MAX_OPEN_PARTS:
            self._open.popitem(last=False)
        batch = self._open[number]
        rows = batch.column("row_index").to_numpy()
        low, high = np.searchsorted(rows, [first, end]).tolist()
        newest = self.index.parts_of(rows[low:high]) == number
        part = batch.slice(low, high - low)
        return part if newest.all() else part.filter(pa.array(newest))
