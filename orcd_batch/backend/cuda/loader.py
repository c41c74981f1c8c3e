"""Weights from the file to fp16 rows (linears) or fp32 values (vectors) on the GPU."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.device import Buffer, Device
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.program import Kernels, int32
from orcd_batch.backend.cuda.tensor_types import KERNEL_TYPES, row_bytes, to_fp32
from orcd_batch.backend.cuda.transfer import CHUNK_BYTES, Transfers
from orcd_batch.backend.fp16_range import check_fp16_range, outside_fp16
from orcd_batch.backend.ops import TensorPart
from orcd_batch.errors import CheckpointError, DeviceError

_MAX_TENSORS = 1 << 16
_FLAG_BYTES = 8
_THREADS = 256


class Loader:
    """Loads asynchronously: arrays are complete, and checked, once `finish` has returned.

    Whatever fails, no memory stays behind.
    """

    def __init__(self, device: Device, kernels: Kernels) -> None:
        self._device = device
        self._kernels = kernels
        self._transfers: Transfers | None = None
        self._flags: Buffer | None = None
        self._names: list[str] = []
        self._num_bytes = 0
        self._num_values_bytes = 0
        self._started: float | None = None
        self._seconds = 0.0

    def load_linear(self, parts: Sequence[TensorPart]) -> DeviceArray:
        """(N, K) fp16, the parts' rows one under the other.

        Raises CheckpointError for a K that is no multiple of 8 or that differs between parts,
        DeviceError when it does not fit; a value beyond fp16 is reported by `finish`.
        """
        num_values = parts[0].shape[1]
        for part in parts:
            if part.shape[1] != num_values or num_values % 8:
                raise CheckpointError(
                    f"The tensor {part.name} has rows of {part.shape[1]} values; the GPU needs "
                    f"a multiple of 8, the same in all parts of one weight ({num_values})."
                )
        try:
            weight = self._allocate((sum(part.shape[0] for part in parts), num_values), FP16)
            first_out = 0
            for part in parts:
                self._send(part, weight, first_out)
                first_out += part.shape[0]
        except BaseException:
            self.abandon()
            raise
        return weight

    def load_vector(self, parts: Sequence[TensorPart]) -> DeviceArray:
        """(n,) fp32, the parts one after another, in halves order where they are rotated.

        Raises CheckpointError as `load_linear`, a value beyond fp16 included.
        """
        values = [_in_halves_order(_vector(part), part.rope_head_dim) for part in parts]
        self._num_bytes += sum(part.data.nbytes for part in parts)
        return self.load_array(parts[0].name, np.concatenate(values))

    def load_array(self, name: str, array: NDArray[np.float32]) -> DeviceArray:
        """An array as it is (`name` is for messages); its bytes are proven like a tensor's."""
        try:
            target = self._allocate(array.shape, FP32)
            data = array.reshape(-1).view(np.uint8)
            for start in range(0, data.nbytes, CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                copy = partial(self._copy, target.ptr + start, chunk.nbytes)
                self._start().add(name, chunk.nbytes, partial(_take, chunk), copy)
        except BaseException:
            self.abandon()
            raise
        return target

    def wait(self) -> None:
        """Waits until what has been loaded so far can be read, without ending the loading."""
        if self._transfers is not None:
            self._transfers.wait()

    def finish(self) -> dict[str, Any]:
        """Waits for what is under way and checks it all; returns `statistics()`.

        Raises CheckpointError naming a tensor with a value beyond fp16's range, DeviceError when
        a checksum differs or the GPU failed.
        """
        if self._transfers is not None:
            try:
                self._transfers.finish()
                self._check_range()
            except BaseException:
                self.abandon()
                raise
            self.close()
            self._seconds += time.perf_counter() - (self._started or 0.0)
        return self.statistics()

    def statistics(self) -> dict[str, Any]:
        """Bytes read from the file, bytes of weights on the GPU, seconds, and GB/s of the file."""
        return {
            "file_bytes": self._num_bytes,
            "weight_bytes": self._num_values_bytes,
            "seconds": self._seconds,
            "gigabytes_per_s": self._num_bytes / self._seconds / 1e9 if self._seconds else 0.0,
        }

    def abandon(self) -> None:
        """Gives up on this model: frees every weight."""
        close_all(
            self.close,
            partial(self._device.free_use, "staging"),
            partial(self._device.free_use, "weights"),
        )

    def close(self) -> None:
        """Ends the transfers and frees what they used; weights stay. Safe to call twice."""
        transfers, self._transfers = self._transfers, None
        flags, self._flags = self._flags, None
        self._names = []
        close_all(
            *([transfers.close] if transfers is not None else []),
            *([partial(self._device.free, flags)] if flags is not None else []),
        )

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        self._start()
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        self._num_values_bytes += num_bytes
        return DeviceArray(self._device.allocate(num_bytes, "weights").ptr, shape, dtype)

    def _start(self) -> Transfers:
        if self._transfers is None:
            self._started = time.perf_counter()
            self._flags = self._device.allocate(_FLAG_BYTES * _MAX_TENSORS, "staging")
            self._device.fill(self._flags.ptr, self._flags.num_bytes)
            self._transfers = Transfers(self._device, self._kernels)
        return self._transfers

    def _send(self, part: TensorPart, weight: DeviceArray, first_out: int) -> None:
        self._num_bytes += part.data.nbytes
        ggml_type, num_bytes = part.ggml_type, part.data.nbytes
        read_at: Callable[..., None] = part.read_into
        if ggml_type not in KERNEL_TYPES:
            data = to_fp32(part.name, part.read(0, num_bytes), ggml_type).view(np.uint8)
            ggml_type, num_bytes, read_at = "F32", data.nbytes, partial(_take_at, data)
        num_rows, num_values = part.shape
        stride = row_bytes(ggml_type, num_values)
        if num_bytes != num_rows * stride or stride > CHUNK_BYTES:
            raise CheckpointError(
                f"The tensor {part.name} has {num_bytes:,} bytes for {num_rows:,} rows of "
                f"{stride:,}, at most {CHUNK_BYTES:,} each."
            )
        kernel = self._kernels.get("dequantize", {f"TYPE_{ggml_type}": 1})
        flag = self._flag(part.name)
        # Whole rows, a multiple of 8 of them: then every chunk starts on an 8-byte border.
        rows_per_chunk = CHUNK_BYTES // stride
        rows_per_chunk -= rows_per_chunk % 8 if rows_per_chunk > 8 else 0
        for first in range(0, num_rows, rows_per_chunk):
            count = min(rows_per_chunk, num_rows - first)
            sizes = (count, num_values, first, first_out, part.rope_head_dim)
            grid = min(-(-count * num_values // (8 * _THREADS)), 8 * self._device.sm_count)
            args = [weight.ptr, flag, *map(int32, sizes)]
            convert = partial(self._dequantize, kernel, grid, args)
            read = partial(read_at, start=first * stride)
            self._start().add(part.name, count * stride, read, convert)

    def _dequantize(self, kernel: Any, grid: int, args: list[Any], raw: int, stream: Any) -> None:
        self._kernels.launch(kernel, grid, _THREADS, [raw, *args], stream=stream)

    def _copy(self, target: int, num_bytes: int, raw: int, stream: Any) -> None:
        from cuda.bindings import driver

        call(driver.cuMemcpyDtoDAsync(target, raw, num_bytes, stream.handle))

    def _flag(self, name: str) -> int:
        if len(self._names) >= _MAX_TENSORS or self._flags is None:
            raise DeviceError(f"The model has more than {_MAX_TENSORS} tensors.")
        self._names.append(name)
        return self._flags.ptr + _FLAG_BYTES * (len(self._names) - 1)

    def _check_range(self) -> None:
        from cuda.bindings import driver

        flags = np.zeros(len(self._names), np.uint64)
        if not flags.size or self._flags is None:
            return
        call(driver.cuMemcpyDtoH(flags.ctypes.data, self._flags.ptr, flags.nbytes))
        for name, flag in zip(self._names, flags, strict=True):
            if flag:  # its low half is the first such value
                raise outside_fp16(name, np.uint32(flag & 0xFFFFFFFF).view(np.float32))


def _vector(part: TensorPart) -> NDArray[np.float32]:
    values = to_fp32(part.name, part.read(0, part.data.nbytes), part.ggml_type)
    if values.size != part.shape[0] * part.shape[1]:
        raise CheckpointError(
            f"The tensor {part.name} has {values.size:,} values, expected "
            f"{part.shape[0] * part.shape[1]:,}."
        )
    check_fp16_range(values, part.name)
    return values


def _take(data: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    target[:] = data


def _take_at(data: NDArray[np.uint8], target: NDArray[np.uint8], start: int) -> None:
    target[:] = data[start : start + target.nbytes]


def _in_halves_order(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    if head_dim == 0:
        return values
    return values.reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
