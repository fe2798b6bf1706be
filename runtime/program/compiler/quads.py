"""Digit products by fours: packing, and a kernel whose accumulators take all digits of a product in turn.

x86's VNNI and ARM's dot products multiply four bytes by four and add to 32 bits. B is packed into panels of columns,
`[panel][K / 4][columns][4]`: four neighbours along K to a 32-bit lane, zeros to the end. A's rows are read where they
are if they lie along K, else packed likewise. `sdot` multiplies signed bytes; `vpdpbusd` unsigned by signed ones, so
for it B's digits are packed with 128 added and 128 times the sum of A's row is taken off at the start; all is modulo
2^32, where the true sum lies.

`scan` notes for each row of A that sum and where its first and last digits are: what lies outside is zeros and is
skipped, which halves the work for causal attention.

Sizes and strides are read from an i64 array that comes last in every table, so a few kernels serve all shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from runtime.program.compiler.matrices import (
    Atoms,
    batch_sizes,
    highest,
    lowest,
    matrix,
    read_sizes,
    splat,
    store_row,
    zeros,
)
from storage.native import I8, I32, I64, POINTER, Function, entry, features

TILES = (6, 2, 1)
"""Rows of A that a tile takes: as many as accumulators allow, then what is left."""
Levels = tuple[tuple[tuple[tuple[int, int], ...], int], ...]
"""(pairs (i, j) of digits to multiply and add, how far to shift the total then), in order."""


ARM = 4
"""Lanes of ARM's vectors."""


def lanes() -> int:
    """i32 lanes of this processor's vectors; 0 where it has no such instruction."""
    found = features()
    return next((n for n, name in ((16, "avx512vnni"), (8, "avxvnni"), (ARM, "dotprod")) if name in found), 0)


def biased() -> bool:
    """Whether the instruction takes one side's bytes as unsigned."""
    return lanes() != ARM


def panel_columns() -> int:
    """Columns of B in a panel: what thirty-two registers allow, or AVX2's sixteen."""
    return lanes() * (2 if lanes() == 8 else 4)


def group_bytes() -> int:
    """Bytes of a panel for one group of four along K."""
    return 4 * panel_columns()


def padded(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // panel_columns()) * panel_columns()


def dot(f: Function, total: ir.Value, right: ir.Value, left: ir.Value) -> ir.Value:
    """`total` and in each lane the four products of bytes, `right`'s unsigned if `biased`; all are vectors of i32."""
    b, size = f.builder, 32 * total.type.count
    bytes_ = ir.VectorType(I8, size // 8)
    name = f"llvm.x86.avx512.vpdpbusd.{size}" if biased() else "llvm.aarch64.neon.sdot.v4i32.v16i8"
    return f.intrinsic(name, total.type, [total, b.bitcast(right, bytes_), b.bitcast(left, bytes_)])


# ------------------------------------------------------------------------------------------------------------- packing


def pack_sizes(*, k: int, n: int, offset: int, batch: Atoms, strides: tuple[int, int]) -> tuple[int, ...]:
    """What `pack` reads of an operand of k by n with strides along both."""
    return (k, n, offset, *strides, *batch_sizes(batch))


@cache
def pack(*, along: str, right: bool) -> str:
    """A module `pack`(first, end panel; source, target, sizes) of a batch of i8 operands, panel by panel.

    `along` says which axis has stride 1: "k", "n" or neither.
    """
    f = Function("pack_body", [I64, I64, POINTER, POINTER, POINTER])
    first, end, source, target, sizes = f.arguments
    b = f.builder
    k, n, offset, stride_k, stride_n, *batch = read_sizes(f, sizes, 9)
    stride_k, stride_n = (I64(1) if along == axis else s for axis, s in (("k", stride_k), ("n", stride_n)))
    wide = panel_columns()
    groups = b.sdiv(b.add(k, I64(3)), I64(4))
    panels = b.sdiv(b.add(n, I64(wide - 1)), I64(wide))
    flip = I32(-2139062144 if right and biased() else 0)  # 0x80808080: adds 128 to each byte
    with f.loop(first, end) as (panel, _):
        origin = matrix(f, source, b.sdiv(panel, panels), batch, offset)
        column = b.mul(b.srem(panel, panels), I64(wide))
        rows = lowest(f, b.sub(n, column), I64(wide))
        base = b.gep(target, [b.mul(panel, b.mul(groups, I64(group_bytes())))], source_etype=I8)
        with f.loop(0, groups) as (group, _):
            here = b.gep(base, [b.mul(group, I64(group_bytes()))], source_etype=I8)
            taps = b.sub(k, b.mul(group, I64(4)))
            start = b.add(b.mul(group, b.mul(stride_k, I64(4))), b.mul(column, stride_n))
            with b.if_else(b.icmp_signed(">=", taps, I64(4))) as (whole, part):
                with whole, f.loop(0, rows) as (j, _):
                    word = _word(f, origin, b.add(start, b.mul(j, stride_n)), stride_k, along)
                    f.store(b.xor(word, flip), here, j)
                with part, f.loop(0, rows) as (j, _):
                    at = b.add(start, b.mul(j, stride_n))
                    with f.loop(0, taps, carried=[I32(0)]) as (r, state):
                        byte = b.zext(f.load(origin, b.add(at, b.mul(r, stride_k)), I8), I32)
                        state[0] = b.or_(state[0], b.shl(byte, b.mul(b.trunc(r, I32), I32(8))))
                    f.store(b.xor(state[0], flip), here, j)
            with f.loop(rows, wide) as (j, _):
                f.store(I32(0), here, j)
    b.ret(I32(0))
    return entry("pack", f, 3)


def _word(f: Function, origin: ir.Value, at: ir.Value, stride_k: ir.Value, along: str) -> ir.Value:
    """Four neighbours along K as one i32."""
    b = f.builder
    if along == "k":
        return f.load(b.gep(origin, [at], source_etype=I8), 0, I32, align=1)
    word = I32(0)
    for r in range(4):
        byte = b.zext(f.load(origin, b.add(at, b.mul(stride_k, I64(r))), I8), I32)
        word = b.or_(word, b.shl(byte, I32(8 * r)))
    return word


# ------------------------------------------------------------------------------------------------------------ scanning


@dataclass(frozen=True)
class Rows:
    """Where the rows of A lie: along K where `stride` is their distance, in panels where it is None."""

    offset: int
    batch: Atoms
    stride: int | None

    @property
    def direct(self) -> bool:
        """Whether they lie along K."""
        return self.stride is not None

    def sizes(self) -> tuple[int, ...]:
        """What kernels read of them."""
        return (self.offset, self.stride or 0, *batch_sizes(self.batch))


def scan_sizes(*, m: int, k: int, rows: Rows) -> tuple[int, ...]:
    """What `scan` reads."""
    return (m, k, *rows.sizes())


@cache
def scan(*, direct: bool) -> str:
    """A module `scan`(first, end matrix; A, ranges, sizes): each row's sum of digits, first and end group with a digit.

    `ranges` is i32 [matrix][3][padded m]; rows along K tell their groups in blocks of 16.
    """
    f = Function("scan_body", [I64, I64, POINTER, POINTER, POINTER])
    first, end, a, ranges, sizes = f.arguments
    b = f.builder
    m, k, offset, stride, *batch = read_sizes(f, sizes, 8)
    wide = panel_columns()
    panels = b.sdiv(b.add(m, I64(wide - 1)), I64(wide))
    plane = b.mul(panels, I64(wide))
    groups = b.sdiv(b.add(k, I64(3)), I64(4))
    with f.loop(first, end) as (number, _):
        base = matrix(f, a, number, batch, offset)
        target = f.at(ranges, b.mul(number, b.mul(plane, I64(3))), I32)
        if direct:
            with f.loop(0, m) as (row, _):
                _scan_row(f, b.gep(base, [b.mul(row, stride)], source_etype=I8), target, row, k, plane)
        else:
            with f.loop(0, panels) as (panel, _):
                place = b.gep(base, [b.mul(panel, b.mul(groups, I64(group_bytes())))], source_etype=I8)
                _scan_panel(f, place, f.at(target, b.mul(panel, I64(wide)), I32), groups, plane)
    b.ret(I32(0))
    return entry("scan", f, 3)


def _scan_row(f: Function, base: ir.Value, ranges: ir.Value, row: ir.Value, k: ir.Value, plane: ir.Value) -> None:
    b, wide = f.builder, lanes()
    kind, mask = ir.VectorType(I32, wide), ir.IntType(wide)
    whole = b.sdiv(k, I64(4 * wide))
    with f.loop(0, whole, carried=[zeros(wide), b.sdiv(k, I64(4)), I64(0)]) as (i, state):
        word = f.load(b.gep(base, [b.mul(i, I64(4 * wide))], source_etype=I8), 0, kind, align=1)
        some = b.icmp_signed("!=", b.bitcast(b.icmp_signed("!=", word, zeros(wide)), mask), mask(0))
        start = b.mul(i, I64(wide))
        state[:] = [
            dot(f, state[0], _ones(wide), word),
            b.select(some, lowest(f, state[1], start), state[1]),
            b.select(some, b.add(start, I64(wide)), state[2]),
        ]
    total = f.intrinsic(f"llvm.vector.reduce.add.v{wide}i32", I32, [state[0]])
    with f.loop(b.mul(whole, I64(4 * wide)), k, carried=[total, *state[1:]]) as (i, state):
        digit = b.sext(f.load(base, i, I8), I32)
        some, group = b.icmp_signed("!=", digit, I32(0)), b.sdiv(i, I64(4))
        state[:] = [
            b.add(state[0], digit),
            b.select(some, lowest(f, state[1], group), state[1]),
            b.select(some, b.add(group, I64(1)), state[2]),
        ]
    for number, value in enumerate((state[0], b.trunc(state[1], I32), b.trunc(state[2], I32))):
        f.store(value, ranges, b.add(row, b.mul(plane, I64(number))))


def _scan_panel(f: Function, panel: ir.Value, ranges: ir.Value, groups: ir.Value, plane: ir.Value) -> None:
    """The same of a packed panel; lanes are rows."""
    b, wide = f.builder, lanes()
    kind = ir.VectorType(I32, wide)
    for part in range(panel_columns() // wide):
        with f.loop(0, groups, carried=[zeros(wide), splat(f, b.trunc(groups, I32), wide), zeros(wide)]) as loop:
            group, state = loop
            total, low, high = state
            at = b.add(b.mul(group, I64(group_bytes())), I64(part * wide * 4))
            word = b.load(b.gep(panel, [at], source_etype=I8), typ=kind, align=1)
            here = splat(f, b.trunc(group, I32), wide)
            some = b.icmp_signed("!=", word, zeros(wide))
            state[:] = [
                dot(f, total, _ones(wide), word),
                b.select(b.and_(some, b.icmp_signed("<", here, low)), here, low),
                b.select(some, b.add(here, ir.Constant(kind, [1] * wide)), high),
            ]
        for number, value in enumerate(state):
            b.store(value, f.at(ranges, b.add(b.mul(plane, I64(number)), I64(part * wide)), I32), align=4)


def _ones(wide: int) -> ir.Value:
    """A one in every byte."""
    return ir.Constant(ir.VectorType(I32, wide), [0x01010101] * wide)


# ------------------------------------------------------------------------------------------------------------ products


def tiles(m: int) -> int:
    """Tiles of the rows of one matrix: what threads share."""
    return -(-m // TILES[0])


def product_sizes(*, m: int, n: int, k: int, lefts: Sequence[Rows]) -> tuple[int, ...]:
    """What `product` reads."""
    return (m, n, k, *(number for rows in lefts for number in rows.sizes()))


@cache
def product(*, lefts: tuple[bool, ...], rights: int, levels: Levels) -> str:
    """A module `product`(first, end tile; A digits..., A ranges..., B digits..., C, sizes) of a batch of matrices.

    `lefts` says of each digit of A whether its rows lie along K. Tiles number six rows of A each, batch by batch; C is
    i32 [batch, m, n].
    """
    count = len(lefts)
    pointers = 2 * count + rights + 2
    f = Function("product_body", [I64, I64, *[POINTER] * pointers])
    first, end, *rest = f.arguments
    a, ranges, right = rest[:count], rest[count : 2 * count], rest[2 * count : -2]
    c, sizes = rest[-2:]
    b = f.builder
    m, n, k, *places = read_sizes(f, sizes, 3 + 6 * count)
    groups = b.sdiv(b.add(k, I64(3)), I64(4))
    wide = panel_columns()
    panels = b.sdiv(b.add(n, I64(wide - 1)), I64(wide))
    plane = b.mul(b.sdiv(b.add(m, I64(wide - 1)), I64(wide)), I64(wide))
    total = b.sdiv(b.add(m, I64(TILES[0] - 1)), I64(TILES[0]))
    panel_bytes = b.mul(groups, I64(group_bytes()))
    with f.loop(b.sdiv(first, total), b.sdiv(b.add(end, b.sub(total, I64(1))), total)) as (batch, _):
        origin = b.mul(batch, total)
        low, high = highest(f, b.sub(first, origin), I64(0)), lowest(f, b.sub(end, origin), total)
        row_first = b.mul(low, I64(TILES[0]))
        row_end = lowest(f, b.mul(high, I64(TILES[0])), m)
        operands = [
            _Left(
                base=matrix(f, p, batch, places[6 * i + 2 : 6 * i + 6], places[6 * i]),
                ranges=f.at(r, b.mul(batch, b.mul(plane, I64(3))), I32),
                stride=places[6 * i + 1] if direct else None,
            )
            for i, (p, r, direct) in enumerate(zip(a, ranges, lefts, strict=True))
        ]
        out = f.at(c, b.mul(batch, b.mul(m, n)), I32)
        with f.loop(0, panels) as (panel, _):
            at = b.mul(b.add(b.mul(batch, panels), panel), panel_bytes)
            columns = [b.gep(p, [at], source_etype=I8) for p in right]
            column = b.mul(panel, I64(wide))
            shape = _Shape(n=n, plane=plane, groups=groups, panel_bytes=panel_bytes)
            row = row_first
            for rows in TILES:
                stop = b.add(row, b.mul(b.sdiv(b.sub(row_end, row), I64(rows)), I64(rows)))
                with f.loop(row, stop, step=rows) as (start, _):
                    _tile(f, rows, start, column, operands, columns, out, shape, levels)
                row = stop
    b.ret(I32(0))
    return entry("product", f, pointers)


@dataclass(frozen=True)
class _Left:
    base: ir.Value
    ranges: ir.Value
    stride: ir.Value | None


@dataclass(frozen=True)
class _Shape:
    n: ir.Value
    plane: ir.Value
    groups: ir.Value
    panel_bytes: ir.Value


def _tile(
    f: Function,
    rows: int,
    row: ir.Value,
    column: ir.Value,
    lefts: Sequence[_Left],
    rights: Sequence[ir.Value],
    c: ir.Value,
    shape: _Shape,
    levels: Levels,
) -> None:
    """C[row : row + rows, column : column + panel] in vector accumulators."""
    b, wide = f.builder, lanes()
    vectors = panel_columns() // wide
    total = [zeros(wide)] * (rows * vectors)
    lines = [b.add(row, I64(r)) for r in range(rows)]
    for pairs, shift in levels:
        for i, j in pairs:
            total = _accumulate(f, total, lefts[i], rights[j], lines, shape)
        if shift:
            total = [b.shl(t, ir.Constant(ir.VectorType(I32, wide), [shift] * wide)) for t in total]
    left = b.trunc(b.sub(shape.n, column), I32)
    for r, line in enumerate(lines):
        at = b.add(b.mul(line, shape.n), column)
        store_row(f, total[r * vectors : (r + 1) * vectors], f.at(c, at, I32), left, wide)


def _accumulate(
    f: Function, total: Sequence[ir.Value], left: _Left, right: ir.Value, lines: Sequence[ir.Value], shape: _Shape
) -> list[ir.Value]:
    """The accumulators with one product of digits added."""
    b, wide = f.builder, lanes()
    vectors, kind = panel_columns() // wide, ir.VectorType(I32, wide)
    total = list(total)
    low, high = b.trunc(shape.groups, I32), I32(0)
    for r, line in enumerate(lines):
        if biased():
            taken = splat(f, b.mul(f.load(left.ranges, line, I32), I32(-128)), wide)
            total[r * vectors : (r + 1) * vectors] = [b.add(t, taken) for t in total[r * vectors : (r + 1) * vectors]]
        first, last = (f.load(left.ranges, b.add(line, b.mul(shape.plane, I64(p))), I32) for p in (1, 2))
        low, high = lowest(f, low, first), highest(f, high, last)
    bases = [b.gep(left.base, [_row_offset(f, line, left.stride, shape)], source_etype=I8) for line in lines]
    with f.loop(b.sext(low, I64), b.sext(high, I64), carried=total) as (group, state):
        panel = b.gep(right, [b.mul(group, I64(group_bytes()))], source_etype=I8)
        columns = [f.load(panel, v, kind, align=1) for v in range(vectors)]
        along = b.mul(group, I64(group_bytes() if left.stride is None else 4))
        for r, base in enumerate(bases):
            word = b.load(b.gep(base, [along], source_etype=I8), typ=I32, align=1)
            digits = splat(f, word, wide)
            for v in range(vectors):
                place = r * vectors + v
                state[place] = dot(f, state[place], columns[v], digits)
    return state


def _row_offset(f: Function, line: ir.Value, stride: ir.Value | None, shape: _Shape) -> ir.Value:
    b = f.builder
    if stride is not None:
        return b.mul(line, stride)
    panel, inside = b.sdiv(line, I64(panel_columns())), b.srem(line, I64(panel_columns()))
    return b.add(b.mul(panel, shape.panel_bytes), b.mul(inside, I64(4)))
