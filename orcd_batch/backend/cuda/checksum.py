"""A 64-bit hash of bytes that numpy and the GPU compute alike (kernels/checksum.cu).

Multilinear hashing (Carter and Wegman, 1979) with SplitMix64 keys (Steele, Lea and Flood, 2014):
it detects damage in transfer, not forgery.
"""

import numpy as np
from numpy.typing import NDArray

BLOCK_WORDS = 4096
BLOCK_BYTES = 8 * BLOCK_WORDS

# What is read at a time: it should stay in a core's own cache from the copy to the hash.
PIECE_BYTES = 16 * BLOCK_BYTES


def splitmix_keys(start: int, count: int) -> NDArray[np.uint64]:
    """The odd 64-bit keys of indices start … start + count - 1."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = index * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


class Hasher:
    """Hashes without allocating: for one thread at a time."""

    def __init__(self) -> None:
        self._high = np.empty((PIECE_BYTES // BLOCK_BYTES, BLOCK_WORDS), np.uint64)
        self._keys = splitmix_keys(0, 2 * BLOCK_WORDS)
        self._low_keys = np.ascontiguousarray(self._keys[0::2])
        self._high_keys = np.ascontiguousarray(self._keys[1::2])

    def __call__(self, piece: NDArray[np.uint8], first_block: int = 0) -> int:
        """The hash of at most PIECE_BYTES as they count from block `first_block` on.

        The hash of a whole is the sum, modulo 2**64, of the hashes of pieces that start at
        multiples of BLOCK_BYTES.
        """
        padding = -piece.nbytes % 8
        if padding:
            piece = np.concatenate([piece, np.zeros(padding, np.uint8)])
        words = np.frombuffer(piece, np.uint64)
        whole = words.size // BLOCK_WORDS
        total = self._blocks(words[: whole * BLOCK_WORDS].reshape(whole, BLOCK_WORDS), first_block)
        rest = words[None, whole * BLOCK_WORDS :]
        return (total + self._blocks(rest, first_block + whole)) % 2**64

    def _blocks(self, words: NDArray[np.uint64], first_block: int) -> int:
        count, width = words.shape
        if not words.size:
            return 0
        high = np.right_shift(words, np.uint64(32), out=self._high[:count, :width])
        inner = np.dot(words, self._low_keys[:width])
        inner += np.dot(high, self._high_keys[:width])
        return int(np.dot(inner, splitmix_keys(2 * BLOCK_WORDS + first_block, count)))


def checksum(data: NDArray[np.uint8]) -> int:
    """The hash of `data`, of any length."""
    hasher = Hasher()
    starts = range(0, data.nbytes, PIECE_BYTES)
    pieces = (hasher(data[i : i + PIECE_BYTES], i // BLOCK_BYTES) for i in starts)
    return sum(pieces) % 2**64
