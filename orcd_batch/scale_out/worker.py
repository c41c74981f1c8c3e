"""What runs in a worker's process: an engine that is fed rows and gives back finished ones.

The driver makes a Ray actor of `Worker` (crew.py) and calls its methods in this order: `report`,
`load`, then `submit` and `finished` side by side until the end. Everything that touches the engine
happens in one thread of the worker, because a CUDA context belongs to a thread.
"""

import logging
import os
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast

from orcd_batch.collector import relax_collector
from orcd_batch.data import InputRow
from orcd_batch.data.part_file import part_batch
from orcd_batch.engine_factory import choose_engine
from orcd_batch.errors import DeviceError, OrcdError
from orcd_batch.loaded_engine import LoadedEngine, Machinery, Runner
from orcd_batch.model_source import ModelSource
from orcd_batch.provenance import choose_here, job_identity
from orcd_batch.row_runner import JobRow
from orcd_batch.scale_out.messages import Assignment, Failure, Loaded, Reply, Report, unpacked
from orcd_batch.scale_out.worker_log import begin_log

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Finished rows are gathered this long, so that a message holds more than one.
_GATHER_S = 0.02


def load_engine(source: ModelSource, assignment: Assignment) -> Machinery:
    """The engine that a job without workers would have."""
    options = assignment.options
    choice = choose_engine(options.engine.kind)
    return LoadedEngine(source, options, assignment.sampling, choice, _log_loading)


class Worker:
    """One engine in a process of its own.

    log_path: where its standard output, errors and log go; elsewhere than on the driver's node, a
    temporary file whose lines travel with the replies. make_engine: load_engine, or what stands in
    for it in a benchmark.
    """

    def __init__(
        self,
        assignment: Assignment,
        log_path: str,
        make_engine: Callable[[ModelSource, Assignment], Machinery] = load_engine,
    ) -> None:
        self._is_remote = _node() != assignment.driver_node
        self._new_log_lines = begin_log(log_path, self._is_remote)
        self._assignment, self._make_engine = assignment, make_engine
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._changed = threading.Condition()
        self._inbox: deque[tuple[InputRow, Collection[int]]] = deque()
        self._outbox: list[JobRow] = []
        self._dropped: set[int] = set()
        self._failure: Failure | None = None
        self._is_idle = True
        self._source: ModelSource | None = None
        self._engine: Machinery | None = None

    def report(self) -> Report | Failure:
        """Opens the model file and says what this process would compute with it."""
        return self._in_engine_thread(self._report)

    def load(self) -> Loaded | Failure:
        """Loads the engine and starts to compute what is submitted."""
        loaded = self._in_engine_thread(self._load)
        if isinstance(loaded, Loaded):
            self._engine_thread.submit(self._compute)
        return loaded

    def submit(self, message: bytes) -> None:
        """Queues the rows of a message made by `packed`; returns at once."""
        rows = unpacked(message)
        with self._changed:
            self._inbox.extend(rows)
            self._is_idle = False
            self._changed.notify_all()

    def finished(self, wait_s: float) -> Reply | Failure:
        """The rows finished since the last call; waits up to wait_s seconds for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._failure, wait_s)
            if self._outbox:
                self._changed.wait_for(lambda: self._is_idle or self._failure, _GATHER_S)
            done, self._outbox = self._outbox, []
            if self._failure and not done:
                return replace(self._failure, log=self._new_log_lines())
        return self._reply(done)

    def drop(self, job: int) -> None:
        """Forgets a job: nothing of it is returned any more."""
        with self._changed:
            self._dropped.add(job)

    def _reply(self, done: Sequence[JobRow]) -> Reply | Failure:
        assert self._source is not None, "`report` comes first"
        assert self._engine is not None, "`load` comes first"
        if done and self._is_remote:  # the driver confirms the hash for its own node
            try:
                self._source.confirm_hash()
            except OrcdError as error:
                return Failure(str(error), fatal=True, log=self._new_log_lines())
        by_job: dict[int, list[Any]] = {}
        for row in done:
            by_job.setdefault(row.job, []).extend(row.results)
        return Reply(
            [(job, part_batch(results)) for job, results in by_job.items()],
            self._engine.runner.num_sampled_tokens,
            self._engine.statistics(),
            self._new_log_lines(),
        )

    def _in_engine_thread(self, work: Callable[[], Answer]) -> Answer | Failure:
        try:
            return self._engine_thread.submit(work).result()
        except OrcdError as error:
            log.error("%s", error)
            sentence, fatal = str(error), not isinstance(error, DeviceError)
        except Exception as error:
            traceback.print_exc()
            sentence, fatal = f"{type(error).__name__}: {error}", False
        return Failure(sentence, fatal, log=self._new_log_lines())

    def _report(self) -> Report:
        options = self._assignment.options
        self._source = ModelSource.open(options.model)
        choice, found = choose_here(options.engine.kind)
        identity = job_identity(options, self._source, self._assignment.input_hash, choice, found)
        return Report(socket.gethostname(), os.getpid(), identity, found)

    def _load(self) -> Loaded:
        assert self._source is not None, "`report` comes first"
        if self._is_remote:
            self._source.begin_confirmation()
        self._engine = self._make_engine(self._source, self._assignment)
        relax_collector()
        log.info("ready")
        return Loaded(
            self._engine.runner.max_num_seqs, self._engine.describe(), self._engine.memory()
        )

    def _compute(self) -> None:
        """The engine's loop, until the process ends."""
        assert self._engine is not None, "`load` comes first"
        runner = self._engine.runner
        try:
            while True:
                self._admit(runner)
                done = cast("list[JobRow]", runner.step())  # one engine's rows come singly
                with self._changed:
                    self._outbox += [row for row in done if row.job not in self._dropped]
                    self._is_idle = not (self._inbox or runner.has_unfinished)
                    if self._outbox or self._is_idle:
                        self._changed.notify_all()
        except BaseException as error:
            traceback.print_exc()
            with self._changed:
                self._failure = Failure(f"{type(error).__name__}: {error}", fatal=False)
                self._changed.notify_all()

    def _admit(self, runner: Runner) -> None:
        """Keeps the runner's queue a batch ahead; waits where there is nothing at all to do."""
        with self._changed:
            if not runner.has_unfinished:
                self._changed.wait_for(lambda: self._inbox)
            for job in self._dropped:
                runner.drop(job)
        for _ in range(runner.max_num_seqs):
            if not self._inbox or not runner.has_room:
                return
            row, jobs = self._inbox.popleft()
            runner.submit(row, [job for job in jobs if job not in self._dropped])


def _log_loading(part: str, done: int, total: int) -> None:
    log.info("loaded %s (%d of %d)", part, done, total)


def _node() -> str:
    from ray import get_runtime_context

    return str(get_runtime_context().get_node_id())
