"""Placement on unequal machines: which blocks make a stage and which hosts take it, so that a step is shortest.

`make_placement` has `runtime.search` find it under the model of `runtime.costs`, and says what it means: who takes
what, for how long, with how much memory, and what is in the way.

Nothing here can change a bit of the result of training.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.costs import Groups, Host, Model, Span, spread, stage_costs
from runtime.search import Search, crossing
from storage.errors import FailureError, UsageError


@dataclass(frozen=True, kw_only=True)
class Member:
    """A host in a stage: micro-batches that it takes in a step, bytes that it holds, seconds that it works."""

    host: Host
    units: int
    memory_bytes: int
    busy: float
    idle: float
    """The part of the step in which it has nothing to do, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks `first .. stop` on its members, the fastest first. `units[m]` is the member that takes micro-batch m."""

    first: int
    stop: int
    members: tuple[Member, ...]
    units: tuple[int, ...]
    seconds: float
    """In which all micro-batches go through it."""

    @property
    def idle(self) -> float:
        """The part of its members' speed that is not used."""
        return _idle(self.members)


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A host without a stage, and why. One that is `too_small` can still verify; others would make steps no shorter."""

    host: Host
    too_small: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who takes which blocks, and what a step should take: seconds, in all and by what they go to.

    `exact` says whether no placement is better under the model of `runtime.costs`.
    """

    stages: tuple[Stage, ...]
    excluded: tuple[Excluded, ...]
    seconds: float
    compute: float
    transfers: float
    reduce: float
    update: float
    tightest: str
    exact: bool

    @property
    def bounds(self) -> tuple[int, ...]:
        """`bounds[s] .. bounds[s + 1]` are the blocks of stage s."""
        return (0, *(stage.stop for stage in self.stages))

    @property
    def hosts(self) -> tuple[tuple[str, ...], ...]:
        """Names of the hosts of each stage, by replica."""
        return tuple(tuple(member.host.name for member in stage.members) for stage in self.stages)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Replicas of each stage."""
        return tuple(len(stage.members) for stage in self.stages)

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """`units[s][m]` is the replica of stage s that takes micro-batch m."""
        return tuple(stage.units for stage in self.stages)

    @property
    def idle(self) -> float:
        """The part of the hosts' speed that a step does not use, 0 to 1."""
        return _idle([member for stage in self.stages for member in stage.members])


def make_placement(model: Model, hosts: Sequence[Host], *, stages: int | None = None) -> Placement:
    """The placement with the shortest predicted step, with exactly so many stages where `stages` is given.

    UsageError where no hosts are given, two have one name, or the number of stages is not possible; FailureError naming
    what is missing where the model does not fit the hosts.
    """
    _check(model, hosts, stages)
    too_small = {host.name: reason for host in hosts if (reason := _too_small(model, host, len(hosts)))}
    able = sorted((host for host in hosts if host.name not in too_small), key=lambda host: (host.kind, host.name))
    search = Search(model, able, stages)
    found = search.best() if able else None
    if found is None:
        raise _impossible(model, hosts, too_small, stages, exact=not able or search.exact)
    return _placement(model, search.deal(found), hosts, too_small, exact=search.exact)


def evaluate(model: Model, bounds: Sequence[int], hosts: Sequence[Sequence[Host]]) -> Placement:
    """The prediction for given stages: hosts[s] take the blocks `bounds[s] .. bounds[s + 1]`.

    FailureError naming the host that has not the memory.
    """
    dealt = [
        (model.span(first, stop), tuple(group))
        for (first, stop), group in zip(itertools.pairwise(bounds), hosts, strict=True)
    ]
    return _placement(model, dealt, [host for group in hosts for host in group], {}, exact=False)


def worth_moving(
    current: float, better: float, *, steps_left: int, move_bytes: int, bandwidth: float, margin: float = 0.05
) -> bool:
    """Whether changing over pays: what is saved (seconds a step) is more than the move takes.

    `move_bytes` of state go over `bandwidth` bytes/s. A prediction that is better by less than `margin` does not count.
    """
    saved = (current - better) * steps_left
    return better < current * (1 - margin) and saved > move_bytes / bandwidth


# ------------------------------------------------------------------------------------------------------- what it means


def _placement(
    model: Model,
    dealt: Sequence[tuple[Span, tuple[Host, ...]]],
    hosts: Sequence[Host],
    too_small: dict[str, str],
    *,
    exact: bool,
) -> Placement:
    """The prediction for stages on real hosts; FailureError where one has not the memory."""
    costs = []
    links = []
    for span, group in dealt:
        alone = Groups(group, np.ones((1, len(group)), np.int64), model.micro_batches)
        costs.append(stage_costs(model, span, alone))
        links.append((float(alone.slow_link[0]), float(alone.latency[0])))
    busy, unit, reduce, update = (
        [float(getattr(cost, name)[0]) for cost in costs] for name in ("busy", "unit", "reduce", "update")
    )
    compute = max(b - u for b, u in zip(busy, unit, strict=True)) + sum(unit)
    transfers = sum(
        crossing(span.input_bytes, *(a for pair in zip(before, after, strict=True) for a in pair))
        for (span, _), before, after in zip(dealt[1:], links, links[1:], strict=False)
    )
    seconds = compute + transfers + max(reduce) + max(update)
    stages = tuple(
        _stage(model, span, group, step=seconds, seconds=taken)
        for (span, group), taken in zip(dealt, busy, strict=True)
    )
    parts = {"compute": compute, "transfers": transfers, "reduce": max(reduce), "update": max(update)}
    return Placement(
        stages=stages,
        excluded=_excluded(hosts, stages, too_small),
        seconds=seconds,
        **parts,
        tightest=_tightest(stages, parts),
        exact=exact,
    )


def _stage(model: Model, span: Span, group: tuple[Host, ...], *, step: float, seconds: float) -> Stage:
    units = spread([host.speed for host in group], model.micro_batches)
    members = []
    for replica, host in enumerate(group):
        taken = units.count(replica)
        need = int(span.memory_bytes(model.slots, len(group), max(taken, 1)))
        if need > host.memory:
            raise FailureError(
                f"host {host.name}: expected {gib(need)} of memory for blocks {span.first} to {span.stop - 1}, "
                f"got {gib(host.memory)}; give it fewer blocks"
            )
        busy = (taken * span.work + span.prepare + span.owned / len(group) * model.update) / host.speed
        idle = max(0.0, 1 - busy / step) if step else 0.0
        members.append(Member(host=host, units=taken, memory_bytes=need, busy=busy, idle=idle))
    return Stage(first=span.first, stop=span.stop, members=tuple(members), units=units, seconds=seconds)


def _idle(members: Sequence[Member]) -> float:
    return sum(one.host.speed * one.idle for one in members) / sum(one.host.speed for one in members)


def _excluded(hosts: Sequence[Host], stages: Sequence[Stage], too_small: dict[str, str]) -> tuple[Excluded, ...]:
    used = {member.host.name for stage in stages for member in stage.members}
    return tuple(
        Excluded(
            host=host,
            too_small=host.name in too_small,
            reason=too_small.get(host.name, "no stage would be faster with it"),
        )
        for host in hosts
        if host.name not in used
    )


def _tightest(stages: Sequence[Stage], parts: dict[str, float]) -> str:
    """What most keeps a step from being shorter, in words."""
    slowest = max(range(len(stages)), key=lambda s: stages[s].seconds)
    stage = stages[slowest]
    computed = max((member.units * member.busy / max(member.units, 1) for member in stage.members), default=0.0)
    words = {
        "compute": f"the speed of stage {slowest}" if computed >= 0.9 * stage.seconds else f"links of stage {slowest}",
        "transfers": "links between stages",
        "reduce": "links within a stage, by which gradients are added up",
        "update": "the update of the weights and their way to all replicas",
    }
    largest = max(parts, key=lambda name: parts[name])
    members = [member for stage in stages for member in stage.members]
    full = max(members, key=lambda member: member.memory_bytes / member.host.memory)
    share = full.memory_bytes / full.host.memory
    memory = f"; memory of {full.host.name} ({share:.0%} of {gib(full.host.memory)})" if share > 0.8 else ""
    return f"{words[largest]} ({parts[largest] / max(sum(parts.values()), 1e-12):.0%} of a step){memory}"


def _too_small(model: Model, host: Host, replicas: int) -> str:
    """Why a host can take no block at all; "" where it can."""
    need, block = min((_least(model, block, replicas), block) for block in range(len(model.blocks)))
    if need <= host.memory:
        return ""
    return f"the smallest block, {block}, needs {gib(need)} of memory, it has {gib(host.memory)}"


def _least(model: Model, block: int, replicas: int) -> int:
    """Bytes that one block needs at least, with so many replicas to share its sums and one micro-batch at a time."""
    return int(model.span(block, block + 1).memory_bytes(model.slots, replicas, 1))


def _check(model: Model, hosts: Sequence[Host], stages: int | None) -> None:
    if not hosts:
        raise UsageError("placement: expected at least one host, got none; name them in [[hosts]]")
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"placement: expected every host once, got {twice[0]!r} twice; give each a name of its own")
    most = min(len(model.blocks), len(hosts))
    if stages is not None and not 1 <= stages <= most:
        raise UsageError(
            f"placement: expected 1 to {most} stages for {len(model.blocks)} blocks on {len(hosts)} hosts, "
            f"got {stages}; set --stages"
        )


def _impossible(
    model: Model, hosts: Sequence[Host], too_small: dict[str, str], stages: int | None, *, exact: bool
) -> FailureError:
    """The error that names what is missing most."""
    remedy = "add hosts with more memory" + (", or leave --stages out" if stages else "")
    largest = max(hosts, key=lambda host: host.memory)
    need, block = max((_least(model, block, len(hosts)), block) for block in range(len(model.blocks)))
    if need > largest.memory:
        return FailureError(
            f"placement: block {block} alone needs {gib(need)} of memory, and the largest host, {largest.name}, has "
            f"{gib(largest.memory)}; {remedy}"
        )
    able = [host for host in hosts if host.name not in too_small]
    if stages and len(able) < stages:
        return FailureError(
            f"placement: expected {stages} hosts with the memory for a block, one for each stage, got {len(able)}; "
            f"{remedy}"
        )
    together, had = sum(_least(model, b, 1) for b in range(len(model.blocks))), sum(host.memory for host in able)
    found = "fits" if exact else "was found that fits"
    return FailureError(
        f"placement: no division of the blocks over the hosts {found}: one by one the blocks need {gib(together)} of "
        f"memory, block {block} most of it with {gib(need)}, and {len(able)} hosts have {gib(had)} together; {remedy}"
    )


def gib(size: int) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
