"""Cuts a graph into clusters: operators that run in one nest of loops, stage by stage.

A stage first runs what is no loop (products, rows by index, copies that no view can express) on arrays that are there,
then clusters. Within a stage an operator joins the cluster of its operands, or joins several into one, where they
can share loops; where it cannot, its operands are stored and it waits for the next stage. So clusters of a stage never
wait for one another, and joining them is always possible in time.

Sums and maxima over the innermost loops (`inner`) end inside the cluster: a softmax or a layer norm is one cluster.
Over other loops they end with it: every row adds to an array in memory (`kept`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.program.compiler.axes import (
    Atom,
    Axes,
    Axis,
    Dim,
    Dims,
    View,
    contiguous,
    reshape_dims,
    reshape_view,
    slice_view,
)
from runtime.program.compiler.graph import ELEMENTWISE, REDUCTIONS, VIEWS, Graph, ranges
from runtime.program.program import Op


@dataclass(frozen=True)
class Literal:
    """An operand that is one known element."""

    dtype: str
    bits: int


@dataclass(frozen=True)
class Load:
    """An operand that is read from memory: the view, and the axes of its dimensions."""

    view: View
    dtype: str
    dims: Dims


@dataclass(frozen=True)
class Local:
    """An operand made in the same cluster: a value's number."""

    value: int


Operand = Literal | Load | Local


@dataclass
class Member:
    """A value made in a cluster."""

    op: Op
    operands: tuple[Operand, ...]
    dims: Dims
    kept: tuple[Axis, ...] | None = None
    """For a sum or maximum that ends with the cluster: the axes that its array has."""


@dataclass
class Cluster:
    """Operators that share loops. `space` are all its axes, `inner` those of its inner loops once a sum chose them."""

    stage: int
    space: tuple[Axis, ...] = ()
    inner: tuple[Axis, ...] | None = None
    members: dict[int, Member] = field(default_factory=dict)
    votes: list[tuple[int, Axis]] = field(default_factory=list)
    accumulates: bool = False

    @property
    def frozen(self) -> bool:
        """Whether it can take no further axes."""
        return self.inner is not None or self.accumulates

    @property
    def sums(self) -> int:
        """How many sums and maxima it has."""
        return sum(member.op.name in REDUCTIONS for member in self.members.values())


@dataclass(frozen=True)
class Single:
    """An operator that is no loop, run on whole arrays."""

    value: int
    op: Op
    operands: tuple[View | Literal, ...]


@dataclass
class Stage:
    """What runs in a stage: singles in order, then clusters in any order."""

    singles: list[Single]
    clusters: list[Cluster]


@dataclass(frozen=True)
class Inside:
    """A value that a cluster of the current stage makes: which value, under which dimensions."""

    source: int
    dims: Dims


@dataclass(frozen=True)
class Home:
    """The place of a value in a concatenation: in which, its dimensions, where along the axis it begins."""

    joined: int
    dims: Dims
    axis: int
    start: int


@dataclass(frozen=True)
class Layout:
    """Where a stored value lies: in which buffer, where it begins, its stride along each axis."""

    buffer: int
    offset: int
    strides: dict[Axis, int]


class Fusion:
    """One pass over a graph. `views` has where each value that is in memory lies, in the end all that were needed."""

    def __init__(self, graph: Graph, inputs: dict[int, View]) -> None:
        self.graph, self.axes = graph, Axes()
        self.ranges = ranges(graph)
        self.views: dict[int, View] = dict(inputs)
        self.stored: set[int] = set()
        self._inside: dict[int, Inside] = {}
        self._cluster: dict[int, Cluster] = {}
        self._waiting: dict[int, Op] = dict(graph.ops)
        self._by_view: dict[tuple[Any, ...], tuple[Cluster, Dims]] = {}
        self._lazy: set[int] = set()
        self._homes: dict[int, Home] = {}
        self._joined: list[int] = []
        """The concatenations whose parts the clusters of this stage make."""
        self._rank = {value: rank for rank, value in enumerate(graph.ops)}

    # ---------------------------------------------------------------------------------------------------- the stages

    def run(self, values: Iterable[int]) -> list[Stage]:
        """The stages that make `values` of the graph, all that their operands need being made."""
        waiting = {v: self._waiting.pop(v) for v in values if v in self._waiting}
        later = {o for op in self._waiting.values() for o in op.inputs}
        later |= {*self.graph.outputs, *self.graph.saved}
        self._lazy = lazy_values(self.graph) - later
        stages: list[Stage] = []
        while waiting:
            before = len(waiting)
            stages.append(self._stage(len(stages), waiting, later))
            if len(waiting) == before:
                raise AssertionError(f"nothing can run of {[op.name for op in waiting.values()][:5]}")
        return stages

    def _stage(self, number: int, waiting: dict[int, Op], later: set[int]) -> Stage:
        stage = Stage(singles=[], clusters=[])
        self._inside, self._cluster, self._by_view, self._joined = {}, {}, {}, []
        for value in list(waiting):
            if value in waiting and value not in self._lazy:
                self._try(value, waiting, number, stage)
        wanted = later | {o for op in waiting.values() for o in op.inputs}
        self._finish(stage, wanted)
        return stage

    def _try(self, value: int, waiting: dict[int, Op], number: int, stage: Stage) -> bool:
        """Places an operator, after the lazy ones that it reads; False where it has to wait."""
        op = waiting[value]
        missing = [o for o in dict.fromkeys(op.inputs) if self._where(o) is None]
        if any(o not in self._lazy or o not in waiting for o in missing):
            return False
        for operand in missing:  # one may have been placed for another
            if operand in waiting and not self._try(operand, waiting, number, stage):
                return False
        if not self._place(value, op, number, stage):
            return False
        del waiting[value]
        return True

    def _place(self, value: int, op: Op, number: int, stage: Stage) -> bool:
        """Puts an operator into this stage if it can run in it."""
        where = [self._where(o) for o in op.inputs]
        inside = any(isinstance(w, Inside) for w in where)
        if op.name in VIEWS:
            if self._moved(value, op, where[0]):
                return True
        elif op.name in ELEMENTWISE:
            if self._join(value, op, where, number):
                return True
        elif op.name == "concat":
            if self._home(value, op, where):
                return True
        elif op.name in REDUCTIONS and not isinstance(where[0], Literal) and self._reduce(value, op, where[0], number):
            return True
        if inside:
            return False
        stage.singles.append(Single(value, op, tuple(where)))
        self.views[value] = contiguous(value, op.type.shape)
        self.stored.add(value)
        return True

    def _where(self, value: int) -> Any:
        if value in self.graph.literals:
            return Literal(*self.graph.literals[value])
        return self.views.get(value) or self._inside.get(value)

    def _finish(self, stage: Stage, wanted: set[int]) -> None:
        """Stores what is wanted later and settles where it lies."""
        clusters = list({id(c): c for c in self._cluster.values()}.values())
        for cluster in clusters:
            cluster.space = self.axes.leaves(cluster.space)
            cluster.inner = None if cluster.inner is None else self.axes.leaves(cluster.inner)
            self._order(cluster)
        for value, inside in self._inside.items():
            if value in wanted or inside.source in wanted:
                self.stored.add(inside.source)
        self.stored |= {source for source, home in self._homes.items() if home.joined in self._joined}
        layouts: dict[int, Layout] = {}
        for cluster in clusters:
            for value, member in cluster.members.items():
                if value in self.stored or member.kept is not None:
                    self.stored.add(value)
                    layouts[value] = self._layout(cluster, value, member)
        for value, inside in self._inside.items():
            if inside.source in layouts:
                self.views[value] = self._view(inside, self.graph.types[value].shape, layouts[inside.source])
        for cluster in clusters:
            for value, member in cluster.members.items():
                if member.kept is not None:
                    dims = member.dims
                    self.views[value] = self._view(Inside(value, dims), member.op.type.shape, layouts[value])
        for value in self._joined:
            self.views[value] = contiguous(value, self.graph.types[value].shape)
        stage.clusters += [c for c in clusters if c.members]

    def _layout(self, cluster: Cluster, value: int, member: Member) -> Layout:
        """In the order of its dimensions for an output, a part of one and numbers of rows, else in that of the loops.

        Numbers of rows are few to write, and others may read them along rows of their own.
        """
        if value in self._homes:
            return self._part(self._homes[value])
        own = [a for dim in member.dims if dim for a in self.axes.leaves(dim)]
        full = cluster.space and cluster.space[-1] in own
        order = [a for a in cluster.space if a in own] if full and value not in self.graph.outputs else own
        strides, stride = {}, 1
        for axis in reversed(order):
            strides[axis] = stride
            stride *= self.axes.size(axis)
        return Layout(value, 0, strides)

    def _part(self, home: Home) -> Layout:
        """In the order of the concatenation's dimensions, each of which may be longer than the part's."""
        strides: dict[Axis, int] = {}
        stride, offset = 1, 0
        shape = self.graph.types[home.joined].shape
        for number, (dim, size) in reversed(list(enumerate(zip(home.dims, shape, strict=True)))):
            inner = stride
            for axis in reversed(self.axes.leaves(dim or ())):
                strides[axis] = inner
                inner *= self.axes.size(axis)
            if number == home.axis:
                offset = home.start * stride
            stride *= size
        return Layout(home.joined, offset, strides)

    def _view(self, inside: Inside, shape: Sequence[int], layout: Layout) -> View:
        dims: list[tuple[Atom, ...]] = []
        for dim, size in zip(inside.dims, shape, strict=True):
            if dim is None:
                dims.append(((size, 0),))
            else:
                dims.append(tuple((self.axes.size(a), layout.strides[a]) for a in self.axes.leaves(dim)))
        return View(layout.buffer, layout.offset, tuple(dims))

    def _order(self, cluster: Cluster) -> None:
        """Orders the axes as the largest arrays that are read lie in memory, inner loops last."""
        loads = [o for m in cluster.members.values() for o in m.operands if isinstance(o, Load)]
        strides: dict[Axis, int] = {}
        for load in sorted(loads, key=lambda load: -load.view.elements):
            for axis, stride in self.strides(load).items():
                if stride:
                    strides.setdefault(axis, stride)
        known = sorted(cluster.space, key=lambda a: -strides.get(a, 0))
        if cluster.inner is None:
            cluster.inner = (known[-1],) if known else ()
        inner = set(cluster.inner)
        cluster.space = (*(a for a in known if a not in inner), *(a for a in known if a in inner))
        cluster.inner = tuple(a for a in known if a in inner)

    def strides(self, load: Load) -> dict[Axis, int]:
        """The stride of a load along each axis of its dimensions."""
        found: dict[Axis, int] = {}
        for dim, atoms in zip(load.dims, load.view.dims, strict=True):
            if dim:
                found |= self.axes.strides(dim, atoms)
        return found

    # ----------------------------------------------------------------------------------------------------- movement

    def _moved(self, value: int, op: Op, where: Any) -> bool:
        """A view of a view, or of a value inside a cluster."""
        if isinstance(where, View):
            made = _move(where, op)
            if made is not None:
                self.views[value] = made
            return made is not None
        if op.name == "slice":
            return False
        before = self.graph.types[op.inputs[0]].shape
        dims: Dims | None = where.dims
        if op.name == "transpose":
            dims = tuple(where.dims[i] for i in op.attributes["order"])
        elif op.name == "broadcast":
            dims = tuple(
                None if n != m else dim for dim, n, m in zip(where.dims, before, op.attributes["shape"], strict=True)
            )
        else:
            saved = self.axes.save()
            dims = reshape_dims(self.axes, where.dims, before, op.attributes["shape"])
            if dims is None:
                self.axes.restore(saved)
        if dims is None:
            return False
        self._inside[value] = Inside(where.source, dims)
        self._cluster[value] = self._cluster[where.source]
        return True

    def _home(self, value: int, op: Op, where: Sequence[Any]) -> bool:
        """Has the parts of a concatenation stored in its array, if clusters of this stage make them all."""
        homes: dict[int, Home] = {}
        start, axis = 0, op.attributes["axis"]
        for w, operand in zip(where, op.inputs, strict=True):
            if not isinstance(w, Inside) or None in w.dims:
                return False
            taken = w.source in homes or w.source in self._homes or w.source in self.graph.outputs
            if taken or self._cluster[w.source].members[w.source].kept is not None:
                return False
            homes[w.source] = Home(value, w.dims, axis, start)
            start += self.graph.types[operand].shape[axis]
        self._homes |= homes
        self._joined.append(value)
        return True

    # -------------------------------------------------------------------------------------------------- elementwise

    def _join(self, value: int, op: Op, where: Sequence[Any], number: int) -> bool:
        """Puts an elementwise operator into one cluster with those of its operands that are inside clusters."""
        if 0 in op.type.shape:
            return False
        clusters: list[Cluster] = []
        for w in where:
            if isinstance(w, Inside) and not any(c is self._cluster[w.source] for c in clusters):
                clusters.append(self._cluster[w.source])
        shared: Dims | None = None
        if not clusters:
            clusters, shared = self._sibling(where, number)
        saved = self.axes.save()
        made = self._dims(op, where, clusters, shared)
        if made is None or not self._merge(clusters, made, value, op, where, number):
            self.axes.restore(saved)
            return False
        return True

    def _sibling(self, where: Sequence[Any], number: int) -> tuple[list[Cluster], Dims | None]:
        """A cluster of this stage that reads the same array already."""
        views = sorted((w for w in where if isinstance(w, View)), key=lambda v: -v.elements)
        found = self._by_view.get((number, views[0])) if views and views[0].elements > 1 else None
        return ([found[0]], found[1]) if found else ([], None)

    def _dims(self, op: Op, where: Sequence[Any], clusters: Sequence[Cluster], shared: Dims | None) -> Dims | None:
        """The axes of an elementwise operator's dimensions; None where the operands do not fit into one space."""
        axes, shape = self.axes, op.type.shape
        before = [axes.leaves(c.space) for c in clusters]
        dims: list[Dim] = []
        for i, size in enumerate(shape):
            own: list[Dim] = [w.dims[i] for w in where if isinstance(w, Inside) and w.dims[i]]
            known = shared[i] if shared is not None else None
            if known and axes.sizes(axes.leaves(known)) == size:
                own.append(known)
            if size == 1:
                dims.append(())
                continue
            for other in own[1:]:
                if not axes.unify(own[0] or (), other or ()):
                    return None
            dims.append(own[0] if own else None)
        for i, size in enumerate(shape):
            if dims[i] is None and any(isinstance(w, View) and w.concrete(i) for w in where):
                dims[i] = self._free(clusters, dims, size)
        for w in where:
            if isinstance(w, View):
                for dim, atoms in zip(dims, w.dims, strict=True):
                    if dim and not axes.cut(dim, atoms):
                        return None
        for leaves in before:
            now = axes.leaves(leaves)
            if len(set(now)) != len(now):
                return None
        used = [a for dim in dims if dim for a in axes.leaves(dim)]
        return tuple(dims) if len(set(used)) == len(used) else None

    def _free(self, clusters: Sequence[Cluster], dims: Sequence[Dim], size: int) -> Dim:
        """Axes for a dimension that only arrays in memory have: loops that the operator does not use yet, or new."""
        used = {a for dim in dims if dim for a in self.axes.leaves(dim)}
        space = [a for c in clusters for a in self.axes.leaves(c.space)]
        free = [a for a in dict.fromkeys(space) if a not in used]
        if free and self.axes.sizes(free) == size:
            return tuple(free)
        single = [a for a in free if self.axes.size(a) == size]
        return (single[0],) if single else (self.axes.new(size),)

    def _merge(
        self, clusters: Sequence[Cluster], dims: Dims, value: int, op: Op, where: Sequence[Any], number: int
    ) -> bool:
        """Joins clusters and adds the operator; False where one of them could not take the others' axes."""
        axes = self.axes
        if sum(len(c.members) for c in clusters) >= MOST:
            return False
        if sum(c.sums for c in clusters) > SUMS:
            return False
        space = list(dict.fromkeys(a for c in clusters for a in axes.leaves(c.space)))
        space += [a for a in dict.fromkeys(a for dim in dims if dim for a in axes.leaves(dim)) if a not in space]
        inners = [set(axes.leaves(c.inner)) for c in clusters if c.inner is not None]
        if any(inner != inners[0] for inner in inners):
            return False
        spaces = [set(axes.leaves(c.space)) for c in clusters]
        if any(c.frozen and own != set(space) for c, own in zip(clusters, spaces, strict=True)):
            return False
        used = {a for dim in dims if dim for a in axes.leaves(dim)}
        if set(space) not in (used, *spaces):
            return False  # the loops of one would run once for each of the other's
        if value in self.graph.added and set(space) != used:
            return False  # it would be added once for each of the loops that it does not depend on
        cluster = clusters[0] if clusters else Cluster(number)
        for other in clusters[1:]:
            self._absorb(cluster, other)
        cluster.space = tuple(space)
        operands = tuple(self._operand(w, o, dims, cluster) for w, o in zip(where, op.inputs, strict=True))
        self._add(cluster, value, Member(op, operands, dims))
        cluster.accumulates |= value in self.graph.added
        for w in where:
            if isinstance(w, View):
                self._by_view.setdefault((number, w), (cluster, dims))
        return True

    def _absorb(self, cluster: Cluster, other: Cluster) -> None:
        both = {**cluster.members, **other.members}
        cluster.members = dict(sorted(both.items(), key=lambda item: self._rank[item[0]]))
        cluster.votes += other.votes
        cluster.accumulates |= other.accumulates
        cluster.inner = other.inner if cluster.inner is None else cluster.inner
        for value, owner in self._cluster.items():
            if owner is other:
                self._cluster[value] = cluster
        for key, (owner, dims) in self._by_view.items():
            if owner is other:
                self._by_view[key] = (cluster, dims)

    def _operand(self, where: Any, number: int, dims: Dims, cluster: Cluster) -> Operand:
        if isinstance(where, Literal):
            return where
        if isinstance(where, Inside):
            return Local(where.source)
        named = tuple(dim if where.concrete(i) else None for i, dim in enumerate(dims))
        load = Load(where, self.graph.types[number].dtype, named)
        steps = [(a, s) for a, s in self.strides(load).items() if s]
        if steps:
            cluster.votes.append((where.elements, min(steps, key=lambda item: item[1])[0]))
        return load

    def _add(self, cluster: Cluster, value: int, member: Member) -> None:
        cluster.members[value] = member
        self._inside[value] = Inside(value, member.dims)
        self._cluster[value] = cluster

    # --------------------------------------------------------------------------------------------------- reductions

    def _reduce(self, value: int, op: Op, where: Any, number: int) -> bool:
        """A sum or maximum, inside the loops where it runs along memory, or over rows."""
        shape = self.graph.types[op.inputs[0]].shape
        if 0 in shape or all(shape[i] == 1 for i in op.attributes["axes"]):
            return False
        if isinstance(where, View):
            found = self._read_whole(where, op, number)
            if found is None:
                return False
            cluster, dims = found
            operand: Operand = self._operand(where, op.inputs[0], dims, cluster)
        else:
            cluster, operand = self._cluster[where.source], Local(where.source)
            if cluster.sums >= SUMS:
                return False
            dims = tuple(self._concrete(d, n) for d, n in zip(where.dims, shape, strict=True))
            fresh = {a for d in dims if d for a in d} - {a for d in where.dims if d for a in d}
            if not self._spans((*cluster.space, *fresh), dims) or (fresh and cluster.frozen):
                return False
            cluster.space = (*cluster.space, *fresh)
        self._close(cluster, value, op, operand, dims)
        return True

    def _read_whole(self, view: View, op: Op, number: int) -> tuple[Cluster, Dims] | None:
        """A cluster for a sum of an array in memory, one that reads it already if there is one, and its dimensions."""
        shape = self.graph.types[op.inputs[0]].shape
        known = self._by_view.get((number, view))
        if known is not None:
            cluster, dims = known
            if cluster.sums < SUMS and all(d is not None for d in dims) and self._spans(cluster.space, dims):
                return cluster, dims
        dims = tuple((self.axes.new(n),) if n > 1 else () for n in shape)
        if not all(self.axes.cut(d or (), a) for d, a in zip(dims, view.dims, strict=True)):
            return None
        cluster = Cluster(number, space=tuple(a for d in dims if d for a in self.axes.leaves(d)))
        self._by_view.setdefault((number, view), (cluster, dims))
        return cluster, dims

    def _concrete(self, dim: Dim, size: int) -> Dim:
        if dim is not None:
            return dim
        return (self.axes.new(size),) if size > 1 else ()

    def _spans(self, space: Sequence[Axis], dims: Dims) -> bool:
        """Whether the dimensions are all the axes of a space."""
        own = {a for d in dims if d for a in self.axes.leaves(d)}
        return own == set(self.axes.leaves(space))

    def _close(self, cluster: Cluster, value: int, op: Op, operand: Operand, dims: Dims) -> None:
        axes = self.axes
        over = [a for i in op.attributes["axes"] for a in axes.leaves(dims[i] or ())]
        kept = tuple(d for i, d in enumerate(dims) if i not in op.attributes["axes"])
        inner = None if cluster.inner is None else axes.leaves(cluster.inner)
        if inner is None and self._fastest(cluster, dims) in over:
            inner = tuple(over)
        if inner is not None and set(inner) == set(over):
            cluster.inner = tuple(inner)
            self._add(cluster, value, Member(op, (operand,), kept))
            return
        left = tuple(a for d in kept if d for a in axes.leaves(d))
        cluster.members[value] = Member(op, (operand,), kept, kept=left)
        self._cluster[value] = cluster
        cluster.accumulates = True

    def _fastest(self, cluster: Cluster, dims: Dims) -> Axis | None:
        """The axis along which most of what the cluster reads lies in memory."""
        tally: dict[Axis, int] = {}
        for weight, axis in cluster.votes:
            leaf = self.axes.leaves((axis,))[-1]
            tally[leaf] = tally.get(leaf, 0) + weight
        if tally:
            return max(tally, key=lambda a: tally[a])
        own = [a for d in dims if d for a in self.axes.leaves(d)]
        return own[-1] if own else None


LAZY = 4096
"""Values of fewer elements are made as soon as they can be."""
CHAIN = 50
"""Lazy values that wait for one another, at most."""
SUMS = 24
"""Sums and maxima in a cluster, at most: each is a loop of its own in one kernel, which LLVM takes more than in
proportion for (80 of them 11 s)."""
MOST = 1000
"""Operators in a cluster, at most: compiling takes longer than in proportion, and a Program is anybody's."""


def lazy_values(graph: Graph) -> set[int]:
    """Elementwise values larger than all that they are made of: better made where they are read than stored."""
    different: dict[int, int] = {n: t.elements for n, t in enumerate(graph.inputs)}
    lazy: dict[int, int] = {}
    for value, op in graph.ops.items():
        operands = [o for o in op.inputs if o not in graph.literals]
        elements = op.type.elements
        small = bool(operands) and all(o in lazy or different.get(o, elements) < elements for o in operands)
        if op.name == "broadcast":
            different[value] = different.get(op.inputs[0], 1)
        elif op.name in VIEWS and operands:
            different[value] = min(elements, different.get(op.inputs[0], elements))
        else:
            different[value] = elements
        moved = op.name in VIEWS and bool(operands) and operands[0] in lazy
        depth = 1 + max((lazy.get(o, 0) for o in operands), default=0)
        if ((op.name in ELEMENTWISE and elements >= LAZY and small) or moved) and depth <= CHAIN:
            lazy[value] = depth
    return set(lazy)


def _move(view: View, op: Op) -> View | None:
    if op.name == "reshape":
        return reshape_view(view, op.attributes["shape"])
    if op.name == "transpose":
        return View(view.buffer, view.offset, tuple(view.dims[i] for i in op.attributes["order"]))
    if op.name == "slice":
        return slice_view(view, *(op.attributes[k] for k in ("axis", "start", "stop", "step")))
    dims = tuple(
        atoms if n == m else ((m, 0),)
        for atoms, n, m in zip(view.dims, view.shape, op.attributes["shape"], strict=True)
    )
    return View(view.buffer, view.offset, dims)
