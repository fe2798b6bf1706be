"""Audit: replay committed segments, compare for equality, and say where the first difference is.

A verdict is a value. `Diverged` is an accusation and needs a complete replay that contradicts a committed record; a
missing or damaged object, a full memory, a program that this version cannot read are `Inconclusive` and accuse nobody.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from runtime.places import StepFault
from runtime.segments import History
from storage import merkle
from storage.codec import decode, record_digest
from storage.errors import FailureError, TrueweightError, UsageError
from storage.identity import receipt_signer_ok
from storage.records import Receipt, SegmentRecord, StepRecord, facts_free
from storage.store import Store
from verification.replay import Material, Replay

ENGINE = "exact"
"""The engine whose steps a replay gives again."""
FACTS = ("step", "data", "units", "loss", "gradient_root", "state_root", "validation")
"""The compared fields of a step in causal order, so that the first difference is the nearest to its cause."""


LONGEST_TOLD = 2000
"""Characters of a reason or a name in a report: both may come from a store that is anybody's."""

FAILURES = (Exception,)
"""Whatever keeps an audit from its end, a full memory or hostile bytes, says nothing of the run: it is inconclusive."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Everything that was replayed is as it was recorded."""


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """The record at `path` says `actual`; a replay of the same state, data and Programs gives `expected`."""

    path: str
    expected: str
    actual: str


@dataclass(frozen=True, kw_only=True)
class Inconclusive:
    """The replay could not be made, or not to its end; `reason` names the object or the resource."""

    reason: str


Verdict = Match | Diverged | Inconclusive


@dataclass(frozen=True, kw_only=True)
class SegmentAudit:
    """One segment's verdict; `steps` is how many of its steps were replayed, `receipts` how many are well signed.

    `record` is the digest of the SegmentRecord that was audited, in hex.
    """

    index: int
    first_step: int
    steps: int
    prestate: str
    poststate: str
    receipts: int
    verdict: Verdict
    record: str = ""


Spread = Callable[[History, Sequence[int]], Iterable[SegmentAudit]]
"""Audits segments elsewhere (`verification.actors.spread`); the results come in any order."""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The verdicts of an audit. `total` is how many segments the run has committed, `planned` how many its recipe has.

    A match covers what is committed: a run that stops early is not a forgery. `planned` is 0 where it is not known.
    """

    run: str
    run_digest: str
    total: int
    segments: tuple[SegmentAudit, ...]
    planned: int = 0
    verdict: Verdict


def audit(
    store: Store,
    name: str,
    choose: Callable[[History, int], Sequence[int]],
    *,
    replay: Callable[[History], Replay] | None = None,
    observe: Callable[[str], None] = lambda _: None,
    spread: Spread | None = None,
) -> AuditReport:
    """The report over the segments that `choose(history, total)` names; UsageError where there is no such run.

    The whole is diverged where one segment is, else inconclusive where one is, else match. `replay` makes the machine
    that replays, `observe` is told of every step that matches. With `spread` others replay, and nothing is replayed
    here: a segment that does not come back from them is inconclusive.
    """
    history: History | None = None
    try:
        history = History.open(store, name)
        segments = history.segments()
    except UsageError:
        raise
    except FAILURES as error:
        digest = history.run_digest.hex() if history else ""
        return AuditReport(
            run=name, run_digest=digest, total=0, segments=(), verdict=Inconclusive(reason=_reason(error))
        )
    wanted = choose(history, len(segments))
    try:
        _require_engine(history)
        if spread is not None:
            machine: Material | Replay = Material.read(store, history.run)
        else:
            machine = replay(history) if replay else Replay(store, history.run)
    except FAILURES as error:
        return _report(history, len(segments), [], Inconclusive(reason=_reason(error)))
    other = _differs("run/program_root", machine.program_root, history.run.program_root)
    if other or not wanted:
        verdict = other or Inconclusive(reason="the run has not committed a segment yet")
        return _report(history, len(segments), [], verdict)
    if isinstance(machine, Replay):
        audited = [audit_segment(history, machine, segments, index, observe) for index in wanted]
    else:
        assert spread is not None
        audited = _gathered(history, segments, wanted, spread)
    report = _report(history, len(segments), audited, overall(result.verdict for result in audited))
    return replace(report, planned=machine.feed.segments)


def _require_engine(history: History) -> None:
    if history.run.engine != ENGINE:
        raise FailureError(
            f"run {history.name}: expected engine {ENGINE!r}, got {history.run.engine!r}, which a replay does not give "
            f"again; use the Trueweight that trained it"
        )


def _gathered(
    history: History, segments: Sequence[SegmentRecord], wanted: Sequence[int], spread: Spread
) -> list[SegmentAudit]:
    """One audit for each wanted segment by index, whatever comes back of them and in which order."""
    missing = dict.fromkeys(sorted(set(wanted)), "no verifier came back with it")
    found: dict[int, SegmentAudit] = {}
    try:
        for result in spread(history, list(missing)):
            if result.index not in missing or result.index in found:
                continue
            record = record_digest(segments[result.index]).hex()
            if isinstance(result.verdict, Inconclusive) and not result.record:
                found[result.index] = replace(unaudited(segments[result.index], ""), verdict=result.verdict)
            elif result.record == record:
                found[result.index] = result
            else:
                missing[result.index] = f"expected record {record}, got an audit of {result.record or 'another'}"
    except UsageError:
        raise
    except FAILURES as error:
        missing = dict.fromkeys(missing, _reason(error))
    return [found.get(index) or unaudited(segments[index], reason) for index, reason in missing.items()]


def unaudited(segment: SegmentRecord, reason: str) -> SegmentAudit:
    """The inconclusive audit of a segment that nobody could replay."""
    return SegmentAudit(
        index=segment.index,
        first_step=segment.first_step,
        steps=0,
        prestate=segment.prestate.hex(),
        poststate=segment.poststate.hex(),
        receipts=0,
        verdict=Inconclusive(reason=f"segment {segment.index}: {reason}"),
        record=record_digest(segment).hex(),
    )


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The first divergence, else the first inconclusive verdict, else a match."""
    known = list(verdicts)
    for kind in (Diverged, Inconclusive):
        for verdict in known:
            if isinstance(verdict, kind):
                return verdict
    return Match()


def _report(history: History, total: int, segments: Sequence[SegmentAudit], verdict: Verdict) -> AuditReport:
    return AuditReport(
        run=history.name,
        run_digest=history.run_digest.hex(),
        total=total,
        segments=tuple(segments),
        verdict=verdict,
    )


def audit_segment(
    history: History,
    replay: Replay,
    segments: Sequence[SegmentRecord],
    index: int,
    observe: Callable[[str], None] = lambda _: None,
) -> SegmentAudit:
    """The audit of one of the run's `segments` on a replay of that run; whatever keeps it from its end is inconclusive.

    That the Programs are the run's (`replay.program_root`) is the caller's to compare.
    """
    audited = _Segment(history=history, replay=replay, segments=segments, index=index, observe=observe)
    verdict: Verdict
    try:
        verdict = audited.difference() or Match()
    except FAILURES as error:
        verdict = Inconclusive(reason=f"segment {index}: {_reason(error)}")
    segment = segments[index]
    return SegmentAudit(
        index=index,
        first_step=segment.first_step,
        steps=audited.replayed,
        prestate=segment.prestate.hex(),
        poststate=segment.poststate.hex(),
        receipts=audited.receipts,
        verdict=verdict,
        record=record_digest(segment).hex(),
    )


@dataclass(kw_only=True)
class _Segment:
    """One segment under audit: what it claims against what a replay gives."""

    history: History
    replay: Replay
    segments: Sequence[SegmentRecord]
    index: int
    observe: Callable[[str], None]
    replayed: int = 0
    receipts: int = 0

    @property
    def path(self) -> str:
        return f"segment {self.index}"

    def difference(self) -> Diverged | None:
        """The first difference, cheapest checks first; None where the segment matches."""
        segment = self.segments[self.index]
        items = self.history.items(segment.steps_object)
        steps = [decode(StepRecord, item) for item in items]
        receipts = self.history.items(segment.receipts_object)
        return (
            self._bounds(segment, steps)
            or _differs(f"{self.path}/steps_root", merkle.list_root(items), segment.steps_root)
            or self._receipts(segment, steps, receipts)
            or self._prestate(segment)
            or self._steps(steps)
            or _differs(f"{self.path}/poststate", steps[-1].state_root, segment.poststate)
        )

    def _bounds(self, segment: SegmentRecord, steps: Sequence[StepRecord]) -> Diverged | None:
        """The steps that the recipe gives to this segment are the ones recorded."""
        expected = self.replay.feed.segment(self.index)
        claimed = range(segment.first_step, segment.first_step + segment.steps)
        if expected != claimed or not expected:
            return Diverged(path=f"{self.path}/steps", expected=_steps_shown(expected), actual=_steps_shown(claimed))
        if len(steps) != len(expected):
            return Diverged(path=f"{self.path}/steps", expected=str(len(expected)), actual=str(len(steps)))
        return None

    def _receipts(self, segment: SegmentRecord, steps: Sequence[StepRecord], items: Sequence[bytes]) -> Diverged | None:
        """Receipts are those that the records commit to, each about this run and signed by the worker it names."""
        if found := _differs(f"{self.path}/receipts_root", merkle.list_root(items), segment.receipts_root):
            return found
        by_step: dict[int, list[bytes]] = {record.step: [] for record in steps}
        for item in items:
            receipt = decode(Receipt, item)
            path = f"{self.path}/step {receipt.step}/receipt of {printable(receipt.worker)}"
            if receipt.step not in by_step or receipt.run != self.history.run_digest:
                return Diverged(path=path, expected="a step of this segment and run", actual="another")
            if not receipt_signer_ok(receipt):
                return Diverged(path=path, expected=f"signed by {receipt.address.hex()}", actual="not so")
            by_step[receipt.step].append(item)
            self.receipts += 1
        for record in steps:
            root = merkle.list_root(by_step[record.step])
            if found := _differs(f"{self.path}/step {record.step}/receipts_root", root, record.receipts_root):
                return found
        return None

    def _prestate(self, segment: SegmentRecord) -> Diverged | None:
        """The segment starts where the one before ended (the first: at the state that the Programs initialise)."""
        if self.index == 0:
            initial, run = self.replay.initial(), self.history.run
            found = _differs("run/initial_state", initial, run.initial_state)
            return found or _differs(f"{self.path}/prestate", initial, segment.prestate)
        before = self.segments[self.index - 1]
        found = _differs(f"{self.path}/prestate", before.poststate, segment.prestate)
        if found is None:
            self.replay.load(before.poststate)
        return found

    def _steps(self, steps: Sequence[StepRecord]) -> Diverged | None:
        """Each step replayed, compared field by field."""
        for number, recorded in zip(self.replay.feed.segment(self.index), steps, strict=True):
            path = f"{self.path}/step {number}"
            try:
                replayed = facts_free(self.replay.step(number))
            except StepFault as fault:
                return Diverged(path=path, expected=f"a fault: {fault}", actual=recorded.state_root.hex())
            self.replayed += 1
            for name in FACTS:
                if found := _differs(f"{path}/{name}", getattr(replayed, name), getattr(recorded, name)):
                    return found
            self.observe(f"{path} matches")
        return None


def _differs(path: str, expected: object, actual: object) -> Diverged | None:
    if expected == actual:
        return None
    return Diverged(path=path, expected=_shown(expected), actual=_shown(actual))


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _steps_shown(steps: range) -> str:
    """The claim may be of billions of steps: it is not listed."""
    return f"steps {steps.start} to {steps.stop - 1}" if steps else "no steps"


def printable(text: str) -> str:
    """A text of somebody else's for a report: cut, and without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST_TOLD])


def _reason(error: BaseException) -> str:
    told = printable(" ".join(str(error).split()))
    if isinstance(error, TrueweightError) and told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


assert {"events", "receipts_root", *FACTS} == {field.name for field in fields(StepRecord)}
