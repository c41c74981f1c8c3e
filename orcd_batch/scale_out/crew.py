"""The workers of a job: started, asked for finished rows, started again when they die."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orcd_batch.config import ScaleOutOptions
from orcd_batch.data.manifest import differences, differences_sentence
from orcd_batch.errors import ScaleOutError
from orcd_batch.scale_out.messages import Assignment, Failure, Loaded, Reply, Report
from orcd_batch.scale_out.place import Place
from orcd_batch.scale_out.session import RaySession
from orcd_batch.scale_out.worker import Worker

log = logging.getLogger(__name__)

# How long a worker waits for a finished row before it answers that there is none.
_POLL_S = 1.0
# A worker's calls that may run side by side: submit, finished, drop.
_NUM_CALLS = 3


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is ready for rows."""

    worker: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Replied:
    """A worker has told what happened since it was asked last."""

    worker: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Left:
    """A worker's process is gone, and what it held with it."""

    worker: int


Event = Joined | Replied | Left


class Crew:
    """So many workers, each a Ray actor with CPUs and GPUs of its own."""

    def __init__(
        self,
        session: RaySession,
        options: ScaleOutOptions,
        resources: Mapping[str, float],
        num_replicas: int,
        logs: Path,
        make_engine: Callable[..., Any],
    ) -> None:
        """resources: num_cpus and num_gpus of each worker. logs: the directory of their logs."""
        self._session, self._options, self._resources = session, options, resources
        self._logs, self._make_engine = logs, make_engine
        self._assignment: Assignment | None = None
        self._identity: dict[str, Any] = {}
        self.places = [Place(number) for number in range(num_replicas)]

    @property
    def num_ready(self) -> int:
        return sum(place.is_ready for place in self.places)

    @property
    def num_left(self) -> int:
        """Those that are ready or may get ready."""
        return sum(place.asked is not None for place in self.places)

    def start(self, assignment: Assignment, identity: dict[str, Any]) -> None:
        """Starts every worker; `events` tells when they are ready.

        identity: of the first job, to which each worker's must be equal.
        """
        self._assignment, self._identity = assignment, identity
        for place in self.places:
            self._start(place)

    def events(self, wait_s: float) -> Iterator[Event]:
        """What happened, waiting up to wait_s for the first.

        Raises ScaleOutError when a worker differs from the job or cannot open the model file, and
        when no worker is left.
        """
        ray = self._session.ray
        asked = {place.asked: place for place in self.places if place.asked is not None}
        if not asked:
            raise ScaleOutError(self._nobody_left())
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=wait_s)
        if ready:
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for reference in ready:
            yield from self._take(asked[reference])
        for place in self.places:
            if place.asked is not None and not place.is_ready and _now() > place.deadline:
                waited = self._options.start_timeout_s
                yield from self._lose(place, f"it did not start within {waited:g} s")

    def submit(self, worker: int, message: bytes) -> None:
        """Sends rows, as `packed` makes them."""
        self.places[worker].actor.submit.remote(message)

    def drop(self, job: int) -> None:
        """Tells every worker to forget a job."""
        for place in self.places:
            if place.is_ready:
                place.actor.drop.remote(job)

    def close(self) -> None:
        """Ends every worker."""
        for place in self.places:
            self._end(place)

    def _start(self, place: Place) -> None:
        ray = self._session.ray
        place.num_starts += 1
        actor = ray.remote(Worker).options(
            **self._resources, max_concurrency=_NUM_CALLS, max_restarts=0
        )
        path = str(self._logs / f"{place.number}.log")
        place.actor = actor.remote(self._assignment, path, self._make_engine)
        place.phase, place.deadline = "reporting", _now() + self._options.start_timeout_s
        place.asked = place.actor.report.remote()

    def _take(self, place: Place) -> Iterator[Event]:
        ray = self._session.ray
        try:
            answer = ray.get(place.asked)
        except ray.exceptions.RayError as error:
            yield from self._lose(place, one_line(error))
            return
        if isinstance(answer, Failure):
            place.node = answer.node
            self._keep_log(place, answer.log)
            if answer.fatal:
                hint = " Every node needs the same model file under one path."
                raise ScaleOutError(
                    f"{self._name(place)} cannot run the job: {answer.sentence}"
                    + (hint if place.phase == "reporting" else "")
                )
            yield from self._lose(place, answer.sentence)
        elif isinstance(answer, Report):
            self._admit(place, answer)
        elif isinstance(answer, Loaded):
            place.loaded, place.phase = answer, "working"
            place.asked = place.actor.finished.remote(_POLL_S)
            yield Joined(place.number, answer.max_num_seqs)
        else:
            place.asked = place.actor.finished.remote(_POLL_S)
            self._note(place, answer)
            yield Replied(place.number, answer)

    def _admit(self, place: Place, report: Report) -> None:
        place.report, place.node = report, report.node
        found = differences(self._identity, report.identity)
        if found:
            raise ScaleOutError(
                f"{self._name(place)} would not give the job's bits "
                f"({differences_sentence(found)}): one reproducible run needs machines of one "
                "kind with one model file and one installation."
            )
        place.phase, place.asked = "loading", place.actor.load.remote()

    def _note(self, place: Place, reply: Reply) -> None:
        place.last = reply
        num_rows = sum(batch.num_rows for _, batch in reply.batches)
        place.num_rows += num_rows
        if num_rows:
            place.num_barren = 0
        self._keep_log(place, reply.log)

    def _keep_log(self, place: Place, lines: str) -> None:
        if lines:
            self._logs.mkdir(parents=True, exist_ok=True)
            with open(self._logs / f"{place.number}.log", "a") as file:
                file.write(lines)

    def _lose(self, place: Place, why: str) -> Iterator[Event]:
        log.warning("%s is gone: %s", self._name(place), why)
        was_ready = place.is_ready
        self._end(place)
        place.trouble = why
        place.num_barren += 1
        if place.num_barren <= self._options.retries:
            self._start(place)
        else:
            log.error("%s is given up after %d starts", self._name(place), place.num_starts)
        if was_ready:
            yield Left(place.number)

    def _end(self, place: Place) -> None:
        ray = self._session.ray
        if place.asked is not None:
            place.end()
            ray.kill(place.actor)

    def _nobody_left(self) -> str:
        troubles = "; ".join(f"{self._name(p)}: {p.trouble.rstrip('.')}" for p in self.places)
        return (
            f"No usable worker is left, each was started {self._options.retries + 1} times in a "
            f"row without finishing a row ({troubles}): finished rows are kept and the same "
            f"command continues; the workers' logs are in {self._logs}."
        )

    @staticmethod
    def _name(place: Place) -> str:
        where = f" on {place.node}" if place.node else ""
        return f"Worker {place.number}{where}"


def _now() -> float:
    return time.monotonic()


def one_line(error: Exception) -> str:
    """The first lines of Ray's own explanation as one."""
    return " ".join(str(error).split())[:300]
