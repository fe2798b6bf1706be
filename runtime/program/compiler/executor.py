"""The compiled CPU executor: Programs as plans of fused loops and exact products, with the reference's bytes.

A kernel that meets a value which `rint` refuses says so, and the reference executor runs the Program again to name the
operator and the element. A traced run needs every operator's output, so the reference makes that too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.program.compiler import products
from runtime.program.compiler.axes import View
from runtime.program.compiler.graph import make_graph, tensor_of
from runtime.program.compiler.native import CACHE, Entry, Library, Progress, quiet
from runtime.program.compiler.plan import INTO, Loop, Plan, Whole, last_uses, make_plan
from runtime.program.compiler.saving import saved_values, shared
from runtime.program.executor import Observer
from runtime.program.program import Program
from runtime.program.reference import TORCH, ReferenceExecutor, Refused, Tensor, scatter_add
from storage.errors import FailureError

SHARED = 1 << 15
"""A kernel with less work than this (elements times operators) is not worth a second thread."""


@dataclass
class _Call:
    """A kernel ready to run: per thread a table of addresses, and private memory that a table points to."""

    entry: Entry
    loop: Loop
    tables: list[np.ndarray]
    addresses: list[int]
    private: list[Any] = field(default_factory=list)
    sums: list[list[np.ndarray]] = field(default_factory=list)


@dataclass
class _Ready:
    """A plan with its machine code."""

    plan: Plan
    before: list[_Call | Whole]
    steps: list[_Call | Whole]
    dead_before: list[tuple[int, ...]]
    fixed: dict[tuple[int, ...], tuple[Any, dict[int, Tensor]]] = field(default_factory=dict)
    """What `before` made, by the parameters that it was made from, which are held so that none can take their place."""


@dataclass
class _Pair:
    """A forward plan and what follows it.

    `common` are the values of the backward Program that both compute, `given` where those lie that are handed over,
    `handed` their buffers by number there and here; backward plans are by the number of sums that they add to.
    """

    forward: _Ready
    common: Mapping[int, int]
    given: Mapping[int, View]
    handed: dict[int, int]
    backward: dict[int, _Ready] = field(default_factory=dict)
    spare: dict[int, list[Tensor]] = field(default_factory=dict)
    """Memory that was handed over before: new memory would have to be mapped page by page."""


class _GaveUp(Exception):
    """A value was refused."""


class CompiledExecutor(ReferenceExecutor):
    """Runs Programs on the CPU by compiled plans. Handles are torch tensors, as the reference executor's.

    `threads` share the rows of each kernel; `cache` is the folder of compiled kernels, None for none. `profile`, where
    given, collects seconds by kind of step.
    """

    def __init__(
        self,
        threads: int = 1,
        *,
        cache: Path | None = Path(CACHE),  # noqa: B008 - a constant
        profile: dict[str, float] | None = None,
        progress: Progress = quiet,
    ) -> None:
        super().__init__("cpu")
        self._library = Library(cache)
        self._threads = max(threads, 1)
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._spent = profile
        self._progress = progress
        self._ready: dict[Any, _Ready] = {}
        self._pairs: dict[Any, _Pair] = {}
        self._arena = torch.empty(0, dtype=torch.int8)

    def run(
        self, program: Program, inputs: Sequence[Tensor], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Tensor]:
        """The program's outputs; what depends on the first `stable` inputs alone is kept while these stay the same."""
        if observe is not None:
            return super().run(program, inputs, observe)
        self._check(program, inputs)
        key = (program.root, stable)
        if key not in self._ready:
            self._ready[key] = self._prepare(make_plan(make_graph(program), stable=stable))
        ready = self._ready[key]
        try:
            with torch.inference_mode():
                return self._outputs(ready, self._run(ready, inputs, stable))
        except _GaveUp:
            return super().run(program, inputs)  # and this names the operator, the element and the value

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Tensor], *, stable: int = 0
    ) -> tuple[list[Tensor], Any]:
        """The outputs of `forward`, and the arrays that it keeps so that `backward` need not compute them again."""
        key = (forward.root, backward.root, stable)
        if key not in self._pairs:
            self._pairs[key] = self._pair(forward, backward, stable)
        pair = self._pairs[key]
        self._check(forward, inputs)
        try:
            with torch.inference_mode():
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
            graph = make_graph(backward, given=list(pair.given), known=pair.common, sums=len(sums))
            pair.backward[len(sums)] = self._prepare(make_plan(graph, stable=stable, given=pair.given))
        ready = pair.backward[len(sums)]
        kept = len(backward.outputs) - len(sums)
        targets = dict(zip(backward.outputs[kept:], map(torch.from_numpy, sums), strict=True))
        added = {value: target for value, target in targets.items() if value in ready.plan.added}
        try:
            with torch.inference_mode():
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

    # ----------------------------------------------------------------------------------------------------- compilation

    def _pair(self, forward: Program, backward: Program, stable: int) -> _Pair:
        common = shared(forward, backward)
        handed = saved_values(backward, common, stable)
        before = make_plan(make_graph(forward, saved=[common[v] for v in handed]), stable=stable)
        homes: dict[int, int] = {}  # one number for each buffer that is handed over: a value's that lies in it
        for value in handed:
            homes.setdefault(before.views[common[value]].buffer, value)
        given = {v: replace(before.views[common[v]], buffer=homes[before.views[common[v]].buffer]) for v in handed}
        return _Pair(
            forward=self._prepare(before),
            common=common,
            given=given,
            handed={value: buffer for buffer, value in homes.items()},
        )

    def _prepare(self, plan: Plan) -> _Ready:
        loops = [s for s in (*plan.before, *plan.steps) if isinstance(s, Loop)]
        entries = self._library.add([(s.kernel.name, s.kernel.text) for s in loops], self._progress)
        calls = iter([self._call(loop, entry) for loop, entry in zip(loops, entries, strict=True)])
        before: list[_Call | Whole] = [next(calls) if isinstance(s, Loop) else s for s in plan.before]
        steps: list[_Call | Whole] = [next(calls) if isinstance(s, Loop) else s for s in plan.steps]
        made = {b for s in plan.before for b in s.writes}
        return _Ready(plan, before, steps, last_uses(plan.before, made - plan.fixed))

    def _call(self, loop: Loop, entry: Entry) -> _Call:
        kernel = loop.kernel
        parts = self._threads if kernel.work >= SHARED and kernel.rows > 1 else 1
        count = len(loop.reads) + len(loop.writes)
        call = _Call(entry, loop, [], [])
        for part in range(parts):
            table = np.zeros(count + len(kernel.scratch), np.uint64)
            private = [np.empty(size + 64, np.uint8) for size in kernel.scratch]
            table[count:] = [array.ctypes.data + (-array.ctypes.data) % 64 for array in private]
            sums = []
            if part:
                sums = [np.empty(n, np.int64) for _, _, n in kernel.accumulators]
            call.tables.append(table)
            call.addresses.append(table.ctypes.data)
            call.private.append(private)
            call.sums.append(sums)
        return call

    # ------------------------------------------------------------------------------------------------------------- runs

    def _run(
        self,
        ready: _Ready,
        inputs: Sequence[Tensor],
        stable: int,
        spare: Mapping[int, list[Tensor]] | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        memory = {n: tensor.contiguous().reshape(-1) for n, tensor in enumerate(inputs)}
        memory |= given or {}
        memory |= self._before(ready, memory, inputs[:stable])
        if self._arena.numel() < ready.plan.arena:
            self._arena = torch.empty(ready.plan.arena, dtype=torch.int8)
        for step, dead in zip(ready.steps, ready.plan.dead, strict=True):
            self._step(ready.plan, step, memory, spare)
            for buffer in dead:
                memory.pop(buffer, None)
        return memory

    def _before(
        self, ready: _Ready, memory: dict[int, Tensor], parameters: Sequence[Tensor]
    ) -> Mapping[int, Tensor]:
        """What `before` makes, from an earlier run if the parameters are the very same tensors."""
        if not ready.before:
            return {}
        place = tuple(map(id, parameters))
        if place not in ready.fixed:
            made = dict(memory)
            for step, dead in zip(ready.before, ready.dead_before, strict=True):
                self._step(ready.plan, step, made, early=True)
                for buffer in dead:
                    made.pop(buffer, None)
            ready.fixed[place] = (parameters, {b: made[b] for b in ready.plan.fixed})
        return ready.fixed[place][1]

    def forget(self) -> None:
        """Drops what was kept for parameters: they have changed, and their tensors will not come again."""
        for ready in self._ready.values():
            ready.fixed.clear()
        for pair in self._pairs.values():
            for ready in (pair.forward, *pair.backward.values()):
                ready.fixed.clear()

    def _step(
        self,
        plan: Plan,
        step: _Call | Whole,
        memory: dict[int, Tensor],
        spare: Mapping[int, list[Tensor]] | None = None,
        early: bool = False,
    ) -> None:
        started = time.perf_counter() if self._spent is not None else 0.0
        if isinstance(step, Whole):
            into = self._buffer(plan, step.output, spare, early) if step.op.name in INTO else None
            memory[step.output] = self._whole(plan, step, memory, into)
            kind = "products" if step.op.name == "product" else "whole arrays"
        else:
            for buffer in step.loop.writes:
                if buffer not in memory:  # a sum's is the caller's
                    memory[buffer] = self._buffer(plan, buffer, spare, early)
            self._loop(step, memory)
            kind = step.loop.kind
        if self._spent is not None:
            self._spent[kind] = self._spent.get(kind, 0.0) + time.perf_counter() - started

    def _buffer(self, plan: Plan, buffer: int, spare: Mapping[int, list[Tensor]] | None, early: bool) -> Tensor:
        found = plan.buffers[buffer]
        if spare and spare.get(buffer):
            return spare[buffer].pop()
        offset = None if early else plan.offsets.get(buffer)
        if offset is None:
            return torch.empty(found.elements, dtype=TORCH[found.dtype])
        return self._arena[offset : offset + found.bytes].view(TORCH[found.dtype])

    def _loop(self, call: _Call, memory: Mapping[int, Tensor]) -> None:
        loop, kernel = call.loop, call.loop.kernel
        addresses = [memory[b].data_ptr() for b in (*loop.reads, *loop.writes)]
        start = len(addresses) - len(kernel.accumulators)
        for value, name, _ in kernel.accumulators:
            _clear(memory[value].numpy(), name)
        parts = len(call.tables)
        for part, table in enumerate(call.tables):
            table[: len(addresses)] = addresses
            for place, (array, (value, name, n)) in enumerate(zip(call.sums[part], kernel.accumulators, strict=False)):
                view = array.view(memory[value].numpy().dtype)[:n]
                _clear(view, name)
                table[start + place] = view.ctypes.data
        if parts == 1 or self._pool is None:
            bad = call.entry(0, kernel.rows, call.addresses[0])
        else:
            cuts = [kernel.rows * part // parts for part in range(parts + 1)]
            bad = max(self._pool.map(call.entry, cuts[:-1], cuts[1:], call.addresses))
            for sums in call.sums[1:]:
                for array, (value, name, n) in zip(sums, kernel.accumulators, strict=True):
                    total = memory[value].numpy()
                    (np.add if name == "sum" else np.maximum)(total, array.view(total.dtype)[:n], out=total)
        if bad:
            raise _GaveUp

    def _whole(self, plan: Plan, step: Whole, memory: Mapping[int, Tensor], into: Tensor | None) -> Tensor:
        operands = [
            show(memory[o.buffer], o)
            if isinstance(o, View)
            else tensor_of((o[0].dtype, o[0].bits)).expand(o[1].shape)
            for o in step.operands
        ]
        try:
            if step.op.name == "product":
                made = _product(step, operands)
            elif into is not None:
                made = scatter_add(*operands, **step.op.attributes, into=into.view(step.op.type.shape))
            else:
                made = self._apply(plan.graph.program, step.op.name, step.op.attributes, operands)
        except Refused:
            raise _GaveUp from None
        return made.contiguous().reshape(-1)

    def _outputs(self, ready: _Ready, memory: Mapping[int, Tensor]) -> list[Tensor]:
        graph = ready.plan.graph
        made = []
        for value in graph.outputs:
            if value in graph.literals:
                made.append(tensor_of(graph.literals[value]).expand(graph.types[value].shape).contiguous())
            else:
                view = ready.plan.views[value]
                made.append(show(memory[view.buffer], view).contiguous())
        return made


def _clear(array: np.ndarray, name: str) -> None:
    array.fill(0 if name == "sum" else np.iinfo(array.dtype).min)


def _product(step: Whole, operands: Sequence[Tensor]) -> Tensor:
    lefts, terms = step.op.attributes["lefts"], step.op.attributes["terms"]
    flat = [o.reshape(-1, *o.shape[-2:]) for o in operands]
    return products.general(flat[:lefts], flat[lefts:], terms).reshape(step.op.type.shape)


def show(memory: Tensor, view: View) -> Tensor:
    """A buffer as the tensor that a view shows: without a copy where torch can stride over it."""
    atoms = [a for dim in view.dims for a in dim]
    spread = memory.as_strided([n for n, _ in atoms], [s for _, s in atoms], memory.storage_offset() + view.offset)
    return spread.reshape(view.shape)

