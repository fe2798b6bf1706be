"""The canonical encoding: known bytes, round trips, and refusal of everything that is not canonical."""

import dataclasses
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import records
from storage.codec import I64, U8, U32, U64, Address, Digest, decode, encode, record, record_digest
from storage.errors import IntegrityError


@record(kind=240)
class Inner:
    flag: bool
    numbers: tuple[I64, ...]


@record(kind=241, version=3)
class Outer:
    tiny: U8
    small: U32
    big: U64
    text: str
    data: bytes
    digest: Digest
    address: Address
    inner: Inner
    many: tuple[Inner, ...]
    maybe: Digest | None
    rows: tuple[tuple[str, ...], ...]


@record(kind=242)
class OtherKind:
    flag: bool
    numbers: tuple[I64, ...]


digests = st.binary(min_size=32, max_size=32)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
inners = st.builds(Inner, flag=st.booleans(), numbers=st.lists(i64, max_size=3).map(tuple))
outers = st.builds(
    Outer,
    tiny=st.integers(0, 255),
    small=u32,
    big=u64,
    text=st.text(max_size=9),
    data=st.binary(max_size=9),
    digest=digests,
    address=st.binary(min_size=20, max_size=20),
    inner=inners,
    many=st.lists(inners, max_size=3).map(tuple),
    maybe=st.none() | digests,
    rows=st.lists(st.lists(st.text(max_size=3), max_size=2).map(tuple), max_size=3).map(tuple),
)
STEP = records.StepRecord(
    step=7,
    data=b"d" * 32,
    loss=-(2**44),
    units=4,
    gradient_root=b"g" * 32,
    state_root=b"s" * 32,
    validation=(1, 2, 3, 4),
    events=("joined s0r1",),
    receipts_root=b"r" * 32,
)


def test_bytes_are_those_of_the_format_document() -> None:
    inner = Inner(flag=True, numbers=(1, -1))
    assert encode(inner) == bytes.fromhex("f001" + "01" + "02000000" + "0100000000000000" + "ff" * 8)
    outer = Outer(
        tiny=1,
        small=2,
        big=3,
        text="ä",
        data=b"\0",
        digest=b"d" * 32,
        address=b"a" * 20,
        inner=Inner(flag=False, numbers=()),
        many=(),
        maybe=None,
        rows=(("x",),),
    )
    assert encode(outer) == b"".join(
        (
            b"\xf1\x03\x01\x02\0\0\0\x03\0\0\0\0\0\0\0",
            b"\x02\0\0\0\xc3\xa4\x01\0\0\0\0",
            b"d" * 32,
            b"a" * 20,
            b"\xf0\x01\0\0\0\0\0",
            b"\0\0\0\0",
            b"\0",
            b"\x01\0\0\0\x01\0\0\0\x01\0\0\0x",
        )
    )
    assert record_digest(outer) == sha256(encode(outer)).digest()


@given(outers)
def test_round_trip(outer: Outer) -> None:
    assert decode(Outer, encode(outer)) == outer


@given(outers, st.data())
def test_damaged_bytes_are_refused_or_are_another_record(outer: Outer, data: st.DataObject) -> None:
    good = encode(outer)
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :]
    try:
        found = decode(Outer, damaged)
    except IntegrityError:
        return
    assert found != outer
    assert encode(found) == damaged


@given(st.binary(max_size=200))
def test_accepted_bytes_are_canonical(data: bytes) -> None:
    for start in (b"", b"\xf0\x01"):
        try:
            found = decode(Inner, start + data)
        except IntegrityError:
            continue
        assert encode(found) == start + data


@given(outers)
def test_every_truncation_is_refused(outer: Outer) -> None:
    good = encode(outer)
    for size in range(len(good)):
        with pytest.raises(IntegrityError):
            decode(Outer, good[:size])


INNER = Inner(flag=True, numbers=(5,))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("trailing", encode(INNER) + b"\0", "expected 15 bytes, got 16"),
        ("kind", encode(OtherKind(flag=True, numbers=(5,))), "expected kind 240 version 1, got kind 242 version 1"),
        ("version", b"\xf0\x02" + encode(INNER)[2:], "got kind 240 version 2"),
        ("empty", b"", "truncated at byte 0"),
        ("flag", b"\xf0\x01\x02" + encode(INNER)[3:], "expected 0 or 1, got 2"),
        ("count", b"\xf0\x01\x01\xff\xff\xff\xff", "expected room for 4294967295 items, got room for 0"),
    ],
)
def test_bad_bytes_are_refused(name: str, data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        decode(Inner, data)
    assert caught.value.digest == sha256(data).hexdigest()
    assert caught.value.digest in str(caught.value)


def test_bad_text_is_refused() -> None:
    good = encode(records.Head(run=bytes(32), segment=None, partial=None, status="é"))
    with pytest.raises(IntegrityError, match="utf-8"):
        decode(records.Head, good[:-1] + b"\xff")


def test_decoded_records_obey_their_own_rules() -> None:
    good = encode(dataclasses.replace(STEP, validation=()))
    bad = good.replace(b"s" * 32 + bytes(4), b"s" * 32 + b"\x01" + bytes(11))
    with pytest.raises(IntegrityError, match="expected 0 or 4 validation values, got 1"):
        decode(records.StepRecord, bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", 2**64),
        ("step", "7"),
        ("step", 7.0),
        ("loss", 2**63),
        ("units", 2**32),
        ("data", b"short"),
        ("data", bytearray(32)),
        ("events", ["a list"]),
        ("events", (b"bytes",)),
        ("events", ("\ud800",)),
        ("validation", (None,) * 4),
    ],
)
def test_values_that_do_not_fit_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"encoding StepRecord.{field}: "):
        encode(dataclasses.replace(STEP, **{field: value}))


def test_a_kind_belongs_to_one_record() -> None:
    with pytest.raises(ValueError, match="expected an unused kind, got 240 of"):

        @record(kind=240)
        class Second:
            pass


def test_only_records_are_encoded() -> None:
    with pytest.raises(TypeError, match="int is not a record"):
        encode(5)

    @record(kind=243)
    class Unknown:
        ratio: float

    with pytest.raises(TypeError, match="no wire format for the annotation <class 'float'>"):
        encode(Unknown(ratio=0.5))


def test_records_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STEP.step = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        Inner(True, ())  # type: ignore[misc]
