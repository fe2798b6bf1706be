"""Digit products where no instruction takes four bytes: `pmaddwd` multiplies 16-bit pairs and adds to 32 bits.

A sum of shifted digit products is `sum_i a_i (sum_j b_j << s_ij)`, where the inner sum, a combination, fits 16 bits. So
the kernel multiplies a matrix of A's digits, one after the other along K, by one of B's combinations: a product of two
slices takes one instruction for a vector of outputs and a step along K, as many as float32 takes. All is modulo 2^32,
where the true sum lies.

A is packed row by row and B into panels, `[panel][words][columns]`, a word being two neighbours of 16 bits (`words`);
zeros to the end. What lies outside of a row's first and last digits is skipped, which halves the work for causal
attention.

Sizes and strides are read from an i64 array that comes last in every table, so a few kernels serve all shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

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
STRIP = 64 * TILES[0]
"""Rows of A that go through all panels before the next ones do: they stay in a cache meanwhile."""
MADD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
ALIGNED = 16
"""Words that a packed row of A is a multiple of."""


def lanes() -> int:
    """i32 lanes of this processor's vectors; 0 where it has no such instruction."""
    found = features()
    return next((n for n, name in ((16, "avx512bw"), (8, "avx2"), (4, "sse2")) if name in found), 0)


def panel_columns() -> int:
    """Columns of B in a panel: what thirty-two registers allow for 16 lanes, or sixteen for fewer."""
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


def grouped(digits: int) -> tuple[int, int]:
    """(places along K, words) that are the fewest to make up whole words of so many digits."""
    return (1, digits // 2) if digits % 2 == 0 else (2, digits)


def words(k: int, digits: int) -> int:
    """Words along K of so many digits: all groups' first words, then their second ones, and so on."""
    step, made = grouped(digits)
    return made * -(-k // step)


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


class _Digits:
    """Words of one matrix of the sources: `halves` says what each half is made of; `along` is the axis of stride 1.

    Places along K are counted in groups of `step`, the fewest that make up whole words, which are `made` words.
    """

    def __init__(self, f: Function, sizes: ir.Value, along: str, halves: Sequence[Combination]) -> None:
        self.f, self.b, self.halves = f, f.builder, halves
        self.step, self.made = grouped(len(halves))
        self.sizes, self.along = sizes, along
        self.k, self.other = read_sizes(f, sizes, 2)
        self.groups = self.b.sdiv(self.b.add(self.k, I64(self.step - 1)), I64(self.step))
        self.full = self.b.sdiv(self.k, I64(self.step))
        self.words = self.b.mul(self.groups, I64(self.made))

    def open(self, pointers: Sequence[ir.Value], number: ir.Value) -> None:
        """Go to matrix `number` of the sources."""
        found = read_sizes(self.f, self.sizes, 2 + 7 * len(pointers))[2:]
        self.bases, self.strides = [], []
        for i, pointer in enumerate(pointers):
            offset, stride_k, stride_n, *batch = found[7 * i : 7 * i + 7]
            self.bases.append(matrix(self.f, pointer, number, batch, offset))
            ones = [I64(1) if self.along == axis else s for axis, s in (("k", stride_k), ("other", stride_n))]
            self.strides.append(ones)

    def place(self, number: int, group: ir.Value) -> ir.Value:
        """Which word along K is word `number` of a group."""
        return self.b.add(self.b.mul(self.groups, I64(number)), group)

    def word(self, number: int, group: ir.Value, line: ir.Value) -> ir.Value:
        """Word `number` of a group, at place `line` along the other axis; digits beyond K are zeros."""
        first = self.b.mul(group, I64(self.step))

        def digit(source: int, further: int) -> ir.Value:
            place = self.b.add(first, I64(further))
            if not further:
                return self.b.sext(self.f.load(self._at(source, place, line), 0, I8), I32)
            inside = self.b.icmp_signed("<", place, self.k)
            near = lowest(self.f, place, self.b.sub(self.k, I64(1)))
            return self.b.select(inside, self.b.sext(self.f.load(self._at(source, near, line), 0, I8), I32), I32(0))

        return self._joined(number, digit, I32)

    def block(self, group: ir.Value, line: ir.Value) -> list[list[ir.Value]]:
        """For each word of a group: vectors of that word over `lanes` groups, at as many places along the other axis.

        `along` has to be an axis, and all of it inside.
        """
        wide = lanes()
        first = self.b.mul(group, I64(self.step))
        found: list[list[ir.Value]] = [[] for _ in range(self.made)]
        for number in range(wide):
            for word in range(self.made):
                if self.along == "k":
                    at = self.b.add(line, I64(number))
                    read = partial(self._over_groups, first, at)
                else:
                    read = partial(self._over_lines, self.b.add(first, I64(number * self.step)), line)
                found[word].append(self._joined(word, read, ir.VectorType(I32, wide)))
        return found if self.along == "k" else [transposed(self.f, vectors) for vectors in found]

    def _over_groups(self, first: ir.Value, line: ir.Value, source: int, further: int) -> ir.Value:
        """A digit of `lanes` groups that follow each other along K."""
        wide = lanes() * self.step
        given = self.f.load(self._at(source, first, line), 0, ir.VectorType(I8, wide), align=1)
        if self.step > 1:
            chosen = ir.Constant(ir.VectorType(I32, lanes()), [further + self.step * lane for lane in range(lanes())])
            given = self.b.shuffle_vector(given, ir.Constant(given.type, ir.Undefined), chosen)
        return self.b.sext(given, ir.VectorType(I32, lanes()))

    def _over_lines(self, first: ir.Value, line: ir.Value, source: int, further: int) -> ir.Value:
        """A digit at one place along K, for `lanes` places along the other axis."""
        place = self._at(source, self.b.add(first, I64(further)), line)
        kind = ir.VectorType(I8, lanes())
        return self.b.sext(self.f.load(place, 0, kind, align=1), ir.VectorType(I32, lanes()))

    def _at(self, source: int, k: ir.Value, line: ir.Value) -> ir.Value:
        stride_k, stride_n = self.strides[source]
        place = self.b.add(self.b.mul(k, stride_k), self.b.mul(line, stride_n))
        return self.b.gep(self.bases[source], [place], source_etype=I8)

    def _joined(self, number: int, digit: Callable[[int, int], ir.Value], kind: ir.Type) -> ir.Value:
        """A word's two halves, from `digit(source, places further along K)`."""
        made = []
        for position in (2 * number, 2 * number + 1):
            further, i = divmod(position, len(self.halves))
            total = None
            for source, shift in self.halves[i]:
                part = self.b.shl(digit(source, further), _all(kind, shift)) if shift else digit(source, further)
                total = part if total is None else self.b.add(total, part)
            made.append(_all(kind, 0) if total is None else total)
        return self.b.or_(self.b.and_(made[0], _all(kind, 0xFFFF)), self.b.shl(made[1], _all(kind, 16)))


def _all(kind: ir.Type, value: int) -> ir.Value:
    """A number in an i32, or in every lane."""
    return ir.Constant(kind, [value] * kind.count) if isinstance(kind, ir.VectorType) else kind(value)


def transposed(f: Function, vectors: Sequence[ir.Value]) -> list[ir.Value]:
    """As many vectors as they have lanes, the other way round: halves change places, then quarters, down to lanes."""
    found, count = list(vectors), len(vectors)
    distance = count // 2
    while distance:
        for i in range(count):
            if not i & distance:
                low = [e if not e & distance else count + e - distance for e in range(count)]
                high = [e + distance if not e & distance else count + e for e in range(count)]
                pair = found[i], found[i + distance]
                found[i], found[i + distance] = (
                    f.builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, count), chosen))
                    for chosen in (low, high)
                )
        distance //= 2
    return found


@cache
def pack_right(*, along: str, given: int, chosen: tuple[Combination, ...]) -> str:
    """A module `pack`(first, end panel; sources..., target, sizes) of a batch of B's digits as combinations.

    `along` is "k", "other" (B's columns) or neither: the axis along which digits are neighbours.
    """
    f = Function("pack_body", [I64, I64, *[POINTER] * (given + 2)])
    first, end, *pointers, target, sizes = f.arguments
    b, wide, vector = f.builder, panel_columns(), lanes()
    digits = _Digits(f, sizes, along, chosen)
    count = b.sdiv(b.add(digits.other, I64(wide - 1)), I64(wide))
    with f.loop(first, end) as (number, _):
        digits.open(pointers, b.sdiv(number, count))
        column = b.mul(b.srem(number, count), I64(wide))
        columns = lowest(f, b.sub(digits.other, column), I64(wide))
        base = f.at(target, b.mul(number, b.mul(digits.words, I64(wide))), I32)

        def row(group: ir.Value, word: int) -> ir.Value:
            return f.at(base, b.mul(digits.place(word, group), I64(wide)), I32)

        done: ir.Value = I64(0)
        if along == "k":
            whole = b.icmp_signed("==", columns, I64(wide))
            done = b.select(whole, b.mul(b.sdiv(digits.full, I64(vector)), I64(vector)), I64(0))
            with f.loop(0, done, step=vector) as (group, _):
                for part in range(wide // vector):
                    made = digits.block(group, b.add(column, I64(part * vector)))
                    for word, vectors in enumerate(made):
                        for further, value in enumerate(transposed(f, vectors)):
                            place = f.at(row(b.add(group, I64(further)), word), part * vector, I32)
                            b.store(value, place, align=4)
        with f.loop(done, digits.groups) as (group, _):
            for word in range(digits.made):
                with f.loop(0, columns) as (j, _):
                    f.store(digits.word(word, group, b.add(column, j)), row(group, word), j)
                with f.loop(columns, wide) as (j, _):
                    f.store(I32(0), row(group, word), j)
    b.ret(I32(0))
    return entry("pack", f, given + 2)


@cache
def pack_left(*, along: str, digits: int) -> str:
    """A module `pack`(first, end block; sources..., target, ranges, sizes) of a batch of A's digits, row by row.

    `along` is "k", "other" (A's rows) or neither. `ranges` is i32 [matrix][m][2]: the first word with a digit, rounded
    down to a vector, and the end of the last one.
    """
    f = Function("pack_body", [I64, I64, *[POINTER] * (digits + 3)])
    first, end, *pointers, target, ranges, sizes = f.arguments
    b, vector = f.builder, lanes()
    read = _Digits(f, sizes, along, [((i, 0),) for i in range(digits)])
    m = read.other
    stride = b.mul(b.sdiv(b.add(read.words, I64(ALIGNED - 1)), I64(ALIGNED)), I64(ALIGNED))
    count = b.sdiv(b.add(m, I64(BLOCK - 1)), I64(BLOCK))
    with f.loop(first, end) as (number, _):
        which = b.sdiv(number, count)
        read.open(pointers, which)
        start = b.mul(b.srem(number, count), I64(BLOCK))
        stop = lowest(f, b.add(start, I64(BLOCK)), m)
        origin = b.mul(which, m)

        def place(row: ir.Value, group: ir.Value, word: int) -> ir.Value:
            return f.at(target, b.add(b.mul(b.add(origin, row), stride), read.place(word, group)), I32)

        done: ir.Value = I64(0)
        if along == "other":
            whole = b.icmp_signed("==", b.sub(stop, start), I64(BLOCK))
            done = b.select(whole, b.mul(b.sdiv(read.full, I64(vector)), I64(vector)), I64(0))
            with f.loop(0, done, step=vector) as (group, _):
                for part in range(0, BLOCK, vector):
                    for word, made in enumerate(read.block(group, b.add(start, I64(part)))):
                        for r, value in enumerate(made):
                            b.store(value, place(b.add(start, I64(part + r)), group, word), align=4)
        with f.loop(start, stop) as (row, _), f.loop(done, read.groups) as (group, _):
            for word in range(read.made):
                b.store(read.word(word, group, row), place(row, group, word))
        with f.loop(start, stop) as (row, _):
            line = b.add(origin, row)
            base = f.at(target, b.mul(line, stride), I32)
            with f.loop(read.words, stride) as (at, _):
                f.store(I32(0), base, at)
            _scan(f, base, stride, read.words, f.at(ranges, b.mul(line, I64(2)), I32))
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
