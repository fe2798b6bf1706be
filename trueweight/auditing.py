"""Audits put together: which pieces of a run are replayed, by whom they were chosen, and what it took."""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import ceil
from pathlib import Path
from secrets import randbits
from threading import Lock
from time import perf_counter

from runtime.program.executor import Executor
from runtime.segments import History
from storage.codec import decode
from storage.errors import FailureError, UsageError
from storage.objects import Data, Found, ObjectStore
from storage.records import Receipt, SegmentRecord
from storage.store import Store
from verification.audit import (
    ENGINE,
    FAILURES,
    AuditReport,
    Inconclusive,
    Match,
    SegmentAudit,
    Spread,
    Verdict,
    audit,
    overall,
)
from verification.replay import Material, Replay
from verification.sampling import (
    RISK,
    STRATEGIES,
    STRATIFIED,
    UNIFORM,
    Candidate,
    Piece,
    Sample,
    chained_beacon,
    draw,
    miss_probability,
    risk_weights,
    seed_beacon,
)
from verification.units import UnitAudit, first_receipts, unit_verdict

CHAINED, SEED, GIVEN = "chained", "seed", "given"
"""Where a beacon comes from: the last commitment, a number, or bytes that the user has from somewhere."""
STREAM = "stream"
"""How `--follow` draws: each segment by itself, as it comes."""


class ReadObjects:
    """What another medium holds, to be read and no more; `fetched` counts the bytes that it gave."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects, self._lock = objects, Lock()
        self.fetched = 0

    def __str__(self) -> str:
        return str(self._objects)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See ObjectStore."""
        data = self._objects.read(key, start, stop)
        with self._lock:
            self.fetched += len(data or b"")
        return data

    def find(self, key: str) -> Found | None:
        """See ObjectStore."""
        return self._objects.find(key)

    def list(self, prefix: str) -> Iterator[Found]:
        """See ObjectStore."""
        return self._objects.list(prefix)

    def create(self, key: str, data: Data) -> bool:  # noqa: ARG002
        """Refused, as are `replace` and `delete`."""
        raise self._refused(key)

    def replace(self, key: str, data: Data) -> None:  # noqa: ARG002
        """Refused."""
        raise self._refused(key)

    def delete(self, key: str) -> None:
        """Refused."""
        raise self._refused(key)

    def _refused(self, key: str) -> FailureError:
        return FailureError(
            f"{key} in {self}: expected an audit to write nothing; report this as a fault of Trueweight"
        )


# --------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True, kw_only=True)
class Beacon:
    """The bytes that decide a draw, or how they follow from the run; `seed` is the number that they are made from."""

    source: str
    seed: int | None = None
    value: bytes = b""

    def over(self, history: History, segment: bytes | None) -> bytes:
        """The beacon's bytes where `segment` is the digest of the commitment to chain to."""
        return chained_beacon(history.run_digest, segment or b"") if self.source == CHAINED else self.value


def make_beacon(text: str | None, seed: int | None) -> Beacon:
    """The beacon that `--beacon` and `--seed` ask for; a fresh random seed without either."""
    text = SEED if text is None else text
    if text != SEED and seed is not None:
        raise UsageError(f"--seed {seed}: expected --beacon seed with it, got --beacon {text}; drop one of them")
    if text == CHAINED:
        return Beacon(source=CHAINED)
    if text == SEED:
        drawn = randbits(63) if seed is None else seed
        if not 0 <= drawn < 1 << 64:
            raise UsageError(f"--seed {drawn}: expected 0 to 2^64 - 1; choose another")
        return Beacon(source=SEED, seed=drawn, value=seed_beacon(drawn))
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        value = b""
    if not value:
        raise UsageError(f"--beacon {text!r}: expected bytes in hex, `seed` or `chained`; correct it")
    return Beacon(source=GIVEN, value=value)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user asked to be replayed: `named` pieces, else all segments, else a draw by `rate` or `count`."""

    named: tuple[Piece, ...] = ()
    every: bool = False
    units: bool = False
    strategy: str = UNIFORM
    rate: float | None = None
    count: int | None = None
    beacon: Beacon

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError(f"--strategy {self.strategy!r}: expected one of {', '.join(STRATEGIES)}; choose one")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise UsageError(f"--rate {self.rate:g}: expected more than 0 and at most 1; choose one such as 0.1")
        if self.count is not None and self.count < 1:
            raise UsageError(f"--sample {self.count}: expected at least 1; choose how many to replay")

    @property
    def of_units(self) -> bool:
        """Whether pieces are what single workers signed, rather than segments."""
        return self.units or self.strategy in (STRATIFIED, RISK) or any(piece.worker for piece in self.named)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The pieces that were chosen of `candidates`; `strategy` is empty where they were not drawn.

    `miss(share)` is the probability that this held none of the forged pieces, where that share of all was forged.
    `beacon` is empty where each segment has its own.
    """

    pieces: tuple[Piece, ...]
    candidates: int
    of_units: bool
    miss: Callable[[float], float]
    strategy: str = ""
    rate: float | None = None
    source: str = ""
    seed: int | None = None
    beacon: bytes = b""


def forged_of(share: float, total: int) -> int:
    """How many of `total` pieces a share of them is, rounded up; the share is the decimal that was written."""
    return ceil(Fraction(str(share)) * total)


def select(choice: Choice, history: History, candidates: Sequence[Candidate]) -> Selection:
    """The pieces of `candidates` that the choice takes; UsageError for a named segment that the run has not.

    So it is for a draw of units where nobody signed any.
    """
    known = [candidate.piece for candidate in candidates]
    if choice.of_units and not choice.named and not known:
        raise UsageError(
            f"run {history.name}: expected receipts, got none: its workers had no keys; audit whole segments, "
            f"without --units and --strategy"
        )
    if choice.every or choice.named:
        pieces = tuple(known if choice.every else choice.named)
        for piece in pieces:
            if not choice.of_units and piece not in known:
                raise UsageError(
                    f"--segments {piece.segment}: expected segments below {len(known)}, got another; see "
                    f"`trueweight show {history.name}`"
                )
        total = len(known)

        def miss(share: float) -> float:
            return miss_probability(total, len(pieces), forged_of(share, total)) if total else 1.0

        return Selection(pieces=pieces, candidates=total, of_units=choice.of_units, miss=miss)
    beacon = choice.beacon.over(history, history.head.segment)
    drawn: Sample = draw(
        candidates,
        beacon=beacon,
        run=history.run_digest,
        rate=choice.rate,
        count=choice.count or (None if choice.rate else 1),
        strategy=choice.strategy,
    )
    return Selection(
        pieces=drawn.pieces,
        candidates=len(known),
        of_units=choice.of_units,
        miss=drawn.miss,
        strategy=choice.strategy,
        rate=choice.rate,
        source=choice.beacon.source,
        seed=choice.beacon.seed,
        beacon=beacon,
    )


def unit_candidates(history: History, segments: Sequence[SegmentRecord]) -> list[Candidate]:
    """What each worker signed in the first step of each segment; the worker at risk is its id at its address.

    Its weight is that of the steps that it has signed in the segments before.
    """
    signed: dict[str, int] = {}
    found: list[Candidate] = []
    for segment in segments:
        first = {_identity(receipt): receipt for receipt in first_receipts(history, segment)}
        weights = risk_weights({name: signed.get(name, 0) for name in first})
        for name, receipt in first.items():
            piece = Piece(segment.index, receipt.worker)
            found.append(Candidate(piece=piece, worker=name, cost=max(len(receipt.units), 1), weight=weights[name]))
        for item in history.items(segment.receipts_object):
            name = _identity(decode(Receipt, item))
            signed[name] = signed.get(name, 0) + 1
    return found


def _identity(receipt: Receipt) -> str:
    return f"{receipt.address.hex()}/{receipt.worker}"


def candidates(choice: Choice, history: History, segments: Sequence[SegmentRecord]) -> list[Candidate]:
    """What a draw may take; all segments where they are named, and nothing where units are."""
    if choice.of_units:
        return [] if choice.named else unit_candidates(history, segments)
    return [Candidate(piece=Piece(index)) for index in range(len(segments))]


# ---------------------------------------------------------------------------------------------------------- auditing


@dataclass(frozen=True, kw_only=True)
class Audited:
    """An audit that was made: verdicts on segments (in `report`) or on `units`, what was chosen, and what it took.

    `steps` is how many the run has committed, None where that is not known, as `fetched` is where others fetched.
    """

    report: AuditReport
    units: tuple[UnitAudit, ...] = ()
    selection: Selection | None = None
    steps: int | None = None
    seconds: float = 0.0
    fetched: int | None = None
    peak: int | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on all that was replayed."""
        return self.report.verdict

    @property
    def replayed(self) -> float:
        """Steps that were replayed; a worker's units are a part of one."""
        return sum(segment.steps for segment in self.report.segments) + sum(unit.share for unit in self.units)

    @property
    def whole(self) -> bool:
        """Whether every chosen piece was replayed to a verdict: else nobody can say what was missed."""
        lines: list[SegmentAudit | UnitAudit] = [*self.report.segments, *self.units]
        return bool(lines) and not any(isinstance(line.verdict, Inconclusive) for line in lines)


@dataclass(frozen=True, kw_only=True)
class Auditor:
    """Audits of one run; `observe` is told of steps.

    `replay` makes a machine that replays segments, `executor` what single workers' units are replayed by.
    `spread` has segments replayed by others, who fetch by themselves.
    """

    store: Store
    name: str
    replay: Callable[[History], Replay]
    executor: Callable[[], Executor]
    observe: Callable[[str], None] = lambda _: None
    spread: Spread | None = None

    def run(self, choice: Choice) -> Audited:
        """The audit of what was chosen; UsageError where there is no such run, segment or worker."""
        objects, started = ReadObjects(self.store.objects), perf_counter()
        act = self._units if choice.of_units else self._segments
        audited = act(Store(objects), choice)
        seconds, alone = perf_counter() - started, self.spread is None
        fetched, peak = (objects.fetched, peak_bytes()) if alone else (None, None)
        return replace(audited, seconds=seconds, fetched=fetched, peak=peak)

    def _segments(self, store: Store, choice: Choice) -> Audited:
        selection: Selection | None = None
        steps: int | None = None

        def choose(history: History, total: int) -> Sequence[int]:
            nonlocal selection, steps
            selection = select(choice, history, [Candidate(piece=Piece(index)) for index in range(total)])
            steps = committed_steps(history)
            return [piece.segment for piece in selection.pieces]

        report = audit(
            store,
            self.name,
            choose,
            replay=self.replay,
            observe=self.observe,
            spread=self.spread,
        )
        return Audited(report=report, selection=selection, steps=steps)

    def _units(self, store: Store, choice: Choice) -> Audited:
        """The audit of single workers' units."""
        history: History | None = None
        segments: Sequence[SegmentRecord] = ()
        report = AuditReport(run=self.name, run_digest="", total=0, segments=(), verdict=Inconclusive(reason=""))
        try:
            history = History.open(store, self.name)
            report = replace(report, run_digest=history.run_digest.hex())
            segments = history.segments()
            if history.run.engine != ENGINE:
                raise FailureError(
                    f"run {self.name}: expected engine {ENGINE!r}, got {history.run.engine!r}; use the Trueweight that "
                    f"trained it"
                )
            material = Material.read(store, history.run)
            report = replace(report, total=len(segments), planned=material.feed.segments)
            known = candidates(choice, history, segments)
        except FAILURES as error:
            if history is None and isinstance(error, UsageError):
                raise
            told = str(error) or type(error).__name__
            return Audited(report=replace(report, verdict=Inconclusive(reason=told)))
        if not segments:
            reason = "the run has not committed a segment yet"
            return Audited(report=replace(report, verdict=Inconclusive(reason=reason)), steps=0)
        selection = select(choice, history, known)
        units: list[UnitAudit] = []
        make = lru_cache(1)(self.executor)
        for piece in selection.pieces:
            made = unit_verdict(history, segments, piece.segment, piece.worker, make, material)
            if not isinstance(made.verdict, Match):
                make.cache_clear()  # it may be in the middle of something
            self.observe(f"segment {piece.segment}, worker {piece.worker}: {len(units) + 1} of {len(selection.pieces)}")
            units.append(made)
        verdict = overall(unit.verdict for unit in units)
        steps = segments[-1].first_step + segments[-1].steps
        return Audited(report=replace(report, verdict=verdict), units=tuple(units), selection=selection, steps=steps)


def committed_steps(history: History) -> int | None:
    """Steps of the committed segments, None where that cannot be read."""
    try:
        return history.position().first_step
    except FAILURES:
        return None


def peak_bytes() -> int:
    """The most memory that this process has held at a time."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts from what the parent process held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
