"""Checksums that numpy and the GPU compute alike: they detect damage in transfer, not forgery.

`multilinear` (kernels/checksum.cu) is strong and slow on the host. A chunk on its way is first
folded into its column and row sums (kernels/fold.cu), which numpy forms as fast as it copies; the
chunk's checksum is the multilinear hash of those. Any one or two changed words show.
"""

import numpy as np
from numpy.typing import NDArray

ROW_WORDS = 4096
ROW_BYTES = 8 * ROW_WORDS
MAX_ROWS = 256
MAX_CHUNK_BYTES = MAX_ROWS * ROW_BYTES


def splitmix_keys(start: int, count: int) -> NDArray[np.uint64]:
    """Odd 64-bit keys of indices start … start + count - 1 (Steele, Lea and Flood, 2014)."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = index * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


class Multilinear:
    """The hash of so many words (Carter and Wegman, 1979), its keys worked out once."""

    def __init__(self, num_words: int) -> None:
        index = np.arange(num_words)
        outer = splitmix_keys(2 * ROW_WORDS, -(-num_words // ROW_WORDS))[index // ROW_WORDS]
        inner = splitmix_keys(0, 2 * ROW_WORDS)
        self._low_keys = inner[2 * (index % ROW_WORDS)] * outer
        self._high_keys = inner[2 * (index % ROW_WORDS) + 1] * outer

    def __call__(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """(n, num_words) -> (n,). The second term keeps flips of the top bit from cancelling."""
        high = words >> np.uint64(32)
        hashes: NDArray[np.uint64] = np.dot(words, self._low_keys)
        hashes += np.dot(high, self._high_keys)
        return hashes


def checksum(data: NDArray[np.uint8]) -> int:
    """The multilinear hash of bytes, read as little-endian words and padded with zeros."""
    words = _padded(data, 8)
    return int(Multilinear(words.size)(words[None, :])[0])


def folded(chunk: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Column sums (ROW_WORDS,) then row sums (MAX_ROWS,) of at most MAX_CHUNK_BYTES.

    Few and large numpy calls: each gives up the interpreter lock and has to win it back.
    """
    words = _padded(chunk, ROW_BYTES).reshape(-1, ROW_WORDS)
    sums = np.zeros(ROW_WORDS + MAX_ROWS, np.uint64)
    sums[:ROW_WORDS] = np.add.reduce(words, axis=0)
    sums[ROW_WORDS : ROW_WORDS + len(words)] = np.add.reduce(words, axis=1)
    return sums


def _padded(data: NDArray[np.uint8], multiple: int) -> NDArray[np.uint64]:
    padding = -data.nbytes % multiple
    if padding:
        data = np.concatenate([data, np.zeros(padding, np.uint8)])
    return np.frombuffer(data, np.uint64)
