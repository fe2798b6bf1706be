"""Traces: what a step's calls, operators and values were, asked of whoever can say.

A `TraceProvider` answers for the workers of one run. The verifier's own answers come from a replay (`ReplayedTraces`);
the accused worker's from the machine that trained (`Witness`), which signs them; `RecordedTraces` keeps answers and
gives them again. Whatever a provider says is checked against what was committed or said before, so a false answer is a
contradiction, and never more than that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtime.transition import StateView, forward_backward, restore
from storage import kernels, merkle
from storage.codec import U64, Address, Digest, record
from storage.errors import FailureError
from storage.identity import Identity, sign
from storage.records import Receipt, TensorEntry
from storage.tensors import entry_for
from verification.replay import Replay

REVEAL_DOMAIN = b"trueweight-reveal-v1\0"


@record(kind=140)
class Reveal:
    """A worker's signed answer to a question about one step; `answer` is the list root of what it said."""

    run: Digest
    step: U64
    worker: str
    address: Address
    question: str
    answer: Digest
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Items in order, and the reveal that signs their root; None from who answers for himself alone."""

    items: tuple[bytes, ...]
    reveal: Reveal | None = None


class TraceProvider(Protocol):
    """Answers for the workers of one run about one step. FailureError where it will not or cannot."""

    def claims(self) -> Mapping[str, Receipt]:
        """What each worker says, once more, that it did in the step: receipts without signatures."""

    def calls(self, worker: str, scope: str) -> Answer:
        """The encoded calls of a worker at places below `scope` ("" for all), in order."""

    def operators(self, worker: str, place: str) -> Answer:
        """The digest of every operator's output of one call, in order."""

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """The leaf hashes of one value of a call."""

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """The bytes of one leaf of it."""


class ReplayedTraces:
    """What a replay gives. `replay` has traced workers and holds the state before `step`."""

    def __init__(self, replay: Replay, run: bytes, step: int) -> None:
        self._replay, self._run, self._step = replay, run, step
        self._before = {name: np.array(array) for name, array in StateView(replay.crew).items()}
        self._moved = False
        self._kept: tuple[str, str] = ("", "")
        self._claims: Mapping[str, Receipt] | None = None
        self._values: dict[tuple[str, str, int], np.ndarray] = {}

    def claims(self) -> Mapping[str, Receipt]:
        """See TraceProvider."""
        if self._claims is None:
            self._whole_step()
            self._claims = self._replay.claims(self._run, self._step)
        return self._claims

    def calls(self, worker: str, scope: str) -> Answer:
        """See TraceProvider."""
        self._make(worker, scope)
        return Answer(items=self._ask(worker, "calls"))

    def operators(self, worker: str, place: str) -> Answer:
        """See TraceProvider."""
        self._keep(worker, place)
        return Answer(items=self._ask(worker, "operators"))

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """See TraceProvider."""
        hashes = kernels.leaf_hashes(self._value(worker, place, value).data)
        return tuple(hashes[at : at + merkle.DIGEST_BYTES] for at in range(0, len(hashes), merkle.DIGEST_BYTES))

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """See TraceProvider."""
        data = self._value(worker, place, value).reshape(-1).view(np.uint8)
        return data[number * merkle.LEAF_BYTES : (number + 1) * merkle.LEAF_BYTES].tobytes()

    def state(self) -> list[TensorEntry]:
        """The entries of the state before the step, by name."""
        return [entry_for(name, self._before[name]) for name in sorted(self._before)]

    def _value(self, worker: str, place: str, value: int) -> np.ndarray:
        key = worker, place, value
        if key not in self._values:
            self._keep(worker, place)
            array = np.asarray(self._ask(worker, "value", value), order="C")
            self._values = {key: array}  # one at a time: they are large
        return self._values[key]

    def _keep(self, worker: str, place: str) -> None:
        """Have the worker keep the arrays of a call."""
        if self._kept != (worker, place):
            self._make(worker, place, place)
            self._kept = worker, place

    def _ask(self, worker: str, method: str, *arguments: Any) -> Any:
        group = self._replay.crew.group
        return group.get([group.call(worker, method, *arguments)])[0]

    def _make(self, worker: str, scope: str, wanted: str = "") -> None:
        """Go through what the scope needs, one micro-batch or the whole step, with the worker watched."""
        self._kept = ("", "")
        adding = wanted.endswith("/sum")  # what it adds is given out only where backward is watched too
        watched = wanted.removesuffix("sum") if adding else scope
        self._ask(worker, "watch", (f"step {self._step}/{watched}",), f"step {self._step}/{wanted}" if wanted else "")
        unit, _, _ = scope.partition("/")
        if unit.startswith("micro-batch ") and not adding:
            self._restore()
            batch = self._replay.feed.batch(self._step)
            forward_backward(self._replay.crew, self._step, batch, [int(unit.removeprefix("micro-batch "))])
            self._replay.crew.gather("drop")
        else:
            self._whole_step()
        self._ask(worker, "halt")

    def _whole_step(self) -> None:
        self._restore()
        self._moved = True
        self._replay.step(self._step)

    def _restore(self) -> None:
        if self._moved:
            restore(self._replay.crew, self._before)
            self._moved = False


class Witness:
    """Another provider's answers, signed by the workers' keys: the machine that trained, asked to reveal."""

    def __init__(self, traces: TraceProvider, identities: Mapping[str, Identity], run: bytes, step: int) -> None:
        self._traces, self._identities, self._run, self._step = traces, identities, run, step

    def claims(self) -> Mapping[str, Receipt]:
        """See TraceProvider."""
        return self._traces.claims()

    def calls(self, worker: str, scope: str) -> Answer:
        """See TraceProvider."""
        return self._signed(worker, f"calls {scope}", self._traces.calls(worker, scope).items)

    def operators(self, worker: str, place: str) -> Answer:
        """See TraceProvider."""
        return self._signed(worker, f"operators {place}", self._traces.operators(worker, place).items)

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """See TraceProvider."""
        return self._traces.leaves(worker, place, value)

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """See TraceProvider."""
        return self._traces.leaf(worker, place, value, number)

    def _signed(self, worker: str, question: str, items: tuple[bytes, ...]) -> Answer:
        identity = self._identities.get(worker)
        if identity is None:
            raise FailureError(f"worker {worker}: its key is not here; ask on the host that trained")
        reveal = Reveal(
            run=self._run,
            step=self._step,
            worker=worker,
            address=identity.address,
            question=question,
            answer=merkle.list_root(items),
            signature=b"",
        )
        return Answer(items=items, reveal=sign(identity, REVEAL_DOMAIN, reveal))


class RecordedTraces:
    """Answers of another provider, kept by question; those that are known are given again without asking it."""

    def __init__(self, traces: TraceProvider | None = None) -> None:
        self._traces = traces
        self.answers: dict[tuple[Any, ...], Any] = {}

    def claims(self) -> Mapping[str, Receipt]:
        """See TraceProvider."""
        known: Mapping[str, Receipt] = self._known("claims")
        return known

    def calls(self, worker: str, scope: str) -> Answer:
        """See TraceProvider."""
        known: Answer = self._known("calls", worker, scope)
        return known

    def operators(self, worker: str, place: str) -> Answer:
        """See TraceProvider."""
        known: Answer = self._known("operators", worker, place)
        return known

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """See TraceProvider."""
        known: tuple[bytes, ...] = self._known("leaves", worker, place, value)
        return known

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """See TraceProvider."""
        known: bytes = self._known("leaf", worker, place, value, number)
        return known

    def _known(self, method: str, *question: Any) -> Any:
        key = method, *question
        if key not in self.answers:
            if self._traces is None:
                raise FailureError(f"{' '.join(map(str, key))}: no such answer was recorded; ask the worker")
            self.answers[key] = getattr(self._traces, method)(*question)
        return self.answers[key]
