"""One process at a time works on an output; a dead process holds nothing."""

import fcntl
import os
from typing import Self

from orcd_batch.errors import OutputError


class OutputLock:
    """An advisory lock (flock) on a file; the kernel drops it when its process ends.

    Raises OutputError, naming the other process, when the lock is taken; OSError when the file
    cannot be created.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        while self._descriptor is None:
            self._descriptor = self._try()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the lock up; calling it again does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> int | None:
        """A locked descriptor, or None when the file was replaced in between."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, named = os.fstat(descriptor), os.stat(self._path)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputError(
                f"Another process (id {owner}) is working on this output and holds {self._path}: "
                "wait for it, or choose another output."
            ) from error
        except FileNotFoundError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
            os.close(descriptor)
            return None
        return descriptor
