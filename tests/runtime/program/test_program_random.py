"""Random words in the operators of Programs: Random123's known answers, the layout of counters, moments, dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime import philox
from runtime.models.initial import Init
from runtime.program import functions, random
from runtime.program.build import initial_program
from runtime.program.builder import Builder
from runtime.program.lowering import lower_block
from runtime.program.program import Program

# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, expected.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def rng(*values: int) -> np.ndarray:
    """key low, key high, step, micro-batch, place, first element."""
    return np.array(values, dtype=np.int64)


def words_program(elements: int, *, purpose: int, operator: int) -> Program:
    b = Builder()
    return b.finish([random.words(b.input("rng", "i64", 6), elements, purpose=purpose, operator=operator)])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str, run_program: Any) -> None:
    c = [int(word, 16) for word in counter.split()]
    k = [int(word, 16) for word in key.split()]
    program = words_program(4, purpose=c[3] >> 24, operator=c[1] & 0xFFFF)
    (found,) = run_program(program, rng(k[0], k[1], c[2], c[3] & 0xFFFFFF, c[1] >> 16, 4 * c[0]))
    assert [f"{word:08x}" for word in found.tolist()] == expected.split()


def test_words_are_those_of_the_data_order(run_program: Any) -> None:
    """runtime/philox.py is the other implementation: the same counter layout and key."""
    source = np.random.default_rng(0)
    for count in (1, 3, 4, 1001):
        seed = int(source.integers(0, 2**64, dtype=np.uint64))
        step, micro_batch, place, operator, purpose = (int(source.integers(0, 2**b)) for b in (32, 24, 16, 16, 8))
        expected = philox.words(
            seed, count, purpose=purpose, step=step, micro_batch=micro_batch, place=place, operator=operator
        )
        low, high = (int(k) for k in philox.key_of(seed))
        given = rng(low, high, step, micro_batch, place, 0)
        (found,) = run_program(words_program(count, purpose=purpose, operator=operator), given)
        assert found.tolist() == expected.tolist()


def test_a_chunk_continues_where_the_one_before_ended(run_program: Any) -> None:
    (whole,) = run_program(words_program(40, purpose=0, operator=0), rng(1, 2, 3, 4, 5, 0))
    (part,) = run_program(words_program(13, purpose=0, operator=0), rng(1, 2, 3, 4, 5, 16))
    assert part.tolist() == whole[16:29].tolist()


def test_uniform_and_symmetric(run_program: Any) -> None:
    b = Builder()
    word = b.input("word", "i64", 5)
    program = b.finish([random.uniform(word), random.symmetric(word)])
    uniform, symmetric = run_program(program, np.array([0, 255, 256, 2**31, 2**32 - 1], np.int64))
    assert uniform.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]
    assert symmetric.tolist() == [-1 + 2.0**-24, -1 + 2.0**-24, -1 + 3 * 2.0**-24, 2.0**-24, 1 - 2.0**-24]


def test_moments(run_program: Any) -> None:
    count = 400_000
    b = Builder()
    word = random.words(b.input("rng", "i64", 6), count, purpose=0, operator=0)
    program = b.finish([random.uniform(word), functions.normal(random.symmetric(word))])
    uniform, normal = (x.astype(np.float64) for x in run_program(program, rng(7, 0, 0, 0, 0, 0)))
    assert abs(uniform.mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 1e-3
    assert abs(normal.mean()) < 4 / count**0.5
    assert abs(normal.var() - 1) < 0.01
    assert abs((normal**3).mean()) < 0.03
    assert abs((normal**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 4 / count**0.5
    histogram, _ = np.histogram(uniform, bins=64, range=(0, 1))
    assert ((histogram - count / 64) ** 2 / (count / 64)).sum() < 120  # chi squared with 63 degrees of freedom


@pytest.mark.parametrize(
    ("initial", "low", "high", "deviation"),
    [
        (Init(kind="normal", scale=0.02), -0.12, 0.12, 0.02),
        (Init(kind="uniform", scale=0.25), -0.25, 0.25, 0.25 / 3**0.5),
        (Init(kind="zeros"), 0.0, 0.0, 0.0),
        (Init(kind="ones"), 1.0, 1.0, 0.0),
    ],
)
def test_initial_values(initial: Init, low: float, high: float, deviation: float, run_program: Any) -> None:
    unused = np.zeros(0, np.float32)
    (whole,) = run_program(initial_program(20_000, initial, unused), rng(1, 0, 0, 0, 3, 0))
    assert whole.dtype == np.float32
    assert low <= whole.min() <= whole.max() <= high
    assert abs(whole.std() - deviation) <= 0.02 * deviation
    (part,) = run_program(initial_program(100, initial, unused), rng(1, 0, 0, 0, 3, 4096))
    assert part.tobytes() == whole[4096:4196].tobytes()
    (other,) = run_program(initial_program(100, initial, unused), rng(1, 0, 0, 0, 4, 4096))
    assert (other.tobytes() == part.tobytes()) == (deviation == 0)


def test_given_initial_values(run_program: Any) -> None:
    values = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
    (part,) = run_program(initial_program(9, Init(kind="given"), values), rng(1, 0, 0, 0, 0, 20))
    assert part.tobytes() == values.reshape(-1)[20:29].tobytes()


class TwoDropouts(nn.Module):
    """Both masks show in the output: the second is applied to a scaled copy beside the first."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [functional.dropout(x, self.p, self.training), functional.dropout(x, self.p, self.training)], 1
        )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float, run_program: Any) -> None:
    shape = (100, 200)
    made, _ = lower_block(TwoDropouts(p), torch.zeros(shape), slices=2, terms=1, name="dropout")
    ones = np.ones(shape, np.float32)
    at = rng(1, 2, 3, 4, 5, 0)
    (y,) = run_program(made.forward, ones, at)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-6)
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / kept.size) ** 0.5
    first, second = y[:, :200], y[:, 200:]
    assert (first != second).any(), "two operators of a block draw the same words"

    weights = np.random.default_rng(2).standard_normal((100, 400)).astype(np.float32)
    (dx,) = run_program(made.backward, ones, at, weights)
    np.testing.assert_allclose(dx, first * weights[:, :200] + second * weights[:, 200:], rtol=1e-5, atol=1e-6)

    for place in range(5):
        other = at.copy()
        other[place] += 1
        assert (run_program(made.forward, ones, other)[0] != y).any(), f"rng[{place}] changes nothing"
    np.testing.assert_array_equal(run_program(made.evaluate, ones)[0], np.ones((100, 400), np.float32))


def test_dropout_follows_the_integer_threshold(run_program: Any) -> None:
    made, _ = lower_block(nn.Dropout(0.3), torch.zeros(1000), slices=2, terms=1, name="dropout")
    (y,) = run_program(made.forward, np.ones(1000, np.float32), rng(1, 2, 3, 4, 5, 0))
    words = philox.words(1 | 2 << 32, 1000, purpose=philox.DROPOUT, step=3, micro_batch=4, place=5, operator=0)
    np.testing.assert_array_equal(y != 0, words.astype(np.int64) < round(0.7 * 2**32))
