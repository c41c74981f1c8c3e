"""The cache positions that one decode step writes: what a proof of the step must see beside its
logits."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.ops import BLOCK_SIZE, KVCache

# A byte whose fp16 pairs are NaN: who reads a slot that nobody wrote does not go unseen.
POISON = 0xFF


class StepSlots:
    """Keys and values of some slots, in every layer's cache.

    slots: block * BLOCK_SIZE + row each; negative ones, padding, are left out.
    """

    def __init__(self, device: Device, caches: Sequence[KVCache], slots: NDArray[np.int32]) -> None:
        self._device = device
        self._arrays = [array for cache in caches for array in (cache.keys, cache.values)]
        self._slots = [int(slot) for slot in slots if slot >= 0]

    def read(self) -> bytes:
        """All of them, once everything queued before has run."""
        from cuda.bindings import driver

        self._device.synchronize()
        found = []
        for array, start in self._pieces():
            _, num_kv_heads, _, head_dim = array.shape
            piece = np.empty((num_kv_heads, head_dim), array.dtype)
            copy = driver.CUDA_MEMCPY2D()
            copy.srcMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
            copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_HOST
            copy.srcDevice, copy.srcPitch = start, _pitch(array)
            copy.dstHost, copy.dstPitch = piece.ctypes.data, piece[0].nbytes
            copy.WidthInBytes, copy.Height = piece[0].nbytes, num_kv_heads
            call(driver.cuMemcpy2D(copy))
            found.append(piece.tobytes())
        return b"".join(found)

    def poison(self) -> None:
        """Queues filling them with NaN."""
        from cuda.bindings import driver

        handle = self._device.stream.handle
        for array, start in self._pieces():
            _, num_kv_heads, _, head_dim = array.shape
            width = head_dim * array.dtype.itemsize
            pitch = _pitch(array)
            call(driver.cuMemsetD2D8Async(start, pitch, POISON, width, num_kv_heads, handle))

    def _pieces(self) -> Iterator[tuple[DeviceArray, int]]:
        """A cache, and where a slot's first head lies in it."""
        for array in self._arrays:
            _, num_kv_heads, _, head_dim = array.shape
            for slot in self._slots:
                block, row = divmod(slot, BLOCK_SIZE)
                place = (block * num_kv_heads * BLOCK_SIZE + row) * head_dim
                yield array, array.ptr + place * array.dtype.itemsize


def _pitch(array: DeviceArray) -> int:
    """Bytes from a slot's one head to the next."""
    return BLOCK_SIZE * array.shape[3] * array.dtype.itemsize
