"""Faults put into a run on purpose, to show that they are found: `trueweight run --inject`, tests, benchmarks.

A fault is aimed at one worker in one step. Those of values change one element of one operator's output at a place
(`runtime.places`); the others are what a careless or dishonest worker would do. Only recipes that say `faults = true`
take any, and a run that had one is not to be used.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtime.groups import WorkerConfig
from runtime.places import HERE
from runtime.plan import Plan
from runtime.program.executor import Executor, Handle, Observer
from runtime.program.program import Program
from runtime.program.training import TrainingProgram
from runtime.program.types import type_of
from runtime.shards import Shares, make_layout
from runtime.worker import Bundle, StageWorker, worker_builder
from storage.codec import decode, encode
from storage.errors import UsageError
from storage.identity import Identity, new_secret, receipt_message
from storage.records import Receipt

VALUES = ("flip", "ulp", "transient")
"""One element of one operator: a flipped bit, the next float, a flipped bit that does not come again."""
WAYS = ("batch", "skip", "reuse", "rate", "stale", "copy", "receipt")
"""Other inputs, a unit left out, the last step's gradient, another step's learning rate, the last step's weights,
another worker's gradient, a receipt that somebody else signed."""
KINDS = (*VALUES, *WAYS)
_INTEGERS = {"f32": np.uint32, "i32": np.uint32, "i64": np.uint64, "i8": np.uint8, "bool": np.uint8}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, where. `place` is below the step, such as `micro-batch 1/block 0/forward`."""

    kind: str
    step: int
    worker: str = "s0r0"
    micro_batch: int = 0
    place: str = ""
    operator: int = 0
    element: int = 0
    bit: int = 0

    def __str__(self) -> str:
        names = {
            "batch": ("micro_batch",),
            "skip": ("micro_batch",),
            **dict.fromkeys(VALUES, ("place", "operator", "element", "bit")),
        }.get(self.kind, ())
        return ",".join(f"{name}={getattr(self, name)}" for name in ("kind", "step", "worker", *names))

    @property
    def where(self) -> str:
        """The place with its step."""
        return f"step {self.step}/{self.place}"

    def alter(self, array: np.ndarray) -> np.ndarray:
        """The array with the fault in its element."""
        changed = array.copy()
        bits = changed.reshape(-1).view(_INTEGERS[type_of(array).dtype])
        at = self.element % max(bits.size, 1)
        if bits.size:
            truth = array.dtype == np.bool_
            flipped = bits[at] ^ bits.dtype.type(1 << self.bit % (1 if truth else 8 * bits.itemsize))
            bits[at] = bits[at] + 1 if self.kind == "ulp" and not truth else flipped
        return changed


def parse_fault(text: str) -> Fault:
    """The fault in a text such as `kind=flip,step=3,worker=s0r0,place=update/wte/0,operator=4,element=7,bit=20`."""
    expected = f"kind=KIND,step=N[,worker=s0r0][,...] with a kind of {', '.join(KINDS)}"
    fields = {field.name: field.type for field in dataclasses.fields(Fault)}
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in fields or key in given or not value or (fields[key] is int and not value.isdecimal()):
            raise UsageError(f"--inject {text!r}: expected {expected}, got {part!r}; see docs/pinpoint.md")
        given[key] = int(value) if fields[key] is int else value
    if given.get("kind") not in KINDS or "step" not in given or (given["kind"] in VALUES) != ("place" in given):
        raise UsageError(f"--inject {text!r}: expected {expected}, and a place for {', '.join(VALUES)}; correct it")
    return Fault(**given)


def check_fault(fault: Fault, program: TrainingProgram, plan: Plan, steps: int) -> None:
    """UsageError where there is no such step, worker, micro-batch, place or operator."""
    if fault.step >= steps:
        raise UsageError(f"--inject {fault}: expected a step below {steps}; correct it")
    if fault.worker not in plan.workers:
        raise UsageError(f"--inject {fault}: expected one of {', '.join(plan.workers)}; correct worker")
    if fault.kind in ("reuse", "stale") and not fault.step:
        raise UsageError(f"--inject {fault}: expected a step after the first; correct step")
    if fault.kind == "copy" and plan.replicas[plan.place(fault.worker)[0]] < 2:
        raise UsageError(f"--inject {fault}: expected another replica to copy from; use --replicas 2")
    if fault.kind in ("batch", "skip"):
        mine = plan.taken(fault.worker)
        if fault.micro_batch not in mine:
            raise UsageError(f"--inject {fault}: expected one of {fault.worker}'s micro-batches {mine}; correct it")
        if fault.kind == "batch" and plan.place(fault.worker)[0]:
            raise UsageError(f"--inject {fault}: expected a worker of the first stage, which takes the data")
    if fault.kind in VALUES:
        places = places_of(program, plan, fault.worker)
        if fault.place not in places:
            few = ", ".join(list(places)[:3])
            raise UsageError(f"--inject {fault}: expected a place of {fault.worker} such as {few}; correct place")
        if fault.operator >= len(places[fault.place].ops):
            count = len(places[fault.place].ops)
            raise UsageError(f"--inject {fault}: expected an operator below {count}; correct operator")


def places_of(program: TrainingProgram, plan: Plan, worker: str) -> dict[str, Program]:
    """Every place of a step at which a worker runs a Program, in order, with that Program."""
    stage, _ = plan.place(worker)
    mine = plan.taken(worker)
    blocks = plan.stages[stage]
    places: dict[str, Program] = {}
    for m in mine:
        for block in blocks:
            places[f"micro-batch {m}/block {block}/forward"] = program.kind_of(block).forward
    for m in mine:
        if stage == len(plan.stages) - 1:
            places[f"micro-batch {m}/loss"] = program.loss
        for block in reversed(blocks):
            places[f"micro-batch {m}/block {block}/backward"] = program.kind_of(block).backward
    layout = make_layout(plan, program)
    chunks = [(c, layout.length(c), f"{layout.names[c.tensor]}/{c.part}") for c in layout.owned(worker)]
    places |= {f"reduce/{name}": program.exponent_program(length) for _, length, name in chunks}
    places |= {f"square/{name}": program.square_program(length) for _, length, name in chunks}
    places |= {f"update/{name}": program.update_program(chunk.tensor, length) for chunk, length, name in chunks}
    return places


def random_fault(
    program: TrainingProgram, plan: Plan, *, first: int, stop: int, seed: int, kinds: Sequence[str] = KINDS
) -> Fault:
    """A fault of a random kind, step in first .. stop - 1, worker, place, operator, element and bit."""
    draw = random.Random(seed)  # noqa: S311 - an experiment that can be repeated
    possible = [kind for kind in kinds if kind != "copy" or min(plan.replicas) > 1]
    kind = draw.choice([kind for kind in possible if stop > 1 or kind not in ("reuse", "stale")])
    worker = draw.choice([w for w in plan.workers if kind != "batch" or not plan.place(w)[0]])
    mine = plan.taken(worker)
    step = draw.randrange(max(first, kind in ("reuse", "stale")), stop)
    fault = Fault(kind=kind, step=step, worker=worker, micro_batch=draw.choice(mine))
    if kind not in VALUES:
        return fault
    places = places_of(program, plan, worker)
    place = draw.choice(list(places))
    operator = draw.randrange(len(places[place].ops))
    made = places[place].ops[operator].type
    bits = {"f32": 24, "i32": 16, "i64": 24, "i8": 7, "bool": 1}[made.dtype]
    element, bit = draw.randrange(max(made.elements, 1)), draw.randrange(bits)
    return dataclasses.replace(fault, place=place, operator=operator, element=element, bit=bit)


class FaultyExecutor:
    """An executor that computes the wrong thing where a fault says so."""

    def __init__(self, inner: Executor, faults: Sequence[Fault]) -> None:
        self._inner = inner
        self._faults = {fault.where: fault for fault in faults if fault.kind in VALUES}
        self._rates = [f"step {fault.step}/update/" for fault in faults if fault.kind == "rate"]

    def put(self, array: np.ndarray) -> Handle:
        """See Executor."""
        return self._inner.put(array)

    def get(self, handle: Handle) -> np.ndarray:
        """See Executor."""
        return self._inner.get(handle)

    def forget(self) -> None:
        """See Executor."""
        self._inner.forget()

    def run(
        self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Handle]:
        """See Executor."""
        fault = self._faults.get(HERE.get())
        if any(HERE.get().startswith(place) for place in self._rates):
            step = self.get(inputs[-1])
            inputs = [*inputs[:-1], self.put(np.where(step > 0, step - 1, step + 1))]
        if fault is None:
            return self._inner.run(program, inputs, observe, stable=stable)

        def alter(number: int, array: np.ndarray) -> np.ndarray | None:
            changed = fault.alter(array) if number == fault.operator else None
            if observe is not None:
                observe(number, array if changed is None else changed)
            return changed

        return self._inner.run(program, inputs, alter)

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Handle], *, stable: int = 0
    ) -> tuple[list[Handle], Any]:
        """See Executor."""
        if HERE.get() in self._faults:
            return self.run(forward, inputs), None
        return self._inner.forward(forward, backward, inputs, stable=stable)

    def backward(
        self,
        forward: Program,
        backward: Program,
        inputs: Sequence[Handle],
        saved: Any,
        sums: Sequence[np.ndarray] = (),
        *,
        stable: int = 0,
    ) -> list[Handle]:
        """See Executor."""
        if HERE.get() not in self._faults:
            return self._inner.backward(forward, backward, inputs, saved, sums, stable=stable)
        outputs = self.run(backward, inputs)
        kept = len(outputs) - len(sums)
        for total, made in zip(sums, outputs[kept:], strict=True):
            total += self.get(made).reshape(-1)
        return outputs[:kept]


class FaultyWorker(StageWorker):
    """A worker that does the wrong thing where a fault says so."""

    faults: Mapping[str, Fault] = {}
    peers: Mapping[str, "FaultyWorker"] = {}

    def forward(self, step: int, micro_batch: int, x: np.ndarray) -> np.ndarray:
        """See StageWorker."""
        self._before(step)
        return super().forward(step, micro_batch, self._inputs(step, micro_batch, x))

    def last(self, step: int, micro_batch: int, x: np.ndarray, target: np.ndarray) -> tuple[int, np.ndarray | None]:
        """See StageWorker."""
        self._before(step)
        if self._due("skip", step, micro_batch):
            dx = np.zeros_like(x) if self._stage else None
            self._note(step, micro_batch, x=x, y=np.zeros((), np.int64), dx=dx)
            return 0, dx
        return super().last(step, micro_batch, self._inputs(step, micro_batch, x), target)

    def backward(self, step: int, micro_batch: int, dy: np.ndarray) -> np.ndarray | None:
        """See StageWorker."""
        if self._due("skip", step, micro_batch):
            x = self._executor.get(self._kept.pop(micro_batch)[0][0])
            dx = np.zeros_like(x) if self._stage else None
            self._note(step, micro_batch, dy=dy, dx=dx)
            return dx
        return super().backward(step, micro_batch, dy)

    def gradients(self, step: int, shares: Shares, exchange: int) -> tuple[Bundle, ...]:
        """See StageWorker."""
        self._begin(step)
        if self._due("stale", step):
            for tensor, array in self._fresh.items():
                self._weights[tensor][:] = array
            self._renew()
        if self._due("reuse", step + 1):
            self._used = {tensor: total.value.copy() for tensor, total in self._sums.items()}
        if self._due("reuse", step):
            self._replace(self._used)
        if self._due("copy", step):
            other = next(one for one in self.peers.values() if one is not self and one._stage == self._stage)
            self._replace({tensor: total.value for tensor, total in other._sums.items()})
        return super().gradients(step, shares, exchange)

    def receipt(self, run: bytes, step: int) -> bytes:
        """See StageWorker."""
        data = super().receipt(run, step)
        if not data or not self._due("receipt", step):
            return data
        receipt = decode(Receipt, data)
        return encode(dataclasses.replace(receipt, signature=Identity(new_secret()).sign(receipt_message(receipt))))

    def _due(self, kind: str, step: int, micro_batch: int | None = None) -> bool:
        fault = self.faults.get(kind)
        return fault is not None and fault.step == step and micro_batch in (None, fault.micro_batch)

    def _inputs(self, step: int, micro_batch: int, x: np.ndarray) -> np.ndarray:
        return np.roll(x.reshape(-1), 1).reshape(x.shape) if self._due("batch", step, micro_batch) else x

    def _replace(self, values: Mapping[int, np.ndarray]) -> None:
        for tensor, array in values.items():
            self._sum(tensor).value[:] = array

    def _before(self, step: int) -> None:
        """At the first micro-batch of a step: keep the weights that will be stale, or go back to them."""
        if self._step == step:
            return
        if self._due("stale", step + 1):
            self._stale = {tensor: array.copy() for tensor, array in self._weights.items()}
        if self._due("stale", step):
            self._fresh = {tensor: array.copy() for tensor, array in self._weights.items()}
            for tensor, array in self._stale.items():
                self._weights[tensor][:] = array
            self._renew()


class Build(Protocol):
    """Makes what builds a worker from its encoded WorkerConfig: `worker_builder`, `traced_builder`."""

    def __call__(self, make: Callable[[int], Executor], kind: type[StageWorker], /) -> Callable[[bytes], Any]:
        """A builder of workers of a kind, each with an executor made for its thread count."""


def faulty_builder(
    make: Callable[[int], Executor],
    faults: Sequence[Fault],
    *,
    repeating: bool = False,
    build: Build = worker_builder,
) -> Callable[[bytes], Any]:
    """A function that builds workers with those faults that are theirs; when repeating, without the transient ones."""
    peers: dict[str, FaultyWorker] = {}

    def built(config: bytes) -> FaultyWorker:
        name = decode(WorkerConfig, config).worker
        mine = [one for one in faults if one.worker == name and not (repeating and one.kind == "transient")]
        worker: FaultyWorker = build(lambda threads: FaultyExecutor(make(threads), mine), FaultyWorker)(config)
        worker.faults, worker.peers = {fault.kind: fault for fault in mine}, peers
        peers[name] = worker
        return worker

    return built
