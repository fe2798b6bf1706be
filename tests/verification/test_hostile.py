"""Stores that attackers wrote, every digest and root made to agree: no crash, no hang, no flood, no false match."""

import dataclasses
import functools
import math
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import executors, memory
from runtime.data import DatasetRecord, Shard
from runtime.faults import faulty_builder, parse_fault
from runtime.groups import LocalGroup
from runtime.program.builder import Builder
from runtime.program.compiler.executor import CompiledExecutor
from runtime.program.encoding import HeaderRecord, OpRecord, ProgramRecord, TypeRecord
from runtime.program.program import MAX_OPERATORS, decode_program, encode_program
from runtime.program.training import MOST_PARTS, MOST_WEIGHTS, TrainingFile, TrainingProgram
from runtime.segments import MOST_SEGMENTS, History
from runtime.testing import plan_for, remembered, tiny_job, train
from storage import merkle
from storage.checkpoints import load_state
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import FailureError, IntegrityError, TrueweightError, UsageError
from storage.identity import Identity, sign_receipt
from storage.manifest import decode_manifest
from storage.objects import MemoryObjects
from storage.records import (
    Head,
    Receipt,
    RecordList,
    RunRecord,
    SegmentRecord,
    StepRecord,
    TensorEntry,
    facts_free,
)
from storage.saving import save_state
from storage.store import Store, memory_store
from trueweight.investigation import investigate
from verification.audit import Diverged, Inconclusive, Match, Verdict, audit
from verification.evidence import check_evidence, make_evidence, read_evidence

SECONDS = 20.0
"""What one case may take on a host that is busy with other tests; alone it takes a tenth."""
MEMORY = 256 << 20
"""What a host is said to have free."""


class Hung(BaseException):
    """Nothing may catch it but the test."""


@contextmanager
def bounded() -> Iterator[None]:
    """The case ends in time, and this process has not grown by more than it may."""

    def ring(*_: object) -> None:
        raise Hung

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 2 * MEMORY, f"the process grew by {grown >> 20} MiB"


@pytest.fixture(scope="module", autouse=True)
def decoded_once() -> Iterator[None]:
    """Programs are immutable: those that an attack leaves alone need not be decoded again."""
    decode = functools.lru_cache(maxsize=2)(TrainingProgram.decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgram, "decode", staticmethod(decode))
        yield


@pytest.fixture(autouse=True)
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: MEMORY)


class Attack:
    """A copy of an honest run whose objects can be replaced, with everything above them hashed again."""

    def __init__(self) -> None:
        source = _honest().objects
        objects = MemoryObjects()
        for found in source.list(""):
            objects.create(found.key, source.read(found.key) or b"")
        self.store = Store(objects)
        self.history = History.open(self.store, "tiny")
        self.run = self.history.run
        self.segments = self.history.segments()

    def commit(self, *, run: dict[str, Any] | None = None, segments: dict[int, dict[str, Any]] | None = None) -> None:
        """The Head of a run with these fields of its record and of its segments' changed, linked anew."""
        self.run = dataclasses.replace(self.run, **(run or {}))
        digest, previous = self.store.put(encode(self.run)), NO_DIGEST
        for number, segment in enumerate(self.segments):
            changed = {"run": digest, "previous": previous, **(segments or {}).get(number, {})}
            previous = self.store.put(encode(dataclasses.replace(segment, **changed)))
        head = Head(run=digest, segment=previous, partial=None, status="finished")
        self.store.swap("runs/tiny", self.store.read("runs/tiny"), encode(head))

    def items(self, number: int, kind: str, items: tuple[bytes, ...], **more: Any) -> None:
        """The steps or receipts of a segment replaced, their root with them."""
        fields = {f"{kind}_object": self.store.put(encode(RecordList(items=items)))}
        self.commit(segments={number: {**fields, f"{kind}_root": merkle.list_root(items), **more}})

    def programs(self, data: bytes, root: bytes | None = None) -> None:
        self.commit(run={"programs": self.store.put(data), "program_root": root or self.run.program_root})

    def training(self, **header: Any) -> None:
        """The TrainingProgram with fields of its header changed."""
        file = decode(TrainingFile, self.store.get(self.run.programs))
        made = dataclasses.replace(file.header, **header)
        self.programs(encode(dataclasses.replace(file, header=made)), merkle.leaf_hash(encode(made)))

    def program(self, change: Callable[[ProgramRecord], ProgramRecord], number: int = 3) -> None:
        """Program `number` changed, its root in the header with it where it still has one."""
        file = decode(TrainingFile, self.store.get(self.run.programs))
        data = encode(change(decode(ProgramRecord, file.programs[number])))
        root = file.header.programs[number]
        with suppress(FailureError):
            root = decode_program(data).root
        roots = tuple(root if n == number else other for n, other in enumerate(file.header.programs))
        parts = tuple(data if n == number else part for n, part in enumerate(file.programs))
        header = dataclasses.replace(file.header, programs=roots)
        made = dataclasses.replace(file, header=header, programs=parts)
        self.programs(encode(made), merkle.leaf_hash(encode(header)))

    def recipe(self, **training: Any) -> None:
        import json

        tables = json.loads(self.store.get(self.run.recipe))
        tables["training"] |= training
        data = json.dumps(tables, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        self.commit(run={"recipe": self.store.put(data)})

    def data(self, **fields: Any) -> None:
        made = decode(DatasetRecord, self.store.get(self.run.data))
        self.commit(run={"data": self.store.put(encode(dataclasses.replace(made, **fields)))})

    def verdict(self, *indexes: int) -> Verdict:
        """The audit's verdict, or Inconclusive for a UsageError: nothing else may come of it."""
        with bounded():
            try:
                return audit(
                    self.store, "tiny", lambda history, total: [i for i in indexes or (1,) if i < total]
                ).verdict
            except UsageError as error:
                return Inconclusive(reason=str(error))


@functools.cache
def _honest() -> Store:
    store = memory_store()
    train(store, tiny_job(store, steps=3))
    return store


@pytest.fixture
def attack() -> Attack:
    return Attack()


def test_the_untouched_copy_matches(attack: Attack) -> None:
    attack.commit()
    assert attack.verdict() == Match()


# ----------------------------------------------------------------------------------------------- what was thought of


def op(code: int, inputs: tuple[int, ...], attributes: bytes, dtype: int, *shape: int) -> OpRecord:
    return OpRecord(code=code, inputs=inputs, attributes=attributes, type=TypeRecord(dtype=dtype, shape=shape))


def with_op(made: OpRecord, number: int = 0) -> Callable[[ProgramRecord], ProgramRecord]:
    """One more operator at a place, the later ones renumbered."""

    def change(record: ProgramRecord) -> ProgramRecord:
        at = len(record.header.inputs) + number

        def moved(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(value + (value >= at) for value in values)

        later = [dataclasses.replace(o, inputs=moved(o.inputs)) for o in record.operators[number:]]
        header = dataclasses.replace(
            record.header, outputs=moved(record.header.outputs), operators=record.header.operators + 1
        )
        labels = dataclasses.replace(record.labels, numbers=(*record.labels.numbers, record.labels.numbers[-1]))
        operators = (*record.operators[:number], made, *later)
        return dataclasses.replace(record, header=header, operators=operators, labels=labels)

    return change


def replaced(**fields: Any) -> Callable[[ProgramRecord], ProgramRecord]:
    return lambda record: dataclasses.replace(record, header=dataclasses.replace(record.header, **fields))


def many_operators(record: ProgramRecord) -> ProgramRecord:
    extra = MAX_OPERATORS + 1 - len(record.operators)
    header = dataclasses.replace(record.header, operators=MAX_OPERATORS + 1)
    labels = dataclasses.replace(record.labels, numbers=(*record.labels.numbers, *[0] * extra))
    operators = (*record.operators, *[op(3, (), struct.pack("<q", 1), 3, 1)] * extra)
    return dataclasses.replace(record, header=header, operators=operators, labels=labels)


def spec(attack: Attack, shape: tuple[int, ...]) -> tuple[Any, ...]:
    first, *rest = TrainingProgram.decode(attack.store.get(attack.run.programs)).tensors
    return (dataclasses.replace(first, shape=shape), *rest)


PROGRAMS: dict[str, tuple[Callable[[Attack], None], str]] = {
    "an operator nobody knows": (lambda a: a.program(with_op(op(250, (), b"", 0))), "operator code 250"),
    "a value of a later operator": (lambda a: a.program(with_op(op(10, (900, 900), b"", 0))), "reads values"),
    "itself": (lambda a: a.program(with_op(op(14, (5,), b"", 0))), "operator"),
    "an output that there is not": (lambda a: a.program(replaced(outputs=(2**32 - 1,))), "outputs"),
    "more operators than stated": (lambda a: a.program(replaced(operators=2**32 - 1)), "stated"),
    "an element type nobody knows": (lambda a: a.program(with_op(op(3, (), struct.pack("<q", 1), 77, 1))), "type 77"),
    "2^60 elements": (lambda a: a.program(with_op(op(3, (), struct.pack("<q", 2**60), 3, 2**60))), "2^40"),
    "2^38 elements": (lambda a: a.program(with_op(op(3, (), struct.pack("<q", 2**38), 3, 2**38))), "out of memory"),
    "many axes": (lambda a: a.program(with_op(op(3, (), struct.pack("<q", 1), 3, *[1] * 99_999))), "99999 axes"),
    "too many operators": (lambda a: a.program(many_operators), f"at most {MAX_OPERATORS}"),
    "a tensor of many axes": (lambda a: a.training(tensors=spec(a, (1,) * 10**5)), "axes of a tensor"),
    "a tensor of 2^126 elements": (lambda a: a.training(tensors=spec(a, (2**63, 2**63))), f"{MOST_WEIGHTS} weights"),
    "a tensor of 2^35 elements": (lambda a: a.training(tensors=spec(a, (2**35,))), ""),
    "many blocks": (
        lambda a: a.training(blocks=TrainingProgram.decode(a.store.get(a.run.programs)).blocks * MOST_PARTS),
        f"{MOST_PARTS} blocks",
    ),
    "no blocks": (lambda a: a.training(blocks=()), "no blocks"),
    "2^32 - 1 micro-batches": (lambda a: a.training(micro_batches=2**32 - 1), "4 micro-batches, got 4294967295"),
    "no programs": (lambda a: a.training(programs=()), "roots"),
    "a file of 2^32 programs": (lambda a: a.programs(b"\x55\x01" + b"\xff" * 64), "decoding TrainingFile"),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_hostile_programs_are_inconclusive(attack: Attack, what: str) -> None:
    harm, reason = PROGRAMS[what]
    harm(attack)
    verdict = attack.verdict()
    assert isinstance(verdict, Inconclusive), verdict
    assert reason in verdict.reason
    assert len(verdict.reason) < 5000


RECORDS: dict[str, Callable[[Attack], None]] = {
    "a segment of 2^32 - 1 steps": lambda a: a.commit(segments={1: {"steps": 2**32 - 1}}),
    "a segment at the end of time": lambda a: a.commit(segments={1: {"first_step": 2**64 - 1}}),
    "another engine": lambda a: a.commit(run={"engine": "deepspeed"}),
    "no steps": lambda a: a.items(1, "steps", ()),
    "a step of garbage": lambda a: a.items(1, "steps", (b"\x02\x01" + b"\xff" * 300,)),
    "a million empty steps": lambda a: a.items(1, "steps", (b"",) * 10**6),
    "steps that are a recipe": lambda a: a.commit(segments={1: {"steps_object": a.run.recipe}}),
    "a receipt of garbage": lambda a: a.items(1, "receipts", (b"\x03\x02" + b"\xff" * 300,)),
    "receipts of nobody": lambda a: a.commit(segments={1: {"receipts_root": bytes(32)}}),
    "a prestate of nowhere": lambda a: a.commit(segments={0: {"poststate": bytes(32)}, 1: {"prestate": bytes(32)}}),
    "the recipe of a program": lambda a: a.commit(run={"recipe": a.run.programs}),
    "a recipe that never ends": lambda a: a.commit(run={"recipe": a.store.put(b'{"a":' + b"[" * 10**6)}),
    "a batch of 2^32 - 4": lambda a: a.recipe(batch=2**32 - 4),
    "a validation of 2^40": lambda a: a.recipe(validate_every=1, validation_batches=2**40),
    "a schedule of 2^32 - 1 steps": lambda a: a.recipe(steps=2**32 - 1, segment=2**31),
    "other micro-batches": lambda a: a.recipe(micro_batches=2),
    "a data record of garbage": lambda a: a.commit(run={"data": a.store.put(b"\x41\x01" + b"\xff" * 99)}),
    "a sequence of 2^60 tokens": lambda a: a.data(shape=(2**60,)),
    "2^60 tokens": lambda a: a.data(training=(Shard(object=a.run.data, count=2**60),)),
    "2^40 tokens in shards": lambda a: a.data(training=(Shard(object=a.run.data, count=2**22),) * 2**16),
    "shards that are a recipe": lambda a: a.data(training=(Shard(object=a.run.recipe, count=2**12),)),
    "no tokens": lambda a: a.data(training=()),
    "a vocabulary of one": lambda a: a.data(vocab=1),
    "another order": lambda a: a.data(order="windows-9"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_hostile_records_never_match(attack: Attack, what: str) -> None:
    RECORDS[what](attack)
    verdict = attack.verdict()
    assert not isinstance(verdict, Match)
    assert len(str(verdict)) < 5000


def test_a_chain_longer_than_a_run_can_be_is_refused(attack: Attack) -> None:
    last = dataclasses.replace(attack.segments[-1], index=MOST_SEGMENTS)
    attack.segments = [*attack.segments[:-1], last]
    attack.commit()
    verdict = attack.verdict()
    assert isinstance(verdict, Inconclusive)
    assert f"expected segment {MOST_SEGMENTS - 1}" in verdict.reason


def test_a_state_with_more_than_the_programs_need_is_not_loaded(attack: Attack) -> None:
    first = attack.segments[0]
    arrays = load_state(attack.store, first.poststate)
    for name, size in (("weight/zzz", 8), (next(iter(arrays)), 2**20)):
        root = save_state(attack.store, {**arrays, name: np.zeros(size, np.float32)})
        attack.commit(segments={0: {"poststate": root}, 1: {"prestate": root}})
        verdict = attack.verdict()
        assert isinstance(verdict, Inconclusive)
        assert f"got {name} of [{size}]" in verdict.reason


def test_a_name_cannot_write_on_the_terminal(attack: Attack) -> None:
    identity = Identity(bytes(31) + b"\x09")
    receipt = Receipt(
        run=bytes(32), step=2, worker="\x1b[2J\x1b]0;owned\x07" + "x" * 10**5, address=identity.address,
        bounds=(0, 1), replicas=1, units=(), gradient_root=bytes(32), exponent=0, reduced_root=bytes(32), square=0,
        updated_root=bytes(32), signature=b"",
    )  # fmt: skip
    attack.items(1, "receipts", (encode(sign_receipt(identity, receipt)),))
    verdict = attack.verdict()
    assert isinstance(verdict, Diverged)
    assert verdict.path.isprintable()
    assert len(verdict.path) < 3000


def test_compiling_a_hostile_chain_ends() -> None:
    """Loops of many sums: LLVM takes more than in proportion for one kernel of them."""
    b = Builder()
    value = x = b.input("x", "i64", 8, 8)
    for _ in range(150):
        value = value.sum(1).reshape(8, 1).broadcast(8, 8) + value
    program = b.finish([value, *(x + number for number in range(500))])
    array = np.arange(64).reshape(8, 8)
    reference, compiled = executors.reference(1), CompiledExecutor(1, cache=False)
    with bounded():
        made = compiled.run(program, [compiled.put(array)])
    expected = reference.run(program, [reference.put(array)])
    assert all((a == b).all() for a, b in zip(made, expected, strict=True))


def test_a_program_of_outputs_alone_is_read_in_proportion() -> None:
    b = Builder()
    x = b.input("x", "i64", 1)
    data = encode_program(b.finish([x + number for number in range(MAX_OPERATORS // 3)]))
    with bounded():
        program = decode_program(data)
        assert len(program.last_use) == len(program.ops)


# ------------------------------------------------------------------------------------------------ what was not


def mutated(data: bytes, source: random.Random) -> bytes:
    """Bytes changed as bytes are by who does not know what they mean."""
    at, size = source.randrange(len(data)), source.choice((1, 2, 4, 8))
    match source.randrange(6):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << source.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at] + b"\xff" * size + data[at + size :]
        case 2:
            return data[:at] + bytes(size) + data[at + size :]
        case 3:
            return data[:at]
        case 4:
            return data[:at] + source.randbytes(size) + data[at:]
    other = source.randrange(len(data))
    return data[:at] + data[other : other + 64] + data[at + 64 :]


def facts(attack: Attack) -> list[StepRecord]:
    segment = attack.history.segments()[1]
    return [facts_free(decode(StepRecord, item)) for item in attack.history.items(segment.steps_object)]


def harm_run(attack: Attack, source: random.Random) -> None:
    """The run's record, in the Head as it is then."""
    digest = attack.store.put(mutated(encode(attack.run), source))
    head = dataclasses.replace(attack.history.head, run=digest)
    attack.store.swap("runs/tiny", attack.store.read("runs/tiny"), encode(head))


def harm_head(attack: Attack, source: random.Random) -> None:
    attack.store.swap("runs/tiny", attack.store.read("runs/tiny"), mutated(encode(attack.history.head), source))


def harm_segment(attack: Attack, source: random.Random) -> None:
    digest = attack.store.put(mutated(encode(attack.segments[-1]), source))
    head = dataclasses.replace(attack.history.head, segment=digest)
    attack.store.swap("runs/tiny", attack.store.read("runs/tiny"), encode(head))


def harm_steps(attack: Attack, source: random.Random) -> None:
    items = list(attack.history.items(attack.segments[1].steps_object))
    at = source.randrange(len(items))
    items[at] = mutated(items[at], source)
    last: dict[str, Any] = {}
    with suppress(IntegrityError):
        last["poststate"] = decode(StepRecord, items[-1]).state_root
    attack.items(1, "steps", tuple(items), **last)


def harm_object(name: str) -> Callable[[Attack, random.Random], None]:
    def harm(attack: Attack, source: random.Random) -> None:
        data = mutated(attack.store.get(getattr(attack.run, name)), source)
        attack.commit(run={name: attack.store.put(data)})

    return harm


def harm_shard(attack: Attack, source: random.Random) -> None:
    made = decode(DatasetRecord, attack.store.get(attack.run.data))
    (shard,) = made.training
    digest = attack.store.put(mutated(attack.store.get(shard.object), source))
    attack.data(training=(dataclasses.replace(shard, object=digest),))


def harm_program(attack: Attack, source: random.Random) -> None:
    """A Program's bytes, where they decode committed to as their own."""
    number = source.randrange(8)

    def change(record: ProgramRecord) -> ProgramRecord:
        for _ in range(50):
            try:
                return decode(ProgramRecord, mutated(encode(record), source))
            except IntegrityError:
                continue
        return record

    attack.program(change, number)


HARMS: dict[str, tuple[Callable[[Attack, random.Random], None], int]] = {
    "head": (harm_head, 25),
    "run": (harm_run, 25),
    "segment": (harm_segment, 25),
    "steps": (harm_steps, 15),
    "recipe": (harm_object("recipe"), 15),
    "data": (harm_object("data"), 15),
    "programs": (harm_object("programs"), 5),
    "program": (harm_program, 8),
    "shard": (harm_shard, 8),
}


@pytest.mark.parametrize("what", HARMS)
def test_random_harm_ends_in_a_verdict(what: str) -> None:
    harm, rounds = HARMS[what]
    honest = facts(Attack())
    for seed in range(rounds):
        attack = Attack()
        harm(attack, random.Random(f"{what} {seed}"))
        verdict = attack.verdict()
        if isinstance(verdict, Match):  # then what it matched is what the honest run did
            attack.history = History.open(attack.store, "tiny")
            assert facts(attack) == honest, seed
        if isinstance(verdict, Inconclusive):
            assert verdict.reason.strip()


@pytest.mark.parametrize("part", ["objects/", "checkpoints/", "packs/", "refs/"])
def test_flipped_bytes_accuse_nobody(part: str) -> None:
    source = random.Random(part)
    for _ in range(8):
        attack = Attack()
        keys = [found.key for found in attack.store.objects.list(part)]
        key = source.choice(keys)
        attack.store.objects.replace(key, mutated(attack.store.objects.read(key) or b"", source))
        assert not isinstance(attack.verdict(), Diverged), key


TYPES = [Head, RunRecord, SegmentRecord, StepRecord, Receipt, RecordList, TensorEntry, TrainingFile, ProgramRecord]
TYPES += [HeaderRecord, DatasetRecord]


@settings(max_examples=150, deadline=1000)
@given(st.sampled_from(TYPES), st.binary(max_size=400), st.integers(0, 60))
def test_decoders_raise_one_error_and_take_no_more_than_they_are_given(kind: type, data: bytes, at: int) -> None:
    header: bytes = kind.__record_header__  # type: ignore[attr-defined]
    for body in (data, data[:at] + b"\xff\xff\xff\xff" + data[at:]):
        with bounded():
            try:
                value = decode(kind, header + body)
            except IntegrityError:
                continue
        assert encode(value) == header + body


@settings(max_examples=60, deadline=1000)
@given(st.binary(max_size=600))
def test_manifests_raise_one_error(data: bytes) -> None:
    with bounded(), pytest.raises(IntegrityError):
        decode_manifest(bytes(32), data)


# ------------------------------------------------------------------------------------------------------- evidence


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of evidence that shows a flipped bit."""
    keys, store = str(tmp_path_factory.mktemp("keys")), memory_store()
    flip = "kind=flip,step=1,worker=s0r0,place=micro-batch 2/block 1/forward,operator=700,element=3,bit=10"
    fault, job = parse_fault(flip), tiny_job(store, steps=2)
    group = LocalGroup(faulty_builder(remembered, [fault]))
    train(store, job, group=group, plan=plan_for(job), keys=keys)
    found = audit(store, "tiny", lambda history, total: [0]).verdict
    assert isinstance(found, Diverged)
    history = History.open(store, "tiny")
    finding, narrowing, traces = investigate(store, history, found, make=executors.reference, keys=keys, faults=[fault])
    assert narrowing is not None
    assert traces is not None
    return encode(make_evidence(finding, narrowing, traces.state))


def checked(data: bytes) -> str:
    """What was proven; "" where the file was refused, as it may be in two ways only."""
    with bounded():
        try:
            return check_evidence(read_evidence(data)).proven
        except UsageError:
            return ""


def test_evidence_that_was_touched_proves_nothing_else(evidence: bytes) -> None:
    proven = checked(evidence)
    assert proven
    source = random.Random(5)
    for _ in range(250):
        assert checked(mutated(evidence, source)) in ("", proven)


def harmed(value: Any, source: random.Random) -> Any:
    """A record with one field, at any depth, pushed to an extreme."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return source.choice((0, 1, 2**31, 2**32 - 1))
    if isinstance(value, str):
        return source.choice(("", "s9r9", "step x/y", "\x00" * 99))
    if isinstance(value, bytes):
        return mutated(value, source) if len(value) not in (0, 20, 32, 65) else bytes(len(value))
    if isinstance(value, tuple):
        if not value:
            return value
        at = source.randrange(len(value))
        return source.choice(((), value * 3, (*value[:at], harmed(value[at], source), *value[at + 1 :])))
    name = source.choice([field.name for field in dataclasses.fields(value)])
    return dataclasses.replace(value, **{name: harmed(getattr(value, name), source)})


def test_evidence_with_extremes_is_refused_in_words(evidence: bytes) -> None:
    proven = checked(evidence)
    source, tried = random.Random(6), 0
    while tried < 250:
        try:
            data = encode(harmed(read_evidence(evidence), source))
        except (TrueweightError, ValueError):
            continue
        tried += 1
        assert checked(data) in ("", proven)


def test_the_limits_leave_room_for_what_is_honest() -> None:
    program = TrainingProgram.decode(_honest().get(History.open(_honest(), "tiny").run.programs))
    assert max(len(p.ops) for p in program.programs) * 10 < MAX_OPERATORS
    assert len(program.blocks) * 100 < MOST_PARTS
    assert sum(math.prod(spec.shape) for spec in program.tensors) * 1000 < MOST_WEIGHTS
