"""What storage computes over every byte: leaf hashes, roots of trees and byte planes, in machine code where that helps.

hashlib hashes one leaf at a time, and a round of SHA-256 waits for the one before. The kernels of `storage.sha256` hash
several in one stream of instructions, without Python from the first leaf to the last: threads share the cores, and not
the interpreter's lock.

Kernels are made when the first large buffer comes, and compared with hashlib and numpy before their first use: one that
differs, or that this processor or installation cannot have, is replaced by those. The bytes are the same either way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from threading import Lock
from time import perf_counter
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

LANES = 16
"""The most messages that a kernel hashes at once."""

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


def shuffle(data: ReadableBuffer, itemsize: int, out: WriteableBuffer) -> None:
    """Puts the byte planes of `data` into `out`: byte 0 of every item, then byte 1 of every item, and so on.

    Both are C-contiguous buffers of the same length. ValueError where the lengths differ, `out` is read-only or there
    is no whole number of items.
    """
    _transpose(*_both(data, out), itemsize, back=False)


def unshuffle(data: ReadableBuffer, itemsize: int, out: WriteableBuffer) -> None:
    """Puts the items whose byte planes `shuffle` made into `out`: the same the other way round."""
    _transpose(*_both(data, out), itemsize, back=True)


def _both(data: ReadableBuffer, out: WriteableBuffer) -> tuple[memoryview, memoryview]:
    source, target = _octets(data), _octets(out)
    if target.readonly:
        raise ValueError("byte planes: expected a buffer that can be written, got a read-only one")
    if len(target) != len(source):
        raise ValueError(f"byte planes: expected room for {len(source)} bytes, got {len(target)}")
    return source, target


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
    """The quickest kernel that hashes leaves and trees, None where there is none that does so like hashlib."""
    made = [_right_hashing(feature) for feature in ("avx512bw", "sha", "sha2")]  # sha2 is ARM's
    found = [kernel for kernel in made if kernel is not None]
    if len(found) > 1:
        return min(found, key=_seconds_of_hashing)
    return found[0] if found else _right_hashing("avx2")


def _right_hashing(feature: str) -> Kernel | None:
    sample = memoryview(bytes(range(251)) * 376)  # 24 leaves, one short: not a multiple of any lanes
    hashes = _slow_leaf_hashes(sample)
    odd = hashes[: 23 * 32]
    kernel = _compiled("hashing", partial(_hashing_text, feature), 7, feature)
    if kernel is None or _fast_leaf_hashes(kernel, sample) != hashes:
        return None
    return kernel if _fast_tree_root(kernel, odd) == _slow_tree_root(odd) else None


def _seconds_of_hashing(kernel: Kernel) -> float:
    """What it takes for 64 leaves, the quickest of three times."""
    sample, taken = memoryview(bytes(LARGE)), []
    for _ in range(3):
        began = perf_counter()
        _fast_leaf_hashes(kernel, sample)
        taken.append(perf_counter() - began)
    return min(taken)


def _hashing_text(feature: str) -> str:
    from storage.sha256 import ByArmInstruction, ByInstruction, ByLanes, hashing_text

    forms = {"avx512bw": ByLanes(16), "avx2": ByLanes(8), "sha": ByInstruction(), "sha2": ByArmInstruction()}
    return hashing_text(forms[feature])


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
