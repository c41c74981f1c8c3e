"""A finished output as verify and report see it: keyed by (typed id, sample index), streamed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.data.location import Location
from orcd_batch.data.manifest import manifest_of
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.data.results import COMPUTED_NAMES
from orcd_batch.errors import InputError, OrcdError
from orcd_batch.reproducibility.hashes import typed_id

OUTPUT_NAME = "completions.parquet"

# One output row: digests of its key, tokens and numerics, and its position in the file.
KEYED_ROW = np.dtype([("key", "S16"), ("tokens", "S16"), ("numerics", "S16"), ("row", "<i8")])
_ROWS_IN_MEMORY = 2_000_000


class RunOutput:
    """One output file of this program.

    path: an output file, or a run directory with a completions.parquet. manifest: as written.
    Raises InputError when there is no such file or it lacks a computed column.
    """

    def __init__(self, path: str) -> None:
        self.path = str(path)
        try:
            location = Location.parse(self.path)
        except OrcdError as error:
            raise InputError(str(error)) from error
        if location.is_directory():
            location = location.child(OUTPUT_NAME)
        if not location.is_file():
            raise InputError(
                f"{location} does not exist: name an output file or a run directory that is "
                "complete."
            )
        self._parquet = ParquetInput(location)
        self.location = location
        manifest = manifest_of(self._parquet)
        if manifest is None:
            raise InputError(f"{location} was not written by orcd_batch: it carries no manifest.")
        self.manifest = manifest
        self._prefix = str(manifest.get("output_prefix", ""))
        missing = [
            name for name in COMPUTED_NAMES if self._prefix + name not in self._parquet.schema.names
        ]
        if missing:
            raise InputError(
                f"{location} lacks the output columns {', '.join(missing)}: it was changed after "
                "the run."
            )

    @property
    def num_rows(self) -> int:
        return self._parquet.num_rows

    def batches(
        self, columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """The computed columns named (without prefix) as (first row, RecordBatch)."""
        names = [self._prefix + name for name in columns]
        sizes = self._parquet.row_group_sizes
        wanted = range(len(sizes)) if row_groups is None else row_groups
        for group in wanted:
            first = sum(sizes[:group])
            for batch in self._parquet.batches(group, names):
                yield first, batch.select(names).rename_columns(list(columns))
                first += batch.num_rows

    def pick(self, rows: NDArray[np.int64], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """The named columns of a few rows, as Python values by row."""
        if not len(rows):
            return {}
        rows = np.sort(rows)
        ends = np.cumsum(self._parquet.row_group_sizes)
        groups = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
        found: dict[int, dict[str, Any]] = {}
        for first, batch in self.batches(columns, groups):
            low, high = np.searchsorted(rows, [first, first + batch.num_rows]).tolist()
            for row in rows[low:high].tolist():
                found[row] = batch.slice(row - first, 1).to_pylist()[0]
        return found

    def keyed_rows(self, part: int = 0, num_parts: int = 1) -> NDArray[Any]:
        """The rows whose key falls into `part` of `num_parts`, as KEYED_ROW sorted by key.

        Raises InputError when two rows have the same id and sample index.
        """
        columns = ("id", "sample_index", "token_hash", "numerics_hash", "error_kind")
        pieces = [
            _keyed(first, [batch.column(name).to_pylist() for name in columns], part, num_parts)
            for first, batch in self.batches(columns)
        ]
        rows = np.concatenate([np.empty(0, KEYED_ROW), *pieces])
        rows = rows[np.argsort(rows["key"], kind="stable")]
        repeated = np.flatnonzero(rows["key"][1:] == rows["key"][:-1])
        if len(repeated):
            first, second = rows["row"][repeated[0] : repeated[0] + 2].tolist()
            raise InputError(
                f"{self.location} has the same id and sample_index in rows {first} and {second}: "
                "it was changed after the run."
            )
        return rows

    def close(self) -> None:
        self._parquet.close()


def num_passes(outputs: Sequence[RunOutput]) -> int:
    """How many parts the keys are split into, so that memory stays bounded."""
    return 1 + sum(output.num_rows for output in outputs) // _ROWS_IN_MEMORY


def find_outputs(path: str) -> list[str]:
    """The outputs a path means: a file, a run directory, or all runs below a sweep directory.

    Raises InputError when there are none.
    """
    if not os.path.isdir(path):
        return [path]
    found = sorted(str(file) for file in Path(path).rglob(OUTPUT_NAME))
    if not found:
        raise InputError(
            f"{path} holds no {OUTPUT_NAME}: name an output file, or a run or sweep directory "
            "with complete runs."
        )
    return found


def _keyed(first: int, columns: list[list[Any]], part: int, num_parts: int) -> NDArray[Any]:
    rows = []
    for row, (row_id, sample, tokens, numerics, kind) in enumerate(
        zip(*columns, strict=True), start=first
    ):
        key = _digest(b"%d " % sample + typed_id(row_id))
        if num_parts == 1 or int.from_bytes(key[:8], "little") % num_parts == part:
            outcome = (tokens, numerics) if kind is None else (f"error {kind}",) * 2
            rows.append((key, *(_digest(str(text).encode()) for text in outcome), row))
    return np.array(rows, dtype=KEYED_ROW)


def _digest(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16).digest()
