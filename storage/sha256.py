"""Code that hashes many messages in one stream of instructions: SHA-256 (FIPS 180-4) for `storage.kernels`.

A round of SHA-256 waits for the one before, so one message at a time leaves a processor half idle or worse. `ByLanes`
has a message in each lane of vectors of integers, so every step of a round is one instruction for all of them.
`ByInstruction` and `ByArmInstruction` have the instructions for SHA-256, and take turns between four messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce

from llvmlite import ir

from storage.native import I8, I32, I64, POINTER, Function

_START = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
"""The first state, a to h (FIPS 180-4 section 5.3.3)."""

# fmt: off
_ROUNDS = (
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
    0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
    0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
    0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
    0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
    0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
    0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
    0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
)
# fmt: on
"""The constants of the rounds (FIPS 180-4 section 4.2.2)."""

_BLOCK = 64
"""Bytes of a block, 16 words."""
_AHEAD = 12
"""Blocks."""

Values = list[ir.Value]


def hashing_text(form: Form) -> str:
    """A module `hashing`(count, halve, levels, size; ends, data, out): digests of a prefix and `size` bytes each.

    Leaves, halve = 0 and levels = 1: of the `count` messages in `data`; `out` has room for one more digest. A tree,
    halve = 1, levels its height and data = out: `count` digests become their root, two neighbours being a message.
    `ends` holds for each lane the first and the last block of a message, without the message's bytes.
    """
    f = Function("hashing", [*[I64] * 4, *[POINTER] * 3])
    count, halve, levels, size, ends, data, out = f.arguments
    b, half = f.builder, ir.VectorType(I8, 16)
    with f.loop(0, levels, carried=[count]) as (_, level):
        messages = b.lshr(level[0], halve)
        final = b.sub(messages, I64(1))
        with f.loop(0, messages, step=form.lanes) as (first, _):
            # Lanes without a message of their own repeat the last one.
            numbers = [f.intrinsic("llvm.smin.i64", I64, [b.add(first, I64(n)), final]) for n in range(form.lanes)]
            for number, digest in zip(numbers, _digests(f, form, numbers, data, size, ends), strict=True):
                for part, value in enumerate(digest):
                    f.store(value, out, b.add(b.mul(number, I64(2)), I64(part)), align=1)
        # An odd last digest goes up as it is. Where there is none, this lands after the level's end.
        for part in range(2):
            odd = f.load(out, b.add(b.mul(level[0], I64(2)), I64(part - 2)), half, align=1)
            f.store(odd, out, b.add(b.mul(b.lshr(level[0], halve), I64(2)), I64(part)), align=1)
        level[0] = b.lshr(b.add(level[0], halve), halve)
    b.ret(I32(0))
    return f.text()


def _digests(
    f: Function, form: Form, numbers: Values, data: ir.Value, size: ir.Value, ends: ir.Value
) -> list[tuple[ir.Value, ir.Value]]:
    """Each lane's digest as two vectors of bytes; all messages are read before any is returned."""
    b, vector = f.builder, ir.VectorType(I8, 16)
    messages = [f.at(data, b.mul(number, size), I8) for number in numbers]
    heads = [f.at(ends, 2 * _BLOCK * lane, I8) for lane in range(form.lanes)]
    tails = [f.at(ends, 2 * _BLOCK * lane + _BLOCK, I8) for lane in range(form.lanes)]
    for message, head, tail in zip(messages, heads, tails, strict=True):
        for at in (0, 16, 32, 47):  # 63 bytes after the prefix, no byte outside the message
            b.store(b.load(f.at(message, at, I8), typ=vector, align=1), f.at(head, at + 1, I8), align=1)
        b.store(f.load(message, b.sub(size, I64(1)), I8), tail)
    last = b.lshr(size, I64(6))
    with f.loop(0, b.add(last, I64(1)), carried=form.start()) as (block, carried):
        at = b.sub(b.mul(block, I64(_BLOCK)), I64(1))
        # Processors foresee a stream of addresses, not one a lane: this asks for what comes, in the next messages too.
        later = b.add(at, I64(_AHEAD * _BLOCK))
        after = b.add(later, b.mul(size, I64(form.lanes - 1)))
        coming = b.select(b.icmp_signed(">", b.add(block, I64(_AHEAD)), last), after, later)
        for message in messages:
            where = b.gep(message, [coming], source_etype=I8)
            f.intrinsic("llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(3), I32(1)])
        blocks = []
        for message, head, tail in zip(messages, heads, tails, strict=True):
            inner = b.gep(message, [at], source_etype=I8)
            rest = b.select(b.icmp_signed("==", block, last), tail, inner)
            blocks.append(b.select(b.icmp_signed("==", block, I64(0)), head, rest))
        carried[:] = form.compress(f, carried, blocks)
    return form.digests(f, carried)


class Form(ABC):
    """A way to hash `lanes` messages at once."""

    lanes: int

    @abstractmethod
    def start(self) -> Values:
        """The first state of all lanes."""

    @abstractmethod
    def compress(self, f: Function, state: Values, blocks: Values) -> Values:
        """The state after a block of each lane's message, at these addresses (FIPS 180-4 section 6.2.2)."""

    @abstractmethod
    def digests(self, f: Function, state: Values) -> list[tuple[ir.Value, ir.Value]]:
        """Of each lane, both halves of 16 bytes."""


# ------------------------------------------------------------------------------------------------------ a lane each


class ByLanes(Form):
    """Word n of all lanes is one vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._vector = ir.VectorType(I32, lanes)

    def start(self) -> Values:
        """See Form: a to h."""
        return [self._all(word) for word in _START]

    def compress(self, f: Function, state: Values, blocks: Values) -> Values:
        """See Form."""
        b, table = f.builder, _table(f)
        with b.goto_entry_block():
            schedule = b.alloca(self._vector, 64)  # the words of all rounds
        schedule.align = 4 * self.lanes
        for number, word in enumerate(self._words(f, blocks)):
            f.store(word, schedule, number)
        # Not all in a row: the constants would be held in registers that there are not.
        with f.loop(0, 48, step=16, carried=state) as (first, carried):
            for step in range(16):
                at = b.add(first, I64(step))
                carried[:] = self._round(f, carried, f.load(schedule, at, self._vector), f.load(table, at, I32))
                w = [f.load(schedule, b.add(at, I64(n)), self._vector) for n in (0, 1, 9, 14)]
                f.store(self._next_word(f, w), schedule, b.add(at, I64(16)))
        for step in range(48, 64):
            carried[:] = self._round(f, carried, f.load(schedule, step, self._vector), I32(_ROUNDS[step]))
        return [b.add(x, y) for x, y in zip(carried, state, strict=True)]

    def _round(self, f: Function, state: Values, word: ir.Value, constant: ir.Value) -> Values:
        b, (a, bb, c, d, e, ff, g, h) = f.builder, state
        chosen = b.xor(g, b.and_(e, b.xor(ff, g)))
        majority = b.xor(bb, b.and_(b.xor(a, bb), b.xor(bb, c)))  # b, but where a and c differ from it
        one = reduce(b.add, [h, word, self._repeated(f, constant), chosen, self._mixed(f, e, 6, 11, 25)])
        two = b.add(majority, self._mixed(f, a, 2, 13, 22))
        return [b.add(one, two), a, bb, c, b.add(d, one), e, ff, g]

    def _next_word(self, f: Function, w: Values) -> ir.Value:
        """The word of the message schedule that follows sixteen, of which `w` are number 0, 1, 9 and 14."""
        parts = [self._mixed(f, w[3], 17, 19, shift=10), w[2], self._mixed(f, w[1], 7, 18, shift=3), w[0]]
        return reduce(f.builder.add, parts)

    def digests(self, f: Function, state: Values) -> list[tuple[ir.Value, ir.Value]]:
        """See Form."""
        words = [f.intrinsic(f"llvm.bswap.v{self.lanes}i32", self._vector, [word]) for word in state]
        rows = _transposed(f, words + [self._all(0)] * (self.lanes - len(words)))
        octets = ir.VectorType(I8, 16)
        halves = ([_pick(f, row, row, list(range(at, at + 4))) for at in (0, 4)] for row in rows)
        return [(f.builder.bitcast(one, octets), f.builder.bitcast(two, octets)) for one, two in halves]

    def _words(self, f: Function, blocks: Values) -> Values:
        """The 16 words of each lane's block."""
        words = []
        for part in range(16 // self.lanes):
            rows = [f.load(block, part, self._vector, align=1) for block in blocks]
            words += _transposed(f, rows)
        return [f.intrinsic(f"llvm.bswap.v{self.lanes}i32", self._vector, [word]) for word in words]

    def _mixed(self, f: Function, value: ir.Value, *rotations: int, shift: int | None = None) -> ir.Value:
        """Exclusive or of the value rotated to the right, and shifted."""
        name = f"llvm.fshr.v{self.lanes}i32"
        parts = [f.intrinsic(name, self._vector, [value, value, self._all(by)]) for by in rotations]
        if shift is not None:
            parts.append(f.builder.lshr(value, self._all(shift)))
        return reduce(f.builder.xor, parts)

    def _all(self, word: int) -> ir.Constant:
        return ir.Constant(self._vector, [word] * self.lanes)

    def _repeated(self, f: Function, word: ir.Value) -> ir.Value:
        one = f.builder.insert_element(ir.Constant(self._vector, ir.Undefined), word, I32(0))
        return _pick(f, one, one, [0] * self.lanes)


def _table(f: Function) -> ir.Value:
    """Where the constants of the rounds are."""
    name, kind = "rounds", ir.ArrayType(I32, 64)
    if name not in f.module.globals:
        made = ir.GlobalVariable(f.module, kind, name)
        made.global_constant, made.linkage, made.initializer = True, "internal", ir.Constant(kind, list(_ROUNDS))
    return f.module.globals[name]


def _transposed(f: Function, rows: Values) -> Values:
    """Columns of as many rows as each has elements, a power of two: interleaving the first half with the second rotates
    the bits of every element's number by one."""
    count = len(rows)
    low, high = ([half + at // 2 + count * (at % 2) for at in range(count)] for half in (0, count // 2))
    for _ in range(count.bit_length() - 1):
        pairs = list(zip(rows[: count // 2], rows[count // 2 :], strict=True))
        rows = [_pick(f, one, two, places) for one, two in pairs for places in (low, high)]
    return rows


# ---------------------------------------------------------------------------------------------- an instruction for it

_I8X16, _I32X4 = ir.VectorType(I8, 16), ir.VectorType(I32, 4)
_BIG_ENDIAN = [4 * word + byte for word in range(4) for byte in (3, 2, 1, 0)]


class ByInstruction(Form):
    """x86's instructions for it: one that makes rounds takes 4 cycles, and one starts every 2. With 4 lanes none waits.

    A lane's state is two vectors, (f, e, b, a) and (h, g, d, c), as the instructions want them.
    """

    lanes = 4

    def start(self) -> Values:
        """See Form."""
        return [ir.Constant(_I32X4, [_START[word] for word in words]) for words in ((5, 4, 1, 0), (7, 6, 3, 2))] * 4

    def compress(self, f: Function, state: Values, blocks: Values) -> Values:
        """See Form: four rounds of one lane after four of another."""
        b = f.builder
        words = [[_swap(f, f.load(block, part, _I8X16, align=1), _I32X4) for part in range(4)] for block in blocks]
        now = list(state)
        for step in range(16):
            constants = ir.Constant(_I32X4, _ROUNDS[4 * step : 4 * step + 4])
            for lane, w in enumerate(words):
                added = b.add(w[0], constants)
                feba, hgdc = 2 * lane, 2 * lane + 1
                for places in ([0, 1, 2, 3], [2, 3, 2, 3]):  # an instruction makes two rounds
                    two = _pick(f, added, added, places)
                    made = f.intrinsic("llvm.x86.sha256rnds2", _I32X4, [now[hgdc], now[feba], two])
                    now[feba], now[hgdc] = made, now[feba]
                if step < 12:
                    w.append(self._next_words(f, w))
                w.pop(0)
        return [b.add(x, y) for x, y in zip(now, state, strict=True)]

    def digests(self, f: Function, state: Values) -> list[tuple[ir.Value, ir.Value]]:
        """See Form."""
        made = []
        for feba, hgdc in zip(state[::2], state[1::2], strict=True):
            halves = (_pick(f, feba, hgdc, places) for places in ([3, 2, 7, 6], [1, 0, 5, 4]))
            one, two = (_swap(f, f.builder.bitcast(half, _I8X16), _I8X16) for half in halves)
            made.append((one, two))
        return made

    def _next_words(self, f: Function, w: Values) -> ir.Value:
        """The four words of the message schedule that follow these sixteen."""
        part = f.intrinsic("llvm.x86.sha256msg1", _I32X4, [w[0], w[1]])
        part = f.builder.add(part, _pick(f, w[2], w[3], [1, 2, 3, 4]))
        return f.intrinsic("llvm.x86.sha256msg2", _I32X4, [part, w[3]])


class ByArmInstruction(Form):
    """ARM's instructions for it, each of which makes four rounds of one half of the state: (a to d) or (e to h)."""

    lanes = 4

    def start(self) -> Values:
        """See Form."""
        return [ir.Constant(_I32X4, list(_START[at : at + 4])) for at in (0, 4)] * self.lanes

    def compress(self, f: Function, state: Values, blocks: Values) -> Values:
        """See Form: four rounds of one lane after four of another."""
        b, now = f.builder, list(state)
        words = [[_swap(f, f.load(block, part, _I8X16, align=1), _I32X4) for part in range(4)] for block in blocks]
        for step in range(16):
            constants = ir.Constant(_I32X4, _ROUNDS[4 * step : 4 * step + 4])
            for lane, w in enumerate(words):
                added, (abcd, efgh) = b.add(w[0], constants), now[2 * lane : 2 * lane + 2]
                now[2 * lane] = _arm(f, "sha256h", abcd, efgh, added)
                now[2 * lane + 1] = _arm(f, "sha256h2", efgh, abcd, added)
                if step < 12:
                    w.append(_arm(f, "sha256su1", _arm(f, "sha256su0", w[0], w[1]), w[2], w[3]))
                w.pop(0)
        return [b.add(x, y) for x, y in zip(now, state, strict=True)]

    def digests(self, f: Function, state: Values) -> list[tuple[ir.Value, ir.Value]]:
        """See Form."""
        halves = [_swap(f, f.builder.bitcast(half, _I8X16), _I8X16) for half in state]
        return list(zip(halves[::2], halves[1::2], strict=True))


def _arm(f: Function, name: str, *vectors: ir.Value) -> ir.Value:
    return f.intrinsic(f"llvm.aarch64.crypto.{name}", _I32X4, vectors)


def _swap(f: Function, octets: ir.Value, kind: ir.Type) -> ir.Value:
    return f.builder.bitcast(_pick(f, octets, octets, _BIG_ENDIAN), kind)


def _pick(f: Function, left: ir.Value, right: ir.Value, places: list[int]) -> ir.Value:
    """The elements at `places` of two vectors one after the other."""
    return f.builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(places)), places))
