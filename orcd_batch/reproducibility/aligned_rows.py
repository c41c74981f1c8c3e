"""Runs of the same rows, read side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orcd_batch.errors import InputError
from orcd_batch.reproducibility.run_output import RunOutput

_CHUNK_ROWS = 512


def aligned_rows(outputs: Sequence[RunOutput], columns: Sequence[str]) -> Iterator[list[Any]]:
    """Tables of the same input rows from every run, whole input rows in each, in bounded memory.

    columns: computed ones, `id` and `sample_index` among them. Raises InputError when the runs do
    not hold the same ids in the same order.
    """
    total = outputs[0].num_rows
    if any(output.num_rows != total for output in outputs):
        raise _not_same_rows(outputs)
    streams = [output.batches(columns) for output in outputs]
    held: list[Any] = [None] * len(outputs)
    taken, wanted = 0, _CHUNK_ROWS
    while taken < total:
        held = [_filled(table, stream, wanted) for table, stream in zip(held, streams, strict=True)]
        size = min(table.num_rows for table in held)
        if taken + size < total:
            size = int(np.flatnonzero(sample_indices(held[0])[:size] == 0)[-1])
        if size == 0:
            wanted *= 2
            continue
        tables = [table.slice(0, size) for table in held]
        _check_same_rows(outputs, tables)
        yield tables
        held = [table.slice(size) for table in held]
        taken += size


def _tables(stream: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    for _, batch in stream:
        yield pa.Table.from_batches([batch])


def _filled(table: Any, stream: Iterator[tuple[int, Any]], wanted: int) -> Any:
    """The table with batches added until it holds the rows wanted, or the run has ended."""
    tables = [] if table is None else [table]
    num_rows = sum(held.num_rows for held in tables)
    for more in _tables(stream) if num_rows < wanted else ():
        tables.append(more)
        num_rows += more.num_rows
        if num_rows >= wanted:
            break
    return pa.concat_tables(tables)


def sample_indices(table: Any) -> NDArray[np.int32]:
    """(rows,): 0 where an input row begins."""
    return np.asarray(table.column("sample_index"))


def _check_same_rows(outputs: Sequence[RunOutput], tables: Sequence[Any]) -> None:
    for table in tables[1:]:
        for name in ("id", "sample_index"):
            if not table.column(name).equals(tables[0].column(name)):
                raise _not_same_rows(outputs)


def _not_same_rows(outputs: Sequence[RunOutput]) -> InputError:
    return InputError(
        f"{outputs[0].path} and other jobs of its group do not hold the same rows: the data "
        "changed between the jobs; run the sweep again with overwrite=true."
    )
