"""Each job's own log file, while several jobs run in one process."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

# The run directories of the jobs that the lines being logged are about.
_concerned: ContextVar[tuple[Path, ...]] = ContextVar("_concerned", default=())


@contextmanager
def lines_about(*directories: Path) -> Iterator[None]:
    """Lines logged meanwhile go to the logs of the jobs in these run directories only.

    After the outermost of these blocks the logs' files are closed: a sweep may have more jobs than
    a process may have open files. A further line opens its file again.
    """
    token = _concerned.set(directories)
    try:
        yield
    finally:
        _concerned.reset(token)
        if not _concerned.get():
            for handler in logging.getLogger().handlers:
                if isinstance(handler, JobLogs):
                    handler.close_files(directories)


class JobLogs(logging.Handler):
    """Hands each line to the handlers of the jobs it is about; a context manager that logs so.

    handlers: of each job, by run directory, as Hydra has set them up. level: of the root logger.
    """

    def __init__(self, handlers: Mapping[Path, Sequence[logging.Handler]], level: int) -> None:
        super().__init__()
        self._handlers, self._root_level = handlers, level

    def emit(self, record: logging.LogRecord) -> None:
        for directory in _concerned.get():
            for handler in self._handlers.get(directory, ()):
                if record.levelno >= handler.level:
                    handler.handle(record)

    def __enter__(self) -> "JobLogs":
        root = logging.getLogger()
        self._previous = root.handlers[:], root.level
        root.handlers[:] = [self]
        root.setLevel(self._root_level)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.handlers[:], level = self._previous
        root.setLevel(level)
        self.close()

    def close_files(self, directories: Iterable[Path]) -> None:
        """Closes the files of these jobs."""
        for directory in directories:
            for handler in self._handlers.get(directory, ()):
                handler.close()

    def close(self) -> None:
        """Closes the files of all jobs."""
        self.close_files(self._handlers)
        super().close()
