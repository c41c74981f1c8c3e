"""An output that is already there: whose it is, and its rows as parts when some must run again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from orcd_batch.data.location import Location
from orcd_batch.data.manifest import differences, differences_sentence, manifest_of
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.data.part_file import PART_SCHEMA, id_as_text
from orcd_batch.data.results import COMPUTED_SCHEMA
from orcd_batch.errors import InputError, OutputError


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A file at the output's place.

    stamp: its size and time in nanoseconds, which tell it from a later file. manifest: None when
    the file is not ours.
    """

    location: Location
    stamp: list[int]
    manifest: dict[str, Any] | None

    @classmethod
    def find(cls, location: Location) -> Self | None:
        """The file at `location`, or None where there is none. Raises OSError."""
        if not location.is_file():
            return None
        info = location.info()
        return cls(location, [info.size, info.mtime_ns or 0], _manifest(location))

    @property
    def needs_retry(self) -> bool:
        """Whether rows failed by infrastructure, which a resume runs again."""
        return bool(self.manifest and self.manifest.get("infrastructure_errors"))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises OutputError, with the next step, unless this is the output of the same job."""
        if self.manifest is None:
            raise OutputError(
                f"The output {self.location} exists and was not written by orcd_batch: choose "
                "another output, or replace the file with overwrite=true."
            )
        found = differences(identity, self.manifest.get("identity") or {})
        if found:
            raise OutputError(
                f"The output {self.location} holds the results of a different job "
                f"({differences_sentence(found)}): choose another output, or replace it with "
                "overwrite=true."
            )


def recovered_parts(location: Location, finished: FinishedOutput) -> Iterator[Any]:
    """The output's results as RecordBatches of PART_SCHEMA with whole input rows in each.

    Input rows are counted by their first sample. Raises InputError when the file is damaged.
    """
    prefix = (finished.manifest or {}).get("output_prefix", "")
    names = [prefix + name for name in ("id", *COMPUTED_SCHEMA.names)]
    parquet = ParquetInput(location)
    carried = pa.Table.from_batches([], PART_SCHEMA)
    next_row = 0
    for group in range(len(parquet.row_group_sizes)):
        for batch in parquet.batches(group, names):
            starts = np.asarray(batch.column(names[1])) == 0
            rows = next_row - 1 + np.cumsum(starts)
            next_row = int(rows[-1]) + 1
            table = pa.concat_tables([carried, _as_part(batch.select(names), rows)])
            whole = int(np.searchsorted(table.column("row_index").to_numpy(), next_row - 1))
            carried = table.slice(whole)
            yield from _as_batches(table.slice(0, whole))
    yield from _as_batches(carried)
    parquet.close()


def _as_part(batch: Any, rows: Any) -> Any:
    ids = [id_as_text(row_id) for row_id in batch.column(0).to_pylist()]
    arrays = [pa.array(rows, pa.int64()), pa.array(ids, pa.string()), *batch.columns[1:]]
    return pa.Table.from_arrays(arrays, schema=PART_SCHEMA)


def _as_batches(table: Any) -> Iterator[Any]:
    if table.num_rows:
        yield from table.combine_chunks().to_batches()


def _manifest(location: Location) -> dict[str, Any] | None:
    location.open().close()
    try:
        parquet = ParquetInput(location)
        try:
            return manifest_of(parquet)
        finally:
            parquet.close()
    except InputError:
        return None
