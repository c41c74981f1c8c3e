"""Small facts that an inspection is made of: values in short form, and bytes by tensor type."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from orcd_batch.checkpoint.gguf_file import TensorInfo

Scalar = str | int | float | bool

_MAX_SHOWN_ITEMS = 4


@dataclass(frozen=True, slots=True)
class TypeShare:
    """All tensors of one GGML type together."""

    ggml_type: str
    num_tensors: int
    num_elements: int
    num_bytes: int


def type_shares(tensors: Iterable[TensorInfo]) -> tuple[TypeShare, ...]:
    """One entry per type, the one with the most bytes first."""
    shares: dict[str, TypeShare] = {}
    for tensor in tensors:
        before = shares.get(tensor.ggml_type, TypeShare(tensor.ggml_type, 0, 0, 0))
        shares[tensor.ggml_type] = TypeShare(
            tensor.ggml_type,
            before.num_tensors + 1,
            before.num_elements + tensor.num_elements,
            before.num_bytes + tensor.num_bytes,
        )
    return tuple(sorted(shares.values(), key=lambda share: (-share.num_bytes, share.ggml_type)))


def shown_scalar(value: object) -> Scalar:
    """A metadata value that JSON can hold: arrays by their first values, NaN as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float):
        return value
    assert isinstance(value, list | np.ndarray), "metadata values are scalars or arrays"
    items = value[:_MAX_SHOWN_ITEMS]
    if isinstance(items, np.ndarray):
        items = items.tolist()
    more = ", …" if len(value) > _MAX_SHOWN_ITEMS else ""
    return f"[{', '.join(repr(item) for item in items)}{more}]"
