"""The bytes of a Program: round trips, a root that never moves, and nothing but refusals for anything else."""

from __future__ import annotations

import dataclasses
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.program import sums
from runtime.program.builder import Builder
from runtime.program.encoding import HeaderRecord, InputRecord, LabelsRecord, OpRecord, ProgramRecord, TypeRecord
from runtime.program.operators import OPERATORS, OperatorError
from runtime.program.program import Op, Program, decode_program, encode_program, leaves
from runtime.program.types import Type
from storage import merkle
from storage.codec import decode, encode
from storage.errors import IntegrityError

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=300, database=None)

GOLDEN_ROOT = "4581ac9f839282dc76957934efffee66d3a25e0ee4a0157d12d559c66f923355"
GOLDEN_SHA256 = "d5645aff42c40c3287fecad002183ce737903e83f7dc1891b83dbb8b26babb08"
"""Of `golden()`: they pin the encoding and the composition of sums; a decision record comes with a change."""


def golden() -> Program:
    """A small Program with every kind of attribute, a constant and labels."""
    b = Builder()
    x, rows = b.input("x", "f32", 2, 3), b.input("rows", "i64", 2)
    with b.label("layer.0, mm"):
        table = b.constant(np.array([[0.5, -0.0], [1.5, 2.0**-149], [-2.0, 3.0e38]], np.float32))
        y = sums.matmul(x, table, 2)
    with b.label("head, gather"):
        taken = b.take(y.slice(1, 0, 1), rows)
    wide = b.concat([taken.reshape(2), b.iota(2).float()], 0)
    return b.finish([wide, sums.row_sum(y, 1), b.literal("bool", True)])


def tiny() -> Program:
    b = Builder()
    x = b.input("x", "f32", 2)
    with b.label("here"):
        y = x * b.constant(np.array([0.5, 2.0], np.float32))
    return b.finish([y.rint("i32", 7).sum(0)])


def every_operator() -> Program:
    """Each row of the table at least once."""
    b = Builder()
    x, n = b.input("x", "f32", 4, 2), b.input("n", "i64", 4)
    bits = x.bits()
    y = (x + 1.0) - (x * x) / (x.sqrt() + 2.0)
    y = b.select((x < y) | (x <= 0.5) ^ x.equals(1.0), y, x).scale(bits & 3)
    total = b.scatter_add(n & 3, y.rint("i64"), 4) + (n << 3 >> 1).reshape(4, 1)
    product = b.dot(bits.digit(), bits.digit().swap())
    rows = b.take(b.constant(np.arange(4, dtype=np.int32)), b.iota(4) + b.literal("i64", 0))
    joined = b.concat([total.float(), bits.from_bits().slice(1, 0, 1), rows.cast("i64").float().reshape(4, 1)], 1)
    return b.finish([joined, product.max(1), product.sum(0), b.full("i32", (2, 2), 1)])


PROGRAMS = {"golden": golden, "tiny": tiny, "every operator": every_operator}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    return PROGRAMS[request.param]()


def test_the_sample_has_every_operator() -> None:
    assert set(every_operator().histogram) == set(OPERATORS)


def test_round_trip(program: Program, run_program: Any) -> None:
    data = encode_program(program)
    again = decode_program(data)
    assert again == program
    assert again.root == program.root
    assert encode_program(again) == data
    assert again.types == program.types
    source = np.random.default_rng(1)
    inputs = [
        source.random(t.shape, np.float32) if t.dtype == "f32" else source.integers(0, 2, t.shape)
        for _, t in program.inputs
    ]
    for a, b in zip(run_program(program, *inputs), run_program(again, *inputs), strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_golden_root_never_moves() -> None:
    assert golden().root.hex() == GOLDEN_ROOT
    assert sha256(encode_program(golden())).hexdigest() == GOLDEN_SHA256


def test_the_root_is_over_header_operators_and_labels(program: Program) -> None:
    items = leaves(program)
    assert len(items) == len(program.ops) + 2
    assert program.root == merkle.list_root(items)
    assert decode(HeaderRecord, items[0]).operators == len(program.ops)
    assert len(decode(LabelsRecord, items[-1]).numbers) == len(program.ops)


def test_one_operator_can_be_shown_on_its_own(program: Program) -> None:
    items = leaves(program)
    hashes = [merkle.leaf_hash(item) for item in items]
    for number, op in enumerate(program.ops):
        proof = merkle.inclusion_proof(hashes, number + 1)
        shown = decode(OpRecord, items[number + 1])
        assert shown.code == OPERATORS[op.name].code
        assert shown.inputs == op.inputs
        assert merkle.verify_inclusion(hashes[number + 1], number + 1, len(items), proof, program.root)
        other = merkle.leaf_hash(encode(dataclasses.replace(shown, code=shown.code ^ 1)))
        assert not merkle.verify_inclusion(other, number + 1, len(items), proof, program.root)
        assert not merkle.verify_inclusion(hashes[number + 1], number, len(items), proof, program.root)


def test_labels_are_part_of_the_root_but_not_of_a_value() -> None:
    def labelled(first: str, second: str) -> Program:
        b = Builder()
        x = b.input("x", "f32", 2)
        with b.label(first):
            y = x + 1.0
        with b.label(second):
            return b.finish([y * (x + 1.0)])

    assert len(labelled("a", "b").ops) == len(labelled("a", "a").ops)
    assert labelled("a", "b").root != labelled("a", "c").root
    assert labelled("a", "b").root == labelled("a", "b").root


REFUSALS = (IntegrityError, OperatorError)


def outcome(data: bytes) -> Program | None:
    """The Program, or None where the bytes are refused; any other error fails the test."""
    try:
        return decode_program(data)
    except REFUSALS:
        return None


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flip_is_refused_or_another_program(mask: int) -> None:
    program = tiny()
    data = encode_program(program)
    accepted = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= mask
        found = outcome(bytes(changed))
        if found is not None:
            accepted += 1
            assert found.root != program.root, f"byte {place} ^ {mask:#x}"
            assert encode_program(found) == bytes(changed)
    assert accepted < len(data)


def test_every_truncation_and_every_tail_is_refused() -> None:
    data = encode_program(tiny())
    assert all(outcome(data[:size]) is None for size in range(len(data)))
    assert outcome(data + b"\0") is None
    assert outcome(data + data) is None


@given(st.binary(max_size=200))
@REPEATABLE
def test_noise_is_refused(noise: bytes) -> None:
    assert outcome(noise) is None
    assert outcome(encode_program(tiny())[:2] + noise) is None


SMALL = st.integers(0, 6)
SIZES = st.sampled_from([0, 1, 2, 3, 2**20, 2**40, 2**41, 2**63, 2**64 - 1])
TYPES = st.builds(TypeRecord, dtype=st.integers(0, 6), shape=st.lists(SIZES, max_size=3).map(tuple))
WORDS = st.lists(
    st.sampled_from([0, 1, 2, 3, 4, 31, 64, 2**32, 2**62, 2**63 - 1, -1, -2, -(2**63)]), min_size=1, max_size=5
)
ATTRIBUTES = st.one_of(
    st.binary(max_size=12),
    WORDS.map(lambda v: b"".join(n.to_bytes(8, "little", signed=True) for n in v)),
    WORDS.map(lambda v: len(v).to_bytes(4, "little") + b"".join(n.to_bytes(8, "little", signed=True) for n in v)),
    st.tuples(st.integers(0, 5), WORDS).map(lambda p: bytes([p[0]]) + p[1][0].to_bytes(8, "little", signed=True)),
    st.sampled_from([r.attributes for r in decode(ProgramRecord, encode_program(every_operator())).operators]),
)
CODES = st.sampled_from([*(row.code for row in OPERATORS.values()), 0, 99, 255])
OPS = st.builds(OpRecord, code=CODES, inputs=st.lists(SMALL, max_size=3).map(tuple), attributes=ATTRIBUTES, type=TYPES)


@st.composite
def hostile(draw: st.DrawFn) -> ProgramRecord:
    """Records that decode, hold consistent counts, and otherwise say anything."""
    ops = draw(st.lists(OPS, max_size=3))
    inputs = draw(st.lists(st.builds(InputRecord, name=st.text(max_size=3), type=TYPES), max_size=3))
    constants = sorted(draw(st.lists(st.binary(max_size=16), max_size=2, unique=True)), key=merkle.bytes_root)
    digests = tuple(map(merkle.bytes_root, constants))
    texts = draw(st.sampled_from([("",), ("a", "b"), ()]))
    return ProgramRecord(
        header=HeaderRecord(
            inputs=tuple(inputs),
            outputs=tuple(draw(st.lists(SMALL, max_size=2))),
            operators=len(ops),
            constants=digests,
        ),
        operators=tuple(ops),
        labels=LabelsRecord(texts=texts, numbers=(0,) * len(ops)),
        constants=tuple(constants),
    )


@given(hostile())
@REPEATABLE
def test_hostile_records_are_refused_or_well_formed(made: ProgramRecord) -> None:
    data = encode(made)
    found = outcome(data)
    if found is not None:
        assert encode_program(found) == data


def whole(program: Program) -> ProgramRecord:
    return decode(ProgramRecord, encode_program(program))


def _with_header(record: ProgramRecord, **changes: Any) -> ProgramRecord:
    return dataclasses.replace(record, header=dataclasses.replace(record.header, **changes))


def _with_labels(record: ProgramRecord, **changes: Any) -> ProgramRecord:
    return dataclasses.replace(record, labels=dataclasses.replace(record.labels, **changes))


def _with_op(record: ProgramRecord, number: int, **changes: Any) -> ProgramRecord:
    ops = list(record.operators)
    ops[number] = dataclasses.replace(ops[number], **changes)
    return dataclasses.replace(record, operators=tuple(ops))


def _with_input(record: ProgramRecord, dtype: int, *shape: int) -> ProgramRecord:
    return _with_header(record, inputs=(InputRecord(name="x", type=TypeRecord(dtype=dtype, shape=shape)),))


HOSTILE = {
    "huge input": lambda r: _with_input(r, 0, 2**63),
    "huge product": lambda r: _with_input(r, 0, 2**30, 2**30),
    "unknown type": lambda r: _with_input(r, 5, 2),
    "i8 input": lambda r: _with_input(r, 1, 2),
    "output beyond": lambda r: _with_header(r, outputs=(99,)),
    "count": lambda r: _with_header(r, operators=3),
    "constant missing": lambda r: dataclasses.replace(_with_header(r, constants=()), constants=()),
    "constant changed": lambda r: dataclasses.replace(r, constants=(b"\1" + r.constants[0][1:],)),
    "constants doubled": lambda r: dataclasses.replace(
        _with_header(r, constants=r.header.constants * 2), constants=r.constants * 2
    ),
    "label number": lambda r: _with_labels(r, numbers=(9,) * len(r.operators)),
    "labels unsorted": lambda r: _with_labels(
        r, texts=r.labels.texts[::-1], numbers=tuple(1 - n for n in r.labels.numbers)
    ),
    "label unused": lambda r: _with_labels(r, texts=(*r.labels.texts, "zz")),
    "own output": lambda r: _with_op(r, 1, inputs=(0, 2)),
    "later value": lambda r: _with_op(r, 1, inputs=(0, 3)),
    "wrong type": lambda r: _with_op(r, 1, type=TypeRecord(dtype=0, shape=(3,))),
    "unknown code": lambda r: _with_op(r, 1, code=200),
    "attributes too long": lambda r: _with_op(r, 1, attributes=bytes(8)),
    "attributes too short": lambda r: _with_op(r, 2, attributes=b"\2"),
    "axes beyond": lambda r: _with_op(r, 3, code=51, attributes=(1).to_bytes(4, "little") + (5).to_bytes(8, "little")),
    "axes without end": lambda r: _with_op(r, 3, attributes=b"\xff" * 12),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_named_mutations_are_refused(name: str) -> None:
    with pytest.raises(REFUSALS):
        decode_program(encode(HOSTILE[name](whole(tiny()))))


def test_a_bool_constant_has_bytes_0_and_1_only() -> None:
    b = Builder()
    data = encode_program(b.finish([b.constant(np.array([True, False, True]))]))
    record = decode(ProgramRecord, data)
    odd = b"\1\0\2"
    attributes = record.operators[0].attributes[:-32] + merkle.bytes_root(odd)
    changed = _with_op(_with_header(record, constants=(merkle.bytes_root(odd),)), 0, attributes=attributes)
    with pytest.raises(OperatorError, match="expected 0 or 1"):
        decode_program(encode(dataclasses.replace(changed, constants=(odd,))))


def test_a_program_is_checked_where_it_is_made() -> None:
    t = Type("f32", (2,))
    with pytest.raises(OperatorError, match=r"operator 0 \(sqrt, no label\) reads values"):
        Program(inputs=(("x", t),), ops=(Op(name="sqrt", inputs=(1,), attributes={}, type=t),), outputs=(0,))
    wrong = Op(name="sqrt", inputs=(0,), attributes={}, type=Type("f32", (3,)), label="here")
    with pytest.raises(OperatorError, match=r"claims f32\[3\], its rule gives f32\[2\]"):
        Program(inputs=(("x", t),), ops=(wrong,), outputs=(0,))
    with pytest.raises(OperatorError, match="outputs"):
        Program(inputs=(("x", t),), ops=(), outputs=(1,))


def test_equal_values_are_shared_and_unused_ones_dropped() -> None:
    b = Builder()
    x = b.input("x", "f32", 3)
    b.constant(np.zeros(3, np.float32))
    _ = x / 3.0
    program = b.finish([(x + 1.0) * (x + 1.0)])
    assert program.histogram == {"literal": 1, "add": 1, "mul": 1, "reshape": 1, "broadcast": 1}
    assert program.constants == {}
    assert decode_program(encode_program(program)) == program
