"""Merkle trees over SHA-256 as in RFC 6962, section 2.1: ordered, with separate domains for leaves and tree nodes.

A tree splits at the largest power of two below its size. Pairing neighbours level by level and carrying an odd last one
up unchanged gives the same tree, so trees compose: where every subtree but the last has the same power-of-two number of
leaves, `root([root(a), root(b), ...]) == root([*a, *b, ...])`. Whoever holds an aligned chunk of a tensor can therefore
hash it alone, and the roots of the chunks give the tensor's root whatever the sharding was.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from storage import kernels

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DIGEST_BYTES = 32
LEAF_BYTES = kernels.LEAF_BYTES
CHUNK_LEAVES = 256
"""Leaves of one frame of a checkpoint (1 MiB): a power of two, so the roots of frames compose to the tensor's root."""

EMPTY_ROOT = sha256(b"").digest()
"""Root of a tree without leaves (RFC 6962 section 2.1)."""


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 | data), the hash of a leaf."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 | left | right), the hash of an inner tree node."""
    return sha256(b"\x01" + left + right).digest()


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root of the tree over leaves that are already hashed; `EMPTY_ROOT` without leaves."""
    if not leaf_hashes:
        return EMPTY_ROOT
    level = leaf_hashes
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def list_root(items: Sequence[bytes]) -> bytes:
    """Root of the tree whose leaves are `items`, in order."""
    return root([leaf_hash(item) for item in items])


def bytes_root(buffer: "ReadableBuffer") -> bytes:
    """Root of the tree over the buffer's bytes in leaves of 4 KiB, the last one short: the root of a tensor.

    Takes any C-contiguous buffer. The byte count is not in the root; records commit to it beside (`TensorEntry`).
    Other Python threads run meanwhile where `kernels` has a kernel.
    """
    return kernels.tree_root(kernels.leaf_hashes(buffer))


def inclusion_proof(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Siblings from leaf `index` up to the root (RFC 6962 section 2.1.1); IndexError where there is no such leaf."""
    if not 0 <= index < len(leaf_hashes):
        raise IndexError(f"inclusion proof: expected an index below {len(leaf_hashes)}, got {index}")
    proof = []
    level = leaf_hashes
    while len(level) > 1:
        if index ^ 1 < len(level):
            proof.append(level[index ^ 1])
        level = _parents(level)
        index >>= 1
    return tuple(proof)


def verify_inclusion(leaf: bytes, index: int, count: int, proof: Sequence[bytes], expected_root: bytes) -> bool:
    """Whether the hashed `leaf` is number `index` of the `count` leaves below `expected_root`.

    A proof of the wrong length, or with an entry that is no digest, is refused: index and count fix the length.
    """
    if not 0 <= index < count or any(len(digest) != DIGEST_BYTES for digest in (leaf, *proof)):
        return False
    siblings = iter(proof)
    node = leaf
    while count > 1:
        if index ^ 1 < count:
            sibling = next(siblings, None)
            if sibling is None:
                return False
            node = node_hash(sibling, node) if index & 1 else node_hash(node, sibling)
        index >>= 1
        count = (count + 1) >> 1
    return next(siblings, None) is None and node == expected_root


def _parents(level: Sequence[bytes]) -> list[bytes]:
    pairs = zip(level[::2], level[1::2], strict=False)
    parents = [sha256(b"\x01" + left + right).digest() for left, right in pairs]
    if len(level) % 2:
        parents.append(level[-1])
    return parents
