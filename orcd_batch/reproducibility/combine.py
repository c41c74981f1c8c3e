"""A sweep's outputs as one Parquet file, with what differs between the jobs as typed columns."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data.durable import TEMPORARY_SUFFIX, publish, sync_path
from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.manifest import encode_manifest
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.errors import InputError, OutputError
from orcd_batch.reproducibility.sweep_directory import FinishedJob, Sweep, find_sweep

COMBINED_NAME = "combined.parquet"
SWEEP_KEY = b"orcd_batch_sweep"
JOB_COLUMN = "job_id"

_SWEEP_TAG = b"orcd_batch sweep\n"
_ROW_GROUP_BYTES = 16 * 2**20
_MAX_ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Combined:
    """The combined file. sweep_hash: one hash over all jobs. written: False when it was current."""

    path: Path
    num_rows: int
    num_jobs: int
    sweep_hash: str
    written: bool


def combine(sweep: Sweep | str | Path) -> Combined:
    """Writes `combined.parquet` into the sweep's directory; unfinished jobs are left out.

    Rows: job after job in the order of the parameters, each in its own order. Columns: `job_id`,
    one per parameter (dotted, typed), then the jobs' own. Memory is bounded by one row group; the
    file appears at once, and a file of the same jobs and results is left as it is. Raises
    InputError when no job is finished, or when the jobs' columns do not fit together; OutputError
    when the file cannot be written.
    """
    if not isinstance(sweep, Sweep):
        sweep = find_sweep(sweep)
    if not sweep.jobs:
        raise InputError(f"{sweep.directory} holds no finished job: run the sweep to its end.")
    path = sweep.directory / COMBINED_NAME
    facts = _facts(sweep)
    schema = combined_schema(sweep).with_metadata({SWEEP_KEY: encode_manifest(facts)})
    num_rows = sum(job["num_rows"] for job in facts["jobs"])
    current = _is_current(path, schema, num_rows)
    if not current:
        with reported_as(OutputError, f"{path} cannot be written"):
            _write(path, sweep, schema)
    return Combined(path, num_rows, len(sweep.jobs), facts["sweep_hash"], not current)


def combined_schema(sweep: Sweep) -> Any:
    """The combined file's columns: job id, parameters, then every column of the jobs' outputs.

    A column that only some jobs have is null for the others. Raises InputError when a column has
    two types.
    """
    outputs: dict[str, tuple[Any, str]] = {}
    for job in sweep.jobs:
        parquet = ParquetInput(Location.parse(job.output))
        fields = list(parquet.schema)
        parquet.close()
        for field in fields:
            known, first = outputs.setdefault(field.name, (field.type, job.job_id))
            if known != field.type:
                raise InputError(
                    f"The column {field.name} has type {known} in job {first} and {field.type} in "
                    f"{job.job_id}, so the sweep's outputs cannot be one file: read them one by "
                    "one, or give the data one type."
                )
    own = [(JOB_COLUMN, pa.string())]
    own += [
        (name, _type([job.parameters[name] for job in sweep.jobs])) for name in sweep.parameters
    ]
    ours = [(_free_name(name, outputs), data_type) for name, data_type in own]
    return pa.schema([*ours, *((name, found[0]) for name, found in outputs.items())])


def sweep_hash(run_hashes: Sequence[str]) -> str:
    """Hex SHA-256 over a domain tag and the sorted run hashes of the finished jobs."""
    return hashlib.sha256(_SWEEP_TAG + "".join(sorted(run_hashes)).encode()).hexdigest()


def _facts(sweep: Sweep) -> dict[str, Any]:
    """What the combined file says of itself; equal facts mean equal rows."""
    return {
        "sweep_hash": sweep_hash([str(job.manifest.get("run_hash")) for job in sweep.jobs]),
        "parameters": list(sweep.parameters),
        "jobs": [_job_facts(job) for job in sweep.jobs],
    }


def _job_facts(job: FinishedJob) -> dict[str, Any]:
    identity = json.dumps(job.manifest.get("identity"), sort_keys=True)
    parquet = ParquetInput(Location.parse(job.output))
    num_rows = parquet.num_rows
    parquet.close()
    return {
        "job_id": job.job_id,
        "parameters": job.parameters,
        "run_hash": job.manifest.get("run_hash"),
        "identity_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "num_rows": num_rows,
    }


def _is_current(path: Path, schema: Any, num_rows: int) -> bool:
    if not path.is_file():
        return False
    try:
        parquet = ParquetInput(Location.parse(str(path)))
    except InputError:
        return False
    same = parquet.num_rows == num_rows and parquet.schema.equals(schema, check_metadata=False)
    metadata = parquet.metadata.metadata or {}
    parquet.close()
    return same and metadata.get(SWEEP_KEY) == schema.metadata[SWEEP_KEY]


def _write(path: Path, sweep: Sweep, schema: Any) -> None:
    temporary = f"{path}.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in _row_groups(sweep, schema):
                writer.write_table(table)
        sync_path(temporary)
        publish(temporary, str(path.resolve()))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _row_groups(sweep: Sweep, schema: Any) -> Iterator[Any]:
    """The rows of all jobs as tables of a row group each."""
    pending: list[Any] = []
    num_rows = num_bytes = 0
    for batch in _batches(sweep, schema):
        pending.append(batch)
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
        if num_rows >= _MAX_ROW_GROUP_ROWS or num_bytes >= _ROW_GROUP_BYTES:
            yield pa.Table.from_batches(pending, schema)
            pending, num_rows, num_bytes = [], 0, 0
    if pending:
        yield pa.Table.from_batches(pending, schema)


def _batches(sweep: Sweep, schema: Any) -> Iterator[Any]:
    num_own = 1 + len(sweep.parameters)
    for job in sweep.jobs:
        values = [job.job_id, *(job.parameters[name] for name in sweep.parameters)]
        scalars = [
            pa.scalar(_cell(value, field.type), field.type)
            for value, field in zip(values, list(schema)[:num_own], strict=True)
        ]
        parquet = ParquetInput(Location.parse(job.output))
        names = parquet.schema.names
        for group in range(len(parquet.row_group_sizes)):
            for batch in parquet.batches(group, names):
                columns = [pa.repeat(scalar, batch.num_rows) for scalar in scalars]
                columns += [
                    batch.column(field.name)
                    if field.name in names
                    else pa.nulls(batch.num_rows, field.type)
                    for field in list(schema)[num_own:]
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
        parquet.close()


def _type(values: Sequence[Any]) -> Any:
    """The column type that holds a parameter's values; JSON text where they have no common one."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, bool) for value in present):
        return pa.bool_()
    if present and all(type(value) is int for value in present):
        if max(present) >= 2**63 and min(present) >= 0:
            return pa.uint64()
        return pa.int64()
    if present and all(type(value) in (int, float) for value in present):
        return pa.float64()
    if present and all(_is_texts(value) for value in present):
        return pa.list_(pa.string())
    return pa.string()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _cell(value: Any, data_type: Any) -> Any:
    """A parameter's value as its column holds it."""
    if value is not None and pa.types.is_string(data_type) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if value is not None and pa.types.is_floating(data_type) else value


def _free_name(name: str, taken: Any) -> str:
    """A name no output column has: `sweep.` is put before it until it is free."""
    while name in taken:
        name = f"sweep.{name}"
    return name
