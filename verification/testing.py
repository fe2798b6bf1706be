"""What tests of traces share: a toy `TraceProvider`, and the suite that every one passes."""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.program.program import Program
from runtime.program.reference import ReferenceExecutor
from runtime.program.types import NUMPY
from runtime.tracing import Call
from storage import merkle
from storage.codec import decode, encode
from storage.errors import FailureError
from storage.records import Receipt
from verification.traces import Answer, TraceProvider

Made = tuple[str, Program, Sequence[np.ndarray]]
"""A call: its place below the step, what was applied, and to what."""


class ToyTraces:
    """Answers about calls that never were part of a training: each is made when it is asked about, by the reference."""

    def __init__(self, step: int, made: Mapping[str, Sequence[Made]], claims: Mapping[str, Receipt]) -> None:
        self._step, self._made, self._claims = step, made, claims

    def claims(self) -> Mapping[str, Receipt]:
        """See TraceProvider."""
        return self._claims

    def calls(self, worker: str, scope: str) -> Answer:
        """See TraceProvider."""
        return Answer(items=tuple(encode(self._call(*made)) for made in self._below(worker, scope)))

    def operators(self, worker: str, place: str) -> Answer:
        """See TraceProvider."""
        program, values = self._values(worker, place)
        return Answer(items=tuple(map(_root, values[len(program.inputs) :])))

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """See TraceProvider."""
        data = self._values(worker, place)[1][value].tobytes()
        starts = range(0, max(len(data), 1), merkle.LEAF_BYTES)
        return tuple(merkle.leaf_hash(data[start : start + merkle.LEAF_BYTES]) for start in starts)

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """See TraceProvider."""
        data = self._values(worker, place)[1][value].tobytes()
        return data[number * merkle.LEAF_BYTES : (number + 1) * merkle.LEAF_BYTES]

    def _below(self, worker: str, scope: str) -> list[Made]:
        return [made for made in self._made.get(worker, ()) if made[0].startswith(scope)]

    def _call(self, place: str, program: Program, inputs: Sequence[np.ndarray]) -> Call:
        values = _run(program, inputs)
        return Call(
            place=f"step {self._step}/{place}",
            program=program.root,
            inputs=tuple(map(_root, inputs)),
            outputs=tuple(_root(values[output]) for output in program.outputs),
        )

    def _values(self, worker: str, place: str) -> tuple[Program, list[np.ndarray]]:
        for at, program, inputs in self._below(worker, place):
            if at == place:
                return program, _run(program, inputs)
        raise FailureError(f"no call at {place!r} was made; ask for another place")


def _run(program: Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """All values of a program, by number."""
    executor, values = ReferenceExecutor("cpu"), list(inputs)
    executor.run(program, [executor.put(array) for array in inputs], lambda _, array: values.append(array.copy()))
    return values


def _root(array: np.ndarray) -> bytes:
    return merkle.bytes_root(np.asarray(array, order="C").data)


def check_traces(
    traces: TraceProvider, *, workers: Sequence[str], worker: str, place: str, program: Program, step: int
) -> list[Answer]:
    """The answers that may be signed about one right call of a worker, once it is seen that all of them fit together.

    The program applied to the inputs that the leaves give makes every digest that is told. AssertionError where it does
    not, or where a call is answered for that was not made; FailureError where there is no answer.
    """
    assert sorted(traces.claims()) == sorted(workers)

    def value(number: int) -> np.ndarray:
        leaves = traces.leaves(worker, place, number)
        data = [traces.leaf(worker, place, number, leaf) for leaf in range(len(leaves))]
        assert [merkle.leaf_hash(leaf) for leaf in data] == list(leaves)
        kind = program.types[number]
        return np.frombuffer(b"".join(data), NUMPY[kind.dtype]).reshape(kind.shape)

    inputs = [value(number) for number in range(len(program.inputs))]
    values = _run(program, inputs)
    calls = traces.calls(worker, f"{place.partition('/')[0]}/")
    call = next(one for one in (decode(Call, item) for item in calls.items) if one.place == f"step {step}/{place}")
    assert (call.program, list(call.inputs)) == (program.root, list(map(_root, inputs)))
    assert list(call.outputs) == [_root(values[output]) for output in program.outputs]
    operators = traces.operators(worker, place)
    assert list(operators.items) == list(map(_root, values[len(inputs) :]))
    assert value(len(values) - 1).tobytes() == values[-1].tobytes()
    try:
        traces.operators(worker, f"{place} of nobody")
    except (FailureError, KeyError, ValueError):
        return [calls, operators]
    raise AssertionError("an answer about a call that was not made")
