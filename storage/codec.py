"""One canonical binary encoding for every record.

A record is a frozen, keyword-only dataclass made by `@record(kind=..., version=...)`. Its field annotations are the
wire format; `docs/formats.md` has the byte tables:

    record                      u8 kind, u8 version, then the fields in order (nested records alike)
    bool                        u8, 0 or 1
    U8 U32 U64 I64              little-endian integer
    Digest, Address             32 raw bytes, 20 raw bytes; Annotated[bytes, n]: n
    Link, State                 a Digest that names an object; one that is the state root of a checkpoint
    str, bytes                  u32 length, then the bytes (UTF-8)
    tuple[X, ...]               u32 count, then the items
    X | None                    u8 0, or u8 1 and X

Each value has exactly one encoding and each accepted byte string is the encoding of exactly one value, so equal records
have equal digests. Kinds: 1-31 storage, 32-127 runtime, 128-191 verification and ledger, 240-255 tests.
"""

import dataclasses
import struct
import types
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from storage.errors import IntegrityError

T = TypeVar("T")

U8 = Annotated[int, "<B"]
U32 = Annotated[int, "<I"]
U64 = Annotated[int, "<Q"]
I64 = Annotated[int, "<q"]
Digest = Annotated[bytes, 32]
Link = Annotated[bytes, 32, "object"]
State = Annotated[bytes, 32, "state"]
Address = Annotated[bytes, 20]

NO_DIGEST = bytes(32)
"""What a Link holds that leads nowhere."""

_KINDS: dict[int, str] = {}
_RECORDS: dict[bytes, type] = {}
_CODERS: dict[type, "_Coder"] = {}
_NO_VERSION = 9
"""Records have lower versions. No text has such a second byte, nor has Arrow."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(*, kind: int, version: int = 1) -> Callable[[type[T]], type[T]]:
    """Class decorator: a frozen, keyword-only dataclass with a wire format; ValueError where `kind` is taken."""

    def decorate(cls: type[T]) -> type[T]:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if _KINDS.setdefault(kind, name) != name:
            raise ValueError(f"record {name}: expected an unused kind, got {kind} of {_KINDS[kind]}; choose another")
        made = cls if "__dataclass_fields__" in vars(cls) else dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        header = bytes((kind, version))
        made.__record_header__ = header  # type: ignore[attr-defined]
        _RECORDS[header] = made
        return made

    return decorate


def encode(value: object) -> bytes:
    """The canonical bytes of a record; ValueError naming the field where a value does not fit its annotation."""
    out = bytearray()
    _record_coder(type(value)).write(value, out)
    return bytes(out)


def decode(cls: type[T], data: bytes) -> T:
    """The record of type `cls` whose canonical bytes are `data`.

    Raises IntegrityError, naming SHA-256(data), for another kind or version, truncated or trailing bytes, a count that
    the remaining bytes cannot hold, and any encoding that `encode` would not have produced.
    """
    source = _Source(data)
    try:
        value = _record_coder(cls).read(source)
        if source.at != len(data):
            raise ValueError(f"expected {source.at} bytes, got {len(data)}")
    except ValueError as error:
        name = sha256(data).hexdigest()
        raise IntegrityError(f"decoding {cls.__name__} {name}: {error}; fetch the object again", digest=name) from error
    return cast(T, value)


def record_in(data: bytes) -> object | None:
    """The record that an object's bytes are, None where they are something else.

    IntegrityError for what begins like a record of a kind or version that nobody here knows: it may have links.
    """
    cls = _RECORDS.get(data[:2])
    if cls is not None:
        try:
            return cast(object, decode(cls, data))
        except IntegrityError:
            return None
    if len(data) >= 2 and 0 < data[0] < 192 and 0 < data[1] < _NO_VERSION:
        name = sha256(data).hexdigest()
        raise IntegrityError(
            f"object {name}: expected a record that this Trueweight knows, got kind {data[0]} version {data[1]}; use a "
            f"newer Trueweight",
            digest=name,
        )
    return None


def links(value: object) -> Iterator[tuple[str, bytes]]:
    """("object" or "state", digest) for everything that a record names by a Link or State, records inside included."""
    hints = get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(cast(Any, value)):
        yield from _links(hints[field.name], getattr(value, field.name))


def _links(hint: Any, value: Any) -> Iterator[tuple[str, bytes]]:
    origin, args = get_origin(hint), get_args(hint)
    if value is None:
        return
    if origin is Annotated and len(args) == 3:
        if value != NO_DIGEST:
            yield args[2], value
    elif origin is tuple:
        for item in value:
            yield from _links(args[0], item)
    elif origin in (Union, types.UnionType):
        yield from _links(args[0], value)
    elif isinstance(hint, type) and "__record_header__" in vars(hint):
        yield from links(value)


def record_digest(value: object) -> bytes:
    """SHA-256 of the canonical bytes: the digest under which a store holds the record."""
    return sha256(encode(value)).digest()


class _Source:
    """Bytes being decoded, and how far."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) != size:
            raise ValueError(f"truncated at byte {self.at}: expected {size} more, got {len(part)}")
        self.at += size
        return part


class _Coder(NamedTuple):
    """How one annotation is written and read; `least` is the size of its smallest encoding."""

    least: int
    write: Callable[[Any, bytearray], None]
    read: Callable[[_Source], Any]


def _record_coder(cls: type) -> _Coder:
    """The coder of a record class, built when it is first needed: its annotations may name later classes."""
    if cls not in _CODERS:
        _CODERS[cls] = _build_record_coder(cls)
    return _CODERS[cls]


def _build_record_coder(cls: type) -> _Coder:
    header = vars(cls).get("__record_header__")
    if header is None:
        raise TypeError(f"{cls.__name__} is not a record: decorate it with @record(kind=...)")
    hints = get_type_hints(cls, include_extras=True)
    coders = [(field.name, _coder(hints[field.name])) for field in dataclasses.fields(cls)]

    def write(value: Any, out: bytearray) -> None:
        if type(value) is not cls:
            raise ValueError(f"expected {cls.__name__}, got {type(value).__name__}")
        out += header
        for name, coder in coders:
            try:
                coder.write(getattr(value, name), out)
            except (ValueError, TypeError, struct.error) as error:
                raise ValueError(f"encoding {cls.__name__}.{name}: {error}") from error

    def read(source: _Source) -> Any:
        found = source.take(2)
        if found != header:
            raise ValueError(f"expected kind {header[0]} version {header[1]}, got kind {found[0]} version {found[1]}")
        return cls(**{name: coder.read(source) for name, coder in coders})

    return _Coder(2 + sum(coder.least for _, coder in coders), write, read)


def _coder(hint: Any) -> _Coder:
    """The coder of one field annotation; TypeError where the annotation has no wire format."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fixed(args[1]) if args[0] is bytes else _integer(struct.Struct(args[1]))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if get_origin(args[0]) is Annotated and get_args(args[0])[0] is not bytes:
            return _integers(struct.Struct(get_args(args[0])[1]))
        return _sequence(_coder(args[0]))
    if origin in (Union, types.UnionType) and len(args) == 2 and args[1] is type(None):
        return _optional(_coder(args[0]))
    if hint is bool:
        return _BOOL
    if hint is bytes:
        return _sized(bytes, bytes, bytes)
    if hint is str:
        return _sized(str, str.encode, bytes.decode)
    if isinstance(hint, type) and "__record_header__" in vars(hint):
        return _record_coder(hint)
    raise TypeError(f"no wire format for the annotation {hint}")


def _integer(form: struct.Struct) -> _Coder:
    def write(value: int, out: bytearray) -> None:
        out += form.pack(value)

    def read(source: _Source) -> int:
        (value,) = form.unpack(source.take(form.size))
        return int(value)

    return _Coder(form.size, write, read)


def _fixed(size: int) -> _Coder:
    def write(value: bytes, out: bytearray) -> None:
        if type(value) is not bytes or len(value) != size:
            raise ValueError(f"expected {size} bytes, got {len(value)} in a {type(value).__name__}")
        out += value

    return _Coder(size, write, lambda source: source.take(size))


def _sized(kind: type, to_bytes: Callable[[Any], bytes], from_bytes: Callable[[bytes], Any]) -> _Coder:
    def write(value: Any, out: bytearray) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
        data = to_bytes(value)
        _LENGTH.write(len(data), out)
        out += data

    return _Coder(4, write, lambda source: from_bytes(source.take(_LENGTH.read(source))))


def _sequence(item: _Coder) -> _Coder:
    def write(values: tuple[Any, ...], out: bytearray) -> None:
        if not isinstance(values, tuple):
            raise ValueError(f"expected a tuple, got {type(values).__name__}")
        _LENGTH.write(len(values), out)
        for value in values:
            item.write(value, out)

    def read(source: _Source) -> tuple[Any, ...]:
        return tuple([item.read(source) for _ in range(_count(source, item.least))])

    return _Coder(4, write, read)


def _integers(form: struct.Struct) -> _Coder:
    """As `_sequence` of `_integer`, all of them at once: plans of large clusters have a hundred thousand."""
    order, kind = form.format[0], form.format[1]

    def write(values: tuple[int, ...], out: bytearray) -> None:
        if not isinstance(values, tuple):
            raise ValueError(f"expected a tuple, got {type(values).__name__}")
        _LENGTH.write(len(values), out)
        out += struct.pack(f"{order}{len(values)}{kind}", *values)

    def read(source: _Source) -> tuple[int, ...]:
        count = _count(source, form.size)
        return struct.unpack(f"{order}{count}{kind}", source.take(count * form.size))

    return _Coder(4, write, read)


def _count(source: _Source, least: int) -> int:
    """How many items of at least that size follow; ValueError where there is no room for them."""
    count: int = _LENGTH.read(source)
    room = (len(source.data) - source.at) // least
    if count > room:  # before anything is allocated for it
        raise ValueError(f"truncated at byte {source.at}: expected room for {count} items, got room for {room}")
    return count


def _read_flag(source: _Source) -> bool:
    flag = source.take(1)[0]
    if flag > 1:
        raise ValueError(f"byte {source.at - 1}: expected 0 or 1, got {flag}")
    return bool(flag)


def _write_flag(value: bool, out: bytearray) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"expected bool, got {type(value).__name__}")
    out.append(value)


def _optional(item: _Coder) -> _Coder:
    def write(value: Any, out: bytearray) -> None:
        _write_flag(value is not None, out)
        if value is not None:
            item.write(value, out)

    return _Coder(1, write, lambda source: item.read(source) if _read_flag(source) else None)


_BOOL = _Coder(1, _write_flag, _read_flag)
_LENGTH = _integer(struct.Struct("<I"))
