"""The first rows of an output as short text, for a person to read."""

from collections.abc import Sequence
from typing import Any

from orcd_batch.data.location import Location
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.data.row_values import BadCell, cells

_MAX_CHARACTERS = 240


def preview(output: str, input_column: str, prefix: str, count: int) -> list[tuple[str, str]]:
    """(prompt, completion or error) of the first `count` rows, long texts shortened.

    input_column: the prompt, messages or token ids; empty where the output lacks it.
    prefix: the output prefix of the run. Raises InputError when the output cannot be read.
    """
    parquet = ParquetInput(Location.parse(output))
    try:
        names = [prefix + "completion", prefix + "error"]
        if input_column in parquet.schema.names:
            names.append(input_column)
        batches = parquet.batches(0, names) if parquet.row_group_sizes else iter(())
        head = next(batches, None)
        columns = [] if head is None else [cells(head.column(n).slice(0, count)) for n in names]
        found = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    finally:
        parquet.close()
    return [(_text(row.get(input_column)), _outcome(row, names)) for row in found]


def _outcome(row: dict[str, Any], names: Sequence[str]) -> str:
    completion, error = row[names[0]], row[names[1]]
    return _text(completion) if error is None else f"[error] {_text(error)}"


def _text(value: Any) -> str:
    if isinstance(value, BadCell):
        value = f"[{value.reason}]"
    if isinstance(value, list):
        last = value[-1] if value else {}
        value = last.get("content") if isinstance(last, dict) else f"{len(value)} token ids"
    text = str(value or "").strip()
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
