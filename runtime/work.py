"""The units of one step on the workers of a crew: who takes what, when, and again where a worker is lost.

A unit is a micro-batch through a stage: forward, and backward on the same replica (in the last stage both are one
call). A replica of the stage takes the next unit as soon as it has not enough to do, so fast ones take more; near the
end of a step only where the others would not have done all of them before it has. Backward goes before forward, and a
replica begins no more units than its stage is from the end (1F1B). Nothing here can change a bit.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, partial
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Protocol

import numpy as np

from runtime.feed import Batch
from runtime.groups import Handle, ValueLost, WorkerGroup, WorkersLost, WrongValue
from runtime.plan import Plan
from runtime.shards import Shares
from storage.errors import FailureError

DEPTH = 2
"""Calls that a replica has at a time: the next one's inputs travel while it computes."""
POLL = 0.5
"""Seconds after which unfinished calls are looked at."""
PATIENCE, FIRST_PATIENCE = 20.0, 600.0
"""Seconds that a call may take whatever its length, and where nobody has made such a call before (it is compiled)."""
BRIEF = 1e-6
"""Seconds that a unit takes at least."""
SLACK = 10.0
"""How many times the expected time a call may take before its worker is taken for hung."""
GRACE = 3.0
"""Seconds that a call may be late whatever its length before others do again what its worker did."""
ROUNDS = 2
"""Units for each replica of which it is looked at closely who does them."""


class Team(Protocol):
    """What work needs to know of a crew."""

    group: WorkerGroup
    members: dict[str, str]
    """The group's worker at each place of the plan."""
    pace: "Pace"
    fixed: bool
    """Whether each replica takes what the plan's `units` say and nothing else."""

    @property
    def plan(self) -> Plan:
        """Where the work goes."""

    def present(self, stage: int) -> list[str]:
        """The group's workers that may be given units of a stage."""


class Pace:
    """Seconds that calls take, by worker and method: a running mean. `now` is the clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._seconds: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        """By method and stage, then by worker."""
        self._sums: dict[tuple[str, int], float] = defaultdict(float)

    def note(self, worker: str, method: str, stage: int, seconds: float) -> None:
        """One call took so long."""
        of = self._seconds[method, stage]
        before = of.get(worker)
        of[worker] = seconds if before is None else (before + seconds) / 2
        self._sums[method, stage] += of[worker] - (before or 0.0)

    def known(self, method: str, stage: int) -> float | None:
        """The longest of what workers are expected to take for a call; None where none has made it yet."""
        return max(self._seconds[method, stage].values(), default=None)

    def of(self, worker: str, method: str, stage: int) -> float | None:
        """What such a call takes this worker; None where it has made none."""
        return self._seconds[method, stage].get(worker)

    def mean(self, method: str, stage: int) -> float | None:
        """What such a call takes those who have made one on average; None where nobody has."""
        of = self._seconds[method, stage]
        return self._sums[method, stage] / len(of) if of else None

    def seconds(self, worker: str, method: str, stage: int) -> float:
        """What a worker is expected to take: as the others where it has not made such a call, 1 where nobody has."""
        known = self.of(worker, method, stage)
        known = self.mean(method, stage) if known is None else known
        return 1.0 if known is None else known

    def forget(self, workers: Collection[str]) -> None:
        """These workers are gone."""
        for place, of in self._seconds.items():
            for worker in workers:
                of.pop(worker, None)
            self._sums[place] = sum(of.values())


class State(IntEnum):
    """How far a unit is."""

    WAITING = 0
    FORWARD = 1
    BETWEEN = 2
    BACKWARD = 3
    DONE = 4


@dataclass(kw_only=True)
class Unit:
    """One micro-batch in one stage. `y`, `dx` and `loss` are handles of what it gave, None where there is none."""

    stage: int
    micro_batch: int
    worker: str = ""
    state: State = State.WAITING
    y: Handle | None = None
    dx: Handle | None = None
    loss: Handle | None = None


@dataclass(kw_only=True)
class Call:
    """A call under way: `again` where a value is only made once more, for others."""

    unit: Unit
    worker: str
    method: str
    results: tuple[Handle, ...]
    since: float
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Late:
    """A worker that holds up a step: what it is at since when, and the handles of all that it has to do."""

    worker: str
    stage: int
    step: int
    method: str
    since: float
    handles: tuple[Handle, ...]
    reason: str


class Line:
    """A stage's replicas that may be given a unit, in the order in which each would finish it.

    `end` says when a replica would, and how many units it has begun, which decides between equal ones; None where it
    has enough to do. While nothing happens to it that only gets later, so what was noted is a lower bound, looked at
    again when it is the least; of all else `moved` tells.
    """

    def __init__(self, team: Sequence[str], end: Callable[[str], tuple[float, int] | None], rate: float) -> None:
        self.rate = rate
        """Units a second that they do together, about."""
        self._end = end
        self._rank = {worker: rank for rank, worker in enumerate(team)}
        self._noted: dict[str, tuple[float, int, int, str]] = {}
        self._heap: list[tuple[float, int, int, str]] = []
        for worker in team:
            self.moved(worker)

    @property
    def busy(self) -> list[str]:
        """The replicas that have enough to do."""
        return [worker for worker in self._rank if worker not in self._noted]

    def first(self) -> tuple[str, float] | None:
        """The replica that would finish a unit first, and when; None where all have enough to do."""
        while self._heap:
            least = self._heap[0]
            worker = least[-1]
            if self._noted.get(worker) is not least:
                heappop(self._heap)
            elif (found := self._entry(worker)) == least:
                return worker, least[0]
            elif found is not None:
                self._noted[worker] = found
                heapreplace(self._heap, found)
        return None

    def moved(self, worker: str) -> None:
        """A replica was given something, or has finished it."""
        if worker in self._rank:
            self._noted.pop(worker, None)
            if (found := self._entry(worker)) is not None:
                self._noted[worker] = found
                heappush(self._heap, found)

    def _entry(self, worker: str) -> tuple[float, int, int, str] | None:
        end = self._end(worker)
        return end and (*end, self._rank[worker], worker)


@dataclass(kw_only=True)
class Work:
    """Some micro-batches of one step, from their inputs to their losses and gradient sums."""

    team: Team
    step: int
    batch: Batch
    micro_batches: Sequence[int]
    meanwhile: Callable[[float], bool] = lambda _: False
    """Called again and again with the seconds that are left: whether somebody has come who may be given units."""
    sit_out: Callable[[Late], None] | None = None
    """Told of a straggler that takes no part in the step any more; without it nobody sits out."""
    units: dict[tuple[int, int], Unit] = field(init=False)
    calls: dict[str, list[Call]] = field(init=False, default_factory=lambda: defaultdict(list))
    """What each worker has to do, in order."""
    _begun: Counter[str] = field(init=False, default_factory=Counter)
    """How many units each worker has begun and not finished."""
    _summing: set[str] = field(init=False, default_factory=set)
    """Workers that have added to their sums since they were last asked to hash them."""
    _free: dict[str, float] = field(init=False, default_factory=dict)
    """When each worker was last seen to finish something."""
    _waiting: list[list[int]] = field(init=False)
    """The micro-batches that may be begun in each stage: a heap, of which some may have been begun already."""
    _unbegun: list[int] = field(init=False)
    """How many units nobody has begun in each stage."""
    _between: list[dict[int, Unit]] = field(init=False)
    """Those that each stage has done forward and not begun backward."""
    _failed: str = field(init=False, default="")
    """The worker that was dismissed because its calls failed."""
    _next_look: float = field(init=False, default=0.0)
    """When there is a look for stragglers again."""
    _lines: dict[int, Line] = field(init=False, default_factory=dict)
    _busy: dict[int, tuple[np.ndarray, np.ndarray]] = field(init=False, default_factory=dict)
    """When each stage's replicas that have enough to do are done with it, and their seconds a unit, as of now."""

    def __post_init__(self) -> None:
        stages = range(len(self.team.plan.stages))
        self.units = {(s, m): Unit(stage=s, micro_batch=m) for s in stages for m in self.micro_batches}
        of = len(self.team.plan.micro_batches)
        self._parts = {m: self.batch.micro_batch(m, of) for m in self.micro_batches}
        self._last = len(stages) - 1
        self._left = len(self.units)
        self._now = self.team.pace.now()
        self._waiting = [sorted(self.micro_batches) if stage == 0 else [] for stage in stages]
        self._unbegun = [len(self.micro_batches) for _ in stages]
        self._between = [{} for _ in stages]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, as long as nobody is lost."""
        return not self._left

    @property
    def shares(self) -> Shares:
        """The units that each replica of each stage has taken."""
        taken = Counter(unit.worker for unit in self.units.values())
        plan, members = self.team.plan, self.team.members
        return tuple(tuple(taken[members[place]] for place in plan.team(stage)) for stage in range(len(plan.stages)))

    def run(self) -> list[Handle]:
        """Go on until every unit is done; handles of the losses. WorkersLost: `forget` them, then run again."""
        self._lines = {}  # who there is may have changed, and so may have what each has to do
        while self._left:
            if self.meanwhile(self._seconds_left()):
                self._lines = {}
            self._issue()
            self._collect()
            if self.sit_out and (late := self._straggler()):
                self.sit_out(late)
                self.forget([late.worker])
                self._lines = {}
        self._believe()
        return [self.units[self._last, m].loss for m in self.micro_batches]

    def _believe(self) -> None:
        """Believe of those who were given nothing that they are half as far off: they are tried again in the end."""
        pace, took = self.team.pace, {(unit.stage, unit.worker) for unit in self.units.values()}
        for stage in range(self._last + 1):
            for worker in [] if self.team.fixed else self.team.present(stage):
                for method in ("last",) if stage == self._last else ("forward", "backward"):
                    usual = pace.mean(method, stage)
                    if (stage, worker) not in took and usual and pace.of(worker, method, stage):
                        pace.note(worker, method, stage, usual)

    def _seconds_left(self) -> float:
        """In which what nobody has begun should be done."""
        return max((self._unbegun[stage] / line.rate for stage, line in self._lines.items() if line.rate), default=0.0)

    def forget(self, workers: Collection[str]) -> None:
        """What these workers had done is to be done again by others."""
        for unit in self.units.values():
            if unit.worker in workers:
                self._left += unit.state == State.DONE
                self._between[unit.stage].pop(unit.micro_batch, None)
                unit.worker, unit.state, unit.y, unit.dx, unit.loss = "", State.WAITING, None, None, None
                self._wait(unit)
        for worker in workers:
            self.calls.pop(worker, None)
            self._begun.pop(worker, None)
            self._summing.discard(worker)

    def _wait(self, unit: Unit) -> None:
        """Nobody has begun a unit any more."""
        self._unbegun[unit.stage] += 1
        heappush(self._waiting[unit.stage], unit.micro_batch)

    # ----------------------------------------------------------------------------------------------------- giving out

    def _issue(self) -> None:
        self._now = self.team.pace.now()  # one moment for all that is compared
        for stage in range(self._last, -1, -1):
            between = self._between[stage]
            for unit in [between[m] for m in sorted(between)]:
                if len(self.calls[unit.worker]) < DEPTH and self._dy(unit) is not None:
                    self._backward(unit)
            if self._begin_some(stage):
                self._seal_some(stage)

    def _seal_some(self, stage: int) -> None:
        """Have replicas that are not to get any more units hash their sums while the others compute."""
        for worker in self.team.present(stage):
            if worker in self._summing and not self._begun[worker] and not self.calls[worker]:
                self._summing.remove(worker)
                unit, since = Unit(stage=stage, micro_batch=-1), self.team.pace.now()
                made = self.team.group.call(worker, "seal", self.step)
                call = Call(unit=unit, worker=worker, method="seal", results=(made,), since=since, again=True)
                self.calls[worker].append(call)
                self._moved(worker)

    def _begin_some(self, stage: int) -> bool:
        """Have units of a stage begun that can be, as long as there are replicas for them.

        Whether replicas that have nothing to do now will not get any more either.
        """
        enough = False
        self._busy.pop(stage, None)
        waiting, later = self._waiting[stage], []
        while waiting:
            unit = self.units[stage, waiting[0]]
            if unit.state == State.WAITING:
                if (x := self._x(unit)) is None:
                    later.append(waiting[0])
                elif (worker := self._choose(unit)) is not None:
                    self._forward(unit, worker, x)
                    self._note_busy(stage, worker)
                elif self.team.fixed:
                    later.append(waiting[0])
                else:
                    enough = True
                    break
            heappop(waiting)
        if later:
            waiting += later
            heapify(waiting)
        return enough or not self._unbegun[stage]

    def _note_busy(self, stage: int, worker: str) -> None:
        """A replica that was given a unit may have enough to do now."""
        if stage in self._busy and not self._open(worker, stage):
            idle_R, unit_R = self._busy[stage]
            more = self._idle(stage, worker), self._unit(stage, worker)
            self._busy[stage] = np.append(idle_R, more[0]), np.append(unit_R, more[1])

    def _forward(self, unit: Unit, worker: str, x: Any) -> None:
        unit.worker = worker
        self._unbegun[unit.stage] -= 1
        self._begun[worker] += 1
        self._summing.add(worker)
        if unit.stage == self._last:
            unit.state = State.BACKWARD
            self._call(unit, "last", x, self._parts[unit.micro_batch].targets, returns=2)
        else:
            unit.state = State.FORWARD
            self._call(unit, "forward", x)

    def _backward(self, unit: Unit) -> None:
        unit.state = State.BACKWARD
        del self._between[unit.stage][unit.micro_batch]
        self._call(unit, "backward", self._dy(unit))

    def _call(self, unit: Unit, method: str, *args: Any, returns: int | None = None, again: bool = False) -> None:
        since = self.team.pace.now()
        try:
            made = self.team.group.call(unit.worker, method, self.step, unit.micro_batch, *args, returns=returns)
        except WorkersLost:  # this one, or another
            self._unmade(unit, method, again)
            raise
        results = (made,) if returns is None else tuple(made)
        call = Call(unit=unit, worker=unit.worker, method=method, results=results, since=since, again=again)
        self.calls[unit.worker].append(call)
        self._moved(unit.worker)

    def _moved(self, worker: str) -> None:
        for line in self._lines.values():
            line.moved(worker)

    def _x(self, unit: Unit) -> Any:
        """What a unit takes, None where it is not there yet."""
        if unit.stage == 0:
            return self._parts[unit.micro_batch].inputs
        before = self.units[unit.stage - 1, unit.micro_batch]
        if before.y is None and before.state >= State.BETWEEN:
            self._remake(before)
        return before.y

    def _dy(self, unit: Unit) -> Any:
        """The gradient that a unit takes, None where it is not there yet."""
        after = self.units[unit.stage + 1, unit.micro_batch]
        if after.dx is None and after.state == State.DONE:
            self._remake(after, gradient=True)
        return after.dx

    def _remake(self, unit: Unit, *, gradient: bool = False) -> None:
        """A unit's result was lost on its way: have it made once more, and counted once."""
        made = any(call.again and call.unit is unit for call in self.calls[unit.worker])
        if made or (x := self._x(unit)) is None:
            return
        if not gradient:
            self._call(unit, "output", x, again=True)
        elif unit.stage == self._last:
            self._call(unit, "gradient", x, self._parts[unit.micro_batch].targets, None, again=True)
        elif (dy := self._dy(unit)) is not None:
            self._call(unit, "gradient", x, None, dy, again=True)

    def _choose(self, unit: Unit) -> str | None:
        """Of the replicas that have not enough to do the one that would finish the unit first.

        None where the others are expected to have done all units by then.
        """
        plan, stage = self.team.plan, unit.stage
        if self.team.fixed:
            worker = self.team.members[plan.worker(stage, plan.units[stage][unit.micro_batch])]
            return worker if self._open(worker, stage) else None
        if stage not in self._lines:
            team = self.team.present(stage)
            rate = sum(1 / self._unit(stage, worker) for worker in team)
            self._lines[stage] = Line(team, partial(self._end, stage), rate)
        line = self._lines[stage]
        if (first := line.first()) is None:
            return None
        worker, end = first
        left = self._unbegun[stage]
        if left > (end - self._now) * line.rate:
            return worker
        if stage not in self._busy:
            others = line.busy
            idle, units = [self._idle(stage, other) for other in others], [self._unit(stage, other) for other in others]
            self._busy[stage] = np.array(idle), np.array(units)
        idle_R, unit_R = self._busy[stage]
        done = np.maximum(np.ceil((end - idle_R) / unit_R) - 1, 0).sum()
        return worker if done < left else None

    def _end(self, stage: int, worker: str) -> tuple[float, int] | None:
        """(when a worker is expected to finish one more unit of the stage, how many units it has begun).

        None while it has enough to do.
        """
        if not self._open(worker, stage):
            return None
        return self._idle(stage, worker) + self._unit(stage, worker), self._begun[worker]

    def _unit(self, stage: int, worker: str) -> float:
        """Seconds that a worker is expected to take for a unit of the stage."""
        seconds = self.team.pace.seconds
        if stage == self._last:
            return max(seconds(worker, "last", stage), BRIEF)
        return max(seconds(worker, "forward", stage) + seconds(worker, "backward", stage), BRIEF)

    def _sealing(self, stage: int, worker: str) -> float:
        """Seconds that hashing its sums should take a worker: where it is not known, as slow as its units are."""
        pace, method = self.team.pace, "last" if stage == self._last else "backward"
        known, usual, unit = pace.of(worker, "seal", stage), pace.mean("seal", stage), pace.mean(method, stage)
        if known is not None or not usual or not unit:
            return known or 0.0
        return usual * pace.seconds(worker, method, stage) / unit

    def _open(self, worker: str, stage: int) -> bool:
        most = DEPTH if stage == self._last else max(2, self._last + 1 - stage)
        return len(self.calls[worker]) < DEPTH and self._begun[worker] < most

    def _idle(self, stage: int, worker: str) -> float:
        """When a worker is expected to be done with what it has, and with its sums' hashes."""
        mine, pace = self.calls[worker], self.team.pace
        after = self._sealing(stage, worker)
        if not mine:
            return self._now + after
        end = self._began(mine[0])
        for call in mine:
            end += pace.seconds(worker, call.method, stage)
        return max(end, self._now) + after

    def _began(self, call: Call) -> float:
        return max(call.since, self._free.get(call.worker, call.since))

    # ---------------------------------------------------------------------------------------------------- taking in

    def _collect(self) -> None:
        """Take in what is finished. WorkersLost where a worker is lost, fails or takes far longer than it should."""
        calls = [call for queue in self.calls.values() for call in queue]
        finished = self.team.group.wait([call.results[0] for call in calls], POLL)
        if not finished:
            self._look_for_hung()
        errors = [self._take(calls[number], error) for number, error in finished]
        lost: dict[str, str] = {}
        for error in errors:
            if isinstance(error, WorkersLost):
                lost |= error.lost
            elif error is not None:
                raise error
        if lost:
            raise WorkersLost(lost)

    def _take(self, call: Call, error: FailureError | None) -> FailureError | None:
        """Note what a call gave; the error that is not for us to deal with."""
        unit, now = call.unit, self.team.pace.now()
        self.calls[call.worker] = [other for other in self.calls[call.worker] if other is not call]
        if error is None:
            self.team.pace.note(call.worker, call.method, unit.stage, now - self._began(call))
        self._free[call.worker] = now
        if error is None:
            self._taken(call)
        elif isinstance(error, ValueLost):
            self._undo(call)
            error = None
        elif isinstance(error, WrongValue):
            step = 1 if call.method == "backward" else -1
            giver = self.units[unit.stage + step, unit.micro_batch].worker
            self._undo(call)
            error = WorkersLost({giver: f"it {error}"}) if giver else None
        elif self._may_dismiss(call, error):
            self._failed = call.worker
            error = WorkersLost({call.worker: f"dismissed: {error}"})
        self._moved(call.worker)
        return error

    def _may_dismiss(self, call: Call, error: FailureError) -> bool:
        """Whether other replicas are to try what failed. Where two workers fail in a step it is not their fault."""
        team = self.team
        if team.fixed or isinstance(error, WorkersLost) or self._failed not in ("", call.worker):
            return False
        return len(team.present(call.unit.stage)) > 1

    def _taken(self, call: Call) -> None:
        """Note the results of a call."""
        unit = call.unit
        match call.method:
            case "forward" | "output":
                (unit.y,) = call.results
                heappush(self._waiting[unit.stage + 1], unit.micro_batch)
            case "backward" | "gradient":
                (unit.dx,) = call.results
            case "last":
                unit.loss, unit.dx = call.results
        if not call.again:
            unit.state = State(unit.state + 1)
            if unit.state == State.BETWEEN:
                self._between[unit.stage][unit.micro_batch] = unit
            elif unit.state == State.DONE:
                self._left -= 1
                self._begun[unit.worker] -= 1

    def _undo(self, call: Call) -> None:
        """A call was not made because something that it takes is gone: that is made again, and then this is."""
        unit = call.unit
        if unit.stage and call.method != "backward":
            self.units[unit.stage - 1, unit.micro_batch].y = None
        if unit.stage < self._last and call.method in ("backward", "gradient"):
            self.units[unit.stage + 1, unit.micro_batch].dx = None
        self._unmade(unit, call.method, call.again)

    def _unmade(self, unit: Unit, method: str, again: bool) -> None:
        """A call was not made: the unit is where it was."""
        if method == "backward":
            unit.state = State.BETWEEN
            self._between[unit.stage][unit.micro_batch] = unit
        elif not again:
            self._begun[unit.worker] -= 1
            unit.worker, unit.state = "", State.WAITING
            self._wait(unit)

    def _look_for_hung(self) -> None:
        """WorkersLost naming those whose oldest call has taken far longer than anybody should."""
        pace, late = self.team.pace, {}
        longest = cache(pace.known)
        for worker, (call, *_) in ((worker, queue) for worker, queue in self.calls.items() if queue):
            known = longest(call.method, call.unit.stage)
            allowed = FIRST_PATIENCE if known is None else max(PATIENCE, SLACK * known)
            taken = pace.now() - self._began(call)
            if taken > allowed and not self._may_sit_out(call):
                late[worker] = f"no answer to {call.method} in {taken:.0f} s, expected within {allowed:.0f} s"
        if late:
            raise WorkersLost(late)

    def _may_sit_out(self, call: Call) -> bool:
        """Whether a worker may be found to be a straggler rather than hung."""
        stage = call.unit.stage
        known = self.team.pace.of(call.worker, call.method, stage) is not None
        return self.sit_out is not None and not self.team.fixed and known and len(self.team.present(stage)) > 1

    def _straggler(self) -> Late | None:
        """A worker that is later than the others of its stage need for what is left and all that it did of the step.

        Who waits as long as the remedy takes waits at most twice as long as would have been best, whenever the worker
        will be done (as who rents skis until that has cost a pair).
        """
        pace, now = self.team.pace, self.team.pace.now()
        if self.team.fixed or now < self._next_look:
            return None
        self._now, self._next_look = now, now + POLL
        for stage in range(self._last, -1, -1):
            team = self.team.present(stage)
            for worker in team:
                if not (calls := self.calls[worker]):
                    continue
                method, since = calls[0].method, self._began(calls[0])
                expected = pace.of(worker, method, stage)
                if expected is None or (late := now - since - expected) <= GRACE:
                    continue
                if late > (seconds := self._seconds_without(stage, worker, team)):
                    reason = f"{late:.1f} s late with {method}, others need {seconds:.1f} s for all that is left"
                    return Late(
                        worker=worker,
                        stage=stage,
                        step=self.step,
                        method=method,
                        since=since,
                        handles=tuple(call.results[0] for call in calls),
                        reason=reason,
                    )
        return None

    def _seconds_without(self, stage: int, worker: str, team: Sequence[str]) -> float:
        """In which the others of a stage would have done its units that are left, and all of this worker's.

        Each by the one that would finish it first; of many the most as fast as all are together.
        """
        units = [self._unit(stage, other) for other in team if other != worker]
        ends = [self._idle(stage, other) - self._now for other in team if other != worker]
        if not units:
            return math.inf
        left = self._unbegun[stage] + sum(unit.worker == worker for unit in self.units.values())
        many = max(left - ROUNDS * len(units), 0)
        shift = many / sum(1 / seconds for seconds in units)
        heap = [(end + shift + seconds, seconds) for end, seconds in zip(ends, units, strict=True)]
        heapify(heap)
        done = 0.0
        for _ in range(left - many):
            done, seconds = heap[0]
            heapreplace(heap, (done + seconds, seconds))
        return done
