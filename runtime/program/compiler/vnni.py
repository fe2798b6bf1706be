"""Digit products in AVX-512 VNNI: packing, and a kernel whose accumulators take all digits of a product in turn.

B is packed into panels of 64 columns, `[panel][K / 4][64][4]`: four neighbours along K to a 32-bit lane, zeros to the
end. A's rows are read where they are if they lie along K, else packed likewise. `vpdpbusd` multiplies unsigned by signed
bytes, so B's digits are packed with 128 added and 128 times the sum of A's row is taken off at the start; all is modulo
2^32, where the true sum lies.

`scan` notes for each row of A that sum and where its first and last digits are: what lies outside is zeros and is
skipped, which halves the work for causal attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from runtime.program.compiler.native import I8, I32, I64, POINTER, Function, entry

PANEL = 64
ROWS = 6
LANES = 16
V32 = ir.VectorType(I32, LANES)
DOT = "llvm.x86.avx512.vpdpbusd.512"
V8 = ir.VectorType(I8, 4 * LANES)


Atoms = Sequence[tuple[int, int]]
"""Sizes and strides of the axes of a batch."""


def _matrix(f: Function, base: ir.Value, batch: Atoms, number: ir.Value, offset: int = 0) -> ir.Value:
    """Where matrix `number` of a batch begins."""
    b = f.builder
    place, rest = I64(offset), number
    for size, stride in reversed(batch):
        place = b.add(place, b.mul(b.srem(rest, I64(size)), I64(stride)))
        rest = b.sdiv(rest, I64(size))
    return b.gep(base, [place], source_etype=I8)


def pack(*, k: int, n: int, offset: int, batch: Atoms, strides: tuple[int, int], right: bool) -> str:
    """A module `pack`(first, end panel; source, target) of a batch of i8 operands of k by n, panel by panel.

    `strides` are those along k and n.
    """
    f = Function("pack_body", [I64, I64, POINTER, POINTER])
    first, end, source, target = f.arguments
    b = f.builder
    groups, panels = -(-k // 4), padded(n) // PANEL
    with f.loop(first, end) as (panel, _):
        number, inside = b.sdiv(panel, I64(panels)), b.srem(panel, I64(panels))
        matrix = _matrix(f, source, batch, number, offset)
        column = b.mul(inside, I64(PANEL))
        rows = f.intrinsic("llvm.smin.i64", I64, [b.sub(I64(n), column), I64(PANEL)])
        base = b.mul(panel, I64(groups * PANEL * 4))
        with f.loop(0, k // 4) as (group, _):
            here = b.add(base, b.mul(group, I64(PANEL * 4)))
            _copy(f, matrix, target, here, group, column, rows, strides, right, 4)
        if k % 4:
            here = b.add(base, I64((groups - 1) * PANEL * 4))
            _copy(f, matrix, target, here, I64(groups - 1), column, rows, strides, right, k % 4)
    b.ret(I32(0))
    return entry("pack", f, 2)


def _copy(f: Function, source, target, here, group, column, rows, strides, right, taps) -> None:  # type: ignore[no-untyped-def]
    b = f.builder
    stride_k, stride_n = strides
    flip = I32(-2139062144 if right else 0)  # 0x80808080: adds 128 to each byte
    start = b.add(b.mul(group, I64(4 * stride_k)), b.mul(column, I64(stride_n)))
    with f.loop(0, rows) as (j, _):
        at = b.add(start, b.mul(j, I64(stride_n)))
        if stride_k == 1 and taps == 4:
            word = f.load(b.gep(source, [at], source_etype=I8), 0, I32, align=1)
        else:
            word = I32(0)
            for r in range(taps):
                byte = f.load(source, b.add(at, I64(r * stride_k)), I8)
                word = b.or_(word, b.shl(b.zext(byte, I32), I32(8 * r)))
        f.store(b.xor(word, flip), b.gep(target, [here], source_etype=I8), j)
    with f.loop(rows, PANEL) as (j, _):
        f.store(I32(0), b.gep(target, [here], source_etype=I8), j)


@dataclass(frozen=True)
class Rows:
    """Where the rows of A lie: along K where `stride` is their distance, in panels where it is None."""

    offset: int
    batch: Atoms
    stride: int | None


def scan(*, m: int, k: int, matrices: int, rows: Rows) -> str:
    """A module `scan`(first, end matrix; A, ranges): of every row the sum of digits, first and end group with a digit.

    `ranges` is i32 [matrix][3][m], and `m` rows are what a product needs of them; along K they are told in blocks.
    """
    f = Function("scan_body", [I64, I64, POINTER, POINTER])
    first, end, a, ranges = f.arguments
    b = f.builder
    with f.loop(first, end) as (number, _):
        base = _matrix(f, a, rows.batch, number, rows.offset)
        target = f.at(ranges, b.mul(number, I64(3 * padded(m))), I32)
        if rows.stride is None:
            with f.loop(0, padded(m) // PANEL) as (panel, _):
                place = b.gep(base, [b.mul(panel, I64(-(-k // 4) * PANEL * 4))], source_etype=I8)
                _scan_panel(f, place, f.at(target, b.mul(panel, I64(PANEL)), I32), -(-k // 4), padded(m))
        else:
            with f.loop(0, m) as (row, _):
                _scan_row(f, b.gep(base, [b.mul(row, I64(rows.stride))], source_etype=I8), target, row, k, padded(m))
    b.ret(I32(0))
    return entry("scan", f, 2)


def _scan_row(f: Function, base: ir.Value, ranges: ir.Value, row: ir.Value, k: int, plane: int) -> None:
    b = f.builder
    ones, zero = ir.Constant(V8, [1] * (4 * LANES)), ir.Constant(V32, [0] * LANES)
    block, whole = 4 * LANES, k // (4 * LANES)
    with f.loop(0, whole, carried=[zero, I64(k // 4), I64(0)]) as (i, state):
        word = f.load(b.gep(base, [b.mul(i, I64(block))], source_etype=I8), 0, V32, align=1)
        some = b.icmp_signed("!=", b.bitcast(b.icmp_signed("!=", word, zero), ir.IntType(LANES)), ir.IntType(LANES)(0))
        start = b.mul(i, I64(LANES))
        state[:] = [
            f.intrinsic(DOT, V32, [state[0], ones, b.bitcast(word, V8)]),
            b.select(some, f.intrinsic("llvm.smin.i64", I64, [state[1], start]), state[1]),
            b.select(some, b.add(start, I64(LANES)), state[2]),
        ]
    total = f.intrinsic("llvm.vector.reduce.add.v16i32", I32, [state[0]])
    low, high = state[1], state[2]
    with f.loop(whole * block, k, carried=[total, low, high]) as (i, state):
        digit = b.sext(f.load(base, i, I8), I32)
        some, group = b.icmp_signed("!=", digit, I32(0)), b.sdiv(i, I64(4))
        state[:] = [
            b.add(state[0], digit),
            b.select(some, f.intrinsic("llvm.smin.i64", I64, [state[1], group]), state[1]),
            b.select(some, b.add(group, I64(1)), state[2]),
        ]
    for number, value in enumerate((state[0], b.trunc(state[1], I32), b.trunc(state[2], I32))):
        f.store(value, ranges, b.add(row, I64(number * plane)))


def _scan_panel(f: Function, panel: ir.Value, ranges: ir.Value, groups: int, plane: int) -> None:
    """The same of a packed panel; lanes are rows."""
    b = f.builder
    ones, zero = ir.Constant(V8, [1] * (4 * LANES)), ir.Constant(V32, [0] * LANES)
    for part in range(PANEL // LANES):
        with f.loop(0, groups, carried=[zero, ir.Constant(V32, [groups] * LANES), zero]) as (group, state):
            total, low, high = state
            at = b.add(b.mul(group, I64(PANEL * 4)), I64(part * LANES * 4))
            word = b.load(b.gep(panel, [at], source_etype=I8), typ=V32, align=1)
            here = _splat(f, b.trunc(group, I32))
            some = b.icmp_signed("!=", word, zero)
            state[:] = [
                f.intrinsic(DOT, V32, [total, ones, b.bitcast(word, V8)]),
                b.select(b.and_(some, b.icmp_signed("<", here, low)), here, low),
                b.select(some, b.add(here, ir.Constant(V32, [1] * LANES)), high),
            ]
        for number, value in enumerate(state):
            b.store(value, f.at(ranges, number * plane + part * LANES, I32), align=4)


def padded(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def _splat(f: Function, value: ir.Value) -> ir.Value:
    b = f.builder
    one = b.insert_element(ir.Constant(V32, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(V32, ir.Undefined), ir.Constant(V32, [0] * LANES))


def product(
    *, m: int, n: int, k: int, lefts: Sequence[Rows], rights: int, levels: Sequence[tuple[Sequence[tuple[int, int]], int]]
) -> str:
    """A module `product`(first, end tile; A digits..., A ranges..., B digits..., C) of a batch of matrices.

    `levels` are (pairs (i, j) of digits to multiply and add, then how far to shift the total left). Tiles number
    ROWS rows of A, batch by batch; C is i32 [batch, m, n].
    """
    count = len(lefts)
    pointers = 2 * count + rights + 1
    f = Function("product_body", [I64, I64, *[POINTER] * pointers])
    first, end = f.arguments[:2]
    rest = list(f.arguments[2:])
    a, ranges, right, c = rest[:count], rest[count : 2 * count], rest[2 * count : -1], rest[-1]
    b = f.builder
    tiles, groups = -(-m // ROWS), -(-k // 4)
    size_b = padded(n) * groups * 4
    batch_first, batch_end = b.sdiv(first, I64(tiles)), b.sdiv(b.add(end, I64(tiles - 1)), I64(tiles))
    with f.loop(batch_first, batch_end) as (batch, _), f.loop(0, padded(n) // PANEL) as (panel, _):
        origin = b.mul(batch, I64(tiles))
        low = f.intrinsic("llvm.smax.i64", I64, [b.sub(first, origin), I64(0)])
        high = f.intrinsic("llvm.smin.i64", I64, [b.sub(end, origin), I64(tiles)])
        offset_b = b.add(b.mul(batch, I64(size_b)), b.mul(panel, I64(groups * PANEL * 4)))
        bs = [b.gep(p, [offset_b], source_etype=I8) for p in right]
        as_ = [_matrix(f, p, rows.batch, batch, rows.offset) for p, rows in zip(a, lefts, strict=True)]
        rs = [f.at(p, b.mul(batch, I64(3 * padded(m))), I32) for p in ranges]
        cs = f.at(c, b.mul(batch, I64(m * n)), I32)
        column = b.mul(panel, I64(PANEL))
        with f.loop(low, high) as (tile, _):
            row = b.mul(tile, I64(ROWS))
            if m % ROWS:
                with b.if_else(b.icmp_signed("<=", b.add(row, I64(ROWS)), I64(m))) as (whole, some):
                    with whole:
                        _tile(f, ROWS, row, column, (as_, rs, bs, cs), (m, n, groups), lefts, levels)
                    with some:
                        _tile(f, m % ROWS, row, column, (as_, rs, bs, cs), (m, n, groups), lefts, levels)
            else:
                _tile(f, ROWS, row, column, (as_, rs, bs, cs), (m, n, groups), lefts, levels)
    b.ret(I32(0))
    return entry("product", f, pointers)


def _tile(f: Function, rows: int, row, column, places, sizes, lefts, levels) -> None:  # type: ignore[no-untyped-def]
    """C[row : row + rows, column : column + 64], in rows * 4 vector accumulators."""
    b = f.builder
    (a, ranges, right, c), (m, n, groups) = places, sizes
    vectors = PANEL // LANES
    zero = ir.Constant(V32, [0] * LANES)
    total = [zero] * (rows * vectors)
    lanes = [b.add(row, I64(r)) for r in range(rows)]
    offsets = [[_row_offset(f, lane, left.stride, groups) for lane in lanes] for left in lefts]
    for pairs, shift in levels:
        for i, j in pairs:
            low, high = I32(groups), I32(0)
            for r, lane in enumerate(lanes):
                taken = b.mul(f.load(ranges[i], lane, I32), I32(-128))
                for v in range(vectors):
                    total[r * vectors + v] = b.add(total[r * vectors + v], _splat(f, taken))
                low = f.intrinsic("llvm.smin.i32", I32, [low, f.load(ranges[i], b.add(lane, I64(padded(m))), I32)])
                high = f.intrinsic("llvm.smax.i32", I32, [high, f.load(ranges[i], b.add(lane, I64(2 * padded(m))), I32)])
            with f.loop(b.sext(low, I64), b.sext(high, I64), carried=total) as (group, state):
                step = b.mul(group, I64(PANEL * 4))
                along = step if lefts[i].stride is None else b.mul(group, I64(4))
                columns = [
                    b.bitcast(f.load(b.gep(right[j], [step], source_etype=I8), v, V32, align=1), V8)
                    for v in range(vectors)
                ]
                for r in range(rows):
                    at = b.gep(a[i], [b.add(offsets[i][r], along)], source_etype=I8)
                    digits = b.bitcast(_splat(f, b.load(at, typ=I32, align=1)), V8)
                    for v in range(vectors):
                        place = r * vectors + v
                        state[place] = f.intrinsic(
                            DOT, V32, [state[place], columns[v], digits]
                        )
            total = state
        if shift:
            total = [b.shl(t, ir.Constant(V32, [shift] * LANES)) for t in total]
    for r, lane in enumerate(lanes):
        _store_row(f, total[r * vectors : (r + 1) * vectors], b.add(b.mul(lane, I64(n)), column), column, c, n)


def _row_offset(f: Function, lane: ir.Value, stride: int | None, groups: int) -> ir.Value:
    b = f.builder
    if stride is not None:
        return b.mul(lane, I64(stride))
    panel, inside = b.sdiv(lane, I64(PANEL)), b.srem(lane, I64(PANEL))
    return b.add(b.mul(panel, I64(groups * PANEL * 4)), b.mul(inside, I64(4)))


def _store_row(f: Function, values, at, column, c, n: int) -> None:  # type: ignore[no-untyped-def]
    b = f.builder
    if n % PANEL == 0:
        for v, value in enumerate(values):
            b.store(value, f.at(c, b.add(at, I64(v * LANES)), I32), align=4)
        return
    mask_type = ir.VectorType(ir.IntType(1), LANES)
    left = b.trunc(b.sub(I64(n), column), I32)
    for v, value in enumerate(values):
        lane = ir.Constant(V32, [v * LANES + j for j in range(LANES)])
        mask = b.icmp_signed("<", lane, _splat(f, left))
        place = f.at(c, b.add(at, I64(v * LANES)), I32)
        name = "llvm.masked.store.v16i32.p0"
        found = f.module.globals.get(name) or ir.Function(
            f.module, ir.FunctionType(ir.VoidType(), [V32, POINTER, I32, mask_type]), name
        )
        b.call(found, [value, place, I32(4), mask])
