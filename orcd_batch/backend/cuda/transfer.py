"""Bytes from the file into GPU memory: chunked, pinned, overlapped, proven.

Reader threads each own two slots (a pinned buffer, a device buffer and a stream). A reader fills
one slot from the file (read, not mapped: a file cut short meanwhile is an error), sums what it
read, and queues on the slot's stream the copy to the GPU, the checksum of what arrived, and the
conversion; meanwhile its other slot is still on the move.
"""

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.checksum import (
    MAX_CHUNK_BYTES,
    MAX_ROWS,
    ROW_WORDS,
    Multilinear,
    folded,
)
from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.device import Buffer, Device
from orcd_batch.backend.cuda.driver import call, wait_for_stream
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.staging import PinnedBuffer
from orcd_batch.errors import DeviceError, OrcdError

CHUNK_BYTES = MAX_CHUNK_BYTES
MAX_CHUNKS = 1 << 17
MAX_READERS = 10

_SUMS_BYTES = 8 * (ROW_WORDS + MAX_ROWS)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece on its way. read(target) fills num_bytes of host memory from the file;
    convert(ptr, stream) queues what turns the raw bytes at device address ptr into the weight;
    index: where its hash is kept; name: its tensor."""

    name: str
    index: int
    num_bytes: int
    read: Callable[[NDArray[np.uint8]], None]
    convert: Callable[[int, Any], None]


class Transfers:
    """The readers of one loading. Ends with `finish`, which checks, or `close`, which does not."""

    def __init__(self, device: Device, kernels: Kernels) -> None:
        self._device = device
        self._kernels = kernels
        self._fold, self._checksum = kernels.get("fold"), kernels.get("checksum")
        self._chunks: queue.Queue[Chunk | None] = queue.Queue(maxsize=64)
        self._names: list[str] = []
        self._sums: dict[int, NDArray[np.uint64]] = {}
        self._errors: list[BaseException] = []
        self._hashes = device.allocate(8 * MAX_CHUNKS, "staging")
        device.fill(self._hashes.ptr, self._hashes.num_bytes)
        device.synchronize()
        self._slots: list[_Slot] = []
        count = max(1, min(MAX_READERS, os.cpu_count() or 1))
        self._readers = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]
        for reader in self._readers:
            reader.start()

    def add(
        self,
        name: str,
        num_bytes: int,
        read: Callable[[NDArray[np.uint8]], None],
        convert: Callable[[int, Any], None],
    ) -> None:
        """Queues one chunk of at most CHUNK_BYTES; waits only while many are under way.

        Raises what an earlier chunk failed with.
        """
        self._raise_first_error()
        index = len(self._names)
        if index >= MAX_CHUNKS:
            raise DeviceError(f"The file is larger than {MAX_CHUNKS * CHUNK_BYTES:,} bytes.")
        self._names.append(name)
        self._chunks.put(Chunk(name, index, num_bytes, read, convert))

    def wait(self) -> None:
        """Waits until every chunk so far is in place. Raises what one failed with."""
        self._chunks.join()
        for slot in self._slots:
            slot.wait()
        self._raise_first_error()

    def finish(self) -> None:
        """Waits for all chunks and compares what arrived with what was read.

        Raises DeviceError naming a tensor whose bytes differ, or what a chunk failed with.
        """
        self._stop()
        self._raise_first_error()
        arrived = np.zeros(len(self._names), np.uint64)
        if not arrived.size:
            return
        call(_driver().cuMemcpyDtoH(arrived.ctypes.data, self._hashes.ptr, arrived.nbytes))
        expected = Multilinear(ROW_WORDS + MAX_ROWS)(
            np.stack([self._sums[index] for index in range(len(self._names))])
        )
        for index in np.flatnonzero(arrived != expected):
            raise DeviceError(
                f"The bytes of {self._names[index]} in GPU memory differ from the file's "
                f"(checksum {int(arrived[index]):016x}, expected {int(expected[index]):016x}): "
                "load again, and test the memory of this machine if it happens twice."
            )

    def close(self) -> None:
        """Stops the readers and frees the slots. Safe to call twice."""
        close_all(self._stop, self._free_slots, partial(self._device.free, self._hashes))

    def _free_slots(self) -> None:
        slots, self._slots = self._slots, []
        close_all(*(partial(slot.free, self._device) for slot in slots))

    def _stop(self) -> None:
        for _ in self._readers:
            self._chunks.put(None)
        for reader in self._readers:
            reader.join()
        self._readers = []
        for slot in self._slots:
            slot.wait()

    def _raise_first_error(self) -> None:
        if self._errors:
            error = self._errors[0]
            if isinstance(error, OrcdError):
                raise error
            raise DeviceError(f"Loading weights failed: {error}") from error

    def _read(self) -> None:
        """One reader. It makes its slots itself, the second while the first is on the move:
        page-locking memory takes long."""
        slots: list[_Slot] = []
        moved = 0
        while True:
            chunk = self._chunks.get()
            try:
                if chunk is None:
                    return
                if not self._errors:
                    self._device.make_current()
                    if len(slots) < 2:
                        slots.append(_Slot(self._device))
                        self._slots.append(slots[-1])
                    self._move(chunk, slots[moved % 2])
                    moved += 1
            except BaseException as error:
                self._errors.append(error)
            finally:
                self._chunks.task_done()

    def _move(self, chunk: Chunk, slot: "_Slot") -> None:
        slot.wait()
        size = chunk.num_bytes
        self._sums[chunk.index] = slot.fill(chunk)
        handle = slot.stream.handle
        call(_driver().cuMemcpyHtoDAsync(slot.target.ptr, slot.pinned.ptr, size, handle))
        launch, stream = self._kernels.launch, slot.stream
        sums, hash_ptr = slot.sums.ptr, self._hashes.ptr + 8 * chunk.index
        args = [slot.target.ptr, np.uint64(size), sums]
        launch(self._fold, ROW_WORDS // 256 + MAX_ROWS, 256, args, stream=stream)
        args = [sums, np.uint64(_SUMS_BYTES), hash_ptr]
        launch(self._checksum, 2, 256, args, stream=stream)
        chunk.convert(slot.target.ptr, slot.stream)


class _Slot:
    def __init__(self, device: Device) -> None:
        """Raises DeviceError, nothing kept, where memory is short."""
        self.pinned = PinnedBuffer(CHUNK_BYTES)
        try:
            self.target: Buffer = device.allocate(CHUNK_BYTES, "staging")
            self.sums: Buffer = device.allocate(_SUMS_BYTES, "staging")
            self.stream = device.new_stream()
        except BaseException:  # the buffers go with all others of their use
            self.pinned.free()
            raise

    def wait(self) -> None:
        wait_for_stream(self.stream)

    def fill(self, chunk: Chunk) -> NDArray[np.uint64]:
        """Reads the chunk into the pinned buffer; returns the sums of what was read."""
        read = self.pinned.bytes[: chunk.num_bytes]
        chunk.read(read)
        return folded(read)

    def free(self, device: Device) -> None:
        close_all(
            self.wait,
            self.stream.close,
            self.pinned.free,
            *(partial(device.free, buffer) for buffer in (self.target, self.sums)),
        )


def _driver() -> Any:
    from cuda.bindings import driver

    return driver
