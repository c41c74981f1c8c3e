"""Ctrl-C and SIGTERM as a request: the current step finishes, work is committed, then we stop."""

import signal
from types import FrameType
from typing import Any

from orcd_batch.errors import Interrupted

INTERRUPTED = "Interrupted: finished rows are kept; the same command continues."


class Interrupts:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one interrupts.

    Outside the main thread (where Python allows no signal handlers) it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def stop_if_requested(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.requested:
            raise Interrupted(INTERRUPTED)

    def __enter__(self) -> "Interrupts":
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                if signal.getsignal(signum) is signal.SIG_IGN:  # as a shell's background jobs have
                    continue
                self._previous[signum] = signal.signal(signum, self._handle)
            except ValueError:
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
