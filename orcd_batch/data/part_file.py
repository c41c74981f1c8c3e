"""One committed part: finished rows as an Arrow IPC file, sorted by row, read without copying."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.results import COMPUTED_SCHEMA, SampleResult, computed_columns
from orcd_batch.errors import OutputError

# The id is kept as text with its type in front ("i5", "s5"): a part does not know the input.
PART_SCHEMA = pa.schema(
    [pa.field("row_index", pa.int64()), pa.field("id", pa.string()), *COMPUTED_SCHEMA]
)


def id_as_text(row_id: int | str) -> str:
    return f"s{row_id}" if isinstance(row_id, str) else f"i{row_id}"


def id_from_text(text: str) -> int | str:
    return text[1:] if text[0] == "s" else int(text[1:])


def part_batch(results: Sequence[SampleResult]) -> Any:
    """Results as a RecordBatch of PART_SCHEMA, sorted by row and sample."""
    results = sorted(results, key=attrgetter("row_index", "sample_index"))
    head = [
        pa.array([result.row_index for result in results], pa.int64()),
        pa.array([id_as_text(result.id) for result in results], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(head + computed_columns(results), schema=PART_SCHEMA)


def merged(batches: Sequence[Any]) -> Any:
    """RecordBatches of PART_SCHEMA as one, sorted by row; a row's samples stand in one of them."""
    table = pa.Table.from_batches(batches, PART_SCHEMA).combine_chunks()
    rows = table.column("row_index").to_numpy()
    if (np.diff(rows) < 0).any():
        table = table.take(pa.array(np.argsort(rows, kind="stable")))
    return table.to_batches()[0]


def retries(error_kinds: Any) -> NDArray[np.bool_]:
    """Which entries of an error_kind column are infrastructure errors."""
    found = pc.equal(error_kinds, "infrastructure").fill_null(False)
    mask: NDArray[np.bool_] = found.to_numpy(zero_copy_only=False)
    return mask


def encode_part(batch: Any) -> memoryview:
    """The bytes of an Arrow IPC file with this one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PART_SCHEMA) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def read_part(location: Location, columns: Sequence[str] | None = None) -> Any:
    """A part's RecordBatch, or only the named columns of it.

    A local part is mapped, not read. Raises OutputError naming the part when it is damaged.
    """
    with reported_as(OutputError, f"The part {location} is damaged; delete it to recompute it"):
        fields = None if columns is None else [PART_SCHEMA.names.index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        source = pa.memory_map(location.path) if location.local else location.open()
        reader = pa.ipc.open_file(source, options=options)
        if reader.num_record_batches != 1:
            raise ValueError(f"it holds {reader.num_record_batches} batches")
        return reader.get_batch(0)
