"""What a person sees of a sweep: one progress view for each group, one table of all jobs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orcd_batch.errors import Interrupted, OrcdError
from orcd_batch.job_run import Result
from orcd_batch.sweep.groups import SweepJob
from orcd_batch.view import JobView, log, plain_text

_HASH_DIGITS = 12
_COUNTS = {
    "rows": "rows",
    "computed": "rows_computed",
    "errors": "errors",
    "tokens": "tokens",
    "tok/s": "tokens_per_s",
}


class GroupView(JobView):
    """The progress of jobs that run side by side; their facts go to their logs alone."""

    num_samples = 0

    def __init__(self, number: int, num_groups: int, num_jobs: int) -> None:
        """This is group `number` of num_groups, from 1."""
        super().__init__()
        jobs = f"{num_jobs} jobs" if num_jobs > 1 else "1 job"
        self.rows_title = f"Rows of {jobs}"
        if num_groups > 1:
            self.rows_title += f" ({number}/{num_groups})"

    def already_complete(self, output: str) -> None:
        log.info("%s is already complete; overwrite=true computes it again.", output)

    def finish(self, samples: Sequence[tuple[str, str]], facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            log.info("%s: %s", name, value)


def show_sweep(jobs: Sequence[SweepJob], results: Sequence[Result], combined: str | None) -> None:
    """The table at the end, a line a job. combined: a sentence about the combined file."""
    console = Console(stderr=True)
    swept = list(dict.fromkeys(key for job in jobs for key in job.swept))
    table = Table()
    for name in swept:
        title = plain_text(name.removeprefix("sampling."))
        table.add_column(title, justify="right", overflow="fold")
    for name in _COUNTS:
        table.add_column(name, justify="right")
    table.add_column("run hash", no_wrap=True, min_width=_HASH_DIGITS)
    for job, result in zip(jobs, results, strict=True):
        table.add_row(*(plain_text(job.swept.get(name, "")) for name in swept), *_cells(result))
    console.print(table)
    if combined is not None:
        console.print(plain_text(combined))


def _cells(result: Result) -> list[Any]:
    if isinstance(result, OrcdError):
        outcome = "interrupted" if isinstance(result, Interrupted) else "failed"
        return [*("" for _ in _COUNTS), outcome]
    counts = [f"{result[key]:,}" for key in _COUNTS.values()]
    return [*counts, str(result["run_hash"])[:_HASH_DIGITS]]
