"""The controller: a plain state machine that takes a run from wherever it stands to its end.

    ASSEMBLE -> START (new run) or RESTORE (old one) -> STEP ... -> COMMIT (segment full) -> STEP ... -> FINISHED
                                                         STEP -> PAUSE (asked to stop) -> STOPPED

It knows neither torch nor Ray: workers are behind `WorkerGroup`, bytes behind `Store`, and whoever wants to see
progress passes an observer. Nothing is visible in the store before the Head moves, so a failure anywhere leaves the
last checkpoint as it was.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from runtime.feed import Feed
from runtime.groups import WorkerGroup
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.segments import FAILED, FINISHED, INTERRUPTED, RUNNING, History, Position
from runtime.transition import Crew, StateView, assemble, initialise, restore, train_step
from runtime.version import VERSION
from storage.checkpoints import load_state, open_checkpoint, save_state
from storage.errors import FailureError, TrueweightError
from storage.objects import Store
from storage.records import RunRecord, SegmentRecord, StepRecord


class Phase(Enum):
    """Where the state machine is."""

    ASSEMBLE = "assemble"
    START = "start"
    RESTORE = "restore"
    STEP = "step"
    COMMIT = "commit"
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

    def record(self, *, initial_state: bytes, initial_checkpoint: bytes) -> RunRecord:
        """The run's record, once its initial state is known."""
        return RunRecord(
            name=self.name,
            recipe=self.feed.recipe.digest,
            programs=self.programs,
            program_root=self.program.root,
            data=self.data,
            engine=self.engine,
            initial_state=initial_state,
            initial_checkpoint=initial_checkpoint,
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
class Ended:
    """Event and result: the run is `finished` or `interrupted` before `step`, or has `failed` and says why."""

    status: str
    step: int
    state_root: bytes
    reason: str = ""


Event = Assembled | Ready | Stepped | Committed | Ended


class Controller:
    """Runs one job over one group. `history` is the run to go on with, None for a new one.

    `stop` is asked after every step; `observe` is told every event. Neither can change a bit.
    """

    _crew: Crew  # from ASSEMBLE on
    _history: History  # from START or RESTORE on
    _position: Position  # from STEP on

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
        observe: Callable[[Event], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._job = job
        self._group = group
        self._plan = plan
        self._resumed = history is not None
        if history is not None:
            self._history = history
        self._keys = keys
        self._threads = threads
        self._observe = observe
        self._stop = stop
        self._events: tuple[str, ...] = ()

    def run(self) -> Ended:
        """Go on until the run is finished or `stop` says so; raises what failed, with the last checkpoint in place."""
        phase = Phase.ASSEMBLE
        try:
            while phase not in (Phase.STOPPED, Phase.FINISHED):
                phase = self._advance(phase)
        except TrueweightError as error:
            if phase in (Phase.STEP, Phase.COMMIT, Phase.PAUSE):
                self._fail(error)
            raise
        finally:
            self._group.stop()
        return self._end(self._history.head.status)

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
            case Phase.COMMIT:
                return self._commit()
            case Phase.PAUSE:
                return self._pause()
        raise AssertionError(phase)

    # ------------------------------------------------------------------------------------------------------ phases

    def _assemble(self) -> Phase:
        self._crew = assemble(
            self._group,
            plan=self._plan,
            program=self._job.program,
            programs=self._store.get(self._job.programs),
            seed=self._job.feed.recipe.seed,
            keys=self._keys,
            threads=self._threads,
        )
        self._events = (f"assembled {self._plan.shape}: {' '.join(self._plan.workers)}",)
        self._observe(Assembled(workers=self._plan.workers))
        return Phase.RESTORE if self._resumed else Phase.START

    def _start(self) -> Phase:
        root = initialise(self._crew)
        checkpoint = self._save(0, root)
        record = self._job.record(initial_state=root, initial_checkpoint=checkpoint)
        self._history = History.start(self._store, record)
        return self._ready(self._history.position())

    def _restore(self) -> Phase:
        position = self._history.position()
        stored = open_checkpoint(self._store, position.checkpoint).state_root
        if stored != position.poststate:
            raise FailureError(
                f"checkpoint {position.checkpoint.hex()}: expected state root {position.poststate.hex()}, got "
                f"{stored.hex()}; take the run from another copy of the store"
            )
        restore(self._crew, load_state(self._store, position.checkpoint))
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
        feed, position = self._job.feed, self._position
        record, receipts = train_step(
            self._crew,
            run=self._history.run_digest,
            step=position.next_step,
            batch=feed.batch(position.next_step),
            validation=feed.validation(position.next_step),
            events=self._events,
        )
        self._events = ()
        self._position = position.after(record, receipts)
        self._observe(Stepped(record=record))
        return self._next()

    def _next(self) -> Phase:
        """What follows a step: a full segment is committed even when the run is asked to stop."""
        position, feed = self._position, self._job.feed
        if position.steps and position.next_step == feed.segment(position.index).stop:
            return Phase.COMMIT
        if position.next_step >= feed.steps:
            return Phase.FINISHED
        return Phase.PAUSE if self._stop() else Phase.STEP

    def _commit(self) -> Phase:
        position = self._position
        checkpoint = self._save(position.next_step, position.poststate)
        status = FINISHED if position.next_step >= self._job.feed.steps else RUNNING
        segment, self._position = self._history.commit(position, checkpoint, status)
        self._observe(Committed(segment=segment))
        return self._next()

    def _pause(self) -> Phase:
        position = self._position
        if position.steps:
            self._history.pause(position, self._save(position.next_step, position.poststate))
        else:
            self._history.mark(INTERRUPTED)
        return Phase.STOPPED

    # ----------------------------------------------------------------------------------------------------- helpers

    def _save(self, step: int, expected: bytes) -> bytes:
        """The checkpoint of the crew's state, which must be the state that the records speak of."""
        checkpoint, root = save_state(self._store, step, StateView(self._crew))
        if root != expected:
            raise FailureError(
                f"checkpoint after step {step}: expected state root {expected.hex()}, got {root.hex()}; a worker's "
                f"memory changed under it: resume the run, on other hosts if it happens again"
            )
        return checkpoint

    def _fail(self, error: TrueweightError) -> None:
        """Say that the run failed, unless the store is what failed or somebody else has moved the run."""
        with suppress(FailureError):
            self._history.mark(FAILED)
        self._end(FAILED, str(error))

    def _end(self, status: str, reason: str = "") -> Ended:
        position = self._position
        ended = Ended(status=status, step=position.next_step, state_root=position.poststate, reason=reason)
        self._observe(ended)
        return ended
