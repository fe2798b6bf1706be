"""A Program: primitive operators in static single assignment over typed, fixed-shape arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from runtime.program.operators import OPERATORS, OperatorError, infer
from runtime.program.types import NUMPY, Type
from storage import merkle


@dataclass(frozen=True, kw_only=True)
class Op:
    """One application of an operator. `inputs` are value numbers: program inputs first, then operators in order."""

    name: str
    inputs: tuple[int, ...]
    attributes: Mapping[str, Any]
    type: Type
    label: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two operators the same value: everything but the label."""
        return (self.name, self.inputs, tuple(self.attributes.items()))


@dataclass(frozen=True, kw_only=True)
class Program:
    """Inputs (name and type), operators in order, the value numbers that are its outputs, and its constants by digest.

    Raises OperatorError where an operator uses a value before it is defined or breaks its type rule: a Program that
    exists is well formed, whoever sent it.
    """

    inputs: tuple[tuple[str, Type], ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    constants: Mapping[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        types = [t for _, t in self.inputs]
        if any(t.dtype == "i8" for t in types):
            raise OperatorError("a Program takes no i8 input: digits come from `digit` alone")
        for number, op in enumerate(self.ops):
            where = f"operator {number} ({op.name}, {op.label or 'no label'})"
            if any(not 0 <= i < len(types) for i in op.inputs):
                raise OperatorError(f"{where} reads values {op.inputs} of the {len(types)} that exist")
            expected = infer(op.name, [types[i] for i in op.inputs], op.attributes)
            if expected != op.type:
                raise OperatorError(f"{where} claims {op.type}, its rule gives {expected}")
            if op.name == "constant":
                self._check_constant(op, where)
            types.append(op.type)
        if any(not 0 <= i < len(types) for i in self.outputs):
            raise OperatorError(f"outputs {self.outputs} of the {len(types)} values that exist")

    def _check_constant(self, op: Op, where: str) -> None:
        data = self.constants.get(op.attributes["digest"])
        size = op.type.elements * NUMPY[op.type.dtype].itemsize
        if data is None or len(data) != size:
            raise OperatorError(f"{where} has {0 if data is None else len(data)} bytes for {op.type}, expected {size}")
        if op.type.dtype == "bool" and max(data, default=0) > 1:
            raise OperatorError(f"{where} has a byte {max(data)} for a bool, expected 0 or 1")

    @cached_property
    def types(self) -> tuple[Type, ...]:
        """The type of every value, inputs first."""
        return (*(t for _, t in self.inputs), *(op.type for op in self.ops))

    @property
    def output_types(self) -> tuple[Type, ...]:
        """The types of the outputs."""
        return tuple(self.types[i] for i in self.outputs)

    @cached_property
    def last_use(self) -> tuple[tuple[int, ...], ...]:
        """For every operator, the values that nothing reads after it, so that an executor can drop them."""
        last: dict[int, int] = {}
        for number, op in enumerate(self.ops):
            for value in (*op.inputs, len(self.inputs) + number):
                last[value] = number
        dead: list[list[int]] = [[] for _ in self.ops]
        for value, number in last.items():
            if value not in set(self.outputs):
                dead[number].append(value)
        return tuple(tuple(values) for values in dead)

    @cached_property
    def root(self) -> bytes:
        """The Merkle root (32 bytes) over the header, every operator's record in order, and the labels."""
        from runtime.program.encoding import leaves

        return merkle.list_root(leaves(self))

    @property
    def histogram(self) -> dict[str, int]:
        """How often each operator occurs, in the table's order."""
        names = [op.name for op in self.ops]
        return {name: names.count(name) for name in OPERATORS if name in names}


def input_types(program: Program) -> Sequence[Type]:
    """The types of the program's inputs in order."""
    return [t for _, t in program.inputs]
