"""The records of a run: golden digests, so that a change of format cannot go unnoticed; and what records lead to."""

import dataclasses
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.data import DatasetRecord, Shard
from storage import records
from storage.codec import NO_DIGEST, Link, State, decode, encode, links, record, record_digest, record_in
from storage.errors import IntegrityError
from storage.merkle import EMPTY_ROOT

A, B, C, D, E, F, G = (bytes([letter]) * 32 for letter in b"abcdefg")
ENTRY = records.TensorEntry(name="weight/a", dtype="f32", shape=(2, 3), root=A)
UNIT = records.UnitRecord(micro_batch=3, x=A, y=B, dy=C, dx=NO_DIGEST)

GOLDEN = {
    records.RunRecord(
        name="quickstart",
        recipe=A,
        programs=B,
        program_root=C,
        data=D,
        engine="exact",
        initial_state=E,
        version="0.1.0",
    ): "97a28323879eedf7eaad81f1f92cfd97b7cc0b5b858919b22fe81e57962bd971",
    records.StepRecord(
        step=1,
        data=A,
        loss=5 << 44,
        units=4,
        gradient_root=B,
        state_root=C,
        validation=(1, 2, 3, 4),
        events=("e",),
        receipts_root=A,
    ): "a631ee450646960f947e0ec877c15d4c7699cee9b7add386ff97f1c6ffd5ca0d",
    records.Receipt(
        run=A,
        step=1,
        worker="s0r1",
        address=b"w" * 20,
        bounds=(0, 2, 3),
        replicas=2,
        units=(UNIT,),
        gradient_root=B,
        exponent=-1,
        reduced_root=C,
        square=7,
        updated_root=D,
        signature=b"s" * 65,
    ): "c94cd7a728fe48af78b5f42bdc99aa40242975e463abee20636fbe6f2e774abf",
    UNIT: "c420232e1f0cc09c7858288ac23baca877e284ed32d361999459c5a284e6a9ad",
    records.SegmentRecord(
        run=A,
        index=1,
        first_step=10,
        steps=10,
        prestate=B,
        poststate=C,
        steps_root=D,
        receipts_root=E,
        previous=NO_DIGEST,
        steps_object=F,
        receipts_object=G,
    ): "c733f4a10f1645e14948f058332cce63ffa2a6c0de8fec8b37f119571709960e",
    records.RecordList(items=(b"", b"x")): "f650ed3edb76c58d80bf1c0a1efacd7688e636fcf2f78a14cd3d2be54f7bacc9",
    ENTRY: "b9a34a008cc1936805f67eadac18eb0a1a41f8e99ccc955c95cb32c68487a95d",
    records.Head(
        run=A, segment=B, partial=None, status="running"
    ): "0b05697bf274b9f693a248e9f2b9ddf68cac1ba10ab13796324ca0a6bff61f0f",
    records.Partial(
        index=2, first_step=20, state=A, steps=(b"s",), receipts=()
    ): "f68786e6837845743fa0ca6cbe4558cae9cbde342fdd98d1ee657468c62a308d",
}
RUN, STEP, RECEIPT, _, SEGMENT, LIST, _, HEAD, PARTIAL = GOLDEN
DATASET = DatasetRecord(
    kind="tokens",
    vocab=256,
    shape=(8,),
    peak=0,
    tokeniser=A,
    order="windows-1",
    training=(Shard(object=B, count=5), Shard(object=C, count=6)),
    validation=(Shard(object=D, count=7),),
)


@pytest.mark.parametrize(("value", "expected"), GOLDEN.items(), ids=lambda each: type(each).__name__)
def test_record_has_its_golden_digest(value: object, expected: str) -> None:
    assert decode(type(value), encode(value)) == value
    assert record_digest(value).hex() == expected


def test_kinds_and_versions_are_those_of_the_format_document() -> None:
    expected = [(1, 2), (2, 1), (3, 3), (12, 1), (4, 2), (5, 1), (6, 1), (9, 1), (10, 2)]
    assert [tuple(encode(value)[:2]) for value in GOLDEN] == expected


def test_partial_has_the_bytes_of_the_format_document() -> None:
    """A Link or State is written as a Digest is: 32 bytes."""
    assert encode(PARTIAL) == b"\x0a\x02\x02\0\0\0\x14\0\0\0\0\0\0\0" + A + b"\x01\0\0\0\x01\0\0\0s\0\0\0\0"


def test_segment_record_has_the_size_of_the_format_document() -> None:
    assert len(encode(SEGMENT)) == 274
    assert encode(SEGMENT)[178:210] == NO_DIGEST


def test_facts_are_what_does_not_depend_on_who_was_there() -> None:
    facts = records.facts_free(STEP)
    assert (facts.events, facts.receipts_root) == ((), EMPTY_ROOT)
    assert dataclasses.replace(facts, events=STEP.events, receipts_root=STEP.receipts_root) == STEP
    assert records.facts_free(dataclasses.replace(STEP, events=("left",), receipts_root=B)) == facts
    assert records.facts_free(dataclasses.replace(STEP, loss=0)) != facts


def test_malformed_records_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="step 1: expected 0 or 4 validation values, got 2"):
        dataclasses.replace(STEP, validation=(1, 2))
    with pytest.raises(ValueError, match="receipt of s0r1: expected a signature of 65 bytes, got 64"):
        dataclasses.replace(RECEIPT, signature=bytes(64))


# ------------------------------------------------------------------------------------------------------------- links


@record(kind=244)
class Inner:
    maybe: Link | None
    many: tuple[State, ...]


@record(kind=245)
class Outer:
    """Links wherever an annotation can hold them."""

    plain: records.Digest
    inner: Inner
    inners: tuple[Inner, ...]
    maybe: Inner | None
    rows: tuple[tuple[Link, ...], ...]
    state: State


LED_TO = {
    "RunRecord": (RUN, [("object", A), ("object", B), ("object", D), ("state", E)]),
    "StepRecord": (STEP, []),
    "Receipt": (RECEIPT, []),
    "first SegmentRecord": (SEGMENT, [("state", C), ("object", F), ("object", G)]),
    "later SegmentRecord": (
        dataclasses.replace(SEGMENT, previous=A),
        [("state", C), ("object", A), ("object", F), ("object", G)],
    ),
    "RecordList": (LIST, []),
    "RecordList of records with links": (records.RecordList(items=(encode(SEGMENT), encode(RUN))), []),
    "TensorEntry": (ENTRY, []),
    "Head of nothing": (records.Head(run=A, segment=None, partial=None, status=""), [("object", A)]),
    "Head of segments": (HEAD, [("object", A), ("object", B)]),
    "Head inside a segment": (
        records.Head(run=A, segment=B, partial=C, status=""),
        [("object", A), ("object", B), ("object", C)],
    ),
    "Head of a segment that is none": (
        records.Head(run=NO_DIGEST, segment=NO_DIGEST, partial=C, status=""),
        [("object", C)],
    ),
    "Partial": (PARTIAL, [("state", A)]),
    "Partial of nothing": (dataclasses.replace(PARTIAL, state=NO_DIGEST), []),
    "DatasetRecord": (DATASET, [("object", digest) for digest in (A, B, C, D)]),
    "DatasetRecord of images": (
        dataclasses.replace(DATASET, tokeniser=None, validation=()),
        [("object", B), ("object", C)],
    ),
    "links inside of links": (
        Outer(
            plain=A,
            inner=Inner(maybe=B, many=()),
            inners=(Inner(maybe=None, many=(C, NO_DIGEST, D)), Inner(maybe=NO_DIGEST, many=())),
            maybe=Inner(maybe=E, many=(F,)),
            rows=((), (G, A)),
            state=B,
        ),
        [
            *[("object", B), ("state", C), ("state", D), ("object", E), ("state", F)],
            *[("object", G), ("object", A), ("state", B)],
        ],
    ),
    "links left out": (
        Outer(plain=A, inner=Inner(maybe=None, many=()), inners=(), maybe=None, rows=(), state=NO_DIGEST),
        [],
    ),
}


@pytest.mark.parametrize(("value", "expected"), LED_TO.values(), ids=LED_TO)
def test_links_are_what_the_record_names(value: Any, expected: list[tuple[str, bytes]]) -> None:
    assert list(links(value)) == expected
    assert list(links(decode(type(value), encode(value)))) == expected


# ----------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("value", [*GOLDEN, DATASET, DATASET.training[0]], ids=lambda value: type(value).__name__)
def test_record_in_finds_the_record(value: object) -> None:
    assert record_in(encode(value)) == value


OPAQUE = {
    "nothing": b"",
    "a byte": b"\x01",
    "JSON": b'{"model": {}}',
    "JSON in lines": b"{\n}",
    "TOML": b"[data]\nseed = 1\n",
    "a one-letter line": b"a\nb\n",
    "a one-letter column": b"a\tb\n",
    "Arrow": b"\xff\xff\xff\xff\x10\x01\0\0",
    "an Arrow file": b"ARROW1\0\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "a pack": b"TWPACK1\n",
    "UTF-16": "data".encode("utf-16"),
    "UTF-16 without a mark": "data".encode("utf-16-le"),
    "zeros": bytes(64),
    "kind 0": b"\x00\x01",
    "version 0": b"\x01\x00",
    "kind of nobody's range": b"\xc0\x01",
    "one kind of 256": b"\xff\x01",
    "a record cut short": encode(RUN)[:-1],
    "a record and a byte": encode(RUN) + b"\0",
    "a record's header": encode(HEAD)[:2],
    "a record that breaks its rules": encode(dataclasses.replace(STEP, validation=()))[:-49] + bytes(49),
}


@pytest.mark.parametrize("data", OPAQUE.values(), ids=OPAQUE)
def test_record_in_takes_other_bytes_as_they_are(data: bytes) -> None:
    assert record_in(data) is None


@pytest.mark.parametrize(
    ("kind", "version"),
    [(1, 1), (1, 3), (4, 1), (4, 3), (10, 1), (7, 1), (8, 1), (6, 2), (31, 1), (64, 2), (65, 8), (127, 1), (191, 1)],
)
def test_record_in_refuses_kinds_and_versions_that_it_does_not_know(kind: int, version: int) -> None:
    """They may have links: what they lead to must not be taken for garbage."""
    data = bytes([kind, version]) + encode(RUN)[2:]
    message = f"object {sha256(data).hexdigest()}: expected a record .* got kind {kind} version {version}; use a newer"
    with pytest.raises(IntegrityError, match=message) as caught:
        record_in(data)
    assert caught.value.digest == sha256(data).hexdigest()


@given(st.binary(max_size=80), st.sampled_from([b"", *[encode(value)[:2] for value in GOLDEN]]))
def test_record_in_of_any_bytes_is_a_record_nothing_or_refused(data: bytes, start: bytes) -> None:
    whole = start + data
    try:
        found = record_in(whole)
    except IntegrityError:
        return
    assert found is None or encode(found) == whole
