"""The compiled CPU executor: Programs as plans of fused loops and exact products, with the reference's bytes.

A kernel that meets a value which `rint` refuses says so, and the reference executor runs the Program again to name the
operator and the element. A traced run needs every operator's output, so the reference makes that too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from runtime.memory import LARGE, available
from runtime.program.compiler import products
from runtime.program.compiler.axes import View
from runtime.program.compiler.graph import tensor_of
from runtime.program.compiler.plan import INTO, Plan, Whole
from runtime.program.compiler.planned import plan_alone, plan_backward, plan_forward
from runtime.program.compiler.runner import make_runner
from runtime.program.compiler.segments import Piece, Segment, pieces
from runtime.program.executor import Observer
from runtime.program.program import Program
from runtime.program.reference import TORCH, ReferenceExecutor, Refused, Tensor, scatter_add
from storage.errors import FailureError
from storage.native import Library, Progress, cache_folder, quiet


@dataclass
class _Ready:
    """A plan with its machine code."""

    plan: Plan
    before: list[Piece]
    main: list[Piece]
    fixed: dict[tuple[int, ...], tuple[Any, dict[int, Tensor]]] = field(default_factory=dict)
    """What `before` made, by the parameters that it was made from, which are held so that none can take their place."""


@dataclass
class _Pair:
    """A forward plan and what follows it.

    `handed` are the buffers that are handed over, by number there and here; backward plans are by the number of sums
    that they add to.
    """

    forward: _Ready
    handed: Mapping[int, int]
    backward: dict[int, _Ready] = field(default_factory=dict)
    spare: dict[int, list[Tensor]] = field(default_factory=dict)
    """Memory that was handed over before: new memory would have to be mapped page by page."""


class _GaveUp(Exception):
    """A value was refused."""


class CompiledExecutor(ReferenceExecutor):
    """Runs Programs on the CPU by compiled plans. Handles are torch tensors, as the reference executor's.

    `threads` share the rows of each kernel; compiled kernels are kept on disk unless `cache` is False. `profile`, where
    given, collects seconds by kind of step.
    """

    def __init__(
        self,
        threads: int = 1,
        *,
        cache: bool = True,
        profile: dict[str, float] | None = None,
        progress: Progress = quiet,
    ) -> None:
        super().__init__("cpu")
        self._library = Library(cache_folder() if cache else None, progress)
        self._runner = make_runner(self._library)
        self._threads = max(threads, 1)
        self._pool = ThreadPoolExecutor(self._threads - 1) if self._threads > 1 else None
        self._spent = profile
        self._ready: dict[Any, _Ready] = {}
        self._pairs: dict[Any, _Pair] = {}
        self._arena = torch.empty(0, dtype=torch.int8)

    @property
    def path(self) -> str:
        """How digits are multiplied here."""
        return products.chosen()

    def run(
        self, program: Program, inputs: Sequence[Tensor], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Tensor]:
        """The program's outputs; what depends on the first `stable` inputs alone is kept while these stay the same."""
        if observe is not None:
            return super().run(program, inputs, observe)
        self._check(program, inputs)
        key = (program.root, stable)
        if key not in self._ready:
            self._ready[key] = self._prepare(plan_alone(program, stable))
        ready = self._ready[key]
        try:
            return self._outputs(ready, self._run(ready, inputs, stable))
        except _GaveUp:
            return super().run(program, inputs)  # and this names the operator, the element and the value

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Tensor], *, stable: int = 0
    ) -> tuple[list[Tensor], Any]:
        """The outputs of `forward`, and the arrays that it keeps so that `backward` need not compute them again."""
        key = (forward.root, backward.root, stable)
        if key not in self._pairs:
            made = plan_forward(forward, backward, stable)
            self._pairs[key] = _Pair(self._prepare(made.plan), made.handed)
        pair = self._pairs[key]
        self._check(forward, inputs)
        try:
            memory = self._run(pair.forward, inputs, stable, pair.spare)
            return self._outputs(pair.forward, memory), {v: memory[b] for v, b in pair.handed.items()}
        except _GaveUp:
            return super().run(forward, inputs), None

    def backward(
        self,
        forward: Program,
        backward: Program,
        inputs: Sequence[Tensor],
        saved: Any,
        sums: Sequence[np.ndarray] = (),
        *,
        stable: int = 0,
    ) -> list[Tensor]:
        """The outputs of `backward`; gradients go into `sums` as they are made. Without `saved` from the start."""
        self._check(backward, inputs)
        pair = self._pairs.get((forward.root, backward.root, stable))
        if saved is None or pair is None:
            return super().backward(forward, backward, inputs, None, sums, stable=stable)
        if len(sums) not in pair.backward:
            plan = plan_backward(forward, backward, stable, len(sums))
            pair.backward[len(sums)] = self._prepare(plan)
        ready = pair.backward[len(sums)]
        kept = len(backward.outputs) - len(sums)
        targets = dict(zip(backward.outputs[kept:], map(torch.from_numpy, sums), strict=True))
        added = {value: target for value, target in targets.items() if value in ready.plan.added}
        try:
            made = self._outputs(ready, self._run(ready, inputs, stable, given={**saved, **added}))
        except _GaveUp:
            super().run(backward, inputs)
            raise FailureError(
                "the compiled executor refused a value that the reference accepts: please report it, and use "
                "--executor reference"
            ) from None
        for value, buffer in pair.handed.items():
            pair.spare.setdefault(buffer, []).append(saved[value])
        for value, gradient, total in zip(backward.outputs[kept:], made[kept:], sums, strict=True):
            if value not in added:
                total += self.get(gradient).reshape(-1)
        return made[:kept]

    def forget(self) -> None:
        """Drops what was kept for parameters: they have changed, and their tensors will not come again."""
        for ready in self._ready.values():
            ready.fixed.clear()
        for pair in self._pairs.values():
            for ready in (pair.forward, *pair.backward.values()):
                ready.fixed.clear()

    # ----------------------------------------------------------------------------------------------------- compilation

    def _prepare(self, plan: Plan) -> _Ready:
        before, main = (pieces(plan, part, self._library, self._threads) for part in (plan.before, plan.main))
        return _Ready(plan, before, main)

    # ------------------------------------------------------------------------------------------------------------- runs

    def _run(
        self,
        ready: _Ready,
        inputs: Sequence[Tensor],
        stable: int,
        spare: Mapping[int, list[Tensor]] | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """The arrays by buffer that outlive a run: inputs, what is given, outputs and what is handed on."""
        memory = {n: tensor.contiguous().reshape(-1) for n, tensor in enumerate(inputs)} | dict(given or {})
        with torch.inference_mode():
            if ready.before:
                place = tuple(map(id, inputs[:stable]))
                if place not in ready.fixed:
                    made = dict(memory)
                    self._walk(ready.plan, ready.before, ready.plan.before.arena, made, None)
                    ready.fixed[place] = (inputs[:stable], {b: made[b] for b in ready.plan.fixed})
                memory |= ready.fixed[place][1]
            self._walk(ready.plan, ready.main, ready.plan.main.arena, memory, spare)
        return memory

    def _walk(
        self,
        plan: Plan,
        items: Sequence[Piece],
        arena: int,
        memory: dict[int, Tensor],
        spare: Mapping[int, list[Tensor]] | None,
    ) -> None:
        """Runs pieces in order. `memory` has the arrays outside the arena, and gets those that are made there."""
        if self._arena.numel() < arena:
            self._arena = torch.empty(0, dtype=torch.int8)
            self._arena = allocate(arena, torch.int8)
        base = self._arena.data_ptr()
        for item in items:
            if isinstance(item, Segment):
                for buffer in item.fresh:
                    if buffer not in memory:  # a sum is the caller's
                        memory[buffer] = self._fresh(plan, buffer, spare)
                item.address(base, {b: memory[b].data_ptr() for b in item.outside})
                self._segment(item)
            else:
                self._whole_step(plan, item.step, item.offsets, memory, spare)
            for buffer in item.dead:
                memory.pop(buffer, None)

    def _fresh(self, plan: Plan, buffer: int, spare: Mapping[int, list[Tensor]] | None) -> Tensor:
        if spare and spare.get(buffer):
            return spare[buffer].pop()
        return allocate(plan.buffers[buffer].elements, TORCH[plan.buffers[buffer].dtype])

    def _segment(self, segment: Segment) -> None:
        """Runs a segment on all threads, this one included."""
        segment.barrier[0] = 0
        timed = segment.times.ctypes.data if self._spent is not None else 0
        rest, count, barrier = segment.steps[1:], segment.steps.shape[1], segment.barrier.ctypes.data
        others = []
        if self._pool is not None and segment.parallel:
            others = [
                self._pool.submit(self._runner, steps.ctypes.data, count, self._threads, barrier, 0) for steps in rest
            ]
        bad = self._runner(segment.steps[0].ctypes.data, count, len(others) + 1, barrier, timed)
        bad |= max((other.result() for other in others), default=0)
        if self._spent is not None:
            for kind, seconds in segment.spent():
                self._spent[kind] = self._spent.get(kind, 0.0) + seconds
        if bad:
            raise _GaveUp

    def _whole_step(
        self,
        plan: Plan,
        step: Whole,
        offsets: Mapping[int, int],
        memory: dict[int, Tensor],
        spare: Mapping[int, list[Tensor]] | None,
    ) -> None:
        started = time.perf_counter()

        def at(buffer: int) -> Tensor:
            if buffer not in offsets:
                return memory[buffer]
            kind = plan.buffers[buffer]
            return self._arena[offsets[buffer] : offsets[buffer] + kind.bytes].view(TORCH[kind.dtype])

        operands = [
            show(at(o.buffer), o) if isinstance(o, View) else tensor_of((o[0].dtype, o[0].bits)).expand(o[1].shape)
            for o in step.operands
        ]
        try:
            if step.op.name == "product":
                made = _product(step, operands)
            elif step.op.name in INTO:
                into = at(step.output) if step.output in offsets else self._fresh(plan, step.output, spare)
                made = scatter_add(operands[0], operands[1], step.op.attributes["rows"], into.view(step.op.type.shape))
            else:
                made = self._apply(plan.graph.program, step.op.name, step.op.attributes, operands)
        except Refused:
            raise _GaveUp from None
        if step.output not in offsets:
            made = made.contiguous()
            inside = made.untyped_storage().data_ptr() == self._arena.untyped_storage().data_ptr()
            memory[step.output] = (made.clone() if inside else made).reshape(-1)  # the arena is written over
        if self._spent is not None:
            kind = "products" if step.op.name == "product" else "whole arrays"
            self._spent[kind] = self._spent.get(kind, 0.0) + time.perf_counter() - started

    def _outputs(self, ready: _Ready, memory: Mapping[int, Tensor]) -> list[Tensor]:
        graph = ready.plan.graph
        made = []
        with torch.inference_mode():
            for value in graph.outputs:
                if value in graph.literals:
                    made.append(tensor_of(graph.literals[value]).expand(graph.types[value].shape).contiguous())
                else:
                    view = ready.plan.views[value]
                    made.append(show(memory[view.buffer], view).contiguous())
        return made


def allocate(elements: int, dtype: torch.dtype) -> Tensor:
    """A flat array; FailureError that says how much was asked for, what there is and what would fit."""
    size = elements * dtype.itemsize
    free = available() if size >= LARGE else None
    try:
        if free is None or size <= free:
            return torch.empty(elements, dtype=dtype)
    except RuntimeError:  # torch's allocator: a limit of this process
        free = available() or 0
    parts = -(-size // max(free, 1))
    raise FailureError(
        f"out of memory: expected {size / 2**30:.1f} GiB for a block's values, got {free / 2**30:.1f} GiB available; "
        + (f"a micro-batch of a {parts}th of this size would fit: raise" if parts > 1 else "raise")
        + " [training] micro_batches, or give this host fewer workers"
    )


def _product(step: Whole, operands: Sequence[Tensor]) -> Tensor:
    lefts, terms = step.op.attributes["lefts"], step.op.attributes["terms"]
    flat = [o.reshape(math.prod(o.shape[:-2]), *o.shape[-2:]) for o in operands]
    return products.general(flat[:lefts], flat[lefts:], terms).reshape(step.op.type.shape)


def show(memory: Tensor, view: View) -> Tensor:
    """A buffer as the tensor that a view shows: without a copy where torch can stride over it."""
    atoms = [a for dim in view.dims for a in dim]
    spread = memory.as_strided([n for n, _ in atoms], [s for _, s in atoms], memory.storage_offset() + view.offset)
    return spread.reshape(view.shape)
