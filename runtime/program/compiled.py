"""The compiled CPU executor: chains of elementwise operators as fused loops, everything else as the reference has it.

A Program is cut into stages. Operators of one shape whose inputs are there at a stage form one kernel (`kernels.py`);
views cost nothing, and sums, maxima, products and rows by index run between kernels. What is fused changes no value:
inside a loop the same operations happen to the same elements. A kernel that meets a value which `rint` refuses gives
up, and the reference executor runs the Program again to say where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.program import kernels
from runtime.program.executor import Observer
from runtime.program.kernels import STATEMENTS, Load
from runtime.program.program import Op, Program
from runtime.program.reference import TORCH, ReferenceExecutor, Refused, Tensor

Shape = tuple[int, ...]

READ_THROUGH = ("literal", "reshape", "broadcast")
"""What a loop takes its operands from without their being made."""


@dataclass(frozen=True)
class Single:
    """One operator that is not part of a loop."""

    number: int


@dataclass(frozen=True)
class Kernel:
    """A loop over rows x cols: `inputs` are values with the way they are read, `stores` the values written out."""

    rows: int
    cols: int
    inputs: tuple[tuple[int, str], ...]
    stores: tuple[int, ...]
    text: str


Step = Single | Kernel


@dataclass(frozen=True)
class Schedule:
    """A Program's steps in order, and the values that nothing reads after each."""

    steps: tuple[Step, ...]
    dead: tuple[tuple[int, ...], ...]


def schedule(program: Program) -> Schedule:
    """The steps of a Program: loops where operators can share one, single operators elsewhere."""
    steps = [*_steps(program)]
    last: dict[int, int] = {}
    for place, step in enumerate(steps):
        for value in _touched(program, step):
            last[value] = place
    dead: list[list[int]] = [[] for _ in steps]
    kept = set(program.outputs)
    for value, place in last.items():
        if value not in kept:
            dead[place].append(value)
    return Schedule(steps=tuple(steps), dead=tuple(map(tuple, dead)))


def _touched(program: Program, step: Step) -> tuple[int, ...]:
    if isinstance(step, Kernel):
        return (*(value for value, _ in step.inputs), *step.stores)
    return (*program.ops[step.number].inputs, len(program.inputs) + step.number)


def _steps(program: Program) -> list[Step]:
    first = len(program.inputs)
    stages = _stages(program)
    loops: dict[tuple[int, Shape], list[int]] = {}
    singles: dict[int, list[int]] = {}
    for number, op in enumerate(program.ops):
        if op.name in STATEMENTS:
            loops.setdefault((stages[first + number], op.type.shape), []).append(number)
        else:
            singles.setdefault(stages[first + number], []).append(number)
    made = {key: _kernel(program, numbers) for key, numbers in loops.items()}
    needed = _needed(program, made, singles)
    steps: list[Step] = []
    for stage in range(max(stages, default=0) + 1):
        steps += [Single(number) for number in singles.get(stage, ()) if first + number in needed]
        steps += [kernel for (at, _), kernel in made.items() if at == stage]
    return steps


def _needed(program: Program, made: Mapping[Any, Kernel], singles: Mapping[int, list[int]]) -> set[int]:
    """Values that have to be made: all but literals and views that every loop reads through, which cannot fault."""
    first = len(program.inputs)
    needed = {*program.outputs, *(value for kernel in made.values() for value, _ in kernel.inputs)}
    needed |= {first + n for numbers in singles.values() for n in numbers if program.ops[n].name not in READ_THROUGH}
    for number in sorted((n for numbers in singles.values() for n in numbers), reverse=True):
        if first + number in needed:
            needed.update(program.ops[number].inputs)
    return needed


def _stages(program: Program) -> list[int]:
    """For every value the stage that makes it. A loop's operators may read one another; all else is a stage earlier."""
    stages = [0] * len(program.types)
    first = len(program.inputs)
    looped = [*(False for _ in program.inputs), *(op.name in STATEMENTS for op in program.ops)]
    for number, op in enumerate(program.ops):
        inside = op.name in STATEMENTS
        for value in op.inputs:
            shared = inside and looped[value] and program.types[value].shape == op.type.shape
            after = stages[value] + (1 if looped[value] and not shared else 0)
            stages[first + number] = max(stages[first + number], after)
    return stages


def _kernel(program: Program, numbers: Sequence[int]) -> Kernel:
    first, shape = len(program.inputs), program.ops[numbers[0]].type.shape
    members = {first + number for number in numbers}
    outside = list(dict.fromkeys(v for n in numbers for v in program.ops[n].inputs if v not in members))
    split = _split(program, outside, shape)
    reads = {value: _read(program, value, shape, split) for value in outside}
    order = list(dict.fromkeys(reads.values()))
    place = {read: k for k, read in enumerate(order)}
    local = {value: place[read] for value, read in reads.items()}
    local |= {first + number: len(order) + k for k, number in enumerate(numbers)}
    readers = {v for n, op in enumerate(program.ops) if first + n not in members for v in op.inputs}
    stores = tuple(v for v in sorted(members) if v in readers or v in program.outputs)
    ops = [program.ops[number] for number in numbers]
    operands = [[local[v] for v in op.inputs] for op in ops]
    return Kernel(
        rows=math.prod(shape[:split]),
        cols=math.prod(shape[split:]),
        inputs=tuple((value, load.how) for value, load in order if load.how != "literal"),
        stores=stores,
        text=kernels.source(ops, operands, [load for _, load in order], [local[v] for v in stores]),
    )


def _producer(program: Program, value: int) -> Op | None:
    first = len(program.inputs)
    return program.ops[value - first] if value >= first else None


def _origin(program: Program, value: int) -> int:
    """The value that a broadcast repeats, or the value itself."""
    op = _producer(program, value)
    return op.inputs[0] if op is not None and op.name == "broadcast" else value


def _split(program: Program, values: Sequence[int], shape: Shape) -> int:
    """The axis at which the iteration space is cut into rows and columns: where most repeated inputs allow it."""
    votes: dict[int, int] = {}
    for value in values:
        small = program.types[_origin(program, value)].shape
        if small != shape and math.prod(small) > 1:
            for axis in range(1, len(shape)):
                if _way(small, shape, axis) != "full":
                    votes[axis] = votes.get(axis, 0) + 1
    return max(votes, key=lambda axis: votes[axis]) if votes else max(len(shape) - 1, 0)


def _way(small: Shape, shape: Shape, axis: int) -> str:
    """How an array of shape `small`, repeated to `shape`, is read when the space is cut at `axis`."""
    if small[:axis] == shape[:axis] and math.prod(small[axis:]) == 1:
        return "row"
    if math.prod(small[:axis]) == 1 and small[axis:] == shape[axis:]:
        return "column"
    return "full"


def _read(program: Program, value: int, shape: Shape, split: int) -> tuple[int, Load]:
    dtype, source = program.types[value].dtype, _origin(program, value)
    small = program.types[source].shape
    if math.prod(small) == 1 and math.prod(shape) != 1:
        root = source
        op = _producer(program, root)
        while op is not None and op.name == "reshape":
            root = op.inputs[0]
            op = _producer(program, root)
        if op is not None and op.name == "literal":
            return -1, Load("literal", dtype, op.attributes["bits"])
        return source, Load("one", dtype)
    op = _producer(program, source)
    if op is not None and op.name == "literal":
        return -1, Load("literal", dtype, op.attributes["bits"])
    if small == shape:
        return source, Load("full", dtype)
    way = _way(small, shape, split)
    return (value, Load("full", dtype)) if way == "full" else (source, Load(way, dtype))


class CompiledExecutor(ReferenceExecutor):
    """Runs Programs on the CPU by their schedules. Handles are torch tensors, as the reference executor's."""

    def __init__(self, profile: dict[str, float] | None = None) -> None:
        super().__init__("cpu", profile)
        self._schedules: dict[bytes, Schedule] = {}

    def run(self, program: Program, inputs: Sequence[Tensor], observe: Observer | None = None) -> list[Tensor]:
        """The program's outputs. A traced run needs every operator's output, so the reference executor makes it."""
        if observe is not None:
            return super().run(program, inputs, observe)
        self._check(program, inputs)
        found = self._schedules.get(program.root)
        if found is None:
            found = self._schedules[program.root] = schedule(program)
        values: dict[int, Tensor] = dict(enumerate(inputs))
        with torch.inference_mode():
            for step, dead in zip(found.steps, found.dead, strict=True):
                if not self._step(program, step, values):
                    return super().run(program, inputs)  # and this names the operator, the element and the value
                for value in dead:
                    values.pop(value, None)
        return [values[i] for i in program.outputs]

    def _step(self, program: Program, step: Step, values: dict[int, Tensor]) -> bool:
        """Runs a step and keeps what it makes; False where a value was refused."""
        if isinstance(step, Kernel):
            return _loop(program, step, values)
        try:
            self._single(program, step.number, values)
        except Refused:
            return False
        return True

    def _single(self, program: Program, number: int, values: dict[int, Tensor]) -> None:
        op = program.ops[number]
        operands = [values[i] for i in op.inputs]
        if op.name == "dot" and len(op.type.shape) == 2 and 0 not in op.type.shape:
            made = torch._int_mm(*(x.contiguous() for x in operands))
        else:
            made = self._apply(program, op.name, op.attributes, operands)
        values[len(program.inputs) + number] = made


def _loop(program: Program, kernel: Kernel, values: dict[int, Tensor]) -> bool:
    """Runs a kernel and keeps what it stores; False where a value was refused."""
    arrays = [values[value].reshape(-1).numpy() for value, _ in kernel.inputs]
    made = [torch.empty(program.types[v].shape, dtype=TORCH[program.types[v].dtype]) for v in kernel.stores]
    outputs = [tensor.view(-1).numpy() for tensor in made]
    if kernels.compiled(kernel.text)(kernel.rows, kernel.cols, *arrays, *outputs):
        return False
    values.update(zip(kernel.stores, made, strict=True))
    return True
