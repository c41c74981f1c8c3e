"""One job over many workers: the driver's side, where a run starts.

The driver keeps everything that makes a run one run: it reads the input, owns the stores, writes
the output and its manifest. `RayRunner` takes the place of RowRunner in the loop of generation.py:
rows go to workers (worker.py) as the dealer says (dealing.py), and come back as Arrow batches that
the stores take as they are.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orcd_batch.config import JobOptions, SamplingOptions
from orcd_batch.engine_factory import EngineChoice
from orcd_batch.errors import OrcdError, ScaleOutError
from orcd_batch.provenance import choose_here
from orcd_batch.scale_out.crew import Crew, one_line
from orcd_batch.scale_out.messages import Assignment
from orcd_batch.scale_out.runner import RayMachinery, RayRunner
from orcd_batch.scale_out.session import RaySession, require_ray
from orcd_batch.scale_out.worker import load_engine

log = logging.getLogger(__name__)

# How long one look at the cluster takes while it makes up its mind.
_WAIT_S = 0.1


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

    def choose(self, check: Callable[[], None]) -> tuple[EngineChoice, dict[str, Any]]:
        """The engine of every worker and its environment: this machine's, or on a cluster one's
        of its nodes.

        check: called while waiting. Raises DeviceError where the engine cannot run, ScaleOutError
        when no node answers.
        """
        kind = self._options.engine.kind
        if self._session is None:
            return choose_here(kind)
        ray = self._session.ray
        gpus = 0 if kind == "numpy" or not self._session.total("GPU") else self._num_gpus("cuda")
        probe = ray.remote(choose_here).options(num_cpus=1, num_gpus=gpus, max_retries=0)
        asked, timeout_s = probe.remote(kind), self._options.scale_out.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while not ray.wait([asked], timeout=_WAIT_S)[0]:
            check()
            if time.monotonic() > deadline:
                raise ScaleOutError(
                    f"No node of the cluster had 1 CPU and {gpus:g} GPUs to spare within "
                    f"{timeout_s:g} s: wait for other work there to end, or raise "
                    "scale_out.start_timeout_s."
                )
        try:
            found: tuple[EngineChoice, dict[str, Any]] = ray.get(asked)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, OrcdError):
                raise cause from error
            raise ScaleOutError(
                f"No node of the cluster could say what it runs on: {one_line(error)}"
            ) from error
        return found

    def start(
        self,
        choice: EngineChoice,
        sampling: Sequence[SamplingOptions],
        identity: dict[str, Any],
        num_rows: int,
        check: Callable[[], None],
        say: Callable[[str], None] = log.info,
    ) -> RayMachinery:
        """Starts the workers of jobs with these sampling options; the first is ready on return.

        identity: the first job's. num_rows: input rows that are not done, at most. check: called
        while waiting. say: tells the reader what is waited for. Raises ScaleOutError when there are
        not the CPUs or GPUs that the options ask for, or no worker gets ready.
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
        say(f"Starting {num_replicas} workers on Ray; their logs are in {self._logs}")
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
                workers = f"{asked} workers" if (asked or 1) > 1 else "one worker"
                raise ScaleOutError(
                    f"Ray has {self._session.total(name):g} {name}s, not enough for {workers} with "
                    f"{each:g} each: lower scale_out.replicas or "
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
