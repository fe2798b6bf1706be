"""Soaks: honest cores agree, and whatever one core computes otherwise is found, located and counted."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from runtime.executors import compiled, reference
from runtime.faults import Fault
from runtime.program.builder import Builder
from runtime.program.executor import Handle, Observer
from runtime.program.program import Program
from runtime.program.reference import ReferenceExecutor
from runtime.testing import tiny_job
from storage.errors import FailureError
from storage.store import memory_store
from verification import selfcheck
from verification.selfcheck import (
    PATTERNS,
    REPEATS,
    Bench,
    LocalCore,
    Mismatch,
    ProcessCore,
    RunPrograms,
    Soaked,
    Units,
    Vectors,
    Work,
    Workload,
    soak,
)


def _toy() -> tuple[Program, Program]:
    first, second = Builder(), Builder()
    x = first.input("x", "f32", 6, 8)
    square = x * x
    y = second.input("y", "f32", 6, 8)
    return first.finish([square + 1.0, square]), second.finish([(y * 2.0).rint("i64").sum(1)])


SQUARE, SUM = _toy()


class Toy:
    """Two units, the second of what the first gives."""

    chained = True

    def units(self, pattern: int) -> Units:
        x = np.arange(48, dtype=np.float32).reshape(6, 8) + np.float32(pattern)
        y, _ = yield Work(name="square", program=SQUARE, inputs=(x,))
        yield Work(name="sum", program=SUM, inputs=(y,))

    def known(self, pattern: int) -> None:
        return None


class Flaky(ReferenceExecutor):
    """Flips a bit in one operator's output in the runs of a Program that `when` says, counted from 0."""

    def __init__(self, program: Program, fault: Fault, when: Callable[[int], bool]) -> None:
        super().__init__()
        self._program, self._fault, self._when, self._count = program, fault, when, 0

    def run(
        self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Handle]:
        if program.root != self._program.root:
            return super().run(program, inputs, observe)
        self._count += 1
        if not self._when(self._count - 1):
            return super().run(program, inputs, observe)

        def alter(number: int, array: np.ndarray) -> np.ndarray | None:
            changed = self._fault.alter(array) if number == self._fault.operator else None
            if observe is not None:
                observe(number, array if changed is None else changed)
            return changed

        return super().run(program, inputs, alter)


def local(*executors: ReferenceExecutor, workload: Workload | None = None, memory: int = 1) -> list[LocalCore]:
    return [LocalCore(n, Bench(workload or Toy(), executor, memory)) for n, executor in enumerate(executors)]


def soaked(cores: Sequence[selfcheck.Core], rounds: int = 3, workload: Workload | None = None) -> Soaked:
    told: list[Mismatch] = []
    state = soak(cores, workload or Toy(), memory=1, more=lambda state: state.rounds < rounds, record=told.append)
    assert tuple(told) == state.mismatches
    return state


MULTIPLY = next(number for number, op in enumerate(SQUARE.ops) if op.name == "mul")
ADD = next(number for number, op in enumerate(SQUARE.ops) if op.name == "add")
FLIP = Fault(kind="flip", step=0, operator=MULTIPLY, element=13, bit=22)


# ------------------------------------------------------------------------------------------------------------- honest


def test_honest_cores_agree_in_processes_of_their_own() -> None:
    workload = Vectors()
    numbers = (selfcheck.host_cores() * 2)[:2]
    cores = [ProcessCore(number, workload, reference, 1) for number in numbers]
    try:
        for core in cores:
            core.ready()
        state = soaked(cores, rounds=2, workload=workload)
    finally:
        for core in cores:
            core.stop()
            core.stop()
    assert (state.rounds, state.mismatches, state.reason) == (2, (), "")
    assert state.units == sum(2 * len(Bench(workload, reference(1), 0).round(n, None)) for n in range(2))
    assert len(state.patterns) == 2


def test_patterns_are_functions_of_the_seed_on_every_executor() -> None:
    job = tiny_job(memory_store())
    workload = RunPrograms.of(job.program, job.feed)
    first, second = Bench(workload, reference(1), 1), Bench(workload, compiled(1), 1)
    rounds = [first.round(pattern, None) for pattern in range(PATTERNS)]
    assert [second.round(pattern, None) for pattern in range(PATTERNS)] == rounds
    names = [work.name for work, _, _ in first._walk(0)]
    for name, *digests in zip(names, *rounds, strict=True):
        if not name.startswith(("initial", "exponent")):  # norms begin at one; exponents are few
            assert len(set(digests)) == PATTERNS, name
    for name in ("block 0, forward", "block 1, forward", "loss", "block 3, backward", "block 1, backward", "memory"):
        assert name in names
    assert any(name.startswith("update ") for name in names)


def test_vectors_are_held_against_their_known_answers() -> None:
    workload = Vectors()
    assert workload.known(1) is None
    known = workload.known(0)
    assert known is not None
    assert Bench(workload, reference(1), 0).round(0, known)[: len(known)] == known
    vector = next(one for one in selfcheck.vectors.load() if one.name == "sigmoid")
    wrong = Flaky(vector.program, dataclasses.replace(FLIP, operator=len(vector.program.ops) - 1), lambda _: True)
    state = soaked(local(wrong, workload=workload), rounds=1, workload=workload)
    (found,) = state.mismatches
    assert (found.core, found.unit, found.pattern, found.repeated) == (0, "sigmoid", 0, REPEATS)


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_fault_that_repeats_is_located_at_its_operator_and_element() -> None:
    state = soaked(local(reference(1), Flaky(SQUARE, FLIP, lambda count: count >= 1)))
    first = state.mismatches[0]
    assert (first.core, first.round, first.unit, first.program) == (1, 1, "square", SQUARE.root.hex())
    assert (first.seen, first.operator, first.number, first.index) == ("operator", "mul", MULTIPLY, (1, 5))
    value = np.float32(13 + 1) ** 2
    assert first.expected == (value, f"0x{value.view(np.uint32):08x}")
    assert first.actual is not None
    assert int(first.actual[1], 16) ^ int(first.expected[1], 16) == 1 << 22
    assert (first.repeated, first.repeats) == (REPEATS, REPEATS)
    assert [one.core for one in state.mismatches] == [1, 1]


def test_a_transient_fault_is_located_at_the_output_that_it_left() -> None:
    fault = dataclasses.replace(FLIP, operator=ADD)
    state = soaked(local(reference(1), reference(1), Flaky(SQUARE, fault, lambda count: count == 1)))
    (found,) = state.mismatches
    assert (found.core, found.round, found.seen, found.repeated) == (2, 1, "output", 0)
    assert (found.operator, found.number, found.index) == ("add", ADD, (1, 5))
    assert found.expected is not None
    assert found.actual is not None
    assert int(found.actual[1], 16) ^ int(found.expected[1], 16) == 1 << 22


def test_a_fault_that_comes_and_goes_says_how_often_it_came() -> None:
    (found, *_) = soaked(local(reference(1), Flaky(SQUARE, FLIP, lambda count: count % 3 == 1))).mismatches
    assert 0 < found.repeated < REPEATS
    assert (found.seen, found.operator, found.index) == ("operator", "mul", (1, 5))


def test_a_wrong_first_pass_is_the_first_cores() -> None:
    state = soaked(local(Flaky(SQUARE, FLIP, lambda count: count == 0), reference(1)), rounds=PATTERNS + 1)
    (found,) = state.mismatches
    assert (found.core, found.seen, found.round) == (0, "first pass", 0)
    assert "the first pass of this pattern was wrong" in found.reason


def test_memory_that_loses_a_bit_is_located() -> None:
    class Losing(ReferenceExecutor):
        def run(
            self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None, *, stable: int = 0
        ) -> list[Handle]:
            if program.root == SUM.root:
                cores[1]._bench._buffer[0, 5] ^= np.uint64(1 << 40)
            return super().run(program, inputs, observe)

    cores = local(reference(1), Losing())
    (found, *_) = soaked(cores, rounds=1).mismatches
    assert (found.unit, found.operator, found.seen, found.index) == ("memory", "memory", "input", (0, 5))
    assert found.expected is not None
    assert found.actual is not None
    assert int(found.actual[1], 16) ^ int(found.expected[1], 16) == 1 << 40
    assert found.repeated == REPEATS


def test_an_operand_that_changed_in_memory_is_no_operators_fault() -> None:
    class Spoiled(Toy):
        def units(self, pattern: int) -> Units:
            x = np.full((6, 8), 3, np.float32)
            y, _ = yield Work(name="square", program=SQUARE, inputs=(x,))
            y[2, 3] += 1
            yield Work(name="sum", program=SUM, inputs=(y,))

    class Good(Spoiled):
        def units(self, pattern: int) -> Units:
            y = np.full((6, 8), 10, np.float32)
            yield Work(name="square", program=SQUARE, inputs=(np.full((6, 8), 3, np.float32),))
            yield Work(name="sum", program=SUM, inputs=(y,))

    cores = [LocalCore(0, Bench(Good(), reference(1), 1)), LocalCore(1, Bench(Spoiled(), reference(1), 1))]
    (found,) = soaked(cores, rounds=1, workload=Good()).mismatches
    assert (found.core, found.seen, found.operator, found.label, found.index) == (1, "input", "input", "y", (2, 3))


# ------------------------------------------------------------------------------------------------------ out of service


def test_a_process_that_is_killed_ends_the_soak_and_accuses_nobody() -> None:
    core = ProcessCore(selfcheck.host_cores()[0], Toy(), reference, 1)
    try:
        core.ready()
        state = soak(
            [core],
            Toy(),
            memory=1,
            more=lambda _: True,
            observe=lambda _: os.kill(core._process.pid or 0, signal.SIGKILL),
        )
    finally:
        core.stop()
    assert (state.rounds, state.mismatches) == (1, ())
    assert "its process ended by SIGKILL; killed for memory?" in state.reason


def refused(_threads: int) -> ReferenceExecutor:
    raise FailureError("no such device")


def exhausted(_threads: int) -> ReferenceExecutor:
    raise MemoryError


@pytest.mark.parametrize(("make", "reason"), [(refused, "no such device"), (exhausted, "out of memory")])
def test_a_core_that_cannot_start_says_why(make: Callable[[int], ReferenceExecutor], reason: str) -> None:
    pipe, other = multiprocessing.Pipe()
    affinity = os.sched_getaffinity(0)
    try:
        selfcheck._serve(other, min(affinity), Toy(), make, 1)
    finally:
        os.sched_setaffinity(0, affinity)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert pipe.poll()
    kind, told = pipe.recv()
    assert (kind, told[: len(reason)]) == ("failed", reason)
    pipe.close()
    other.close()
