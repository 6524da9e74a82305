"""The Philox generator against its published vectors and an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd_fast import native

from .philox_truth import philox_words

WORD = st.integers(0, 2**32 - 1)

# Known answers for philox4x32-10 distributed with Random123: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected):
    assert native.philox4x32(counter, key) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_independent_implementation_reproduces_published_vectors(counter, key, expected):
    assert tuple(philox_words(np.array([counter], dtype=np.uint64), key)[0]) == expected


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_words_equal_independent_implementation(counter, key):
    expected = philox_words(np.array([counter], dtype=np.uint64), key)[0]
    assert native.philox4x32(counter, key) == tuple(int(w) for w in expected)


@pytest.mark.parametrize("word", [-1, 2**32])
def test_words_outside_32_bits_are_refused(word):
    with pytest.raises(TypeError):
        native.philox4x32((0, 0, 0, word), (0, 0))
