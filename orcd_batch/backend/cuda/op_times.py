"""Time per op on the GPU, for `debug=true`: an event before and after every call."""

from collections.abc import Callable
from typing import Any

from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.op_times import TIMED_OPS, OpSums, OpTable

# Event pairs kept before they are read, which waits for the GPU.
_MAX_PENDING = 4096


class OpTimes:
    """Sums of time between the events around each op; launch gaps count where the host is late."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pending: list[tuple[str, Any, Any]] = []
        self._sums = OpSums()

    def watch(self, ops: Any) -> None:
        """From here on times the ops of this object, by replacing its methods; no more replays."""
        ops.steps.graphs = False
        for name in TIMED_OPS:
            setattr(ops, name, self.timed(name, getattr(ops, name)))

    def summary(self) -> OpTable:
        """Op -> calls, seconds in all, and microseconds per call; waits for the GPU."""
        self._read()
        return self._sums.table()

    def clear(self) -> None:
        """Forgets what was measured so far."""
        self._pending.clear()
        self._sums.clear()

    def timed(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        """The op, its time added to `name` at every call."""

        def timed(*args: Any) -> Any:
            start = self._event()
            result = op(*args)
            self._pending.append((name, start, self._event()))
            if len(self._pending) >= _MAX_PENDING:
                self._read()
            return result

        return timed

    def _event(self) -> Any:
        from cuda.core import EventOptions

        return self._device.stream.record(options=EventOptions(timing_enabled=True))

    def _read(self) -> None:
        self._device.synchronize()
        for name, start, end in self._pending:
            self._sums.add(name, (end - start) / 1e3)
        self._pending.clear()
