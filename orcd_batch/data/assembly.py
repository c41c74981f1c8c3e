"""The finished output: input rows beside their results, in input order, streamed to one file."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data.committed_parts import CommittedParts
from orcd_batch.data.dataset import InputDataset
from orcd_batch.data.durable import TEMPORARY_SUFFIX, publish, sync_path
from orcd_batch.data.location import Location
from orcd_batch.data.manifest import MANIFEST_KEY, encode_manifest
from orcd_batch.data.results import COMPUTED_SCHEMA

_CHUNK_BYTES = 4 * 2**20
_ROW_GROUP_BYTES = 16 * 2**20
_MAX_ROW_GROUP_ROWS = 65_536
_COMPRESSION = "zstd"
_DISTINCT_COLUMNS = (
    *("completion", "logprob", "token_logprobs", "margins", "fingerprints"),
    *("token_hash", "numerics_hash"),
)


def output_schema(dataset: InputDataset, manifest: Mapping[str, Any]) -> Any:
    """The output's pyarrow schema: kept input columns, computed ones, and the manifest."""
    columns = dataset.columns
    fields = [dataset.schema.field(name) for name in columns.kept]
    if columns.output_id not in columns.kept:
        fields.append(pa.field(columns.output_id, dataset.id_type))
    prefix = dataset.options.output_prefix
    fields += [field.with_name(prefix + field.name) for field in COMPUTED_SCHEMA]
    metadata = {**(dataset.schema.metadata or {}), MANIFEST_KEY: encode_manifest(manifest)}
    return pa.schema(fields, metadata=metadata)


def write_output(
    output: Location, dataset: InputDataset, parts: CommittedParts, manifest: Mapping[str, Any]
) -> None:
    """Writes the whole output and makes it appear at once.

    Memory is bounded by a row group. Raises OutputError, InputError, OSError, ArrowException.
    """
    schema, prefix = output_schema(dataset, manifest), dataset.options.output_prefix
    if not output.local:
        _write_remote(output, schema, prefix, _tables(schema, dataset, parts))
        return
    temporary = parts.directory.path + "/output.parquet" + TEMPORARY_SUFFIX
    try:
        with pa.OSFile(temporary, "wb") as sink:
            _write(sink, schema, prefix, _tables(schema, dataset, parts))
        sync_path(temporary)
        publish(temporary, output.path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _write_remote(output: Location, schema: Any, prefix: str, tables: Iterator[Any]) -> None:
    """An upload shows up when it is closed; one that fails is deleted again."""
    try:
        with output.filesystem.open_output_stream(output.path) as sink:
            _write(sink, schema, prefix, tables)
    except BaseException:
        output.filesystem.delete_file(output.path)
        raise


def _write(sink: Any, schema: Any, prefix: str, tables: Iterator[Any]) -> None:
    options = {"compression": _COMPRESSION, "use_dictionary": _repetitive_columns(schema, prefix)}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        pending: list[Any] = []
        num_rows = num_bytes = 0
        for table in tables:
            pending.append(table)
            num_rows += table.num_rows
            num_bytes += table.nbytes
            if num_rows >= _MAX_ROW_GROUP_ROWS or num_bytes >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(pending))
                pending, num_rows, num_bytes = [], 0, 0
        if pending:
            writer.write_table(pa.concat_tables(pending))


def _repetitive_columns(schema: Any, prefix: str) -> list[str]:
    """The leaf columns worth a dictionary: all but the computed ones that hardly ever repeat."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    paths = [leaves.column(i).path for i in range(len(leaves))]
    distinct = {prefix + name for name in _DISTINCT_COLUMNS}
    return [path for path in paths if path.split(".")[0] not in distinct]


def _tables(schema: Any, dataset: InputDataset, parts: CommittedParts) -> Iterator[Any]:
    columns = dataset.columns
    needed = list(columns.kept)
    if columns.id is not None and columns.id not in needed:
        needed.append(columns.id)
    step = max(1, _CHUNK_BYTES // parts.bytes_per_row)
    for first, batch in dataset.batches(needed):
        for offset in range(0, batch.num_rows, step):
            rows = batch.slice(offset, step)
            yield _joined(schema, dataset, first + offset, rows, parts)


def _joined(
    schema: Any, dataset: InputDataset, first: int, rows: Any, parts: CommittedParts
) -> Any:
    """Input rows, each repeated once per sample, beside their results."""
    columns = dataset.columns
    results = parts.gather(first, first + rows.num_rows)
    owners = results.column("row_index").to_numpy() - first
    ids = pa.array(np.arange(first, first + rows.num_rows))
    if columns.id is not None:
        ids = rows.column(columns.id)
    inputs = {name: rows.column(name) for name in columns.kept}
    if columns.output_id not in inputs:
        inputs[columns.output_id] = ids
    arrays = [repeated(array, owners) for array in inputs.values()]
    arrays += [results.column(field.name) for field in COMPUTED_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=schema)


def repeated(array: Any, owners: Any) -> Any:
    """The array's entries at `owners` (ascending, each at least once), whatever their type."""
    if len(owners) == len(array):
        return array
    try:
        return array.take(pa.array(owners))
    except pa.ArrowNotImplementedError:
        return pa.concat_arrays([array.slice(int(owner), 1) for owner in owners])
