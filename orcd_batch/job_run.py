"""One job while it runs: its output's store, what became of it, and its document at the end."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from orcd_batch.config import JobOptions
from orcd_batch.data import InputDataset, PartStore
from orcd_batch.errors import OrcdError, RowError
from orcd_batch.prompts import sampling_params

# The document of a job that is done, or what ended it.
Result = dict[str, Any] | OrcdError


@dataclass(slots=True, eq=False)
class JobRun:
    """A job whose output is open; a context manager that closes it.

    output: where the rows go, as the user would type it. directory: the run directory.
    num_rows: output rows computed by this run. error: what ended the job; the other jobs of its
    group go on.
    """

    options: JobOptions
    output: str
    identity: dict[str, Any]
    store: PartStore
    directory: Path
    num_rows: int = 0
    error: OrcdError | None = None

    @classmethod
    def open(
        cls,
        options: JobOptions,
        output: str,
        identity: dict[str, Any],
        dataset: InputDataset,
        directory: Path,
    ) -> Self:
        """Finds what is already there for the job.

        Raises OutputError when the output cannot be this job's, RowError when the job is complete
        with error rows under on_error=raise.
        """
        sampling_params(options.sampling, {})
        dataset.check_output(output)
        store = PartStore.open(output, identity, options.overwrite)
        run = cls(options, output, identity, store, directory)
        if run.is_complete:
            run.check_errors(run.totals["num_errors"])
        return run

    @property
    def is_complete(self) -> bool:
        return self.store.state == "complete"

    @property
    def goes_on(self) -> bool:
        """Whether there is work left, and nothing that forbids it."""
        return self.error is None and not self.is_complete

    @property
    def totals(self) -> Mapping[str, Any]:
        """Counts over the finished output's rows."""
        assert self.store.manifest is not None, "the output is not complete"
        totals: Mapping[str, Any] = self.store.manifest["totals"]
        return totals

    def check_errors(self, num_errors: int) -> None:
        """Under on_error=raise, error rows that an earlier run recorded count as well."""
        if self.options.dataset.on_error == "raise" and num_errors:
            raise RowError(
                f"{num_errors} output rows of an earlier run of this job are errors, and `error` "
                "says why; dataset.on_error=record keeps them."
            )

    def document(self) -> dict[str, Any]:
        """The run as its last line of stdout, out of the finished output's own manifest."""
        assert self.store.manifest is not None, "the output is not complete"
        statistics = self.store.manifest["statistics"] if self.num_rows else {}
        totals = self.totals
        return {
            "rows": totals["num_rows"],
            "rows_computed": self.num_rows,
            "rows_resumed": totals["num_rows"] - self.num_rows,
            "errors": totals["num_errors"],
            "tokens": totals["num_tokens"],
            "tokens_per_s": statistics.get("tokens_per_s", 0.0),
            "run_hash": self.store.manifest["run_hash"],
            "output": self.output,
        }

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def output_of(options: JobOptions, directory: Path) -> str:
    """Where the job writes: what the options say, or completions.parquet in its directory."""
    return options.output or shown_path(directory / "completions.parquet")


def shown_path(path: Path) -> str:
    """The path as a user would type it: relative when it lies below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
