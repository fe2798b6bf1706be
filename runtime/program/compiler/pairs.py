"""Digit products where there is no VNNI: 16-bit pairs are multiplied and added to 32 bits, as `pmaddwd` does.

A sum of shifted digit products is `sum_i a_i (sum_j b_j << s_ij)`, where the inner sum, a combination, fits 16 bits. So
the kernel multiplies a matrix of A's digits, one after the other along K, by one of B's combinations: a product of two
slices takes one instruction for a vector of outputs and a step along K, as many as float32 takes. All is modulo 2^32,
where the true sum lies.

A is packed row by row and B into panels, `[panel][words][columns]`, a word being two neighbours of 16 bits; zeros to
the end. What lies outside of a row's first and last digits is skipped, which halves the work for causal attention.

Sizes and strides are read from an i64 array that comes last in every table, so a few kernels serve all shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Combination = tuple[tuple[int, int], ...]
"""(j, shift) of B's digits that one digit of A is multiplied by."""

TILES = (6, 2, 1)
"""Rows of A that a tile takes: as many as accumulators allow, then what is left."""
BLOCK = 16
"""Rows of A that are packed at once."""
STRIP = 16 * TILES[0]
"""Rows of A that go through all panels before the next ones do: they stay in a near cache meanwhile."""
MADD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
ALIGNED = 16
"""Words that a packed row of A is a multiple of."""


def lanes() -> int:
    """i32 lanes of this processor's vectors; 0 where it has no such instruction."""
    found = features()
    return next((n for n, name in ((16, "avx512bw"), (8, "avx2"), (4, "sse2")) if name in found), 0)


def panel_columns() -> int:
    """Columns of B in a panel: what sixteen registers allow, or thirty-two."""
    return lanes() * (4 if lanes() == 16 else 2)


def madd(f: Function, x: ir.Value, y: ir.Value) -> ir.Value:
    """In each lane the sum of the products of both halves, signed 16-bit numbers; all three are vectors of i32."""
    b, wide = f.builder, x.type.count
    halves = ir.VectorType(ir.IntType(16), 2 * wide)
    return f.intrinsic(MADD[wide], x.type, [b.bitcast(x, halves), b.bitcast(y, halves)])


def combinations(lefts: int, terms: Sequence[tuple[int, int, int]]) -> tuple[Combination, ...] | None:
    """What each digit of A is multiplied by; None where a combination of digits within +-64 needs more than 16 bits."""
    found = tuple(tuple((j, shift) for left, j, shift in terms if left == i) for i in range(lefts))
    return found if all(sum(64 << shift for _, shift in one) < 2**15 for one in found) else None


def words(k: int, digits: int) -> int:
    """Words along K of so many digits."""
    return -(-k * digits // 2)


def row_words(k: int, digits: int) -> int:
    """Words of a packed row of A."""
    return -(-words(k, digits) // ALIGNED) * ALIGNED


def panels(n: int) -> int:
    """Panels of n columns."""
    return -(-n // panel_columns())


# ------------------------------------------------------------------------------------------------------------- packing


def pack_sizes(*, k: int, n: int, sources: Sequence[tuple[int, Atoms, tuple[int, int]]]) -> tuple[int, ...]:
    """What `pack_left` and `pack_right` read: of each source an offset, its batch, strides along K and the other axis.

    `n` are A's rows or B's columns.
    """
    return (k, n, *(x for offset, batch, strides in sources for x in (offset, *strides, *batch_sizes(batch))))


Read = Callable[[int, ir.Value, ir.Value], ir.Value]
"""(source, place along K, place along the other axis) -> the digit as i32."""


def _sources(
    f: Function, pointers: Sequence[ir.Value], sizes: ir.Value, number: ir.Value, along: str, other: str
) -> Read:
    """How digits of matrix `number` of the sources are read; `along` names the axis whose stride is 1, if any."""
    b = f.builder
    found = read_sizes(f, sizes, 2 + 7 * len(pointers))[2:]
    bases, strides = [], []
    for i, pointer in enumerate(pointers):
        offset, stride_k, stride_n, *batch = found[7 * i : 7 * i + 7]
        bases.append(matrix(f, pointer, number, batch, offset))
        strides.append([I64(1) if along == axis else s for axis, s in (("k", stride_k), (other, stride_n))])

    def read(source: int, k: ir.Value, n: ir.Value) -> ir.Value:
        stride_k, stride_n = strides[source]
        place = b.add(b.mul(k, stride_k), b.mul(n, stride_n))
        return b.sext(f.load(bases[source], place, I8), I32)

    return read


def _word(
    f: Function, digit: Callable[[int, ir.Value], ir.Value], digits: int, number: int, first: ir.Value, k: ir.Value
) -> ir.Value:
    """Word `number` of those that begin at place `first` along K; `digit(i, place)` is an i32, and 0 beyond K."""
    b = f.builder
    halves = []
    for position in (2 * number, 2 * number + 1):
        further, i = divmod(position, digits)
        place = b.add(first, I64(further))
        if not further:
            halves.append(digit(i, place))
            continue
        inside = b.icmp_signed("<", place, k)
        halves.append(b.select(inside, digit(i, lowest(f, place, b.sub(k, I64(1)))), I32(0)))
    return b.or_(b.and_(halves[0], I32(0xFFFF)), b.shl(halves[1], I32(16)))


def _stride(digits: int) -> tuple[int, int]:
    """(places along K, words) that make up a whole number of words."""
    return (1, digits // 2) if digits % 2 == 0 else (2, digits)


@cache
def pack_right(*, along: str, given: int, chosen: tuple[Combination, ...]) -> str:
    """A module `pack`(first, end panel; sources..., target, sizes) of a batch of B's digits as combinations."""
    f = Function("pack_body", [I64, I64, *[POINTER] * (given + 2)])
    first, end, *pointers, target, sizes = f.arguments
    b = f.builder
    k, n = read_sizes(f, sizes, 2)
    digits, wide = len(chosen), panel_columns()
    step, made = _stride(digits)
    steps = b.sdiv(b.add(k, I64(step - 1)), I64(step))
    whole = b.sdiv(b.add(b.mul(k, I64(digits)), I64(1)), I64(2))
    count = b.sdiv(b.add(n, I64(wide - 1)), I64(wide))
    with f.loop(first, end) as (number, _):
        read = _sources(f, pointers, sizes, b.sdiv(number, count), along, "n")
        column = b.mul(b.srem(number, count), I64(wide))
        columns = lowest(f, b.sub(n, column), I64(wide))
        base = f.at(target, b.mul(number, b.mul(whole, I64(wide))), I32)
        with f.loop(0, steps) as (group, _):
            place = b.mul(group, I64(step))
            for word in range(made):
                at = b.add(b.mul(group, I64(made)), I64(word))
                row = f.at(base, b.mul(at, I64(wide)), I32)
                with b.if_then(b.icmp_signed("<", at, whole)):
                    with f.loop(0, columns, vectorised=along == "n") as (j, _):
                        here = b.add(column, j)

                        def combined(i: int, at: ir.Value, here: ir.Value = here) -> ir.Value:
                            parts = [b.shl(read(source, at, here), I32(shift)) for source, shift in chosen[i]]
                            total = I32(0)
                            for part in parts:
                                total = b.add(total, part)
                            return total

                        f.store(_word(f, combined, digits, word, place, k), row, j)
                    with f.loop(columns, wide) as (j, _):
                        f.store(I32(0), row, j)
    b.ret(I32(0))
    return entry("pack", f, given + 2)


@cache
def pack_left(*, along: str, digits: int) -> str:
    """A module `pack`(first, end block; sources..., target, ranges, sizes) of a batch of A's digits, row by row.

    `ranges` is i32 [matrix][m][2]: the first word with a digit, rounded down to a vector, and the end of the last one.
    """
    f = Function("pack_body", [I64, I64, *[POINTER] * (digits + 3)])
    first, end, *pointers, target, ranges, sizes = f.arguments
    b = f.builder
    k, m = read_sizes(f, sizes, 2)
    step, made = _stride(digits)
    steps = b.sdiv(b.add(k, I64(step - 1)), I64(step))
    whole = b.sdiv(b.add(b.mul(k, I64(digits)), I64(1)), I64(2))
    stride = b.mul(b.sdiv(b.add(whole, I64(ALIGNED - 1)), I64(ALIGNED)), I64(ALIGNED))
    count = b.sdiv(b.add(m, I64(BLOCK - 1)), I64(BLOCK))
    with f.loop(first, end) as (number, _):
        which = b.sdiv(number, count)
        read = _sources(f, pointers, sizes, which, along, "m")
        start = b.mul(b.srem(number, count), I64(BLOCK))
        stop = lowest(f, b.add(start, I64(BLOCK)), m)
        origin = b.mul(which, m)

        def put(row: ir.Value, group: ir.Value) -> None:
            place = b.mul(group, I64(step))
            line = f.at(target, b.mul(b.add(origin, row), stride), I32)
            for word in range(made):
                value = _word(f, lambda i, at: read(i, at, row), digits, word, place, k)
                f.store(value, line, b.add(b.mul(group, I64(made)), I64(word)))

        if along == "k":
            with f.loop(start, stop) as (row, _), f.loop(0, steps, vectorised=True) as (group, _):
                put(row, group)
        else:
            with f.loop(0, steps) as (group, _), f.loop(start, stop) as (row, _):
                put(row, group)
        with f.loop(start, stop) as (row, _):
            line = b.add(origin, row)
            base = f.at(target, b.mul(line, stride), I32)
            with f.loop(whole, stride) as (at, _):
                f.store(I32(0), base, at)
            _scan(f, base, stride, whole, f.at(ranges, b.mul(line, I64(2)), I32))
    b.ret(I32(0))
    return entry("pack", f, digits + 3)


def _scan(f: Function, base: ir.Value, stride: ir.Value, whole: ir.Value, found: ir.Value) -> None:
    """Where a packed row's digits begin and end."""
    b, wide = f.builder, lanes()
    with f.loop(0, stride, step=wide, carried=[whole, I64(0)]) as (at, state):
        vector = f.load(f.at(base, at, I32), 0, ir.VectorType(I32, wide), align=4)
        mask = ir.IntType(wide)
        some = b.icmp_signed("!=", b.bitcast(b.icmp_signed("!=", vector, zeros(wide)), mask), mask(0))
        state[:] = [
            b.select(some, lowest(f, state[0], at), state[0]),
            b.select(some, lowest(f, b.add(at, I64(wide)), whole), state[1]),
        ]
    for number, value in enumerate(state):
        f.store(b.trunc(value, I32), found, number)


# ------------------------------------------------------------------------------------------------------------ products


def tiles(m: int) -> int:
    """Tiles of the rows of one matrix: what threads share."""
    return -(-m // TILES[0])


def product_sizes(*, m: int, n: int, k: int, digits: int) -> tuple[int, ...]:
    """What `product` reads."""
    return (m, n, words(k, digits), row_words(k, digits))


@cache
def product() -> str:
    """A module `product`(first, end tile; A words, A ranges, B words, C, sizes) of a batch of matrices.

    Tiles number six rows of A each, batch by batch; C is i32 [batch, m, n].
    """
    f = Function("product_body", [I64, I64, *[POINTER] * 5])
    first, end, a, ranges, right, c, sizes = f.arguments
    b, wide = f.builder, panel_columns()
    m, n, whole, stride = read_sizes(f, sizes, 4)
    count = b.sdiv(b.add(n, I64(wide - 1)), I64(wide))
    total = b.sdiv(b.add(m, I64(TILES[0] - 1)), I64(TILES[0]))
    panel_words = b.mul(whole, I64(wide))
    with f.loop(b.sdiv(first, total), b.sdiv(b.add(end, b.sub(total, I64(1))), total)) as (batch, _):
        origin = b.mul(batch, total)
        low, high = highest(f, b.sub(first, origin), I64(0)), lowest(f, b.sub(end, origin), total)
        row_end = lowest(f, b.mul(high, I64(TILES[0])), m)
        rows = f.at(a, b.mul(b.mul(batch, m), stride), I32)
        found = f.at(ranges, b.mul(b.mul(batch, m), I64(2)), I32)
        out = f.at(c, b.mul(batch, b.mul(m, n)), I32)
        with f.loop(b.mul(low, I64(TILES[0])), row_end, step=STRIP) as (strip, _):
            strip_end = lowest(f, b.add(strip, I64(STRIP)), row_end)
            with f.loop(0, count) as (number, _):
                columns = f.at(right, b.mul(b.add(b.mul(batch, count), number), panel_words), I32)
                column, row = b.mul(number, I64(wide)), strip
                for height in TILES:
                    stop = b.add(row, b.mul(b.sdiv(b.sub(strip_end, row), I64(height)), I64(height)))
                    with f.loop(row, stop, step=height) as (start, _):
                        _tile(f, height, start, column, (rows, stride, found, columns, out, n))
                    row = stop
    b.ret(I32(0))
    return entry("product", f, 5)


def _tile(f: Function, height: int, row: ir.Value, column: ir.Value, where: Sequence[ir.Value]) -> None:
    """C[row : row + height, column : column + panel] in vector accumulators."""
    rows, stride, found, columns, out, n = where
    b, wide = f.builder, lanes()
    vectors = panel_columns() // wide
    kind = ir.VectorType(I32, wide)
    lines = [b.add(row, I64(r)) for r in range(height)]
    ends = [[f.load(found, b.add(b.mul(line, I64(2)), I64(p)), I32) for line in lines] for p in (0, 1)]
    low, high = lowest(f, *ends[0]), highest(f, *ends[1])
    bases = [f.at(rows, b.mul(line, stride), I32) for line in lines]
    with f.loop(b.sext(low, I64), b.sext(high, I64), carried=[zeros(wide)] * (height * vectors)) as (word, state):
        here = f.at(columns, b.mul(word, I64(vectors * wide)), I32)
        right = [f.load(here, v, kind, align=4) for v in range(vectors)]
        for r, base in enumerate(bases):
            left = splat(f, f.load(base, word, I32), wide)
            for v in range(vectors):
                place = r * vectors + v
                state[place] = b.add(state[place], madd(f, right[v], left))
    left = b.trunc(b.sub(n, column), I32)
    for r, line in enumerate(lines):
        values = state[r * vectors : (r + 1) * vectors]
        store_row(f, values, f.at(out, b.add(b.mul(line, n), column), I32), left, wide)
