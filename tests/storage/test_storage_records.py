"""The records of a run: golden digests, so that a change of format cannot go unnoticed."""

import dataclasses

import pytest

from storage import records
from storage.codec import decode, encode, record_digest
from storage.merkle import EMPTY_ROOT

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32
ENTRY = records.TensorEntry(name="weight/a", dtype="f32", shape=(2, 3), root=A)

GOLDEN = {
    records.RunRecord(
        name="quickstart",
        recipe=A,
        programs=B,
        program_root=C,
        data=A,
        engine="exact",
        initial_state=B,
        initial_checkpoint=C,
        version="0.1.0",
    ): "419de47d9d279ceb2d56c3b0f214af098ea041ad1130d627bb519ae5e34dc990",
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
        stage=0,
        units=(1, 3),
        gradient_root=B,
        signature=b"s" * 65,
    ): "c128512b724feb1b336694b9163fbb93249593f4ab640d0c170e20c3c3197177",
    records.SegmentRecord(
        run=A,
        index=1,
        first_step=10,
        steps=10,
        prestate=A,
        poststate=B,
        steps_root=C,
        receipts_root=A,
        previous=records.NO_DIGEST,
        checkpoint=B,
        steps_object=C,
        receipts_object=A,
    ): "8a8c77bb831921dcba26605a1054b70f6b603bced7a826d45fa0f9f8dc8940cd",
    records.RecordList(items=(b"", b"x")): "f650ed3edb76c58d80bf1c0a1efacd7688e636fcf2f78a14cd3d2be54f7bacc9",
    ENTRY: "b9a34a008cc1936805f67eadac18eb0a1a41f8e99ccc955c95cb32c68487a95d",
    records.TensorFrames(entry=ENTRY, frames=(B,)): "d5ee5d307f09241d6a939a88c29b6704eb9103fecd9eb89bcb8374d322047565",
    records.Checkpoint(
        step=3, state_root=C, tensors=(records.TensorFrames(entry=ENTRY, frames=(B,)),)
    ): "2d1595118df7947d6842421c7a8256ad81c00d8f38d5f1dc8fe5511dec2cb542",
    records.Head(
        run=A, segment=B, partial=None, status="running"
    ): "0b05697bf274b9f693a248e9f2b9ddf68cac1ba10ab13796324ca0a6bff61f0f",
    records.Partial(
        index=2, first_step=20, checkpoint=A, steps=(b"s",), receipts=()
    ): "2440d9fa2b449c639dcedb11469dc2093733a1274f373570b79a88dd6d5cc5b4",
}


@pytest.mark.parametrize(("value", "expected"), GOLDEN.items(), ids=lambda each: type(each).__name__)
def test_record_has_its_golden_digest(value: object, expected: str) -> None:
    assert decode(type(value), encode(value)) == value
    assert record_digest(value).hex() == expected


def test_kinds_are_1_to_10_version_1() -> None:
    assert [tuple(encode(value)[:2]) for value in GOLDEN] == [(kind, 1) for kind in range(1, 11)]


def test_segment_record_has_the_size_of_the_format_document() -> None:
    segment = next(value for value in GOLDEN if isinstance(value, records.SegmentRecord))
    assert len(encode(segment)) == 306


def test_facts_are_what_does_not_depend_on_who_was_there() -> None:
    step = next(value for value in GOLDEN if isinstance(value, records.StepRecord))
    facts = records.facts_free(step)
    assert (facts.events, facts.receipts_root) == ((), EMPTY_ROOT)
    assert dataclasses.replace(facts, events=step.events, receipts_root=step.receipts_root) == step
    assert records.facts_free(dataclasses.replace(step, events=("left",), receipts_root=B)) == facts
    assert records.facts_free(dataclasses.replace(step, loss=0)) != facts


def test_malformed_records_cannot_be_built() -> None:
    step = next(value for value in GOLDEN if isinstance(value, records.StepRecord))
    with pytest.raises(ValueError, match="step 1: expected 0 or 4 validation values, got 2"):
        dataclasses.replace(step, validation=(1, 2))
    receipt = next(value for value in GOLDEN if isinstance(value, records.Receipt))
    with pytest.raises(ValueError, match="receipt of s0r1: expected a signature of 65 bytes, got 64"):
        dataclasses.replace(receipt, signature=bytes(64))
