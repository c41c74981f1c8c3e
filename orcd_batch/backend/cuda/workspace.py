"""Work buffers by name: the same memory every step, so that a step never allocates.

Buffers are reserved at start at their largest size and then frozen; a captured graph may keep
their addresses. Before the freeze (tests, one-off uses) a buffer grows on demand.
"""

from math import prod
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.device import Buffer, Device
from orcd_batch.errors import DeviceError


class Workspace:
    """Named buffers of one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Buffer] = {}
        self._frozen = False

    def reserve(self, name: str, num_bytes: int) -> None:
        """Makes sure `name` holds at least num_bytes. Raises DeviceError when it does not fit."""
        held = self._buffers.get(name)
        if held is not None and held.num_bytes >= num_bytes:
            return
        if self._frozen:
            has = held.num_bytes if held else 0
            raise DeviceError(
                f"The work buffer {name} holds {has:,} bytes and a step needs {num_bytes:,}: "
                "the step is larger than engine.max_num_batched_tokens and max_num_seqs allow."
            )
        if held is not None:
            self._device.synchronize()
            self._device.free(held)
        self._buffers[name] = self._device.allocate(num_bytes, "work_space")

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """The buffer `name` as an array; its contents are whatever was last written there."""
        self.reserve(name, prod(shape) * dtype.itemsize)
        return DeviceArray(self._buffers[name].ptr, shape, dtype)

    def freeze(self) -> None:
        """From here on a buffer that would have to grow is an error."""
        self._frozen = True

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._buffers.values())
