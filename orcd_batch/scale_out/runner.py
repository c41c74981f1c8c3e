"""Rows in, finished rows out, over many workers; and these workers as one engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from orcd_batch.config import SamplingOptions
from orcd_batch.data import InputRow, PartStore, SampleResult
from orcd_batch.data.part_file import id_from_text
from orcd_batch.prompts import num_samples
from orcd_batch.row_runner import FinishedRows, JobRow, Refused
from orcd_batch.scale_out.crew import Crew, Joined, Left, Replied
from orcd_batch.scale_out.dealing import Dealer
from orcd_batch.scale_out.hands import DealtRow
from orcd_batch.scale_out.messages import packed
from orcd_batch.scale_out.place import added

# Rows to read between two looks at the workers, before the first of them is ready.
_ROWS_AT_A_TIME = 1024
# How long the driver waits for news when it has nothing else to do.
_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Finished rows of one job as a worker sends them: a RecordBatch of PART_SCHEMA."""

    job: int
    batch: Any

    @property
    def num_results(self) -> int:
        return int(self.batch.num_rows)

    @property
    def refused(self) -> Sequence[Refused]:
        """The rows that, or a sample of which, could not be run."""
        errors = self.batch.column("error")
        if errors.null_count == len(errors):
            return []
        bad = self.batch.select(["row_index", "id", "error"]).filter(errors.is_valid())
        first = {row["row_index"]: row for row in reversed(bad.to_pylist())}
        return [
            (index, id_from_text(first[index]["id"]), first[index]["error"])
            for index in sorted(first)
        ]

    def keep_in(self, store: PartStore) -> None:
        store.add_batch(self.batch)


class RayRunner:
    """Rows in, finished rows out, over many workers: what RowRunner does over one engine."""

    def __init__(self, crew: Crew, sampling: Sequence[SamplingOptions], num_rows: int) -> None:
        self._crew, self._sampling = crew, sampling
        self._dealer = Dealer(num_rows)
        self._sets: dict[frozenset[int], frozenset[int]] = {}
        self._sizes: dict[frozenset[int], tuple[int, int]] = {}
        self._has_news = False
        self.num_tokens = [0] * len(sampling)
        self._done: list[FinishedRows] = []

    @property
    def max_num_seqs(self) -> int:
        return _ROWS_AT_A_TIME

    @property
    def has_room(self) -> bool:
        return self._dealer.has_room

    @property
    def has_unfinished(self) -> bool:
        return bool(self._done) or self._dealer.has_unfinished

    @property
    def num_sampled_tokens(self) -> int:
        return sum(place.num_sampled_tokens for place in self._crew.places)

    @property
    def note(self) -> str:
        return f", {self._crew.num_ready} of {len(self._crew.places)} workers"

    def submit(self, row: InputRow, jobs: Iterable[int]) -> None:
        """Puts the row into the pool from which the workers are served."""
        wanting = frozenset(jobs)
        assert wanting, f"no job wants row {row.index}"
        wanting = self._sets.setdefault(wanting, wanting)  # one for many rows
        size = self._sizes.get(wanting)
        if size is None or row.overrides:
            size = self._size(row, wanting)
        self._dealer.add(DealtRow.of(row, wanting, *size))
        self._has_news = True

    def step(self) -> list[FinishedRows]:
        """Serves the workers and waits a moment for what they have finished."""
        wait_s, self._has_news = 0.0 if self._has_news else _WAIT_S, False
        self._serve()
        self.look(wait_s)
        self._serve()  # now, for the finished rows are to be committed before the next step
        done, self._done = self._done, []
        return done

    def _serve(self) -> None:
        self._dealer.num_workers = self._crew.num_left
        for worker, rows in self._dealer.deal():
            self._crew.submit(worker, packed((dealt.row, dealt.jobs) for dealt in rows))

    def look(self, wait_s: float = _WAIT_S) -> None:
        """Takes the news from the workers, waiting so long for the first."""
        for event in self._crew.events(wait_s):
            if isinstance(event, Joined):
                self._dealer.join(event.worker, event.max_num_seqs)
            elif isinstance(event, Replied):
                for job, batch in event.reply.batches:
                    self._take(event.worker, job, batch)
            else:
                self._take_back(event)

    def _size(self, row: InputRow, jobs: frozenset[int]) -> tuple[int, int]:
        """(sequences, tokens that they may generate together)."""
        num_sequences = num_tokens = 0
        for sampling in (self._sampling[job] for job in jobs):
            n = num_samples(row, sampling)
            max_tokens = row.overrides.get("max_tokens", sampling.max_tokens)
            num_sequences += n
            num_tokens += n * (max_tokens if isinstance(max_tokens, int) else 1)
        if not row.overrides:
            self._sizes[jobs] = num_sequences, num_tokens
        return num_sequences, num_tokens

    def drop(self, job: int) -> None:
        self._dealer.drop(job)
        self._crew.drop(job)

    def _take(self, worker: int, job: int, batch: Any) -> None:
        kept = self._dealer.finish(worker, job, batch.column("row_index").to_pylist())
        if not kept:
            return  # the job was dropped while the batch was on its way
        self.num_tokens[job] += pc.sum(batch.column("completion_tokens")).as_py() or 0
        self._done += _parted(job, batch)

    def _take_back(self, event: Left) -> None:
        for dealt in self._dealer.leave(event.worker):
            for job in dealt.jobs:
                self._done.append(_infrastructure_error(dealt, job, self._sampling[job]))


@dataclass(frozen=True, slots=True)
class RayMachinery:
    """The workers' engines as one, for the manifest."""

    runner: RayRunner
    crew: Crew

    def describe(self) -> dict[str, Any]:
        """The engine of the first worker that is there; the others' are of its kind."""
        loaded = [place.loaded for place in self.crew.places if place.loaded]
        return loaded[0].description if loaded else {}

    def workers(self) -> list[dict[str, Any]]:
        return [place.describe() for place in self.crew.places]

    def memory(self) -> dict[str, int]:
        """Bytes by use, those of all workers together."""
        return added(place.loaded.memory for place in self.crew.places if place.loaded)

    def statistics(self) -> dict[str, float]:
        """Counts and seconds of all workers together; the seconds ran side by side."""
        total = added(place.statistics for place in self.crew.places)
        return {name: round(value, 4) for name, value in total.items()}


def _parted(job: int, batch: Any) -> list[RowBatch]:
    """The batch as rows that went well and rows that did not, whole rows each."""
    errors = batch.column("error")
    if errors.null_count == len(errors):
        return [RowBatch(job, batch)]
    rows = batch.column("row_index")
    bad = pc.is_in(rows, value_set=rows.filter(errors.is_valid()))
    parts = [batch.filter(pc.invert(bad)), batch.filter(bad)]
    return [RowBatch(job, part) for part in parts if part.num_rows]


def _infrastructure_error(dealt: DealtRow, job: int, sampling: SamplingOptions) -> JobRow:
    row = dealt.row
    reason = (
        f"The worker died {dealt.num_deaths} times while it computed this row, "
        f"{dealt.num_deaths_alone} times with no other row: see the workers' logs in the run "
        "directory; the same command tries again."
    )
    num_results = num_samples(row, sampling)
    results = [
        SampleResult.failed(row.index, sample, row.id, reason, "infrastructure")
        for sample in range(num_results)
    ]
    return JobRow(job, row, num_results, results=results)
