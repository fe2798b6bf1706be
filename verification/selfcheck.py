"""Selfcheck: the same work again and again on every core of a host, every result compared to the byte.

The work is a run's own Programs (each distinct block forward and backward, loss, update) or, without a run, the
known-answer vectors. Operands come in `PATTERNS` patterns, functions of a seed, and so do the bytes of a stretch of
memory. The first pass of a pattern is what later rounds, on every core, are held against; who is right where they
differ, and which operator and element it was, the reference executor in the parent process says.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from runtime.executors import Make, reference
from runtime.feed import Batch, Feed
from runtime.program import vectors
from runtime.program.executor import ArithmeticFault, Executor
from runtime.program.program import Program
from runtime.program.training import TrainingProgram, chunk_lengths, rng_input
from storage import merkle
from storage.errors import FailureError
from verification.compare import first_element

PATTERNS = 8
REPEATS = 8
"""How often a unit that came out wrong is run again."""
OPERANDS = 8
"""How often a pattern draws operands for the vectors' blocks, which are small."""
MEMORY = "memory"
_BLOCK = 1 << 20


# ----------------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True, kw_only=True)
class Work:
    """One unit: a Program on operands. Without a Program it is memory, which must still hold what was written."""

    name: str
    program: Program | None
    inputs: tuple[np.ndarray, ...]


Units = Generator[Work, list[np.ndarray], None]


class Workload(Protocol):
    """What is repeated. `chained` says whether units take what earlier ones gave: a fault ends the round then."""

    chained: bool

    def units(self, pattern: int) -> Units:
        """The units of one pattern of operands, in order; what each gives is sent back."""

    def known(self, pattern: int) -> tuple[bytes, ...] | None:
        """The digests of what the units must give, where that is known beforehand."""


class Vectors:
    """The known-answer vectors; patterns but the first are the whole blocks among them on other operands."""

    chained = False

    def units(self, pattern: int) -> Units:
        """See Workload."""
        if pattern == 0:
            for vector in self._vectors:
                yield Work(name=vector.name, program=vector.program, inputs=vector.inputs)
            return
        for draw in range(OPERANDS):
            for vector in self._blocks:
                inputs = _operands(vector.program, 1000 * pattern + 100 * draw)
                yield Work(name=vector.name, program=vector.program, inputs=inputs)

    def known(self, pattern: int) -> tuple[bytes, ...] | None:
        """See Workload."""
        return None if pattern else tuple(_digest(one.outputs, one.fault) for one in self._vectors)

    @cached_property
    def _vectors(self) -> list[vectors.Vector]:
        return vectors.load()

    @cached_property
    def _blocks(self) -> list[vectors.Vector]:
        return vectors.load(vectors.BLOCKS)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vectors, ()


def _operands(program: Program, stream: int) -> tuple[np.ndarray, ...]:
    """Numbers of the order of 1 for a block's Program, and another place of its randomness."""
    return tuple(
        np.array([stream, 0, stream, 1, 2, 0], np.int64)
        if name == "rng"
        else vectors.floats(stream + place, 2 * kind.elements + 64)[65::2].reshape(kind.shape)
        for place, (name, kind) in enumerate(program.inputs)
    )


class RunPrograms:
    """A run's Programs: initial weights of another seed a pattern, a batch of its data forward, backward, the update.

    A block that occurs many times is run once: its Programs are the same.
    """

    chained = True

    def __init__(self, program: TrainingProgram, seed: int, batches: Sequence[Batch], steps: int) -> None:
        self._program, self._seed, self._batches, self._steps = program, seed, tuple(batches), steps

    @classmethod
    def of(cls, program: TrainingProgram, feed: Feed) -> "RunPrograms":
        """With micro-batches of the run's own data, one a pattern."""
        count = program.micro_batches
        batches = [feed.batch(n // count % feed.steps).micro_batch(n % count, count) for n in range(PATTERNS)]
        return cls(program, feed.recipe.seed, batches, feed.steps)

    def known(self, _pattern: int) -> None:
        """See Workload."""
        return

    def units(self, pattern: int) -> Units:
        """See Workload."""
        program, batch = self._program, self._batches[pattern]
        kinds = [block.kind for block in program.blocks]
        first, last = {k: kinds.index(k) for k in kinds}, {k: block for block, k in enumerate(kinds)}
        tensors = {k: program.blocks[block].tensors for k, block in first.items()}
        weights: dict[str, np.ndarray] = {}
        for number, spec in enumerate(program.tensors):
            if any(spec.name in names for names in tensors.values()):
                parts: list[np.ndarray] = []
                for length in chunk_lengths(int(np.prod(spec.shape, dtype=np.int64))):
                    rng = self._rng(pattern, number, sum(map(len, parts)))
                    parts += yield from _one(f"initial {spec.name}", program.init_program(number, length), rng)
                weights[spec.name] = np.concatenate(parts).reshape(spec.shape)
        taken: dict[int, list[np.ndarray]] = {}
        made: dict[int, np.ndarray] = {}
        for k, block in first.items():
            x = made[kinds[block - 1]] if block else batch.inputs
            taken[k] = [*(weights[name] for name in tensors[k]), x, self._rng(pattern, block, 0)]
            (made[k],) = yield from _one(f"block {block}, forward", program.kinds[k].forward, *taken[k])
        _, loss = yield from _one("loss", program.loss, made[kinds[-1]], batch.targets)
        back: dict[int, np.ndarray] = {}
        gradients: dict[str, np.ndarray] = {}
        for k, block in sorted(last.items(), key=lambda item: -item[1]):
            dy = back[kinds[block + 1]] if block + 1 < len(kinds) else loss
            results = yield from _one(f"block {first[k]}, backward", program.kinds[k].backward, *taken[k], dy)
            gradients |= dict(zip(tensors[k], results[len(results) - len(tensors[k]) :], strict=True))
            back[k] = results[0]
        yield from self._updates(pattern, weights, gradients)

    def _updates(self, pattern: int, weights: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> Units:
        """The first chunk of a tensor through norm and update, once for each update Program."""
        program, seen = self._program, set()
        for number, spec in enumerate(program.tensors):
            if spec.name not in weights or spec.update[0].program in seen:
                continue
            seen.add(spec.update[0].program)
            length = next(chunk_lengths(weights[spec.name].size))
            weight, total = (values[spec.name].reshape(-1)[:length] for values in (weights, gradients))
            slots = [np.abs(weight) * np.float32(2**-10) for _ in program.slots]
            (exponent,) = yield from _one(f"exponent {spec.name}", program.exponent_program(length), total)
            (square,) = yield from _one(f"square {spec.name}", program.square_program(length), total, exponent)
            step = np.array(pattern % self._steps, np.int64)
            update = program.update_program(number, length)
            yield from _one(f"update {spec.name}", update, weight, *slots, total, square, exponent, step)

    def _rng(self, pattern: int, place: int, offset: int) -> np.ndarray:
        return rng_input(self._seed + pattern, step=pattern, micro_batch=0, place=place, offset=offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return _programs, (self._program.encode(), self._seed, self._batches, self._steps)


def _programs(program: bytes, seed: int, batches: Sequence[Batch], steps: int) -> RunPrograms:
    return RunPrograms(TrainingProgram.decode(program), seed, batches, steps)


def _one(name: str, program: Program, *inputs: np.ndarray) -> Generator[Work, list[np.ndarray], list[np.ndarray]]:
    return (yield Work(name=name, program=program, inputs=inputs))


# ---------------------------------------------------------------------------------------------------------- one core


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the reference executor says of one unit: digests of its operands, its operators, what it gives, of all."""

    inputs: tuple[bytes, ...]
    operators: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a core left a trace: `input`, `operator` or `output` number so-and-so, with what it has there.

    `operator` was seen when the unit was run again with traces, `output` only in what was wrong at first. `repeated` of
    `REPEATS` runs came out wrong again.
    """

    seen: str
    number: int
    array: np.ndarray | None
    repeated: int


class Bench:
    """A workload on an executor, with a stretch of memory of so many MiB that is written before and read after it."""

    def __init__(self, workload: Workload, executor: Executor, memory: int) -> None:
        self._workload, self._executor = workload, executor
        self._buffer = np.empty((memory, _BLOCK // 8), np.uint64)
        self._kept: tuple[Work, list[np.ndarray], bytes] | None = None

    def round(self, pattern: int, expected: Sequence[bytes] | None) -> tuple[bytes, ...]:
        """The digest of what each unit gives, up to the first that is not the expected one."""
        self._kept = None
        digests: list[bytes] = []
        for work, made, digest in self._walk(pattern):
            digests.append(digest)
            if expected is not None and digests[-1:] != list(expected[len(digests) - 1 : len(digests)]):
                self._kept = work, made, expected[len(digests) - 1] if len(digests) <= len(expected) else b""
                break
        return tuple(digests)

    def locate(self, trace: Trace) -> Located:
        """Where the unit that ended the last round left the trace, and how often it comes out wrong again."""
        assert self._kept is not None, "nothing came out wrong"
        work, made, _ = self._kept
        repeated, found = 0, None
        for _ in range(REPEATS):  # in turns: what comes and goes may be gone when it is looked for
            repeated += self._run(work)[1] != trace.digest
            found = found or self._traced(work, trace.operators)
        for number, (array, root) in enumerate(zip(work.inputs, trace.inputs, strict=True)):
            if _root(array) != root:
                return Located(seen="input", number=number, array=array, repeated=repeated)
        if found is not None:
            return Located(seen="operator", number=found[0], array=found[1], repeated=repeated)
        for number, (array, root) in enumerate(zip(made, trace.outputs, strict=False)):
            if _root(array) != root:
                return Located(seen="output", number=number, array=array, repeated=repeated)
        return Located(seen="fault", number=0, array=None, repeated=repeated)

    def trace(self, pattern: int, unit: int) -> Trace:
        """The trace of one unit of a pattern, once those before it have been gone through."""
        found = next(islice(self._walk(pattern), unit, None), None)
        if found is None:
            raise FailureError(
                f"pattern {pattern}: expected at least {unit + 1} units, the reference executor has less"
            )
        self._kept = work, made, digest = found
        operators: list[bytes] = []
        self._observed(work, lambda _, array: operators.append(_root(array)))
        return Trace(
            inputs=tuple(map(_root, work.inputs)),
            operators=tuple(operators),
            outputs=tuple(map(_root, made)),
            digest=digest,
        )

    def value(self, seen: str, number: int) -> tuple[Work, np.ndarray]:
        """The unit that was traced, and the array of one of its inputs, operators or outputs."""
        assert self._kept is not None, "nothing was traced"
        work, made, _ = self._kept
        if seen != "operator":
            return work, (work.inputs if seen == "input" else made)[number]
        found: list[np.ndarray] = []
        self._observed(work, lambda at, array: found.append(array.copy()) if at == number else None)
        return work, found[0]

    def _walk(self, pattern: int) -> Iterator[tuple[Work, list[np.ndarray], bytes]]:
        """(unit, what it gives, its digest) in order, the memory last."""
        _fill(self._buffer, pattern)
        units = self._workload.units(pattern)
        work = next(units)
        while True:
            made, digest, ended = self._made(work)
            yield work, made, digest
            if ended and self._workload.chained:
                break
            try:
                work = units.send(made)
            except StopIteration:
                break
        memory = Work(name=MEMORY, program=None, inputs=(self._buffer,))
        yield memory, *self._run(memory)

    def _run(self, work: Work) -> tuple[list[np.ndarray], bytes]:
        made, digest, _ = self._made(work)
        return made, digest

    def _made(self, work: Work) -> tuple[list[np.ndarray], bytes, bool]:
        """(what a unit gives, its digest, whether the arithmetic refused a value)."""
        if work.program is None:
            return [], _digest(work.inputs, None), False
        try:
            handles = self._executor.run(work.program, list(map(self._executor.put, work.inputs)))
            made = list(map(self._executor.get, handles))
        except ArithmeticFault as fault:
            return [], _digest((), fault.element), True
        return made, _digest(made, None), False

    def _traced(self, work: Work, expected: Sequence[bytes]) -> tuple[int, np.ndarray] | None:
        """The first operator whose output is not the expected one, run again with traces."""
        found: list[tuple[int, np.ndarray]] = []

        def observe(number: int, array: np.ndarray) -> None:
            if not found and (number >= len(expected) or _root(array) != expected[number]):
                found.append((number, array.copy()))

        self._observed(work, observe)
        return found[0] if found else None

    def _observed(self, work: Work, observe: Callable[[int, np.ndarray], None]) -> None:
        if work.program is not None:
            try:
                self._executor.run(work.program, list(map(self._executor.put, work.inputs)), observe)
            except ArithmeticFault:
                return


def _fill(buffer: np.ndarray, pattern: int) -> None:
    """Write the pattern: a MiB of random words, each time it is repeated with other bits turned over."""
    block = np.random.Generator(np.random.Philox(pattern)).integers(0, 2**64, _BLOCK // 8, np.uint64)
    for number, row in enumerate(buffer):
        np.bitwise_xor(block, np.uint64((number * 0x9E3779B97F4A7C15) & (2**64 - 1)), out=row)


def _digest(made: Sequence[np.ndarray], fault: int | None) -> bytes:
    if fault is not None:
        return merkle.leaf_hash(f"a fault at element {fault}".encode())
    return merkle.list_root(list(map(_root, made)))


def _root(array: np.ndarray) -> bytes:
    return merkle.bytes_root(np.asarray(array, order="C").data)


class Core(Protocol):
    """One core of the host at work. FailureError naming the core where it can go on no more."""

    number: int

    def start(self, pattern: int, expected: Sequence[bytes] | None) -> None:
        """Begin a round; see `Bench.round`."""

    def finish(self) -> tuple[bytes, ...]:
        """What the round gave."""

    def locate(self, trace: Trace) -> Located:
        """See `Bench.locate`."""

    def stop(self) -> None:
        """End it; harmless when repeated."""


class LocalCore:
    """A core that is this process: the toy, and what a process of its own runs."""

    def __init__(self, number: int, bench: Bench) -> None:
        self.number, self._bench = number, bench
        self._digests: tuple[bytes, ...] = ()

    def start(self, pattern: int, expected: Sequence[bytes] | None) -> None:
        """See Core."""
        self._digests = self._bench.round(pattern, expected)

    def finish(self) -> tuple[bytes, ...]:
        """See Core."""
        return self._digests

    def locate(self, trace: Trace) -> Located:
        """See Core."""
        return self._bench.locate(trace)

    def stop(self) -> None:
        """See Core."""


class ProcessCore:
    """A process that stays on one core."""

    def __init__(self, number: int, workload: Workload, make: Make, memory: int) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads along as they are
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, number, workload, make, memory), daemon=True)
        self._process.start()
        other.close()

    def ready(self) -> None:
        """Returns once it has its executor and its memory."""
        self._answer()

    def start(self, pattern: int, expected: Sequence[bytes] | None) -> None:
        """See Core."""
        self._ask("round", pattern, expected)

    def finish(self) -> tuple[bytes, ...]:
        """See Core."""
        digests: tuple[bytes, ...] = self._answer()
        return digests

    def locate(self, trace: Trace) -> Located:
        """See Core."""
        self._ask("locate", trace)
        located: Located = self._answer()
        return located

    def stop(self) -> None:
        """See Core."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _ask(self, *question: Any) -> None:
        try:
            self._pipe.send(question)
        except OSError:
            raise self._gone() from None

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if kind == "failed":
            raise FailureError(f"core {self.number}: {value}")
        return value

    def _gone(self) -> FailureError:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        remedy = (
            "killed for memory? give it a smaller --memory, or less --threads"
            if code == -signal.SIGKILL
            else ("a crash of the processor's or of Trueweight's making: see the system's log, and run it again")
        )
        return FailureError(f"core {self.number}: its process ended {how}; {remedy}")


def _serve(pipe: Connection, core: int, workload: Workload, make: Make, memory: int) -> None:
    """A core's process: answers until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops the others
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    try:
        bench = Bench(workload, make(1), memory)
        pipe.send(("ready", None))
        while True:
            method, *arguments = pipe.recv()
            pipe.send(("done", getattr(bench, method)(*arguments)))
    except (EOFError, BrokenPipeError):
        return
    except MemoryError:
        pipe.send(("failed", "out of memory: give it a smaller --memory, or less --threads"))
    except Exception as error:  # noqa: BLE001 - whatever it is, it says nothing of the processor
        pipe.send(("failed", str(error).strip() or type(error).__name__))


def host_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# ----------------------------------------------------------------------------------------------------------- the soak


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One unit that came out wrong on one core; `seen` is as in `Located`, or `first pass`.

    `expected` and `actual` are (value, bits) of the first element that differs. `repeated` of `repeats` further runs on
    the core came out wrong too.
    """

    core: int
    round: int
    pattern: int
    unit: str
    program: str
    seen: str
    reason: str = ""
    operator: str = ""
    number: int = 0
    label: str = ""
    index: tuple[int, ...] = ()
    expected: tuple[Any, str] | None = None
    actual: tuple[Any, str] | None = None
    repeated: int = 0
    repeats: int = REPEATS


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """What a soak has done so far; `reason` says why it could go on no more. `units` are counted over all cores.

    `patterns` are the roots over what the units of each pattern that was met gave, the memory left out: the same on
    every host.
    """

    cores: tuple[int, ...]
    rounds: int = 0
    units: int = 0
    seconds: float = 0.0
    mismatches: tuple[Mismatch, ...] = ()
    patterns: tuple[str, ...] = ()
    reason: str = ""


def soak(
    cores: Sequence[Core],
    workload: Workload,
    *,
    memory: int,
    more: Callable[[Soaked], bool],
    record: Callable[[Mismatch], None] = lambda _: None,
    observe: Callable[[Soaked], None] = lambda _: None,
    make: Make = reference,
    clock: Callable[[], float] = time.monotonic,
) -> Soaked:
    """Rounds on all cores while there are to be `more`; every mismatch is given to `record` at once.

    `make` makes the judge's executor, in this process.
    """
    judge: Bench | None = None
    expected: dict[int, tuple[bytes, ...]] = {}
    state, started = Soaked(cores=tuple(core.number for core in cores)), clock()
    try:
        while more(state):
            pattern = state.rounds % PATTERNS
            if pattern not in expected:
                expected[pattern] = _first_pass(cores[0], workload, pattern, memory)
            for core in cores:
                core.start(pattern, expected[pattern])
            found = []
            for core in cores:
                digests = core.finish()
                state = replace(state, units=state.units + len(digests))
                if digests != expected[pattern]:
                    found.append((core, digests))
            for core, digests in found:
                judge = judge or Bench(workload, make(1), memory)
                mismatch = _judged(judge, core, cores[0], state.rounds, pattern, digests)
                if mismatch.seen == "first pass" and expected.pop(pattern, None) is None:
                    continue  # the other cores say so too
                record(mismatch)
                state = replace(state, mismatches=(*state.mismatches, mismatch))
            roots = tuple(merkle.list_root(expected[n][:-1]).hex() for n in sorted(expected))
            state = replace(state, rounds=state.rounds + 1, seconds=clock() - started, patterns=roots)
            observe(state)
    except FailureError as error:
        state = replace(state, seconds=clock() - started, reason=str(error))
    return state


def _first_pass(core: Core, workload: Workload, pattern: int, memory: int) -> tuple[bytes, ...]:
    """What a pattern gives: known beforehand, else from one core alone, while the others wait for its kernels."""
    known = workload.known(pattern)
    if known is None:
        core.start(pattern, None)
        return core.finish()
    buffer = np.empty((memory, _BLOCK // 8), np.uint64)
    _fill(buffer, pattern)
    return (*known, _digest((buffer,), None))


def _judged(judge: Bench, core: Core, first: Core, number: int, pattern: int, digests: Sequence[bytes]) -> Mismatch:
    """What went wrong in a core's round that ended with the last of `digests`."""
    trace = judge.trace(pattern, len(digests) - 1)
    work, _ = judge.value("input", 0)
    root = work.program.root.hex() if work.program else ""
    told = Mismatch(core=core.number, round=number, pattern=pattern, unit=work.name, program=root, seen="")
    if trace.digest == digests[-1]:
        reason = f"the reference executor gives what core {core.number} does: the first pass of this pattern was wrong"
        return replace(told, core=first.number, seen="first pass", reason=reason)
    located = core.locate(trace)
    told = replace(told, seen=located.seen, repeated=located.repeated)
    if located.array is None:
        return replace(told, reason="what was wrong did not come again, and left no array")
    _, right = judge.value(located.seen, located.number)
    named = _named(work.program, located)
    if located.array.shape != right.shape or located.array.tobytes() == right.tobytes():
        return replace(told, **named, reason="it was right again when it was looked at")
    flat, expected, actual = first_element(right, located.array)
    index = tuple(int(i) for i in np.unravel_index(flat, right.shape)) if right.shape else ()
    return replace(told, **named, index=index, expected=expected, actual=actual)


def _named(program: Program | None, located: Located) -> dict[str, Any]:
    """The operator, or the input, that a located array belongs to."""
    if program is None:
        return {"operator": MEMORY}
    first = len(program.inputs)
    values = {"input": located.number, "operator": first + located.number}
    value = values[located.seen] if located.seen in values else program.outputs[located.number]
    if value < first:
        return {"operator": "input", "number": value, "label": program.inputs[value][0]}
    op = program.ops[value - first]
    return {"operator": op.name, "number": value - first, "label": op.label}
