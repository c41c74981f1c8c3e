"""Time per op, for `debug=true`: one table for every backend, by the protocol's names."""

import time
from collections.abc import Callable
from typing import Any

TIMED_OPS = (
    *("place", "embedding", "rms_norm", "linear", "linear_add", "rope_and_cache", "attention"),
    *("gated_linear", "take_rows", "logits", "sample"),
)

# Op -> calls, seconds in all, and microseconds per call.
OpTable = dict[str, dict[str, float]]


class OpSums:
    """Calls and seconds of each op so far."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, float]] = {}

    def add(self, name: str, seconds: float) -> None:
        calls, total = self._sums.get(name, (0, 0.0))
        self._sums[name] = (calls + 1, total + seconds)

    def clear(self) -> None:
        self._sums.clear()

    def table(self) -> OpTable:
        """The ops that ran, in the protocol's order."""
        names = sorted(self._sums, key=lambda name: _ORDER.get(name, len(TIMED_OPS)))
        return {name: _row(*self._sums[name]) for name in names}


class HostOpTimes:
    """Wall time per op, for ops that are done when they return."""

    def __init__(self) -> None:
        self._sums = OpSums()

    def watch(self, ops: Any) -> None:
        """From here on times the ops of this object, by replacing its methods."""
        for name in TIMED_OPS:
            setattr(ops, name, self._timed(name, getattr(ops, name)))

    def summary(self) -> OpTable:
        return self._sums.table()

    def _timed(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = op(*args)
            self._sums.add(name, time.perf_counter() - started)
            return result

        return timed


def as_lines(table: OpTable) -> list[str]:
    """The table for a log, the most expensive op first, each with its share of all."""
    total = sum(row["seconds"] for row in table.values()) or 1.0
    rows = sorted(table.items(), key=lambda item: -item[1]["seconds"])
    return [
        f"{name:15} {row['calls']:>9,.0f} calls {row['seconds']:>9.3f} s "
        f"{row['us_per_call']:>10.1f} us a call {row['seconds'] / total:>6.1%}"
        for name, row in rows
    ]


def _row(calls: int, seconds: float) -> dict[str, float]:
    return {
        "calls": calls,
        "seconds": round(seconds, 6),
        "us_per_call": round(seconds / calls * 1e6, 2),
    }


_ORDER = {name: index for index, name in enumerate(TIMED_OPS)}
