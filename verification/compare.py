"""Two runs of one recipe: the first place where they differ, without replaying anything.

    recipe -> Programs -> data -> initial state -> segment -> step -> unit     and beside it: tensor -> leaf -> element

Everything is read from records, receipts and manifests, so it costs kilobytes, and one frame a side for the element.
What placement changes (events, receipts' plans) is no difference; a unit is compared where both plans have a stage
boundary. Nobody is right here: who is, a replay says (`judge`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np

from runtime.data import DatasetRecord
from runtime.plan import Plan
from runtime.program.program import Op, Program
from runtime.program.training import TrainingProgram
from runtime.segments import History, Position
from storage import merkle
from storage.checkpoints import open_checkpoint
from storage.codec import NO_DIGEST, decode
from storage.errors import FailureError, TrueweightError, UsageError
from storage.foreign import parse_json
from storage.frames import FRAME_BYTES
from storage.identity import receipt_signer_ok
from storage.manifest import itemsize, tensor_bytes
from storage.records import Receipt, SegmentRecord, StepRecord
from storage.store import Store
from verification.audit import FACTS, FAILURES, Diverged
from verification.pinpoint import Unit, first_unit, plan_of
from verification.replay import Replay

LABELS = ("name", "faults")
"""Keys of a recipe that change no bit."""
OPERATOR_SHOWN = 160


@dataclass(frozen=True, kw_only=True)
class Place:
    """One level of the path, and what either run has there; "" where the level only leads on."""

    level: str
    at: str
    a: str = ""
    b: str = ""


@dataclass(frozen=True, kw_only=True)
class UnitDifference:
    """The first thing that both runs' workers signed for and that differs.

    `direction` is `forward` or `backward`, or what the whole worker did: `gradient`, `reduce`, `square`, `update`.
    `blocks` are the blocks between the stage boundaries that both runs have; `a` and `b` the values.
    """

    step: int
    micro_batch: int | None
    blocks: range
    direction: str
    field: str
    a: str
    b: str
    signers: tuple[tuple[str, ...], tuple[str, ...]]
    """`s0r1 0x12...` for every worker of either run that signed for it."""

    def __str__(self) -> str:
        span = f"blocks {self.blocks[0]} to {self.blocks[-1]}" if len(self.blocks) > 1 else f"block {self.blocks[0]}"
        of = "" if self.micro_batch is None else f"micro-batch {self.micro_batch}, "
        return f"{of}{span}, {self.direction}: {self.field}"


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Both runs have the same facts as far as both go."""


@dataclass(frozen=True, kw_only=True)
class Differ:
    """The runs differ at `path`, the first place in causal order. `reason` says why it could be followed no further.

    `state` leads to the first element of the first state that is kept after the difference.
    """

    path: str
    levels: tuple[Place, ...]
    state: tuple[Place, ...] = ()
    unit: UnitDifference | None = None
    segment: int | None = None
    step: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Incomparable:
    """The comparison could not be made, or not to its end; `reason` names the object that is missing."""

    reason: str


Outcome = Equal | Differ | Incomparable


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What comparing two runs gave. `steps` are equal in both, `units` are the signed values among them.

    `lengths` are the steps that either run has; `notes` what differs and changes no bit, or could not be compared.
    """

    runs: tuple[str, str]
    lengths: tuple[int, int]
    steps: int
    units: int
    notes: tuple[str, ...]
    outcome: Outcome


def compare(
    a: Store, name: str, b: Store, other: str, *, observe: Callable[[str], None] = lambda _: None
) -> Comparison:
    """The comparison of run `name` of store `a` with run `other` of store `b`; UsageError where one is not there."""
    work = _Work(names=(name, other), observe=observe)
    outcome: Outcome
    try:
        histories = [History.open(store, run) for store, run in ((a, name), (b, other))]
    except UsageError:
        raise
    except FAILURES as error:
        return work.told(Incomparable(reason=_reason(error)))
    try:
        outcome = work.difference(*histories) or Equal()
        if outcome == Equal() and not min(work.lengths):
            none = "A" if not work.lengths[0] else "B"
            outcome = Incomparable(reason=f"run {none} has not done a step yet")
        elif outcome == Equal() and work.unread:
            outcome = Incomparable(reason=work.unread)
    except FAILURES as error:
        outcome = Incomparable(reason=_reason(error))
    return work.told(outcome)


class _Side:
    """One run's records, read as they are needed; the segment after the last one is the unfinished one."""

    def __init__(self, history: History) -> None:
        self.history, self.store = history, history.store
        self.segments: list[SegmentRecord] = history.segments()
        self.open: Position = history.position()

    @cached_property
    def program(self) -> TrainingProgram:
        """The run's Programs."""
        return TrainingProgram.decode(self.store.get(self.history.run.programs))

    def steps(self, index: int) -> list[StepRecord]:
        """The records of a segment's steps."""
        whole = index < len(self.segments)
        items = self.history.items(self.segments[index].steps_object) if whole else self.open.steps
        return [decode(StepRecord, item) for item in items]

    def receipts(self, index: int) -> list[Receipt]:
        """The receipts of a segment's steps."""
        whole = index < len(self.segments)
        items = self.history.items(self.segments[index].receipts_object) if whole else self.open.receipts
        return [decode(Receipt, item) for item in items]

    def prestate(self, index: int) -> bytes:
        """The state that a segment starts from."""
        return self.segments[index - 1].poststate if index else self.history.run.initial_state

    def poststate(self, index: int) -> bytes:
        """The state that is kept after a segment's last step."""
        return self.segments[index].poststate if index < len(self.segments) else self.open.poststate


class _Work:
    """A comparison under way."""

    def __init__(self, names: tuple[str, str], observe: Callable[[str], None]) -> None:
        self.names, self.observe = names, observe
        self.lengths, self.steps, self.units = (0, 0), 0, 0
        self.notes: list[str] = []
        self.unread = ""
        """Why receipts could not be read: without them no more than the facts is known to be equal."""

    def told(self, outcome: Outcome) -> Comparison:
        return Comparison(
            runs=self.names,
            lengths=self.lengths,
            steps=self.steps,
            units=self.units,
            notes=tuple(dict.fromkeys(self.notes)),
            outcome=outcome,
        )

    def difference(self, first: History, second: History) -> Differ | None:
        """The first difference down the hierarchy."""
        if first.run.recipe != second.run.recipe and (found := self._recipes(first, second)):
            return found
        a, b = _Side(first), _Side(second)
        self.lengths = a.open.next_step, b.open.next_step
        runs = a.history.run, b.history.run
        if runs[0].version != runs[1].version:
            self.notes.append(f"started by Trueweight {runs[0].version} and {runs[1].version}")
        if runs[0].engine != runs[1].engine:
            return Differ(path="engine", levels=(Place(level="engine", at="", a=runs[0].engine, b=runs[1].engine),))
        if runs[0].program_root != runs[1].program_root:
            return _program_difference(a.program, b.program, runs[0].program_root, runs[1].program_root)
        return self._data(a, b) or self._initial(a, b) or self._segments(a, b)

    def _recipes(self, first: History, second: History) -> Differ | None:
        tables = [_flat(parse_json(history.store.get(history.run.recipe))) for history in (first, second)]
        keys = [key for key in sorted(set(tables[0]) | set(tables[1])) if tables[0].get(key) != tables[1].get(key)]
        for key in set(keys) & set(LABELS):
            self.notes.append(f"{key} of the recipe differs, which changes no bit")
        levels = tuple(
            Place(level="recipe", at=key, a=_json(tables[0].get(key)), b=_json(tables[1].get(key)))
            for key in keys
            if key not in LABELS
        )
        return Differ(path=f"recipe/{levels[0].at}", levels=levels) if levels else None

    def _data(self, a: _Side, b: _Side) -> Differ | None:
        roots = [side.history.run.data for side in (a, b)]
        if roots[0] == roots[1]:
            return None
        levels = [Place(level="data", at="data root", a=roots[0].hex(), b=roots[1].hex())]
        records, reason = _tried(
            lambda: [decode(DatasetRecord, side.store.get(root)) for side, root in zip((a, b), roots, strict=True)]
        )
        for name in vars(records[0]) if records else ():
            values = [getattr(record, name) for record in records or ()]
            if values[0] != values[1]:
                levels.append(Place(level="dataset", at=name, a=_shown(values[0]), b=_shown(values[1])))
                break
        return Differ(path="data", levels=tuple(levels), reason=reason)

    def _initial(self, a: _Side, b: _Side) -> Differ | None:
        roots = a.history.run.initial_state, b.history.run.initial_state
        if roots[0] == roots[1]:
            return None
        state, reason = _tried(lambda: state_difference(a.store, roots[0], b.store, roots[1]))
        top = Place(level="state", at="initial state", a=roots[0].hex(), b=roots[1].hex())
        return Differ(path="initial_state", levels=(top,), state=(top, *(state or ())), reason=reason)

    def _segments(self, a: _Side, b: _Side) -> Differ | None:
        if self.lengths[0] != self.lengths[1]:
            both = min(self.lengths)
            self.notes.append(f"A has {self.lengths[0]} steps, B {self.lengths[1]}: compared the first {both}")
        for index in range(min(len(a.segments), len(b.segments)) + 1):
            sides = a.steps(index), b.steps(index)
            steps = list(zip(*sides, strict=False))
            if not steps:
                break
            receipts, why = _tried(partial(_receipts, a, b, index))
            self.unread = self.unread or why
            ends = (a.poststate(index), b.poststate(index)) if len(sides[0]) == len(sides[1]) else None
            for records in steps:
                signed = [part.get(records[0].step, []) for part in receipts or ()]
                found = self._step(a, b, index, records, signed)
                if found:
                    return self._followed(a, b, found, steps[-1][0].step, ends)
                self.steps += 1
            self.observe(f"segment {index}: {len(steps)} steps are equal")
            if ends and ends[0] != ends[1]:
                level = Place(level="segment", at=f"segment {index}, poststate", a=ends[0].hex(), b=ends[1].hex())
                found = Differ(path=f"segment {index}/poststate", levels=(level,), segment=index)
                return self._followed(a, b, found, steps[-1][0].step, ends)
        return None

    def _step(
        self, a: _Side, b: _Side, index: int, records: Sequence[StepRecord], signed: Sequence[list[Receipt]]
    ) -> Differ | None:
        """The difference in one step: of its facts, of what was signed, of who signed."""
        step, path = records[0].step, f"segment {index}/step {records[0].step}"
        values = [[getattr(record, name) for name in FACTS] for record in records]
        fact = next((name for name, x, y in zip(FACTS, *values, strict=True) if x != y), "")
        unit, reason = None, self.unread
        if signed:
            found, reason = _tried(lambda: _unit_difference(step, signed, a.program))
            unit, compared = found or (None, 0)
            self.units += compared
        if not fact and unit is None:
            if reason:
                self.notes.append(f"units were not compared: {reason}")
            return self._signatures(a, b, index, step, signed) if signed else None
        shown = [_shown(getattr(record, fact)) for record in records] if fact else ["", ""]
        at = f"step {step}, {fact}" if fact else f"step {step}"
        levels = [Place(level="segment", at=f"segment {index}"), Place(level="step", at=at, a=shown[0], b=shown[1])]
        if unit is not None:
            levels.append(Place(level="unit", at=str(unit), a=unit.a, b=unit.b))
        elif not reason:
            reason = "what both runs' workers signed is equal: the difference is between the boundaries that they share"
        path += f"/{fact or unit}"
        return Differ(path=path, levels=tuple(levels), unit=unit, segment=index, step=step, reason=reason)

    def _followed(self, a: _Side, b: _Side, found: Differ, last: int, ends: tuple[bytes, bytes] | None) -> Differ:
        """The difference with the first element in which the states after the segment's last step differ."""
        if ends is None:
            reason = "the runs end at other steps of this segment, so no state of one step is kept by both"
            return replace(found, reason="; ".join(part for part in (found.reason, reason) if part))
        if ends[0] == ends[1]:
            return found
        state, reason = _tried(lambda: state_difference(a.store, ends[0], b.store, ends[1]))
        top = Place(level="state", at=f"state after step {last}", a=ends[0].hex(), b=ends[1].hex())
        reason = "; ".join(part for part in (found.reason, reason) if part)
        return replace(found, state=(top, *(state or ())), reason=reason)

    def _signatures(self, a: _Side, b: _Side, index: int, step: int, signed: Sequence[list[Receipt]]) -> Differ | None:
        """A receipt that its address did not sign, or of another run: nothing an honest worker makes."""
        for number, (side, receipts) in enumerate(zip((a, b), signed, strict=True)):
            for receipt in receipts:
                if receipt.run == side.history.run_digest and receipt_signer_ok(receipt):
                    continue
                others = [_signer(one) for one in signed[1 - number] if one.worker == receipt.worker]
                said = [f"not signed by 0x{receipt.address.hex()}", *others, "no such receipt"][:2]
                at = f"receipt of {receipt.worker}"
                shown = said if number == 0 else said[::-1]
                levels = (
                    Place(level="segment", at=f"segment {index}"),
                    Place(level="step", at=f"step {step}, {at}", a=shown[0], b=shown[1]),
                )
                return Differ(path=f"segment {index}/step {step}/{at}", levels=levels, segment=index, step=step)
        return None


# ---------------------------------------------------------------------------------------------------------- Programs


def _program_difference(a: TrainingProgram, b: TrainingProgram, root: bytes, other: bytes) -> Differ:
    """The first Program that differs, in the order in which a step runs them, and its first operator that does."""
    top = Place(level="program", at="program root", a=root.hex(), b=other.hex())
    for at, mine, its in (
        ("tensors", [spec.name for spec in a.tensors], [spec.name for spec in b.tensors]),
        ("blocks", [block.tensors for block in a.blocks], [block.tensors for block in b.blocks]),
        ("optimiser slots", a.slots, b.slots),
        ("micro-batches", a.micro_batches, b.micro_batches),
    ):
        if mine != its:
            level = Place(level="program", at=at, a=_shown(mine), b=_shown(its))
            return Differ(path=f"program/{at}", levels=(top, level))
    for (at, one), (_, two) in zip(_programs(a), _programs(b), strict=False):
        if one.root != two.root:
            levels = (top, Place(level="program", at=at, a=one.root.hex(), b=two.root.hex()), _operator(one, two))
            return Differ(path=f"program/{at}/{levels[2].at}", levels=levels)
    return Differ(path="program", levels=(top,), reason="the Programs are equal, which tensor each is for is not")


def _programs(program: TrainingProgram) -> Iterator[tuple[str, Program]]:
    sized = program.programs
    for spec in program.tensors:
        for row in spec.initial:
            yield f"initial {spec.name}, {row.elements} elements", sized[row.program]
    for number in range(len(program.blocks)):
        yield f"block {number}, forward", program.kind_of(number).forward
    yield "loss", program.loss
    for number in reversed(range(len(program.blocks))):
        yield f"block {number}, backward", program.kind_of(number).backward
    for what, table in (("exponent", program.header.exponent), ("square", program.header.square)):
        for row in table:
            yield f"{what}, {row.elements} elements", sized[row.program]
    for spec in program.tensors:
        for row in spec.update:
            yield f"update {spec.name}, {row.elements} elements", sized[row.program]
    for number in range(len(program.blocks)):
        yield f"block {number}, evaluate", program.kind_of(number).evaluate
    yield "metric", program.metric


def _operator(a: Program, b: Program) -> Place:
    """The first operator in which two Programs differ, else what else does."""
    if a.inputs != b.inputs:
        return Place(level="operator", at="inputs", a=_shown(a.inputs), b=_shown(b.inputs))
    for number, (one, two) in enumerate(zip_longest(a.ops, b.ops)):
        if one != two:
            return Place(level="operator", at=f"operator {number}", a=_op(one), b=_op(two))
    return Place(level="operator", at="outputs", a=_shown(a.outputs), b=_shown(b.outputs))


def _op(op: Op | None) -> str:
    if op is None:
        return "none"
    given = "".join(f", {key} {_shown(value)}" for key, value in op.attributes.items())
    label = f" ({op.label})" if op.label else ""
    return f"{op.name} of {', '.join(map(str, op.inputs)) or 'nothing'}{given} -> {op.type}{label}"[:OPERATOR_SHOWN]


# -------------------------------------------------------------------------------------------------------- the states


def state_difference(a: Store, root: bytes, b: Store, other: bytes) -> tuple[Place, ...]:
    """Tensor, leaf and element in which two stored states first differ, by name; () where they are one state.

    Reads both manifests, and of either checkpoint the one frame that differs.
    """
    if root == other:
        return ()
    one, two = open_checkpoint(a, root), open_checkpoint(b, other)
    if one.names != two.names:
        name = min(set(one.names) ^ set(two.names))
        there = ["there" if name in side.names else "not there" for side in (one, two)]
        return (Place(level="tensor", at=name, a=there[0], b=there[1]),)
    entries = list(zip(one.manifest.tensors, two.manifest.tensors, strict=True))
    differing = [number for number, (mine, its) in enumerate(entries) if mine != its]
    number = differing[0]
    mine, its = entries[number]
    at = f"{mine.name}, the first of {len(differing)} that differ of {len(entries)}"
    if (mine.dtype, mine.shape) != (its.dtype, its.shape):
        shown = [f"{entry.dtype} {list(entry.shape)}" for entry in (mine, its)]
        return (Place(level="tensor", at=at, a=shown[0], b=shown[1]),)
    levels = [Place(level="tensor", at=at, a=mine.root.hex(), b=its.root.hex())]
    size, length = itemsize(mine), tensor_bytes(mine)
    frames = [
        side.manifest.frames["root"][side.manifest.first[number] : side.manifest.first[number + 1]]
        for side in (one, two)
    ]
    frame = int((frames[0] != frames[1]).any(axis=1).argmax())
    start = frame * FRAME_BYTES // size
    stop = min(start + FRAME_BYTES // size, length // size)
    parts = [side.load_range(mine.name, start, stop) for side in (one, two)]
    element, *found = first_element(*parts)
    leaf = element * size // merkle.LEAF_BYTES
    within = slice(leaf * merkle.LEAF_BYTES, (leaf + 1) * merkle.LEAF_BYTES)
    hashes = [merkle.leaf_hash(part.view(np.uint8)[within].tobytes()).hex() for part in parts]
    name = f"leaf {frame * merkle.CHUNK_LEAVES + leaf} of {-(-length // merkle.LEAF_BYTES)}"
    levels.append(Place(level="leaf", at=name, a=hashes[0], b=hashes[1]))
    index = np.unravel_index(start + element, mine.shape) if mine.shape else ()
    shown = [f"{value} ({bits})" for value, bits in found]
    levels.append(Place(level="element", at=f"[{', '.join(map(str, index))}]", a=shown[0], b=shown[1]))
    return tuple(levels)


def first_element(a: np.ndarray, b: np.ndarray) -> tuple[int, tuple[Any, str], tuple[Any, str]]:
    """(flat index, value and bits in `a`, those in `b`) of the first element in whose bytes two arrays differ."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (a, b)]
    raw = [array.view(np.uint8) for array in flat]
    element = int((raw[0] != raw[1]).argmax()) // a.itemsize
    one, two = ((array[element].item(), f"0x{array[element].tobytes()[::-1].hex()}") for array in flat)
    return element, one, two


# --------------------------------------------------------------------------------------------------------- the units


def _unit_difference(
    step: int, signed: Sequence[list[Receipt]], program: TrainingProgram
) -> tuple[UnitDifference | None, int]:
    """(the first thing that both runs signed and that differs, how many were equal before it).

    FailureError where a run has no receipts, or such that no plan fits them.
    """
    plans = []
    for name, receipts in zip("AB", signed, strict=True):
        try:
            plans.append(plan_of(receipts, program))
        except FailureError as error:
            raise FailureError(f"run {name}: {error}") from error
    by_worker = [{receipt.worker: receipt for receipt in receipts} for receipts in signed]
    claims = [_claims(plan, receipts) for plan, receipts in zip(plans, signed, strict=True)]
    compared = 0
    for what, name, blocks, edge, micro_batch in _boundaries(plans):
        values = [claim.get((name, edge, micro_batch), NO_DIGEST) for claim in claims]
        if values[0] != values[1]:
            who = [
                tuple(_signer(receipts[worker]) for worker in _workers(plan, name, blocks, micro_batch))
                for plan, receipts in zip(plans, by_worker, strict=True)
            ]
            return _unit(step, micro_batch, blocks, what, name, values, who), compared
        compared += 1
    if (plans[0].bounds, plans[0].replicas) != (plans[1].bounds, plans[1].replicas):
        return None, compared
    for what, name, worker in _sums(plans):
        pair = [receipts[worker] for receipts in by_worker]
        values = [getattr(receipt, name) for receipt in pair]
        if values[0] != values[1]:
            blocks = plans[0].stages[plans[0].place(worker)[0]]
            return _unit(step, None, blocks, what, name, values, [(_signer(one),) for one in pair]), compared
        compared += 1
    return None, compared


def _boundaries(plans: Sequence[Plan]) -> Iterator[tuple[str, str, range, int, int]]:
    """(direction, field, blocks, boundary, micro-batch) of what crosses the boundaries of both plans, in order."""
    common = sorted(set(plans[0].bounds) & set(plans[1].bounds))
    micro_batches = plans[0].micro_batches
    spans = list(map(range, common, common[1:]))
    for blocks in spans:
        for name, edge in (("x", blocks.start), ("y", blocks.stop)):
            yield from (("forward", name, blocks, edge, m) for m in micro_batches)
    for blocks in reversed(spans):
        for name, edge in (("dy", blocks.stop), ("dx", blocks.start)):
            if 0 < edge < common[-1]:
                yield from (("backward", name, blocks, edge, m) for m in micro_batches)


def _claims(plan: Plan, receipts: Sequence[Receipt]) -> dict[tuple[str, int, int], bytes]:
    """What was signed to have crossed each boundary, by field, boundary and micro-batch."""
    found: dict[tuple[str, int, int], bytes] = {}
    for receipt in receipts:
        stage, _ = plan.place(receipt.worker)
        for name, edge in (("x", stage), ("y", stage + 1), ("dy", stage + 1), ("dx", stage)):
            found |= {(name, plan.bounds[edge], unit.micro_batch): getattr(unit, name) for unit in receipt.units}
    return found


def _workers(plan: Plan, name: str, blocks: range, micro_batch: int) -> list[str]:
    """Who answers for a value: those that made it from the one at the other boundary, or who took it."""
    stages = [number for number, part in enumerate(plan.stages) if blocks.start <= part.start < blocks.stop]
    stages = {"x": stages[:1], "dy": stages[-1:]}.get(name, stages)
    return [plan.worker(stage, plan.units[stage][micro_batch]) for stage in stages]


def _sums(plans: Sequence[Plan]) -> Iterator[tuple[str, str, str]]:
    """(what, field, worker) of what whole workers sign, where both plans give them the same chunks."""
    if plans[0].units == plans[1].units:
        yield from (("gradient", "gradient_root", worker) for worker in plans[0].workers)
    wholes = (("reduce", "reduced_root"), ("reduce", "exponent"), ("square", "square"), ("update", "updated_root"))
    for what, name in wholes:
        yield from ((what, name, worker) for worker in plans[0].workers)


def _unit(
    step: int,
    micro_batch: int | None,
    blocks: range,
    direction: str,
    name: str,
    values: Sequence[Any],
    signers: Sequence[tuple[str, ...]],
) -> UnitDifference:
    return UnitDifference(
        step=step,
        micro_batch=micro_batch,
        blocks=blocks,
        direction=direction,
        field=name,
        a=_shown(values[0]),
        b=_shown(values[1]),
        signers=(signers[0], signers[1]),
    )


def _signer(receipt: Receipt) -> str:
    signed = "" if receipt_signer_ok(receipt) else " (not its signature)"
    return f"{receipt.worker} 0x{receipt.address.hex()}{signed}"


# ---------------------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a replay on this machine says of a run's step: None and None where it agrees."""

    fact: Diverged | None = None
    unit: Unit | None = None

    @property
    def agrees(self) -> bool:
        """Whether the run has what this machine computes."""
        return self.fact is None and self.unit is None


def judge(
    history: History,
    segment: int,
    step: int,
    make: Callable[[Plan | None], Replay],
    observe: Callable[[str], None] = lambda _: None,
) -> Judgement:
    """The first fact, else the first signed value of a run's step that a replay here does not give.

    `make` gives a replay under a plan, None for any; the step is reached from the state before its segment.
    """
    side = _Side(history)
    signed = _by_step(side.receipts(segment)).get(step, [])
    try:
        plan: Plan | None = plan_of(signed, side.program)
    except FailureError:
        plan = None
    replay = make(plan)
    if segment:
        replay.load(side.prestate(segment))
    else:
        replay.initial()
    for earlier in range(replay.feed.segment(segment).start, step):
        observe(f"replaying step {earlier}")
        replay.step(earlier)
    observe(f"replaying step {step}")
    made = replay.step(step)
    recorded = next(record for record in side.steps(segment) if record.step == step)
    for name in FACTS:
        values = getattr(made, name), getattr(recorded, name)
        if values[0] != values[1]:
            path = f"segment {segment}/step {step}/{name}"
            return Judgement(fact=Diverged(path=path, expected=_shown(values[0]), actual=_shown(values[1])))
    if plan is None:
        return Judgement()
    by_worker = {receipt.worker: receipt for receipt in signed}
    return Judgement(unit=first_unit(replay.claims(history.run_digest, step), by_worker, plan))


# ------------------------------------------------------------------------------------------------------------ showing


def _receipts(a: _Side, b: _Side, index: int) -> list[dict[int, list[Receipt]]]:
    """Either run's receipts of a segment, by step."""
    return [_by_step(side.receipts(index)) for side in (a, b)]


def _by_step(receipts: Sequence[Receipt]) -> dict[int, list[Receipt]]:
    found: dict[int, list[Receipt]] = {}
    for receipt in receipts:
        found.setdefault(receipt.step, []).append(receipt)
    return found


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A recipe's tables as `table.key`."""
    made: dict[str, Any] = {}
    for key, value in table.items():
        made |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return made


def _json(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def _shown(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _tried(action: Callable[[], Any]) -> tuple[Any, str]:
    """(its value, None where it fails; why it failed): what cannot be read ends a path and unsays no difference."""
    try:
        return action(), ""
    except FAILURES as error:
        return None, _reason(error)


def _reason(error: BaseException) -> str:
    told = str(error).strip()
    return told if isinstance(error, TrueweightError) and told else f"{type(error).__name__}: {told}"
