"""Two outputs compared row by row: what is equal, where the first difference is, what explains it.

Rows are matched by (typed id, sample index), whatever their order. First all rows are compared by
hash, in parts that fit into memory; then only the listed differing rows are read in full.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orcd_batch.data.manifest import differences
from orcd_batch.reproducibility.run_output import RunOutput, num_passes
from orcd_batch.reproducibility.verify_text import explanation, render

__all__ = ["Comparison", "RowDifference", "as_dict", "compare", "explanation", "render"]

# Manifest fields that follow from a run, or say where and how fast it went: they explain nothing.
_NOT_EXPLAINING = frozenset(
    {
        *("run_hash", "totals", "statistics", "rows", "rows_computed", "rows_resumed", "errors"),
        *("tokens", "infrastructure_errors", "times", "throughput", "started", "finished"),
        *("output", "data", "path", "paths", "job_id", "command", "overwrite", "debug"),
    }
)
_NOT_EXPLAINING_ENDINGS = ("_s", "_seconds", "_path", "_dir", "_time", "_at")
_DETAILS = (
    *("id", "sample_index", "completion_ids", "margins", "fingerprints", "token_hash", "error"),
)


@dataclass(frozen=True, slots=True)
class RowDifference:
    """How one sample differs.

    kind: "tokens", "prompt" (same completion of different prompts), "numerics" (same tokens,
    different fingerprints) or "error" (one side failed, or both in different ways).
    position: of the first differing token ("numerics": fingerprint) of the completion.
    token_a, token_b: the ids there; None past the end. margin_a, margin_b: best minus
    second-best logit there. numerics_position: the first differing fingerprint.
    """

    kind: Literal["tokens", "prompt", "numerics", "error"]
    id: int | str
    sample_index: int
    position: int | None = None
    token_a: int | None = None
    token_b: int | None = None
    margin_a: float | None = None
    margin_b: float | None = None
    numerics_position: int | None = None
    error_a: str | None = None
    error_b: str | None = None


@dataclass(slots=True)
class Comparison:
    """What `compare` found. Rows are output rows (samples).

    num_tokens_differ counts different prompts and errors too. differing: the first of them in
    the order of A. only_a, only_b: the first (id, sample index) that the other side lacks.
    manifest_differences: (dotted name, A's value, B's value) of fields that could explain it.
    """

    a: str
    b: str
    num_rows_a: int
    num_rows_b: int
    num_equal: int = 0
    num_tokens_differ: int = 0
    num_numerics_differ: int = 0
    num_only_a: int = 0
    num_only_b: int = 0
    differing: list[RowDifference] = field(default_factory=list)
    only_a: list[tuple[int | str, int]] = field(default_factory=list)
    only_b: list[tuple[int | str, int]] = field(default_factory=list)
    manifest_differences: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Every row is on both sides with the same tokens and the same numerics."""
        return self.num_equal == self.num_rows_a == self.num_rows_b


def compare(a: str, b: str, max_listed: int = 100) -> Comparison:
    """Compares two outputs: files, or run directories with a completions.parquet.

    max_listed: how many rows of each kind are described; all are counted.
    Raises InputError when one is missing, damaged or not this program's output.
    """
    left, right = RunOutput(a), RunOutput(b)
    found = Comparison(a, b, left.num_rows, right.num_rows)
    pairs: list[NDArray[np.int64]] = []
    only_left: list[NDArray[np.int64]] = []
    only_right: list[NDArray[np.int64]] = []
    passes = num_passes([left, right])
    for part in range(passes):
        ours, theirs = left.keyed_rows(part, passes), right.keyed_rows(part, passes)
        joined = match(ours, theirs)
        found.num_equal += int(joined.equal.sum())
        found.num_numerics_differ += int(joined.numerics_differ.sum())
        found.num_tokens_differ += int(joined.tokens_differ.sum())
        pairs.append(joined.rows[~joined.equal])
        only_left.append(joined.only_a)
        only_right.append(joined.only_b)
        found.num_only_a += len(joined.only_a)
        found.num_only_b += len(joined.only_b)
        for rows in (pairs, only_left, only_right):
            rows[:] = [_first(np.concatenate(rows), max_listed)]
    found.differing = _described(left, right, pairs[0])
    found.only_a = _keys(left, only_left[0])
    found.only_b = _keys(right, only_right[0])
    found.manifest_differences = explaining_differences(left.manifest, right.manifest)
    left.close()
    right.close()
    return found


@dataclass(frozen=True, slots=True)
class Match:
    """Keyed rows of two outputs, joined.

    rows: (N, 2), the file rows of A and B with equal keys; equal, tokens_differ and
    numerics_differ: (N,) bool, one of them true. only_a, only_b: rows without a partner.
    """

    rows: NDArray[np.int64]
    equal: NDArray[np.bool_]
    tokens_differ: NDArray[np.bool_]
    numerics_differ: NDArray[np.bool_]
    only_a: NDArray[np.int64]
    only_b: NDArray[np.int64]


def match(a: NDArray[Any], b: NDArray[Any]) -> Match:
    """Joins two arrays of KEYED_ROW on their key."""
    _, in_a, in_b = np.intersect1d(a["key"], b["key"], assume_unique=True, return_indices=True)
    tokens_differ = a["tokens"][in_a] != b["tokens"][in_b]
    numerics_differ = (a["numerics"][in_a] != b["numerics"][in_b]) & ~tokens_differ
    return Match(
        rows=np.stack([a["row"][in_a], b["row"][in_b]], axis=1),
        equal=~(tokens_differ | numerics_differ),
        tokens_differ=tokens_differ,
        numerics_differ=numerics_differ,
        only_a=np.delete(a["row"], in_a),
        only_b=np.delete(b["row"], in_b),
    )


def explaining_differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The manifest fields that differ, without those that follow from the run itself.

    A fact that the manifest states in several places (the job's identity, the config) is named
    once: the same last name with the same two values.
    """
    found: dict[tuple[str, str], tuple[str, Any, Any]] = {}
    for name, ours, theirs in differences(a, b):
        parts = name.split(".")
        if not _NOT_EXPLAINING.intersection(parts) and not name.endswith(_NOT_EXPLAINING_ENDINGS):
            found.setdefault((parts[-1], repr((ours, theirs))), (name, ours, theirs))
    return list(found.values())


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values."""
    document = {"equal": comparison.equal, "explanation": explanation(comparison)}
    document |= asdict(comparison)
    document["manifest_differences"] = {
        name: {"a": ours, "b": theirs} for name, ours, theirs in comparison.manifest_differences
    }
    return document


def _first(rows: NDArray[np.int64], max_listed: int) -> NDArray[np.int64]:
    order = np.argsort(rows if rows.ndim == 1 else rows[:, 0], kind="stable")
    return rows[order[:max_listed]]


def _keys(output: RunOutput, rows: NDArray[np.int64]) -> list[tuple[int | str, int]]:
    picked = output.pick(rows, ("id", "sample_index"))
    return [(picked[row]["id"], picked[row]["sample_index"]) for row in rows.tolist()]


def _described(a: RunOutput, b: RunOutput, rows: NDArray[np.int64]) -> list[RowDifference]:
    ours, theirs = a.pick(rows[:, 0], _DETAILS), b.pick(rows[:, 1], _DETAILS)
    return [_difference(ours[row], theirs[other]) for row, other in rows.tolist()]


def _difference(a: dict[str, Any], b: dict[str, Any]) -> RowDifference:
    key = (a["id"], a["sample_index"])
    if a["error"] is not None or b["error"] is not None:
        return RowDifference("error", *key, error_a=a["error"], error_b=b["error"])
    numerics_position = _first_difference(a["fingerprints"], b["fingerprints"])
    position = _first_difference(a["completion_ids"], b["completion_ids"])
    kind: Literal["tokens", "prompt", "numerics"] = "prompt" if position is None else "tokens"
    if a["token_hash"] == b["token_hash"]:
        kind, position = "numerics", numerics_position
    return RowDifference(
        kind,
        *key,
        position=position,
        token_a=_at(a["completion_ids"], position),
        token_b=_at(b["completion_ids"], position),
        margin_a=_at(a["margins"], position),
        margin_b=_at(b["margins"], position),
        numerics_position=numerics_position,
    )


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index where the sequences differ, also by one ending; None when equal."""
    for index, (ours, theirs) in enumerate(zip(a, b, strict=False)):
        if ours != theirs:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def _at(values: Sequence[Any], index: int | None) -> Any:
    return values[index] if index is not None and index < len(values) else None
