"""Philox against Random123's known answers, and the counter layout against single counters."""

import numpy as np
import pytest

from runtime import philox

# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, expected.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def u32(text: str) -> philox.Words:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox.philox4x32_10(u32(counter), u32(key)).tolist() == u32(expected).tolist()


def test_counters_are_independent_of_their_neighbours() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint32)
    key = u32("01234567 89abcdef")
    found = philox.philox4x32_10(counters, key)
    assert found.shape == (3, 5, 4)
    assert found.dtype == np.uint32
    for row, column in np.ndindex(3, 5):
        assert (found[row, column] == philox.philox4x32_10(counters[row, column], key)).all()


def test_words_follow_the_counter_layout() -> None:
    seed = 0x0123456789ABCDEF
    found = philox.words(seed, 11, purpose=1, step=2, micro_batch=3, place=4, operator=5)
    assert found.shape == (11,)
    for element, word in enumerate(found):
        counter = np.array((element // 4, 4 << 16 | 5, 2, 1 << 24 | 3), dtype=np.uint32)
        assert word == philox.philox4x32_10(counter, u32("89abcdef 01234567"))[element % 4]


def test_longer_rows_start_with_shorter_ones() -> None:
    assert (philox.words(1, 100, purpose=0)[:7] == philox.words(1, 7, purpose=0)).all()
    assert philox.words(1, 0, purpose=0).shape == (0,)


@pytest.mark.parametrize("field", ["purpose", "step", "micro_batch", "place", "operator"])
def test_each_field_changes_the_words_and_is_bounded(field: str) -> None:
    base = {"purpose": 0}
    assert (philox.words(1, 4, **base) != philox.words(1, 4, **{**base, field: 1})).any()
    with pytest.raises(ValueError, match=f"expected {field} of 0 to"):
        philox.words(1, 4, **{**base, field: 1 << 32})
    with pytest.raises(ValueError, match=f"expected {field} of 0 to"):
        philox.words(1, 4, **{**base, field: -1})


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected counter"):
        philox.philox4x32_10(np.zeros(3, np.uint32), np.zeros(2, np.uint32))
