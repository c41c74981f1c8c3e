"""Philox4x32-10: random words that are a function of a key and a counter, and of nothing else.

Algorithm: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
One round maps the counter (c0, c1, c2, c3) under the key (k0, k1) to
    (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)),
where hi and lo are the halves of a 64-bit product; between rounds the key grows by (W0, W1).
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

NUM_ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Four random 32-bit words for each counter; words are uint64 arrays that broadcast.

    counter: four words below 2**32, arrays or 0-d arrays (a word shared by all is best 0-d:
    then the first rounds cost nothing). key: two words below 2**32.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        left, right = _M0 * c0, _M1 * c2
        c0, c1 = (right >> _SHIFT) ^ (c1 ^ k0), right & _LOW
        c2, c3 = (left >> _SHIFT) ^ (c3 ^ k1), left & _LOW
    return c0, c1, c2, c3


def philox_word(counter: tuple[int, int, int], last: Words, key: tuple[int, int]) -> Words:
    """Word 0 of `philox4x32((counter..., last), key)`, for an array of last counter words."""
    c0, c1, c2 = (np.asarray(word, np.uint64) for word in counter)
    c3 = last
    *keys, (k0, _) = _round_keys(key)
    for round_k0, round_k1 in keys:
        left, right = _M0 * c0, _M1 * c2
        c0, c1 = (right >> _SHIFT) ^ (c1 ^ round_k0), right & _LOW
        c2, c3 = (left >> _SHIFT) ^ (c3 ^ round_k1), left & _LOW
    return ((_M1 * c2) >> _SHIFT) ^ (c1 ^ k0)


def _round_keys(key: tuple[int, int]) -> list[tuple[np.uint64, np.uint64]]:
    k0, k1 = key
    return [
        (np.uint64((k0 + i * _W0) & 0xFFFFFFFF), np.uint64((k1 + i * _W1) & 0xFFFFFFFF))
        for i in range(NUM_ROUNDS)
    ]
