"""One training step over a group of workers: the transition function that the trainer and the verifier share.

State, batch and step in; next state and a StepRecord out. Which workers there are makes no difference to either.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar

import numpy as np

from runtime.data import batch_root
from runtime.feed import Batch
from runtime.groups import Handle, ValueLost, WorkerConfig, WorkerGroup, WorkersLost
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.shards import GRADIENT, WEIGHT, Chunk, ChunkRoots, Layout, make_layout, tensor_entries
from runtime.work import Late, Pace, Work
from storage import merkle
from storage.codec import encode
from storage.errors import FailureError
from storage.manifest import state_root
from storage.records import StepRecord

T = TypeVar("T")
VALUE_ATTEMPTS, VALUE_SECONDS = 5, 2.0
"""How often a phase is begun again because a value is gone, while no worker is known to be, and how long after."""


class Changes(Protocol):
    """Who comes and goes while a crew trains (`runtime.roster`). All may raise WorkersLost."""

    sitting_out: bool
    """Whether stragglers sit a step out."""

    def lost(self, error: WorkersLost, later: bool = False) -> None:
        """Have the crew go on without workers; with `later` their places may stay empty, as units are under way."""

    def meanwhile(self, left: float) -> bool:
        """While units are under way, about `left` seconds more: let take part who has come. Whether somebody has."""

    def sit_out(self, late: Late) -> None:
        """Have a straggler take no part until it is done with what it has, as others do its units again.

        This one raises nothing: what a worker did is never to be counted beside what others do again.
        """

    def settle(self) -> None:
        """Before the state changes: a place for everybody who takes part, and nobody else has one."""

    def made(self, step: int, receipts: Sequence[bytes]) -> None:
        """The next state is made, these are the receipts of what counts, and the state changes from now on."""


@dataclass(kw_only=True)
class Crew:
    """Started workers that hold one state between them. `members` are the group's workers at the places of the plan.

    While units are done some of the places may be empty and some workers have none; for all else there is somebody at
    each, and nobody else.
    """

    group: WorkerGroup
    program: TrainingProgram
    layout: Layout
    keys: tuple[str, ...]
    """What a tensor's state consists of: `weight`, then the optimiser's slots."""
    members: dict[str, str]
    gone: dict[str, str] = field(default_factory=dict)
    """Workers that are lost, or sit the step out, and have their places yet, with the reason: nobody counts on them."""
    joined: dict[str, int] = field(default_factory=dict)
    """Workers that take part and have no place yet, with their stages, whose state they hold."""
    fetches: Iterator[int] = field(default_factory=count)
    """Numbers of what workers take from others, the later the higher."""
    pace: Pace = field(default_factory=Pace)
    fixed: bool = True
    """Whether each replica takes the units that the plan gives it, and no others."""
    roots: ChunkRoots = field(default_factory=dict)
    """The chunk roots of the state, where they are known."""

    @property
    def plan(self) -> Plan:
        """Where the work goes."""
        return self.layout.plan

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker's id: the places of the plan."""
        return self.layout.plan.workers

    def present(self, stage: int) -> list[str]:
        """The group's workers that may be given units of a stage."""
        at_places = (self.members[place] for place in self.plan.team(stage))
        return [
            *(name for name in at_places if name not in self.gone),
            *(name for name, at in self.joined.items() if at == stage),
        ]

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """A call of the worker at a place, as `WorkerGroup.call`."""
        return self.group.call(self.members[worker], method, *args, returns=returns)

    def gather(self, method: str, *args: Any) -> list[Any]:
        """The results of one method on every worker."""
        return self.group.get([self.call(worker, method, *args) for worker in self.workers])


def assemble(
    group: WorkerGroup,
    *,
    plan: Plan,
    program: TrainingProgram,
    programs: bytes,
    seed: int,
    keys: str,
    threads: int,
    fixed: bool = True,
    now: Callable[[], float] = time.monotonic,
) -> Crew:
    """Start a worker for each place of the plan. `programs` is the encoding of `program`; the state is not set yet."""

    def config(worker: str) -> bytes:
        return encode(WorkerConfig(worker=worker, plan=plan, programs=programs, seed=seed, keys=keys, threads=threads))

    group.start(_Made(plan.workers, config))
    return Crew(
        group=group,
        program=program,
        layout=make_layout(plan, program),
        keys=(WEIGHT, *program.slots),
        members={worker: worker for worker in plan.workers},
        pace=Pace(now),
        fixed=fixed,
    )


class _Made(Mapping[str, bytes]):
    """Values that are made when they are asked for: a plan is long, and every worker gets one of its own."""

    def __init__(self, keys: Sequence[str], make: Callable[[str], bytes]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> bytes:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


# ------------------------------------------------------------------------------------------------------------ state


def initialise(crew: Crew) -> bytes:
    """The root of the initial state, which the workers hold from now on."""
    roots = _publish(crew, next(crew.fetches), "initialise")
    crew.gather("commit")
    crew.roots = roots
    return root_of(crew, roots)


def restore(crew: Crew, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the workers a whole state: every `key/tensor` array goes to those that keep it."""
    missing = sorted(set(crew_names(crew)) - set(arrays))
    if missing:
        raise FailureError(f"state: expected the tensors of the run's programs, got a difference in {missing[0]}")
    place(crew, arrays)


def place(crew: Crew, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the workers some of a state's arrays, `key/tensor`: each goes to those that keep it."""
    names = crew_names(crew)
    if not set(arrays) <= set(names):
        odd = sorted(set(arrays) - set(names))
        raise FailureError(f"state: expected the tensors of the run's programs, got a difference in {odd[0]}")
    handles = []
    for name, array in arrays.items():
        key, tensor = names[name]
        if array.shape != crew.layout.shapes[tensor] or array.dtype != np.float32:
            raise FailureError(
                f"state: expected {name} as float32 {list(crew.layout.shapes[tensor])}, as in the run's programs, got "
                f"{array.dtype} {list(array.shape)}; take the checkpoint from another copy of the store"
            )
        shared = crew.group.share(array)
        holders = crew.layout.holders(Chunk(tensor, 0))
        handles += [crew.call(worker, "load", key, tensor, shared) for worker in holders]
    crew.group.get(handles)
    crew.roots = {}


def crew_names(crew: Crew) -> dict[str, tuple[str, int]]:
    """Every array of the state by name, `key/tensor`, with its key and tensor number."""
    return {f"{key}/{name}": (key, tensor) for key in crew.keys for tensor, name in enumerate(crew.layout.names)}


class StateParts(Mapping[str, list[np.ndarray]]):
    """The state that a crew holds: each tensor's chunks in order, flat, which the next step may overwrite."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._names = crew_names(crew)
        self.shapes = {name: crew.layout.shapes[tensor] for name, (_, tensor) in self._names.items()}

    def __getitem__(self, name: str) -> list[np.ndarray]:
        key, tensor = self._names[name]
        crew, layout = self._crew, self._crew.layout
        owners = {layout.owners[chunk] for chunk in layout.chunks(tensor)}
        parts: dict[int, np.ndarray] = {}
        for found in crew.group.get([crew.call(worker, "fetch", key, tensor) for worker in sorted(owners)]):
            parts |= found
        return [parts[part] for part in sorted(parts)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StateView(Mapping[str, np.ndarray]):
    """The state that a crew holds, one tensor copied at a time."""

    def __init__(self, crew: Crew) -> None:
        self._parts = StateParts(crew)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts[name]).reshape(self._parts.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


# ------------------------------------------------------------------------------------------------------------- step


def train_step(
    crew: Crew,
    *,
    run: bytes,
    step: int,
    batch: Batch,
    validation: Sequence[Batch] = (),
    events: list[str] | None = None,
    changes: Changes | None = None,
) -> tuple[StepRecord, tuple[bytes, ...]]:
    """The record of one step and its signed receipts; the crew holds the next state.

    Workers that are lost are handed to `changes`, which lets the crew go on without them and may add to `events`; what
    they did of the step is done again. Raises StepFault where an operator refuses a value; the crew's state is worth
    nothing then.
    """
    events = [] if events is None else events
    work = Work(team=crew, step=step, batch=batch, micro_batches=crew.plan.micro_batches)
    if changes:
        work.meanwhile = changes.meanwhile
        work.sit_out = changes.sit_out if changes.sitting_out else None

    def attempt() -> tuple[int, bytes, ChunkRoots, tuple[bytes, ...]]:
        losses = work.run()
        if changes:
            changes.settle()
        crew.layout = crew.layout.sharing(work.shares)
        exchange = next(crew.fetches)
        exponent, gradient_root = _reduce(crew, step, exchange)
        loss = sum(crew.group.get(losses))
        squares = sum(crew.gather("squares", exponent))
        at_once = changes is None and max(crew.plan.replicas) == 1
        roots = _publish(crew, exchange, "update", step, squares, exponent, at_once)
        return loss, gradient_root, roots, tuple(receipt for receipt in crew.gather("receipt", run, step) if receipt)

    loss, gradient_root, roots, receipts = going_on(crew, attempt, changes, work)
    if changes:
        changes.made(step, receipts)
    going_on(crew, lambda: crew.gather("commit"), changes)
    crew.roots = roots  # not before: a step that is gone through again begins with the state before
    measured = going_on(crew, lambda: _validate(crew, validation), changes)
    record = StepRecord(
        step=step,
        data=batch_root(batch.inputs, batch.targets),
        loss=loss,
        units=len(work.micro_batches),
        gradient_root=gradient_root,
        state_root=root_of(crew, roots),
        validation=measured,
        events=tuple(events),
        receipts_root=merkle.list_root(receipts),
    )
    return record, receipts


def going_on(crew: Crew, act: Callable[[], T], changes: Changes | None, work: Work | None = None) -> T:
    """What `act` returns, done again while workers are lost and the crew can go on without them."""
    values = 0
    while True:
        try:
            if values:  # a value went with a host: time to hear which
                crew.group.wait([], VALUE_SECONDS)
            return act()
        except ValueLost:
            values += 1
            if changes is None or values == VALUE_ATTEMPTS:
                raise
        except WorkersLost as error:
            if changes is None:
                raise
            values = 0
            _without(error, changes, work)


def _without(error: WorkersLost, changes: Changes, work: Work | None) -> None:
    """Have the crew go on without some workers, and without those that are lost meanwhile."""
    while True:
        if work:
            work.forget(error.lost)
        try:
            return changes.lost(error, work is not None and not work.done)
        except WorkersLost as further:
            error = WorkersLost(further.lost)  # not with the frames of all that was tried, and their values


def forward_backward(crew: Crew, step: int, batch: Batch, micro_batches: Sequence[int]) -> list[Handle]:
    """Some micro-batches forward through the stages, then backward; handles of the losses."""
    return Work(team=crew, step=step, batch=batch, micro_batches=micro_batches).run()


def _reduce(crew: Crew, step: int, exchange: int) -> tuple[int, bytes]:
    """(largest exponent of the summed gradient, its root): every owner adds the bundles for its chunks."""
    bundles, _ = _exchange(crew, "gradients", crew.layout.owners_for, step, crew.layout.shares, exchange)
    reduced = crew.group.get([crew.call(worker, "reduce", step, exchange, *bundles[worker]) for worker in crew.workers])
    roots = {key: root for _, part in reduced for key, root in part.items()}
    entries = tensor_entries(crew.layout, roots, keys=(GRADIENT,), dtype="i64")
    return max(exponent for exponent, _ in reduced), state_root(entries)


def _publish(crew: Crew, exchange: int, method: str, *args: int) -> ChunkRoots:
    """Call what makes the next state on every owner, bring it to all holders, and return its chunks' roots."""
    parts, heads = _exchange(crew, method, crew.layout.holders_of, *args, heads=1)
    stored = [crew.call(worker, "store", exchange, *parts[worker]) for worker in crew.workers]
    roots = {key: root for part in crew.group.get(heads) for key, root in part.items()}
    crew.group.get(stored)
    return roots


def root_of(crew: Crew, roots: ChunkRoots) -> bytes:
    """The state root that chunk roots compose to."""
    return state_root(tensor_entries(crew.layout, roots, keys=crew.keys, dtype="f32"))


def _exchange(
    crew: Crew, method: str, destinations: Callable[[str], Sequence[str]], *args: Any, heads: int = 0
) -> tuple[dict[str, list[Handle]], list[Handle]]:
    """(results by destination, heads): calls a method that returns `heads` values, then one for each destination."""
    bundles: dict[str, list[Handle]] = {worker: [] for worker in crew.workers}
    first: list[Handle] = []
    for worker in crew.workers:
        targets = destinations(worker)
        results = crew.call(worker, method, *args, returns=heads + len(targets))
        first += results[:heads]
        for target, bundle in zip(targets, results[heads:], strict=True):
            bundles[target].append(bundle)
    return bundles, first


def _validate(crew: Crew, batches: Sequence[Batch]) -> tuple[int, ...]:
    """() without batches, else (loss sum, hits, count, batches) with the new weights."""
    if not batches:
        return ()
    plan = crew.plan
    measured = []
    for number, batch in enumerate(batches):
        *firsts, last = (plan.worker(stage, number % count) for stage, count in enumerate(plan.replicas))
        value: Any = batch.inputs
        for worker in firsts:
            value = crew.call(worker, "evaluate", value)
        measured.append(crew.call(last, "measure", value, batch.targets))
    loss, hits, items = (sum(column) for column in zip(*crew.group.get(measured), strict=True))
    return loss, hits, items, len(batches)
