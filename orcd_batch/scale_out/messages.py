"""What the driver and a worker tell each other."""

import pickle
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from orcd_batch.config import JobOptions, SamplingOptions
from orcd_batch.data import InputRow

_values = attrgetter(*(field.name for field in fields(InputRow)))


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told.

    options: of the first job, as this worker should run it. sampling: of each job. input_hash: for
    the identity. driver_node: Ray's name of the node that the driver runs on.
    """

    options: JobOptions
    sampling: Sequence[SamplingOptions]
    input_hash: str
    driver_node: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker could not do what it was told.

    fatal: another one could not either. log: as in Reply.
    """

    sentence: str
    fatal: bool
    node: str = field(default_factory=socket.gethostname)
    log: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Who a worker is: its place, its identity of the first job, what it runs on."""

    node: str
    process: int
    identity: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker's engine, ready."""

    max_num_seqs: int
    description: dict[str, Any]
    memory: dict[str, int]


@dataclass(slots=True)
class Reply:
    """What happened since the last reply.

    batches: finished rows as (job, RecordBatch of PART_SCHEMA). num_sampled_tokens, statistics: of
    the engine since it was built. log: new lines of the worker's log, when it is not a file of the
    driver's node.
    """

    batches: list[tuple[int, Any]] = field(default_factory=list)
    num_sampled_tokens: int = 0
    statistics: dict[str, float] = field(default_factory=dict)
    log: str = ""


def packed(rows: Iterable[tuple[InputRow, Collection[int]]]) -> bytes:
    """Rows and the jobs that want them as a message: columns of plain values, cheaper than rows."""
    values = [(*_values(row), jobs) for row, jobs in rows]
    return pickle.dumps(list(zip(*values, strict=True)), pickle.HIGHEST_PROTOCOL)


def unpacked(message: bytes) -> list[tuple[InputRow, Collection[int]]]:
    *columns, jobs = pickle.loads(message)
    return list(zip(map(InputRow, *columns), jobs, strict=True))
