"""Work captured once from the device's stream and replayed as one launch."""

import math
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
    graph = Graph(device, record)
    try:
        graph.launch()
        return min(_time_replays(device, graph, 1) for _ in range(2))
    finally:
        graph.close()


def time_lasting(
    device: Device, record: Callable[[], None], settle_s: float, measured_s: float
) -> float:
    """Seconds that the queued work takes on the GPU where it goes on: the mean over measured_s of
    replays that follow each other, after settle_s of them."""
    graph = Graph(device, record)
    try:
        graph.launch()
        once = _time_replays(device, graph, 1)
        for _ in range(math.ceil(settle_s / once)):
            graph.launch()
        return _time_replays(device, graph, math.ceil(measured_s / once))
    finally:
        graph.close()


def _time_replays(device: Device, graph: Graph, count: int) -> float:
    from cuda.core import EventOptions

    start = device.stream.record(options=EventOptions(timing_enabled=True))
    for _ in range(count):
        graph.launch()
    end = device.stream.record(options=EventOptions(timing_enabled=True))
    end.sync()
    return float(end - start) / 1e3 / count
