"""BLAS held to one thread per call, for as long as anyone needs it.

How many threads BLAS uses is a setting of the whole process, and its results depend on it. The
count of holders is therefore kept here, for the process too: the first one sets the limit, the
last one gives BLAS its threads back.
"""

from threading import Lock
from typing import Any

_lock = Lock()
_holders: set["BlasLimit"] = set()
_limiters: list[Any] = []


class BlasLimit:
    """Holds BLAS to one thread from now until `release`.

    kernel: BLAS's kernel type for this CPU, such as "SkylakeX"; "" where threadpoolctl is missing
    or does not know it (nothing is limited then, and BLAS threads as it likes).
    """

    def __init__(self) -> None:
        self.kernel = ""
        try:
            import threadpoolctl
        except ImportError:
            return
        with _lock:
            if not _holders:
                _limiters.append(threadpoolctl.threadpool_limits(1, user_api="blas"))
            _holders.add(self)
        libraries = threadpoolctl.threadpool_info()
        kernels = [info.get("architecture", "") for info in libraries if info["user_api"] == "blas"]
        self.kernel = str(kernels[0]) if kernels else ""

    def release(self) -> None:
        """Gives up this hold; doing it twice is harmless."""
        with _lock:
            _holders.discard(self)
            if not _holders and _limiters:
                _limiters.pop().restore_original_limits()
