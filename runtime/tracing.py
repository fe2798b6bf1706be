"""Traced workers: what every call of a step took and gave, and on demand every operator of one of them.

A trace is made when somebody asks, never in the normal path. A call is one application of a Program at a place
(`runtime.places`); adding gradients up, which no executor does, is traced as a Program of additions. Values of a call
are numbered as in its Program: inputs first, then operators in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from runtime.integers import ExactSum
from runtime.places import HERE, at
from runtime.program.executor import Executor, Handle, Observer
from runtime.program.program import Op, Program
from runtime.program.types import Type
from runtime.shards import ChunkRoots, Shares
from runtime.worker import Bundle, StageWorker, worker_builder
from storage import merkle
from storage.codec import Digest, encode, record
from storage.errors import FailureError


@record(kind=102)
class Call:
    """One application of a Program: its root, and `merkle.bytes_root` of each input and output."""

    place: str
    program: Digest
    inputs: tuple[Digest, ...]
    outputs: tuple[Digest, ...]


@dataclass(kw_only=True)
class Captured:
    """A call with its arrays; `made` are the operators' outputs where no executor makes them."""

    place: str
    program: Program
    inputs: list[np.ndarray]
    made: list[np.ndarray] | None = None


class Tracer:
    """Notes the calls at places below `scopes`, and keeps the arrays of the one at `wanted`."""

    def __init__(self) -> None:
        self.watch((), "")

    def watch(self, scopes: Sequence[str], wanted: str) -> None:
        """Begin anew."""
        self.scopes, self.wanted = tuple(scopes), wanted
        self.calls: list[Call] = []
        self.captured: Captured | None = None

    @property
    def watching(self) -> bool:
        """Whether the call that is being made is to be noted."""
        return any(HERE.get().startswith(scope) for scope in self.scopes)

    def note(
        self,
        program: Program,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        made: Sequence[np.ndarray] | None = None,
        known: Sequence[bytes] = (),
    ) -> None:
        """Take down the call that was made; `known` are the digests of the first inputs."""
        roots = [*known, *map(_root, inputs[len(known) :])]
        place = HERE.get()
        self.calls.append(
            Call(place=place, program=program.root, inputs=tuple(roots), outputs=tuple(map(_root, outputs)))
        )
        if place == self.wanted:
            arrays = None if made is None else [array.copy() for array in made]
            self.captured = Captured(
                place=place, program=program, inputs=[array.copy() for array in inputs], made=arrays
            )


class TracingExecutor:
    """Any executor, with its calls noted. What was handed from forward to backward is made again while watching."""

    def __init__(self, inner: Executor, tracer: Tracer) -> None:
        self._inner, self._tracer = inner, tracer
        self._parameters: dict[int, tuple[Handle, bytes]] = {}

    def put(self, array: np.ndarray) -> Handle:
        """See Executor."""
        return self._inner.put(array)

    def get(self, handle: Handle) -> np.ndarray:
        """See Executor."""
        return self._inner.get(handle)

    def forget(self) -> None:
        """See Executor."""
        self._parameters.clear()
        self._inner.forget()

    def run(
        self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Handle]:
        """See Executor."""
        outputs = self._inner.run(program, inputs, observe, stable=stable)
        self._note(program, inputs, outputs, stable)
        return outputs

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Handle], *, stable: int = 0
    ) -> tuple[list[Handle], Any]:
        """See Executor."""
        outputs, saved = self._inner.forward(forward, backward, inputs, stable=stable)
        self._note(forward, inputs, outputs, stable)
        return outputs, saved

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
        """See Executor; a traced worker takes all outputs and adds for itself."""
        outputs = self._inner.backward(forward, backward, inputs, saved, sums, stable=stable)
        if not sums:
            self._note(backward, inputs, outputs, stable)
        return outputs

    def _note(self, program: Program, inputs: Sequence[Handle], outputs: Sequence[Handle], stable: int) -> None:
        if not self._tracer.watching:
            return
        known = []
        for handle in inputs[:stable]:
            if id(handle) not in self._parameters:
                self._parameters[id(handle)] = handle, _root(self.get(handle))
            known.append(self._parameters[id(handle)][1])
        self._tracer.note(program, list(map(self.get, inputs)), list(map(self.get, outputs)), known=known)


class _Found(Exception):
    """The operator that was asked for has run: the others need not."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class TracedWorker(StageWorker):
    """A worker that answers what it computed; mixed in before any other kind of worker (`traced`)."""

    keeps = 0  # what is watched is made again in any case, and two such workers may share a machine
    tracer: Tracer
    inner: Executor

    def watch(self, scopes: Sequence[str], wanted: str = "") -> None:
        """Note the calls below some places from now on, and keep the arrays of one of them."""
        self.tracer.watch(scopes, wanted)

    def halt(self) -> None:
        """Note nothing more, and keep what was noted."""
        self.tracer.scopes = ()

    def calls(self) -> tuple[bytes, ...]:
        """The encoded calls that were noted, in order."""
        return tuple(encode(call) for call in self.tracer.calls)

    def operators(self) -> tuple[bytes, ...]:
        """`merkle.bytes_root` of every operator's output of the call that was kept."""
        captured = self._captured()
        if captured.made is not None:
            return tuple(map(_root, captured.made))
        found: list[bytes] = []
        self._again(captured, lambda _, array: found.append(_root(array)))
        return tuple(found)

    def value(self, number: int) -> np.ndarray:
        """The array of a value of the call that was kept; IndexError where it has none of that number."""
        captured = self._captured()
        first = len(captured.inputs)
        if number < first:
            return captured.inputs[number]
        if captured.made is not None:
            return captured.made[number - first]

        def observe(operator: int, array: np.ndarray) -> None:
            if operator == number - first:
                raise _Found(array)

        try:
            self._again(captured, observe)
        except _Found as found:
            return found.array.copy()
        raise IndexError(f"value {number} of a call with {first + len(captured.program.ops)}")

    def _captured(self) -> Captured:
        if self.tracer.captured is None:
            raise FailureError(f"no call at {self.tracer.wanted!r} was made; ask for another place")
        return self.tracer.captured

    def _again(self, captured: Captured, observe: Callable[[int, np.ndarray], None]) -> None:
        with at(captured.place):
            self.inner.run(captured.program, list(map(self.inner.put, captured.inputs)), observe)

    # ------------------------------------------------------------------------------------------- sums, by no executor

    def _open_sums(self, names: Sequence[str], bounds: Sequence[int | None]) -> list[np.ndarray]:
        return [] if self.tracer.watching else super()._open_sums(names, bounds)

    def _add(self, names: Sequence[str], gradients: Sequence[np.ndarray]) -> None:
        tensors = [self._index[name] for name in names]
        if not self.tracer.watching or len(set(tensors)) < len(tensors):
            super()._add(names, gradients)
            return
        before = [self._sum(tensor).value.copy() for tensor in tensors]
        super()._add(names, gradients)
        after = [self._sum(tensor).value for tensor in tensors]
        program = additions(tuple(map(len, before)), 2)
        self.tracer.note(program, [*before, *(gradient.reshape(-1) for gradient in gradients)], after, made=after)

    def gradients(self, step: int, shares: Shares, exchange: int) -> tuple[Bundle, ...]:
        """See StageWorker; that what is handed over is what was added up is a call of its own."""
        with at(f"step {step}/gradient"):
            if not self.tracer.watching:
                return super().gradients(step, shares, exchange)
            self._begin(step)
            before = {tensor: total.value.copy() for tensor, total in sorted(self._sums.items())}
            bundles = super().gradients(step, shares, exchange)
            handed = {chunk: total for bundle in bundles for chunk, total in bundle.items()}
            after = [
                np.concatenate([handed[chunk].value for chunk in self._layout.chunks(tensor)])
                for tensor in sorted({chunk.tensor for chunk in handed})
            ]
            program = additions(tuple(map(len, before.values())), 1)
            self.tracer.note(program, list(before.values()), after, made=after)
            return bundles

    def reduce(self, step: int, exchange: int, *bundles: Bundle) -> tuple[int, ChunkRoots]:
        """See StageWorker; each owned chunk's total is a call of its own."""
        result = super().reduce(step, exchange, *bundles)
        for chunk, total in self._totals.items():
            with at(f"step {step}/total/{self._place(chunk)}"):
                if self.tracer.watching:
                    parts = [bundle[chunk] for bundle in bundles if chunk in bundle]
                    self._note_total([part.value for part in parts], self._executor.get(total))
        return result

    def _note_total(self, parts: list[np.ndarray], total: np.ndarray) -> None:
        running = ExactSum(parts[0].copy())
        made = []
        for part in parts[1:]:
            running.add(ExactSum(part))
            made.append(running.value.copy())
        made[-1:] = [total]
        self.tracer.note(additions((len(total),), len(parts)), parts, [total], made=made)


def traced(kind: type[StageWorker]) -> type[TracedWorker]:
    """A worker of some kind that answers what it computed."""
    return type(f"Traced{kind.__name__}", (TracedWorker, kind), {})


def traced_builder(
    make: Callable[[int], Executor], kind: type[StageWorker] = StageWorker
) -> Callable[[bytes], TracedWorker]:
    """A function that builds a traced worker from its encoded WorkerConfig, with an executor for its thread count."""

    def build(config: bytes) -> TracedWorker:
        tracer, made = Tracer(), []

        def executor(threads: int) -> Executor:
            made.append(make(threads))
            return TracingExecutor(made[0], tracer)

        worker = worker_builder(executor, traced(kind))(config)
        assert isinstance(worker, TracedWorker)
        worker.tracer, worker.inner = tracer, made[0]
        return worker

    return build


@lru_cache(maxsize=256)
def additions(lengths: tuple[int, ...], parts: int) -> Program:
    """The Program that adds `parts` flat i64 arrays of each length, in order; one part is passed on as it is.

    Inputs are the first part of each, then the second of each; outputs the sums.
    """
    inputs = tuple(
        (f"part {part}, {n}", Type("i64", (size,))) for part in range(parts) for n, size in enumerate(lengths)
    )
    ops: list[Op] = []
    outputs = []
    for n, size in enumerate(lengths):
        last = n
        for part in range(1, max(parts, 2)):
            operands = (last, part * len(lengths) + n) if parts > 1 else (last,)
            name, attributes = ("add", {}) if parts > 1 else ("reshape", {"shape": (size,)})
            last = len(inputs) + len(ops)
            ops.append(
                Op(name=name, inputs=operands, attributes=attributes, type=Type("i64", (size,)), label="gradient sum")
            )
        outputs.append(last)
    return Program(inputs=inputs, ops=tuple(ops), outputs=tuple(outputs))


def _root(array: np.ndarray) -> bytes:
    return merkle.bytes_root(np.asarray(array, order="C").data)
