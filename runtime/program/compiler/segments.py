"""A part of a plan as pieces: segments of kernels that run without Python in between, and whole-array operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.program.compiler.plan import Loop, Part, Plan, Whole
from runtime.program.compiler.runner import clear, combine
from runtime.program.types import NUMPY
from storage.native import Address, Library

SHARED = 1 << 16
WAKING = 1 << 23
"""A kernel with less work than this (elements times operators) is not shared by threads, nor a segment with less than
that in such kernels: waking a thread takes as long."""


@dataclass
class Step:
    """One call of a kernel: rows by thread, and by thread the buffers or addresses in its table."""

    text: tuple[str, str]
    kind: str
    cuts: list[int]
    tables: list[list[int | np.ndarray]]


@dataclass
class Segment:
    """Kernels that run one after another.

    `steps` is i64 [thread][step][4] as the runner takes it; `slots` holds all tables, `where` the places in it that
    have the addresses of the buffers `which`; `fresh` are buffers made here outside the arena, `outside` all there.
    """

    steps: np.ndarray
    slots: np.ndarray
    where: np.ndarray
    which: np.ndarray
    numbers: dict[int, int]
    offsets: Mapping[int, int]
    fresh: tuple[int, ...]
    outside: tuple[int, ...]
    kinds: list[str]
    private: list[np.ndarray]
    parallel: bool
    dead: tuple[int, ...] = ()
    base: int = -1
    barrier: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    addresses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def address(self, base: int, memory: Mapping[int, int]) -> None:
        """Puts addresses into the tables: the arena's address and those of the arrays outside it."""
        if base != self.base:
            for buffer, number in self.numbers.items():
                if buffer in self.offsets:
                    self.addresses[number] = base + self.offsets[buffer]
            self.base = base
        for buffer, address in memory.items():
            self.addresses[self.numbers[buffer]] = address
        self.slots[self.where] = self.addresses[self.which]

    def spent(self) -> Iterator[tuple[str, float]]:
        """Seconds of each kernel of the last timed run, by kind."""
        for kind, nanoseconds in zip(self.kinds, np.diff(self.times), strict=True):
            yield kind, float(nanoseconds) * 1e-9


@dataclass
class Alone:
    """An operator on whole arrays between segments."""

    step: Whole
    offsets: Mapping[int, int]
    dead: tuple[int, ...]


Piece = Segment | Alone


def pieces(plan: Plan, part: Part, library: Library, threads: int) -> list[Piece]:
    """The pieces of a part, compiled."""
    made: list[Piece] = []
    run: list[Loop] = []
    gone: list[int] = []
    for step, dead in zip(part.steps, part.dead, strict=True):
        outside = [b for b in dead if b not in part.offsets]
        if isinstance(step, Loop):
            run.append(step)
            gone += outside
            continue
        if run:
            made.append(_segment(plan, part, run, gone, library, threads))
            run, gone = [], []
        made.append(Alone(step, part.offsets, tuple(outside)))
    if run:
        made.append(_segment(plan, part, run, gone, library, threads))
    return made


def _segment(
    plan: Plan,
    part: Part,
    loops: Sequence[Loop],
    gone: Sequence[int],
    library: Library,
    threads: int,
) -> Segment:
    private: list[np.ndarray] = []
    if sum(loop.kernel.work for loop in loops if loop.kernel.work >= SHARED) < WAKING:
        threads = 1
    steps = [step for loop in loops for step in _steps(plan, loop, threads, private)]
    addresses = library.add([step.text for step in steps])
    numbers: dict[int, int] = {}
    slots: list[int] = []
    where, which = [], []
    places: list[list[int]] = []
    for step in steps:
        places.append([])
        for table in step.tables:
            places[-1].append(len(slots))
            for item in table:
                if isinstance(item, np.ndarray):
                    slots.append(item.ctypes.data + (-item.ctypes.data) % 64)
                else:
                    where.append(len(slots))
                    which.append(numbers.setdefault(item, len(numbers)))
                    slots.append(0)
    held = np.array(slots, np.uint64)
    written = [b for loop in loops for b in loop.writes]
    return Segment(
        steps=_calls(steps, addresses, places, held, threads),
        slots=held,
        where=np.array(where, np.int64),
        which=np.array(which, np.int64),
        numbers=numbers,
        offsets=part.offsets,
        fresh=tuple(b for b in written if b not in part.offsets),
        outside=tuple(b for b in numbers if b not in part.offsets),
        kinds=[step.kind for step in steps],
        private=private,
        parallel=any(len(step.tables) > 1 for step in steps),
        dead=tuple(gone),
        times=np.zeros(len(steps) + 1, np.int64),
        addresses=np.zeros(len(numbers), np.uint64),
    )


def _calls(
    steps: Sequence[Step],
    addresses: Sequence[Address],
    places: Sequence[Sequence[int]],
    slots: np.ndarray,
    threads: int,
) -> np.ndarray:
    calls = np.zeros((threads, len(steps), 4), np.int64)
    for number, (step, address) in enumerate(zip(steps, addresses, strict=True)):
        for thread, place in enumerate(places[number]):
            calls[thread, number] = (
                address, step.cuts[thread], step.cuts[thread + 1], slots.ctypes.data + 8 * place,
            )  # fmt: skip
    return calls


def _steps(plan: Plan, loop: Loop, threads: int, private: list[np.ndarray]) -> Iterator[Step]:
    """A kernel's call with what its sums and maxima over rows need before and after it."""
    kernel = loop.kernel
    parts = min(threads, kernel.rows) if kernel.work >= SHARED else 1
    sums = [_copies(plan, value, operator, n, parts, private) for value, operator, n in kernel.accumulators]
    for (value, operator, n), copies in zip(kernel.accumulators, sums, strict=True):
        dtype = plan.buffers[value].dtype
        for copy in copies:
            yield Step(("clear", clear(operator, dtype)), loop.kind, [0, n], [[copy]])
    tables = []
    for part in range(parts):
        scratch = [_private(size, private) for size in kernel.scratch]
        known = [_constants(kernel.constants, private)] if kernel.constants else []
        tables.append([*loop.reads, *kernel.writes, *(copies[part] for copies in sums), *scratch, *known])
    cuts = [kernel.rows * part // parts for part in range(parts + 1)]
    yield Step((kernel.name, kernel.text), loop.kind, cuts, tables)
    for (value, operator, n), copies in zip(kernel.accumulators, sums, strict=True):
        if parts > 1:
            text = combine(operator, plan.buffers[value].dtype, parts)
            yield Step(("combine", text), loop.kind, [0, n], [list(copies)])


def _copies(
    plan: Plan, value: int, operator: str, n: int, parts: int, private: list[np.ndarray]
) -> list[int | np.ndarray]:
    """Where each thread adds up: the first in the value's buffer, the others in memory of their own."""
    size = n * NUMPY[plan.buffers[value].dtype].itemsize
    return [value, *(_private(size, private) for _ in range(parts - 1))]


def _constants(numbers: Sequence[int], private: list[np.ndarray]) -> np.ndarray:
    memory = _private(8 * len(numbers), private)
    start = -memory.ctypes.data % 64
    memory[start : start + 8 * len(numbers)].view(np.int64)[:] = numbers
    return memory


def _private(size: int, private: list[np.ndarray]) -> np.ndarray:
    private.append(np.empty(size + 64, np.uint8))
    return private[-1]
