"""Persistent threads that share out a step's work."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread

import numpy as np

Task = Callable[[], object]


def available_cpus() -> int:
    """CPUs this process may run on."""
    with suppress(AttributeError):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class _Job:
    """Tasks that any number of threads take from until none is left."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._todo = deque(tasks)
        self._num_unfinished = len(self._todo)
        self._lock, self._all_finished = Lock(), Lock()
        self._all_finished.acquire()
        self._failure: BaseException | None = None

    def work(self) -> None:
        # Infinities and NaN are found in the logits; numpy's warnings on the way are only noise.
        with np.errstate(all="ignore"):
            while True:
                try:
                    task = self._todo.popleft()
                except IndexError:
                    return
                try:
                    task()
                except BaseException as failure:
                    self._failure = failure
                self._finish_one()

    def wait(self) -> None:
        """Returns when every task has ended; raises a failure of any of them."""
        self._all_finished.acquire()
        if self._failure is not None:
            raise self._failure

    def _finish_one(self) -> None:
        with self._lock:
            self._num_unfinished -= 1
            if self._num_unfinished == 0:
                self._all_finished.release()


class Workers:
    """Runs lists of tasks on the calling thread and `num_threads - 1` others.

    Numpy releases the GIL inside its loops, so tasks that spend their time there run in parallel.
    A thread that wakes up late, or has a busy CPU, simply takes fewer tasks. Which thread runs a
    task never matters to its result: tasks write to disjoint arrays.
    """

    def __init__(self, num_threads: int = 0) -> None:
        self.num_threads = num_threads or available_cpus()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for index in range(1, self.num_threads):
            Thread(
                target=_serve, args=(self._jobs,), name=f"orcd-numpy-{index}", daemon=True
            ).start()

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs every task once and returns when all have ended; raises a failure of any."""
        if not tasks:
            return
        job = _Job(tasks)
        for _ in range(min(self.num_threads, len(tasks)) - 1):
            self._jobs.put(job)
        job.work()
        job.wait()

    def close(self) -> None:
        """Ends the threads; `run` then works on the calling thread alone."""
        for _ in range(1, self.num_threads):
            self._jobs.put(None)
        self.num_threads = 1


def _serve(jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.work()
        del job
