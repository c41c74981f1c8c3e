"""The loop of a run: rows into the runner, finished rows into the stores of their jobs."""

import logging
from collections.abc import Callable, Iterator, Sequence

from orcd_batch.data import InputDataset, InputRow
from orcd_batch.errors import Interrupted, OrcdError, OutputError, RowError
from orcd_batch.interrupts import Interrupts
from orcd_batch.job_logs import lines_about
from orcd_batch.job_run import JobRun
from orcd_batch.loaded_engine import Runner
from orcd_batch.model_source import ModelSource
from orcd_batch.phases import Phases
from orcd_batch.row_runner import FinishedRows
from orcd_batch.view import JobView

log = logging.getLogger(__name__)

_THE_ONE = (0,)


class Generation:
    """The loop between the input, the runner and the stores of jobs that share all but sampling."""

    def __init__(
        self,
        jobs: Sequence[JobRun],
        dataset: InputDataset,
        source: ModelSource,
        runner: Runner,
        view: JobView,
        phases: Phases,
    ) -> None:
        self._runner, self._jobs = runner, jobs
        self._dataset, self._source, self._view = dataset, source, view
        self._phases = phases

    def run(self, interrupts: Interrupts) -> None:
        """Runs every row that a job's store does not have yet.

        A job that cannot go on, because of an error row under on_error=raise or an output that
        cannot be written, gets its `error` and leaves the loop; an interrupt is the error of all.
        What is finished is committed in every case.
        """
        rows = self._dataset.rows(skip=self._skip())
        self._view.start_rows(self._num_done_rows, self._dataset.num_rows * len(self._jobs))
        try:
            while self._goes_on(rows):
                interrupts.stop_if_requested()
                for finished in self._runner.step():
                    self._keep(finished)
                if self._runner.num_sampled_tokens:
                    self._phases.end("first token")
                self._view.note = self._runner.note
                self._view.rows(self._num_done_rows, self._runner.num_sampled_tokens)
                self._commit(force=False)
        except Interrupted as error:
            for job in self._jobs:
                job.error = job.error or error
        finally:
            self._commit(force=True)

    @property
    def num_tokens(self) -> Sequence[int]:
        """Completion tokens of each job's samples that this run has finished."""
        return self._runner.num_tokens

    @property
    def _num_done_rows(self) -> int:
        return sum(job.store.num_done_rows for job in self._jobs)

    def _skip(self) -> Callable[[int], bool]:
        """What tells whether no job needs a row."""
        if len(self._jobs) == 1:  # the usual case, asked for every row
            return self._jobs[0].store.is_done
        return lambda index: not self._wanting(index)

    def _wanting(self, index: int) -> Sequence[int]:
        """The jobs that still need a row which at least one needs."""
        if len(self._jobs) == 1:
            return _THE_ONE
        return [
            number
            for number, job in enumerate(self._jobs)
            if job.error is None and not job.store.is_done(index)
        ]

    def _goes_on(self, rows: Iterator[InputRow]) -> bool:
        if all(job.error for job in self._jobs):
            return False
        return self._admit(rows) or self._runner.has_unfinished

    def _admit(self, rows: Iterator[InputRow]) -> bool:
        """Keeps the runner's queue one batch ahead; False once nothing is left to queue.

        At most one batch of rows is read at a time, so that a stretch of rows that cannot be run
        is committed like any other.
        """
        runner = self._runner
        for _ in range(runner.max_num_seqs):
            if not runner.has_room:
                return True
            row = next(rows, None)
            if row is None:
                return False
            runner.submit(row, self._wanting(row.index))
        return True

    def _keep(self, finished: FinishedRows) -> None:
        job, refused = self._jobs[finished.job], finished.refused
        if job.error is not None:
            return
        if refused:
            with lines_about(job.directory):
                for row in refused:
                    log.warning("row %d (id %r): %s", *row)
            if job.options.dataset.on_error == "raise":
                self._give_up(finished.job, _refusal(*refused[0]))
                return
        finished.keep_in(job.store)
        job.num_rows += finished.num_results

    def _give_up(self, index: int, error: OrcdError) -> None:
        self._jobs[index].error = error
        self._runner.drop(index)

    def _commit(self, force: bool) -> None:
        for index, job in enumerate(self._jobs):
            if isinstance(job.error, OutputError) or not (force or job.store.commit_due):
                continue
            self._source.confirm_hash()
            try:
                job.store.commit()
            except OutputError as error:
                self._give_up(index, error)


def _refusal(index: int, row_id: int | str, reason: str) -> RowError:
    return RowError(
        f"Row {index} (id {row_id!r}) cannot be run: {reason} Finished rows are kept; "
        "dataset.on_error=record goes on and writes an error row instead."
    )
