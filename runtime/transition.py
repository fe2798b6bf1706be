"""One training step over a group of workers: the transition function that the trainer and the verifier share.

State, batch and step in; next state and a StepRecord out. Which workers there are makes no difference to either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.data import batch_root
from runtime.feed import Batch
from runtime.groups import Handle, WorkerConfig, WorkerGroup
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.shards import GRADIENT, WEIGHT, Layout, make_layout, tensor_entries
from storage import merkle
from storage.codec import encode
from storage.errors import FailureError
from storage.manifest import state_root
from storage.records import StepRecord


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Started workers that hold one state between them."""

    group: WorkerGroup
    layout: Layout
    keys: tuple[str, ...]
    """What a tensor's state consists of: `weight`, then the optimiser's slots."""

    @property
    def plan(self) -> Plan:
        """Where the work goes."""
        return self.layout.plan

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker's id."""
        return self.layout.plan.workers

    def gather(self, method: str, *args: Any) -> list[Any]:
        """The results of one method on every worker."""
        return self.group.get([self.group.call(worker, method, *args) for worker in self.workers])


def assemble(
    group: WorkerGroup, *, plan: Plan, program: TrainingProgram, programs: bytes, seed: int, keys: str, threads: int
) -> Crew:
    """Start a worker for each place of the plan. `programs` is the encoding of `program`; the state is not set yet."""
    configs = {
        worker: encode(WorkerConfig(worker=worker, plan=plan, programs=programs, seed=seed, keys=keys, threads=threads))
        for worker in plan.workers
    }
    group.start(configs)
    return Crew(group=group, layout=make_layout(plan, program), keys=(WEIGHT, *program.slots))


# ------------------------------------------------------------------------------------------------------------ state


def initialise(crew: Crew) -> bytes:
    """The root of the initial state, which the workers hold from now on."""
    return _publish(crew, "initialise")


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
        holders = [worker for worker in crew.workers if tensor in crew.layout.holds(worker)]
        handles += [crew.group.call(worker, "load", key, tensor, shared) for worker in holders]
    crew.group.get(handles)


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
        layout, group = self._crew.layout, self._crew.group
        owners = {layout.owners[chunk] for chunk in layout.chunks(tensor)}
        parts: dict[int, np.ndarray] = {}
        for found in group.get([group.call(worker, "fetch", key, tensor) for worker in sorted(owners)]):
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
    events: tuple[str, ...] = (),
) -> tuple[StepRecord, tuple[bytes, ...]]:
    """The record of one step and its signed receipts; the crew holds the next state.

    Raises StepFault where an operator refuses a value; the crew's state is worth nothing then.
    """
    losses = forward_backward(crew, step, batch, range(len(crew.plan.units)))
    exponent, gradient_root = _reduce(crew, step)
    loss = sum(crew.group.get(losses))
    squares = sum(crew.gather("squares", exponent))
    root = _publish(crew, "update", step, squares, exponent)
    receipts = tuple(receipt for receipt in crew.gather("receipt", run, step) if receipt)
    record = StepRecord(
        step=step,
        data=batch_root(batch.inputs, batch.targets),
        loss=loss,
        units=len(crew.plan.units),
        gradient_root=gradient_root,
        state_root=root,
        validation=_validate(crew, validation),
        events=events,
        receipts_root=merkle.list_root(receipts),
    )
    return record, receipts


def forward_backward(crew: Crew, step: int, batch: Batch, micro_batches: Sequence[int]) -> list[Handle]:
    """Some micro-batches forward through the stages, then backward (GPipe); handles of the losses."""
    plan, call = crew.plan, crew.group.call
    last = len(plan.stages) - 1
    units = [(m, plan.units[m]) for m in micro_batches]
    parts = {m: batch.micro_batch(m, len(plan.units)) for m in micro_batches}
    values: dict[int, Any] = {m: part.inputs for m, part in parts.items()}
    for stage in range(last):
        for m, replica in units:
            values[m] = call(plan.worker(stage, replica), "forward", step, m, values[m])
    losses = []
    for m, replica in units:
        worker = plan.worker(last, replica)
        loss, values[m] = call(worker, "last", step, m, values[m], parts[m].targets, returns=2)
        losses.append(loss)
    for stage in reversed(range(last)):
        for m, replica in units:
            values[m] = call(plan.worker(stage, replica), "backward", step, m, values[m])
    crew.group.get(list(values.values()))  # all None: a fault shows here
    return losses


def _reduce(crew: Crew, step: int) -> tuple[int, bytes]:
    """(largest exponent of the summed gradient, its root): every owner adds the bundles for its chunks."""
    bundles = _exchange(crew, "gradients", crew.layout.owners_for)
    reduced = crew.group.get([crew.group.call(worker, "reduce", step, *bundles[worker]) for worker in crew.workers])
    roots = {key: root for _, part in reduced for key, root in part.items()}
    entries = tensor_entries(crew.layout, roots, keys=(GRADIENT,), dtype="i64")
    return max(exponent for exponent, _ in reduced), state_root(entries)


def _publish(crew: Crew, method: str, *args: int) -> bytes:
    """Call what makes new weights on every owner, bring them to all holders, and return the root of the state."""
    heads: list[Handle] = []
    bundles = _exchange(crew, method, crew.layout.holders_of, *args, heads=heads)
    stored = [crew.group.call(worker, "store", *bundles[worker]) for worker in crew.workers]
    roots = {key: root for part in crew.group.get(heads) for key, root in part.items()}
    crew.group.get(stored)
    return state_root(tensor_entries(crew.layout, roots, keys=crew.keys, dtype="f32"))


def _exchange(
    crew: Crew, method: str, destinations: Any, *args: int, heads: list[Handle] | None = None
) -> dict[str, list[Handle]]:
    """Call a method whose results are one bundle a destination; the bundles by destination.

    With `heads` the method returns one value more in front, whose handles are collected there.
    """
    bundles: dict[str, list[Handle]] = {worker: [] for worker in crew.workers}
    for worker in crew.workers:
        targets = destinations(worker)
        extra = 0 if heads is None else 1
        results = crew.group.call(worker, method, *args, returns=len(targets) + extra)
        if heads is not None:
            heads.append(results[0])
        for target, bundle in zip(targets, results[extra:], strict=True):
            bundles[target].append(bundle)
    return bundles


def _validate(crew: Crew, batches: Sequence[Batch]) -> tuple[int, ...]:
    """() without batches, else (loss sum, hits, count, batches) with the new weights."""
    if not batches:
        return ()
    plan, call = crew.plan, crew.group.call
    measured = []
    for number, batch in enumerate(batches):
        replica = number % plan.replicas
        value: Any = batch.inputs
        for stage in range(len(plan.stages) - 1):
            value = call(plan.worker(stage, replica), "evaluate", value)
        measured.append(call(plan.worker(len(plan.stages) - 1, replica), "measure", value, batch.targets))
    loss, hits, count = (sum(column) for column in zip(*crew.group.get(measured), strict=True))
    return loss, hits, count, len(batches)
