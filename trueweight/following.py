"""An audit beside a run that is being written: each segment is drawn as it comes, and replayed if the draw takes it.

What is replayed is a function of beacon, run and rate alone, whenever anybody looks. A store that cannot be read is
asked again until it can; what was never replayed is inconclusive in the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter

from runtime.segments import FINISHED, RUNNING, History
from storage.codec import decode
from storage.errors import FailureError, UsageError
from storage.records import SegmentRecord
from storage.store import Store
from trueweight.auditing import STREAM, Audited, Auditor, Beacon, ReadObjects, Selection, forged_of, peak_bytes
from verification.audit import (
    FAILURES,
    AuditReport,
    Diverged,
    Inconclusive,
    Match,
    SegmentAudit,
    audit,
    overall,
    unaudited,
)
from verification.replay import Replay
from verification.sampling import Piece, chosen, stream_miss


class Rewritten(FailureError):
    """The run is another than it was, or no longer leads to a segment that it had committed."""


@dataclass(kw_only=True)
class Follower:
    """Follows one run until it is finished, a segment diverges (unless `keep_going`), or `stop` says so.

    `wait` returns after a while, or once `stop` says so; `tell` is told of every segment.
    """

    auditor: Auditor
    rate: float
    beacon: Beacon
    keep_going: bool
    tell: Callable[[str], None]
    wait: Callable[[], None]
    stop: Callable[[], bool]
    _known: list[tuple[bytes, SegmentRecord]] = field(default_factory=list, init=False)
    """Digest and record of each committed segment that was seen."""
    _decided: int = field(default=0, init=False)
    _taken: list[int] = field(default_factory=list, init=False)
    _done: dict[int, SegmentAudit] = field(default_factory=dict, init=False)
    _run: bytes | None = field(default=None, init=False)
    _status: str = field(default=RUNNING, init=False)
    _planned: int = field(default=0, init=False)
    _machine: Replay | None = field(default=None, init=False)
    _broken: Match | Inconclusive = field(default=Match(), init=False)
    """Why the run could not be read when it was last looked at."""

    def run(self) -> Audited:
        """The audit of all that was committed meanwhile; UsageError where there is no such run."""
        objects, started = ReadObjects(self.auditor.store.objects), perf_counter()
        store = Store(objects)
        try:
            while not self._ended(store):
                self.wait()
        except KeyboardInterrupt:
            self.tell("stopped; what was being replayed does not count")
        return Audited(
            report=self._report(),
            selection=self._selection(),
            steps=sum(segment.steps for _, segment in self._known[: self._decided]),
            seconds=perf_counter() - started,
            fetched=objects.fetched,
            peak=peak_bytes(),
        )

    def _ended(self, store: Store) -> bool:
        """Look once, and replay what is new; whether that was the last time."""
        before, self._broken = self._broken, Match()
        try:
            return self._advance(store)
        except Rewritten as error:
            self._broken = Inconclusive(reason=str(error))
            return True
        except UsageError:
            raise
        except FAILURES as error:
            self._broken = Inconclusive(reason=str(error) or type(error).__name__)
            if isinstance(before, Match):
                self.tell(f"{self._broken.reason}; trying again until it can be read")
            return self.stop()

    def _advance(self, store: Store) -> bool:
        history = self._look(store)
        status = history.head.status
        if status not in (self._status, FINISHED):
            self.tell(f"the run is {status}; waiting for it to go on")
        self._status = status
        while self._decided < len(self._known):
            if self.stop() or (not self._decide(store, history, self._decided) and not self.keep_going):
                return True
        if status != FINISHED:
            return self.stop()
        for index in [index for index, one in self._done.items() if isinstance(one.verdict, Inconclusive)]:
            self.tell(f"segment {index}: once more")
            self._replay(store, index)
        return True

    def _look(self, store: Store) -> History:
        """The run as it is now, and its segments known."""
        try:
            history = History.open(store, self.auditor.name)
        except UsageError as error:
            if self._run is None:
                raise
            raise Rewritten(f"the run is gone: {error}") from error
        if self._run not in (None, history.run_digest):
            raise Rewritten(f"run {history.name}: expected {self._run.hex()}, got another; it was begun anew")
        self._run = history.run_digest
        fresh: list[tuple[bytes, SegmentRecord]] = []
        digest = history.head.segment
        while digest is not None:
            segment = decode(SegmentRecord, store.get(digest))
            expected = fresh[-1][1].index - 1 if fresh else segment.index
            if segment.run != history.run_digest or segment.index != expected:
                raise Rewritten(f"segment object {digest.hex()}: expected segment {expected} of this run, got another")
            if segment.index < len(self._known):
                break
            fresh.append((digest, segment))
            digest = segment.previous if segment.index else None
        before = self._known[-1][0] if self._known else None
        if digest != before:
            raise Rewritten(
                f"run {history.name}: expected its segment {len(self._known) - 1} to stay as it was committed, got "
                f"another history; compare your copies of the store"
            )
        self._known += reversed(fresh)
        return history

    def _decide(self, store: Store, history: History, index: int) -> bool:
        """Draw a segment, and replay it if it is taken; False where it diverges."""
        digest, segment = self._known[index]
        steps = f"segment {index}, steps {segment.first_step} to {segment.first_step + segment.steps - 1}"
        beacon = self.beacon.over(history, digest)
        taken = chosen(Piece(index), beacon=beacon, run=history.run_digest, chance=self.rate)
        if not taken:
            self.tell(f"{steps}: not drawn")
            self._decided += 1
            return True
        self._replay(store, index)
        self._taken.append(index)
        self._decided += 1
        return not isinstance(self._done[index].verdict, Diverged)

    def _replay(self, store: Store, index: int) -> None:
        segment, started = self._known[index][1], perf_counter()
        try:
            report = audit(store, self.auditor.name, lambda *_: [index], replay=self._held, observe=self._observe)
        except UsageError as error:
            raise Rewritten(f"the run is gone: {error}") from error
        self._planned = report.planned or self._planned
        made = report.segments[0] if report.segments else replace(unaudited(segment, ""), verdict=report.verdict)
        self._done[index] = made
        if not isinstance(made.verdict, Match):
            self._machine = None  # what it holds is in the middle of something
        match made.verdict:
            case Match():
                told = f"match ({made.steps} steps in {perf_counter() - started:.1f} s)"
            case Diverged(path=path):
                told = f"diverged at {path}"
            case Inconclusive(reason=reason):
                told = f"inconclusive: {reason}"
        self.tell(f"segment {index}, steps {segment.first_step} to {segment.first_step + segment.steps - 1}: {told}")

    def _held(self, history: History) -> Replay:
        """One machine for all segments: a run's programs are compiled once."""
        if self._machine is None:
            self._machine = self.auditor.replay(history)
        return self._machine

    def _observe(self, line: str) -> None:
        self.auditor.observe(line)
        if self.stop():
            raise KeyboardInterrupt

    # --------------------------------------------------------------------------------------------------- summary

    def _report(self) -> AuditReport:
        lines = tuple(self._done[index] for index in sorted(self._done))
        verdict = overall([*(line.verdict for line in lines), self._broken])
        if not lines and isinstance(verdict, Match):
            reason = f"the draw took none of {self._decided} committed segments; raise --rate, or follow for longer"
            verdict = Inconclusive(reason=reason)
        return AuditReport(
            run=self.auditor.name,
            run_digest=self._run.hex() if self._run else "",
            total=self._decided,
            segments=lines,
            planned=self._planned,
            verdict=verdict,
        )

    def _selection(self) -> Selection:
        total = self._decided
        return Selection(
            pieces=tuple(Piece(index) for index in self._taken),
            candidates=total,
            of_units=False,
            miss=lambda share: stream_miss(self.rate, forged_of(share, total)),
            strategy=STREAM,
            rate=self.rate,
            source=self.beacon.source,
            seed=self.beacon.seed,
            beacon=self.beacon.value,
        )
