"""Who is in a crew while a run trains: workers that are lost, that come, and that leave.

Units are pure and sums are integers, so none of this can change a bit. Every replica of a stage holds the whole state
of the stage: while one is left, nothing is lost but what the others had under way.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count

from runtime.clock import Clock
from runtime.groups import Handle, Membership, WorkersLost
from runtime.plan import Plan
from runtime.revision import Reviser, Revision, Standing
from runtime.shards import WEIGHT, Layout, make_layout
from runtime.transition import Crew
from storage.codec import encode
from storage.errors import FailureError

LOOK_SECONDS = 2.0
"""How often the machines are asked whether there is room for more workers, or some are about to go."""
REST_SECONDS = 30.0
"""How long after a worker that did not come up no other is asked for."""
WINDOW_BYTES = 2**28
"""Bytes of tensors on their way to a new holder at a time."""
REASON, TOLD = 160, 400
"""Characters of a reason, and of what is told of a plan, that go into a record."""


class StageLost(FailureError):
    """No replica of a stage is left: its state is in the store only."""


class Roster:
    """Keeps a crew going: without those that are lost, with those that come.

    `configure` gives the encoded WorkerConfig of a worker at a place of a plan. Lost workers are replaced up to
    `wanted` in each stage; with `grow` there may be more, up to one a micro-batch. With a `reviser` it is that which
    says what the plan is and on which hosts, and neither of these counts. `note` is told what happens.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        configure: Callable[[str, Plan], bytes],
        membership: Membership,
        wanted: Sequence[int],
        clock: Clock,
        grow: bool = False,
        reviser: Reviser | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._crew = crew
        self._configure = configure
        self._membership = membership
        self._grow = grow
        self._reviser = reviser
        self._note = note
        self._wanted = wanted
        self._serial = count(1)
        self._clock = clock
        self._coming: list[tuple[str, int, Future[None]]] = []
        """Workers that are being started: their names in the group and their stages."""
        self._here: list[tuple[str, int]] = []
        """Workers that are there and have no place yet."""
        self._next_look = 0.0
        self._target: Revision | None = None
        """The plan to change over to once the workers that it lacks are there."""
        self._unsettled = False
        """Whether some workers may not have been told their places."""

    def lost(self, error: WorkersLost, later: bool = False) -> None:
        """Go on without the workers that are lost; StageLost where a stage has none left.

        With `later` their places stay empty until it is called again: that nobody is at them is all that units need.
        """
        crew = self._crew
        fresh = {place: name for place, name in crew.members.items() if name in error.lost and name not in crew.gone}
        crew.gone |= error.lost
        crew.group.stop(list(error.lost))
        crew.pace.forget(error.lost)
        self._here = [(name, stage) for name, stage in self._here if name not in error.lost]
        for place, name in fresh.items():
            self._note(f"lost {place}: {error.lost[name][:REASON]}")
        gone = {place: crew.gone[name] for place, name in crew.members.items() if name in crew.gone}
        self._require_somebody(gone)
        if (gone and (crew.fixed or not later)) or self._unsettled:
            self._change(gone, [])
        if not later:
            crew.gone = {}

    def turn(self, steps_left: int = 0) -> None:
        """Between two steps: let go who is leaving, take in who has come, ask for more where there is room.

        With a reviser: change over to another plan where that pays in the steps that are left.
        """
        now = self._crew.pace.now()
        self._welcome(now)
        look = now >= self._next_look
        left = self._leaving() if look else {}
        here = [] if self._reviser else list(self._here)  # with a reviser they come with their plan
        if left or here:
            self._change(left, here)
        if look:
            self._next_look = now + LOOK_SECONDS
        if self._coming:
            return
        if self._reviser:
            self._revise(self._reviser, steps_left, now)
        elif look:
            self._ask(self._membership.room())

    def close(self) -> None:
        """Ask for nobody any more; whoever is being started is not needed."""
        for name, _, started in self._coming:
            started.add_done_callback(partial(self._not_needed, name))

    def _not_needed(self, name: str, _: "Future[None]") -> None:
        self._crew.group.stop([name])

    def _change(self, without: Mapping[str, str], here: Sequence[tuple[str, int]]) -> None:
        """Have the crew go on without those at some places, lost or leaving, and with those that have come."""
        crew, plan = self._crew, self._crew.plan
        stages = range(len(plan.replicas))
        stay = [[crew.members[place] for place in plan.team(stage) if place not in without] for stage in stages]
        come = [[name for name, at in here if at == stage] for stage in stages]
        wanted = plan.resized([len(old) + len(new) for old, new in zip(stay, come, strict=True)])
        order = [name for old, new in zip(stay, come, strict=True) for name in (*old, *new)]
        leaving = {crew.members[place]: place for place in without if crew.members[place] not in crew.gone}
        bring(crew, wanted, dict(zip(wanted.workers, order, strict=True)))  # once: everybody is told
        self._here = [one for one in self._here if one not in here]
        crew.group.stop(list(leaving))
        crew.pace.forget(leaving)
        for place in leaving.values():
            self._note(f"left {place}: {without[place][:REASON]}")
        for stage, old in enumerate(stay):
            for place in wanted.team(stage)[len(old) :]:
                self._note(f"joined {place}")
        self._settle()

    def _settle(self) -> None:
        """Tell everybody the places; where some are lost meanwhile that is done again, for those that are left."""
        self._unsettled = True
        regroup(self._crew)
        self._unsettled = False

    # -------------------------------------------------------------------------------------------------- another plan

    def _revise(self, reviser: Reviser, steps_left: int, now: float) -> None:
        """Change over to the plan whose workers have come, or have those of a better one started."""
        target, self._target = self._target, None
        if target is None:
            target = reviser.revise(self._standing(reviser.sites.at(), steps_left, now))
            if target is None or self._send(reviser, target):
                self._target = target
                return
        self._follow(reviser, target)

    def _standing(self, at: Mapping[str, str], steps_left: int, now: float) -> Standing:
        crew = self._crew
        hosts = {place: at[name] for place, name in crew.members.items() if name in at}
        known = {place: self._observed(place) for place in hosts}
        seconds = {place: unit for place, unit in known.items() if unit is not None}
        return Standing(plan=crew.plan, hosts=hosts, seconds=seconds, steps_left=steps_left, now=now)

    def _observed(self, place: str) -> float | None:
        """Seconds that a unit takes the worker at a place, None where it has not done one."""
        crew, (stage, _) = self._crew, Plan.place(place)
        known = [crew.pace.of(crew.members[place], method, stage) for method in _methods(crew.plan, stage)]
        return None if None in known else sum(seconds for seconds in known if seconds is not None)

    def _send(self, reviser: Reviser, target: Revision) -> bool:
        """Have workers started on those hosts of a plan that have none, beside training; whether there are such."""
        busy = set(reviser.sites.at().values())
        for place, host in target.places.items():
            if host not in busy:
                name = f"{place}.{next(self._serial)}"
                reviser.sites.send({name: host})
                self._start(name, place, self._configure(place, target.plan))
        return bool(self._coming)

    def _follow(self, reviser: Reviser, target: Revision) -> None:
        """Change over to a plan, unless some of its workers did not come or are lost again."""
        crew = self._crew
        worker = {host: name for name, host in reviser.sites.at().items() if name not in crew.gone}
        members = {place: worker[host] for place, host in target.places.items() if host in worker}
        missing = len(members) < len(target.plan.workers)
        if not missing:
            bring(crew, target.plan, members)
            crew.pace.forget(members.values())  # stages are others, and so are their units
            self._note(target.told[:TOLD])
        self._here = []
        rest = set(worker.values()) - set(crew.members.values())
        crew.group.stop(sorted(rest))
        crew.pace.forget(rest)
        if not missing:
            self._settle()

    # ----------------------------------------------------------------------------------------------------- leaving

    def _leaving(self) -> dict[str, str]:
        """The places of those that are leaving, but for one where a stage would have nobody: it stays while it can."""
        crew, leaving = self._crew, self._membership.leaving()
        gone = {place: leaving[name] for place, name in crew.members.items() if name in leaving}
        for stage in range(len(crew.plan.replicas)):
            if set(crew.plan.team(stage)) <= set(gone):
                gone.pop(crew.plan.team(stage)[0])
        return gone

    def _require_somebody(self, gone: Mapping[str, str]) -> None:
        plan = self._crew.plan
        for stage in range(len(plan.replicas)):
            if set(plan.team(stage)) <= set(gone):
                raise StageLost(
                    f"stage {stage}: every replica was lost ({'; '.join(gone.values())[:REASON]}); the run goes on "
                    f"from the last checkpoint once there are workers again"
                )

    # ------------------------------------------------------------------------------------------------------ coming

    def _ask(self, room: int) -> None:
        """Have workers started for the stages that need them most, as many as there is room for."""
        configs: dict[int, tuple[str, bytes]] = {}
        crew = self._crew
        replicas = list(crew.plan.replicas)
        while room > 0 and (stage := self._short(replicas)) is not None:
            if stage not in configs:
                plan = crew.plan.resized([n + (at == stage) for at, n in enumerate(crew.plan.replicas)])
                place = plan.team(stage)[-1]
                configs[stage] = place, self._configure(place, plan)
            place, config = configs[stage]
            self._start(f"{place}.{next(self._serial)}", place, config)
            replicas[stage] += 1
            room -= 1

    def _start(self, name: str, place: str, config: bytes) -> None:
        """Have a worker started beside training."""
        started = self._clock.beside(partial(self._crew.group.start, {name: config}))
        self._coming.append((name, Plan.place(place)[0], started))

    def _short(self, replicas: Sequence[int]) -> int | None:
        """The stage of so many replicas that most needs another one, None where none does."""
        most = len(self._crew.plan.micro_batches) if self._grow else 0
        short = [s for s, has in enumerate(replicas) if has < max(self._wanted[s], most)]
        return max(short, key=lambda stage: (self._unit(stage) / replicas[stage], -stage), default=None)

    def _unit(self, stage: int) -> float:
        """What a micro-batch takes a replica of a stage, about."""
        plan, pace = self._crew.plan, self._crew.pace
        known = [pace.known(method, stage) for method in _methods(plan, stage)]
        return sum(seconds for seconds in known if seconds is not None) or float(len(plan.stages[stage]))

    def _welcome(self, now: float) -> None:
        """Note who has come, and who did not."""
        done = [coming for coming in self._coming if coming[2].done()]
        self._coming = [coming for coming in self._coming if coming not in done]
        for name, stage, started in done:
            try:
                started.result()
            except FailureError as error:  # it has no place yet: nobody else is touched
                self._note(f"a worker for stage {stage} did not come up: {str(error)[:REASON]}")
                self._next_look = now + REST_SECONDS
            else:
                self._here.append((name, stage))


def _methods(plan: Plan, stage: int) -> tuple[str, ...]:
    """The calls that make a unit of a stage."""
    return ("last",) if stage == len(plan.replicas) - 1 else ("forward", "backward")


# ------------------------------------------------------------------------------------------------------------- moves


def bring(crew: Crew, plan: Plan, members: Mapping[str, str]) -> None:
    """Have the crew's workers hold what the places of another plan need, which is the crew's plan from now on.

    What one lacks of the state it takes from one that has it, and the roots of what arrives are compared with those
    that are known. WorkersLost: nothing has changed. The workers have yet to be told: `regroup`.
    """
    layout = make_layout(plan, crew.program)
    _move(crew, layout, members)
    crew.layout, crew.members = layout, dict(members)


def regroup(crew: Crew) -> None:
    """Tell the workers their places; what these do not need is let go.

    WorkersLost: some may not have been told. All hold what their places need, so it can be done again without those
    that are lost.
    """
    places = encode(crew.plan)
    crew.group.get([crew.group.call(name, "regroup", place, places) for place, name in crew.members.items()])


def _move(crew: Crew, layout: Layout, members: Mapping[str, str]) -> None:
    kept, needed = (
        [_kept(crew, of, of.plan.team(stage)[0]) for stage in range(len(of.plan.replicas))]
        for of in (crew.layout, layout)
    )
    at = {name: crew.plan.place(place)[0] for place, name in crew.members.items()}
    queues: dict[str, list[tuple[str, int]]] = {}
    for place, name in members.items():
        stage = layout.plan.place(place)[0]
        if name not in at or kept[at[name]] != needed[stage]:
            has = set(kept[at[name]]) if name in at else set()
            queues[name] = [tensor for tensor in needed[stage] if tensor not in has]
    if not any(queues.values()):
        return
    if not crew.roots:
        crew.roots = {place: root for part in crew.gather("roots") for place, root in part.items()}
    sources: dict[tuple[str, int], list[str]] = {}
    for stage, tensors in enumerate(kept):
        team = [name for name, where in at.items() if where == stage]
        for tensor in tensors:
            sources[tensor] = sources.get(tensor, []) + team if tensor in sources else team
    while any(queues.values()):  # some tensors at a time, for all that lack some
        moves = []
        for name, tensors in queues.items():
            some = _first(crew, tensors)
            moves += [(name, *tensor) for tensor in tensors[:some]]
            queues[name] = tensors[some:]
        _move_some(crew, moves, sources)


def _first(crew: Crew, tensors: Sequence[tuple[str, int]]) -> int:
    """How many of the tensors may be on their way to a worker at a time: one at least, if there is any."""
    size = 0
    for number, (_, tensor) in enumerate(tensors):
        size += 4 * crew.layout.size(tensor)
        if number and size > WINDOW_BYTES:
            return number
    return len(tensors)


def _move_some(
    crew: Crew, moves: Sequence[tuple[str, str, int]], sources: Mapping[tuple[str, int], Sequence[str]]
) -> None:
    taken: list[Handle] = []
    for at, (name, key, tensor) in enumerate(moves):
        if not (holding := sources.get((key, tensor))):
            raise StageLost(f"tensor {crew.layout.names[tensor]}: no worker holds it any more; resume the run")
        given = crew.group.call(holding[at % len(holding)], "give", key, tensor)
        taken.append(crew.group.call(name, "take", key, tensor, given))
    for (name, key, tensor), roots in zip(moves, crew.group.get(taken), strict=True):
        expected = tuple(crew.roots[key, chunk] for chunk in crew.layout.chunks(tensor))
        if roots != expected:
            raise WorkersLost({name: f"took other bytes of {crew.layout.names[tensor]} than the state has"})


def _kept(crew: Crew, layout: Layout, place: str) -> list[tuple[str, int]]:
    """The (key, tensor) of all that the worker at a place keeps of the state."""
    homed = layout.homed(place)
    return [(key, tensor) for key in crew.keys for tensor in (layout.holds(place) if key == WEIGHT else homed)]
