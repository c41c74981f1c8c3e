"""The jobs of a sweep: those that share model, data and engine run together, side by side."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orcd_batch.config import JobOptions
from orcd_batch.errors import ConfigError, Interrupted, OrcdError
from orcd_batch.interrupts import INTERRUPTED, Interrupts
from orcd_batch.job_run import Result, output_of, shown_path

log = logging.getLogger(__name__)

# Jobs of one group hold a lock and a log file open each; a process has some 1,000 files.
_MAX_GROUP_JOBS = 256
_NUM_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class SweepJob:
    """One job of a sweep. directory: its run directory. swept: what the sweep varies, as typed.

    name: the same as one text.
    """

    options: JobOptions
    directory: Path
    name: str
    swept: dict[str, str]


def run_sweep(jobs: Sequence[SweepJob], directory: Path) -> list[Result]:
    """Runs the jobs group by group; each job's document, or the error that ended it, in order.

    directory: of the sweep; `combined.parquet` there holds all finished outputs at the end.
    """
    from orcd_batch.sweep.view import GroupView, show_sweep

    results: dict[int, Result] = dict(_sharing_a_place(jobs))
    groups = list(_groups(jobs, [n for n in range(len(jobs)) if n not in results]))
    with Interrupts() as interrupts:
        for number, group in enumerate(groups, 1):
            view = GroupView(number, len(groups), len(group))
            found = _run_group([jobs[n] for n in group], view, interrupts)
            results |= zip(group, found, strict=True)
            if interrupts.requested:
                break
    results = {n: results.get(n, Interrupted(INTERRUPTED)) for n in range(len(jobs))}
    ordered = [results[number] for number in range(len(jobs))]
    show_sweep(jobs, ordered, _combined(ordered, directory))
    return ordered


def _run_group(group: Sequence[SweepJob], view: Any, interrupts: Interrupts) -> Sequence[Result]:
    """Runs jobs that share an engine; an error of what they share is the error of each."""
    from orcd_batch.job import run_jobs

    try:
        return run_jobs([(job.options, job.directory) for job in group], view, interrupts)
    except OrcdError as error:
        return [error] * len(group)


def _groups(jobs: Sequence[SweepJob], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Indices of jobs that differ in nothing but sampling and output, in order of the first."""
    by_shared: dict[str, list[int]] = {}
    for number in numbers:
        by_shared.setdefault(_shared_options(jobs[number].options), []).append(number)
    for group in by_shared.values():
        for first in range(0, len(group), _MAX_GROUP_JOBS):
            yield group[first : first + _MAX_GROUP_JOBS]


def _shared_options(options: JobOptions) -> str:
    """All options that jobs of one group must agree in, as text."""
    plain = asdict(options)
    for own in ("sampling", "output", "overwrite"):
        del plain[own]
    del plain["dataset"]["on_error"]
    return json.dumps(plain, sort_keys=True)


def _sharing_a_place(jobs: Sequence[SweepJob]) -> Iterator[tuple[int, ConfigError]]:
    """Jobs with one directory, or one output, each with its refusal: no order of them is right."""
    outputs = [output_of(job.options, job.directory) for job in jobs]
    for numbers in _alike([o if "://" in o else os.path.realpath(o) for o in outputs]):
        error = ConfigError(
            f"{outputs[numbers[0]]} would be the output of {len(numbers)} jobs of this sweep: let "
            "each have its own by leaving output out."
        )
        yield from ((number, error) for number in numbers)
    for numbers in _alike([str(job.directory) for job in jobs]):
        directory = shown_path(jobs[numbers[0]].directory)
        error = ConfigError(
            f"{directory} would be the directory of {len(numbers)} jobs of this sweep, as they "
            "differ in nothing that changes a result: sweep something that does, or name "
            "directories, as in 'hydra.sweep.subdir=${engine.max_num_seqs}'."
        )
        yield from ((number, error) for number in numbers)


def _alike(values: Sequence[str]) -> Iterator[list[int]]:
    """The places of each value that is there more than once."""
    places: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return (found for found in places.values() if len(found) > 1)


def named(names: Sequence[str]) -> str:
    """Jobs in a sentence: one by its name, several by their number and the first names."""
    if len(names) == 1:
        return names[0]
    more = ", …" if len(names) > _NUM_SHOWN_NAMES else ""
    return f"{len(names)} jobs ({', '.join(names[:_NUM_SHOWN_NAMES])}{more})"


def _combined(results: Sequence[Result], directory: Path) -> str | None:
    """Writes the sweep's combined file; what it is, as a sentence, or None where there is none."""
    if any(isinstance(r, Interrupted) for r in results) or not any(
        isinstance(r, dict) for r in results
    ):
        return None
    from orcd_batch.reproducibility.combine import combine

    try:
        combined = combine(directory)
    except OrcdError as error:
        log.warning("%s", error)
        return f"The sweep has no combined file: {error}"
    jobs = "1 job" if combined.num_jobs == 1 else f"{combined.num_jobs} jobs"
    return f"{combined.path}: {combined.num_rows:,} rows of {jobs}"
