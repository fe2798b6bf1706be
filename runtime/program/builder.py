"""Builds a Program operator by operator: types checked, equal values shared, unused ones dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.program.operators import infer
from runtime.program.program import Op, Program
from runtime.program.types import NUMPY, Type, type_of
from storage import merkle

Number = int | float | bool


@dataclass(frozen=True, eq=False)
class Value:
    """One value of a Program under construction. Arithmetic on it appends operators and broadcasts like numpy."""

    builder: Builder
    number: int
    type: Type

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.type.shape

    @property
    def dtype(self) -> str:
        """Its element type."""
        return self.type.dtype

    def __add__(self, other: Value | Number) -> Value:
        return self.builder.binary("add", self, other)

    def __radd__(self, other: Number) -> Value:
        return self.builder.binary("add", other, self)

    def __sub__(self, other: Value | Number) -> Value:
        return self.builder.binary("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.builder.binary("sub", other, self)

    def __mul__(self, other: Value | Number) -> Value:
        return self.builder.binary("mul", self, other)

    def __rmul__(self, other: Number) -> Value:
        return self.builder.binary("mul", other, self)

    def __truediv__(self, other: Value | Number) -> Value:
        return self.builder.binary("div", self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return self.builder.binary("div", other, self)

    def __neg__(self) -> Value:
        return self.builder.binary("mul", self, -1)

    def __and__(self, other: Value | Number) -> Value:
        return self.builder.binary("and", self, other)

    def __or__(self, other: Value | Number) -> Value:
        return self.builder.binary("or", self, other)

    def __xor__(self, other: Value | Number) -> Value:
        return self.builder.binary("xor", self, other)

    def __lshift__(self, amount: int) -> Value:
        return self.builder.op("shl", [self], amount=amount)

    def __rshift__(self, amount: int) -> Value:
        return self.builder.op("shr", [self], amount=amount)

    def __lt__(self, other: Value | Number) -> Value:
        return self.builder.binary("lt", self, other)

    def __le__(self, other: Value | Number) -> Value:
        return self.builder.binary("le", self, other)

    def __gt__(self, other: Value | Number) -> Value:
        return self.builder.binary("lt", other, self)

    def __ge__(self, other: Value | Number) -> Value:
        return self.builder.binary("le", other, self)

    def equals(self, other: Value | Number) -> Value:
        """Elementwise equality, a bool value."""
        return self.builder.binary("eq", self, other)

    def reshape(self, *shape: int) -> Value:
        """The same elements in row-major order under another shape."""
        return self if shape == self.shape else self.builder.op("reshape", [self], shape=shape)

    def transpose(self, *order: int) -> Value:
        """The axes in another order."""
        return self if order == tuple(range(len(order))) else self.builder.op("transpose", [self], order=order)

    def swap(self) -> Value:
        """The last two axes exchanged."""
        rank = len(self.shape)
        return self.transpose(*range(rank - 2), rank - 1, rank - 2)

    def broadcast(self, *shape: int) -> Value:
        """Repeated to `shape` by numpy's rule: leading axes are added, sizes of 1 are repeated."""
        value = self.reshape(*(1,) * (len(shape) - len(self.shape)), *self.shape)
        return value if value.shape == shape else self.builder.op("broadcast", [value], shape=shape)

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Elements start, start + step, ... below stop along an axis."""
        if (start, stop, step) == (0, self.shape[axis], 1):
            return self
        return self.builder.op("slice", [self], axis=axis, start=start, stop=stop, step=step)

    def bits(self) -> Value:
        """The bit patterns of an f32 value as i32."""
        return self.builder.op("bitcast", [self], dtype="i32")

    def from_bits(self) -> Value:
        """The f32 value whose bit patterns these i32 are."""
        return self.builder.op("bitcast", [self], dtype="f32")

    def cast(self, dtype: str) -> Value:
        """Integers or bool as another integer type, modulo its range."""
        return self if dtype == self.dtype else self.builder.op("cast", [self], dtype=dtype)

    def float(self) -> Value:
        """Integers rounded once to f32."""
        return self.builder.op("float", [self])

    def rint(self, dtype: str, bound: int | None = None) -> Value:
        """f32 rounded to the nearest integer, ties to even; a fault where not |x| < 2^bound (NaN too)."""
        limit = {"i32": 31, "i64": 63}[dtype]
        return self.builder.op("rint", [self], dtype=dtype, bound=limit if bound is None else bound)

    def scale(self, power: Value | int) -> Value:
        """x * 2^power, the power an i32 value or a number."""
        amount = self.builder.literal("i32", power) if isinstance(power, int) else power
        return self.builder.op("scale", [self, amount.broadcast(*self.shape)])

    def sqrt(self) -> Value:
        """The correctly rounded square root."""
        return self.builder.op("sqrt", [self])

    def digit(self) -> Value:
        """i32 as i8 digits, clamped to [-64, 64]."""
        return self.builder.op("digit", [self])

    def sum(self, *axes: int, keep: bool = False) -> Value:
        """The exact integer sum over axes, i64."""
        return self._reduced("sum", axes, keep)

    def max(self, *axes: int, keep: bool = False) -> Value:
        """The integer maximum over axes."""
        return self._reduced("max", axes, keep)

    def _reduced(self, name: str, axes: tuple[int, ...], keep: bool) -> Value:
        axes = tuple(sorted(axis % len(self.shape) for axis in axes))
        value = self.builder.op(name, [self], axes=axes) if axes else self
        if not axes and name == "sum":
            value = self.cast("i64")
        return value.reshape(*(1 if i in axes else n for i, n in enumerate(self.shape))) if keep else value


class Builder:
    """Appends operators to a Program. Equal operators on equal operands become one value."""

    def __init__(self) -> None:
        self._inputs: list[tuple[str, Type]] = []
        self._ops: list[Op] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self._constants: dict[bytes, bytes] = {}
        self._label = ""

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Operators made inside carry this label: the module path and the operator of the source."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def input(self, name: str, dtype: str, *shape: int) -> Value:
        """Declares the next input; all inputs come before the first operator."""
        if self._ops:
            raise ValueError(f"input {name!r} after the first operator: declare inputs first")
        self._inputs.append((name, Type(dtype, shape)))
        return Value(self, len(self._inputs) - 1, self._inputs[-1][1])

    def op(self, name: str, inputs: Sequence[Value], **attributes: Any) -> Value:
        """Appends an operator, or finds the equal one that exists; raises OperatorError where the types do not fit."""
        made = Op(
            name=name,
            inputs=tuple(v.number for v in inputs),
            attributes=attributes,
            type=infer(name, [v.type for v in inputs], attributes),
            label=self._label,
        )
        number = self._known.get(made.key)
        if number is None:
            number = self._known[made.key] = len(self._inputs) + len(self._ops)
            self._ops.append(made)
        return Value(self, number, made.type)

    def binary(self, name: str, a: Value | Number, b: Value | Number) -> Value:
        """A two-operand operator with numpy's broadcasting; numbers take the other operand's element type."""
        if not isinstance(a, Value):
            assert isinstance(b, Value)
            a = self.literal(b.dtype, a)
        if not isinstance(b, Value):
            b = self.literal(a.dtype, b)
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self.op(name, [a.broadcast(*shape), b.broadcast(*shape)])

    def literal(self, dtype: str, value: Number) -> Value:
        """A scalar; a number for f32 is rounded to binary32 once, here."""
        bits = int(np.float32(value).view(np.uint32)) if dtype == "f32" else int(value)
        return self.op("literal", [], dtype=dtype, bits=bits)

    def full(self, dtype: str, shape: Sequence[int], value: Number) -> Value:
        """A scalar repeated to a shape."""
        return self.literal(dtype, value).broadcast(*shape)

    def constant(self, array: np.ndarray) -> Value:
        """An array known when the Program is made; its bytes travel with it and its root is in the record."""
        t = type_of(array)
        data = np.ascontiguousarray(array, dtype=NUMPY[t.dtype].newbyteorder("<")).tobytes()
        digest = merkle.bytes_root(data)
        self._constants[digest] = data
        return self.op("constant", [], dtype=t.dtype, shape=t.shape, digest=digest)

    def iota(self, size: int) -> Value:
        """0, 1, ... size - 1 as i64."""
        return self.op("iota", [], size=size)

    def select(self, condition: Value, yes: Value | Number, no: Value | Number) -> Value:
        """Elementwise yes where the condition holds, otherwise no; broadcasts like numpy."""
        dtype = yes.dtype if isinstance(yes, Value) else no.dtype if isinstance(no, Value) else "f32"
        yes, no = (v if isinstance(v, Value) else self.literal(dtype, v) for v in (yes, no))
        shape = np.broadcast_shapes(condition.shape, yes.shape, no.shape)
        return self.op("select", [v.broadcast(*shape) for v in (condition, yes, no)])

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Values joined along an axis."""
        return values[0] if len(values) == 1 else self.op("concat", values, axis=axis)

    def take(self, data: Value, index: Value) -> Value:
        """Rows of `data` at the indices (i64); a fault where one is outside."""
        return self.op("take", [data, index])

    def scatter_add(self, index: Value, updates: Value, rows: int) -> Value:
        """i64 zeros of `rows` rows with each update added to its row."""
        return self.op("scatter_add", [index, updates], rows=rows)

    def dot(self, a: Value, b: Value) -> Value:
        """The exact product of two digit matrices, batched over equal leading axes, i32."""
        return self.op("dot", [a, b])

    def finish(self, outputs: Sequence[Value]) -> Program:
        """The Program that computes the outputs, without the operators that none of them needs."""
        first = len(self._inputs)
        needed = {v.number for v in outputs}
        for number in range(len(self._ops) - 1, -1, -1):
            if first + number in needed:
                needed.update(self._ops[number].inputs)
        renumbered = {i: i for i in range(first)}
        kept: list[Op] = []
        for number, op in enumerate(self._ops):
            if first + number in needed:
                renumbered[first + number] = first + len(kept)
                inputs = tuple(renumbered[i] for i in op.inputs)
                kept.append(Op(name=op.name, inputs=inputs, attributes=op.attributes, type=op.type, label=op.label))
        used = {op.attributes["digest"] for op in kept if op.name == "constant"}
        return Program(
            inputs=tuple(self._inputs),
            ops=tuple(kept),
            outputs=tuple(renumbered[v.number] for v in outputs),
            constants={digest: data for digest, data in self._constants.items() if digest in used},
        )
