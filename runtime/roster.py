"""Who is in a crew while a run trains: workers that are lost, that come, and that leave.

Units are pure and sums are integers, so none of this can change a bit. Every replica of a stage holds the whole state
of the stage: while one is left, nothing is lost but what the others had under way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count

from runtime.clock import Clock
from runtime.groups import Handle, Membership, ValueLost, WorkersLost
from runtime.plan import Plan
from runtime.revision import Reviser, Revision, Standing
from runtime.shards import WEIGHT, Layout, make_layout
from runtime.stragglers import Stragglers
from runtime.transition import Crew
from runtime.work import Late
from storage.codec import encode
from storage.errors import FailureError

LOOK_SECONDS = 2.0
"""How often the machines are asked whether there is room for more workers, or some are about to go."""
ASK_SECONDS = 10.0
"""How long after workers were asked for there is no look for more room: by then they have what they take."""
NOTICE_SECONDS = 120.0
"""How long a host that says that it leaves is there at most."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for starts that are called off: Ray does not bear its end in the middle of one."""
REST_SECONDS = 30.0
"""How long after a worker that did not come up no other is asked for, and a host rests whose worker sat out."""
RESTS, FORGIVEN_SECONDS = 5, 3600.0
"""How often that doubles, and how long after a rest it begins anew."""
WINDOW_BYTES = 2**28
"""Bytes of tensors on their way to a new holder at a time."""
POLL = 0.5
"""Seconds after which tensors on their way are looked at."""
TRIES = 3
"""In so many steps a worker that sat one out may try to take the state within the step, before all wait for it."""
MISSED = 5
"""How often in a row tensors that a worker is given may be lost on their way, while no worker is known to be."""
REASON, TOLD = 160, 400
"""Characters of a reason, and of what is told of a plan, that go into a record."""


class StageLost(FailureError):
    """No replica of a stage is left: its state is in the store only."""


class Roster:
    """Keeps a crew going: without those that are lost, with those that come.

    `configure` gives the encoded WorkerConfig of a worker at a place of a plan. Lost workers are replaced up to
    `wanted` in each stage; with `grow` there may be more, up to one a micro-batch. With a `reviser` it is that which
    says what the plan is and on which hosts, and neither of these counts. `serial` numbers the workers that come,
    and goes on where another Roster of the same group stopped. `note` is told what happens.
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
        serial: Iterator[int] | None = None,
        sit_out: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._crew = crew
        self.sitting_out = sit_out
        self._configure = configure
        self._membership = membership
        self._grow = grow
        self._reviser = reviser
        self._note = note
        self._wanted = wanted
        self._serial = serial or count(1)
        self._clock = clock
        self._coming: list[tuple[str, int, Future[None]]] = []
        """Workers that are being started: their names in the group and their stages."""
        self._here: list[tuple[str, int]] = []
        """Workers that are there and take no part yet."""
        self._stragglers = Stragglers(crew, note)
        self._rests: dict[str, tuple[int, float]] = {}
        """How often a worker on a host sat out, and until when no plan has the host."""
        self._tries: dict[str, int] = {}
        """Steps within which those that sat out may still try to take the state, before others wait for them to."""
        self._fetches: dict[str, _Fetch] = {}
        """What those of them take from their peers while units are under way."""
        self._next_look = self._next_ask = 0.0
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
        late = self._stragglers.workers
        crew.gone |= error.lost
        crew.group.stop(list(error.lost))
        crew.pace.forget(error.lost)
        for name in error.lost:
            self._fetches.pop(name, None)
            self._stragglers.give_up(name)
            self._tries.pop(name, None)
            if crew.joined.pop(name, None) is not None:
                self._note(f"lost {name}, new in this step: {error.lost[name][:REASON]}")
        self._here = [(name, stage) for name, stage in self._here if name not in error.lost]
        self._coming = [coming for coming in self._coming if coming[0] not in error.lost]
        for place, name in fresh.items():
            self._note(f"lost {place}: {error.lost[name][:REASON]}")
        for name in sorted(set(late) & set(error.lost)):
            self._note(f"lost {name}, which sat out: {error.lost[name][:REASON]}")
        gone = {place: crew.gone[name] for place, name in crew.members.items() if name in crew.gone}
        self._require_somebody(gone)
        if (gone and (crew.fixed or not later)) or self._unsettled:
            self._change(gone, list(crew.joined.items()))
        if not later:
            crew.gone = {}

    def turn(self, steps_left: int = 0) -> None:
        """Between two steps: let go who is leaving, take in who has come, ask for more where there is room.

        With a reviser: change over to another plan where that pays in the steps that are left.
        """
        self._welcome()
        self._take_back()
        now = self._crew.pace.now()
        left = self._leaving() if now >= self._next_look else {}
        here = [] if self._reviser else [one for one in self._here if not self._tries.get(one[0])]
        if left or here:
            self._change(left, here)
        self._look()
        if self._reviser and not self._coming:
            self._revise(self._reviser, steps_left, now)

    def meanwhile(self, left: float) -> bool:
        """See Changes: whoever has come takes the state from peers, which does not change while units are under way.

        Who is about to leave and will not be there at the end of the step is taken for lost while others have time.
        """
        crew = self._crew
        if crew.fixed or self._reviser:
            return self._take_back()
        if left > NOTICE_SECONDS and crew.pace.now() >= self._next_look and (going := self._leaving()):
            raise WorkersLost({crew.members[place]: f"{why}, before the step's end" for place, why in going.items()})
        self._look()
        self._welcome()
        some, peers = self._take_back(), cache(crew.present)
        for name, stage in list(self._here) if crew.roots else []:  # after a restore they are not known
            if name not in self._fetches:
                tensors = _kept(crew, crew.layout, crew.plan.team(stage)[0])
                self._fetches[name] = _Fetch(number=next(crew.fetches), worker=name, queue=tensors)
            fetch = self._fetches[name]
            try:
                fetch.go_on(crew, _any_of(peers(stage)))
            except (WorkersLost, StageLost):
                raise
            except FailureError as error:
                self._dismiss(name, error)
                continue
            if fetch.done:
                del self._fetches[name]
                self._here.remove((name, stage))
                crew.joined[name] = stage
                some = True
        return some

    def settle(self) -> None:
        """See Changes. Who lacks some of the state begins again later: no old part of it may arrive after a new one."""
        crew = self._crew
        for name, fetch in list(self._fetches.items()):
            if self._tries.get(name):
                self._tries[name] -= 1
                continue  # nobody waits for a slow one: what is still on its way has an old number
            try:
                crew.group.get([taken for taken, _ in fetch.under_way])
            except WorkersLost:
                raise
            except FailureError as error:
                self._dismiss(name, error)
        self._fetches = {}
        if crew.gone or crew.joined:
            gone = {place: crew.gone[name] for place, name in crew.members.items() if name in crew.gone}
            self._change(gone, list(crew.joined.items()))

    # --------------------------------------------------------------------------------------------------- stragglers

    def sit_out(self, late: Late) -> None:
        """See Changes. With a reviser its host rests for a while, twice as long each time."""
        self._stragglers.sit_out(late)
        if self._reviser and (host := self._reviser.sites.at().get(late.worker)):
            now, (times, until) = self._crew.pace.now(), self._rests.get(host, (0, 0.0))
            times = times if now < until + FORGIVEN_SECONDS else 0
            self._rests[host] = times + 1, now + REST_SECONDS * 2 ** min(times, RESTS)

    def made(self, step: int, receipts: Sequence[bytes]) -> None:
        """See Changes."""
        self._stragglers.outdate()
        self._stragglers.compare(step, receipts)

    def _take_back(self) -> bool:
        """Have those take part who sat out; whether some hold the state as it is, and may be given units at once.

        With a reviser others wait until a plan has a place for them.
        """
        back = self._stragglers.back()
        self._crew.joined |= {name: stage for name, stage, current in back if current}
        late = {name: stage for name, stage, current in back if not current and not self._reviser}
        self._here += late.items()
        self._tries |= dict.fromkeys(late, TRIES)
        return any(current for *_, current in back)

    # --------------------------------------------------------------------------------------------------- who there is

    def _dismiss(self, name: str, error: FailureError) -> None:
        """A worker that did not get the state is not waited for."""
        self._here = [(other, stage) for other, stage in self._here if other != name]
        self._fetches.pop(name, None)
        self._crew.group.stop([name])
        self._note(f"{name} did not get the state: {str(error)[:REASON]}")

    def _look(self) -> None:
        """From time to time ask for workers where there is room."""
        now = self._crew.pace.now()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if not self._reviser and now >= self._next_ask and self._ask(self._membership.room()):
                self._next_ask = now + ASK_SECONDS

    def close(self) -> None:
        """Ask for nobody any more; whoever is being started is stopped, and what starts it has ended."""
        self._crew.group.stop([name for name, _, _ in self._coming])
        wait([started for _, _, started in self._coming], timeout=CLOSE_SECONDS)

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
        crew.gone = {}  # who had been has no place now, and who was and is back has one
        self._here = [one for one in self._here if one not in here]
        crew.joined = {name: stage for name, stage in crew.joined.items() if (name, stage) not in here}
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
        sitting = {at[name] for name in self._stragglers.workers if name in at}
        away = sitting | {host for host, (_, until) in self._rests.items() if until > now} - set(hosts.values())
        return Standing(
            plan=crew.plan, hosts=hosts, seconds=seconds, steps_left=steps_left, now=now, away=frozenset(away)
        )

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
        late = self._stragglers.workers
        worker = {host: name for name, host in reviser.sites.at().items() if name not in (*crew.gone, *late)}
        members = {place: worker[host] for place, host in target.places.items() if host in worker}
        missing = len(members) < len(target.plan.workers)
        if not missing:
            bring(crew, target.plan, members)
            crew.pace.forget(members.values())  # stages are others, and so are their units
            self._note(target.told[:TOLD])
        self._here = []
        rest = (set(worker.values()) | set(late)) - set(crew.members.values())
        for name in late:
            self._stragglers.give_up(name)
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
            if (there := set(crew.present(stage))) <= set(leaving):
                gone.pop(next((p for p in crew.plan.team(stage) if p in gone and crew.members[p] in there), ""), None)
        return gone

    def _require_somebody(self, gone: Mapping[str, str]) -> None:
        """StageLost where a stage has nobody left; who sits out and holds the state is waited for."""
        crew, plan = self._crew, self._crew.plan
        for stage in range(len(plan.replicas)):
            if not set(plan.team(stage)) <= set(gone):
                continue
            while stage not in crew.joined.values() and self._stragglers.hold(stage):
                crew.group.wait([], POLL)
                self._take_back()
            if stage not in crew.joined.values():
                raise StageLost(
                    f"stage {stage}: every replica was lost ({'; '.join(gone.values())[:REASON]}); the run goes on "
                    f"from the last checkpoint once there are workers again"
                )

    # ------------------------------------------------------------------------------------------------------ coming

    def _ask(self, room: int) -> bool:
        """Have workers started for the stages that need them most, as many as there is room for; whether some are."""
        asked = room
        configs: dict[int, tuple[str, bytes]] = {}
        crew = self._crew
        replicas = [len(crew.present(stage)) for stage in range(len(crew.plan.replicas))]
        here = [stage for _, stage in self._here]
        for expected in [stage for _, stage, _ in self._coming] + here + self._stragglers.stages:
            replicas[expected] += 1
        while room > 0 and (stage := self._short(replicas)) is not None:
            if stage not in configs:
                plan = crew.plan.resized([n + (at == stage) for at, n in enumerate(crew.plan.replicas)])
                place = plan.team(stage)[-1]
                configs[stage] = place, self._configure(place, plan)
            place, config = configs[stage]
            self._start(f"{place}.{next(self._serial)}", place, config)
            replicas[stage] += 1
            room -= 1
        return room < asked

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

    def _welcome(self) -> None:
        """Note who has come, and who did not."""
        done = [coming for coming in self._coming if coming[2].done()]
        self._coming = [coming for coming in self._coming if coming not in done]
        for name, stage, started in done:
            try:
                started.result()
            except FailureError as error:  # it has no place yet: nobody else is touched
                self._note(f"a worker for stage {stage} did not come up: {str(error)[:REASON]}")
                self._next_ask = self._crew.pace.now() + REST_SECONDS
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


@dataclass(kw_only=True)
class _Fetch:
    """Tensors of the state on their way from peers to a worker that is to hold them, each a (key, tensor)."""

    number: int
    """An old part that arrives after a newer fetch has begun is not kept."""
    worker: str
    queue: list[tuple[str, int]]
    """Those that are still to be asked for."""
    under_way: list[tuple[Handle, tuple[str, int]]] = field(default_factory=list)
    missed: int = 0

    @property
    def done(self) -> bool:
        """Whether the worker holds them all."""
        return not self.queue and not self.under_way

    def go_on(self, crew: Crew, holding: Callable[[tuple[str, int]], Sequence[str]]) -> None:
        """Take in what has arrived, and ask for more of those that hold it."""
        finished = dict(crew.group.wait([taken for taken, _ in self.under_way], 0.0)) if self.under_way else {}
        self._ask_again([(self.under_way[number][1], error) for number, error in finished.items() if error])
        arrived = [self.under_way[number] for number, error in finished.items() if not error]
        self.under_way = [pair for number, pair in enumerate(self.under_way) if number not in finished]
        for (_, place), roots in zip(arrived, crew.group.get([taken for taken, _ in arrived]), strict=True):
            if roots != tuple(crew.roots[place[0], chunk] for chunk in crew.layout.chunks(place[1])):
                name = crew.layout.names[place[1]]
                raise WorkersLost({self.worker: f"took other bytes of {name} than the state has"})
            self.missed = 0
        size = sum(4 * crew.layout.size(tensor) for _, (_, tensor) in self.under_way)
        while self.queue:
            key, tensor = self.queue[0]
            size += 4 * crew.layout.size(tensor)
            if self.under_way and size > WINDOW_BYTES:
                break
            if not (givers := holding(self.queue.pop(0))):
                raise StageLost(f"tensor {crew.layout.names[tensor]}: no worker holds it any more; resume the run")
            given = crew.group.call(givers[len(self.queue) % len(givers)], "give", key, tensor)
            taken = crew.group.call(self.worker, "take", self.number, key, tensor, given)
            self.under_way.append((taken, (key, tensor)))

    def _ask_again(self, lost: Sequence[tuple[tuple[str, int], FailureError]]) -> None:
        """Tensors that went with a host are asked of another."""
        self.missed += bool(lost)
        for tensor, error in lost:
            if not isinstance(error, ValueLost) or self.missed > MISSED:
                raise error
            self.queue.append(tensor)


def _move(crew: Crew, layout: Layout, members: Mapping[str, str]) -> None:
    """Have all workers hold what their places in a layout need."""
    kept, needed = (
        [_kept(crew, of, of.plan.team(stage)[0]) for stage in range(len(of.plan.replicas))]
        for of in (crew.layout, layout)
    )
    at = {name: crew.plan.place(place)[0] for place, name in crew.members.items()} | crew.joined

    @cache
    def lacking(before: int | None, stage: int) -> list[tuple[str, int]]:
        has = set() if before is None else set(kept[before])
        return [tensor for tensor in needed[stage] if tensor not in has]

    fetches = []
    for place, name in members.items():
        if queue := lacking(at.get(name), layout.plan.place(place)[0]):
            fetches.append(_Fetch(number=next(crew.fetches), worker=name, queue=list(queue)))
    if not fetches:
        return
    if not crew.roots:
        crew.roots = {place: root for part in crew.gather("roots") for place, root in part.items()}
    sources: dict[tuple[str, int], list[str]] = {}
    for name, stage in at.items():
        if name not in crew.gone:
            for tensor in kept[stage]:
                sources.setdefault(tensor, []).append(name)
    while fetches:
        for fetch in fetches:
            fetch.go_on(crew, lambda tensor: sources.get(tensor, ()))
        fetches = [fetch for fetch in fetches if not fetch.done]
        crew.group.wait([taken for fetch in fetches for taken, _ in fetch.under_way], POLL if fetches else 0.0)


def _any_of(workers: Sequence[str]) -> Callable[[tuple[str, int]], Sequence[str]]:
    return lambda _: workers


def _kept(crew: Crew, layout: Layout, place: str) -> list[tuple[str, int]]:
    """The (key, tensor) of all that the worker at a place keeps of the state."""
    homed = layout.homed(place)
    return [(key, tensor) for key in crew.keys for tensor in (layout.holds(place) if key == WEIGHT else homed)]
