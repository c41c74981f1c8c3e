"""The id column: every id present and unique, checked in 16 bytes a row."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orcd_batch.errors import InputError

# Gives the id column as a fresh stream of (index of the first row, pyarrow array).
IdStream = Callable[[], Iterator[tuple[int, Any]]]


def check_ids(name: str, stream: IdStream) -> None:
    """Raises InputError, with row and id, for an id that is null, repeated or not valid text.

    One pass keeps a 64-bit digest per row; a second one, only when two digests are equal, tells
    a repeated id from a chance collision.
    """
    pieces = [_digests(name, first, column) for first, column in stream()]
    digests = np.concatenate([np.empty(0, dtype=np.uint64), *pieces])
    digests.sort()
    suspects = digests[1:][digests[1:] == digests[:-1]]
    if len(suspects):
        _find_repeated(name, stream, np.unique(suspects))


def ids_of(name: str, first: int, column: Any) -> list[int | str]:
    """The ids of a pyarrow array as Python values; raises InputError as `check_ids` does."""
    if column.null_count:
        row = first + column.is_null().index(pa.scalar(True)).as_py()
        raise InputError(
            f"The id column {name} is null in row {row}: give every row an id, or use the row's "
            "index with dataset.id_column=''."
        )
    try:
        values: list[int | str] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"The id column {name} holds text that is not UTF-8: {error}.") from error
    return values


def _digests(name: str, first: int, column: Any) -> NDArray[np.uint64]:
    if pa.types.is_integer(column.type) and not column.null_count:
        values = column.to_numpy(zero_copy_only=False)
        wide: NDArray[np.uint64] = values.astype(np.int64 if values.dtype.kind == "i" else "u8")
        return wide.view(np.uint64)
    hashes = [hash(value) for value in ids_of(name, first, column)]
    return np.array(hashes, dtype=np.int64).view(np.uint64)


def _find_repeated(name: str, stream: IdStream, suspects: NDArray[np.uint64]) -> None:
    seen: dict[int | str, int] = {}
    for first, column in stream():
        candidates = np.flatnonzero(np.isin(_digests(name, first, column), suspects))
        for offset in candidates.tolist():
            value = column[offset].as_py()
            if value in seen:
                raise InputError(
                    f"The id {value!r:.80} of the column {name} stands in rows {seen[value]} and "
                    f"{first + offset}: ids must be unique (dataset.id_column='' uses the row's "
                    "index instead)."
                )
            seen[value] = first + offset
