"""Parquet in: files opened and checked once, rows streamed a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from orcd_batch.data.columns import Columns, DatasetOptions, InputKind, choose_columns, listed
from orcd_batch.data.content_hash import content_hash
from orcd_batch.data.input_files import find_files, would_read
from orcd_batch.data.location import Location
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.data.row_ids import check_ids, ids_of
from orcd_batch.data.row_values import BadCell, cells, messages_problem, token_ids_problem
from orcd_batch.data.sampling_values import overrides_of
from orcd_batch.errors import InputError, OutputError

__all__ = ["DatasetOptions", "InputDataset", "InputRow"]


@dataclass(frozen=True, slots=True)
class InputRow:
    """One input row: exactly one of prompt, messages, token_ids is set unless `error` is.

    index: position in the whole input, from 0. id: the id column's value, else the index.
    overrides: sampling parameters given by this row. error: why the row cannot be run.
    """

    index: int
    id: int | str
    prompt: str | None = None
    messages: Sequence[dict[str, Any]] | None = None
    token_ids: tuple[int, ...] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _InputFile:
    location: Location
    stamp: tuple[int, int | None]
    row_group_sizes: tuple[int, ...]


class InputDataset:
    """The rows of one or more Parquet files with one schema, in order.

    schema: pyarrow schema of the input, with its metadata. num_rows: after `limit`.
    columns: which column means what. paths: the files read.
    """

    def __init__(
        self,
        listed: str | Sequence[str],
        files: Sequence[_InputFile],
        schema: Any,
        columns: Columns,
        options: DatasetOptions,
    ) -> None:
        self._listed = [listed] if isinstance(listed, str) else list(listed)
        self._files = files
        self.schema = schema
        self.columns = columns
        self.options = options
        total = sum(sum(file.row_group_sizes) for file in files)
        self.num_rows = total if options.limit is None else min(total, options.limit)

    @classmethod
    def open(cls, paths: str | Sequence[str], options: DatasetOptions) -> "InputDataset":
        """Opens and checks everything that can be wrong with the input as a whole.

        paths: files, directories, globs, or URIs that pyarrow.fs opens. The id column is read
        once to see that no id is missing or repeated. Raises InputError.
        """
        files: list[_InputFile] = []
        schema: Any = None
        for location in find_files(paths):
            info = location.info()
            parquet = ParquetInput(location)
            schema = parquet.schema if schema is None else _agreed(schema, parquet, files[0])
            stamp = (info.size, info.mtime_ns)
            files.append(_InputFile(location, stamp, tuple(parquet.row_group_sizes)))
            parquet.close()
        dataset = cls(paths, files, schema, choose_columns(schema, options), options)
        dataset._check_ids()
        return dataset

    @property
    def kind(self) -> InputKind:
        """Which of the three inputs is in use."""
        return self.columns.kind

    @property
    def paths(self) -> list[str]:
        return [str(file.location) for file in self._files]

    @property
    def id_type(self) -> Any:
        """The pyarrow type of the output's id column."""
        name = self.columns.id
        return pa.int64() if name is None else self.schema.field(name).type

    def check_output(self, output: str) -> None:
        """Raises OutputError when this input holds the output, or would hold it once written."""
        if would_read(self._listed, output):
            raise OutputError(
                f"The output {output} would lie among the input files of data="
                f"{', '.join(self._listed)}: name one elsewhere with output=FILE.parquet."
            )

    def content_hash(self) -> str:
        """Hex SHA-256 of the files' bytes in order, whatever their paths."""
        return content_hash([file.location for file in self._files])

    def rows(self, skip: Callable[[int], bool] | None = None) -> Iterator[InputRow]:
        """Streams the rows in input order, leaving out those whose index `skip` accepts.

        A cell that cannot be used becomes its row's `error`. Raises InputError when a row group
        does not decode.
        """
        for first, batch in self.batches(self.columns.read, skip):
            yield from self._rows_of(first, batch, skip)

    def batches(
        self, columns: Sequence[str], skip: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """The named columns as (index of the first row, pyarrow RecordBatch), in input order.

        A row group whose every row `skip` accepts is not read. Raises InputError, also when a
        file has changed since it was opened.
        """
        first = 0
        for file in self._files:
            size = sum(file.row_group_sizes)
            if first >= self.num_rows:
                return
            if skip is None or not _all_skipped(skip, first, min(first + size, self.num_rows)):
                yield from self._file_batches(file, first, columns, skip)
            first += size

    def _file_batches(
        self,
        file: _InputFile,
        first: int,
        columns: Sequence[str],
        skip: Callable[[int], bool] | None,
    ) -> Iterator[tuple[int, Any]]:
        info = file.location.info()
        if (info.size, info.mtime_ns) != file.stamp:
            raise InputError(f"{file.location} has changed since the job began: start it again.")
        parquet = ParquetInput(file.location)
        try:
            for group, size in enumerate(file.row_group_sizes):
                end = min(first + size, self.num_rows)
                if first < end and not (skip and _all_skipped(skip, first, end)):
                    yield from self._group_batches(parquet, group, first, columns)
                first += size
        finally:
            parquet.close()

    def _group_batches(
        self, parquet: ParquetInput, group: int, first: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, Any]]:
        for batch in parquet.batches(group, columns):
            wanted = batch.slice(0, max(0, self.num_rows - first))
            if wanted.num_rows:
                yield first, wanted.select(list(columns))
            first += batch.num_rows

    def _check_ids(self) -> None:
        name = self.columns.id
        if name is None:
            return

        def stream() -> Iterator[tuple[int, Any]]:
            for first, batch in self.batches([name]):
                yield first, batch.column(0)

        check_ids(name, stream)

    def _rows_of(
        self, first: int, batch: Any, skip: Callable[[int], bool] | None
    ) -> Iterator[InputRow]:
        names = self.columns
        inputs = cells(batch.column(names.input))
        ids: Sequence[int | str] = range(first, first + batch.num_rows)
        if names.id is not None:
            ids = ids_of(names.id, first, batch.column(names.id))
        sampling = {name: cells(batch.column(name)) for name in names.sampling}
        is_plain = self.kind == "prompt" and not sampling
        for offset, value in enumerate(inputs):
            index = first + offset
            if skip is not None and skip(index):
                continue
            if is_plain and isinstance(value, str):  # what `_row` gives, sooner
                yield InputRow(index, ids[offset], value)
            else:
                values = {name: column[offset] for name, column in sampling.items()}
                yield self._row(index, ids[offset], value, values)

    def _row(self, index: int, row_id: int | str, value: Any, values: dict[str, Any]) -> InputRow:
        overrides, error = overrides_of(values)
        problem = _problem(self.kind, value)
        if problem is not None:
            error = f"The column {self.columns.input} {problem}."
        if error is not None:
            return InputRow(index, row_id, overrides=overrides, error=error)
        if self.kind == "prompt":
            return InputRow(index, row_id, prompt=value, overrides=overrides)
        if self.kind == "messages":
            messages = [dict(message) for message in value]
            return InputRow(index, row_id, messages=messages, overrides=overrides)
        return InputRow(index, row_id, token_ids=tuple(value), overrides=overrides)


def _problem(kind: InputKind, value: Any) -> str | None:
    if value is None:
        return "is null"
    if isinstance(value, BadCell):
        return value.reason
    if kind == "prompt":
        return None
    return messages_problem(value) if kind == "messages" else token_ids_problem(value)


def _all_skipped(skip: Callable[[int], bool], first: int, end: int) -> bool:
    return all(skip(index) for index in range(first, end))


def _agreed(schema: Any, parquet: ParquetInput, first: _InputFile) -> Any:
    """The common schema: a field is nullable when it is so in any file."""
    found = parquet.schema
    if schema.names != found.names:
        raise InputError(
            f"{parquet.location} has the columns {listed(found.names)} where "
            f"{first.location} has {listed(schema.names)}: files read together need one schema."
        )
    fields = []
    for ours, theirs in zip(schema, found, strict=True):
        if ours.type != theirs.type:
            raise InputError(
                f"The column {ours.name} has type {theirs.type} in {parquet.location} and "
                f"{ours.type} in {first.location}: files read together need one schema."
            )
        fields.append(ours.with_nullable(ours.nullable or theirs.nullable))
    return pa.schema(fields, metadata=schema.metadata)
