"""Philox against the known-answer vectors published with Random123 (kat_vectors)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.backend.philox import Words, philox4x32, philox_word

words32 = st.integers(0, 2**32 - 1)

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_words(*values: int) -> tuple[Words, ...]:
    return tuple(np.asarray(value, np.uint64) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = scalar_words(*counter)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), key)) == expected


@given(words32, words32, words32, st.lists(words32, min_size=1, max_size=20), words32, words32)
def test_the_fast_first_word_is_the_first_of_the_four(
    c0: int, c1: int, c2: int, last: list[int], k0: int, k1: int
) -> None:
    lasts = np.array(last, np.uint64)
    a, b, c = scalar_words(c0, c1, c2)
    expected = philox4x32((a, b, c, lasts), (k0, k1))[0]
    assert np.array_equal(philox_word((c0, c1, c2), lasts, (k0, k1)), expected)
