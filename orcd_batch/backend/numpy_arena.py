"""Memory for weights in few large pieces, which numpy asks the kernel to back with huge pages.

Streaming a weight out of 4 KiB pages costs about 15 % of the bandwidth in address translation;
numpy requests huge pages only for arrays of at least 4 MiB, and most weights are smaller.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

_PIECE_VALUES = 1 << 24
_ALIGNMENT_VALUES = 32


class Arena:
    """Hands out uninitialized fp32 arrays; a piece is freed with the last array cut from it."""

    def __init__(self) -> None:
        self._rest = np.empty(0, np.float32)

    def empty(self, *shape: int) -> NDArray[np.float32]:
        """A contiguous array, aligned to 128 bytes within its piece."""
        size = prod(shape)
        if size > len(self._rest):
            self._rest = np.empty(max(size, _PIECE_VALUES), np.float32)
        array = self._rest[:size].reshape(shape)
        self._rest = self._rest[-(-size // _ALIGNMENT_VALUES) * _ALIGNMENT_VALUES :]
        return array
