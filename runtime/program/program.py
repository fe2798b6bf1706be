"""A Program: primitive operators in static single assignment over typed, fixed-shape arrays; its bytes and its root.

The leaves of its Merkle tree are the header, one record an operator and the labels, so one operator can be shown alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from runtime.program.encoding import (
    HeaderRecord,
    InputRecord,
    LabelsRecord,
    OpRecord,
    ProgramRecord,
    pack,
    type_from,
    type_record,
    unpack,
)
from runtime.program.operators import BY_CODE, OPERATORS, OperatorError, infer
from runtime.program.types import NUMPY, Type
from storage import merkle
from storage.codec import decode, encode
from storage.errors import IntegrityError

MAX_OPERATORS = 2**15
"""Operators in a Program: a layer of a GPT has some 2,300. Planning and compiling take longer than in proportion, and a
Program is anybody's; this many take a compiled executor some ten seconds."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """Inputs (name and type), operators in order, the value numbers that are its outputs, and its constants by digest.

    Programs with the same root are equal.

    Raises OperatorError where an operator uses a value before it is defined or breaks its type rule: a Program that
    exists is well formed, whoever sent it.
    """

    inputs: tuple[tuple[str, Type], ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    constants: Mapping[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_few(len(self.ops))
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
        outputs = set(self.outputs)
        for value, number in last.items():
            if value not in outputs:
                dead[number].append(value)
        return tuple(tuple(values) for values in dead)

    @cached_property
    def root(self) -> bytes:
        """The Merkle root (32 bytes) over the header, every operator's record in order, and the labels."""
        return merkle.list_root(leaves(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    @property
    def histogram(self) -> dict[str, int]:
        """How often each operator occurs, in the table's order."""
        names = [op.name for op in self.ops]
        return {name: names.count(name) for name in OPERATORS if name in names}


def _require_few(operators: int) -> None:
    if operators > MAX_OPERATORS:
        raise OperatorError(
            f"a Program of {operators} operators: expected at most {MAX_OPERATORS}; cut the model into more blocks"
        )


def _op_record(op: Op) -> OpRecord:
    code = OPERATORS[op.name].code
    return OpRecord(code=code, inputs=op.inputs, attributes=pack(op.name, op.attributes), type=type_record(op.type))


def _op(record: OpRecord, label: str) -> Op:
    row = BY_CODE.get(record.code)
    if row is None:
        raise OperatorError(f"operator code {record.code} is not in the table of this version")
    attributes = unpack(row.name, record.attributes)
    return Op(name=row.name, inputs=record.inputs, attributes=attributes, type=type_from(record.type), label=label)


def _file(program: Program) -> ProgramRecord:
    texts = tuple(sorted({op.label for op in program.ops}))
    place = {text: number for number, text in enumerate(texts)}
    digests = tuple(sorted(program.constants))
    return ProgramRecord(
        header=HeaderRecord(
            inputs=tuple(InputRecord(name=name, type=type_record(t)) for name, t in program.inputs),
            outputs=program.outputs,
            operators=len(program.ops),
            constants=digests,
        ),
        operators=tuple(_op_record(op) for op in program.ops),
        labels=LabelsRecord(texts=texts, numbers=tuple(place[op.label] for op in program.ops)),
        constants=tuple(program.constants[digest] for digest in digests),
    )


def leaves(program: Program) -> list[bytes]:
    """The leaves of the Program's Merkle tree: header, one record an operator, labels (constants by their digests)."""
    record = _file(program)
    return [encode(record.header), *(encode(op) for op in record.operators), encode(record.labels)]


def encode_program(program: Program) -> bytes:
    """The one encoding of a Program."""
    return encode(_file(program))


def decode_program(data: bytes) -> Program:
    """The Program with this encoding; IntegrityError or OperatorError for whatever `encode_program` never writes."""
    record = decode(ProgramRecord, data)
    header, labels = record.header, record.labels
    _require_few(len(record.operators))
    if not header.operators == len(record.operators) == len(labels.numbers):
        raise OperatorError(
            f"{len(record.operators)} operators, {len(labels.numbers)} labels, {header.operators} stated"
        )
    if any(number >= len(labels.texts) for number in labels.numbers):
        raise OperatorError(f"a label number beyond the {len(labels.texts)} labels")
    if tuple(map(merkle.bytes_root, record.constants)) != header.constants:
        raise OperatorError("the constants do not have the digests that the header states")
    program = Program(
        inputs=tuple((i.name, type_from(i.type)) for i in header.inputs),
        ops=tuple(_op(op, labels.texts[number]) for op, number in zip(record.operators, labels.numbers, strict=True)),
        outputs=header.outputs,
        constants=dict(zip(header.constants, record.constants, strict=True)),
    )
    if encode_program(program) != data:
        raise IntegrityError("a Program that is not in its canonical encoding: made by another tool?", digest="")
    return program
