"""From a graph to steps on buffers: kernels, packed operands, products, whole-array operators; and where buffers lie.

What depends on parameters alone (`before`) is apart from what every micro-batch runs (`steps`): weights are quantised
and packed once a step of the training. Buffers that end with a run share one arena, placed by how long each is needed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from runtime.program.compiler import pairs, products, quads
from runtime.program.compiler.axes import View, contiguous, join
from runtime.program.compiler.fusion import Fusion, Literal, Single, Stage
from runtime.program.compiler.graph import Graph
from runtime.program.compiler.loops import Kernel, kernel
from runtime.program.compiler.matrices import Atoms, fits
from runtime.program.program import Op
from runtime.program.types import NUMPY, Type

Strides = Sequence[Sequence[int]]
"""Of matrices, along both axes."""
ALIGNED = 64
INTO = ("scatter_add",)
"""Operators on whole arrays that can be told where to put their result."""


@dataclass(frozen=True)
class Buffer:
    """Elements in memory: a value's, or what a kernel made for another one."""

    dtype: str
    elements: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.elements * NUMPY[self.dtype].itemsize


@dataclass(frozen=True)
class Whole:
    """An operator on whole arrays: operands are views, or literals with the shape that they fill."""

    op: Op
    operands: tuple[View | tuple[Literal, Type], ...]
    output: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The buffers that it reads."""
        return tuple(o.buffer for o in self.operands if isinstance(o, View))

    @property
    def writes(self) -> tuple[int, ...]:
        """The buffer that it makes."""
        return (self.output,)


@dataclass(frozen=True)
class Loop:
    """A kernel's run: its table is the buffers read, then those written, then scratch."""

    kernel: Kernel
    kind: str

    @property
    def reads(self) -> tuple[int, ...]:
        """The buffers that it reads."""
        return self.kernel.reads

    @property
    def writes(self) -> tuple[int, ...]:
        """The buffers that it makes."""
        return (*self.kernel.writes, *(v for v, _, _ in self.kernel.accumulators))


Step = Whole | Loop


@dataclass
class Part:
    """Steps that run together. `offsets` places buffers in an arena of `arena` bytes; `dead[i]` ends with step i."""

    steps: list[Step]
    offsets: dict[int, int]
    arena: int
    dead: list[tuple[int, ...]]


@dataclass
class Plan:
    """Steps of a graph. `views` says where each output and saved value lies."""

    graph: Graph
    before: Part
    main: Part
    buffers: dict[int, Buffer]
    views: Mapping[int, View]
    fixed: frozenset[int]
    """Buffers that `before` makes and `main` or the caller reads."""
    added: frozenset[int]
    """Outputs that are added to what their buffers hold: arrays of the caller's."""


class _Planner:
    def __init__(self, graph: Graph, inputs: Mapping[int, View], stable: int) -> None:
        self.graph = graph
        self.fusion = Fusion(graph, dict(inputs))
        self.buffers = {v.buffer: Buffer(graph.types[n].dtype, _span(v)) for n, v in inputs.items()}
        self.packs: dict[Hashable, int] = {}
        self.lefts: dict[View, tuple[int, int, quads.Rows]] = {}
        self.words: dict[tuple[View, ...], tuple[int, int]] = {}
        self.next = max(graph.types, default=0) + 1
        self.early: set[int] = set()
        self.before: list[Step] = []
        self.steps: list[Step] = []
        dynamic = {v for v in inputs if v >= stable}
        for value, op in graph.ops.items():
            if any(o in dynamic for o in op.inputs):
                dynamic.add(value)
        graph.added = frozenset(v for v in graph.added if v in dynamic and 0 not in graph.types[v].shape)
        first = [v for v in graph.ops if v not in dynamic]
        self._take(self.fusion.run(first), self.before)
        self.early = {b for step in self.before for b in step.writes} | {inputs[v].buffer for v in inputs if v < stable}
        self._take(self.fusion.run([v for v in graph.ops if v in dynamic]), self.steps)

    def _take(self, stages: Iterable[Stage], steps: list[Step]) -> None:
        for stage in stages:
            for single in stage.singles:
                self._single(single, steps)
            for cluster in stage.clusters:
                made = kernel(self.fusion, cluster)
                if made.writes or made.accumulators or any(m.op.name == "rint" for m in cluster.members.values()):
                    for value in (*made.writes, *(v for v, _, _ in made.accumulators)):
                        self.buffers[value] = Buffer(self.graph.types[value].dtype, _span(self.fusion.views[value]))
                    steps.append(Loop(made, "loops"))

    def _single(self, single: Single, steps: list[Step]) -> None:
        self.buffers[single.value] = Buffer(single.op.type.dtype, single.op.type.elements)
        if single.op.name == "product" and self._product(single, steps):
            return
        operands = tuple(
            o if isinstance(o, View) else (o, self.graph.types[v])
            for o, v in zip(single.operands, single.op.inputs, strict=True)
        )
        steps.append(Whole(single.op, operands, single.value))

    # --------------------------------------------------------------------------------------------------------- products

    def _product(self, single: Single, steps: list[Step]) -> bool:
        """Packs the operands and multiplies by a kernel of ours; False where it does not take them."""
        make = {products.VNNI: self._quads, products.SDOT: self._quads, products.PAIRS: self._pairs}.get(
            products.chosen()
        )
        views = [o for o in single.operands if isinstance(o, View)]
        if make is None or 0 in single.op.type.shape or len(views) != len(single.operands) or not views[0].shape[-1]:
            return False
        found = [View(v.buffer, v.offset, v.dims[-2:]).strided() for v in views]
        strides = [s[1] for s in found if s is not None]
        if len(strides) != len(views) or not all(fits(_batch(v)) for v in views):
            return False  # a matrix does not lie at even distances
        made = make(single.op, views, strides, steps)
        if made is not None:
            steps.append(Loop(replace(made, writes=(single.value,), label=single.op.label), "products"))
        return made is not None

    def _pairs(self, op: Op, views: Sequence[View], strides: Strides, steps: list[Step]) -> Kernel | None:
        """The product of 16-bit pairs; None where combinations of digits do not fit them."""
        count, (*leading, m, n), k = op.attributes["lefts"], op.type.shape, views[0].shape[-1]
        batch, chosen = math.prod(leading), pairs.combinations(count, op.attributes["terms"])
        if chosen is None:
            return None
        lefts, rights = tuple(views[:count]), tuple(views[count:])
        if lefts not in self.words:
            across = [(s[1], s[0]) for s in strides[:count]]
            made = self._new("i32", batch * m * pairs.row_words(k, count)), self._new("i32", batch * m * 2)
            text = pairs.pack_left(along=_along(across, "other"), digits=count)
            size = (batch * -(-m // pairs.BLOCK), batch * m * k)
            self._pack_words(text, size, lefts, made, pairs.pack_sizes(k=k, n=m, sources=_lie(lefts, across)), steps)
            self.words[lefts] = made
        if (rights, chosen) not in self.packs:
            panels = batch * pairs.panels(n)
            right = self._new("i32", panels * pairs.words(k, count) * pairs.panel_columns())
            text = pairs.pack_right(along=_along(strides[count:], "other"), given=len(rights), chosen=chosen)
            sizes = pairs.pack_sizes(k=k, n=n, sources=_lie(rights, strides[count:]))
            self._pack_words(text, (panels, batch * k * n), rights, (right,), sizes, steps)
            self.packs[rights, chosen] = right
        return _plain(
            "product",
            pairs.product(),
            (batch * pairs.tiles(m), batch * m * n * k),
            (*self.words[lefts], self.packs[rights, chosen]),
            constants=pairs.product_sizes(m=m, n=n, k=k, digits=count),
        )

    def _pack_words(
        self,
        text: str,
        size: tuple[int, int],
        views: Sequence[View],
        made: tuple[int, ...],
        sizes: tuple[int, ...],
        steps: list[Step],
    ) -> None:
        early = all(v.buffer in self.early for v in views)
        packed = _plain("pack", text, size, tuple(v.buffer for v in views), made, sizes)
        (self.before if early else steps).append(Loop(packed, "packing"))

    def _quads(self, op: Op, views: Sequence[View], strides: Strides, steps: list[Step]) -> Kernel:
        count, (*leading, m, n), k = op.attributes["lefts"], op.type.shape, views[0].shape[-1]
        batch = math.prod(leading)
        lefts = [self._left(v, s, (batch, k, m), steps) for v, s in zip(views[:count], strides[:count], strict=True)]
        rights = [self._pack(v, s, (k, n), True, steps) for v, s in zip(views[count:], strides[count:], strict=True)]
        rows = [left[2] for left in lefts]
        levels = _levels(op.attributes["terms"])
        return _plain(
            "product",
            quads.product(lefts=tuple(r.direct for r in rows), rights=len(rights), levels=levels),
            (batch * quads.tiles(m), batch * m * n * k),
            (*(left[0] for left in lefts), *(left[1] for left in lefts), *rights),
            constants=quads.product_sizes(m=m, n=n, k=k, lefts=rows),
        )

    def _left(
        self, view: View, strides: Sequence[int], sizes: tuple[int, int, int], steps: list[Step]
    ) -> tuple[int, int, quads.Rows]:
        """A's buffer, the buffer of its rows' ranges, and where its rows lie."""
        if view in self.lefts:
            return self.lefts[view]
        batch, k, m = sizes
        if strides[1] == 1 and k % 4 == 0 and (strides[0] >= k or m == 1):
            buffer, rows = view.buffer, quads.Rows(view.offset, _batch(view), strides[0])
        else:
            buffer = self._pack(view, strides, (k, m), False, steps)
            rows = quads.Rows(0, ((batch, quads.padded(m) * -(-k // 4) * 4),), None)
        ranges = self._new("i32", batch * 3 * quads.padded(m))
        numbers = quads.scan_sizes(m=m, k=k, rows=rows)
        text = quads.scan(direct=rows.direct)
        made = _plain("scan", text, (batch, batch * m * k), (buffer,), (ranges,), numbers)
        self._when(view, steps).append(Loop(made, "packing"))
        self.lefts[view] = (buffer, ranges, rows)
        return self.lefts[view]

    def _pack(self, view: View, strides: Sequence[int], sizes: tuple[int, int], right: bool, steps: list[Step]) -> int:
        """The buffer of an operand in panels."""
        if (view, right) not in self.packs:
            k, n = sizes
            batch = _batch(view)
            along = (strides[0], strides[1]) if right else (strides[1], strides[0])
            count = math.prod(size for size, _ in batch)
            made = self._new("i8", count * quads.padded(n) * -(-k // 4) * 4)
            text = quads.pack(along=_along([along], "n"), right=right)
            numbers = quads.pack_sizes(k=k, n=n, offset=view.offset, batch=batch, strides=along)
            size = (count * quads.padded(n) // quads.panel_columns(), count * k * n)
            packed = _plain("pack", text, size, (view.buffer,), (made,), numbers)
            self._when(view, steps).append(Loop(packed, "packing"))
            self.packs[view, right] = made
        return self.packs[view, right]

    def _when(self, view: View, steps: list[Step]) -> list[Step]:
        return self.before if view.buffer in self.early else steps

    def _new(self, dtype: str, elements: int) -> int:
        self.next += 1
        self.buffers[self.next] = Buffer(dtype, elements)
        return self.next


def _plain(
    name: str,
    text: str,
    size: tuple[int, int],
    reads: tuple[int, ...],
    writes: tuple[int, ...] = (),
    constants: tuple[int, ...] = (),
) -> Kernel:
    """A kernel of so many rows and so much work, without accumulators and scratch."""
    rows, work = size
    return Kernel(
        name=name,
        text=text,
        rows=rows,
        work=work,
        reads=reads,
        writes=writes,
        accumulators=(),
        scratch=(),
        label="",
        constants=constants,
    )


def _along(strides: Strides, other: str) -> str:
    """The axis along which all of some (stride along K, stride along the other axis) are 1: "k", `other` or none."""
    return next((axis for place, axis in ((1, other), (0, "k")) if all(s[place] == 1 for s in strides)), "")


def _lie(views: Sequence[View], strides: Strides) -> list[tuple[int, Atoms, tuple[int, int]]]:
    """Where operands lie, as `pairs.pack_sizes` takes it."""
    return [(v.offset, _batch(v), (s[0], s[1])) for v, s in zip(views, strides, strict=True)]


def _levels(terms: Sequence[tuple[int, int, int]]) -> quads.Levels:
    """Terms by falling shift, with how far to shift after each level."""
    shifts = sorted({s for _, _, s in terms}, reverse=True)
    return tuple(
        (tuple((i, j) for i, j, s in terms if s == shift), shift - following)
        for shift, following in zip(shifts, [*shifts[1:], 0], strict=True)
    )


def _batch(view: View) -> Atoms:
    """Sizes and strides of the axes before the matrices."""
    return tuple(join([atom for dim in view.dims[:-2] for atom in dim if atom[0] > 1]))


def _span(view: View) -> int:
    """How many elements the buffer of a view has, when the view shows all of it."""
    return math.prod(n for atoms in view.dims for n, s in atoms if s)


def make_plan(graph: Graph, *, stable: int = 0, given: Mapping[int, View] | None = None) -> Plan:
    """The plan of a graph whose first `stable` inputs are parameters; `given` says where handed values lie."""
    inputs = {n: contiguous(n, t.shape) for n, t in enumerate(graph.inputs)}
    planner = _Planner(graph, inputs | dict(given or {}), stable)
    results = {planner.fusion.views[v].buffer for v in (*graph.outputs, *graph.saved) if v not in graph.literals}
    made_early = {b for step in planner.before for b in step.writes}
    read_late = {b for step in planner.steps for b in step.reads}
    fixed = made_early & (read_late | results)
    return Plan(
        graph=graph,
        before=_part(planner.before, fixed, planner.buffers),
        main=_part(planner.steps, results, planner.buffers),
        buffers=planner.buffers,
        views=planner.fusion.views,
        fixed=frozenset(fixed),
        added=graph.added & {b for step in planner.steps if isinstance(step, Loop) for b in step.writes},
    )


def _part(steps: list[Step], kept: set[int], buffers: Mapping[int, Buffer]) -> Part:
    """Steps with their memory: what is in `kept` outlives them, everything else is placed in an arena."""
    free = {b for step in steps for b in step.writes} - kept
    offsets, arena = _place(steps, free, buffers)
    return Part(steps, offsets, arena, _last_uses(steps, free))


def _last_uses(steps: Sequence[Step], free: set[int]) -> list[tuple[int, ...]]:
    """For every step the buffers of `free` that no later one touches."""
    last: dict[int, int] = {}
    for place, step in enumerate(steps):
        for buffer in (*step.reads, *step.writes):
            if buffer in free:
                last[buffer] = place
    dead: list[list[int]] = [[] for _ in steps]
    for buffer, place in last.items():
        dead[place].append(buffer)
    return [tuple(buffers) for buffers in dead]


def _place(steps: Sequence[Step], free: set[int], buffers: Mapping[int, Buffer]) -> tuple[dict[int, int], int]:
    """Offsets into one arena: the largest buffers first, each at the lowest place free for as long as it lives."""
    lives: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Loop) or step.op.name in INTO:
            lives |= {buffer: [place, place] for buffer in step.writes if buffer in free and buffer not in lives}
        for buffer in (*step.reads, *step.writes):  # parts of one array may come from several kernels
            if buffer in lives:
                lives[buffer][1] = place
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    for buffer in sorted(lives, key=lambda b: (-buffers[b].bytes, b)):
        size = max(ALIGNED, -(-buffers[buffer].bytes // ALIGNED) * ALIGNED)
        first, last = lives[buffer]
        offset = 0
        for start, end, born, died in sorted(placed):
            if born <= last and first <= died:
                if start - offset >= size:
                    break
                offset = max(offset, end)
        offsets[buffer] = offset
        placed.append((offset, offset + size, first, last))
    return offsets, max((end for _, end, _, _ in placed), default=0)
