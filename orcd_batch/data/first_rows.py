"""The first rows of an output as short text, for a person to read."""

from collections.abc import Sequence
from typing import Any

from orcd_batch.data.location import Location
from orcd_batch.data.parquet_file import ParquetInput

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
        rows = next(batches, None)
        found = [] if rows is None else rows.slice(0, count).to_pylist()
    finally:
        parquet.close()
    return [(_text(row.get(input_column)), _outcome(row, names)) for row in found]


def _outcome(row: dict[str, Any], names: Sequence[str]) -> str:
    completion, error = row[names[0]], row[names[1]]
    return _text(completion) if error is None else f"[error] {_text(error)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        last = value[-1] if value else {}
        value = last.get("content") if isinstance(last, dict) else f"{len(value)} token ids"
    text = str(value or "").strip()
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
