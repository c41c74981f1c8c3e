"""Cleans up after a Ray that was started for one job, also when the driver was killed.

`python -m orcd_batch.scale_out.keeper DIRECTORY` waits until its standard input closes, which it
does when the driver ends in whatever way. Then it ends the processes that carry the directory's
name in their environment (Linux; Ray's own clean-up takes up to a minute) and removes it.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

# Marks the processes of a Ray that this program has started, by the directory of its session.
SESSION_VARIABLE = "ORCD_BATCH_RAY_SESSION"
# Ray's processes end by themselves after an orderly shutdown.
_PATIENCE_S = 2.0
_ATTEMPTS = 5


def left_behind(directory: str) -> list[int]:
    """Processes of the session that are still there."""
    mark = f"{SESSION_VARIABLE}={directory}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue  # it has ended, or is someone else's
    return [pid for pid in found if pid != os.getpid()]


def main() -> None:
    directory = sys.argv[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    patient_until = time.monotonic() + _PATIENCE_S
    while left_behind(directory) and time.monotonic() < patient_until:
        time.sleep(0.05)
    for _ in range(_ATTEMPTS):
        for pid in left_behind(directory):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
