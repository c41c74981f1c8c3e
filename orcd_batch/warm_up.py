"""The GPU is made ready in a thread while the main one still reads its options.

What stays is process-wide: modules, libraries, the CUDA context. Nothing is handed over, and what
fails here fails again, with its message, where the engine is chosen.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

log = logging.getLogger(__name__)

# Without one of these there is no NVIDIA driver to wake.
_DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


class WarmUp:
    """Runs the steps in a thread; leaving the context waits for the step under way alone."""

    def __init__(self, steps: Sequence[Callable[[], object]]) -> None:
        self._steps = steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warm-up") if steps else None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        for step in self._steps:
            if self._stop.is_set():
                return
            try:
                step()
            except Exception as error:
                log.debug("warming up: %s", error)
                return


def gpu_warm_up(args: Sequence[str]) -> WarmUp:
    """For a run with these arguments; does nothing for engine=numpy or without a driver.

    Nor for a whole job by name: a check's runs are processes of their own, and this one would keep
    its context on the GPU all night.
    """
    is_wanted = not {"engine=numpy", "engine.kind=numpy"}.intersection(args)
    is_wanted = is_wanted and not any(arg.startswith(("--config-name", "-cn")) for arg in args)
    has_driver = any(path.exists() for path in _DRIVER_FILES)
    return WarmUp([_open_device, _load_cublaslt] if is_wanted and has_driver else [])


def _open_device() -> None:
    from orcd_batch.backend.cuda.device import Device

    Device().close()


def _load_cublaslt() -> None:
    from orcd_batch.backend.cuda.cublaslt_binding import cublaslt

    library = cublaslt()
    library.destroy(library.create())
