"""Whether a run should go by another plan, now that its hosts are others, or not as fast as the plan took them to be.

What is asked between two steps is a `Reviser`; `ByPlanner` is the one that follows the planner. It knows hosts by name,
what they were measured to do, and seconds; who runs there and how they get their state is for `runtime.roster`. Nothing
here can change a bit.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol

from runtime.costs import SLOT_BYTES, WEIGHT_BYTES, Host, Model
from runtime.plan import Plan
from runtime.planner import Placement, evaluate, make_placement, worth_moving
from runtime.search import GAIN
from storage.errors import FailureError

DRIFT, SEVERAL = 0.25, 5
"""By how much what is observed has to differ from what was expected, and how often in a row."""
EVERY_SECONDS = 30.0
"""How long after a decision no other is made only because hosts are slower or faster."""
MARGIN = 0.1
"""By how much a step has to become shorter: predictions miss by as much."""
GRADE, BITS = 0.05, 6
"""Speeds are told apart by their logarithm in such steps, memory by so many bits: what is alike is planned as alike."""
LEAST_LATENCY = 1e-4
"""Seconds below which latencies are not told apart."""
NAMED = 3
"""Hosts of a stage that are told by name."""


def off(ratios: Sequence[float]) -> bool:
    """Whether the last SEVERAL ratios of observed to expected are all above 1 + DRIFT, or all below 1 - DRIFT."""
    last = ratios[-SEVERAL:]
    return len(last) == SEVERAL and (min(last) > 1 + DRIFT or max(last) < 1 - DRIFT)


class Sites(Protocol):
    """Hosts that take one worker each."""

    def hosts(self) -> Sequence[Host]:
        """Those there are now and not about to leave, with a worker or without, as they were measured."""

    def at(self) -> Mapping[str, str]:
        """The host of each worker of the group."""

    def send(self, workers: Mapping[str, str]) -> None:
        """Workers of these names are to be started on these hosts."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands between two steps.

    `hosts` names the host of each place of the plan; `seconds` is what a unit takes there, forward and backward, where
    that is known; `now` is of the run's clock; `away` are hosts to do without, as their workers held up a step.
    """

    plan: Plan
    hosts: Mapping[str, str]
    seconds: Mapping[str, float]
    steps_left: int
    now: float
    away: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Revision:
    """Another plan: `hosts[s][r]` is the host of replica r of stage s; `told` says for people what changes."""

    plan: Plan
    hosts: tuple[tuple[str, ...], ...]
    told: str

    @property
    def places(self) -> dict[str, str]:
        """The host of each place of the plan."""
        return {self.plan.worker(s, r): host for s, team in enumerate(self.hosts) for r, host in enumerate(team)}


class Reviser(Protocol):
    """Who decides where the work goes."""

    @property
    def sites(self) -> Sites:
        """The hosts that it decides over."""

    def begin(self) -> Revision:
        """Where to begin, with the hosts there are; FailureError where they do not suffice."""

    def revise(self, standing: Standing) -> Revision | None:
        """What to change over to after a step; None where it had better stay."""


@dataclass(kw_only=True)
class ByPlanner:
    """Follows the planner, with hosts as fast as they turn out to be.

    It decides when hosts have come, gone or lost their workers, and when some host has been off what the plan took it
    for, against the others, for several steps. That all are slower than they were measured, as calls between workers
    take time too, is no reason.
    """

    model: Model
    sites: Sites
    placement: Placement | None = field(init=False, default=None)
    """The last one that was begun with."""
    _recent: dict[str, deque[float]] = field(init=False, default_factory=dict)
    """How many times as long as measured units took on each host, after the last steps under this plan."""
    _factors: dict[str, float] = field(init=False, default_factory=dict)
    """The same, as the last decision took it."""
    _basis: tuple[object, ...] = field(init=False, default=())
    """The hosts that the last decision was about, those with work, and the bounds."""
    _next: float = field(init=False, default=-math.inf)

    def begin(self) -> Revision:
        """See Reviser."""
        hosts = self._hosts(self.sites.hosts())
        if not hosts:
            raise FailureError("no host is left to place workers on; look at `ray status`, then resume the run")
        placement = self.placement = make_placement(self.model, hosts)
        self._recent = {}
        return Revision(
            plan=plan_of(placement),
            hosts=placement.hosts,
            told=f"placed: blocks {described(placement.bounds, placement.hosts)}",
        )

    def revise(self, standing: Standing) -> Revision | None:
        """See Reviser. Pays: what is saved in the steps left is more than moving the state takes."""
        there = {host.name: host for host in self.sites.hosts() if host.name not in standing.away}
        basis = (frozenset(there), frozenset(standing.hosts.values()), standing.plan.bounds)
        if basis[1:] != self._basis[1:]:
            self._recent = {}
        self._observe(standing, there)
        if basis == self._basis and not (standing.now >= self._next and self._drifted()):
            return None
        self._basis, self._next = basis, standing.now + EVERY_SECONDS
        self._factors |= {host: statistics.median(seen) for host, seen in self._recent.items() if len(seen) == SEVERAL}
        hosts = self._hosts(list(there.values()))
        try:
            placement = make_placement(self.model, hosts) if hosts else None
        except FailureError:
            placement = None
        return None if placement is None else self._better(placement, {host.name: host for host in hosts}, standing)

    def _better(self, found: Placement, hosts: Mapping[str, Host], standing: Standing) -> Revision | None:
        """The change to a placement over these hosts, or to one nearer to what is, if it is one and pays."""
        plan, at = standing.plan, {host: Plan.place(place)[0] for place, host in standing.hosts.items()}
        before = tuple(
            tuple(standing.hosts.get(place, "") for place in plan.team(s)) for s in range(len(plan.replicas))
        )
        current = placed(self.model, plan.bounds, before, hosts)
        moves = [
            Move(placement, *settled(self.model, placement, list(hosts.values()), plan.bounds, at))
            for placement in (found, *([shifted(self.model, current, hosts)] if current else []))
        ]
        bandwidth = min(host.bandwidth for host in hosts.values())
        best = min(moves, key=lambda move: move.placement.seconds * standing.steps_left + move.size / bandwidth)
        if plan.bounds == best.placement.bounds and list(map(set, before)) == list(map(set, best.hosts)):
            return None
        seconds = current.seconds if current else math.inf
        if not worth_moving(
            seconds,
            best.placement.seconds,
            steps_left=standing.steps_left,
            move_bytes=best.size,
            bandwidth=bandwidth,
            margin=MARGIN,
        ):
            return None
        saved = f", saves {1 - best.placement.seconds / seconds:.0%} of a step" if current else ""
        now = described(best.placement.bounds, best.hosts)
        return Revision(
            plan=plan_of(best.placement),
            hosts=best.hosts,
            told=f"moved: blocks {described(plan.bounds, before)}, now {now}{saved}",
        )

    def _hosts(self, measured: Sequence[Host]) -> list[Host]:
        """The hosts as fast as they turned out to be; of others it is thought that they are off as most are."""
        usual = statistics.median_low(self._factors.values()) if self._factors else 1.0
        return [graded(replace(host, speed=host.speed / self._factors.get(host.name, usual))) for host in measured]

    def _observe(self, standing: Standing, there: Mapping[str, Host]) -> None:
        for place, seconds in standing.seconds.items():
            host, (stage, _) = standing.hosts.get(place, ""), Plan.place(place)
            if host in there:
                work = self.model.span(standing.plan.bounds[stage], standing.plan.bounds[stage + 1]).work
                seen = self._recent.setdefault(host, deque(maxlen=SEVERAL))
                seen.append(max(seconds * there[host].speed / max(work, 1e-12), 1e-9))

    def _drifted(self) -> bool:
        """Whether some host has been off for several steps, against what most are off by."""
        seen = {host: list(recent) for host, recent in self._recent.items() if len(recent) == SEVERAL}
        known = statistics.median_low(self._factors.values()) if self._factors else 1.0
        off_by = {h: [one / self._factors.get(h, known) for one in recent] for h, recent in seen.items()}
        usual = [statistics.median_low(step) for step in zip(*off_by.values(), strict=True)]
        return any(off([a / b for a, b in zip(ratios, usual, strict=True)]) for ratios in off_by.values())


# --------------------------------------------------------------------------------------------------------- pure parts


class Move(NamedTuple):
    """A placement, its hosts by stage and replica, and the bytes of state that change hosts for it."""

    placement: Placement
    hosts: tuple[tuple[str, ...], ...]
    size: int


def graded(host: Host) -> Host:
    """The host with the speed and memory of those about like it: within 2.5 %, and up to 3 % less.

    Of its link with half the bandwidth and twice the latency at the worst: measured again it is off by as much.
    """
    grain = 1 << max(host.memory.bit_length() - BITS, 0)
    return replace(
        host,
        speed=math.exp(round(math.log(host.speed) / GRADE) * GRADE),
        memory=host.memory // grain * grain,
        bandwidth=2.0 ** math.floor(math.log2(host.bandwidth)),
        latency=2.0 ** math.ceil(math.log2(max(host.latency, LEAST_LATENCY))),
    )


def plan_of(placement: Placement) -> Plan:
    """The plan of a placement."""
    return Plan(bounds=placement.bounds, replicas=placement.replicas, units=placement.units)


def placed(
    model: Model, bounds: Sequence[int], names: Sequence[Sequence[str]], hosts: Mapping[str, Host]
) -> Placement | None:
    """What is predicted for these stages; None where a host is not there, or has not the memory."""
    try:
        return evaluate(model, bounds, [[hosts[name] for name in team] for team in names])
    except (KeyError, FailureError):
        return None


def shifted(model: Model, placement: Placement, hosts: Mapping[str, Host]) -> Placement:
    """The best that comes of moving single blocks between neighbouring stages, again and again: hosts stay."""
    while True:
        inner = [
            [bound + (by if s == at else 0) for s, bound in enumerate(placement.bounds)]
            for at in range(1, len(placement.bounds) - 1)
            for by in (-1, 1)
        ]
        tried = [
            placed(model, bounds, placement.hosts, hosts)
            for bounds in inner
            if all(a < b for a, b in pairwise(bounds))
        ]  # fmt: skip
        best = min((one for one in tried if one), key=lambda one: one.seconds, default=placement)
        if best.seconds >= placement.seconds * (1 - GAIN):
            return placement
        placement = best


def described(bounds: Sequence[int], hosts: Sequence[Sequence[str]]) -> str:
    """`0-3 on a, b | 4 on c`: the blocks of each stage and its hosts, for people."""
    return " | ".join(
        f"{first if stop == first + 1 else f'{first}-{stop - 1}'} on "
        + (", ".join(team) if len(team) <= NAMED else f"{len(team)} hosts")
        for (first, stop), team in zip(pairwise(bounds), hosts, strict=True)
    )


def kept(model: Model, bounds: Sequence[int], stage: int) -> dict[tuple[str, str], int]:
    """Bytes of all that a replica keeps of the state, by what and tensor: weights, and slots of what it is home to."""
    held, *before = (
        {name for block in model.blocks[bounds[s] : bounds[s + 1]] for name in block.tensors}
        for s in range(stage, -1, -1)
    )
    weights = {("weight", name): WEIGHT_BYTES * model.elements[name] for name in held}
    homed = held.difference(*before)
    return weights | {("slots", name): SLOT_BYTES * model.slots * model.elements[name] for name in homed}


def settled(
    model: Model, placement: Placement, hosts: Sequence[Host], bounds: Sequence[int], at: Mapping[str, int]
) -> tuple[tuple[tuple[str, ...], ...], int]:
    """(hosts by stage and replica, bytes that move): of hosts that are alike those that lack least of a stage take it.

    `at` are the stages in which hosts are now, under `bounds`; others have nothing.
    """
    old = [kept(model, bounds, stage) for stage in range(len(bounds) - 1)]
    new = [kept(model, placement.bounds, stage) for stage in range(len(placement.stages))]
    lacks = [
        [sum(size for what, size in needed.items() if what not in has) for has in (*old, {})] for needed in new
    ]  # by new stage, and old one or none
    kinds = {
        kind: sorted(host.name for host in same)
        for kind, same in groupby(sorted(hosts, key=lambda host: host.kind), key=lambda host: host.kind)
    }
    chosen = [["" for _ in stage.members] for stage in placement.stages]
    moved = 0
    for kind, names in kinds.items():
        slots = [
            (s, r) for s, stage in enumerate(placement.stages) for r, one in enumerate(stage.members)
            if one.host.kind == kind
        ]  # fmt: skip
        pairs = sorted((lacks[s][at.get(name, -1)], name not in at, s, r, name) for s, r in slots for name in names)
        taken: set[str] = set()
        for size, _, s, r, name in pairs:
            if name not in taken and not chosen[s][r]:
                chosen[s][r] = name
                taken.add(name)
                moved += size
    return tuple(map(tuple, chosen)), moved
