"""Pinned host memory: the only way arrays of a step travel to and from the GPU."""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call, wait_for_event
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.errors import DeviceError

# Uploads that may be under way at once before the host has to wait for the oldest.
NUM_UPLOADS = 4
# Downloads that may be under way at once; the oldest is overwritten by one more.
NUM_DOWNLOADS = 4

_ALIGNMENT = 16
_FETCH_BYTES = 16 << 20


class PinnedBuffer:
    """Page-locked host memory; `bytes` is its uint8 view, valid until `free`."""

    def __init__(self, num_bytes: int) -> None:
        from cuda.bindings import driver

        status, pointer = driver.cuMemHostAlloc(num_bytes, driver.CU_MEMHOSTALLOC_PORTABLE)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceError(
                f"{num_bytes:,} bytes of page-locked host memory are not to be had; "
                "free host memory or raise the locked-memory limit (ulimit -l)."
            )
        call((status,))
        self.ptr = int(pointer)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.ptr)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def free(self) -> None:
        """Unlocks the memory. Safe to call twice; views of `bytes` must be gone."""
        from cuda.bindings import driver

        pointer, self.ptr = self.ptr, 0
        if pointer:
            self.bytes = np.empty(0, np.uint8)
            call(driver.cuMemFreeHost(pointer))


class Staging:
    """Uploads small groups of arrays in one copy each, and downloads results."""

    def __init__(self, device: Device, workspace: Workspace) -> None:
        self._device = device
        self._workspace = workspace
        self._uploads: list[_Upload] = [_Upload() for _ in range(NUM_UPLOADS)]
        self._next = 0
        self._download: PinnedBuffer | None = None
        self._downloads: list[Download] = [Download() for _ in range(NUM_DOWNLOADS)]
        self._next_download = 0

    def place(self, name: str, arrays: Sequence[NDArray[Any]]) -> list[DeviceArray]:
        """Copies host arrays into the work buffer `name`, asynchronously, as one copy.

        Each lands on a 16-byte border, at an address that depends on the shapes alone. The
        views stay valid until the next `place` under the same name.
        """
        offsets, total = _layout(arrays)
        target = self._workspace.take(name, (total,), np.dtype(np.uint8))
        upload = self._uploads[self._next]
        self._next = (self._next + 1) % NUM_UPLOADS
        upload.reserve(total)
        staged = upload.pinned_bytes()
        for array, offset in zip(arrays, offsets, strict=True):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            staged[offset : offset + flat.nbytes] = flat
        upload.start(target.ptr, total, self._device)
        return [
            DeviceArray(target.ptr + offset, array.shape, array.dtype)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def download(self, array: DeviceArray) -> "Download":
        """Starts copying a small array to the host, and returns what waits for it."""
        download = self._downloads[self._next_download]
        self._next_download = (self._next_download + 1) % NUM_DOWNLOADS
        download.start(array.ptr, array.nbytes, self._device)
        return download

    def fetch(self, array: DeviceArray) -> NDArray[Any]:
        """A host copy of one array, once everything queued before has run."""
        from cuda.bindings import driver

        result = np.empty(array.shape, array.dtype)
        flat = result.reshape(-1).view(np.uint8)
        if self._download is None:
            self._download = PinnedBuffer(_FETCH_BYTES)
        for start in range(0, array.nbytes, _FETCH_BYTES):
            count = min(_FETCH_BYTES, array.nbytes - start)
            source, handle = array.ptr + start, self._device.stream.handle
            call(driver.cuMemcpyDtoHAsync(self._download.ptr, source, count, handle))
            self._device.synchronize()
            flat[start : start + count] = self._download.bytes[:count]
        return result

    def close(self) -> None:
        """Frees the pinned memory, once the copies under way have ended. Safe to call twice.

        Raises DeviceError, after trying them all, where the GPU failed before.
        """
        download, self._download = self._download, None
        frees = [transfer.free for transfer in (*self._uploads, *self._downloads)]
        close_all(*frees, *([download.free] if download is not None else []))


class _Transfer:
    """One pinned area and the event that says its last copy has ended."""

    def __init__(self) -> None:
        self._pinned: PinnedBuffer | None = None
        self._copied: Any = None

    def reserve(self, num_bytes: int) -> None:
        self._wait()
        if self._pinned is None or self._pinned.bytes.nbytes < num_bytes:
            self.free()
            self._pinned = PinnedBuffer(max(2 * num_bytes, 1 << 16))

    def pinned_bytes(self) -> NDArray[np.uint8]:
        assert self._pinned is not None, "reserve() comes first"
        return self._pinned.bytes

    def free(self) -> None:
        pinned, self._pinned = self._pinned, None
        copied, self._copied = self._copied, None
        close_all(
            *([partial(wait_for_event, copied)] if copied is not None else []),
            *([pinned.free] if pinned is not None else []),
        )

    def _wait(self) -> None:
        if self._copied is not None:
            wait_for_event(self._copied)


class _Upload(_Transfer):
    def start(self, target: int, num_bytes: int, device: Device) -> None:
        from cuda.bindings import driver

        assert self._pinned is not None, "reserve() comes first"
        if num_bytes:
            handle = device.stream.handle
            call(driver.cuMemcpyHtoDAsync(target, self._pinned.ptr, num_bytes, handle))
        self._copied = device.record(self._copied)


class Download(_Transfer):
    """Bytes on their way to the host."""

    def __init__(self) -> None:
        super().__init__()
        self._num_bytes = 0

    def start(self, source: int, num_bytes: int, device: Device) -> None:
        """Queues the copy; `wait` gives its bytes until this is started again."""
        from cuda.bindings import driver

        self.reserve(num_bytes)
        assert self._pinned is not None, "reserve() has taken it"
        if num_bytes:
            handle = device.stream.handle
            call(driver.cuMemcpyDtoHAsync(self._pinned.ptr, source, num_bytes, handle))
        self._num_bytes = num_bytes
        self._copied = device.record(self._copied)

    def wait(self) -> NDArray[np.uint8]:
        """The bytes (n,), once they are there. Raises DeviceError where the GPU failed before."""
        assert self._copied is not None, "start() comes first"
        self._wait()
        return self.pinned_bytes()[: self._num_bytes].copy()


def _layout(arrays: Sequence[NDArray[Any]]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for array in arrays:
        offsets.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total
