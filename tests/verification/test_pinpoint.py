"""Pinpoint: faults of every kind to their place, answers that lie, and evidence that cannot be bent."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.pinpoint import EXACT, exact, full_audit
from benchmarks.pinpoint import one as one_fault
from runtime.executors import reference
from runtime.faults import KINDS, Fault, check_fault, faulty_builder, parse_fault, random_fault
from runtime.groups import LocalGroup
from runtime.plan import Plan
from runtime.program.builder import Builder
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.testing import plan_for, tiny_job, tiny_program, train
from runtime.tracing import traced_builder
from storage import merkle
from storage.codec import decode, encode
from storage.errors import FailureError, UsageError
from storage.identity import Identity, load_or_create, signed
from storage.records import Receipt
from storage.store import memory_store
from trueweight.investigation import investigate, witness
from verification.audit import Diverged
from verification.evidence import Evidence, FalseEvidence, check_evidence, make_evidence, read_evidence
from verification.pinpoint import (
    HARDWARE,
    RECORD,
    SOFTWARE,
    UNAVAILABLE,
    Finding,
    Narrowing,
    pinpoint,
    plan_of,
    traces_at,
)
from verification.replay import Replay
from verification.testing import ToyTraces, check_traces
from verification.traces import REVEAL_DOMAIN, Answer, RecordedTraces, ReplayedTraces, TraceProvider, Witness

FLIP = "kind=flip,step=2,worker=s1r0,place=micro-batch 2/block 2/forward,operator=700,element=3,bit=10"
FAULTS = [
    "kind=flip,step=1,worker=s0r0,place=micro-batch 2/block 1/backward,operator=2000,element=1,bit=3",
    "kind=flip,step=1,worker=s1r1,place=micro-batch 1/loss,operator=300,element=2,bit=12",
    "kind=ulp,step=2,worker=s0r1,place=update/block000.position/0,operator=40,element=5,bit=0",
    "kind=transient,step=2,worker=s1r0,place=micro-batch 2/block 2/forward,operator=700,element=3,bit=10",
    "kind=batch,step=1,worker=s0r1,micro_batch=3",
    "kind=skip,step=2,worker=s1r0,micro_batch=0",
    "kind=reuse,step=2,worker=s0r0",
    "kind=rate,step=1,worker=s1r1",
    "kind=stale,step=2,worker=s1r0",
    "kind=copy,step=1,worker=s1r1",
    "kind=receipt,step=2,worker=s0r1",
]


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_of_each_kind_is_located_exactly(tmp_path: Path, text: str) -> None:
    job = tiny_job(memory_store(), steps=3)
    result = one_fault(
        parse_fault(text),
        plan=plan_for(job, stages=2, replicas=2),
        executor="reference",
        keys=str(tmp_path),
        steps=3,
    )
    assert result.outcome == EXACT
    expected = {"receipt": "none", "skip": "chain", "transient": "chain"}
    assert result.evidence == expected.get(result.fault.kind, "element")


# ------------------------------------------------------------------------------------------- one case, many questions


class Case:
    """A run with one flipped bit, audited; `ask` pinpoints it with another side."""

    def __init__(self, keys: Path) -> None:
        self.store, self.keys, self.fault = memory_store(), str(keys), parse_fault(FLIP)
        self.job = tiny_job(self.store, steps=3)
        self.plan = plan_for(self.job, stages=2, replicas=2)
        group = LocalGroup(faulty_builder(reference, [self.fault]))
        train(self.store, self.job, group=group, plan=self.plan, keys=self.keys)
        self.history = History.open(self.store, "tiny")
        found = full_audit(self.store, "tiny", "reference")
        assert isinstance(found, Diverged)
        self.found = found
        self.replayed = traces_at(self.history, 1, 2, self.replay)
        self.ours = RecordedTraces(self.replayed)
        made = witness(self.store, self.history, 1, 2, self.plan, keys=self.keys, make=reference, faults=[self.fault])
        self.theirs = RecordedTraces(made)

    def replay(self) -> Replay:
        return Replay(self.store, self.history.run, build=traced_builder(reference), plan=self.plan)

    def ask(self, theirs: TraceProvider | None) -> tuple[Finding, Narrowing]:
        finding, narrowing = pinpoint(
            self.history,
            self.found,
            self.job.program,
            ours=lambda *_: self.ours,
            theirs=lambda *_: theirs,
            batch=self.job.feed.batch,
        )
        assert narrowing is not None
        return finding, narrowing


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("keys"))


def test_recorded_answers_locate_the_fault_again_with_nobody_there(case: Case) -> None:
    first, _ = case.ask(case.theirs)
    assert exact(case.fault, first, case.plan, case.job.program) == EXACT
    again = RecordedTraces()
    again.answers = dict(case.theirs.answers)
    assert case.ask(again)[0] == first
    levels = [level.level for level in first.path]
    assert levels == ["segment", "step", "unit", "call", "operator", "leaf", "element"]
    assert first.element is not None
    assert first.element.label == "blocks.2.attention.output, addmm"
    assert first.signature


def test_nobody_there_or_no_answer_is_unavailable(case: Case) -> None:
    finding, _ = case.ask(None)
    assert (finding.cause, finding.worker, finding.element) == (UNAVAILABLE, "s1r0", None)
    finding, _ = case.ask(RecordedTraces())
    assert (finding.cause, finding.worker) == (UNAVAILABLE, "s1r0")
    assert "no such answer was recorded" in finding.reason
    stranger = Witness(case.theirs, {}, case.history.run_digest, 2)
    assert "its key is not here" in case.ask(stranger)[0].reason
    other = dict.fromkeys(case.plan.workers, Identity(bytes(31) + b"\x05"))
    forged = Witness(case.theirs, other, case.history.run_digest, 2)
    assert "not signed by the key" in case.ask(forged)[0].reason
    finding, _ = case.ask(case.ours)  # who signs nothing
    assert finding.cause == HARDWARE


class Liar(RecordedTraces):
    """The accused worker's answers, changed by `lie`."""

    def __init__(self, case: Case, method: str, lie: Callable[[Any], Any], resign: bool = False) -> None:
        super().__init__(case.theirs)
        self._method, self._lie, self._case, self._resign = method, lie, case, resign

    def _known(self, method: str, *question: Any) -> Any:
        answer = super()._known(method, *question)
        if method != self._method:
            return answer
        if not isinstance(answer, Answer):
            return self._lie(answer)
        items = self._lie(answer.items)
        reveal = answer.reveal
        if self._resign and reveal is not None:
            from storage.identity import sign

            identity = load_or_create(Path(self._case.keys) / "worker.key")
            unsigned = dataclasses.replace(reveal, answer=merkle.list_root(items), signature=b"")
            reveal = sign(identity, REVEAL_DOMAIN, unsigned)
        return Answer(items=items, reveal=reveal)


def changed_last(items: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return (*items[:-1], bytes([items[-1][0] ^ 1]) + items[-1][1:])


@pytest.mark.parametrize(
    ("method", "lie", "resign", "cause", "reason"),
    [
        ("calls", lambda items: items[:-1], False, UNAVAILABLE, "not signed by the key of its receipt"),
        ("calls", lambda items: items[1:], True, SOFTWARE, "a call was left out"),
        ("calls", lambda items: (b"\x66\x01junk",), True, UNAVAILABLE, "decoding Call"),
        ("operators", lambda items: items[:-1], True, SOFTWARE, "operators revealed of"),
        ("operators", changed_last, True, SOFTWARE, "do not give the call's output"),
        ("leaves", lambda leaves: (*leaves, bytes(32)), False, SOFTWARE, "do not hash to what the worker said"),
        ("leaves", lambda leaves: (bytes(32),), False, SOFTWARE, "do not hash to what the worker said"),
        ("leaf", lambda leaf: leaf + b"\0", False, SOFTWARE, "leaf revealed does not hash"),
        ("claims", lambda claims: {}, False, UNAVAILABLE, "does not answer"),
        ("leaf", lambda leaf: (_ for _ in ()).throw(FailureError("gone; come back")), False, UNAVAILABLE, "gone"),
    ],
    ids=map(str, range(40)),
)
def test_a_lie_ends_the_search_where_it_was_told(
    case: Case, method: str, lie: Callable[[Any], Any], resign: bool, cause: str, reason: str
) -> None:
    finding, _ = case.ask(Liar(case, method, lie, resign))
    assert (finding.worker, finding.cause, finding.element) == ("s1r0", cause, None)
    assert reason in finding.reason


def test_honest_answers_in_place_of_the_fault_are_a_hardware_fault(case: Case) -> None:
    identities = dict.fromkeys(case.plan.workers, load_or_create(Path(case.keys) / "worker.key"))
    finding, _ = case.ask(Witness(case.replayed, identities, case.history.run_digest, 2))
    assert (finding.cause, finding.repeat, finding.worker) == (HARDWARE, "differs", "s1r0")


def test_a_record_that_is_not_what_the_workers_signed_accuses_no_worker(case: Case) -> None:
    finding, narrowing = pinpoint(
        case.history,
        dataclasses.replace(case.found, path="segment 0/step 1/loss"),
        case.job.program,
        ours=lambda *_: traces_at(
            case.history,
            0,
            1,
            lambda: Replay(case.store, case.history.run, build=traced_builder(reference), plan=case.plan),
        ),
        theirs=lambda *_: None,
    )
    assert narrowing is not None
    assert (finding.cause, finding.worker) == (RECORD, "")
    assert "not what they signed" in finding.reason


# --------------------------------------------------------------------------------------------------------- providers


def providers(case: Case) -> Iterator[tuple[str, TraceProvider]]:
    yield "replayed", case.replayed
    yield "recorded", case.ours
    yield "witness", case.theirs


def test_providers_conform(case: Case) -> None:
    """Those of a real step, on a call without the fault; one asked over HTTP is in test_witness.py."""
    place, program = "micro-batch 0/block 2/forward", case.job.program.kind_of(2).forward
    for name, provider in providers(case):
        answers = check_traces(provider, workers=case.plan.workers, worker="s1r0", place=place, program=program, step=2)
        for answer in answers:
            assert (answer.reveal is not None) == (name == "witness")
            assert answer.reveal is None or signed(REVEAL_DOMAIN, answer.reveal)


def test_the_toy_conforms_and_one_that_lies_does_not() -> None:
    build = Builder()
    x = build.input("x", "f32", 40, 70)
    program = build.finish([x + x * x])
    array = np.random.default_rng(3).standard_normal((40, 70)).astype(np.float32)
    made, receipts = [("update/t/0", program, [array])], {"s0r0": Receipt.__new__(Receipt)}
    toy = ToyTraces(3, {"s0r0": made}, receipts)
    check_traces(toy, workers=["s0r0"], worker="s0r0", place="update/t/0", program=program, step=3)

    class Lies(ToyTraces):
        def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
            return super().leaf(worker, place, value, number)[::-1]

    with pytest.raises(AssertionError):
        check_traces(
            Lies(3, {"s0r0": made}, receipts),
            workers=["s0r0"],
            worker="s0r0",
            place="update/t/0",
            program=program,
            step=3,
        )


def test_a_traced_step_is_the_step(case: Case) -> None:
    traces = traces_at(case.history, 0, 1, case.replay)
    for scope in ("", "micro-batch 1/", "gradient", "update/"):
        assert traces.calls("s0r1", scope).items
    assert isinstance(traces, ReplayedTraces)
    signed_ones = [decode(Receipt, item) for item in case.history.items(case.history.segments()[0].receipts_object)]
    for receipt in signed_ones:
        if receipt.step == 1:
            claim = traces.claims()[receipt.worker]
            assert dataclasses.replace(claim, address=receipt.address, signature=receipt.signature) == receipt


# ---------------------------------------------------------------------------------------------------------- evidence


@pytest.fixture(scope="module")
def evidence(case: Case) -> Evidence:
    finding, narrowing = case.ask(case.theirs)
    return make_evidence(finding, narrowing, case.replayed.state)


def test_evidence_is_checked_without_a_store(evidence: Evidence, case: Case) -> None:
    shown = check_evidence(read_evidence(encode(evidence)))
    assert (shown.run, shown.step, shown.worker) == (case.history.run_digest, 2, "s1r0")
    assert shown.proven.startswith("operator 700 (rint), element 3: from the operands that the worker revealed it is ")
    assert len(encode(evidence)) < 20_000


def test_changed_evidence_shows_nothing_else(evidence: Evidence) -> None:
    data, said = encode(evidence), check_evidence(evidence)
    draw = random.Random(5)
    refused = 0
    for _ in range(400):
        spoiled = bytearray(data)
        spoiled[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            shown = check_evidence(read_evidence(bytes(spoiled)))
        except UsageError:
            refused += 1
            continue
        # the maker's words are not signed, and another segment is another digest, which readers compare
        assert dataclasses.replace(shown, claim=said.claim, segment=said.segment) == said
    assert refused > 350
    for length in (0, 1, 100, len(data) - 1):
        with pytest.raises(UsageError, match="make it again"):
            check_evidence(read_evidence(data[:length]))


def test_evidence_of_an_honest_answer_is_refused(case: Case) -> None:
    """Right operands and the right output contradict nothing, whoever signs them."""
    finding, narrowing = case.ask(case.theirs)
    made = make_evidence(finding, narrowing, None)
    assert made.operation is not None
    element = made.operation.element
    other = dataclasses.replace(made.operation, element=element + 1)
    with pytest.raises(FalseEvidence, match="it contradicts nothing"):
        check_evidence(dataclasses.replace(made, operation=other))


def test_evidence_without_operands_is_refused(evidence: Evidence) -> None:
    assert evidence.operation is not None
    for change in ({"leaves": ()}, {"operators": ()}, {"number": 701}):
        with pytest.raises(UsageError, match="evidence"):
            check_evidence(dataclasses.replace(evidence, operation=dataclasses.replace(evidence.operation, **change)))


# ------------------------------------------------------------------------------------------------------------- faults


def test_random_faults_are_of_the_run_and_read_back() -> None:
    program = TrainingProgram.decode(tiny_program())
    kinds = set()
    for seed in range(300):
        plan = Plan(bounds=(0, 2, 4), replicas=(2, 2), units=((0, 1, 0, 1),) * 2)
        fault = random_fault(program, plan, first=0, stop=5, seed=seed)
        check_fault(fault, program, plan, 5)
        assert parse_fault(str(fault)) == dataclasses.replace(
            fault, micro_batch=fault.micro_batch if "micro_batch" in str(fault) else 0
        )
        kinds.add(fault.kind)
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "expected kind=KIND"),
        ("kind=flip,step=1", "and a place for flip"),
        ("kind=odd,step=1", "and a place for flip"),
        ("kind=skip,step=x", "got 'step=x'"),
        ("kind=skip,step=9", "expected a step below 5"),
        ("kind=skip,step=1,worker=s9r9", "expected one of s0r0"),
        ("kind=skip,step=1,micro_batch=1", "expected one of s0r0's micro-batches [0, 2]"),
        ("kind=stale,step=0", "expected a step after the first"),
        ("kind=batch,step=1,worker=s1r0", "expected a worker of the first stage"),
        ("kind=flip,step=1,place=nowhere", "expected a place of s0r0"),
        ("kind=flip,step=1,place=micro-batch 0/block 0/forward,operator=9999", "expected an operator below"),
    ],
)
def test_faults_that_there_cannot_be_are_refused(text: str, said: str) -> None:
    program = TrainingProgram.decode(tiny_program())
    plan = Plan(bounds=(0, 2, 4), replicas=(2, 2), units=((0, 1, 0, 1),) * 2)
    with pytest.raises(UsageError) as error:
        check_fault(parse_fault(text), program, plan, 5)
    assert said in str(error.value)


def test_a_fault_changes_one_element_and_nothing_else() -> None:
    for dtype in (np.float32, np.int32, np.int64, np.int8, np.bool_):
        array = np.ones((3, 4), dtype)
        for kind in ("flip", "ulp"):
            changed = Fault(kind=kind, step=0, element=5, bit=0).alter(array)
            assert np.flatnonzero(changed != array).tolist() == [5]
            assert (array == 1).all()


# --------------------------------------------------------------------------------------------------------------- plans


def test_receipts_that_agree_on_no_plan_name_nobody(case: Case) -> None:
    program, segment = case.job.program, case.history.segments()[0]
    receipts = [decode(Receipt, item) for item in case.history.items(segment.receipts_object)]
    receipts = [receipt for receipt in receipts if receipt.step == 0]
    assert plan_of(receipts, program) == case.plan
    for changed, said in (
        ([], "no receipts"),
        (receipts[:-1], "not one a worker"),
        ([dataclasses.replace(receipts[0], replicas=1), *receipts[1:]], "not one a worker"),
        ([dataclasses.replace(receipts[0], bounds=(0, 1, 4)), *receipts[1:]], "different plans"),
        ([dataclasses.replace(r, bounds=(0, 9)) for r in receipts], "plan that there cannot be"),
        ([dataclasses.replace(r, bounds=()) for r in receipts], "plan that there cannot be"),
        ([dataclasses.replace(r, replicas=2**32 - 1) for r in receipts], "not one a worker"),
        ([dataclasses.replace(receipts[0], units=()), *receipts[1:]], "nobody signed for micro-batch 0"),
        ([dataclasses.replace(receipts[0], units=receipts[1].units), *receipts[1:]], "claimed twice"),
    ):
        with pytest.raises(FailureError, match=said):
            plan_of(changed, program)


def test_investigating_a_run_without_keys_ends_at_the_step() -> None:
    store = memory_store()
    job = tiny_job(store, steps=3)
    train(store, job, group=LocalGroup(faulty_builder(reference, [Fault(kind="rate", step=1)])))
    found = full_audit(store, "tiny", "reference")
    assert isinstance(found, Diverged)
    finding, _, _ = investigate(store, History.open(store, "tiny"), found, make=reference)
    assert [level.level for level in finding.path] == ["segment", "step"]
    assert "had no keys" in finding.reason
