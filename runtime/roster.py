"""Who is in a crew while a run trains: workers that are lost, that come, and that leave.

Units are pure and sums are integers, so none of this can change a bit. Every replica of a stage holds the whole state
of the stage: while one is left, nothing is lost but what the others had under way.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

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
WINDOW = 8
"""Tensors on their way to new holders at a time."""
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
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._coming: tuple[str, int, Future[None]] | None = None
        """A worker that is being started: its name in the group and its stage."""
        self._gone: dict[str, str] = {}
        """Lost workers that are members yet, with the reason."""
        self._next_look = 0.0

    def lost(self, error: WorkersLost) -> None:
        """Go on without the workers that are lost; StageLost where a stage has none left."""
        crew = self._crew
        self._gone |= error.lost  # with those whose loss was being dealt with when these were found to be lost too
        crew.group.stop(list(error.lost))
        crew.pace.forget(error.lost)
        self._drop("lost", {place: self._gone[name] for place, name in crew.members.items() if name in self._gone})
        self._gone = {}

    def turn(self) -> None:
        """Between two steps: let go who is leaving, take in who has come, ask for more where there is room."""
        now = self._crew.pace.now()
        if self._coming and self._coming[2].done():
            self._take_in(now)
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self._let_go(self._membership.leaving())
        if self._coming is None and (stage := self._short()) is not None and self._membership.room():
            self._ask_for(stage)

    def close(self) -> None:
        """Ask for nobody any more; whoever is being started is not needed."""
        if self._coming:
            name, _, started = self._coming
            started.add_done_callback(lambda _: self._crew.group.stop([name]))
        self._starter.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------------------------------------------- leaving

    def _let_go(self, leaving: Mapping[str, str]) -> None:
        """Go on without those that are leaving, unless a stage would have nobody: it keeps them while they last."""
        crew = self._crew
        gone = {place: leaving[name] for place, name in crew.members.items() if name in leaving}
        for stage in range(len(crew.plan.replicas)):
            if set(crew.plan.team(stage)) <= set(gone):
                gone.pop(crew.plan.team(stage)[0])
        if gone:
            names = [crew.members[place] for place in gone]
            self._drop("left", gone)
            crew.group.stop(names)
            crew.pace.forget(names)

    def _drop(self, how: str, gone: Mapping[str, str]) -> None:
        crew, plan = self._crew, self._crew.plan
        teams = [[place for place in plan.team(stage) if place not in gone] for stage in range(len(plan.replicas))]
        told = [f"{how} {place}: {reason[:REASON]}" for place, reason in gone.items()]
        for stage, team in enumerate(teams):
            if not team:
                self._tell(told)
                raise StageLost(
                    f"stage {stage}: every replica was lost ({'; '.join(gone.values())[:REASON]}); the run goes on "
                    f"from the last checkpoint once there are workers again"
                )
        if gone:
            smaller = plan.resized(tuple(map(len, teams)))
            order = [crew.members[place] for team in teams for place in team]
            reshape(crew, smaller, dict(zip(smaller.workers, order, strict=True)))
        self._tell(told)

    def _tell(self, told: Sequence[str]) -> None:
        for what in told:
            self._note(what)

    # ------------------------------------------------------------------------------------------------------ coming

    def _short(self) -> int | None:
        """The stage that most needs another replica, None where none does."""
        plan = self._crew.plan
        most = len(plan.micro_batches) if self._grow else 0
        short = [s for s, has in enumerate(plan.replicas) if has < max(self._wanted[s], most)]
        return max(short, key=lambda stage: (self._load(stage), -stage), default=None)

    def _load(self, stage: int) -> float:
        """What a step takes a stage, about: the time of a micro-batch over its replicas."""
        plan, pace = self._crew.plan, self._crew.pace
        methods = ("last",) if stage == len(plan.replicas) - 1 else ("forward", "backward")
        known = [pace.known(method, stage) for method in methods]
        unit = sum(seconds for seconds in known if seconds is not None) or float(len(plan.stages[stage]))
        return unit / plan.replicas[stage]

    def _ask_for(self, stage: int) -> None:
        crew = self._crew
        plan = _with_one_more(crew.plan, stage)
        place = plan.team(stage)[-1]
        name = f"{place}.{next(self._serial)}"
        config = self._configure(place, plan)
        self._coming = name, stage, self._starter.submit(crew.group.start, {name: config})

    def _take_in(self, now: float) -> None:
        assert self._coming is not None
        (name, stage, started), self._coming = self._coming, None
        crew = self._crew
        try:
            started.result()
        except WorkersLost:
            raise
        except FailureError as error:
            self._note(f"a worker for stage {stage} did not come up: {str(error)[:REASON]}")
            self._next_look = now + REST_SECONDS
            return
        plan = _with_one_more(crew.plan, stage)
        team = [[crew.members[place] for place in crew.plan.team(s)] for s in range(len(plan.replicas))]
        team[stage].append(name)
        try:
            reshape(crew, plan, dict(zip(plan.workers, [name for names in team for name in names], strict=True)))
        except WorkersLost:
            crew.group.stop([name])  # whoever it was that was lost, another worker will be asked for
            raise
        self._note(f"joined {plan.team(stage)[-1]}")


def _with_one_more(plan: Plan, stage: int) -> Plan:
    return plan.resized([count + (at == stage) for at, count in enumerate(plan.replicas)])


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
    has = {name: set(_kept(crew, crew.layout, place)) for place, name in crew.members.items()}
    lacking = [
        (name, *tensor)
        for place, name in members.items()
        for tensor in _kept(crew, layout, place)
        if tensor not in has.get(name, ())
    ]
    if not lacking:
        return
    if not crew.roots:
        crew.roots = {place: root for part in crew.gather("roots") for place, root in part.items()}
    for first in range(0, len(lacking), WINDOW):
        _move_some(crew, lacking[first : first + WINDOW], has)


def _move_some(crew: Crew, moves: Sequence[tuple[str, str, int]], has: Mapping[str, set[tuple[str, int]]]) -> None:
    taken: list[Handle] = []
    for at, (name, key, tensor) in enumerate(moves):
        sources = [source for source, names in has.items() if (key, tensor) in names]
        if not sources:
            raise StageLost(f"tensor {crew.layout.names[tensor]}: no worker holds it any more; resume the run")
        given = crew.group.call(sources[at % len(sources)], "give", key, tensor)
        taken.append(crew.group.call(name, "take", key, tensor, given))
    for (name, key, tensor), roots in zip(moves, crew.group.get(taken), strict=True):
        expected = tuple(crew.roots[key, chunk] for chunk in crew.layout.chunks(tensor))
        if roots != expected:
            raise WorkersLost({name: f"took other bytes of {crew.layout.names[tensor]} than the state has"})


def _kept(crew: Crew, layout: Layout, place: str) -> list[tuple[str, int]]:
    """The (key, tensor) of all that the worker at a place keeps of the state."""
    homed = layout.homed(place)
    return [(key, tensor) for key in crew.keys for tensor in (layout.holds(place) if key == WEIGHT else homed)]
