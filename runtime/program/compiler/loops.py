"""How a cluster of operators becomes a loop: the CPU column of the operator table, as LLVM instructions.

A kernel walks rows, the outer axes of its cluster. In a row, single numbers (a mean, an exponent) are computed between
passes over the inner axes; a pass computes the operators that wait for no later number, adds to sums and maxima, and
writes what is stored. What a later pass needs again is read again, computed again if that is cheap, or kept in a row
of scratch memory that never leaves the first-level cache.

Between loads and stores there are only the table's operations in the Program's order: LLVM changes no rounding unless
fast-math flags allow it, and none are set here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llvmlite import ir

from runtime.program.compiler.axes import Axis
from runtime.program.compiler.fusion import Cluster, Fusion, Literal, Load, Local, Member, Operand
from runtime.program.program import Op
from runtime.program.types import NUMPY
from storage.native import F32, I1, I8, I32, I64, POINTER, Function, entry, features

TYPE: Mapping[str, ir.Type] = {"f32": F32, "i8": I8, "i32": I32, "i64": I64, "bool": I1}
MEMORY: Mapping[str, ir.Type] = {**TYPE, "bool": I8}

RECOMPUTED = 4
"""A value that costs no more operations than this is computed again in a later pass rather than kept."""
COST = {"div": 8, "sqrt": 12, "scale": 3, "rint": 2}


# ------------------------------------------------------------------------------------------------- the operator table

Meaning = Callable[[Function, list[ir.Value], Op, list[str]], ir.Value]
"""(function, operands, operator, their element types) -> the result."""


def _arithmetic(floating: str, integer: str) -> Meaning:
    def emit(f: Function, x: list[ir.Value], op: Op, dtypes: list[str]) -> ir.Value:
        return getattr(f.builder, floating if op.type.dtype == "f32" else integer)(*x)

    return emit


def _plain(name: str) -> Meaning:
    return lambda f, x, op, dtypes: getattr(f.builder, name)(*x)


def _shift(name: str) -> Meaning:
    return lambda f, x, op, dtypes: getattr(f.builder, name)(x[0], ir.Constant(x[0].type, op.attributes["amount"]))


def _compare(sign: str) -> Meaning:
    def emit(f: Function, x: list[ir.Value], op: Op, dtypes: list[str]) -> ir.Value:
        return f.builder.fcmp_ordered(sign, *x) if dtypes[0] == "f32" else f.builder.icmp_signed(sign, *x)

    return emit


def _clamp(f: Function, x: ir.Value, low: int, high: int) -> ir.Value:
    return f.intrinsic("llvm.smin.i32", I32, [f.intrinsic("llvm.smax.i32", I32, [x, I32(low)]), I32(high)])


def _power(f: Function, p: ir.Value) -> ir.Value:
    return f.builder.bitcast(f.builder.shl(f.builder.add(p, I32(127)), I32(23)), F32)


def scale(f: Function, value: ir.Value, p: ir.Value, low: int, high: int) -> ir.Value:
    """value * 2^p for low <= p <= high: one multiplication where that is a power for sure."""
    b = f.builder
    if low >= -126 and high <= 127:
        return b.fmul(value, _power(f, p))
    if low < -252 or high > 254:
        p = _clamp(f, p, -252, 254)
    first = _clamp(f, p, -126, 127)
    return b.fmul(b.fmul(value, _power(f, first)), _power(f, b.sub(p, first)))


def _rint(f: Function, x: list[ir.Value], op: Op, dtypes: list[str]) -> ir.Value:
    rounded = f.intrinsic("llvm.rint.f32", F32, x)
    return f.builder.fptosi(rounded, TYPE[op.type.dtype])


def excess(f: Function, x: ir.Value, op: Op) -> ir.Value:
    """By how much the bits of |x| exceed those of what `rint` refuses from: it accepts x where this is negative.

    Bits of numbers without a sign are ordered as the numbers are, NaN last. From 2^23 on every binary32 is an integer,
    so x itself may be compared with more than that. Keeping the largest costs a loop less than keeping a flag.
    """
    bound, b = op.attributes["bound"], f.builder
    inspected = x if bound > 23 else f.intrinsic("llvm.rint.f32", F32, [x])
    return b.sub(b.and_(b.bitcast(inspected, I32), I32(0x7FFFFFFF)), I32((bound + 127) << 23))


def _cast(f: Function, x: list[ir.Value], op: Op, dtypes: list[str]) -> ir.Value:
    target = TYPE[op.type.dtype]
    if dtypes[0] == "bool":
        return f.builder.zext(x[0], target)
    if x[0].type.width == target.width:
        return x[0]
    return f.builder.sext(x[0], target) if x[0].type.width < target.width else f.builder.trunc(x[0], target)


MEANING: Mapping[str, Meaning] = {
    "add": _arithmetic("fadd", "add"),
    "sub": _arithmetic("fsub", "sub"),
    "mul": _arithmetic("fmul", "mul"),
    "div": _plain("fdiv"),
    "sqrt": lambda f, x, op, dtypes: f.intrinsic("llvm.sqrt.f32", F32, x),
    "scale": lambda f, x, op, dtypes: scale(f, x[0], x[1], -(2**31), 2**31 - 1),
    "and": _plain("and_"),
    "or": _plain("or_"),
    "xor": _plain("xor"),
    "shl": _shift("shl"),
    "shr": _shift("ashr"),
    "eq": _compare("=="),
    "lt": _compare("<"),
    "le": _compare("<="),
    "select": _plain("select"),
    "rint": _rint,
    "float": lambda f, x, op, dtypes: f.builder.sitofp(x[0], F32),
    "cast": _cast,
    "digit": lambda f, x, op, dtypes: f.builder.trunc(_clamp(f, x[0], -64, 64), I8),
    "bitcast": lambda f, x, op, dtypes: f.builder.bitcast(x[0], TYPE[op.type.dtype]),
}
"""The compiled column of the operator table; sums and maxima are carried by the loops."""


def constant(dtype: str, bits: int) -> ir.Constant:
    """A literal."""
    if dtype != "f32":
        return ir.Constant(TYPE[dtype], bits)
    return ir.Constant(I32, bits - 2**32 if bits >= 2**31 else bits).bitcast(F32)  # a constant expression: exact bits


# ------------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Access:
    """An array that a kernel reads or writes: a buffer, where it starts, its stride along each axis (elements)."""

    buffer: int
    dtype: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled cluster: `text` defines `name`, a function over 0 .. rows.

    Its table has the buffers of `reads`, of `writes`, of `accumulators` (value, operator, elements), then a row of
    `scratch` bytes each, the last two private to a thread, and an i64 array of `constants` if there are any.
    """

    name: str
    text: str
    rows: int
    work: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    accumulators: tuple[tuple[int, str, int], ...]
    scratch: tuple[int, ...]
    label: str
    constants: tuple[int, ...] = ()


class _Body:
    """The code of one cluster while it is written."""

    def __init__(self, fusion: Fusion, cluster: Cluster, stored: set[int]) -> None:
        self.fusion, self.cluster = fusion, cluster
        self.members: dict[int, Member] = cluster.members
        self.reduces = [v for v, m in self.members.items() if m.op.name in ("sum", "max") and m.kept is None]
        self.kept = [v for v, m in self.members.items() if m.kept is not None]
        self.stores = [v for v, m in self.members.items() if v in stored and m.kept is None]
        self.groups, self.outer = self._collapse()
        self._times()

    # ------------------------------------------------------------------------------------------------- what goes where

    def _kept_strides(self, value: int) -> dict[Axis, int]:
        """Strides of what a value is stored as, from its own view."""
        view, dims = self.fusion.views[value], self.members[value].dims
        found: dict[Axis, int] = {}
        for dim, atoms in zip(dims, view.dims, strict=True):
            if dim:
                found |= self.fusion.axes.strides(dim, atoms)
        return found

    def _collapse(self) -> tuple[list[tuple[Axis, ...]], int]:
        """Axes in loop order, neighbours joined where every array allows it; how many of the loops are outer ones."""
        axes, cluster = self.fusion.axes, self.cluster
        inner = set(cluster.inner or ())
        arrays = [self.fusion.strides(o) for m in self.members.values() for o in m.operands if isinstance(o, Load)]
        arrays += [self._kept_strides(v) for v in (*self.stores, *self.kept)]

        def joins(before: Axis, axis: Axis) -> bool:
            if self.reduces and (before in inner) != (axis in inner):
                return False
            return all(a.get(before, 0) == a.get(axis, 0) * axes.size(axis) for a in arrays)

        groups: list[tuple[Axis, ...]] = []
        for axis in cluster.space:
            if groups and joins(groups[-1][-1], axis):
                groups[-1] = (*groups[-1], axis)
            else:
                groups.append((axis,))
        if not self.reduces:
            return groups, max(len(groups) - 1, 0)
        return groups, sum(1 for g in groups if g[0] not in inner)

    def size(self, group: int) -> int:
        """The number of iterations of a loop."""
        return self.fusion.axes.sizes(self.groups[group])

    @property
    def inner_sizes(self) -> list[int]:
        """The inner loops' iterations."""
        return [self.size(g) for g in range(self.outer, len(self.groups))]

    def along(self, strides: Mapping[Axis, int]) -> list[int]:
        """Strides by loop: that of the innermost axis of each."""
        return [strides.get(group[-1], 0) for group in self.groups]

    def full(self, axes: Sequence[Axis]) -> bool:
        """Whether a value with these axes differs along the inner loops."""
        own = set(axes)
        return any(a in own for g in self.groups[self.outer :] for a in g)

    def value_axes(self, value: int) -> tuple[Axis, ...]:
        """The axes of a member."""
        return tuple(a for d in self.members[value].dims if d for a in self.fusion.axes.leaves(d))

    def _operand_full(self, operand: Operand) -> bool:
        if isinstance(operand, Literal):
            return False
        if isinstance(operand, Load):
            return self.full([a for a, s in self.fusion.strides(operand).items() if s])
        return self.is_full[operand.value]

    def _times(self) -> None:
        """When each member is ready: in pass `time`, or for a row's numbers before that pass."""
        self.is_full: dict[int, bool] = {}
        self.time: dict[int, int] = {}
        for value, member in self.members.items():
            ready = [self.time[o.value] for o in member.operands if isinstance(o, Local)]
            if value in self.reduces:
                self.is_full[value] = False
                self.time[value] = max(ready, default=0) + 1
            else:
                spans = value in self.kept or self.full(self.value_axes(value))
                self.is_full[value] = spans or any(map(self._operand_full, member.operands))
                self.time[value] = max(ready, default=0)
        self.cost: dict[int, int] = {}
        self.buffered: list[int] = []
        uses: dict[int, int] = {}
        for value, member in self.members.items():
            at = self.time[value] - 1 if value in self.reduces else self.time[value]
            for o in member.operands:
                if isinstance(o, Local):
                    uses[o.value] = max(uses.get(o.value, 0), at)
        for value, member in self.members.items():
            if not self.is_full[value] or value in self.kept:
                continue
            self.cost[value] = COST.get(member.op.name, 1) + sum(map(self._operand_cost, member.operands))
            reused = uses.get(value, 0) > self.time[value]
            if reused and self.cost[value] > RECOMPUTED:
                self.cost[value] = 1
                self.buffered.append(value)

    def _operand_cost(self, operand: Operand) -> int:
        if isinstance(operand, Local):
            return self.cost.get(operand.value, 0)
        return 1 if self._operand_full(operand) else 0

    # --------------------------------------------------------------------------------------------------------- writing

    def write(self) -> Kernel:
        """The kernel."""
        loads = list(dict.fromkeys(o for m in self.members.values() for o in m.operands if isinstance(o, Load)))
        reads = list(dict.fromkeys(o.view.buffer for o in loads))
        scratch = [v for v in self.buffered if not self._reread(v)]
        writes = list(dict.fromkeys(self.fusion.views[v].buffer for v in self.stores))
        count = len(reads) + len(writes) + len(self.kept) + len(scratch)
        f = self.f = Function("body", [I64, I64, *[POINTER] * count])
        pointers = list(f.arguments[2:])
        self.read = dict(zip(reads, pointers, strict=False))
        rest = pointers[len(reads) :]
        targets = dict(zip([*writes, *self.kept], rest, strict=False))
        self.target = {v: targets[self.fusion.views[v].buffer] for v in (*self.stores, *self.kept)}
        self.scratch = dict(zip(scratch, rest[len(targets) :], strict=True))
        self.bad = f.builder.alloca(I32)
        f.builder.store(I32(0), self.bad)
        outer = [self.size(g) for g in range(self.outer)]
        single = not outer and self.reduces
        with ExitStack() as stack:
            self.index: list[ir.Value] = []
            for depth, size in enumerate(outer):
                bounds = f.arguments[:2] if depth == 0 else (0, size)
                self.index.append(stack.enter_context(f.loop(*bounds))[0])
            self._row(None if outer or single else tuple(f.arguments[:2]))
        f.builder.ret(f.builder.load(self.bad, typ=I32))
        text = _vectorise(entry("kernel", f, count))
        inner = math.prod(self.inner_sizes)
        rows = outer[0] if outer else (1 if single or not self.groups else self.size(0))
        return Kernel(
            name="kernel",
            text=text,
            rows=rows,
            work=math.prod(outer) * inner * max(1, len(self.members)),
            reads=tuple(reads),
            writes=tuple(writes),
            accumulators=tuple((v, self.members[v].op.name, self._kept_elements(v)) for v in self.kept),
            scratch=tuple(inner * NUMPY[self.members[v].op.type.dtype].itemsize for v in scratch),
            label=self._label(),
        )

    def _kept_elements(self, value: int) -> int:
        return self.members[value].op.type.elements

    def _label(self) -> str:
        labels = [m.op.label for m in self.members.values() if m.op.label]
        return labels[-1] if labels else ""

    def _row(self, bounds: tuple[ir.Value, ir.Value] | None) -> None:
        """The passes over one row; `bounds` are the inner loop's where there is no outer one."""
        self.row: dict[int, ir.Value] = {}
        self.row_loads: dict[Load, ir.Value] = {}
        for member in self.members.values():
            for o in member.operands:
                if isinstance(o, Load) and not self._operand_full(o) and o not in self.row_loads:
                    self.row_loads[o] = self._load(o, [])
        for time in range(max(self.time.values(), default=0) + 1):
            for value, member in self.members.items():
                if not self.is_full[value] and value not in self.reduces and self.time[value] == time:
                    self.row[value] = self._apply(value, member, {}, [], checked=True)
                    if value in self.stores:
                        self._store(value, self.row[value], [])
            self._pass(time, bounds)
        for value in self.reduces:
            if value in self.stores:
                self._store(value, self.row[value], [])

    def _pass(self, time: int, bounds: tuple[ir.Value, ir.Value] | None) -> None:
        reduced = [v for v in self.reduces if self.time[v] == time + 1]
        roots = [v for v in self.members if self.is_full[v] and self.time[v] == time and self._is_root(v)]
        if not reduced and not roots:
            return
        needed = [v for v in self.members if self.is_full[v] and self.time[v] == time and v not in self.kept]
        checked = any(self.members[v].op.name == "rint" for v in roots)
        initial = [_identity(self.members[v].op) for v in reduced] + ([I32(-1)] if checked else [])

        def body(index: list[ir.Value], state: list[ir.Value]) -> list[ir.Value]:
            known: dict[Any, ir.Value] = {}
            for v in needed:
                self._value(Local(v), known, index, time)
            over = [e for v in roots if (e := self._root(v, known, index, time)) is not None]
            pairs = zip(reduced, state, strict=False)
            made = [self._combined(self.members[v], total, known, index, time) for v, total in pairs]
            return [*made, self._largest([state[-1], *over])] if checked else made

        final = self._nest(bounds, self.inner_sizes, [], initial, body)
        self.row.update(zip(reduced, final, strict=False))
        if checked:
            self._note(final[-1])

    def _nest(
        self,
        bounds: tuple[ir.Value, ir.Value] | None,
        sizes: Sequence[int],
        index: list[ir.Value],
        carried: list[ir.Value],
        body: Callable[[list[ir.Value], list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """The inner loops, the first one over `bounds` if given, around a body that replaces the carried values."""
        if not sizes:
            return body(index, carried)
        start, stop = bounds or (0, sizes[0])
        with self.f.loop(start, stop, carried=carried, vectorised=len(sizes) == 1) as (i, state):
            state[:] = self._nest(None, sizes[1:], [*index, i], list(state), body)
        return state

    def _largest(self, numbers: Sequence[ir.Value]) -> ir.Value:
        return reduce(lambda one, two: self.f.intrinsic("llvm.smax.i32", I32, [one, two]), numbers)

    def _note(self, over: ir.Value) -> None:
        """Note that `rint` refuses something where that is not negative."""
        b = self.f.builder
        bad = b.zext(b.icmp_signed(">=", over, I32(0)), I32)
        b.store(b.or_(b.load(self.bad, typ=I32), bad), self.bad)

    def _is_root(self, value: int) -> bool:
        return (
            value in self.stores or value in self.kept or value in self.buffered
            or self.members[value].op.name == "rint"
        )  # fmt: skip

    def _root(self, value: int, known: dict[Any, ir.Value], index: list[ir.Value], time: int) -> ir.Value | None:
        """Computes, stores and accumulates what a pass is there for; the `excess` of a `rint`'s operand."""
        member = self.members[value]
        if value in self.kept:
            self._accumulate(value, known, index, time)
            return None
        made = self._value(Local(value), known, index, time)
        if value in self.stores:
            self._store(value, made, index)
        if value in self.scratch:
            self._keep(value, made, index)
        if member.op.name != "rint":
            return None
        return excess(self.f, self._value(member.operands[0], known, index, time), member.op)

    def _accumulate(self, value: int, known: dict[Any, ir.Value], index: list[ir.Value], time: int) -> None:
        member = self.members[value]
        kind = TYPE[member.op.type.dtype]
        at = self._address(self.target[value], 0, self.along(self._kept_strides(value)), index, kind)
        before = self.f.builder.load(at, typ=kind)
        self.f.builder.store(self._combined(member, before, known, index, time), at)

    def _combined(self, member: Member, before: ir.Value, known: Any, index: list[ir.Value], time: int) -> ir.Value:
        x = self._value(member.operands[0], known, index, time)
        if member.op.name == "sum":
            return self.f.builder.add(before, x if x.type == I64 else self.f.builder.sext(x, I64))
        return self.f.intrinsic(f"llvm.smax.{before.type}", before.type, [before, x])

    def _value(self, operand: Operand, known: dict[Any, ir.Value], index: list[ir.Value], time: int) -> ir.Value:
        """An operand in a pass."""
        if isinstance(operand, Literal):
            return constant(operand.dtype, operand.bits)
        if isinstance(operand, Load):
            if operand in self.row_loads:
                return self.row_loads[operand]
            if operand not in known:
                known[operand] = self._load(operand, index)
            return known[operand]
        value = operand.value
        if value in self.row:
            return self.row[value]
        if value not in known:
            if value in self.buffered and self.time[value] < time:
                known[value] = self._again(value, index)
            else:
                known[value] = self._apply(value, self.members[value], known, index, time=time)
        return known[value]

    def _apply(
        self, value: int, member: Member, known: Any, index: list[ir.Value], time: int = 0, checked: bool = False
    ) -> ir.Value:
        operands = [self._value(o, known, index, time) for o in member.operands]
        dtypes = [self._dtype(o) for o in member.operands]
        if checked and member.op.name == "rint":
            self._note(excess(self.f, operands[0], member.op))
        if member.op.name == "scale":
            low, high = self.fusion.ranges.get(member.op.inputs[1], (-(2**31), 2**31 - 1))
            return scale(self.f, operands[0], operands[1], low, high)
        return MEANING[member.op.name](self.f, operands, member.op, dtypes)

    def _dtype(self, operand: Operand) -> str:
        if isinstance(operand, Local):
            return self.members[operand.value].op.type.dtype
        return operand.dtype

    # ---------------------------------------------------------------------------------------------------------- memory

    def _address(
        self, base: ir.Value, offset: int, strides: Sequence[int], inner: Sequence[ir.Value], kind: ir.Type
    ) -> ir.Value:
        b = self.f.builder
        at: ir.Value = I64(offset)
        for i, stride in zip([*self.index, *inner], strides, strict=False):
            if stride:
                step = b.mul(i, I64(stride), flags=["nsw"]) if stride != 1 else i
                at = b.add(at, step, flags=["nsw"])
        return self.f.at(base, at, kind)

    def _load(self, operand: Load, inner: Sequence[ir.Value]) -> ir.Value:
        base, view = self.read[operand.view.buffer], operand.view
        strides = self.along(self.fusion.strides(operand))
        return self._fetch(self._address(base, view.offset, strides, inner, MEMORY[operand.dtype]), operand.dtype)

    def _fetch(self, address: ir.Value, dtype: str) -> ir.Value:
        b = self.f.builder
        found = b.load(address, typ=MEMORY[dtype])
        return b.icmp_signed("!=", found, I8(0)) if dtype == "bool" else found

    def _store(self, value: int, made: ir.Value, inner: Sequence[ir.Value]) -> None:
        dtype = self.members[value].op.type.dtype
        b, place = self.f.builder, self._place(value, inner, MEMORY[dtype])
        if value in self.fusion.graph.added:
            made = b.add(b.load(place, typ=MEMORY[dtype]), made)
        b.store(b.zext(made, I8) if dtype == "bool" else made, place)

    def _reread(self, value: int) -> bool:
        """Whether a later pass finds the value where it is stored."""
        return value in self.stores and value not in self.fusion.graph.added

    def _keep(self, value: int, made: ir.Value, inner: Sequence[ir.Value]) -> None:
        dtype = self.members[value].op.type.dtype
        b = self.f.builder
        b.store(b.zext(made, I8) if dtype == "bool" else made, self._scratch(value, inner, MEMORY[dtype]))

    def _again(self, value: int, inner: Sequence[ir.Value]) -> ir.Value:
        dtype = self.members[value].op.type.dtype
        where = self._scratch if value in self.scratch else self._place
        return self._fetch(where(value, inner, MEMORY[dtype]), dtype)

    def _place(self, value: int, inner: Sequence[ir.Value], kind: ir.Type) -> ir.Value:
        offset = self.fusion.views[value].offset
        return self._address(self.target[value], offset, self.along(self._kept_strides(value)), inner, kind)

    def _scratch(self, value: int, inner: Sequence[ir.Value], kind: ir.Type) -> ir.Value:
        strides, step = [], 1
        for size in reversed(self.inner_sizes):
            strides.append(step)
            step *= size
        return self._address(self.scratch[value], 0, [*[0] * self.outer, *reversed(strides)], inner, kind)


def _identity(op: Op) -> ir.Constant:
    if op.name == "sum":
        return I64(0)
    return ir.Constant(TYPE[op.type.dtype], -(2 ** (TYPE[op.type.dtype].width - 1)))


def _vectorise(text: str) -> str:
    """The module with the loops that were marked asking for full vectors: LLVM would count in the widest type's."""
    wide = f'!{{!"llvm.loop.vectorize.width", i32 {16 if features() & {"avx2", "avx512f"} else 8}}}'
    free = 1 + max(map(int, re.findall(r"^!(\d+) = ", text, flags=re.MULTILINE)), default=0)
    return re.sub(
        r'^!(\d+) = !\{ !"vectorised", i32 \d+ \}$',
        lambda m: f"!{m[1]} = distinct !{{!{m[1]}, !{free + int(m[1])}}}\n!{free + int(m[1])} = {wide}",
        text,
        flags=re.MULTILINE,
    )


def kernel(fusion: Fusion, cluster: Cluster) -> Kernel:
    """The kernel of a cluster whose stage is finished."""
    return _Body(fusion, cluster, fusion.stored).write()
