"""Pinpoint: from a diverged segment down to the worker, the operator and the element, and who signed it.

    segment -> step -> unit -> call -> operator -> leaf -> element

Down to the unit the committed records tell: receipts say what every worker took, gave, summed and updated, and a replay
under the same plan says what it should have been. From there on the accused worker is asked. Its answers are signed and
checked against its receipt; the first place where they leave the replay's is where the fault is.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from runtime.feed import Batch
from runtime.plan import Plan
from runtime.program.program import Op, Program
from runtime.program.training import CHUNK, TrainingProgram
from runtime.program.types import NUMPY
from runtime.segments import History
from runtime.tracing import Call, additions
from storage import kernels, merkle
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import FailureError, TrueweightError, UsageError
from storage.identity import signed
from storage.records import Receipt, UnitRecord
from verification.audit import Diverged
from verification.replay import Replay
from verification.traces import REVEAL_DOMAIN, Answer, ReplayedTraces, TraceProvider


class NoReplay(FailureError):
    """The replay here, or the store below it, failed: it says nothing of any worker."""


SOFTWARE, HARDWARE, UNAVAILABLE, RECORD = "software or fraud", "hardware fault", "unavailable", "record"
"""What a divergence comes from: it repeats itself; it does not; nobody answered; the records contradict themselves."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the path: what should have been there, and what was."""

    level: str
    at: str
    expected: str
    actual: str


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element of one operator's output; `expected` and `actual` are (value, bits)."""

    operator: str
    """`input` for an input of the call."""
    number: int
    label: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    expected: tuple[Any, str]
    actual: tuple[Any, str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where a segment left the replay, as far down as it could be followed; `reason` says why no further."""

    run: str
    segment: int
    cause: str
    repeat: str
    reason: str
    path: tuple[Level, ...]
    worker: str = ""
    address: str = ""
    signature: str = ""
    element: Element | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The first thing in a step, in causal order, that a worker's receipt says otherwise than the replay."""

    worker: str
    what: str
    """`forward`, `backward`, `gradient`, `reduce`, `square` or `update`."""
    field: str
    micro_batch: int | None
    expected: str
    actual: str

    @property
    def scopes(self) -> tuple[str, ...]:
        """Below which places the calls that made it are."""
        if self.micro_batch is not None:
            return (f"micro-batch {self.micro_batch}/",)
        return {
            "gradient": ("micro-batch ", "gradient"),
            "reduce": ("total/", "reduce/"),
            "square": ("square/",),
            "update": ("update/",),
        }[self.what]

    def __str__(self) -> str:
        of = self.what if self.micro_batch is None else f"micro-batch {self.micro_batch}, {self.what}"
        return f"{self.worker}, {of}: {self.field}"


# ------------------------------------------------------------------------------------------------------- the plan


def plan_of(receipts: Sequence[Receipt], program: TrainingProgram) -> Plan:
    """The plan that a step's receipts were signed under; FailureError where they do not agree on one."""
    if not receipts:
        raise FailureError("the step has no receipts: its workers had no keys, so nobody can be named")
    bounds, stages = receipts[0].bounds, len(receipts[0].bounds) - 1
    if any(receipt.bounds != bounds for receipt in receipts):
        raise FailureError("the step's receipts speak of different plans; nobody can be named")
    whole = list(bounds) == sorted(set(bounds)) and bounds[:1] == (0,) and bounds[-1] == len(program.blocks)
    teams: list[list[Receipt]] = [[] for _ in range(stages)]
    for receipt in receipts:
        try:
            stage = Plan.place(receipt.worker)[0] if whole else stages
            teams[stage].append(receipt)
        except (ValueError, IndexError):
            raise FailureError(
                "the step's receipts speak of a plan that there cannot be; nobody can be named"
            ) from None
    plan = Plan(bounds=bounds, replicas=tuple(map(len, teams)), units=((0,) * program.micro_batches,) * stages)
    agree = all(receipt.replicas == len(team) for team in teams for receipt in team)
    if not agree or sorted(receipt.worker for receipt in receipts) != sorted(plan.workers):
        raise FailureError("the step's receipts are not one a worker of their plan; nobody can be named")
    return replace(plan, units=tuple(_units_of(team, plan, program.micro_batches) for team in teams))


def _units_of(team: Sequence[Receipt], plan: Plan, micro_batches: int) -> tuple[int, ...]:
    """The replica that signed for each micro-batch in one stage."""
    units: dict[int, int] = {}
    for receipt in team:
        for unit in receipt.units:
            if unit.micro_batch >= micro_batches or unit.micro_batch in units:
                raise FailureError(f"micro-batch {unit.micro_batch} is claimed twice, or there is none; see `show`")
            units[unit.micro_batch] = plan.place(receipt.worker)[1]
    if len(units) != micro_batches:
        missing = min(set(range(micro_batches)) - set(units))
        raise FailureError(f"nobody signed for micro-batch {missing}; nobody can be named")
    return tuple(units[m] for m in range(micro_batches))


def first_unit(expected: Mapping[str, Receipt], signed: Mapping[str, Receipt], plan: Plan) -> Unit | None:
    """The first difference of a step's receipts from what a replay claims, in causal order; None without one."""
    for worker, what, name, micro_batch in _causal(plan):
        values = [_of(receipts[worker], name, micro_batch) for receipts in (expected, signed)]
        if values[0] != values[1]:
            shown = [value.hex() if isinstance(value, bytes) else str(value) for value in values]
            return Unit(
                worker=worker, what=what, field=name, micro_batch=micro_batch, expected=shown[0], actual=shown[1]
            )
    return None


def _causal(plan: Plan) -> Iterator[tuple[str, str, str, int | None]]:
    """(worker, what, field, micro-batch) of everything that receipts say, causes before effects."""
    last = len(plan.stages) - 1
    for stage in range(last + 1):
        for m, replica in enumerate(plan.units[stage]):
            worker = plan.worker(stage, replica)
            yield worker, "forward", "x", m
            yield worker, "forward", "y", m
    for stage in range(last, -1, -1):
        for m, replica in enumerate(plan.units[stage]):
            worker = plan.worker(stage, replica)
            yield worker, "backward", "dy", m
            yield worker, "backward", "dx", m
    for what, fields in (
        ("gradient", ("gradient_root",)),
        ("reduce", ("reduced_root", "exponent")),
        ("square", ("square",)),
        ("update", ("updated_root",)),
    ):
        for worker in plan.workers:
            for name in fields:
                yield worker, what, name, None


def _of(receipt: Receipt, name: str, micro_batch: int | None) -> Any:
    if micro_batch is None:
        return getattr(receipt, name)
    units: dict[int, UnitRecord] = {unit.micro_batch: unit for unit in receipt.units}
    return getattr(units[micro_batch], name) if micro_batch in units else NO_DIGEST


# ------------------------------------------------------------------------------------------------------- narrowing


@dataclass(kw_only=True)
class Narrowing:
    """One step under investigation: the replay's traces against those of the worker who is asked."""

    history: History
    segment: int
    step: int
    program: TrainingProgram
    receipts: Sequence[Receipt]
    ask: Callable[[Plan], tuple[TraceProvider | None, TraceProvider | None]]
    """(the replay, the accused) once the plan is known."""
    batch: Callable[[int], Batch] | None = None
    """The batch of a step, for evidence of what was taken in its place."""
    observe: Callable[[str], None] = lambda _: None
    path: list[Level] = field(default_factory=list)
    ours: TraceProvider = field(init=False)
    theirs: TraceProvider | None = field(init=False, default=None)
    answers: dict[str, Any] = field(default_factory=dict)
    """What evidence is made from: the receipt, the answers, the leaves."""

    def finding(self, found: Diverged) -> Finding:
        """The finding for a step whose replay differs at `found`."""
        self._level("segment", f"segment {self.segment}", "", "")
        self._level("step", f"step {self.step}, {found.path.rpartition('/')[2]}", found.expected, found.actual)
        try:
            plan = plan_of(self.receipts, self.program)
        except FailureError as error:
            return self._end(RECORD, "unavailable", str(error))
        signed_by = {receipt.worker: receipt for receipt in self.receipts}
        self.observe(f"step {self.step}: what {len(signed_by)} workers signed, against a replay on the same plan")
        ours, self.theirs = self.ask(plan)
        assert ours is not None
        self.ours = ours
        unit = first_unit(self._mine("claims"), signed_by, plan)
        if unit is None:
            reason = "every worker's receipt is right, and the step record is not what they signed: ask who wrote it"
            return self._end(RECORD, "repeats", reason)
        receipt = signed_by[unit.worker]
        self.answers |= {"receipt": receipt, "unit": unit, "plan": plan}
        self._level("unit", str(unit), unit.expected, unit.actual)
        return self._asked(unit, receipt)

    def _asked(self, unit: Unit, receipt: Receipt) -> Finding:
        if self.theirs is None:
            return self._end(UNAVAILABLE, "unavailable", "nobody was there to ask", receipt)
        self.observe(f"asking {unit.worker} to repeat step {self.step}")
        try:
            again = self.theirs.claims()[unit.worker]
            if replace(again, address=receipt.address, signature=receipt.signature) != receipt:
                reason = "the worker, asked again, does not repeat what it signed: a fault of its memory or processor"
                return self._end(HARDWARE, "differs", reason, receipt)
            return self._narrowed(unit, receipt)
        except NoReplay as error:
            return self._end(UNAVAILABLE, "unavailable", str(error), receipt)
        except Exception as error:  # noqa: BLE001 (whatever keeps an answer away proves nothing)
            return self._end(UNAVAILABLE, "unavailable", f"{unit.worker} does not answer: {_said(error)}", receipt)

    def _narrowed(self, unit: Unit, receipt: Receipt) -> Finding:
        assert self.theirs is not None
        scopes = unit.scopes
        scope = scopes[0] if len(scopes) == 1 else ""
        pairs = [
            [call for call in map(_call, answer.items) if call.place.startswith(self._below(scopes))]
            for answer in self._both("calls", unit.worker, scope, receipt)
        ]
        if scope.startswith("micro-batch "):
            pairs = [[call for call in calls if not call.place.endswith("/sum")] for calls in pairs]
        for mine, other in _longest(*pairs):
            if mine == other:
                continue
            if mine is None or other is None or (mine.place, mine.program) != (other.place, other.program):
                at = (mine or other).place  # type: ignore[union-attr]
                self._level("call", at, "made" if mine else "not made", "made" if other else "not made, or another")
                return self._end(SOFTWARE, "repeats", "a call was left out or is not one of the Programs'", receipt)
            self.answers |= {"call": encode(other), "place": mine.place}
            return self._call(unit, receipt, mine, other)
        reason = "the calls that the worker reveals give the replay's values, and not what it signed"
        return self._end(SOFTWARE, "repeats", reason, receipt)

    def _call(self, unit: Unit, receipt: Receipt, mine: Call, other: Call) -> Finding:
        program = self._program_at(mine)
        place = mine.place.partition("/")[2]
        for k, (expected, actual) in enumerate(zip(mine.inputs, other.inputs, strict=True)):
            if expected != actual:
                name = program.inputs[k][0] if program else str(k)
                self._level("call", f"{mine.place}, input {name}", expected.hex(), actual.hex())
                return self._value(unit, receipt, place, program, k, None)
        self._level("call", mine.place, _shown(mine.outputs, other.outputs, 0), _shown(mine.outputs, other.outputs, 1))
        if program is None:
            return self._end(SOFTWARE, "repeats", "the call is of no Program that the run committed to", receipt)
        ours, theirs = self._both("operators", unit.worker, place, receipt)
        first = len(program.inputs)
        if len(theirs.items) != len(program.ops):
            return self._end(
                SOFTWARE, "repeats", f"{len(theirs.items)} operators revealed of {len(program.ops)}", receipt
            )
        for value, claimed in zip(program.outputs, other.outputs, strict=True):
            if value >= first and theirs.items[value - first] != claimed:
                return self._end(SOFTWARE, "repeats", "the operators revealed do not give the call's output", receipt)
        for number, (expected, actual) in enumerate(zip(ours.items, theirs.items, strict=True)):
            if expected != actual:
                op = program.ops[number]
                self._level("operator", f"{number} {op.name} ({self._label(place, op)})", expected.hex(), actual.hex())
                return self._value(unit, receipt, place, program, first + number, op)
        return self._end(SOFTWARE, "repeats", "the operators revealed are the replay's, the call is not", receipt)

    def _value(
        self, unit: Unit, receipt: Receipt, place: str, program: Program | None, value: int, op: Op | None
    ) -> Finding:
        """Down to the leaf and the element of a value that differs."""
        assert self.theirs is not None
        if program is None:
            return self._end(SOFTWARE, "repeats", "the call is of no Program that the run committed to", receipt)
        ours = self._mine("leaves", unit.worker, place, value)
        theirs = self.theirs.leaves(unit.worker, place, value)
        digest = bytes.fromhex(self.path[-1].actual)
        if len(ours) != len(theirs) or merkle.root(theirs) != digest:
            return self._end(SOFTWARE, "repeats", "the leaves revealed do not hash to what the worker said", receipt)
        leaf = next(number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        self._level("leaf", f"leaf {leaf} of {len(ours)}", ours[leaf].hex(), theirs[leaf].hex())
        mine = self._mine("leaf", unit.worker, place, value, leaf)
        other = self.theirs.leaf(unit.worker, place, value, leaf)
        if kernels.leaf_hashes(other) != theirs[leaf] or len(other) != len(mine):
            return self._end(SOFTWARE, "repeats", "the leaf revealed does not hash to what the worker said", receipt)
        self.answers |= {"value": value, "leaf": leaf, "program": program}
        element = _element(program, value, leaf, mine, other, self._label(place, op) if op else "")
        at = f"[{', '.join(map(str, element.index))}]"
        self._level(
            "element",
            at,
            f"{element.expected[0]} ({element.expected[1]})",
            f"{element.actual[0]} ({element.actual[1]})",
        )
        return replace(self._end(SOFTWARE, "repeats", "", receipt), element=element)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _both(self, method: str, worker: str, what: str, receipt: Receipt) -> tuple[Answer, Answer]:
        """Our answer and the worker's, which it has signed."""
        assert self.theirs is not None
        self.observe(f"{method} of {worker}, {what or 'the whole step'}")
        answers: list[Answer] = [self._mine(method, worker, what), getattr(self.theirs, method)(worker, what)]
        reveal, said = answers[1].reveal, (self.history.run_digest, self.step, worker, receipt.address)
        if (
            reveal is None
            or (reveal.run, reveal.step, reveal.worker, reveal.address) != said
            or (reveal.question, reveal.answer) != (f"{method} {what}", merkle.list_root(answers[1].items))
            or not signed(REVEAL_DOMAIN, reveal)
        ):
            raise FailureError("its answer is not signed by the key of its receipt")
        self.answers[method] = answers[1]
        return answers[0], answers[1]

    def _mine(self, method: str, *question: Any) -> Any:
        """The replay's own answer; NoReplay where it has none, so that no worker is blamed for that."""
        try:
            return getattr(self.ours, method)(*question)
        except Exception as error:
            raise NoReplay(f"the replay here has no answer to {method!r}: {_said(error)}; pinpoint again") from error

    def _below(self, scopes: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"step {self.step}/{scope}" for scope in scopes)

    def _program_at(self, call: Call) -> Program | None:
        """The Program of a call; None where the run has none of that root."""
        for program in self.program.programs:
            if program.root == call.program:
                return program
        place = call.place.split("/")
        lengths = self._lengths(place)
        parts = {"sum": 2, "gradient": 1}.get(place[-1], len(call.inputs))
        made = additions(lengths, parts)
        return made if made.root == call.program else None

    def _lengths(self, place: Sequence[str]) -> tuple[int, ...]:
        """The elements of what a call adds: the parameters of a block, the tensors of a stage, a chunk."""
        sizes = {spec.name: int(np.prod(spec.shape, dtype=np.int64)) for spec in self.program.tensors}
        if place[-1] == "sum":
            block = int(place[-2].removeprefix("block "))
            return tuple(sizes[name] for name in self.program.blocks[block].tensors)
        if place[-1] == "gradient":
            plan: Plan = self.answers["plan"]
            stage, _ = plan.place(self.answers["unit"].worker)
            names = {name for block in plan.stages[stage] for name in self.program.blocks[block].tensors}
            return tuple(sizes[name] for name in sorted(names))
        size, part = sizes["/".join(place[2:-1])], int(place[-1])
        return (min(CHUNK, size - part * CHUNK),)

    def _label(self, place: str, op: Op) -> str:
        block = next((part for part in place.split("/") if part.startswith("block ")), "")
        return f"blocks.{block.removeprefix('block ')}.{op.label}" if block else op.label or place

    def _level(self, level: str, at: str, expected: str, actual: str) -> None:
        self.path.append(Level(level=level, at=at, expected=expected, actual=actual))
        self.observe(f"{level}: {at}")

    def _end(self, cause: str, repeat: str, reason: str, receipt: Receipt | None = None) -> Finding:
        return Finding(
            run=self.history.name,
            segment=self.segment,
            cause=cause,
            repeat=repeat,
            reason=reason,
            path=tuple(self.path),
            worker=receipt.worker if receipt else "",
            address=f"0x{receipt.address.hex()}" if receipt else "",
            signature=receipt.signature.hex() if receipt else "",
        )


def _said(error: BaseException) -> str:
    told = str(error)
    return told if isinstance(error, TrueweightError) and told else f"{type(error).__name__}: {told}"


def _call(data: bytes) -> Call:
    return decode(Call, data)


def _longest(mine: Sequence[Call], other: Sequence[Call]) -> Iterator[tuple[Call | None, Call | None]]:
    for number in range(max(len(mine), len(other))):
        yield (mine[number] if number < len(mine) else None, other[number] if number < len(other) else None)


def _shown(mine: Sequence[bytes], other: Sequence[bytes], which: int) -> str:
    """The first output that differs, of the one side or the other."""
    for pair in zip(mine, other, strict=True):
        if pair[0] != pair[1]:
            return pair[which].hex()
    return ""


def _element(program: Program, value: int, leaf: int, mine: bytes, other: bytes, label: str) -> Element:
    """The first element in which two leaves of a value differ; `label` says where an operator's output comes from."""
    first, kind = len(program.inputs), program.types[value]
    dtype = NUMPY[kind.dtype]
    at = next(n for n, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]) // dtype.itemsize
    flat = leaf * merkle.LEAF_BYTES // dtype.itemsize + at
    part = slice(at * dtype.itemsize, (at + 1) * dtype.itemsize)
    values = [(np.frombuffer(data[part], dtype)[0].item(), f"0x{data[part][::-1].hex()}") for data in (mine, other)]
    return Element(
        operator=program.ops[value - first].name if value >= first else "input",
        number=value - first if value >= first else value,
        label=label or program.inputs[value][0],
        index=tuple(int(i) for i in np.unravel_index(flat, kind.shape)) if kind.shape else (),
        shape=kind.shape,
        expected=values[0],
        actual=values[1],
    )


# ------------------------------------------------------------------------------------------------------- from an audit

Ask = Callable[[int, int, Plan], TraceProvider | None]
"""Who answers about a step of a segment that was made under a plan; None where nobody does."""

_PATH = re.compile(r"segment (?P<segment>\d+)(/step (?P<step>\d+)/(?P<fact>loss|gradient_root|state_root))?(/.*)?")


def pinpoint(
    history: History,
    found: Diverged,
    program: TrainingProgram,
    *,
    ours: Ask,
    theirs: Ask,
    batch: Callable[[int], Batch] | None = None,
    observe: Callable[[str], None] = lambda _: None,
) -> tuple[Finding, Narrowing | None]:
    """The finding for what an audit found, and what was asked on the way; `theirs` is the side of the accused.

    What the records contradict by themselves, such as a receipt that nobody signed, ends where the audit ended. What
    keeps the search from its end is `unavailable`, and names a worker only where it was that worker who did not answer.
    """
    try:
        return _pinpointed(history, found, program, ours=ours, theirs=theirs, batch=batch, observe=observe)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 (a store or a replay that fails says nothing of any worker)
        at = _PATH.fullmatch(found.path)
        level = Level(level="record", at=found.path, expected=found.expected, actual=found.actual)
        return Finding(
            run=history.name,
            segment=int(at["segment"]) if at else 0,
            cause=UNAVAILABLE,
            repeat="unavailable",
            reason=_said(error),
            path=(level,),
        ), None


def _pinpointed(
    history: History,
    found: Diverged,
    program: TrainingProgram,
    *,
    ours: Ask,
    theirs: Ask,
    batch: Callable[[int], Batch] | None,
    observe: Callable[[str], None],
) -> tuple[Finding, Narrowing | None]:
    at = _PATH.fullmatch(found.path)
    if at is None or at["step"] is None:
        levels = [Level(level="record", at=found.path, expected=found.expected, actual=found.actual)]
        return Finding(
            run=history.name,
            segment=int(at["segment"]) if at else 0,
            cause=RECORD,
            repeat="unavailable",
            reason="the records contradict themselves, the recipe or the data: whoever wrote them answers for it",
            path=tuple(levels),
            worker=found.path.rpartition("receipt of ")[2] if "receipt of " in found.path else "",
        ), None
    index, step = int(at["segment"]), int(at["step"])
    segment = history.segments()[index]
    receipts = [decode(Receipt, item) for item in history.items(segment.receipts_object)]
    receipts = [receipt for receipt in receipts if receipt.step == step]
    narrowing = Narrowing(
        history=history,
        segment=index,
        step=step,
        program=program,
        receipts=receipts,
        ask=lambda plan: (ours(index, step, plan), theirs(index, step, plan)),
        batch=batch,
        observe=observe,
    )
    return narrowing.finding(found), narrowing


def traces_at(
    history: History,
    segment: int,
    step: int,
    make: Callable[[], Replay],
    observe: Callable[[str], None] = lambda _: None,
) -> ReplayedTraces:
    """A replay of traced workers at the state before a step, which it reaches from the checkpoint before a segment."""
    replay = make()
    if segment:
        replay.load(history.segments()[segment].prestate)
    else:
        replay.initial()
    for earlier in range(replay.feed.segment(segment).start, step):
        observe(f"replaying step {earlier}")
        replay.step(earlier)
    return ReplayedTraces(replay, history.run_digest, step)
