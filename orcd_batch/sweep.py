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

log = logging.getLogger(__name__)

Result = dict[str, Any] | OrcdError

# Jobs of one group hold a lock and a log file open each; a process has some 1,000 files.
_MAX_GROUP_JOBS = 256
_NUM_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class SweepJob:
    """One job of a sweep. directory: its run directory. swept: what the sweep varies, as typed."""

    options: JobOptions
    directory: Path
    swept: dict[str, str]

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.swept.items())


def run_sweep(jobs: Sequence[SweepJob], directory: Path) -> list[Result]:
    """Runs the jobs group by group; each job's document, or the error that ended it, in order.

    directory: of the sweep; `combined.parquet` there holds all finished outputs at the end.
    """
    from orcd_batch.sweep_view import GroupView, show_sweep

    results: dict[int, Result] = dict(_sharing_an_output(jobs))
    groups = list(_groups(jobs, [n for n in range(len(jobs)) if n not in results]))
    for number, group in enumerate(groups, 1):
        view = GroupView(number, len(groups), len(group))
        results |= zip(group, _run_group([jobs[n] for n in group], view), strict=True)
        interrupted = [r for r in results.values() if isinstance(r, Interrupted)]
        if interrupted:
            results = {n: results.get(n, interrupted[0]) for n in range(len(jobs))}
            break
    ordered = [results[number] for number in range(len(jobs))]
    show_sweep(jobs, ordered, _combined(ordered, directory))
    return ordered


def _run_group(group: Sequence[SweepJob], view: Any) -> Sequence[Result]:
    """Runs jobs that share an engine; an error of what they share is the error of each."""
    from orcd_batch.job import run_jobs

    try:
        return run_jobs([(job.options, job.directory) for job in group], view)
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


def _sharing_an_output(jobs: Sequence[SweepJob]) -> Iterator[tuple[int, ConfigError]]:
    """Jobs that would write the same file, each with its refusal: no order of them is right."""
    from orcd_batch.job_run import output_of

    by_output: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        output = output_of(job.options, job.directory)
        by_output.setdefault(output if "://" in output else os.path.realpath(output), []).append(
            number
        )
    for numbers in by_output.values():
        if len(numbers) > 1:
            output = output_of(jobs[numbers[0]].options, jobs[numbers[0]].directory)
            names = [jobs[number].name for number in numbers[:_NUM_SHOWN_NAMES]]
            more = ", …" if len(numbers) > _NUM_SHOWN_NAMES else ""
            error = ConfigError(
                f"{len(numbers)} jobs of this sweep would write {output} ({', '.join(names)}"
                f"{more}): let each have its own by leaving output out, and sweep only what "
                "changes a result."
            )
            yield from ((number, error) for number in numbers)


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
    return f"{combined.path}: {combined.num_rows:,} rows of {combined.num_jobs} jobs"
