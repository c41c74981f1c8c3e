"""One output row, and the fixed schema of what the program computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Self

import pyarrow as pa

ErrorKind = Literal["input", "infrastructure"]

# Everything computed except `id`, in the order of the output. The type of `id` is the input's.
COMPUTED_SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int32()),
        pa.field("completion", pa.string()),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("logprob", pa.float64()),
        pa.field("token_logprobs", pa.list_(pa.float32())),
        pa.field("margins", pa.list_(pa.float32())),
        pa.field("fingerprints", pa.list_(pa.int64())),
        pa.field("token_hash", pa.string()),
        pa.field("numerics_hash", pa.string()),
        pa.field("error", pa.string()),
        pa.field("error_kind", pa.string()),
    ]
)
COMPUTED_NAMES: tuple[str, ...] = ("id", *COMPUTED_SCHEMA.names)
_computed_values = attrgetter(*COMPUTED_SCHEMA.names)
_NO_VALUES = [()] * len(COMPUTED_SCHEMA)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One sample of one input row, as it will stand in the output.

    row_index: position in the input, from 0. id: the row's id (its index where there is no id
    column). completion_ids, token_logprobs, margins and fingerprints have one entry per sampled
    token. logprob: their sum, natural log. token_hash, numerics_hash: hex SHA-256.
    error: the reason, None when fine; every other computed field is then None.
    """

    row_index: int
    sample_index: int
    id: int | str
    completion: str | None = None
    completion_ids: Sequence[int] | None = None
    finish_reason: str = "error"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprob: float | None = None
    token_logprobs: Sequence[float] | None = None
    margins: Sequence[float] | None = None
    fingerprints: Sequence[int] | None = None
    token_hash: str | None = None
    numerics_hash: str | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None

    @classmethod
    def failed(
        cls, row_index: int, sample_index: int, row_id: int | str, error: str, kind: ErrorKind
    ) -> Self:
        """The output row of a sample that could not be run."""
        return cls(row_index, sample_index, row_id, error=error, error_kind=kind)


def computed_columns(results: Sequence[SampleResult]) -> list[Any]:
    """The columns of COMPUTED_SCHEMA as pyarrow arrays, one entry per result."""
    values = zip(*map(_computed_values, results), strict=True) if results else _NO_VALUES
    return [
        pa.array(column, field.type) for column, field in zip(values, COMPUTED_SCHEMA, strict=True)
    ]
