"""Rows of a GGUF tensor as fp32, on the CPU; every type that `gguf.quants` knows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.fp16_range import check_fp16_range
from orcd_batch.backend.ops import TensorPart
from orcd_batch.errors import CheckpointError

Floats = NDArray[np.float32]
_CHUNK_BYTES = 1 << 19


def row_chunks(part: TensorPart) -> Iterator[tuple[int, int]]:
    """(first, last) rows of pieces of about half a megabyte, for sharing among threads.

    Pieces hold whole heads where rows are to be reordered, so that each stands on its own.
    """
    num_rows, row_length = part.shape
    unit = part.rope_head_dim or 1
    step = max(1, _CHUNK_BYTES // (4 * row_length * unit)) * unit
    for first in range(0, num_rows, step):
        yield first, min(num_rows, first + step)


def dequantize_rows(part: TensorPart, first: int, last: int) -> Floats:
    """Rows first … last of the part as (last - first, K) fp32, in halves order if it asks so.

    Raises CheckpointError, naming the tensor, for a type that cannot be dequantized, for data of
    the wrong length, and for a value that is not finite or outside fp16's range (the GPU engine
    stores weights as fp16, and one file must mean the same model on every engine).
    """
    num_rows, row_length = part.shape
    row_bytes, left_over = divmod(part.data.size, max(num_rows, 1))
    if left_over:
        raise CheckpointError(
            f"Tensor {part.name!r} holds {part.data.size} bytes, which is no whole number of bytes "
            f"for each of its {num_rows} rows; the file is damaged."
        )
    data = part.read(first * row_bytes, last * row_bytes).reshape(last - first, row_bytes)
    values = _to_fp32(data, part, row_length)
    if values.shape != (last - first, row_length):
        raise CheckpointError(
            f"Tensor {part.name!r} of type {part.ggml_type} gives rows of {values.shape[-1]} "
            f"values where {row_length} were expected; the file is damaged."
        )
    check_fp16_range(values, part.name)
    return _halves_order(values, part.rope_head_dim) if part.rope_head_dim else values


def dequantize_vector(part: TensorPart) -> Floats:
    """A vector part as (n,) fp32; errors as `dequantize_rows`."""
    whole = replace(part, shape=(1, part.shape[0] * part.shape[1]), rope_head_dim=0)
    values = dequantize_rows(whole, 0, 1).reshape(-1, 1)
    if part.rope_head_dim:
        values = _halves_order(values, part.rope_head_dim)
    return values.reshape(-1)


def _to_fp32(data: NDArray[np.uint8], part: TensorPart, row_length: int) -> Floats:
    if part.ggml_type == "F32":
        return _reinterpret(data, np.dtype("<f4"), part).astype(np.float32, copy=False)
    if part.ggml_type == "F16":
        return _reinterpret(data, np.dtype("<f2"), part).astype(np.float32)
    if part.ggml_type == "BF16":
        bits = _reinterpret(data, np.dtype("<u2"), part).astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[part.ggml_type]
        values = gguf.quants.dequantize(np.ascontiguousarray(data), kind)
    except (KeyError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"Tensor {part.name!r} has type {part.ggml_type}, which gguf.quants cannot dequantize "
            f"({error}); convert the file to F16 or a supported quantization."
        ) from error
    return np.asarray(values, np.float32).reshape(len(data), -1)


def _reinterpret(
    data: NDArray[np.uint8], dtype: np.dtype[np.generic], part: TensorPart
) -> NDArray[np.generic]:
    if data.shape[1] % dtype.itemsize:
        raise CheckpointError(
            f"Tensor {part.name!r} of type {part.ggml_type} has rows of {data.shape[1]} bytes, "
            f"no multiple of {dtype.itemsize}; the file is damaged."
        )
    return np.ascontiguousarray(data).view(dtype)


def _halves_order(values: Floats, head_dim: int) -> Floats:
    """Rows paired as neighbours (2i, 2i + 1) within each head, reordered to (i, i + D/2)."""
    heads = values.reshape(-1, head_dim // 2, 2, values.shape[1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(values.shape)
