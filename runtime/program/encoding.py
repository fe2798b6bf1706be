"""The canonical bytes of a Program and the leaves of its Merkle tree, so that one operator can be shown on its own."""

import struct
from collections.abc import Mapping
from typing import Any

from runtime.program.operators import BY_CODE, OPERATORS, OperatorError
from runtime.program.program import Op, Program
from runtime.program.types import DTYPES, Type
from storage import merkle
from storage.codec import U8, U32, U64, Digest, decode, encode, record
from storage.errors import IntegrityError


@record(kind=70)
class TypeRecord:
    """An element type by its number in DTYPES, and a shape."""

    dtype: U8
    shape: tuple[U64, ...]


@record(kind=71)
class InputRecord:
    """A program input."""

    name: str
    type: TypeRecord


@record(kind=72)
class OpRecord:
    """An operator: its code in the table, value numbers of its operands, attributes in the table's order, its type."""

    code: U8
    inputs: tuple[U32, ...]
    attributes: bytes
    type: TypeRecord


@record(kind=73)
class HeaderRecord:
    """What is not an operator: inputs, output value numbers, the count of operators, digests of constants."""

    inputs: tuple[InputRecord, ...]
    outputs: tuple[U32, ...]
    operators: U32
    constants: tuple[Digest, ...]


@record(kind=74)
class LabelsRecord:
    """Where operators come from in the source: distinct labels, and one number an operator."""

    texts: tuple[str, ...]
    numbers: tuple[U32, ...]


@record(kind=75)
class ProgramRecord:
    """A whole Program; constants are raw little-endian bytes in the order of the header's digests."""

    header: HeaderRecord
    operators: tuple[OpRecord, ...]
    labels: LabelsRecord
    constants: tuple[bytes, ...]


def _type_record(t: Type) -> TypeRecord:
    return TypeRecord(dtype=DTYPES.index(t.dtype), shape=t.shape)


def _type(record: TypeRecord) -> Type:
    if record.dtype >= len(DTYPES):
        raise OperatorError(f"element type {record.dtype}: expected below {len(DTYPES)}")
    try:
        return Type(DTYPES[record.dtype], record.shape)
    except ValueError as error:
        raise OperatorError(str(error)) from None


def _pack(name: str, attributes: Mapping[str, Any]) -> bytes:
    packed = b""
    for key, kind in OPERATORS[name].attributes.items():
        value = attributes[key]
        if kind == "int":
            packed += struct.pack("<q", value)
        elif kind == "ints":
            packed += struct.pack(f"<I{len(value)}q", len(value), *value)
        elif kind == "dtype":
            packed += struct.pack("<B", DTYPES.index(value))
        else:
            packed += value
    return packed


def _unpack(name: str, packed: bytes) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    position = 0

    def read(form: str) -> tuple[Any, ...]:
        nonlocal position
        size = struct.calcsize(form)
        if position + size > len(packed):
            raise OperatorError(f"operator {name!r}: {len(packed)} bytes of attributes are too few")
        position += size
        return struct.unpack(form, packed[position - size : position])

    for key, kind in OPERATORS[name].attributes.items():
        if kind == "int":
            (attributes[key],) = read("<q")
        elif kind == "ints":
            (count,) = read("<I")
            attributes[key] = read(f"<{min(count, len(packed))}q")
        elif kind == "dtype":
            (number,) = read("<B")
            if number >= len(DTYPES):
                raise OperatorError(f"operator {name!r}: element type {number}, expected below {len(DTYPES)}")
            attributes[key] = DTYPES[number]
        else:
            (attributes[key],) = read("<32s")
    if position != len(packed):
        raise OperatorError(f"operator {name!r}: {len(packed) - position} bytes after its attributes")
    return attributes


def _op_record(op: Op) -> OpRecord:
    code = OPERATORS[op.name].code
    return OpRecord(code=code, inputs=op.inputs, attributes=_pack(op.name, op.attributes), type=_type_record(op.type))


def _op(record: OpRecord, label: str) -> Op:
    row = BY_CODE.get(record.code)
    if row is None:
        raise OperatorError(f"operator code {record.code} is not in the table of this version")
    attributes = _unpack(row.name, record.attributes)
    return Op(name=row.name, inputs=record.inputs, attributes=attributes, type=_type(record.type), label=label)


def _record(program: Program) -> ProgramRecord:
    texts = tuple(sorted({op.label for op in program.ops}))
    place = {text: number for number, text in enumerate(texts)}
    digests = tuple(sorted(program.constants))
    return ProgramRecord(
        header=HeaderRecord(
            inputs=tuple(InputRecord(name=name, type=_type_record(t)) for name, t in program.inputs),
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
    record = _record(program)
    return [encode(record.header), *(encode(op) for op in record.operators), encode(record.labels)]


def encode_program(program: Program) -> bytes:
    """The one encoding of a Program."""
    return encode(_record(program))


def decode_program(data: bytes) -> Program:
    """The Program with this encoding; IntegrityError or OperatorError for whatever `encode_program` never writes."""
    record = decode(ProgramRecord, data)
    header, labels = record.header, record.labels
    if not header.operators == len(record.operators) == len(labels.numbers):
        raise OperatorError(
            f"{len(record.operators)} operators, {len(labels.numbers)} labels, {header.operators} stated"
        )
    if any(number >= len(labels.texts) for number in labels.numbers):
        raise OperatorError(f"a label number beyond the {len(labels.texts)} labels")
    if tuple(map(merkle.bytes_root, record.constants)) != header.constants:
        raise OperatorError("the constants do not have the digests that the header states")
    program = Program(
        inputs=tuple((i.name, _type(i.type)) for i in header.inputs),
        ops=tuple(_op(op, labels.texts[number]) for op, number in zip(record.operators, labels.numbers, strict=True)),
        outputs=header.outputs,
        constants=dict(zip(header.constants, record.constants, strict=True)),
    )
    if encode_program(program) != data:
        raise IntegrityError("a Program that is not in its canonical encoding: made by another tool?", digest="")
    return program
