"""Persistent threads that share out a step's work, and BLAS held to one thread per call."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

Task = Callable[[], object]
_Outbox = SimpleQueue[BaseException | None]


def available_cpus() -> int:
    """CPUs this process may run on."""
    with suppress(AttributeError):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class Workers:
    """Runs lists of tasks on the calling thread and `num_threads - 1` others.

    Numpy releases the GIL inside its loops, so tasks that spend their time there run in parallel.
    Which thread runs a task never matters to its result: tasks write to disjoint arrays.
    """

    def __init__(self, num_threads: int = 0) -> None:
        self.num_threads = num_threads or available_cpus()
        self._inboxes: list[SimpleQueue[tuple[Sequence[Task], _Outbox] | None]] = []
        for index in range(1, self.num_threads):
            inbox: SimpleQueue[tuple[Sequence[Task], _Outbox] | None] = SimpleQueue()
            thread = Thread(target=_serve, args=(inbox,), name=f"orcd-numpy-{index}", daemon=True)
            thread.start()
            self._inboxes.append(inbox)

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs every task once and returns when all are done; raises the first failure."""
        stride = min(len(tasks), self.num_threads)
        if stride <= 1:
            _run_all(tasks)
            return
        outbox: _Outbox = SimpleQueue()
        for index in range(1, stride):
            self._inboxes[index - 1].put((tasks[index::stride], outbox))
        failures: list[BaseException | None] = []
        try:
            _run_all(tasks[::stride])
        finally:
            failures.extend(outbox.get() for _ in range(1, stride))
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Ends the threads; `run` then works on the calling thread alone."""
        for inbox in self._inboxes:
            inbox.put(None)
        self._inboxes, self.num_threads = [], 1


def _serve(inbox: SimpleQueue[tuple[Sequence[Task], _Outbox] | None]) -> None:
    while (job := inbox.get()) is not None:
        tasks, outbox = job
        try:
            _run_all(tasks)
        except BaseException as failure:
            outbox.put(failure)
        else:
            outbox.put(None)


def _run_all(tasks: Sequence[Task]) -> None:
    # Infinities and NaN are found in the logits; numpy's warnings on the way would only be noise.
    with np.errstate(all="ignore"):
        for task in tasks:
            task()


def limit_blas_to_one_thread() -> tuple[Any, str]:
    """Keeps each BLAS call on its calling thread, process-wide, until the limiter is restored.

    Returns (limiter with `restore_original_limits()`, or None; BLAS kernel type such as
    "SkylakeX", or "" when threadpoolctl is missing or does not know it).
    """
    try:
        import threadpoolctl
    except ImportError:
        return None, ""
    limiter = threadpoolctl.threadpool_limits(1, user_api="blas")
    libraries = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]
    return limiter, str(libraries[0].get("architecture", "")) if libraries else ""
