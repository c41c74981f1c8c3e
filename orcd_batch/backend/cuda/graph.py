"""Work captured once from the device's stream and replayed as one launch."""

from collections.abc import Callable
from typing import Any

from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call


class Graph:
    """A captured sequence of launches: same kernels, same addresses, same order at every replay."""

    def __init__(self, device: Device, record: Callable[[], None]) -> None:
        """Captures what `record` queues on the device's stream; nothing runs yet.

        `record` must not allocate, synchronize, or touch the host. Raises DeviceError when the
        capture fails.
        """
        from cuda.bindings import driver

        self._driver: Any = driver
        self._device = device
        stream = device.stream.handle
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture(stream, mode))
        try:
            record()
        except BaseException:
            _, unfinished = driver.cuStreamEndCapture(stream)
            driver.cuGraphDestroy(unfinished)
            raise
        graph = call(driver.cuStreamEndCapture(stream))
        try:
            self._executable: Any = call(driver.cuGraphInstantiate(graph, 0))
        finally:
            call(driver.cuGraphDestroy(graph))

    def launch(self) -> None:
        """Queues one replay on the device's stream."""
        call(self._driver.cuGraphLaunch(self._executable, self._device.stream.handle))

    def close(self) -> None:
        """Frees the graph, once its replays have ended. Safe to call twice."""
        if self._executable is not None:
            call(self._driver.cuGraphExecDestroy(self._executable))
            self._executable = None


def time_launches(device: Device, record: Callable[[], None]) -> float:
    """Seconds that the queued work takes on the GPU, without launch gaps: the faster of two
    replays of a graph of it."""
    from cuda.core import EventOptions

    graph = Graph(device, record)
    try:
        graph.launch()
        times: list[float] = []
        for _ in range(2):
            start = device.stream.record(options=EventOptions(timing_enabled=True))
            graph.launch()
            end = device.stream.record(options=EventOptions(timing_enabled=True))
            end.sync()
            times.append((end - start) / 1e3)
    finally:
        graph.close()
    return min(times)
