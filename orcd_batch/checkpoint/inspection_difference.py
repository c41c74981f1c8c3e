"""What differs between two GGUF files: configuration, metadata, tensors and their bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.inspection_facts import Scalar, shown_scalar

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class ItemDifference:
    """One thing that is not the same in both files; None where a file does not have it."""

    name: str
    here: Scalar | None
    there: Scalar | None


@dataclass(frozen=True, slots=True)
class Difference:
    """All differences to the file at `path`; num_equal_tensors have the same type, shape, bytes."""

    path: str
    configuration: tuple[ItemDifference, ...]
    metadata: tuple[ItemDifference, ...]
    tensors: tuple[ItemDifference, ...]
    num_equal_tensors: int

    @property
    def is_empty(self) -> bool:
        return not (self.configuration or self.metadata or self.tensors)


def file_difference(
    gguf: GGUFFile,
    configuration: Mapping[str, Scalar],
    other: GGUFFile,
    other_configuration: Mapping[str, Scalar],
) -> Difference:
    """Compares everything, every tensor's bytes included (no order counts).

    Raises ClosedError when one of the files is closed.
    """
    tensors = [
        difference
        for name in {**gguf.tensors, **other.tensors}
        if (difference := _tensor_difference(name, gguf, other)) is not None
    ]
    return Difference(
        path=str(other.path),
        configuration=_value_differences(configuration, other_configuration),
        metadata=_value_differences(gguf.metadata, other.metadata),
        tensors=tuple(tensors),
        num_equal_tensors=len({**gguf.tensors, **other.tensors}) - len(tensors),
    )


def _value_differences(
    here: Mapping[str, object], there: Mapping[str, object]
) -> tuple[ItemDifference, ...]:
    return tuple(
        ItemDifference(name, *_shown_pair(here.get(name), there.get(name)))
        for name in {**here, **there}
        if not _same_value(here.get(name), there.get(name))
    )


def _same_value(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    return type(a) is type(b) and a == b


def _shown_pair(a: object, b: object) -> tuple[Scalar | None, Scalar | None]:
    """Both values in short form; of two arrays, their lengths and the first place that differs."""
    if isinstance(a, list | np.ndarray) and isinstance(b, list | np.ndarray):
        place = next(
            (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
            min(len(a), len(b)),
        )
        return _shown_item(a, place), _shown_item(b, place)
    return (
        None if a is None else shown_scalar(a),
        None if b is None else shown_scalar(b),
    )


def _shown_item(array: list[object] | NDArray[np.generic], place: int) -> str:
    kind = "string" if isinstance(array, list) else array.dtype.name
    if place >= len(array):
        return f"{kind}[{len(array)}]"
    return f"{kind}[{len(array)}] with {cast(object, array[place])!s} at {place}"


def _tensor_difference(name: str, gguf: GGUFFile, other: GGUFFile) -> ItemDifference | None:
    here, there = _shown_tensor(name, gguf), _shown_tensor(name, other)
    if here != there:
        return ItemDifference(name, here, there)
    if _same_bytes(gguf.raw(name), other.raw(name)):
        return None
    return ItemDifference(name, here, f"{there}, other bytes")


def _shown_tensor(name: str, gguf: GGUFFile) -> str | None:
    tensor = gguf.tensors.get(name)
    return None if tensor is None else f"{tensor.ggml_type} {tensor.shape}"


def _same_bytes(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    return all(
        np.array_equal(a[start : start + _CHUNK_BYTES], b[start : start + _CHUNK_BYTES])
        for start in range(0, a.size, _CHUNK_BYTES)
    )
