"""A typed view of device memory: a pointer, a shape, a type. It owns nothing."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

FP16: np.dtype[Any] = np.dtype(np.float16)
FP32: np.dtype[Any] = np.dtype(np.float32)
INT32: np.dtype[Any] = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A dense row-major array on the GPU. ptr: device address. The memory belongs to a Buffer."""

    ptr: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "DeviceArray":
        """The view `[start:stop]` along the first axis. Raises IndexError outside of it."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of an array of shape {self.shape}")
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(
            self.ptr + start * row_bytes, (stop - start, *self.shape[1:]), self.dtype
        )

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same memory under another shape of the same size. Raises ValueError otherwise."""
        if prod(shape) != self.size:
            raise ValueError(f"cannot view shape {self.shape} as {shape}")
        return DeviceArray(self.ptr, shape, self.dtype)
