"""The units of one step on the workers of a crew: who takes what, when, and again where a worker is lost.

A unit is a micro-batch through a stage: forward, and backward on the same replica (in the last stage both are one
call). A replica of the stage takes the next unit when it would finish it first, so fast ones take more. Backward goes
before forward, and a replica begins no more units than its stage is from the end (1F1B). Nothing here can change a bit.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from runtime.feed import Batch
from runtime.groups import Handle, ValueLost, WorkerGroup, WorkersLost
from runtime.plan import Plan
from storage.errors import FailureError

DEPTH = 2
"""Calls that a replica has at a time: the next one's inputs travel while it computes."""
POLL = 0.5
"""Seconds after which unfinished calls are looked at."""
PATIENCE, FIRST_PATIENCE = 20.0, 600.0
"""Seconds that a call may take whatever its length, and where nobody has made such a call before (it is compiled)."""
SLACK = 10.0
"""How many times the expected time a call may take before its worker is taken for hung."""


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


class Pace:
    """Seconds that calls take, by worker and method: a running mean. `now` is the clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._seconds: dict[tuple[str, str, int], float] = {}

    def note(self, worker: str, method: str, stage: int, seconds: float) -> None:
        """One call took so long."""
        place = worker, method, stage
        self._seconds[place] = (self._seconds.get(place, seconds) + seconds) / 2

    def known(self, method: str, stage: int) -> float | None:
        """The longest of what workers are expected to take for a call; None where none has made it yet."""
        return max((s for (_, m, at), s in self._seconds.items() if (m, at) == (method, stage)), default=None)

    def seconds(self, worker: str, method: str, stage: int) -> float:
        """What a worker is expected to take: as the others where it has not made such a call, 1 where nobody has."""
        known = self._seconds.get((worker, method, stage))
        if known is not None:
            return known
        others = [s for (_, m, at), s in self._seconds.items() if (m, at) == (method, stage)]
        return sum(others) / len(others) if others else 1.0

    def forget(self, workers: Collection[str]) -> None:
        """These workers are gone."""
        self._seconds = {place: s for place, s in self._seconds.items() if place[0] not in workers}


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


@dataclass(kw_only=True)
class Work:
    """Some micro-batches of one step, from their inputs to their losses and gradient sums."""

    team: Team
    step: int
    batch: Batch
    micro_batches: Sequence[int]
    units: dict[tuple[int, int], Unit] = field(init=False)
    calls: dict[str, list[Call]] = field(init=False, default_factory=lambda: defaultdict(list))
    """What each worker has to do, in order."""
    _begun: Counter[str] = field(init=False, default_factory=Counter)
    """How many units each worker has begun and not finished."""
    _free: dict[str, float] = field(init=False, default_factory=dict)
    """When each worker was last seen to finish something."""

    def __post_init__(self) -> None:
        stages = range(len(self.team.plan.stages))
        self.units = {(s, m): Unit(stage=s, micro_batch=m) for s in stages for m in self.micro_batches}
        of = len(self.team.plan.micro_batches)
        self._parts = {m: self.batch.micro_batch(m, of) for m in self.micro_batches}
        self._last = len(stages) - 1
        self._left = len(self.units)

    def run(self) -> list[Handle]:
        """Go on until every unit is done; handles of the losses. WorkersLost: `forget` them, then run again."""
        while self._left:
            self._issue()
            self._collect()
        return [self.units[self._last, m].loss for m in self.micro_batches]

    def forget(self, workers: Collection[str]) -> None:
        """What these workers had done is to be done again by others."""
        for unit in self.units.values():
            if unit.worker in workers:
                self._left += unit.state == State.DONE
                unit.worker, unit.state, unit.y, unit.dx, unit.loss = "", State.WAITING, None, None, None
        for worker in workers:
            self.calls.pop(worker, None)
            self._begun.pop(worker, None)

    # ----------------------------------------------------------------------------------------------------- giving out

    def _issue(self) -> None:
        for stage in range(self._last, -1, -1):
            mine = [self.units[stage, m] for m in self.micro_batches]
            for unit in mine:
                open_to_it = unit.state == State.BETWEEN and len(self.calls[unit.worker]) < DEPTH
                if open_to_it and self._dy(unit) is not None:
                    self._backward(unit)
            for unit in mine:
                if unit.state == State.WAITING and (x := self._x(unit)) is not None:
                    worker = self._choose(unit)
                    if worker is None:
                        if self.team.fixed:
                            continue
                        break
                    self._forward(unit, worker, x)

    def _forward(self, unit: Unit, worker: str, x: Any) -> None:
        unit.worker = worker
        self._begun[worker] += 1
        if unit.stage == self._last:
            unit.state = State.BACKWARD
            self._call(unit, "last", x, self._parts[unit.micro_batch].targets, returns=2)
        else:
            unit.state = State.FORWARD
            self._call(unit, "forward", x)

    def _backward(self, unit: Unit) -> None:
        unit.state = State.BACKWARD
        self._call(unit, "backward", self._dy(unit))

    def _call(self, unit: Unit, method: str, *args: Any, returns: int | None = None, again: bool = False) -> None:
        since = self.team.pace.now()
        made = self.team.group.call(unit.worker, method, self.step, unit.micro_batch, *args, returns=returns)
        results = (made,) if returns is None else tuple(made)
        call = Call(unit=unit, worker=unit.worker, method=method, results=results, since=since, again=again)
        self.calls[unit.worker].append(call)

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
        """The replica that would finish the unit first; None while that one has enough to do."""
        plan, members = self.team.plan, self.team.members
        stage = unit.stage
        if self.team.fixed:
            worker = members[plan.worker(stage, plan.units[stage][unit.micro_batch])]
            return worker if self._open(worker, stage) else None
        pace = self.team.pace
        methods = ("last",) if stage == self._last else ("forward", "backward")
        team = [members[place] for place in plan.team(stage)]
        ends = {w: self._busy(w) + sum(pace.seconds(w, method, stage) for method in methods) for w in team}
        best = min(team, key=lambda worker: (ends[worker], self._begun[worker]))
        return best if self._open(best, stage) else None

    def _open(self, worker: str, stage: int) -> bool:
        most = DEPTH if stage == self._last else max(2, self._last + 1 - stage)
        return len(self.calls[worker]) < DEPTH and self._begun[worker] < most

    def _busy(self, worker: str) -> float:
        """Seconds until a worker is expected to be done with what it has."""
        mine = self.calls[worker]
        total = sum(self.team.pace.seconds(worker, call.method, call.unit.stage) for call in mine)
        return max(total - (self.team.pace.now() - self._began(mine[0])), 0.0) if mine else 0.0

    def _began(self, call: Call) -> float:
        return max(call.since, self._free.get(call.worker, call.since))

    # ---------------------------------------------------------------------------------------------------- taking in

    def _collect(self) -> None:
        """Take in what is finished. WorkersLost where a worker takes far longer than it should."""
        calls = [call for queue in self.calls.values() for call in queue]
        finished = self.team.group.wait([call.results[0] for call in calls], POLL)
        if not finished:
            self._look_for_hung()
        errors = [self._take(calls[number], error) for number, error in finished]
        for error in errors:
            if error is not None:
                raise error

    def _take(self, call: Call, error: FailureError | None) -> FailureError | None:
        """Note what a call gave; the error that is not for us to deal with."""
        unit, now = call.unit, self.team.pace.now()
        self.calls[call.worker] = [other for other in self.calls[call.worker] if other is not call]
        if error is None:
            self.team.pace.note(call.worker, call.method, unit.stage, now - self._began(call))
        self._free[call.worker] = now
        if isinstance(error, ValueLost):
            self._undo(call)
            return None
        if error is not None:
            return error
        match call.method:
            case "forward" | "output":
                (unit.y,) = call.results
            case "backward" | "gradient":
                (unit.dx,) = call.results
            case "last":
                unit.loss, unit.dx = call.results
        if not call.again:
            unit.state = State(unit.state + 1)
            if unit.state == State.DONE:
                self._left -= 1
                self._begun[unit.worker] -= 1
        return None

    def _undo(self, call: Call) -> None:
        """A call was not made because something that it takes is gone: that is made again, and then this is."""
        unit = call.unit
        if unit.stage and call.method != "backward":
            self.units[unit.stage - 1, unit.micro_batch].y = None
        if unit.stage < self._last and call.method in ("backward", "gradient"):
            self.units[unit.stage + 1, unit.micro_batch].dx = None
        if call.method == "backward":
            unit.state = State.BETWEEN
        elif not call.again:
            self._begun[unit.worker] -= 1
            unit.worker, unit.state = "", State.WAITING

    def _look_for_hung(self) -> None:
        """WorkersLost naming those whose oldest call has taken far longer than anybody should."""
        pace, late = self.team.pace, {}
        for worker, (call, *_) in ((worker, queue) for worker, queue in self.calls.items() if queue):
            known = pace.known(call.method, call.unit.stage)
            allowed = FIRST_PATIENCE if known is None else max(PATIENCE, SLACK * known)
            taken = pace.now() - self._began(call)
            if taken > allowed:
                late[worker] = f"no answer to {call.method} in {taken:.0f} s, expected within {allowed:.0f} s"
        if late:
            raise WorkersLost(late)
