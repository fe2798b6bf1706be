"""The controller: a plain state machine that takes a run from wherever it stands to its end.

    ASSEMBLE -> START (new run) or RESTORE (old one) -> STEP ... -> SAVE (segment full) -> STEP ... -> FINISHED
       ^                                                 STEP -> PAUSE (asked to stop) -> STOPPED
       '---- every replica of a stage lost: back to the last checkpoint

Training waits only until a full segment's state is copied; it is stored behind the next steps, and the segment is
committed before the first step that finds it stored. One save is under way at a time.

It knows neither torch nor Ray: workers are behind `WorkerGroup`, bytes behind `Store`, and whoever wants to see
progress passes an observer. Nothing is visible in the store before the Head moves, so a failure anywhere leaves the
last checkpoint as it was.
"""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import count
from typing import Any, TypeVar

from runtime.clock import Clock, WallClock
from runtime.feed import Feed
from runtime.groups import Membership, WorkerConfig, WorkerGroup, WorkersLost
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.revision import Reviser, Revision
from runtime.roster import REASON, Roster, StageLost
from runtime.segments import FAILED, FINISHED, INTERRUPTED, RUNNING, History, Position
from runtime.transition import Crew, StateParts, assemble, going_on, initialise, restore, train_step
from runtime.version import VERSION
from storage.checkpoints import load_state
from storage.codec import encode
from storage.errors import FailureError, TrueweightError
from storage.records import RunRecord, SegmentRecord, StepRecord
from storage.saves import Saver
from storage.store import Store

T = TypeVar("T")
MOST_FALLS = 5
"""How often in a row a run goes back to its last checkpoint before it gives up."""


class Phase(Enum):
    """Where the state machine is."""

    ASSEMBLE = "assemble"
    START = "start"
    RESTORE = "restore"
    STEP = "step"
    SAVE = "save"
    PAUSE = "pause"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: a recipe with its prepared data and programs, all of them in the store already."""

    name: str
    feed: Feed
    program: TrainingProgram
    programs: bytes
    """Digest of the encoded training program."""
    data: bytes
    """Digest (and root) of the dataset."""
    engine: str = "exact"

    def record(self, *, initial_state: bytes) -> RunRecord:
        """The run's record, once its initial state is known."""
        return RunRecord(
            name=self.name,
            recipe=self.feed.recipe.digest,
            programs=self.programs,
            program_root=self.program.root,
            data=self.data,
            engine=self.engine,
            initial_state=initial_state,
            version=VERSION,
        )


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """Event: the workers are there."""

    workers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Event: the workers hold the state before `step`."""

    run: str
    run_digest: bytes
    step: int
    state_root: bytes


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """Event: a step is done."""

    record: StepRecord


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Event: a segment is in the store and the Head names it."""

    segment: SegmentRecord


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Event: a worker was lost, joined or left before or in `step`; `workers` are those there are now."""

    step: int
    what: str
    workers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Event and result: the run is `finished` or `interrupted` before `step`, or has `failed` and says why."""

    status: str
    step: int
    state_root: bytes
    reason: str = ""


Event = Assembled | Ready | Stepped | Committed | Changed | Ended


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """A run whose workers may change: what the machines say, and whether to take more workers than it began with."""

    membership: Membership
    grow: bool = False
    fixed: bool = False
    """Whether replicas take the plan's shares instead of what they have time for."""
    patience: float = 300.0
    """Seconds that a run without enough workers waits for them."""
    clock: Clock = field(default_factory=WallClock)
    sit_out: bool = False
    """Whether stragglers sit a step out (decisions/0039)."""
    reviser: Reviser | None = None
    """Says which hosts take which blocks, also while the run trains; without, stages stay as they are."""


def sent(reviser: Reviser, revision: Revision) -> Plan:
    """The plan of what a run begins with, once the sites know which worker goes where."""
    reviser.sites.send(revision.places)
    return revision.plan


class Controller:
    """Runs one job over one group. `history` is the run to go on with, None for a new one.

    `stop` is asked after every step; `observe` is told every event. Neither can change a bit. Without `elastic` the
    workers are those of the plan, and the first that is lost ends the run.
    """

    _crew: Crew  # from ASSEMBLE on
    _history: History  # from START or RESTORE on
    _position: Position  # from STEP on
    _roster: Roster | None = None
    _saving: tuple[Position, "Future[bytes]"] | None = None
    """The segment whose state is being stored."""

    def __init__(
        self,
        *,
        store: Store,
        job: Job,
        group: WorkerGroup,
        plan: Plan,
        history: History | None = None,
        keys: str = "",
        threads: int = 1,
        elastic: Elastic | None = None,
        observe: Callable[[Event], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._job = job
        self._group = group
        self._plan, self._most = plan, plan.replicas
        self._resumed = history is not None
        if history is not None:
            self._history = history
        self._keys = keys
        self._threads = threads
        self._observe = observe
        self._stop = stop
        self._elastic = elastic
        self._events: list[str] = []
        self._falls = 0
        """How often in a row the run went back to a checkpoint without a step done since."""
        self._saver = Saver(store)
        self._serial = count(1)

    def run(self) -> Ended:
        """Go on until the run is finished or `stop` says so; raises what failed, with the last checkpoint in place."""
        phase = Phase.ASSEMBLE
        with self._store.writing(f"run {self._job.name}"):
            try:
                while phase not in (Phase.STOPPED, Phase.FINISHED):
                    phase = self._try(phase)
                self._settle()
            except TrueweightError as error:
                if phase in (Phase.STEP, Phase.SAVE, Phase.PAUSE, Phase.FINISHED):
                    self._fail(error)
                raise
            finally:
                if self._roster:
                    self._roster.close()
                self._group.stop()
                self._saver.close()
            return self._end(self._history.head.status)

    def _try(self, phase: Phase) -> Phase:
        """The next phase; ASSEMBLE where a stage lost all its replicas and the run may wait for others."""
        try:
            return self._advance(phase)
        except (WorkersLost, StageLost) as error:
            if self._elastic is None or self._falls == MOST_FALLS:
                raise
            return self._fall_back(error, self._elastic)

    def _fall_back(self, error: FailureError, elastic: Elastic) -> Phase:
        """Back to the last checkpoint, with as many workers as there is room for, or as the reviser now places them."""
        self._falls += 1
        if self._roster:
            self._roster.close()
            self._roster = None
        self._group.stop()
        self._settle()
        clock, began = elastic.clock, elastic.clock.now()
        while (plan := self._next_plan(elastic)) is None:
            if self._stop() or clock.now() - began > elastic.patience:
                raise error
            clock.sleep(1.0)
        self._plan = plan
        self._resumed = self._resumed or hasattr(self, "_history")
        self._events.append(f"back to the last checkpoint: {str(error)[:REASON]}")
        return Phase.ASSEMBLE

    def _next_plan(self, elastic: Elastic) -> Plan | None:
        """A plan for the workers that could be started now; None where they are not enough."""
        if elastic.reviser is None:
            room = elastic.membership.room() // len(self._plan.replicas)
            return self._plan.resized([min(room, most) for most in self._most]) if room else None
        try:
            revision = elastic.reviser.begin()
        except FailureError:
            return None
        return sent(elastic.reviser, revision)

    def _advance(self, phase: Phase) -> Phase:
        """Do what the phase says; the next phase."""
        match phase:
            case Phase.ASSEMBLE:
                return self._assemble()
            case Phase.START:
                return self._start()
            case Phase.RESTORE:
                return self._restore()
            case Phase.STEP:
                return self._step()
            case Phase.SAVE:
                return self._save()
            case Phase.PAUSE:
                return self._pause()
        raise AssertionError(phase)

    # ------------------------------------------------------------------------------------------------------ phases

    def _assemble(self) -> Phase:
        elastic, programs = self._elastic, self._store.get(self._job.programs)
        seed, keys, threads = self._job.feed.recipe.seed, self._keys, self._threads
        clock = elastic.clock if elastic else WallClock()
        self._crew = assemble(
            self._group,
            plan=self._plan,
            program=self._job.program,
            programs=programs,
            seed=seed,
            keys=keys,
            threads=threads,
            fixed=elastic is None or elastic.fixed,
            now=clock.now,
        )

        def configure(worker: str, plan: Plan) -> bytes:
            return encode(
                WorkerConfig(worker=worker, plan=plan, programs=programs, seed=seed, keys=keys, threads=threads)
            )

        if elastic:
            self._roster = Roster(
                self._crew,
                configure=configure,
                membership=elastic.membership,
                grow=elastic.grow,
                reviser=elastic.reviser,
                serial=self._serial,
                sit_out=elastic.sit_out,
                wanted=self._most,
                clock=clock,
                note=self._changed,
            )
        self._events.append(f"assembled {self._plan.shape}: {' '.join(self._plan.workers)}")
        self._observe(Assembled(workers=self._plan.workers))
        return Phase.RESTORE if self._resumed else Phase.START

    def _start(self) -> Phase:
        root = self._surviving(lambda: initialise(self._crew))
        self._store_state(root).result()
        self._history = History.start(self._store, self._job.record(initial_state=root))
        return self._ready(self._history.position())

    def _restore(self) -> Phase:
        position = self._history.position()
        arrays = load_state(self._store, position.poststate)
        self._surviving(lambda: restore(self._crew, arrays))
        self._saver.base = position.poststate
        if position.next_step < self._job.feed.steps:
            self._history.mark(RUNNING)
        return self._ready(position)

    def _ready(self, position: Position) -> Phase:
        self._position = position
        self._observe(
            Ready(
                run=self._job.name,
                run_digest=self._history.run_digest,
                step=position.next_step,
                state_root=position.poststate,
            )
        )
        return self._next()

    def _step(self) -> Phase:
        if self._saving and self._saving[1].done():
            self._settle()
        feed, position = self._job.feed, self._position
        if self._roster:
            steps_left = feed.steps - position.next_step
            self._surviving(partial(self._roster.turn, steps_left))
        record, receipts = train_step(
            self._crew,
            run=self._history.run_digest,
            step=position.next_step,
            batch=feed.batch(position.next_step),
            validation=feed.validation(position.next_step),
            events=self._events,
            changes=self._roster,
        )
        self._events.clear()
        self._falls = 0
        self._position = position.after(record, receipts)
        self._observe(Stepped(record=record))
        return self._next()

    def _next(self) -> Phase:
        """What follows a step: a full segment is committed even when the run is asked to stop."""
        position, feed = self._position, self._job.feed
        if position.steps and position.next_step == feed.segment(position.index).stop:
            return Phase.SAVE
        if position.next_step >= feed.steps:
            return Phase.FINISHED
        return Phase.PAUSE if self._stop() else Phase.STEP

    def _save(self) -> Phase:
        self._settle()
        position = self._position
        self._saving = position, self._store_state(position.poststate)
        self._position = position.closed
        return self._next()

    def _pause(self) -> Phase:
        self._settle()
        position = self._position
        if position.steps:
            self._store_state(position.poststate).result()
            self._history.pause(position)
        else:
            self._history.mark(INTERRUPTED)
        return Phase.STOPPED

    # ----------------------------------------------------------------------------------------------------- helpers

    def _store_state(self, root: bytes) -> "Future[bytes]":
        """The crew's state copied, and on its way into the store, where it must have the root that the records say."""
        return self._saver.save(self._surviving(self._copied), root)

    def _copied(self) -> Any:
        state = StateParts(self._crew)
        return self._saver.copy(state, state.shapes)

    def _surviving(self, act: Callable[[], T]) -> T:
        """What `act` returns, done again while workers are lost and the others can go on."""
        return going_on(self._crew, act, self._roster)

    def _changed(self, what: str) -> None:
        """Note what happened to the workers, for the record of the step and whoever watches."""
        self._events.append(what)
        step = self._position.next_step if hasattr(self, "_position") else 0
        crew = self._crew
        there = tuple(place for place in crew.workers if crew.members[place] not in crew.gone)
        self._observe(Changed(step=step, what=what, workers=there))

    def _settle(self) -> None:
        """Commit the segment whose state is being stored, once it is."""
        if self._saving is None:
            return
        (position, stored), self._saving = self._saving, None
        stored.result()
        status = FINISHED if position.next_step >= self._job.feed.steps else RUNNING
        self._observe(Committed(segment=self._history.commit(position, status)))

    def _fail(self, error: TrueweightError) -> None:
        """Say that the run failed, unless the store is what failed or somebody else has moved the run.

        A segment that was done before is committed all the same.
        """
        for act in (self._settle, lambda: self._history.mark(FAILED)):
            with suppress(FailureError):
                act()
        self._end(FAILED, str(error))

    def _end(self, status: str, reason: str = "") -> Ended:
        position = self._position
        ended = Ended(status=status, step=position.next_step, state_root=position.poststate, reason=reason)
        self._observe(ended)
        return ended
