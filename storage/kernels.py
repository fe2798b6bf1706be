"""What storage computes over every byte: leaf hashes, roots of trees and byte planes, in machine code where that helps.

hashlib hashes one leaf at a time, and a round of SHA-256 waits for the one before: a processor with SHA instructions is
half idle. The kernel here hashes `LANES` messages in one stream of instructions. It also runs without Python from the
first leaf to the last, so threads share the cores and not the interpreter's lock.

Kernels are made when the first large buffer comes, and compared with hashlib and numpy before their first use: one that
differs, or that this processor or installation cannot have, is replaced by those. The bytes are the same either way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from storage.native import Function, Library

LEAF_BYTES = 4096
"""Bytes of a leaf of a tensor's tree; the last one is short."""

LARGE = 64 * LEAF_BYTES
"""Bytes below which hashlib and numpy do: a buffer like that is not worth the 0.05 s that loading a kernel may take."""

LANES = 4
"""Messages hashed at once: an instruction for rounds takes 4 cycles and one starts every 2; with 4 none waits long."""

WIDTHS = (2, 4, 8)
"""Item sizes whose byte planes have a kernel."""

Kernel = Callable[..., int]
"""A compiled function: takes i64 numbers and addresses, returns 0, lets other Python threads run meanwhile."""

_LOADING = Lock()


def leaf_hashes(data: ReadableBuffer) -> bytes:
    """SHA-256(0x00 | leaf) of each leaf of 4 KiB, 32 bytes each, concatenated: RFC 6962 section 2.1.

    Takes any C-contiguous buffer and does not copy it; empty without leaves.
    """
    octets = _octets(data)
    kernel = _loaded(_hashing) if len(octets) >= LARGE else None
    return _slow_leaf_hashes(octets) if kernel is None else _fast_leaf_hashes(kernel, octets)


def tree_root(hashes: bytes) -> bytes:
    """Root of the tree over concatenated leaf hashes (RFC 6962 section 2.1); SHA-256 of nothing where there are none.

    ValueError where the bytes are not a whole number of hashes of 32 bytes.
    """
    if len(hashes) % 32:
        raise ValueError(f"tree root: expected hashes of 32 bytes each, got {len(hashes)} bytes")
    kernel = _loaded(_hashing) if len(hashes) >= LARGE // LEAF_BYTES * 32 else None
    return _slow_tree_root(hashes) if kernel is None else _fast_tree_root(kernel, hashes)


def shuffle(data: ReadableBuffer, itemsize: int) -> memoryview:
    """The byte planes of a C-contiguous buffer: byte 0 of every item, then byte 1 of every item, and so on.

    ValueError where the buffer does not hold a whole number of items.
    """
    octets = _octets(data)
    planes = np.empty(len(octets), np.uint8).data  # not a bytearray, whose pages the system would clear each time
    _transpose(octets, planes, itemsize, back=False)
    return planes


def unshuffle(data: ReadableBuffer, itemsize: int, out: WriteableBuffer) -> None:
    """Puts the items whose byte planes `shuffle` made into `out`, a C-contiguous buffer of the same length elsewhere.

    ValueError where the lengths differ, `out` is read-only or there is no whole number of items.
    """
    octets, items = _octets(data), _octets(out)
    if items.readonly:
        raise ValueError("unshuffle: expected a buffer that can be written, got a read-only one")
    if len(items) != len(octets):
        raise ValueError(f"unshuffle: expected room for {len(octets)} bytes, got {len(items)}")
    _transpose(octets, items, itemsize, back=True)


def _octets(buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    return (
        view.cast("B") if view.nbytes else memoryview(bytearray())
    )  # an empty one of several dimensions cannot be cast


def _array(octets: memoryview | bytes | bytearray) -> NDArray[np.uint8]:
    return np.frombuffer(octets, np.uint8)


# ------------------------------------------------------------------------------------------------------------- hashing


def _slow_leaf_hashes(octets: memoryview) -> bytes:
    begin = sha256(b"\x00").copy  # a copied state costs less than a new hash of a copied leaf
    hashes = []
    for at in range(0, len(octets), LEAF_BYTES):
        leaf = begin()
        leaf.update(octets[at : at + LEAF_BYTES])
        hashes.append(leaf.digest())
    return b"".join(hashes)


def _slow_tree_root(hashes: bytes) -> bytes:
    if not hashes:
        return sha256().digest()
    while len(hashes) > 32:
        pairs = len(hashes) // 64 * 64
        parents = [sha256(b"\x01" + hashes[at : at + 64]).digest() for at in range(0, pairs, 64)]
        hashes = b"".join((*parents, hashes[pairs:]))
    return hashes


def _fast_leaf_hashes(kernel: Kernel, octets: memoryview) -> bytes:
    whole = len(octets) // LEAF_BYTES
    hashes, ends = np.empty((whole + 1) * 32, np.uint8), _ends(0x00, LEAF_BYTES)
    kernel(whole, 0, 1, LEAF_BYTES, ends.ctypes.data, _array(octets).ctypes.data, hashes.ctypes.data)
    return hashes[:-32].tobytes() + _slow_leaf_hashes(octets[whole * LEAF_BYTES :])


def _fast_tree_root(kernel: Kernel, hashes: bytes) -> bytes:
    count = len(hashes) // 32
    nodes, ends = _array(hashes).copy(), _ends(0x01, 64)
    kernel(count, 1, (count - 1).bit_length(), 64, ends.ctypes.data, nodes.ctypes.data, nodes.ctypes.data)
    return nodes[:32].tobytes()


def _ends(prefix: int, size: int) -> NDArray[np.uint8]:
    """For each lane, the first and the last block of a message of `size` bytes after a prefix, without those bytes."""
    bits = (size + 1) * 8
    block = bytes([prefix]) + bytes(63) + b"\x00\x80" + bytes(54) + bits.to_bytes(8, "big")
    return _array(bytearray(block * LANES))


# -------------------------------------------------------------------------------------------------------- byte planes


def _transpose(source: memoryview, target: memoryview, itemsize: int, back: bool) -> None:
    """Items to planes, or `back`."""
    if len(source) % itemsize:
        raise ValueError(f"byte planes: expected a multiple of {itemsize} bytes, got {len(source)}")
    kernel = _loaded(_transposing, itemsize, back) if itemsize in WIDTHS and len(source) >= LARGE else None
    done = 0 if kernel is None else _fast_transpose(kernel, source, target, itemsize)
    _slow_transpose(source, target, itemsize, back, done)


def _slow_transpose(source: memoryview, target: memoryview, itemsize: int, back: bool, start: int = 0) -> None:
    """Puts the items from `start` on in place."""
    count = len(source) // itemsize
    items, planes = (count, itemsize), (itemsize, count)
    if back:
        _array(target).reshape(items)[start:] = _array(source).reshape(planes)[:, start:].T
    else:
        _array(target).reshape(planes)[:, start:] = _array(source).reshape(items)[start:].T


def _fast_transpose(kernel: Kernel, source: memoryview, target: memoryview, itemsize: int) -> int:
    """Puts whole blocks of 16 items in place; how many items those are."""
    count = len(source) // itemsize
    done = count // 16 * 16
    kernel(count, done, _array(source).ctypes.data, _array(target).ctypes.data)
    return done


# ------------------------------------------------------------------------------------------------------------- loading


def _loaded(load: Callable[..., Kernel | None], *of: Any) -> Kernel | None:
    with _LOADING:  # threads come with their first buffers at once: one compiles, the others wait for it
        return load(*of)


@cache
def _hashing() -> Kernel | None:
    """The kernel that hashes leaves and trees, None where there is none that does so like hashlib."""
    kernel = _compiled("hashing", _hashing_text, 7, "sha")  # a feature of x86 only: ARM's is called sha2
    if kernel is None:
        return None
    sample = memoryview(bytes(range(251)) * 98)  # 7 leaves, one short: not a multiple of the lanes, and odd
    hashes = _slow_leaf_hashes(sample)
    right = _fast_leaf_hashes(kernel, sample) == hashes and _fast_tree_root(kernel, hashes) == _slow_tree_root(hashes)
    return kernel if right else None


@cache
def _transposing(itemsize: int, back: bool) -> Kernel | None:
    """The kernel that makes planes of items or the reverse, None where there is none that does so like numpy."""
    kernel = _compiled("transposing", lambda: _transposing_text(itemsize, back), 4)
    if kernel is None:
        return None
    sample = memoryview(bytes(range(32 * itemsize)))  # two blocks, in which no byte is like another
    wanted, got = bytearray(len(sample)), bytearray(len(sample))
    _slow_transpose(sample, memoryview(wanted), itemsize, back)
    _fast_transpose(kernel, sample, memoryview(got), itemsize)
    return kernel if got == wanted else None


def _compiled(name: str, text: Callable[[], str], arguments: int, *needs: str) -> Kernel | None:
    """A module's function; None where `native.features` lacks what it needs, or without a working LLVM."""
    try:
        from storage.native import features

        if not features().issuperset(needs):
            return None
        (address,) = _library().add([(name, text())])
    except (ImportError, OSError, RuntimeError):  # llvmlite's own library is missing, or is not for this system
        return None
    return ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * arguments)(address)


@cache
def _library() -> Library:
    from storage.native import Library, cache_folder

    return Library(cache_folder())


# --------------------------------------------------------------------------------------------------- code: byte planes

_I8X16, _I32X4 = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(32), 4)


def _pick(f: Function, left: ir.Value, right: ir.Value, places: list[int]) -> ir.Value:
    """The elements at `places` of two vectors one after the other."""
    return f.builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))


def _transposing_text(itemsize: int, back: bool) -> str:
    """A module `transposing`(count, done; source, target) for the first `done` items of `count`, a multiple of 16.

    Numbering a block's bytes in registers, interleaving its two halves moves a byte from place 2^a to 2^(a+1): rotates
    the bits of its number by one. An item's number has 4 bits, a byte's inside its item log2(itemsize).
    """
    from storage.native import I8, I32, I64, POINTER, Function

    f = Function("transposing", [I64, I64, POINTER, POINTER])
    count, done, source, target = f.arguments
    b = f.builder
    low, high = ([half + at // 2 + 16 * (at % 2) for at in range(16)] for half in (0, 8))
    with f.loop(0, done, step=16) as (item, _):
        items = [b.add(b.mul(item, I64(itemsize)), I64(16 * n)) for n in range(itemsize)]
        planes = [b.add(item, b.mul(count, I64(n))) for n in range(itemsize)]
        block = [b.load(f.at(source, at, I8), typ=_I8X16, align=1) for at in (planes if back else items)]
        for _ in range(itemsize.bit_length() - 1 if back else 4):
            halves = list(zip(block[: itemsize // 2], block[itemsize // 2 :], strict=True))
            block = [_pick(f, one, two, places) for one, two in halves for places in (low, high)]
        for at, part in zip(items if back else planes, block, strict=True):
            b.store(part, f.at(target, at, I8), align=1)
    b.ret(I32(0))
    return f.text()


# ------------------------------------------------------------------------------------------------------- code: hashing

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

_BIG_ENDIAN = [4 * word + byte for word in range(4) for byte in (3, 2, 1, 0)]

_State = list[ir.Value]
"""Of one lane: two vectors, (f, e, b, a) and (h, g, d, c), as the instructions want them."""


def _hashing_text() -> str:
    """A module `hashing`(count, halve, levels, size; ends, data, out): digests of a prefix and `size` bytes each.

    Leaves, halve = 0 and levels = 1: of the `count` messages in `data`; `out` has room for one more digest. A tree,
    halve = 1, levels its height and data = out: `count` digests become their root, two neighbours being a message.
    """
    from storage.native import I32, I64, POINTER, Function

    f = Function("hashing", [*[I64] * 4, *[POINTER] * 3])
    count, halve, levels, size, ends, data, out = f.arguments
    b = f.builder
    with f.loop(0, levels, carried=[count]) as (_, level):
        messages = b.lshr(level[0], halve)
        final = b.sub(messages, I64(1))
        with f.loop(0, messages, step=LANES) as (first, _):
            # Lanes without a message of their own repeat the last one.
            numbers = [f.intrinsic("llvm.smin.i64", I64, [b.add(first, I64(n)), final]) for n in range(LANES)]
            digests = _digests(f, numbers, data, size, ends)
            for number, digest in zip(numbers, digests, strict=True):
                for half, value in enumerate(digest):
                    f.store(value, out, b.add(b.mul(number, I64(2)), I64(half)), align=1)
        # An odd last digest goes up as it is. Where there is none, this lands after the level's end.
        for half in range(2):
            odd = f.load(out, b.add(b.mul(level[0], I64(2)), I64(half - 2)), _I8X16, align=1)
            f.store(odd, out, b.add(b.mul(b.lshr(level[0], halve), I64(2)), I64(half)), align=1)
        level[0] = b.lshr(b.add(level[0], halve), halve)
    b.ret(I32(0))
    return f.text()


def _digests(f: Function, numbers: list[ir.Value], data: ir.Value, size: ir.Value, ends: ir.Value) -> list[_State]:
    """Each lane's digest as two vectors of bytes; all messages are read before any is returned."""
    from storage.native import I8, I64

    b = f.builder
    messages = [f.at(data, b.mul(number, size), I8) for number in numbers]
    heads = [f.at(ends, 128 * lane, I8) for lane in range(LANES)]
    tails = [f.at(ends, 128 * lane + 64, I8) for lane in range(LANES)]
    for message, head, tail in zip(messages, heads, tails, strict=True):
        for at in (0, 16, 32, 47):  # 63 bytes after the prefix, no byte outside the message
            b.store(b.load(f.at(message, at, I8), typ=_I8X16, align=1), f.at(head, at + 1, I8), align=1)
        b.store(f.load(message, b.sub(size, I64(1)), I8), tail)
    last = b.lshr(size, I64(6))
    start = [ir.Constant(_I32X4, [_START[word] for word in words]) for words in ((5, 4, 1, 0), (7, 6, 3, 2))]
    with f.loop(0, b.add(last, I64(1)), carried=start * LANES) as (block, carried):
        at = b.sub(b.mul(block, I64(64)), I64(1))
        states = [carried[2 * lane : 2 * lane + 2] for lane in range(LANES)]
        blocks = []
        for message, head, tail in zip(messages, heads, tails, strict=True):
            inner = b.gep(message, [at], source_etype=I8)
            rest = b.select(b.icmp_signed("==", block, last), tail, inner)
            blocks.append(b.select(b.icmp_signed("==", block, I64(0)), head, rest))
        carried[:] = [half for state in _compress(f, states, blocks) for half in state]
    made = []
    for feba, hgdc in zip(carried[::2], carried[1::2], strict=True):
        words = [_pick(f, feba, hgdc, places) for places in ([3, 2, 7, 6], [1, 0, 5, 4])]
        made.append([_swap(f, b.bitcast(half, _I8X16)) for half in words])
    return made


def _swap(f: Function, octets: ir.Value) -> ir.Value:
    return _pick(f, octets, octets, _BIG_ENDIAN)


def _compress(f: Function, states: list[_State], blocks: list[ir.Value]) -> list[_State]:
    """The states after a block each (FIPS 180-4 section 6.2.2), four rounds of one lane after four of another."""
    b = f.builder
    words = [
        [b.bitcast(_swap(f, f.load(block, part, _I8X16, align=1)), _I32X4) for part in range(4)] for block in blocks
    ]
    now = [list(state) for state in states]
    for step in range(16):
        constants = ir.Constant(_I32X4, _ROUNDS[4 * step : 4 * step + 4])
        for state, w in zip(now, words, strict=True):
            added = b.add(w[0], constants)
            for half, places in enumerate(([0, 1, 2, 3], [2, 3, 2, 3])):  # an instruction makes two rounds
                two = _pick(f, added, added, places)
                state[1 - half] = f.intrinsic("llvm.x86.sha256rnds2", _I32X4, [state[1 - half], state[half], two])
            if step < 12:
                w.append(_next_words(f, w))
            w.pop(0)
    return [[b.add(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(now, states, strict=True)]


def _next_words(f: Function, w: list[ir.Value]) -> ir.Value:
    """The four words of the message schedule that follow these sixteen."""
    part = f.intrinsic("llvm.x86.sha256msg1", _I32X4, [w[0], w[1]])
    part = f.builder.add(part, _pick(f, w[2], w[3], [1, 2, 3, 4]))
    return f.intrinsic("llvm.x86.sha256msg2", _I32X4, [part, w[3]])
