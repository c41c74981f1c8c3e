"""How much the completions of one prompt differ between seeds and samples, group by group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orcd_batch.reproducibility.aligned_rows import aligned_rows, sample_indices
from orcd_batch.reproducibility.run_output import RunOutput

# Work is bounded: of more prompts or pairs an even choice is compared; edit distances are those of
# the first pairs; beyond CURVE_LENGTH tokens two completions count as the same.
MAX_PROMPTS = 20_000
MAX_PAIRS_PER_PROMPT = 64
MAX_EDIT_PAIRS = 2_000
CURVE_LENGTH = 512

_COLUMNS = ("id", "sample_index", "completion_ids", "token_hash", "numerics_hash")

Tokens = NDArray[np.int32]


@dataclass(slots=True)
class VariantStatistics:
    """All variants (seeds × samples) of the prompts of one group of runs; sums, shares below.

    num_pairs: pairs of variants of one prompt; same_tokens and same_bits of them agree.
    agreeing: (CURVE_LENGTH + 1,) compared pairs whose first p tokens are the same (one that has
    ended agrees with its like only). unique: per n-gram size 1 and 2, (distinct, all) n-grams,
    counted within each prompt.
    """

    num_prompts: int = 0
    num_variants: int = 0
    num_pairs: int = 0
    num_same_tokens: int = 0
    num_same_bits: int = 0
    num_distinct: int = 0
    num_compared: int = 0
    agreeing: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(CURVE_LENGTH + 1, np.int64)
    )
    divergence: float = 0.0
    num_divergent: int = 0
    edits: float = 0.0
    num_edit_pairs: int = 0
    distinct_ngrams: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    ngrams: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))

    @property
    def same_tokens(self) -> float | None:
        return _share(self.num_same_tokens, self.num_pairs)

    @property
    def same_bits(self) -> float | None:
        return _share(self.num_same_bits, self.num_pairs)

    @property
    def distinct_completions(self) -> float | None:
        """Distinct completions of a prompt, of its variants; 1 when all differ."""
        return _share(self.num_distinct, self.num_variants)

    @property
    def distinct_1(self) -> float | None:
        return _share(self.distinct_ngrams[0], self.ngrams[0])

    @property
    def distinct_2(self) -> float | None:
        return _share(self.distinct_ngrams[1], self.ngrams[1])

    @property
    def mean_divergence(self) -> float | None:
        """Position of the first different token, over the compared pairs that differ."""
        return _share(self.divergence, self.num_divergent)

    @property
    def mean_edit_distance(self) -> float | None:
        """Token edits from one variant to another, as a share of the longer one."""
        return _share(self.edits, self.num_edit_pairs)

    @property
    def agreement_curve(self) -> NDArray[np.float64]:
        """Share of compared pairs still the same after p = 0 … CURVE_LENGTH tokens."""
        return self.agreeing / max(1, self.num_compared)


def compare_variants(outputs: Sequence[RunOutput]) -> VariantStatistics:
    """Streams runs of the same rows side by side: those of a group differ in their seed alone.

    Raises InputError when the runs' rows are not the same ids in the same order.
    """
    found = VariantStatistics()
    num_rows = outputs[0].num_rows
    stride = max(1, num_rows // MAX_PROMPTS)
    first_prompt = 0
    for tables in aligned_rows(outputs, _COLUMNS):
        starts = np.flatnonzero(sample_indices(tables[0]) == 0)
        ends = np.append(starts[1:], tables[0].num_rows)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), first_prompt):
            if number % stride == 0:
                rows = [table.slice(int(start), int(end - start)) for table in tables]
                _add_prompt(found, pa.concat_tables(rows))
        first_prompt += len(starts)
    return found


def _add_prompt(found: VariantStatistics, rows: Any) -> None:
    """All variants of one prompt; those that failed are left out."""
    rows = rows.filter(pc.is_valid(rows.column("token_hash")))
    size = rows.num_rows
    if size == 0:
        return
    tokens = rows.column("token_hash").to_pylist()
    both = list(zip(tokens, rows.column("numerics_hash").to_pylist(), strict=True))
    variants = [np.asarray(ids, np.int32) for ids in rows.column("completion_ids").to_pylist()]
    found.num_prompts += 1
    found.num_variants += size
    found.num_pairs += size * (size - 1) // 2
    found.num_same_tokens += _equal_pairs(tokens)
    found.num_same_bits += _equal_pairs(both)
    found.num_distinct += len(set(tokens))
    _add_ngrams(found, variants)
    if size > 1:
        _add_pairs(found, variants)


def _add_ngrams(found: VariantStatistics, variants: Sequence[Tokens]) -> None:
    singles = np.concatenate(variants)
    doubles = np.concatenate([(v[:-1].astype(np.int64) << 32) | v[1:] for v in variants])
    for index, grams in enumerate((singles, doubles)):
        found.distinct_ngrams[index] += len(np.unique(grams))
        found.ngrams[index] += len(grams)


def _add_pairs(found: VariantStatistics, variants: Sequence[Tokens]) -> None:
    left, right = _pairs(len(variants))
    matrix = _padded([ids[:CURVE_LENGTH] for ids in variants])
    a, b = matrix[left], matrix[right]
    lengths = np.array([min(len(ids), CURVE_LENGTH) for ids in variants])
    differ = a != b
    same = ~differ.any(axis=1)
    position = np.where(same, CURVE_LENGTH, np.argmax(differ, axis=1))
    found.num_compared += len(left)
    found.agreeing += _reaching(position)
    found.divergence += float(position[~same].sum())
    found.num_divergent += int((~same).sum())
    if found.num_edit_pairs < MAX_EDIT_PAIRS:
        longer = np.maximum(np.maximum(lengths[left], lengths[right]), 1)
        distances = edit_distances(a, b, lengths[left], lengths[right])
        found.edits += float((distances / longer).sum())
        found.num_edit_pairs += len(left)


def edit_distances(
    a: Tokens, b: Tokens, a_lengths: NDArray[np.int64], b_lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Levenshtein distances of P pairs of token rows (P, L), all pairs at once.

    One row of the table at a time; a run of insertions is a running minimum along the row.
    """
    num_pairs, width = b.shape
    across = np.arange(width + 1)
    row = np.broadcast_to(across, (num_pairs, width + 1)).copy()
    result = row[np.arange(num_pairs), b_lengths]
    for i in range(int(a_lengths.max(initial=0))):
        new = np.empty_like(row)
        new[:, 0] = i + 1
        changed = row[:, :-1] + (b != a[:, i : i + 1])
        new[:, 1:] = np.minimum(changed, row[:, 1:] + 1)
        row = np.minimum.accumulate(new - across, axis=1) + across
        ending = a_lengths == i + 1
        result[ending] = row[ending, b_lengths[ending]]
    return np.asarray(result, np.int64)


def _reaching(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """For p = 0 … CURVE_LENGTH: how many positions are at least p."""
    counts = np.bincount(np.minimum(positions, CURVE_LENGTH), minlength=CURVE_LENGTH + 1)
    return np.cumsum(counts[::-1])[::-1]


def _padded(variants: Sequence[Tokens]) -> Tokens:
    """(variants, longest) with -1 after each end."""
    matrix = np.full((len(variants), max(1, *map(len, variants))), -1, np.int32)
    for row, ids in zip(matrix, variants, strict=True):
        row[: len(ids)] = ids
    return matrix


@cache
def _pairs(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of variants, or an even choice of MAX_PAIRS_PER_PROMPT of them."""
    pairs = np.array(list(combinations(range(size), 2)), np.int64)
    if len(pairs) > MAX_PAIRS_PER_PROMPT:
        pairs = pairs[np.linspace(0, len(pairs) - 1, MAX_PAIRS_PER_PROMPT).astype(np.int64)]
    return pairs[:, 0], pairs[:, 1]


def _equal_pairs(values: Sequence[Any]) -> int:
    counts = np.array([values.count(value) for value in set(values)], np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _share(part: float | np.integer[Any], whole: float | np.integer[Any]) -> float | None:
    return float(part) / float(whole) if whole else None
