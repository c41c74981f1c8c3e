"""One of the replicas, whichever process holds it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orcd_batch.scale_out.messages import Loaded, Reply, Report


@dataclass(slots=True)
class Place:
    """One of the replicas, whichever process holds it now.

    asked: Ray's reference to the answer that is awaited, None once the place is given up.
    num_barren: starts in a row that ended before a row was finished. num_rows: finished so far.
    past, num_past_tokens: what the engines of earlier processes counted.
    """

    number: int
    actor: Any = None
    asked: Any = None
    phase: Literal["reporting", "loading", "working"] = "reporting"
    deadline: float = 0.0
    num_starts: int = 0
    num_barren: int = 0
    num_rows: int = 0
    node: str | None = None
    trouble: str = ""
    report: Report | None = None
    loaded: Loaded | None = None
    last: Reply | None = None
    past: dict[str, float] = field(default_factory=dict)
    num_past_tokens: int = 0

    def end(self) -> None:
        """Its process is gone; what the engine counted stays."""
        self.past, self.num_past_tokens = self.statistics, self.num_sampled_tokens
        self.asked = self.last = None

    @property
    def statistics(self) -> dict[str, float]:
        """The engine's, those of earlier processes added."""
        return added([self.past, self.last.statistics if self.last else {}])

    @property
    def num_sampled_tokens(self) -> int:
        return self.num_past_tokens + (self.last.num_sampled_tokens if self.last else 0)

    @property
    def is_ready(self) -> bool:
        return self.asked is not None and self.phase == "working"

    def describe(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        report, loaded = self.report, self.loaded
        return {
            "worker": self.number,
            "node": self.node,
            "device": report.identity["device"] if report else None,
            "starts": self.num_starts,
            "rows": self.num_rows,
            "environment": report.environment if report else None,
            "versions": report.identity["versions"] if report else None,
            "backend": loaded.description.get("backend") if loaded else None,
        }


def added(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of numbers by name."""
    total: dict[str, Any] = {}
    for record in records:
        for name, value in record.items():
            total[name] = total.get(name, 0) + value
    return total
