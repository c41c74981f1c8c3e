"""Cells of pyarrow arrays as Python values, where one bad cell spoils only its own row."""

from typing import Any

import pyarrow as pa


class BadCell:
    """A cell that cannot be used, with the reason."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def cells(column: Any) -> list[Any]:
    """The column's values, with a BadCell where text is not UTF-8 or a value has no Python form."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        return [_cell(column[i]) for i in range(len(column))]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadCell(f"holds text that is not UTF-8 (byte {error.start} of {error.end})")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadCell(f"cannot be read ({error})")


def messages_problem(messages: Any) -> str | None:
    """Why a cell of the messages column cannot be run, or None."""
    if not messages:
        return "holds no messages"
    empty = next((i for i, message in enumerate(messages) if message is None), None)
    return None if empty is None else f"is null at message {empty}"


def token_ids_problem(token_ids: Any) -> str | None:
    """Why a cell of the token id column cannot be run, or None."""
    if not token_ids:
        return "holds no token ids"
    empty = next((i for i, token in enumerate(token_ids) if token is None), None)
    return None if empty is None else f"is null at position {empty}"
