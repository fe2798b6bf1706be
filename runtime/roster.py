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
REASON = 160
"""Characters of a reason that go into a record."""


class StageLost(FailureError):
    """No replica of a stage is left: its state is in the store only."""


class Roster:
    """Keeps a crew going: without those that are lost, with those that come.

    `configure` gives the encoded WorkerConfig of a worker at a place of a plan. Lost workers are replaced up to
    `wanted` in each stage; with `grow` there may be more, up to one a micro-batch. `note` is told what happens.
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
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._crew = crew
        self._configure = configure
        self._membership = membership
        self._grow = grow
        self._note = note
        self._wanted = wanted
        self._serial = count(1)
        self._clock = clock
        self._coming: list[tuple[str, int, Future[None]]] = []
        """Workers that are being started: their names in the group and their stages."""
        self._here: list[tuple[str, int]] = []
        """Workers that are there and have no place yet."""
        self._next_look = 0.0

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
        if gone and (crew.fixed or not later):
            self._change(gone, [])
        if not later:
            crew.gone = {}

    def turn(self) -> None:
        """Between two steps: let go who is leaving, take in who has come, ask for more where there is room."""
        now = self._crew.pace.now()
        self._welcome(now)
        look = now >= self._next_look
        left = self._leaving() if look else {}
        if left or self._here:
            self._change(left, self._here)
            self._here = []
        if look:
            self._next_look = now + LOOK_SECONDS
            if not self._coming:
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
        reshape(crew, wanted, dict(zip(wanted.workers, order, strict=True)))  # once: everybody is told
        crew.group.stop(list(leaving))
        crew.pace.forget(leaving)
        for place in leaving.values():
            self._note(f"left {place}: {without[place][:REASON]}")
        for stage, old in enumerate(stay):
            for place in wanted.team(stage)[len(old) :]:
                self._note(f"joined {place}")

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
            name = f"{place}.{next(self._serial)}"
            self._coming.append((name, stage, self._clock.beside(partial(crew.group.start, {name: config}))))
            replicas[stage] += 1
            room -= 1

    def _short(self, replicas: Sequence[int]) -> int | None:
        """The stage of so many replicas that most needs another one, None where none does."""
        most = len(self._crew.plan.micro_batches) if self._grow else 0
        short = [s for s, has in enumerate(replicas) if has < max(self._wanted[s], most)]
        return max(short, key=lambda stage: (self._unit(stage) / replicas[stage], -stage), default=None)

    def _unit(self, stage: int) -> float:
        """What a micro-batch takes a replica of a stage, about."""
        plan, pace = self._crew.plan, self._crew.pace
        methods = ("last",) if stage == len(plan.replicas) - 1 else ("forward", "backward")
        known = [pace.known(method, stage) for method in methods]
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


# ------------------------------------------------------------------------------------------------------------- moves


def reshape(crew: Crew, plan: Plan, members: Mapping[str, str]) -> None:
    """Have the group's workers work at the places of another plan.

    What one lacks of the state it takes from one that has it, and the roots of what arrives are compared with those
    that are known. WorkersLost: nothing has changed yet, or everything has for those that are left.
    """
    layout = make_layout(plan, crew.program)
    _move(crew, layout, members)
    places = encode(plan)
    crew.group.get([crew.group.call(name, "regroup", place, places) for place, name in members.items()])
    crew.layout, crew.members = layout, dict(members)


def _move(crew: Crew, layout: Layout, members: Mapping[str, str]) -> None:
    stages = range(len(layout.plan.replicas))
    kept = [_kept(crew, crew.layout, crew.plan.team(stage)[0]) for stage in stages]
    needed = [_kept(crew, layout, layout.plan.team(stage)[0]) for stage in stages]
    at = {name: crew.plan.place(place)[0] for place, name in crew.members.items()}
    queues: dict[str, list[tuple[str, int]]] = {}
    for place, name in members.items():
        stage = layout.plan.place(place)[0]
        has = set(kept[at[name]]) if name in at and kept[at[name]] != needed[stage] else set()
        if name not in at or has:
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
