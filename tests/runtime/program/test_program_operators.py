"""Every row of the operator table: its reference meaning against Python integers and fractions, and its type rule.

Nothing here uses numpy's or torch's arithmetic for an expected value: binary32 is rounded from exact fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from runtime.program.builder import Builder, Value
from runtime.program.executor import ArithmeticFault
from runtime.program.operators import BY_CODE, OPERATORS, OperatorError, infer
from runtime.program.reference import MEANING
from runtime.program.types import NUMPY, Type

NAN, INF, SIGN = 0x7FC00000, 0x7F800000, 0x80000000
SOURCES = {"literal", "constant", "iota"}
LAYOUTS = ("plain", "transposed", "broadcast")

# binary32 from exact fractions ---------------------------------------------------------------------------------------


def rounded(value: Fraction, *, negative_zero: bool = False) -> int:
    """Bits of the binary32 nearest to a fraction, ties to even, overflow to infinity."""
    if value == 0:
        return SIGN if negative_zero else 0
    sign, size = (SIGN if value < 0 else 0), abs(value)
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= size < Fraction(2) ** power
    power = max(power, -126)
    steps = round(size / Fraction(2) ** (power - 23))
    return sign | min(((power + 126) << 23) + steps, INF)


def is_nan(bits: int) -> bool:
    return bits & ~SIGN > INF


def is_infinite(bits: int) -> bool:
    return bits & ~SIGN == INF


def exact(bits: int) -> Fraction:
    field, steps = (bits >> 23) & 255, bits & 0x7FFFFF
    size = Fraction(steps + (field > 0) * 2**23) * Fraction(2) ** (max(field, 1) - 150)
    return -size if bits & SIGN else size


def f32_add(a: int, b: int) -> int:
    if is_nan(a) or is_nan(b) or (is_infinite(a) and is_infinite(b) and a != b):
        return NAN
    if is_infinite(a) or is_infinite(b):
        return a if is_infinite(a) else b
    return rounded(exact(a) + exact(b), negative_zero=a == b == SIGN)


def f32_mul(a: int, b: int) -> int:
    sign = (a ^ b) & SIGN
    if is_nan(a) or is_nan(b) or (is_infinite(a) and b & ~SIGN == 0) or (is_infinite(b) and a & ~SIGN == 0):
        return NAN
    if is_infinite(a) or is_infinite(b):
        return sign | INF
    return rounded(exact(a) * exact(b)) | sign


def f32_div(a: int, b: int) -> int:
    sign = (a ^ b) & SIGN
    if is_nan(a) or is_nan(b) or (is_infinite(a) and is_infinite(b)) or (a | b) & ~SIGN == 0:
        return NAN
    if is_infinite(a) or b & ~SIGN == 0:
        return sign | INF
    return sign if is_infinite(b) else rounded(exact(a) / exact(b)) | sign


def f32_sqrt(a: int) -> int:
    if is_nan(a) or (a & SIGN and a != SIGN):
        return NAN
    if a in (0, SIGN, INF):
        return a
    value = exact(a) * 4**200  # an integer with more than 200 bits, so that 24 bits of its root are far from its end
    assert value.denominator == 1
    root = math.isqrt(value.numerator)
    inexact = root * root != value.numerator
    return rounded(Fraction(2 * root + inexact, 2) / 2**200)


def f32_scale(a: int, power: int) -> int:
    power = min(max(power, -252), 254)
    first = min(max(power, -126), 127)
    once = f32_mul(a, rounded(Fraction(2) ** first))
    return f32_mul(once, rounded(Fraction(2) ** (power - first)))


def number(bits: int) -> float:
    """As a binary64, which holds every binary32."""
    return math.nan if is_nan(bits) else math.copysign(math.inf, -(bits & SIGN)) if bits == SIGN | INF else (
        math.inf if bits == INF else float(exact(bits))
    )  # fmt: skip


# arrays as Python integers -------------------------------------------------------------------------------------------


def integers(array: np.ndarray) -> np.ndarray:
    """The elements as Python integers: bit patterns for f32."""
    return (array.view(np.uint32) if array.dtype == np.float32 else array).astype(object)


def pack(values: np.ndarray, dtype: str) -> np.ndarray:
    """Python integers as elements of a type, modulo its range; bit patterns for f32."""
    if dtype == "bool":
        return values.astype(bool)
    if dtype == "f32":
        return values.astype(np.uint32).view(np.float32)
    bits = NUMPY[dtype].itemsize * 8
    half = 2 ** (bits - 1)
    wrapped = [(int(v) + half) % 2**bits - half for v in values.reshape(-1)]
    return np.array(wrapped, dtype=NUMPY[dtype]).reshape(values.shape)


def name_of(array: np.ndarray) -> str:
    return next(name for name, dtype in NUMPY.items() if dtype == array.dtype)


def each(function: Callable[..., Any], *arrays: np.ndarray, dtype: str) -> np.ndarray:
    """An elementwise operator from its meaning on Python integers."""
    raw = [integers(a) for a in arrays]
    made = np.empty(arrays[0].shape, dtype=object)
    for place in np.ndindex(*made.shape):
        made[place] = function(*(r[place] for r in raw))
    return pack(made, dtype)


def same_type(
    of_floats: Callable[..., int] | None, of_integers: Callable[..., int] | None
) -> Callable[..., np.ndarray]:
    def expected(*arrays: np.ndarray) -> np.ndarray:
        function = of_floats if arrays[0].dtype == np.float32 else of_integers
        assert function is not None
        return each(function, *arrays, dtype=name_of(arrays[0]))

    return expected


def comparison(compare: Callable[[Any, Any], bool]) -> Callable[..., np.ndarray]:
    def expected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype == np.float32:
            return each(lambda x, y: compare(number(x), number(y)), a, b, dtype="bool")
        return each(compare, a, b, dtype="bool")

    return expected


def reduced(fold: Callable[[Sequence[int]], int], array: np.ndarray, axes: Sequence[int], dtype: str) -> np.ndarray:
    raw, kept = integers(array), [i for i in range(array.ndim) if i not in axes]
    made = np.empty([array.shape[i] for i in kept], dtype=object)
    for place in np.ndindex(*made.shape):
        row: list[Any] = [slice(None)] * array.ndim
        for axis, i in zip(kept, place, strict=True):
            row[axis] = i
        made[place] = fold(np.array(raw[tuple(row)], dtype=object).reshape(-1).tolist())
    return pack(made, dtype)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    made = np.zeros((*a.shape[:-1], b.shape[-1]), dtype=object)
    for place in np.ndindex(*made.shape):
        *batch, m, n = place
        left, right = a[(*batch, m)].tolist(), b[(*batch, slice(None), n)].tolist()
        made[place] = sum(x * y for x, y in zip(left, right, strict=True))
    return pack(made, "i32")


def scatter_add(index: np.ndarray, updates: np.ndarray, rows: int) -> np.ndarray:
    made = np.zeros((rows, *updates.shape[1:]), dtype=object)
    for i, row in zip(index.tolist(), integers(updates), strict=True):
        made[i] += row
    return pack(made, "i64")


def rows_taken(data: np.ndarray, index: np.ndarray) -> np.ndarray:
    made = np.empty((*index.shape, *data.shape[1:]), dtype=data.dtype)
    for place in np.ndindex(*index.shape):
        made[place] = data[index[place]]
    return made


def moved(array: np.ndarray, shape: Sequence[int], origin: Callable[[tuple[int, ...]], tuple[int, ...]]) -> np.ndarray:
    """Data movement by the place that every element comes from."""
    made = np.empty(tuple(shape), dtype=array.dtype)
    for place in np.ndindex(*made.shape):
        made[place] = array[origin(place)]
    return made


def transposed(x: np.ndarray, order: Sequence[int]) -> np.ndarray:
    return moved(x, [x.shape[i] for i in order], lambda p: tuple(p[order.index(i)] for i in range(x.ndim)))


def sliced(x: np.ndarray, axis: int, start: int, stop: int, step: int) -> np.ndarray:
    taken = list(range(start, stop, step))
    shape = [len(taken) if i == axis else n for i, n in enumerate(x.shape)]
    return moved(x, shape, lambda p: tuple(taken[i] if a == axis else i for a, i in enumerate(p)))


def reshaped(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    made = np.empty(math.prod(shape), dtype=x.dtype)
    for i, place in enumerate(np.ndindex(*x.shape)):
        made[i] = x[place]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return moved(made, shape, lambda p: (sum(i * s for i, s in zip(p, strides, strict=True)),))


def joined(*xs: np.ndarray, axis: int) -> np.ndarray:
    origins = [(x, i) for x in xs for i in range(x.shape[axis])]
    made = np.empty([len(origins) if i == axis else n for i, n in enumerate(xs[0].shape)], dtype=xs[0].dtype)
    for place in np.ndindex(*made.shape):
        x, i = origins[place[axis]]
        made[place] = x[(*place[:axis], i, *place[axis + 1 :])]
    return made


EXPECTED: dict[str, Callable[..., np.ndarray]] = {
    "add": same_type(f32_add, lambda a, b: a + b),
    "sub": same_type(lambda a, b: f32_add(a, NAN if is_nan(b) else b ^ SIGN), lambda a, b: a - b),
    "mul": same_type(f32_mul, lambda a, b: a * b),
    "div": same_type(f32_div, None),
    "sqrt": same_type(f32_sqrt, None),
    "scale": lambda x, p: each(f32_scale, x, p, dtype="f32"),
    "and": same_type(None, lambda a, b: a & b),
    "or": same_type(None, lambda a, b: a | b),
    "xor": same_type(None, lambda a, b: a ^ b),
    "shl": lambda x, amount: each(lambda v: v * 2**amount, x, dtype=name_of(x)),
    "shr": lambda x, amount: each(lambda v: v // 2**amount, x, dtype=name_of(x)),
    "eq": comparison(lambda a, b: a == b),
    "lt": comparison(lambda a, b: a < b),
    "le": comparison(lambda a, b: a <= b),
    "select": lambda c, a, b: each(lambda k, x, y: x if k else y, c, a, b, dtype=name_of(a)),
    "rint": lambda x, dtype, bound: each(lambda v: round(exact(v)), x, dtype=dtype),
    "float": lambda x: each(lambda v: rounded(Fraction(v)), x, dtype="f32"),
    "cast": lambda x, dtype: each(int, x, dtype=dtype),
    "digit": lambda x: each(lambda v: min(max(v, -64), 64), x, dtype="i8"),
    "bitcast": lambda x, dtype: each(lambda v: v % 2**32, x, dtype=dtype),
    "sum": lambda x, axes: reduced(sum, x, axes, "i64"),
    "max": lambda x, axes: reduced(max, x, axes, name_of(x)),
    "dot": dot,
    "take": rows_taken,
    "scatter_add": scatter_add,
    "reshape": reshaped,
    "transpose": transposed,
    "slice": sliced,
    "concat": joined,
    "broadcast": lambda x, shape: moved(
        x, shape, lambda p: tuple(0 if n == 1 else i for n, i in zip(x.shape, p, strict=True))
    ),
}

# operands ------------------------------------------------------------------------------------------------------------

Case = tuple[list[np.ndarray], dict[str, Any]]


def wide(dtype: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Integers over the whole range with its ends; all four bytes of an i32 and all eight of an i64 are used."""
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    bits = NUMPY[dtype].itemsize * 8
    source = np.random.default_rng(seed)
    found = source.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=NUMPY[dtype])
    ends = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -1, 0, 1, 2**24 + 1, 2**24 - 1, -(2**24) - 1]
    flat = found.reshape(-1)
    flat[::3] = source.choice(np.array(ends, dtype=NUMPY[dtype]), len(flat[::3])) if len(flat) else flat
    return found


def cases(name: str, hard: Callable[[int, int], np.ndarray]) -> list[Case]:
    """Operands and attributes that try one operator, empty arrays included."""

    def floats(seed: int, *shape: int) -> np.ndarray:
        return hard(math.prod(shape), seed).reshape(shape)

    def digits(seed: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(-64, 65, shape).astype(np.int8)

    two = [[wide(t, (9, 8), 1), wide(t, (9, 8), 2)] for t in ("i32", "i64")]
    three_axes = [wide(t, (3, 4, 5), 3) for t in ("i32", "i64")]
    anything = [floats(4, 3, 4, 5), *three_axes, wide("bool", (3, 4, 5), 5), digits(6, 3, 4, 5)]
    whole = np.where(np.isfinite(f := floats(7, 40, 16)), f, 2.5)  # finite, for rint
    small = np.clip(whole, -(2.0**30), 2.0**30).astype(np.float32)
    large = np.clip(whole, -(2.0**62), 2.0**62).astype(np.float32)
    powers = np.random.default_rng(8).integers(-300, 300, (40, 16)).astype(np.int32)
    powers[::2] = np.random.default_rng(9).integers(-160, 160, (20, 16))
    far = np.array([[-252, -253, -(2**31)], [27, 28, 2**31 - 1]], np.int32)
    ties = np.array([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.0, 2.0**-149]], np.float32)
    halfway = (np.int64(2) ** np.arange(62) * 3 // 2 + np.arange(62) % 3 - 1).reshape(2, 31)
    index = np.array([[2, 0], [1, 2]], dtype=np.int64)
    empty_floats, empty_integers = np.zeros((0, 4), np.float32), np.zeros((0, 4), np.int64)
    table: dict[str, list[Case]] = {
        **{k: [([floats(10, 40, 16), floats(11, 40, 16)], {}), *((p, {}) for p in two)] for k in ("add", "sub", "mul")},
        **{k: [([floats(12, 40, 16), floats(13, 40, 16)], {}), *((p, {}) for p in two)] for k in ("eq", "lt", "le")},
        "div": [([floats(14, 40, 16), floats(15, 40, 16)], {}), ([empty_floats, empty_floats], {})],
        "sqrt": [([np.abs(floats(16, 40, 16))], {}), ([floats(17, 4, 4)], {}), ([empty_floats], {})],
        "scale": [
            ([floats(18, 40, 16), powers], {}),
            ([np.full((2, 3), 1.5 * 2**100, np.float32), far], {}),
        ],
        **{
            k: [*((p, {}) for p in two), ([wide("bool", (9, 8), 1), wide("bool", (9, 8), 2)], {})]
            for k in ("and", "or", "xor")
        },
        **{k: [([pair[0]], {"amount": n}) for pair in two for n in (0, 1, 7, 31)] for k in ("shl", "shr")},
        "select": [([wide("bool", (3, 4, 5), 19), x, x[::-1].copy()], {}) for x in anything[:4]],
        "rint": [
            ([small], {"dtype": "i32", "bound": 31}),
            ([large], {"dtype": "i64", "bound": 63}),
            ([ties], {"dtype": "i32", "bound": 2}),
            ([empty_floats], {"dtype": "i64", "bound": 3}),
        ],
        "float": [([x], {}) for x in (two[0][0], two[1][0], halfway, empty_integers)],
        "cast": [([x], {"dtype": t}) for x in (*three_axes, anything[3], anything[4]) for t in ("i32", "i64")],
        "digit": [([np.arange(-70, 71, dtype=np.int32).reshape(3, 47)], {}), ([two[0][0]], {})],
        "bitcast": [([two[0][0]], {"dtype": "f32"}), ([np.nan_to_num(floats(20, 9, 8), nan=-0.0)], {"dtype": "i32"})],
        "sum": [([x], {"axes": a}) for x in three_axes for a in ((), (0,), (2,), (0, 2), (0, 1, 2))]
        + [([empty_integers], {"axes": a}) for a in ((0,), (1,), (0, 1))],
        "max": [([x], {"axes": a}) for x in three_axes for a in ((), (1,), (0, 2), (0, 1, 2))]
        + [([empty_integers], {"axes": (1,)})],
        "dot": [
            ([digits(21, 3, 7), digits(22, 7, 2)], {}),
            ([digits(23, 2, 3, 4, 5), digits(24, 2, 3, 5, 2)], {}),
            ([np.full((2, 4097), 64, np.int8), np.full((4097, 2), -64, np.int8)], {}),
            ([digits(25, 2, 9001), digits(26, 9001, 1)], {}),
            ([np.full((1, 2**19 - 1), -64, np.int8), np.full((2**19 - 1, 1), 64, np.int8)], {}),  # -2^31 + 2^12
            ([np.zeros((2, 0), np.int8), np.zeros((0, 3), np.int8)], {}),
            ([np.zeros((0, 2), np.int8), digits(27, 2, 3)], {}),
        ],
        "take": [([x, index], {}) for x in anything]
        + [([anything[0], np.zeros((0,), np.int64)], {}), ([anything[1], np.array(1, np.int64)], {})],
        "scatter_add": [
            ([np.array([3, 0, 3, 3], np.int64), wide("i64", (4, 5), 28)], {"rows": 4}),
            ([np.random.default_rng(29).integers(0, 3, 200), wide("i64", (200,), 30)], {"rows": 3}),
            ([np.zeros(0, np.int64), np.zeros((0, 2), np.int64)], {"rows": 2}),
        ],
        "reshape": [([x], {"shape": s}) for x in anything for s in ((60,), (5, 1, 12), (2, 2, 3, 5))]
        + [([empty_floats], {"shape": (3, 0, 7)})],
        "transpose": [([x], {"order": o}) for x in anything for o in ((2, 0, 1), (0, 2, 1), (0, 1, 2))],
        "slice": [
            ([x], {"axis": a, "start": s, "stop": e, "step": k})
            for x in anything
            for a, s, e, k in ((0, 1, 3, 1), (2, 0, 5, 2), (1, 3, 3, 1), (2, 1, 5, 3))
        ],
        "concat": [([x, x[:, 1:2], x], {"axis": 1}) for x in anything]
        + [([empty_floats, floats(31, 2, 4)], {"axis": 0})],
        "broadcast": [([x[:, :1]], {"shape": (3, 6, 5)}) for x in anything]
        + [([np.zeros((1, 1), np.float32)], {"shape": (0, 3)})],
    }  # fmt: skip
    return table[name]


def apply(
    run: Callable[..., Any], name: str, operands: list[np.ndarray], attributes: dict[str, Any], layout: str
) -> Any:
    """What the executor makes of one operator; i8 operands come from `digit`, as they must.

    "transposed" feeds every operand with its axes reversed and turns it back in the Program, "broadcast" repeats the
    first row: the operator sees other strides, and for "broadcast" other values, which are returned too.
    """
    b = Builder()
    if layout == "broadcast":
        operands = [np.broadcast_to(x[:1], x.shape).copy() if x.ndim and len(x) else x for x in operands]
    fed, seen = [], []
    for i, x in enumerate(operands):
        given = x.astype(np.int32) if x.dtype == np.int8 else x
        given = given[:1] if layout == "broadcast" and x.ndim and len(x) else given
        given = np.ascontiguousarray(given.T) if layout == "transposed" and x.ndim else given
        fed.append(given)
        value = b.input(f"x{i}", name_of(given), *given.shape)
        seen.append((value, x))

    def turned(value: Value, x: np.ndarray) -> Value:
        value = value.digit() if x.dtype == np.int8 else value
        value = value.transpose(*reversed(range(x.ndim))) if layout == "transposed" and x.ndim else value
        return value.broadcast(*x.shape) if layout == "broadcast" and x.ndim else value

    result = b.op(name, [turned(value, x) for value, x in seen], **attributes)
    return run(b.finish([result]), *fed)[0], operands


def test_the_table_is_covered() -> None:
    assert set(EXPECTED) | SOURCES == set(OPERATORS)
    assert set(MEANING) | SOURCES == set(OPERATORS), "a row without a reference meaning"
    assert not set(MEANING) & SOURCES
    assert len(BY_CODE) == len(OPERATORS), "two rows with one code"
    assert all(0 < row.code < 256 and row.name == name for name, row in OPERATORS.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPECTED)
def test_reference_meaning(name: str, layout: str, run_program: Any, hard_floats: Any) -> None:
    for operands, attributes in cases(name, hard_floats):
        found, used = apply(run_program, name, operands, attributes, layout)
        expected = EXPECTED[name](*used, **attributes)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if found.dtype == np.float32:  # NaN has one form where it leaves an executor
            expected = np.where(np.isnan(expected), np.uint32(NAN), expected.view(np.uint32))
            found = found.view(np.uint32)
        wrong = np.argwhere(found != expected)
        assert not len(wrong), (
            f"{name} {attributes} {[x.shape for x in used]} {layout}: {len(wrong)} wrong, first at {wrong[0]}: "
            f"expected {expected[tuple(wrong[0])]!r}, got {found[tuple(wrong[0])]!r} "
            f"of {[x[tuple(wrong[0])] for x in used if x.shape == found.shape]}"
        )


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "sqrt", "rint"])
def test_many_elements_as_the_hardware_does_them(name: str, compute: Any, hard_floats: Any) -> None:
    """Large enough for vector kernels and several threads; numpy's elementwise operations are the processor's own."""
    a, b = hard_floats(200_003, 40), hard_floats(200_003, 41)
    with np.errstate(all="ignore"):
        if name == "rint":
            a = np.clip(np.nan_to_num(a), -(2.0**62), 2.0**62).astype(np.float32)
            found, expected = compute(lambda x: x.rint("i64"), a), np.rint(a).astype(np.int64)
        elif name == "sqrt":
            found, expected = compute(lambda x: x.sqrt(), a), np.sqrt(a)
        else:
            function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
            found, expected = compute(lambda x, y: x.builder.op(name, [x, y]), a, b), function(a, b)
    if expected.dtype == np.float32:
        expected = np.where(np.isnan(expected), np.uint32(NAN), expected.view(np.uint32)).view(np.float32)
    assert found.tobytes() == expected.tobytes()


def test_sources(run_program: Any) -> None:
    b = Builder()
    held = [
        np.array([[1, -2, 3], [4, 5, -(2**63)]], dtype=np.int64), np.array([-0.0, np.inf, 2**-149], dtype=np.float32),
        np.array([True, False]), np.array(7, dtype=np.int32), np.zeros((0, 3), np.float32),
    ]  # fmt: skip
    values = [b.constant(x) for x in held]
    literals = [b.literal("f32", -0.0), b.literal("f32", 0.1), b.literal("i32", -5), b.literal("i64", 2**63 - 1)]
    found = run_program(b.finish([*values, *literals, b.literal("bool", True), b.iota(5), b.iota(0)]))
    for made, expected in zip(found, held, strict=False):
        assert made.dtype == expected.dtype
        assert made.shape == expected.shape
        assert made.tobytes() == expected.tobytes()
    assert found[5].view(np.uint32) == SIGN
    assert int(found[6].view(np.uint32)) == rounded(Fraction(0.1))
    assert [int(x) for x in found[7:10]] == [-5, 2**63 - 1, 1]
    assert found[10].tolist() == [0, 1, 2, 3, 4]
    assert found[11].shape == (0,)


def test_nan_leaves_the_executor_in_one_form(compute: Any) -> None:
    odd = np.array([0x7F800001, 0xFFFFFFFF, 0xFFC00000, 0x7FC00000], dtype=np.uint32).view(np.float32)
    assert compute(lambda x: x, odd).view(np.uint32).tolist() == [NAN] * 4
    assert compute(lambda x: x.reshape(), odd[:1]).view(np.uint32) == NAN


@pytest.mark.parametrize(
    ("value", "dtype", "bound"),
    [
        (np.nan, "i32", 31), (np.inf, "i64", 63), (-np.inf, "i64", 63), (2.0**31, "i32", 31), (-(2.0**31), "i32", 31),
        (2.0**63, "i64", 63), (-(2.0**63), "i64", 63), (16.0, "i32", 4), (-16.0, "i64", 4), (1.0, "i32", 0),
    ],
)  # fmt: skip
def test_rint_refuses_what_does_not_fit(value: float, dtype: str, bound: int, compute: Any) -> None:
    x = np.array([[0.25, -0.5, 0.0], [0.5, value, value]], dtype=np.float32)
    with pytest.raises(ArithmeticFault, match=rf"expected \|x\| < 2\^{bound} at element 4") as caught:
        compute(lambda v: v.rint(dtype, bound), x)
    assert (caught.value.opcode, caught.value.element) == ("rint", 4)
    assert caught.value.value == value or (np.isnan(value) and np.isnan(caught.value.value))


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**63)])
def test_indices_outside_are_refused(bad: int, compute: Any) -> None:
    data, index = np.arange(6, dtype=np.int64).reshape(3, 2), np.array([0, 2, bad], dtype=np.int64)
    with pytest.raises(ArithmeticFault, match="expected an index in ") as caught:
        compute(lambda d, i: d.builder.take(d, i), data, index)
    assert (caught.value.opcode, caught.value.element) == ("take", 2)
    with pytest.raises(ArithmeticFault, match="scatter_add") as caught:
        compute(lambda d, i: d.builder.scatter_add(i, d, 3), data, index)
    assert (caught.value.element, caught.value.value) == (2, float(bad))


# type rules ----------------------------------------------------------------------------------------------------------

F, I32, I64, BOOL, I8 = (Type(t, (2, 3)) for t in ("f32", "i32", "i64", "bool", "i8"))
ROW = Type("f32", (3,))

REFUSED: list[tuple[str, list[Type], dict[str, Any]]] = [
    ("literal", [], {"dtype": "i8", "bits": 0}),
    ("literal", [], {"dtype": "f32", "bits": -1}),
    ("literal", [], {"dtype": "i32", "bits": 2**31}),
    ("literal", [], {"dtype": "bool", "bits": 2}),
    ("literal", [], {"dtype": "i64", "bits": 2**63}),
    ("literal", [], {"dtype": "f64", "bits": 0}),
    ("constant", [], {"dtype": "i8", "shape": (2,), "digest": bytes(32)}),
    ("constant", [], {"dtype": "f32", "shape": (-2,), "digest": bytes(32)}),
    ("constant", [], {"dtype": "f32", "shape": (2**30, 2**30), "digest": bytes(32)}),
    ("iota", [], {"size": -1}),
    ("iota", [], {"size": 2**41}),
    *((name, [F, ROW], {}) for name in ("add", "sub", "mul", "div", "eq", "lt", "le")),
    *((name, [F, I32], {}) for name in ("add", "sub", "mul", "div", "eq", "lt", "le", "and")),
    *((name, [BOOL, BOOL], {}) for name in ("add", "sub", "mul", "div", "eq", "lt", "le")),
    *((name, [F, F], {}) for name in ("and", "or", "xor")),
    *((name, [I8, I8], {}) for name in ("add", "mul", "and", "eq")),
    ("div", [I32, I32], {}),
    ("sqrt", [I64], {}),
    ("scale", [F, I64], {}),
    ("scale", [F, Type("i32", (2, 1))], {}),
    ("scale", [I32, I32], {}),
    ("shl", [F], {"amount": 1}),
    ("shl", [I32], {"amount": 32}),
    ("shr", [I64], {"amount": 64}),
    ("shr", [I64], {"amount": -1}),
    ("select", [I32, F, F], {}),
    ("select", [BOOL, F, I32], {}),
    ("select", [Type("bool", (3,)), F, F], {}),
    ("rint", [I32], {"dtype": "i32", "bound": 31}),
    ("rint", [F], {"dtype": "i32", "bound": 32}),
    ("rint", [F], {"dtype": "i64", "bound": -1}),
    ("rint", [F], {"dtype": "bool", "bound": 0}),
    ("float", [F], {}),
    ("float", [BOOL], {}),
    ("cast", [F], {"dtype": "i32"}),
    ("cast", [I32], {"dtype": "bool"}),
    ("cast", [I32], {"dtype": "i8"}),
    ("digit", [I64], {}),
    ("bitcast", [F], {"dtype": "f32"}),
    ("bitcast", [I64], {"dtype": "f32"}),
    *((name, [F], {"axes": (0,)}) for name in ("sum", "max")),
    *((name, [I32], {"axes": axes}) for name in ("sum", "max") for axes in ((2,), (-1,), (1, 0), (0, 0), (2**40,))),
    ("max", [Type("i32", (0, 3))], {"axes": (0,)}),
    ("dot", [I32, I32], {}),
    ("dot", [I8, I8], {}),
    ("dot", [Type("i8", (3,)), Type("i8", (3,))], {}),
    ("dot", [Type("i8", (1, 2**19)), Type("i8", (2**19, 1))], {}),
    ("dot", [Type("i8", (2, 3, 4)), Type("i8", (3, 4, 2))], {}),
    ("take", [F, I32], {}),
    ("take", [Type("f32", ()), I64], {}),
    ("scatter_add", [I64, I64], {"rows": 4}),
    ("scatter_add", [Type("i64", (2,)), F], {"rows": 4}),
    ("scatter_add", [Type("i64", (3,)), I64], {"rows": 4}),
    ("scatter_add", [Type("i64", (2,)), I64], {"rows": -1}),
    ("reshape", [F], {"shape": (5,)}),
    ("reshape", [F], {"shape": (-2, -3)}),
    ("transpose", [F], {"order": (0,)}),
    ("transpose", [F], {"order": (0, 0)}),
    ("transpose", [F], {"order": (-1, 0)}),
    *(
        ("slice", [F], {"axis": a, "start": s, "stop": e, "step": k})
        for a, s, e, k in ((2, 0, 1, 1), (-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 3, 1), (0, 2, 1, 1), (0, 0, 2, 0))
    ),
    ("concat", [], {"axis": 0}),
    ("concat", [F, I32], {"axis": 0}),
    ("concat", [F, ROW], {"axis": 0}),
    ("concat", [F, Type("f32", (2, 4))], {"axis": 0}),
    ("concat", [F, F], {"axis": 2}),
    ("broadcast", [F], {"shape": (4, 3)}),
    ("broadcast", [F], {"shape": (1, 2, 3)}),
    ("add", [F], {}),
    ("sqrt", [F, F], {}),
    ("add", [F, F], {"axis": 1}),
    ("shl", [I32], {}),
    ("matmul", [F, F], {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "types", "attributes"), REFUSED)
def test_type_rules_refuse(name: str, types: list[Type], attributes: dict[str, Any]) -> None:
    with pytest.raises(OperatorError, match=f"operator '{name}'"):
        infer(name, types, attributes)


def test_every_rule_refuses_something() -> None:
    assert {name for name, _, _ in REFUSED} >= set(OPERATORS)


def test_digits_exist_only_inside_a_program() -> None:
    b = Builder()
    with pytest.raises(OperatorError, match="no i8 input"):
        b.finish([b.input("x", "i8", 3)])


def test_the_executor_refuses_inputs_of_another_type(executor: Any) -> None:
    b = Builder()
    program = b.finish([b.input("weight", "f32", 2, 3) + 1.0])
    with pytest.raises(ValueError, match=r"takes 1 inputs, got 0"):
        executor.run(program, [])
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float64)):
        with pytest.raises(ValueError, match=r"'weight': expected f32\[2, 3\]"):
            executor.run(program, [executor.put(wrong)])
