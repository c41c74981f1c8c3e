"""Parquet out, crash-safe: finished rows are committed in parts; the output appears when complete.

Beside `output` lies the directory `<output>.parts` with `lock`, `job.json` (whose parts they
are) and the parts. A part is written, synced and renamed; so is the output. Whatever the moment
of a crash, the same job finds its finished rows, and a different one is refused.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import pyarrow.compute as pc

from orcd_batch.data.assembly import write_output
from orcd_batch.data.committed_parts import CommittedParts
from orcd_batch.data.dataset import InputDataset
from orcd_batch.data.durable import put
from orcd_batch.data.finished_output import FinishedOutput, recovered_parts
from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.manifest import differences, differences_sentence
from orcd_batch.data.output_lock import OutputLock
from orcd_batch.data.part_file import merged, part_batch, retries
from orcd_batch.data.results import SampleResult
from orcd_batch.errors import OrcdError, OutputError

log = logging.getLogger(__name__)

State = Literal["new", "partial", "complete"]

COMMIT_ROWS = 1_000
COMMIT_SECONDS = 10.0
COMMIT_TOKENS = 1_000_000


class PartStore:
    """One job's output while it is being computed.

    state: "new", "partial" (rows of an earlier run are there) or "complete" (nothing to do).
    manifest: the finished output's, when complete. Use as a context manager, or call `close`:
    a local output is locked until then, or until the process ends.
    """

    def __init__(self, output: Location, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.identity = json.loads(json.dumps(identity, allow_nan=False))
        self.state: State = "new"
        self.manifest: dict[str, Any] | None = None
        self._parts = CommittedParts(output.sibling(".parts"))
        self._job_file = self._parts.directory.child("job.json")
        self._lock: OutputLock | None = None
        self._pending: dict[int, list[SampleResult]] = {}
        self._pending_batches: list[Any] = []
        self._num_pending_rows = self._num_pending_tokens = 0
        self._oldest_pending = 0.0
        self._replaces: list[int] | None = None
        self._claimed = False

    @classmethod
    def open(cls, output: str, identity: Mapping[str, Any], overwrite: bool = False) -> Self:
        """Finds out what is already there for this job.

        output: a local path or a pyarrow.fs URI. identity: what the results depend on, as plain
        JSON values in the order in which differences are named. overwrite: a different or
        finished job's work is set aside; its output is replaced when this one is complete.
        Raises OutputError when another process holds the output, when it is a different job's
        (naming the differences) or nobody's of ours, and when it cannot be written.
        """
        try:
            location = Location.parse(output)
        except OrcdError as error:
            raise OutputError(str(error)) from error
        if location.local:
            location = Location(location.filesystem, os.path.realpath(location.path), True)
        return cls.open_at(location, identity, overwrite)

    @classmethod
    def open_at(
        cls, location: Location, identity: Mapping[str, Any], overwrite: bool = False
    ) -> Self:
        """As `open`, for a location in a filesystem that the caller has opened."""
        store = cls(location, identity)
        try:
            with store._explained("cannot be prepared"):
                store._find_state(overwrite)
        except BaseException:
            store.close()
            raise
        return store

    def is_done(self, row_index: int) -> bool:
        """Whether the row needs no run: all its samples are in, none failed by infrastructure."""
        return self._parts.index.is_done(row_index)

    @property
    def num_done_rows(self) -> int:
        return self._parts.index.num_done

    def add(self, results: Sequence[SampleResult]) -> None:
        """Takes all samples of one input row; they are safe after the next commit."""
        assert results, "a row needs at least one result"
        row = results[0].row_index
        samples = sorted(result.sample_index for result in results)
        assert all(result.row_index == row for result in results), f"rows mixed with row {row}"
        assert samples == list(range(len(results))), f"row {row} has samples {samples}"
        assert not self.is_done(row), f"row {row} is done already"
        self._count_pending(1, sum(result.completion_tokens or 0 for result in results))
        self._pending[row] = list(results)
        retry = any(result.error_kind == "infrastructure" for result in results)
        self._parts.index.mark(row, retry)

    def add_batch(self, batch: Any) -> None:
        """Takes finished rows as a RecordBatch of PART_SCHEMA, a row's samples side by side."""
        rows = batch.column("row_index").to_numpy()
        num_tokens = pc.sum(batch.column("completion_tokens")).as_py() or 0
        distinct = np.unique(rows)
        retried = np.unique(rows[retries(batch.column("error_kind"))])
        num_done = self._parts.index.mark_all(distinct, retried)
        assert not num_done, f"{num_done} of {distinct} are done already"
        self._count_pending(len(distinct), num_tokens)
        self._pending_batches.append(batch)

    @property
    def commit_due(self) -> bool:
        """Whether 1,000 rows or a million tokens wait, or the oldest row has waited 10 seconds."""
        return bool(self._num_pending_rows) and (
            self._num_pending_rows >= COMMIT_ROWS
            or self._num_pending_tokens >= COMMIT_TOKENS
            or time.monotonic() - self._oldest_pending >= COMMIT_SECONDS
        )

    def commit(self) -> None:
        """Makes every added row safe. Raises OutputError when it cannot be written."""
        if not self._num_pending_rows:
            return
        with self._explained("cannot be written; finished parts are kept"):
            self._claim()
            batches = self._pending_batches
            if self._pending:
                single = part_batch([r for row in self._pending.values() for r in row])
                batches = [single, *batches]
            self._parts.add(merged(batches))
        self._pending, self._pending_batches = {}, []
        self._num_pending_rows = self._num_pending_tokens = 0

    def record_batches(self) -> Iterator[Any]:
        """Identity, hashes and counts of every result, those of earlier runs included; streamed.

        RecordBatches as `CommittedParts.record_batches` gives them.
        """
        self.commit()
        return self._parts.record_batches()

    def assemble(self, dataset: InputDataset, manifest: Mapping[str, Any]) -> None:
        """Writes the output in input order with its manifest, then removes the parts.

        The manifest is completed with `identity`, `output_prefix` and `infrastructure_errors`.
        Raises OutputError when a row has no result or the output cannot be written.
        """
        self.commit()
        if self.output.local:
            dataset.check_output(self.output.path)
        manifest = {
            **manifest,
            "identity": self.identity,
            "output_prefix": dataset.options.output_prefix,
            "infrastructure_errors": self._parts.index.num_retry,
        }
        with self._explained("cannot be written; finished parts are kept"):
            write_output(self.output, dataset, self._parts, manifest)
            self._remove_parts()
            self.close()
        self.state, self.manifest = "complete", manifest

    def close(self) -> None:
        """Gives up the lock; rows added since the last commit are dropped."""
        if self._lock is not None:
            directory = self._parts.directory.path
            with contextlib.suppress(OSError):
                if set(os.listdir(directory)) <= {"lock", "job.json"}:
                    shutil.rmtree(directory)
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_pending(self, num_rows: int, num_tokens: int) -> None:
        if not self._num_pending_rows:
            self._oldest_pending = time.monotonic()
        self._num_pending_rows += num_rows
        self._num_pending_tokens += num_tokens

    def _explained(self, trouble: str) -> Any:
        return reported_as(OutputError, f"The output {self.output} {trouble}")

    def _find_state(self, overwrite: bool) -> None:
        if self.output.is_directory():
            raise OutputError(f"The output {self.output} is a directory: name a file in it.")
        finished = FinishedOutput.find(self.output)
        if finished and not overwrite:
            finished.check(self.identity)
            if not finished.needs_retry:
                self._complete(finished)
                return
        self._take_lock()
        self._replaces = finished.stamp if finished else None
        if self._has_unfinished_parts(overwrite):
            self._resume()
            return
        self._remove_parts()
        if finished and not overwrite:
            self._claim()
            for batch in recovered_parts(self.output, finished):
                self._parts.add(batch)
            self._resume()

    def _complete(self, finished: FinishedOutput) -> None:
        self.state, self.manifest = "complete", finished.manifest
        if self._parts.directory.is_directory():
            self._take_lock()
            self._remove_parts()
            self.close()

    def _has_unfinished_parts(self, overwrite: bool) -> bool:
        """Whether there are parts of this very job that no finished output contains already."""
        if not self._parts.numbers():
            return False
        job = self._read_job()
        if self._replaces is not None and job.get("replaces") != self._replaces:
            return False
        found = differences(self.identity, job.get("identity") or {})
        if found and not overwrite:
            raise OutputError(
                f"{self._parts.directory} holds unfinished work of a different job "
                f"({differences_sentence(found)}): choose another output, or start afresh with "
                "overwrite=true."
            )
        return not found

    def _read_job(self) -> dict[str, Any]:
        if not self._job_file.is_file():
            return {}
        with self._job_file.open() as file:
            job = json.loads(file.read())
        return job if isinstance(job, dict) else {}

    def _resume(self) -> None:
        self._parts = CommittedParts(self._parts.directory)
        self._parts.load()
        self._claimed = True
        self.state = "partial"

    def _claim(self) -> None:
        """Says whose parts they are, before the first of them is there."""
        if not self._claimed:
            job = {"identity": self.identity, "replaces": self._replaces}
            put(self._job_file, json.dumps(job, indent=1).encode())
            self._claimed = True

    def _take_lock(self) -> None:
        directory = self._parts.directory.path
        while self.output.local and self._lock is None:
            os.makedirs(directory, exist_ok=True)
            try:
                self._lock = OutputLock(f"{directory}/lock")
            except FileNotFoundError:
                log.debug("%s was removed by a job that has just ended", directory)

    def _remove_parts(self) -> None:
        """Removes the parts, then whose they were; the lock is kept until `close`."""
        self._parts.clear()
        if self._job_file.is_file():
            self.output.filesystem.delete_file(self._job_file.path)
        self._parts = CommittedParts(self._parts.directory)
