"""Sums and products against exact integers and fractions, written from the text of order-free arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.program import sums
from runtime.program.executor import ArithmeticFault
from runtime.program.optimiser import exponent_program, square_program

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40, database=None)

# the text, in Python integers ----------------------------------------------------------------------------------------


def to_float32(value: Fraction) -> float:
    """The binary32 nearest to a fraction, ties to even, overflow to infinity."""
    if value == 0:
        return 0.0
    size = abs(value)
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= size < Fraction(2) ** power
    unit = Fraction(2) ** (max(power, -126) - 23)
    nearest = round(size / unit) * unit
    return math.copysign(float(nearest) if nearest < 2**128 else math.inf, value)


def scaled(f: float, p: int) -> float:
    """`scale(f, p)`: one step where -126 <= p <= 127, otherwise 2^clamp(p) first and the rest second."""
    first = min(max(p, -126), 127)
    once = to_float32(Fraction(f) * Fraction(2) ** first)
    return once if math.isinf(once) or first == p else to_float32(Fraction(once) * Fraction(2) ** (p - first))


def biased(x: float) -> int:
    return (int(np.float32(x).view(np.uint32)) >> 23) & 255


def row_exponent(row: Sequence[float]) -> tuple[list[float], int]:
    """The row that the sum sees and its e: zeros and 0 where all |x| < 2^-100."""
    largest = max(map(biased, row))
    assert largest < 255
    return ([0.0] * len(row), 0) if largest < 26 else (list(row), largest - 126)


def quantised(row: Sequence[float], bits: int) -> tuple[list[int], int]:
    row, e = row_exponent(row)
    return [round(Fraction(x) * Fraction(2) ** (bits - e)) for x in row], e


def row_sum(row: Sequence[float]) -> float:
    q, e = quantised(row, 24)
    return scaled(to_float32(Fraction(sum(q))), e - 24)


def digits(q: int, slices: int) -> list[int]:
    found = []
    for _ in range(slices - 1):
        low = ((q + 64) & 127) - 64
        found.append(low)
        q = (q - low) // 128
    assert all(-64 <= d <= 63 for d in found)
    assert -64 <= q <= 64
    return [*found, q]


def product(a: np.ndarray, b: np.ndarray, slices: int) -> np.ndarray:
    bits = 7 * slices - 1
    rows = [quantised(r, bits) for r in a.tolist()]
    columns = [quantised(c, bits) for c in b.T.tolist()]
    left = [([digits(v, slices) for v in q], e) for q, e in rows]
    right = [([digits(v, slices) for v in q], e) for q, e in columns]
    made = np.empty((len(rows), len(columns)), np.float32)
    pairs = [(i, j) for i in range(slices) for j in range(slices) if i + j >= slices - 1]
    for m, (x, ea) in enumerate(left):
        for n, (y, eb) in enumerate(right):
            total = sum(128 ** (i + j) * sum(p[i] * q[j] for p, q in zip(x, y, strict=True)) for i, j in pairs)
            made[m, n] = scaled(to_float32(Fraction(total)), ea + eb - 2 * bits)
    return made


# rows ----------------------------------------------------------------------------------------------------------------


def rows_of(kind: str, count: int, length: int, seed: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    x = source.standard_normal((count, length))
    if kind == "huge and tiny":
        x *= np.float64(2) ** source.integers(-90, 20, (count, length))
        x[:, source.integers(0, length)] = 3.0e38
    elif kind == "below 2^-100":
        x *= 2.0**-104
        x[:, 0] = 2.0**-149
    elif kind == "around 2^-100":
        x = np.sign(x) * 2.0 ** -source.integers(99, 103, (count, length))
    elif kind == "ties":
        x = source.integers(-(2**14), 2**14, (count, length)) * 2.0**-14
        x[:, 0] = 1.0
    elif kind == "all equal":
        x = np.full((count, length), -1.0 + 2.0**-24)
    elif kind == "cancelling":
        x[:, length // 2 : 2 * (length // 2)] = -x[:, : length // 2]
    elif kind == "largest":
        x = np.where(x > 0, 1, -1) * 3.4028234663852886e38
    elif kind == "signed zeros":
        x = np.where(x > 0, 0.0, -0.0)
    return x.astype(np.float32)


KINDS = (
    "normal", "huge and tiny", "below 2^-100", "around 2^-100", "ties",
    "all equal", "cancelling", "largest", "signed zeros",
)  # fmt: skip


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    wrong = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    assert not len(wrong), (
        f"{len(wrong)} wrong, first {wrong[0]}: {expected[tuple(wrong[0])]} != {found[tuple(wrong[0])]}"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 1000, 5000])
def test_row_sum(kind: str, length: int, compute: Any) -> None:
    x = rows_of(kind, 2, length, length)
    expected = np.array([row_sum(r) for r in x.tolist()], np.float32)
    same_bits(compute(lambda v: sums.row_sum(v, 1), x), expected)
    order = np.random.default_rng(1).permutation(length)
    same_bits(compute(lambda v: sums.row_sum(v, -2, keep=True), np.ascontiguousarray(x[:, order].T)), expected[None])


def test_row_sum_over_several_axes_and_none(compute: Any) -> None:
    x = rows_of("normal", 6, 20, 1).reshape(2, 3, 4, 5)
    flat = x.transpose(1, 3, 0, 2).reshape(15, 8)
    expected = np.array([row_sum(r) for r in flat.tolist()], np.float32).reshape(3, 5)
    same_bits(compute(lambda v: sums.row_sum(v, 2, 0), x), expected)
    same_bits(compute(lambda v: sums.row_sum(v, 0, 1, 2, 3), x), np.float32(row_sum(x.reshape(-1).tolist())))
    same_bits(compute(lambda v: sums.row_sum(v, 1), np.zeros((3, 0), np.float32)), np.zeros(3, np.float32))
    same_bits(
        compute(lambda v: sums.row_sum(v, 0, keep=True), np.zeros((0, 3), np.float32)), np.zeros((1, 3), np.float32)
    )
    same_bits(compute(lambda v: sums.row_sum(v, 1), np.zeros((0, 3), np.float32)), np.zeros(0, np.float32))


def test_row_sum_with_a_known_bound(compute: Any) -> None:
    x = np.random.default_rng(2).random((3, 1000)).astype(np.float32)
    x[0] *= 2.0**-20
    expected = [scaled(to_float32(Fraction(sum(round(Fraction(v) * 2**23) for v in r))), -23) for r in x.tolist()]
    same_bits(compute(lambda v: sums.row_sum(v, 1, bound=1), x), np.array(expected, np.float32))
    with pytest.raises(ArithmeticFault):
        compute(lambda v: sums.row_sum(v, 0, bound=1), np.array([2.0**9], np.float32))


def test_row_mean(compute: Any) -> None:
    x = rows_of("normal", 3, 7, 3)
    expected = [to_float32(Fraction(row_sum(r)) / 7) for r in x.tolist()]
    same_bits(compute(lambda v: sums.row_mean(v, 1), x), np.array(expected, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_nan_or_infinity_is_an_error(bad: float, compute: Any) -> None:
    x = np.ones((2, 4), np.float32)
    x[1, 2] = bad
    for function in (lambda v: sums.row_sum(v, 1), lambda v: sums.matmul(v, v.swap()), lambda v: sums.to_grid(v, 1)):
        with pytest.raises(ArithmeticFault, match="rint") as caught:
            compute(function, x)
        assert caught.value.element == 6


# products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_matmul(kind: str, length: int, slices: int, compute: Any) -> None:
    a, b = (
        rows_of(kind, 3, length, length),
        rows_of("normal" if kind == "largest" else kind, 2, length, length + 1).T.copy(),
    )
    expected = product(a, b, slices)
    same_bits(compute(lambda x, y: sums.matmul(x, y, slices), a, b), expected)
    order = np.random.default_rng(1).permutation(length)
    same_bits(compute(lambda x, y: sums.matmul(x, y, slices), a[:, order].copy(), b[order].copy()), expected)


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("kind", ["normal", "huge and tiny", "all equal"])
def test_matmul_of_long_rows(kind: str, slices: int, compute: Any) -> None:
    for length in (4097, 5000):
        a, b = rows_of(kind, 2, length, 1), rows_of(kind, 1, length, 2).T.copy()
        same_bits(compute(lambda x, y: sums.matmul(x, y, slices), a, b), product(a, b, slices))


@pytest.mark.parametrize("slices", [2, 3])
def test_matmul_with_denormal_and_overflowing_results(slices: int, compute: Any) -> None:
    source = np.random.default_rng(4)
    powers = np.array([-60, -63, -66, -70, -74, -76, -90, 66, 62], np.float64)
    a = (source.standard_normal((9, 5)) * 2.0 ** powers[:, None]).astype(np.float32)
    b = (source.standard_normal((5, 9)) * 2.0**powers).astype(np.float32)
    expected = product(a, b, slices)
    tiny = np.abs(expected[:7, :7])
    assert ((tiny > 0) & (tiny < 2.0**-126)).sum() > 9
    assert np.isinf(expected).any()
    same_bits(compute(lambda x, y: sums.matmul(x, y, slices), a, b), expected)


def test_matmul_batched_and_broadcast(compute: Any) -> None:
    source = np.random.default_rng(5)
    a, b = source.standard_normal((2, 3, 4, 6)).astype(np.float32), source.standard_normal((3, 6, 5)).astype(np.float32)
    expected = np.stack([np.stack([product(x, y, 2) for x, y in zip(p, b, strict=True)]) for p in a])
    same_bits(compute(sums.matmul, a, b), expected)


def test_matmul_cut_where_int32_could_overflow(compute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows_of("all equal", 2, 100, 6), rows_of("normal", 2, 100, 7).T.copy()
    monkeypatch.setattr(sums, "MAX_DOT_LENGTH", 14)
    same_bits(compute(sums.matmul, a, b), product(a, b, 2))


def test_matmul_is_as_close_as_the_text_says(compute: Any) -> None:
    source = np.random.default_rng(8)
    a, b = source.standard_normal((64, 512)).astype(np.float32), source.standard_normal((512, 64)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    for slices, low, high in ((2, 1e-4, 8e-4), (3, 1e-7, 1e-5)):
        found = compute(lambda x, y, s=slices: sums.matmul(x, y, s), a, b)
        assert low < np.linalg.norm(found - exact) / np.linalg.norm(exact) < high


# the grid of gradients -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-(2.0**18), 2.0**18, width=32), min_size=1, max_size=8))
@REPEATABLE
def test_grid(compute: Any, values: list[float]) -> None:
    x = np.array(values, np.float32)
    found = compute(lambda v: sums.to_grid(v, 1), x)
    assert found.tolist() == [round(Fraction(v) * 2**44) for v in x.tolist()]
    back = compute(sums.from_grid, found)
    expected = [scaled(to_float32(Fraction(v)), -44) for v in found.tolist()]
    same_bits(back, np.array(expected, np.float32))


@pytest.mark.parametrize(("terms", "bits"), [(1, 19), (2, 18), (3, 17), (4, 17), (5, 16), (64, 13), (65, 12)])
def test_grid_refuses_where_the_sum_could_overflow(terms: int, bits: int, compute: Any) -> None:
    below = np.float32(2.0**bits * (1 - 2.0**-24))
    found = compute(lambda v: sums.to_grid(v, terms), np.array([below, -below]))
    assert abs(int(found[0])) * terms < 2**63
    for value in (2.0**bits, -(2.0**bits), 3.0e38, np.inf, np.nan):
        with pytest.raises(ArithmeticFault, match="rint") as caught:
            compute(lambda v: sums.to_grid(v, terms), np.array([0.0, value], np.float32))
        assert caught.value.element == 1


def test_add_rows(compute: Any) -> None:
    index = np.array([2, 0, 2, 2], np.int64)
    updates = rows_of("normal", 4, 3, 9)
    totals = np.zeros((4, 3), object)
    for i, row in zip(index.tolist(), updates.tolist(), strict=True):
        totals[i] += np.array([round(Fraction(v) * 2**44) for v in row], object)
    expected = [[scaled(to_float32(Fraction(v)), -44) for v in row] for row in totals.tolist()]
    found = compute(lambda i, u: sums.add_rows(i, u, 4), index, updates)
    same_bits(found, np.array(expected, np.float32))
    order = np.array([3, 1, 0, 2])
    same_bits(compute(lambda i, u: sums.add_rows(i, u, 4), index[order], updates[order]), found)


# maximum and norm ----------------------------------------------------------------------------------------------------


def test_row_max(compute: Any, hard_floats: Any) -> None:
    x = hard_floats(600, 10)
    x = np.where(np.isnan(x), np.float32(-0.0), x).reshape(60, 10)
    x[0], x[1, :], x[2, :] = -0.0, -np.inf, -1e-45
    x[0, 5] = 0.0
    best = [max(r, key=lambda v: (v, math.copysign(1, v))) for r in x.tolist()]
    same_bits(compute(lambda v: sums.row_max(v, 1), x), np.array(best, np.float32))
    same_bits(compute(lambda v: sums.row_max(v, 0, keep=True), x.T.copy()), np.array(best, np.float32)[None])


@pytest.mark.parametrize("micro_batches", [1, 3, 4])
@pytest.mark.parametrize("power", [0, -30, 18, -100])
def test_norm_of_the_mean_gradient(micro_batches: int, power: int, run_program: Any) -> None:
    source = np.random.default_rng(11)
    total = (source.standard_normal(999) * 2.0 ** min(power, 16) * 2.0**44).astype(np.int64)
    mean = [to_float32(Fraction(scaled(to_float32(Fraction(g)), -44)) / micro_batches) for g in total.tolist()]
    (largest,) = run_program(exponent_program(999, micro_batches), total)
    assert largest.dtype == np.int32
    assert largest == max(map(biased, mean))
    for extra in (0, 3):  # another chunk may hold the largest element
        e = largest + np.int32(extra)
        (found,) = run_program(square_program(999, micro_batches), total, e)
        by_text = 0 if e < 26 else int(e) - 126
        assert found.dtype == np.int64
        assert int(found) == sum(round(Fraction(g) * Fraction(2) ** (15 - by_text)) ** 2 for g in mean)
