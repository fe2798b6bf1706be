"""The operator table: every primitive that a Program may use, with its arity, attributes and type rule.

The meaning of each row is `docs/arithmetic.md`, and each back end is one more column keyed by the same names: plain
torch in `reference.py` (the executable specification), LLVM in `compiler/loops.py`, later CUDA and Solidity. Softmax,
norms, exp, cross-entropy and AdamW are compositions of these rows (`sums.py`, `functions.py`, `random.py`), never rows
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.program.types import DTYPES, Type
from storage.errors import FailureError

Attributes = Mapping[str, Any]
Rule = Callable[[Sequence[Type], Attributes], Type]

MAX_DOT_LENGTH = 2**19
"""Rows of `dot` are shorter than this: 64 * 64 * 2^19 = 2^31 is the first sum that int32 cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One row of the table.

    `attributes` maps a name to its encoding: ``int``, ``ints``, ``dtype`` or ``digest``. `arity` None is one or more.
    """

    name: str
    code: int
    arity: int | None
    attributes: Mapping[str, str]
    rule: Rule


class OperatorError(FailureError, ValueError):
    """An operator was given operands or attributes that its type rule refuses."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OperatorError(message)


def _same(types: Sequence[Type], *dtypes: str) -> Type:
    first = types[0]
    _require(first.dtype in dtypes, f"expected {' or '.join(dtypes)}, got {first}")
    _require(all(t == first for t in types), f"operands differ: {', '.join(map(str, types))}")
    return first


def _elementwise(*dtypes: str) -> Rule:
    return lambda types, attributes: _same(types, *dtypes)


def _compare(types: Sequence[Type], attributes: Attributes) -> Type:
    return Type("bool", _same(types, "f32", "i32", "i64").shape)


def _shift(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype in ("i32", "i64"), f"expected i32 or i64, got {t}")
    bits = 32 if t.dtype == "i32" else 64
    _require(0 <= attributes["amount"] < bits, f"shift by {attributes['amount']} of a {bits}-bit integer")
    return t


def _scale(types: Sequence[Type], attributes: Attributes) -> Type:
    value, power = types
    _require(value.dtype == "f32" and power.dtype == "i32", f"expected f32 and i32, got {value} and {power}")
    _require(value.shape == power.shape, f"shapes differ: {value} and {power}")
    return value


def _select(types: Sequence[Type], attributes: Attributes) -> Type:
    condition, yes, no = types
    _require(condition.dtype == "bool", f"the condition is {condition}, expected bool")
    _require(yes == no and condition.shape == yes.shape, f"operands differ: {condition}, {yes}, {no}")
    return yes


def _rint(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    limit = {"i32": 31, "i64": 63}.get(attributes["dtype"], -1)
    _require(t.dtype == "f32", f"expected f32, got {t}")
    _require(0 <= attributes["bound"] <= limit, f"bound 2^{attributes['bound']} does not fit {attributes['dtype']}")
    return Type(attributes["dtype"], t.shape)


def _float(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype in ("i32", "i64"), f"expected i32 or i64, got {t}")
    return Type("f32", t.shape)


def _cast(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype != "f32", f"expected integers or bool, got {t}")
    _require(attributes["dtype"] in ("i32", "i64"), f"no cast to {attributes['dtype']}")
    return Type(attributes["dtype"], t.shape)


def _digit(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype == "i32", f"expected i32, got {t}")
    return Type("i8", t.shape)


def _bitcast(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    target = {"f32": "i32", "i32": "f32"}.get(t.dtype)
    _require(target == attributes["dtype"], f"no bitcast from {t} to {attributes['dtype']}")
    return Type(attributes["dtype"], t.shape)


def _kept(t: Type, axes: Sequence[int]) -> tuple[int, ...]:
    _require(list(axes) == sorted(set(axes)) and all(0 <= a < len(t.shape) for a in axes), f"axes {list(axes)} of {t}")
    return tuple(size for axis, size in enumerate(t.shape) if axis not in axes)


def _sum(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype in ("i32", "i64"), f"expected i32 or i64, got {t}")
    return Type("i64", _kept(t, attributes["axes"]))


def _max(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    _require(t.dtype in ("i32", "i64"), f"expected i32 or i64, got {t}")
    kept = _kept(t, attributes["axes"])
    _require(all(t.shape[axis] > 0 for axis in attributes["axes"]), f"maximum over an empty axis of {t}")
    return Type(t.dtype, kept)


def _dot(types: Sequence[Type], attributes: Attributes) -> Type:
    a, b = types
    _require(a.dtype == b.dtype == "i8", f"expected i8 digits, got {a} and {b}")
    _require(len(a.shape) == len(b.shape) >= 2, f"ranks differ or are below 2: {a} and {b}")
    _require(a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2], f"shapes do not match: {a} and {b}")
    _require(
        a.shape[-1] < MAX_DOT_LENGTH, f"rows of {a.shape[-1]} terms do not fit int32: at most {MAX_DOT_LENGTH - 1}"
    )
    return Type("i32", (*a.shape[:-1], b.shape[-1]))


def _take(types: Sequence[Type], attributes: Attributes) -> Type:
    data, index = types
    _require(index.dtype == "i64" and len(data.shape) >= 1, f"cannot take rows of {data} at {index}")
    return Type(data.dtype, (*index.shape, *data.shape[1:]))


def _scatter_add(types: Sequence[Type], attributes: Attributes) -> Type:
    index, updates = types
    _require(index.dtype == "i64" and len(index.shape) == 1, f"indices are {index}, expected i64[n]")
    _require(updates.dtype == "i64" and updates.shape[:1] == index.shape, f"updates are {updates} for {index}")
    _require(attributes["rows"] >= 0, f"{attributes['rows']} rows")
    return Type("i64", (attributes["rows"], *updates.shape[1:]))


def _reshape(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    result = Type(t.dtype, tuple(attributes["shape"]))
    _require(result.elements == t.elements, f"cannot reshape {t} to {list(attributes['shape'])}")
    return result


def _transpose(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    order = attributes["order"]
    _require(sorted(order) == list(range(len(t.shape))), f"{list(order)} is no order of the axes of {t}")
    return Type(t.dtype, tuple(t.shape[axis] for axis in order))


def _slice(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    axis, start, stop, step = (attributes[k] for k in ("axis", "start", "stop", "step"))
    _require(0 <= axis < len(t.shape), f"axis {axis} of {t}")
    _require(0 <= start <= stop <= t.shape[axis] and step >= 1, f"slice {start}:{stop}:{step} of axis {axis} of {t}")
    return Type(t.dtype, (*t.shape[:axis], len(range(start, stop, step)), *t.shape[axis + 1 :]))


def _concat(types: Sequence[Type], attributes: Attributes) -> Type:
    first, axis = types[0], attributes["axis"]
    _require(0 <= axis < len(first.shape), f"axis {axis} of {first}")
    for t in types:
        same = t.dtype == first.dtype and len(t.shape) == len(first.shape)
        same = same and all(x == y for i, (x, y) in enumerate(zip(t.shape, first.shape, strict=True)) if i != axis)
        _require(same, f"cannot concatenate {first} and {t} along axis {axis}")
    total = sum(t.shape[axis] for t in types)
    return Type(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _broadcast(types: Sequence[Type], attributes: Attributes) -> Type:
    (t,) = types
    shape = tuple(attributes["shape"])
    fits = len(shape) == len(t.shape) and all(a in (1, b) for a, b in zip(t.shape, shape, strict=True))
    _require(fits, f"cannot broadcast {t} to {list(shape)}: equal rank, and sizes equal or 1")
    return Type(t.dtype, shape)


def _literal(types: Sequence[Type], attributes: Attributes) -> Type:
    dtype, bits = attributes["dtype"], attributes["bits"]
    low, high = {"f32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1), "bool": (0, 1)}.get(dtype, (-(2**63), 2**63 - 1))
    _require(dtype != "i8" and low <= bits <= high, f"literal {bits} of {dtype}")
    return Type(dtype, ())


def _constant(types: Sequence[Type], attributes: Attributes) -> Type:
    _require(attributes["dtype"] != "i8", "constants of i8 do not exist: digits come from `digit` alone")
    return Type(attributes["dtype"], tuple(attributes["shape"]))


def _iota(types: Sequence[Type], attributes: Attributes) -> Type:
    return Type("i64", (attributes["size"],))


def _rows(*rows: tuple[str, int, int | None, dict[str, str], Rule]) -> dict[str, Operator]:
    return {
        name: Operator(name=name, code=code, arity=arity, attributes=attributes, rule=rule)
        for name, code, arity, attributes, rule in rows
    }


OPERATORS: Mapping[str, Operator] = _rows(
    # sources
    ("literal", 1, 0, {"dtype": "dtype", "bits": "int"}, _literal),
    ("constant", 2, 0, {"dtype": "dtype", "shape": "ints", "digest": "digest"}, _constant),
    ("iota", 3, 0, {"size": "int"}, _iota),
    # arithmetic: one correctly rounded binary32 operation, or integers modulo 2^32 or 2^64
    ("add", 10, 2, {}, _elementwise("f32", "i32", "i64")),
    ("sub", 11, 2, {}, _elementwise("f32", "i32", "i64")),
    ("mul", 12, 2, {}, _elementwise("f32", "i32", "i64")),
    ("div", 13, 2, {}, _elementwise("f32")),
    ("sqrt", 14, 1, {}, _elementwise("f32")),
    ("scale", 15, 2, {}, _scale),
    # bits, comparison, selection
    ("and", 20, 2, {}, _elementwise("i32", "i64", "bool")),
    ("or", 21, 2, {}, _elementwise("i32", "i64", "bool")),
    ("xor", 22, 2, {}, _elementwise("i32", "i64", "bool")),
    ("shl", 23, 1, {"amount": "int"}, _shift),
    ("shr", 24, 1, {"amount": "int"}, _shift),
    ("eq", 30, 2, {}, _compare),
    ("lt", 31, 2, {}, _compare),
    ("le", 32, 2, {}, _compare),
    ("select", 33, 3, {}, _select),
    # conversions
    ("rint", 40, 1, {"dtype": "dtype", "bound": "int"}, _rint),
    ("float", 41, 1, {}, _float),
    ("cast", 42, 1, {"dtype": "dtype"}, _cast),
    ("digit", 43, 1, {}, _digit),
    ("bitcast", 44, 1, {"dtype": "dtype"}, _bitcast),
    # reductions and products of integers
    ("sum", 50, 1, {"axes": "ints"}, _sum),
    ("max", 51, 1, {"axes": "ints"}, _max),
    ("dot", 52, 2, {}, _dot),
    # rows by index
    ("take", 60, 2, {}, _take),
    ("scatter_add", 61, 2, {"rows": "int"}, _scatter_add),
    # data movement
    ("reshape", 70, 1, {"shape": "ints"}, _reshape),
    ("transpose", 71, 1, {"order": "ints"}, _transpose),
    ("slice", 72, 1, {"axis": "int", "start": "int", "stop": "int", "step": "int"}, _slice),
    ("concat", 73, None, {"axis": "int"}, _concat),
    ("broadcast", 74, 1, {"shape": "ints"}, _broadcast),
)

BY_CODE: Mapping[int, Operator] = {row.code: row for row in OPERATORS.values()}


def infer(name: str, types: Sequence[Type], attributes: Attributes) -> Type:
    """The type of an operator's output.

    Raises OperatorError that names the operator where it does not exist or refuses its operands or attributes.
    """
    row = OPERATORS.get(name)
    if row is None:
        raise OperatorError(f"unknown operator {name!r}: expected one of {', '.join(OPERATORS)}")
    try:
        arity_fits = len(types) == row.arity if row.arity is not None else len(types) >= 1
        _require(arity_fits, f"{len(types)} operands, expected {row.arity if row.arity is not None else 'at least 1'}")
        _require(set(attributes) == set(row.attributes), f"attributes {sorted(attributes)}")
        for key, kind in row.attributes.items():
            _require(kind != "dtype" or attributes[key] in DTYPES, f"{key} = {attributes[key]!r} is no element type")
        return row.rule(types, attributes)
    except ValueError as error:
        raise OperatorError(f"operator {name!r}: {error}") from None
