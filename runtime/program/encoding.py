"""The records that a Program's bytes consist of, and the packing of attributes by the operator table."""

import struct
from collections.abc import Mapping
from typing import Any

from runtime.program.operators import OPERATORS, OperatorError
from runtime.program.types import DTYPES, Type
from storage.codec import U8, U32, U64, Digest, record


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


def type_record(t: Type) -> TypeRecord:
    """A type as a record."""
    return TypeRecord(dtype=DTYPES.index(t.dtype), shape=t.shape)


def type_from(record: TypeRecord) -> Type:
    """The type of a record; OperatorError where there is no such type."""
    if record.dtype >= len(DTYPES):
        raise OperatorError(f"element type {record.dtype}: expected below {len(DTYPES)}")
    try:
        return Type(DTYPES[record.dtype], record.shape)
    except ValueError as error:
        raise OperatorError(str(error)) from None


def pack(name: str, attributes: Mapping[str, Any]) -> bytes:
    """An operator's attributes in the table's order: i64, u32 count and i64s, u8 element type, 32 bytes."""
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


def unpack(name: str, packed: bytes) -> dict[str, Any]:
    """The attributes again; OperatorError where the bytes are not exactly those of such an operator."""
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
