"""What one run's rows look like, in one pass: distributions, and the rows that stand out."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from orcd_batch.reproducibility.run_output import RunOutput

COLUMNS = (
    *("id", "sample_index", "finish_reason", "prompt_tokens", "completion_tokens", "logprob"),
    *("margins", "error", "error_kind"),
)
NUM_LISTED = 8
# Below this margin (in logits) another device's rounding could choose another token.
NEAR_TIE = 0.01

_MAX_REASONS = 50


class Histogram:
    """Counts of values between fixed edges; values outside count in the first or last bin.

    edges: (N + 1,) ascending. counts: (N,).
    """

    def __init__(self, edges: NDArray[np.float64]) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        bins = np.searchsorted(self.edges, values, side="right") - 1
        bins = np.clip(bins, 0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the values lie, as exact as a bin; None when empty."""
        if not self.total:
            return None
        reached = np.cumsum(self.counts)
        index = int(np.searchsorted(reached, max(share * self.total, 0.5)))
        before = reached[index] - self.counts[index]
        part = (share * self.total - before) / self.counts[index]
        low, high = self.edges[index], self.edges[index + 1]
        return float(low + min(max(part, 0.0), 1.0) * (high - low))


@dataclass(frozen=True, slots=True)
class NotableRow:
    """A row worth a look. value: what it stands out by; position: of the token, where there is."""

    id: int | str
    sample_index: int
    prompt_tokens: int
    completion_tokens: int
    value: float
    position: int | None = None


@dataclass(slots=True)
class RunStatistics:
    """Distributions over a run's rows (samples); error rows count in `reasons` only.

    lengths: (max + 1,) rows by completion tokens. logprobs: rows by their mean token logprob
    (natural log). margins: tokens by margin (logits). longest: most tokens, prompt included;
    closest: smallest margin of any token, NUM_LISTED of each.
    """

    finish_reasons: Counter[str] = field(default_factory=Counter)
    error_kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    logprobs: Histogram = field(default_factory=lambda: Histogram(np.linspace(-20, 0, 2001)))
    margins: Histogram = field(default_factory=lambda: Histogram(2.0 ** np.arange(-20, 7, 0.5)))
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_near_ties: int = 0
    logprob: float = 0.0
    longest: list[NotableRow] = field(default_factory=list)
    closest: list[NotableRow] = field(default_factory=list)

    @property
    def num_good(self) -> int:
        return int(self.lengths.sum())

    def length_quantile(self, share: float) -> float | None:
        """Completion tokens that `share` of the rows do not exceed."""
        if not self.num_good:
            return None
        reached = np.cumsum(self.lengths)
        return float(np.searchsorted(reached, max(share * self.num_good, 0.5)))


def gather(output: RunOutput) -> RunStatistics:
    """One pass over a run's rows, in bounded memory. Raises InputError for a damaged file."""
    found = RunStatistics()
    for _, batch in output.batches(COLUMNS):
        _add(found, batch)
    return found


def _add(found: RunStatistics, batch: Any) -> None:
    found.finish_reasons.update(batch.column("finish_reason").to_pylist())
    found.error_kinds.update(_counted(batch.column("error_kind")))
    for reason, number in _counted(batch.column("error")).items():
        known = reason in found.reasons or len(found.reasons) < _MAX_REASONS
        found.reasons[reason if known else "other reasons"] += number
    good = batch.filter(pc.is_null(batch.column("error_kind")))
    if not good.num_rows:
        return
    lengths = good.column("completion_tokens").to_numpy(zero_copy_only=False).astype(np.int64)
    prompts = good.column("prompt_tokens").to_numpy(zero_copy_only=False).astype(np.int64)
    logprobs = good.column("logprob").to_numpy(zero_copy_only=False)
    counts = np.bincount(lengths, minlength=len(found.lengths))
    counts[: len(found.lengths)] += found.lengths
    found.lengths = counts
    found.logprobs.add(logprobs[lengths > 0] / lengths[lengths > 0])
    found.num_tokens += int(lengths.sum())
    found.num_prompt_tokens += int(prompts.sum())
    found.logprob += float(logprobs.sum())
    _add_margins(found, good, lengths, prompts)
    longest = np.argsort(-(lengths + prompts), kind="stable")[:NUM_LISTED]
    rows = (_row(good, int(row), float(lengths[row] + prompts[row])) for row in longest)
    found.longest = heapq.nsmallest(NUM_LISTED, [*found.longest, *rows], key=lambda r: -r.value)


def _add_margins(found: RunStatistics, good: Any, lengths: Any, prompts: Any) -> None:
    margins = good.column("margins")
    values = pc.list_flatten(margins).to_numpy(zero_copy_only=False).astype(np.float64)
    finite = values[np.isfinite(values)]
    found.margins.add(finite)
    found.num_near_ties += int((finite < NEAR_TIE).sum())
    sizes = pc.list_value_length(margins).to_numpy(zero_copy_only=False).astype(np.int64)
    sizes_before = np.cumsum(sizes) - sizes
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return
    smallest = np.minimum.reduceat(values, sizes_before[filled])
    rows = []
    for index in np.argsort(smallest, kind="stable")[:NUM_LISTED].tolist():
        row = int(filled[index])
        own = values[sizes_before[row] : sizes_before[row] + sizes[row]]
        rows.append(_row(good, row, float(smallest[index]), int(np.argmin(own))))
    found.closest = heapq.nsmallest(NUM_LISTED, [*found.closest, *rows], key=lambda r: r.value)


def _row(batch: Any, row: int, value: float, position: int | None = None) -> NotableRow:
    names = ("id", "sample_index", "prompt_tokens", "completion_tokens")
    key: tuple[Any, int, int, int] = tuple(batch.column(name)[row].as_py() for name in names)
    return NotableRow(*key, value, position)


def _counted(column: Any) -> Counter[str]:
    return Counter(value for value in column.to_pylist() if value is not None)
