"""One job over many GPUs or nodes, on Ray: the driver's side.

The driver keeps everything that makes a run one run: it reads the input, owns the stores, writes
the output and its manifest. `RayRunner` takes the place of RowRunner in the loop of generation.py:
rows go to workers (scale_out_worker.py) as the dealer says (scale_out_dealing.py), and come back
as Arrow batches that the stores take as they are.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.compute as pc

from orcd_batch.config import JobOptions, SamplingOptions
from orcd_batch.data import InputRow, PartStore, SampleResult
from orcd_batch.data.part_file import id_from_text
from orcd_batch.engine_factory import EngineChoice, choose_engine
from orcd_batch.errors import ScaleOutError
from orcd_batch.prompts import num_samples
from orcd_batch.reproducibility.environment import environment
from orcd_batch.row_runner import FinishedRows, JobRow
from orcd_batch.scale_out_crew import Crew, Joined, Left, Replied, added
from orcd_batch.scale_out_dealing import Dealer, DealtRow
from orcd_batch.scale_out_session import RaySession, require_ray
from orcd_batch.scale_out_worker import Assignment, load_engine, packed

# Rows to read between two looks at the workers, before the first of them is ready.
_ROWS_AT_A_TIME = 256
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
    def refused(self) -> tuple[int, int | str, str] | None:
        """(index, id, reason) of the first row, when these are rows that could not be run."""
        first = self.batch.slice(0, 1).select(["row_index", "id", "error"]).to_pylist()[0]
        if first["error"] is None:
            return None
        return first["row_index"], id_from_text(first["id"]), first["error"]

    def keep_in(self, store: PartStore) -> None:
        store.add_batch(self.batch)


class ScaleOut:
    """The workers of a job, and Ray below them; a context manager that ends both.

    make_engine: what a worker computes with; a benchmark puts something else in its place.
    """

    def __init__(
        self, options: JobOptions, directory: Path, make_engine: Any = load_engine
    ) -> None:
        """directory: the run directory, which gets the workers' logs.

        Raises ScaleOutError when Ray is missing or not to be reached.
        """
        require_ray()
        self._options, self._logs = options, (directory / "workers").absolute()
        self._make_engine = make_engine
        self._session: RaySession | None = None
        self._crew: Crew | None = None
        if options.scale_out.address is not None:
            self._session = RaySession(options.scale_out.address)

    def choose(self) -> tuple[EngineChoice, dict[str, Any]]:
        """The engine of every worker and its environment: this machine's, or on a cluster one's
        of its nodes."""
        kind = self._options.engine.kind
        if self._session is None:
            return _chosen(kind)
        ray = self._session.ray
        gpus = 0 if kind == "numpy" or not self._session.total("GPU") else self._num_gpus("cuda")
        probe = ray.remote(_chosen).options(num_cpus=1, num_gpus=gpus, max_retries=0)
        try:
            found: tuple[EngineChoice, dict[str, Any]] = ray.get(
                probe.remote(kind), timeout=self._options.scale_out.start_timeout_s
            )
        except ray.exceptions.RayError as error:
            raise ScaleOutError(
                f"No node of the cluster could say what it runs on: {' '.join(str(error).split())}"
            ) from error
        return found

    def start(
        self,
        choice: EngineChoice,
        sampling: Sequence[SamplingOptions],
        identity: dict[str, Any],
        num_rows: int,
        check: Callable[[], None],
    ) -> "RayMachinery":
        """Starts the workers of jobs with these sampling options; the first is ready on return.

        identity: the first job's. num_rows: input rows that are not done, at most. check: called
        while waiting. Raises ScaleOutError when there are not the CPUs or GPUs that the options ask
        for, or no worker gets ready.
        """
        resources = {
            "num_cpus": self._num_cpus(choice.kind),
            "num_gpus": self._num_gpus(choice.kind),
        }
        if self._session is None:
            self._session = RaySession(None, self._num_slots(resources["num_cpus"]))
        num_replicas = self._num_replicas(resources)
        assignment = Assignment(
            self._worker_options(choice, resources["num_cpus"]),
            sampling,
            identity["input_hash"],
            self._session.node,
        )
        self._crew = Crew(
            self._session,
            self._options.scale_out,
            resources,
            num_replicas,
            self._logs,
            self._make_engine,
        )
        self._crew.start(assignment, identity)
        runner = RayRunner(self._crew, sampling, num_rows)
        while not self._crew.num_ready:
            check()
            runner.look()
        return RayMachinery(runner, self._crew)

    @property
    def num_ready(self) -> int:
        """How many workers are ready for rows."""
        return self._crew.num_ready if self._crew else 0

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _num_cpus(self, kind: str) -> float:
        asked = self._options.scale_out.cpus_per_replica
        if asked is not None:
            return asked
        return 1 if kind == "cuda" else self._options.engine.num_threads or 1

    def _num_gpus(self, kind: str) -> float:
        asked = self._options.scale_out.gpus_per_replica
        return asked if asked is not None else float(kind == "cuda")

    def _num_slots(self, num_cpus: float) -> int:
        """CPU slots of a Ray of our own; they are book-keeping, not a limit."""
        asked = (self._options.scale_out.replicas or 1) * num_cpus
        return max(os.cpu_count() or 1, -int(-asked // 1))

    def _num_replicas(self, resources: dict[str, float]) -> int:
        """As many as asked for, or as fit: one per GPU, or per so many CPUs without GPUs."""
        assert self._session is not None, "Ray is not running"
        asked = self._options.scale_out.replicas
        for name, each in (("GPU", resources["num_gpus"]), ("CPU", resources["num_cpus"])):
            if not each:
                continue
            fit = int(self._session.total(name) // each)
            if fit < (asked or 1):
                raise ScaleOutError(
                    f"Ray has {self._session.total(name):g} {name}s, and {asked or 1} workers of "
                    f"{each:g} each do not fit: lower scale_out.replicas or "
                    f"scale_out.{name.lower()}s_per_replica."
                )
            asked = asked or fit
        assert asked is not None, "a worker needs neither CPUs nor GPUs"
        return asked

    def _worker_options(self, choice: EngineChoice, num_cpus: float) -> JobOptions:
        """The first job's options as they are for a worker: of one kind, within its CPUs."""
        options = self._options
        path = options.model.path
        if "://" not in path:
            path = os.path.abspath(path)
        num_threads = options.engine.num_threads or max(int(num_cpus), 1)
        return replace(
            options,
            model=replace(options.model, path=path),
            engine=replace(options.engine, kind=choice.kind, num_threads=num_threads),
        )


def _chosen(kind: str) -> tuple[EngineChoice, dict[str, Any]]:
    choice = choose_engine(kind)
    return choice, environment(choice.kind)


class RayRunner:
    """Rows in, finished rows out, over many workers: what RowRunner does over one engine."""

    def __init__(self, crew: Crew, sampling: Sequence[SamplingOptions], num_rows: int) -> None:
        self._crew, self._sampling = crew, sampling
        self._dealer = Dealer(num_rows)
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}
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
        jobs = tuple(jobs)
        size = self._sizes.get(jobs)
        if size is None or row.overrides:
            size = self._size(row, jobs)
        self._dealer.add(DealtRow.of(row, jobs, *size))
        self._has_news = True

    def step(self) -> list[FinishedRows]:
        """Serves the workers and waits a moment for what they have finished."""
        wait_s, self._has_news = 0.0 if self._has_news else _WAIT_S, False
        self._dealer.num_workers = self._crew.num_left
        for worker, rows in self._dealer.deal():
            self._crew.submit(worker, packed((dealt.row, dealt.jobs) for dealt in rows))
        self.look(wait_s)
        done, self._done = self._done, []
        return done

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

    def _size(self, row: InputRow, jobs: tuple[int, ...]) -> tuple[int, int]:
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
