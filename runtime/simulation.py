"""Fleets that are not there: the controller, roster and work of a real run over hosts of a virtual clock.

Hosts have a speed, a link and an end that is drawn when they come; workers compute nothing. A call's finish is known
when it is made, since workers take calls in order and what they wait for has a finish of its own. What a state is made
of stays zero, so that roots are right and saves verify. One seed gives one history.

Links: a value travels to each that takes it; the results of one call leave a host together, over its whole link, and
what a call takes comes in after what came in before. The controller's link is one queue.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from itertools import count, pairwise
from threading import Lock
from typing import Any, cast

import numpy as np

from runtime.controller import Assembled, Changed, Controller, Elastic, Event, Job, Ready, Stepped
from runtime.data import Dataset
from runtime.feed import Batch, Feed
from runtime.fleet import NEVER, Fleet, Host, Machines, VirtualClock
from runtime.groups import Handle, ValueLost, WorkerConfig, WorkersLost
from runtime.plan import Plan, make_plan
from runtime.program.program import Program
from runtime.program.training import (
    CHUNK,
    BlockSpec,
    KindRecord,
    Sized,
    TensorSpec,
    TrainingProgram,
    TrainingRecord,
)
from runtime.recipe import parse_recipe
from runtime.shards import GRADIENT, Layout, make_layout
from storage import merkle
from storage.codec import decode, encode
from storage.errors import FailureError
from storage.store import Store, memory_store

SILENCE = 5.0
"""Seconds from a host's end until it is found out, as with `RayGroup`."""
LOOK = 0.1
"""Seconds that the controller lets pass after a call has finished, to take in others with it."""
CALL_SECONDS = 1e-4
"""What making a call takes the controller."""
MOVED, HASHED = 4e9, 1e9
"""Bytes a second that a host of speed 1 adds or copies, and that it hashes."""
SLOTS = ("moment1", "moment2")
KEYS = ("weight", *SLOTS)
FEW = 8
ELEMENTS = 4
"""Elements that stand for a whole chunk of weights."""
OVERTIME = 1.5
"""How much longer than it was to be a simulation may be, which otherwise ends after a step."""


class Over(FailureError):
    """The virtual time of a simulation is over in the middle of a step."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is trained, in what it costs a host of speed 1: `unit` seconds for a micro-batch through the whole model."""

    weights: float = 124e6
    blocks: int = 12
    unit: float = 4.0
    activation: float = 1024 * 768 * 4.0
    micro_batches: int = 16
    segment: int = 20

    @property
    def tensors(self) -> int:
        """Tensors of one chunk each that the weights are taken to be."""
        return max(round(self.weights / CHUNK), self.blocks)

    @property
    def chunk(self) -> float:
        """Weights of each."""
        return self.weights / self.tensors


# ------------------------------------------------------------------------------------------------------------- calls


@dataclass(kw_only=True, eq=False)
class Member:
    """A worker: its host and place, when it is done with what it has, and what it has done of the step."""

    name: str
    host: Host
    place: str
    free: float = 0.0
    step: int = -1
    seconds: float = 0.0
    hashed: float | None = None
    """Seconds of hashing its sums as they are, None where that is to be done."""
    summed: float = 0.0
    """The same and seconds of adding and updating since it last gave its gradients."""
    units: list[tuple[int, int]] = field(default_factory=list)


class Made:
    """A call, and the handle of everything that it gives: `finish` is when, `sent` when that has left the host."""

    __slots__ = ("args", "dies", "error", "finish", "layout", "method", "number", "place", "sent", "share")

    def __init__(self, method: str, args: tuple[Any, ...], place: str, layout: Layout) -> None:
        self.method, self.args, self.place, self.layout = method, args[:2], place, layout
        self.finish = self.sent = self.dies = NEVER
        self.share = 0.0
        """Bytes that go to each that takes a result."""
        self.error: ValueLost | None = None
        self.number = 0


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage's number, its share of the blocks, and the weights that it holds."""

    number: int
    share: float
    weights: float


@dataclass(kw_only=True)
class Tally:
    """What a step counted: seconds of computing, the same at speed 1, and the (stage, micro-batch) of every unit."""

    seconds: float = 0.0
    work: float = 0.0
    units: Counter[tuple[int, int]] = field(default_factory=Counter)
    workers: set[str] = field(default_factory=set)


COUNTED = ("reduce", "squares", "update", "commit")
PHASES = {
    **dict.fromkeys(("forward", "last", "backward", "output", "gradient", "seal"), "units"),
    **dict.fromkeys(("gradients", "reduce", "squares", "update", "store", "receipt", "commit"), "exchange"),
    **dict.fromkeys(("regroup", "give", "take", "roots"), "reshaping"),
    **dict.fromkeys(("fetch",), "saving"),
}


class SimulatedGroup:
    """A WorkerGroup, and its Membership, of workers on the hosts of a fleet."""

    def __init__(self, fleet: Fleet, load: Load, clock: VirtualClock) -> None:
        self.machines = Machines(fleet)
        self.clock = clock
        self.load = load
        self.log: list[tuple[float, str]] = []
        """What happened to hosts and workers, and when."""
        self.steps: dict[int, Tally] = {}
        self.computed = 0.0
        """Seconds that hosts spent on units, whether or not they counted."""
        self.computed_units = 0
        self._by_host: Counter[int] = Counter()
        self.phases: dict[str, float] = defaultdict(float)
        """Seconds of the run by what it was about."""
        self.exchanges = 0
        """Exchanges begun."""
        self.limit = NEVER
        """When the simulation is over, whatever is under way."""
        self._phase, self._since = "", 0.0
        self._plan = b""
        self._layout: Layout
        self._stages: tuple[_Stage, ...] = ()
        self._members: dict[str, Member] = {}
        self._silent: list[tuple[float, str]] = []
        """When the end of each member will be found out."""
        self._uplink = 0.0
        self._controller = fleet.controller_mbit * 1e6 / 8
        self._calls = count()
        self._last_key: tuple[int, int, int] | None = None
        self._last_sums = (0.0, 0.0, 0.0, 0.0)
        self._lock = Lock()
        self._owed, self._owed_until = 0, 0.0
        """Bytes of the state on their way to the controller, which threads ask for in any order."""

    # ------------------------------------------------------------------------------------------------- membership

    def room(self) -> int:
        """See Membership."""
        self.machines.until(self.clock.time)
        return len(self.machines.free)

    def leaving(self) -> Mapping[str, str]:
        """See Membership."""
        now = self.clock.time
        return {
            name: f"host {member.host.number} is leaving"
            for name, member in self._members.items()
            if member.host.noticed <= now < member.host.dies
        }

    # ----------------------------------------------------------------------------------------------- start and stop

    def start(self, configs: Mapping[str, bytes]) -> None:
        """See WorkerGroup; a host that goes while its worker starts is found out later."""
        self._settle()
        names = list(configs)
        hosts = list(self.machines.free.values())[: len(names)]
        if len(hosts) < len(names):
            raise FailureError(f"fleet: expected {len(names)} free hosts, got {len(hosts)}; wait for more")
        if not self._members:
            self._lay_out(encode(decode(WorkerConfig, configs[names[0]]).plan))
        for name, host in zip(names, hosts, strict=True):
            del self.machines.free[host.number]
            self._members[name] = Member(name=name, host=host, place=name.partition(".")[0])
            if host.dies < NEVER:
                heappush(self._silent, (host.dies + SILENCE, name))
            self._note(f"{name} starts on host {host.number}")
        self.clock.sleep(max(host.start for host in hosts))

    def stop(self, workers: Sequence[str] | None = None) -> None:
        """See WorkerGroup: hosts are free again, and leave if they are about to."""
        now = self.clock.time
        for name in list(self._members if workers is None else workers):
            member = self._members.pop(name, None)
            if member is None or member.host.dies <= now:
                continue
            self._note(f"{name} is let go by host {member.host.number}")
            if member.host.noticed <= now:
                self.machines.leave(member.host, now)
            else:
                self.machines.free[member.host.number] = member.host

    def _lay_out(self, plan: bytes) -> None:
        """Have the workers work under this plan."""
        if plan != self._plan:
            self._plan, self._layout = plan, make_layout(decode(Plan, plan), program_of(self.load))
            shares = [len(stage) / self.load.blocks for stage in self._layout.plan.stages]
            self._stages = tuple(
                _Stage(number=number, share=share, weights=len(held) * self.load.chunk)
                for number, (share, held) in enumerate(zip(shares, self._layout.held, strict=True))
            )

    def _note(self, what: str) -> None:
        self.log.append((self.clock.time, what))

    # ------------------------------------------------------------------------------------------------------- calls

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """See WorkerGroup."""
        if worker not in self._members:
            raise WorkersLost({worker: "it was stopped"})
        member = self._members[worker]
        if method == "fetch":
            return self._fetched(member, args)
        self._settle()
        self._in_phase(method)
        self.clock.time += CALL_SECONDS
        if method == "regroup":
            member.place = args[0]
            self._lay_out(args[1])
        if method == "gradients":
            self._layout = self._layout.sharing(args[1])
        made = Made(method, args, member.place, self._layout)
        made.number = next(self._calls)
        self._time(made, member, args, returns or 1)
        if method == "commit":
            self._count(member)
        return made if returns is None else (made,) * returns

    def share(self, value: Any) -> Handle:
        """See WorkerGroup: a value in the controller's memory, which stands for a chunk of the state."""
        made = Made("share", (value,), "", self._layout)
        made.finish = self.clock.time
        made.share = 4 * self.load.chunk
        self._uplink = made.sent = max(self._uplink, self.clock.time) + made.share / self._controller
        return made

    def _time(self, made: Made, member: Member, args: tuple[Any, ...], returns: int) -> None:
        """Say when a call begins and ends, and what it sends to how many."""
        host, now = member.host, self.clock.time
        made.dies = host.dies
        arrived, amount, lost = self._arrival(host, args)
        if lost < NEVER:
            made.finish = made.sent = max(lost + SILENCE, now)
            made.error = ValueLost(f"a value for {made.method} of {member.name} went with its host")
            return
        began = max(member.free, arrived, now + host.latency)
        seconds = self._seconds(made, amount) / host.speed
        if made.method in ("seal", "gradients"):
            seconds = self._hash(member, seconds, made.method == "gradients")
        seconds = host.spells.stretched(began, seconds)
        member.free = finish = began + seconds
        if made.method == "forsake":
            member.step, member.hashed = -1, None
        if made.method in ("forward", "last", "backward"):
            member.hashed = None
            self._compute(member, made, began, seconds)
        elif made.method in COUNTED:
            member.summed += seconds
        if finish >= host.dies:
            return
        made.finish = finish
        made.share, total = self._sends(made, returns)
        made.sent = finish + total / host.bandwidth

    @staticmethod
    def _hash(member: Member, seconds: float, given: bool) -> float:
        """Seconds that a worker takes now to hash its sums, which it has done already or takes these for."""
        known, member.hashed = member.hashed, seconds if member.hashed is None else member.hashed
        if given:
            member.summed = member.hashed
        return seconds if known is None else 0.0

    def _arrival(self, host: Host, args: Sequence[Any]) -> tuple[float, float, float]:
        """(when the arguments are there, their bytes, when one of them was lost or NEVER)."""
        now = self.clock.time
        arrived = now
        if len(args) <= FEW:
            plain = sum(arg.nbytes if isinstance(arg, np.ndarray) else len(arg) for arg in args if _has_bytes(arg))
            if plain:
                self._uplink = max(self._uplink, now) + plain / self._controller
                arrived = max(self._uplink, now + plain / host.bandwidth)
        if not (taken := self._summed(args)):
            return arrived + host.latency, 0.0, NEVER
        amount, first, sent, lost = taken
        link = max(max(host.incoming, first) + amount / host.bandwidth, sent)
        if lost < link:
            return NEVER, amount, lost
        host.incoming = link
        arrived = max(arrived, link)
        return arrived + host.latency, amount, NEVER

    def _summed(self, args: Sequence[Any]) -> tuple[float, float, float, float] | None:
        """(bytes, when the first is there, when all have left, when one is lost) of what others made; None for none.

        Many at a time are what all workers made, in order, for each of many: looked at once.
        """
        key = (len(args), args[2].number, args[-1].number) if len(args) > FEW else None
        if key is not None and key == self._last_key:
            return self._last_sums
        taken = [arg for arg in args if isinstance(arg, Made)]
        if not taken:
            return None
        sums = (
            math.fsum(arg.share for arg in taken),
            min(arg.finish for arg in taken),
            max(arg.sent for arg in taken),
            min(arg.dies for arg in taken),
        )
        if key is not None:
            self._last_key, self._last_sums = key, sums
        return sums

    def _compute(self, member: Member, made: Made, began: float, seconds: float) -> None:
        """Note computing for a step."""
        step, micro_batch = made.args[:2]
        if step != member.step:
            member.step, member.seconds, member.units = step, 0.0, []
        spent = min(seconds, max(member.host.dies - began, 0.0))
        self.computed += spent
        if spent < seconds:
            return
        member.seconds += seconds
        if made.method != "forward":
            self.computed_units += 1
            self._by_host[member.host.number] += 1
            member.units.append((Plan.place(member.place)[0], micro_batch))

    def _count(self, member: Member) -> None:
        """A step is done: what the worker did for it counts, and what was done for the step earlier does not."""
        if member.step < 0:
            return
        tally = self.steps.setdefault(member.step, Tally())
        if member.name not in tally.workers:
            tally.workers.add(member.name)
            tally.seconds += member.seconds + member.summed
            tally.work += member.seconds * member.host.speed
            tally.units.update(member.units)
        member.step, member.seconds, member.units = -1, 0.0, []

    def units_of(self, host: Host) -> int:
        """The units that a host has done."""
        return self._by_host[host.number]

    # ------------------------------------------------------------------------------------------------------- costs

    def _seconds(self, made: Made, amount: float) -> float:
        """What a call takes a host of speed 1 that is given so many bytes by others."""
        load, stage = self.load, self._stage(made)
        held = stage.weights
        match made.method:
            case "forward" | "output":
                return load.unit * stage.share / 3
            case "backward":
                return load.unit * stage.share * 2 / 3
            case "last" | "gradient":
                return load.unit * stage.share
            case "seal" | "gradients":
                return 8 * held / HASHED
            case "reduce":
                return amount / MOVED + 8 * self._owned(made) / HASHED
            case "squares":
                return 8 * self._owned(made) / MOVED
            case "initialise" | "update" | "roots":
                return 12 * self._owned(made) / HASHED
            case "commit":
                return 24 * held / MOVED
            case "take":
                return amount / HASHED
        return amount / MOVED

    def _sends(self, made: Made, returns: int) -> tuple[float, float]:
        """(bytes of each result for others, bytes of all of them)."""
        stage = self._stage(made)
        match made.method:
            case "forward" | "output":
                share = self.load.activation
            case "backward" | "last" | "gradient":
                share = self.load.activation if stage.number else 0.0
            case "gradients":
                return 8 * stage.weights / returns, 8 * stage.weights
            case "initialise" | "update":
                share = 4 * len(KEYS) * self._owned(made)
                return share, share * (returns - 1)
            case "give":
                share = 4 * self.load.chunk
            case _:
                share = 0.0
        return share, share

    def _stage(self, made: Made) -> "_Stage":
        return self._stages[Plan.place(made.place)[0]]

    def _owned(self, made: Made) -> float:
        """Weights that a worker owns."""
        return len(self._layout.owned(made.place)) * self.load.chunk

    # -------------------------------------------------------------------------------------------------------- time

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """See WorkerGroup."""
        if handles and all(handle.method == "fetch" for handle in handles):
            return [self._value(handle) for handle in handles]
        wrong = min((handle for handle in handles if handle.error), key=lambda handle: handle.finish, default=None)
        last = max((handle.finish for handle in handles), default=self.clock.time)
        while True:
            due = min(last, wrong.finish if wrong else NEVER)
            if due == NEVER and not self._silent:
                raise ValueLost("a value went with a worker that was stopped")
            self._advance(due if due < NEVER else self._silent[0][0])
            if wrong and wrong.finish <= self.clock.time:
                raise cast(ValueLost, wrong.error)
            if last <= self.clock.time:
                return [self._value(handle) for handle in handles]

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        """See WorkerGroup."""
        self._settle()
        now = self.clock.time
        first = min((handle.finish for handle in handles), default=NEVER)
        self._advance(now if first <= now else min(first + LOOK, now + timeout))
        now = self.clock.time
        return [(number, handle.error) for number, handle in enumerate(handles) if handle.finish <= now]

    def _advance(self, moment: float) -> None:
        """Let time pass; WorkersLost as soon as somebody is found to be gone."""
        self._settle()
        lost: dict[str, str] = {}
        while self._silent and self._silent[0][0] <= max(moment, self.clock.time):
            found, name = heappop(self._silent)
            member = self._members.get(name)
            if member is not None and member.host.dies + SILENCE == found:
                moment = max(found, self.clock.time)
                lost[name] = f"no heartbeat from host {member.host.number} in {SILENCE:g} s"
        self.clock.time = max(self.clock.time, moment)
        self.machines.until(self.clock.time)
        if self.clock.time > self.limit:
            raise Over(f"a step was not done by {self.limit:.0f} s")
        if lost:
            for name in lost:
                self._note(f"{name} is found to be gone")
            raise WorkersLost(lost)

    def _settle(self) -> None:
        """Let pass the time that fetching state has taken."""
        if self._owed or self._owed_until:
            self.clock.time = max(self.clock.time + self._owed / self._controller, self._owed_until)
            self._owed, self._owed_until = 0, 0.0

    def _fetched(self, member: Member, args: tuple[Any, ...]) -> Made:
        """Part of the state for the controller, whose threads ask in any order: time passes later, for all of it."""
        with self._lock:
            now = self.clock.time
            dead = {name: m.host.dies for name, m in self._members.items() if m.host.dies <= now}
            if dead:
                self._owed_until = max(dead.values()) + SILENCE
                raise WorkersLost(dict.fromkeys(dead, "it did not answer"))
            self._owed += int(4 * self.load.chunk)
            self._in_phase("fetch")
        made = Made("fetch", args, member.place, self._layout)
        made.finish = now
        return made

    def _in_phase(self, method: str) -> None:
        phase = PHASES.get(method, "other")
        if phase != self._phase:
            self.exchanges += phase == "exchange"
            self.phases[self._phase] += self.clock.time - self._since
            self._phase, self._since = phase, self.clock.time

    # ------------------------------------------------------------------------------------------------------ values

    def _value(self, made: Made) -> Any:
        """What a call gave, as far as the controller looks at it."""
        layout, place = made.layout, made.place
        match made.method:
            case "initialise" | "update" | "roots":
                return {(key, chunk): STATE_ROOT for key in KEYS for chunk in layout.owned(place)}
            case "reduce":
                return 0, {(GRADIENT, chunk): SUM_ROOT for chunk in layout.owned(place)}
            case "take":
                return (STATE_ROOT,)
            case "fetch":
                return {0: ZEROS}
            case "squares" | "last":
                return 0
            case "receipt":
                return b""
            case "forsake":
                return {}
        return None


ZEROS = np.zeros(ELEMENTS, np.float32)
STATE_ROOT = merkle.bytes_root(ZEROS.data)
SUM_ROOT = merkle.bytes_root(np.zeros(ELEMENTS, np.int64).data)


def _has_bytes(arg: Any) -> bool:
    return isinstance(arg, np.ndarray | bytes)


# --------------------------------------------------------------------------------------------------------------- job

RECIPE = """
name = "simulated"
[model]
family = "gpt"
layers = 1
width = 8
heads = 1
[data]
url = "nowhere"
context = 8
[training]
steps = 1000000
batch = {micro_batches}
micro_batches = {micro_batches}
segment = {segment}
"""


@dataclass(frozen=True, kw_only=True)
class Unread(Feed):
    """A Feed of zeros: one for each micro-batch."""

    def batch(self, step: int) -> Batch:
        """The same batch at every step."""
        del step
        zeros = np.zeros((self.recipe.training.batch, 1), np.int64)
        return Batch(zeros, zeros)


def simulated_job(store: Store, load: Load) -> Job:
    """A run that goes on for as long as one likes, with its recipe and programs in the store."""
    text = RECIPE.format(micro_batches=load.micro_batches, segment=load.segment)
    recipe = parse_recipe(text)
    program = program_of(load)
    encoded = program.encode()
    return Job(
        name="simulated",
        feed=Unread(recipe=recipe, dataset=cast(Dataset, None)),
        program=program,
        programs=store.put(encoded),
        data=store.put(recipe.canonical()),
    )


@cache
def program_of(load: Load) -> TrainingProgram:
    """Tensors of one chunk each, spread evenly over the blocks, and Programs that do nothing."""
    nothing = Program(inputs=(), ops=(), outputs=())
    sized = (Sized(elements=ELEMENTS, program=0),)
    names = [f"tensor{number:05}" for number in range(load.tensors)]
    cuts = [load.tensors * block // load.blocks for block in range(load.blocks + 1)]
    header = TrainingRecord(
        tensors=tuple(
            TensorSpec(name=name, shape=(ELEMENTS,), decay=False, initial=sized, update=sized) for name in names
        ),
        blocks=tuple(BlockSpec(kind=0, tensors=tuple(names[first:stop])) for first, stop in pairwise(cuts)),
        kinds=(KindRecord(forward=0, backward=0, evaluate=0),),
        loss=0,
        metric=0,
        exponent=sized,
        square=sized,
        slots=SLOTS,
        micro_batches=load.micro_batches,
        programs=(nothing.root,),
    )
    return TrainingProgram(header=header, programs=(nothing,))


# --------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a simulated run came to, from its first step on, all stages together. Seconds are of the virtual clock."""

    root: bytes
    seconds: float
    steps: int
    """Steps of the run in the end."""
    redone: int
    """Steps that were done again, as the run went back to a checkpoint."""
    falls: int
    exchanges: int
    """Exchanges of gradients and state that were begun."""
    counted: float
    """Host-seconds of computing that counted."""
    computed: float
    """Host-seconds of computing."""
    alive: float
    """Host-seconds of hosts that were there."""
    work: float
    """What was counted, in seconds of a host of speed 1."""
    power: float
    """What the hosts that were there could have done, in seconds of a host of speed 1."""
    lost_units: int
    phases: Mapping[str, float]
    changes: Mapping[str, int]
    """How often a worker was lost, left, joined, sat a step out."""

    @property
    def useful(self) -> float:
        """The share of the hosts' time in which they computed what counted."""
        return self.counted / self.alive

    @property
    def against_ideal(self) -> float:
        """The units done against what the sum of the hosts' speeds allows."""
        return self.work / self.power


def simulate(
    fleet: Fleet,
    load: Load,
    *,
    stages: int = 1,
    seconds: float = NEVER,
    steps: int | None = None,
    fixed: bool = False,
    sit_out: bool = True,
    group: SimulatedGroup | None = None,
) -> Report:
    """A run on a fleet until so much time has passed since its first step, or so many steps are done."""
    store = memory_store()
    job = simulated_job(store, load)
    group = group or SimulatedGroup(fleet, load, VirtualClock())
    clock = group.clock
    seen: Counter[str] = Counter()
    began, done, root = NEVER, 0, b""

    def observe(event: Event) -> None:
        nonlocal began, done, root
        if isinstance(event, Ready):
            began, done = min(began, clock.time), event.step
            root, group.limit = event.state_root, began + OVERTIME * seconds
        elif isinstance(event, Stepped):
            done, root = event.record.step + 1, event.record.state_root
            seen["steps"] += 1
        elif isinstance(event, Changed):
            seen["sat out" if " sits out " in event.what else event.what.partition(" ")[0]] += 1
        elif isinstance(event, Assembled):
            seen["assembled"] += 1

    replicas = fleet.hosts // stages
    controller = Controller(
        store=store,
        job=job,
        group=group,
        plan=make_plan(blocks=load.blocks, stages=stages, replicas=replicas, micro_batches=load.micro_batches),
        elastic=Elastic(membership=group, clock=clock, fixed=fixed, patience=3600.0, sit_out=sit_out),
        observe=observe,
        stop=lambda: clock.time - began >= seconds or (steps is not None and done >= steps),
    )
    with suppress(Over):
        controller.run()
    return _report(group, root, done, began, seen)


def _report(group: SimulatedGroup, root: bytes, steps: int, began: float, seen: Counter[str]) -> Report:
    now, tallies = group.clock.time, [group.steps[step] for step in range(steps)]
    alive = [(host, host.alive(began, now)) for host in group.machines.hosts]
    return Report(
        root=root,
        seconds=now - began,
        steps=steps,
        redone=seen.get("steps", 0) - steps,
        falls=seen["assembled"] - 1,
        exchanges=group.exchanges,
        counted=math.fsum(tally.seconds for tally in tallies),
        computed=group.computed,
        alive=math.fsum(seconds for _, seconds in alive),
        work=math.fsum(tally.work for tally in tallies),
        power=math.fsum(seconds * host.speed for host, seconds in alive),
        lost_units=group.computed_units - sum(tally.units.total() for tally in tallies),
        phases=dict(group.phases),
        changes={what: seen.get(what, 0) for what in ("lost", "left", "joined", "sat out")},
    )
