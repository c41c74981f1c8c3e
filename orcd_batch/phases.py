"""When the parts of a start ended, counted from the start of the process."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_START_TIME_FIELD = 19  # of those behind the name: field 22 of proc(5)
_IMPORTED = time.perf_counter()


def seconds_since_process_start() -> float:
    """To a hundredth of a second on Linux; elsewhere counted from the import of this module."""
    try:
        ticks = int(_STAT.read_text().rpartition(")")[2].split()[_START_TIME_FIELD])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _IMPORTED


class Phases:
    """Seconds from the start of the process to the end of each phase, in order."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def end(self, name: str) -> None:
        """The phase ended now; only its first end counts."""
        if name not in self._ends:
            self._ends[name] = round(seconds_since_process_start(), 3)

    def ends(self) -> dict[str, float]:
        """Seconds by phase, in the order in which they ended."""
        return dict(self._ends)
