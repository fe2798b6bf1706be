"""Merkle trees against RFC 6962's recursive definition and the vectors of Certificate Transparency's own tests."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import merkle

VECTORS = json.loads((Path(__file__).parent / "vectors" / "merkle.json").read_text())
LEAVES = [bytes.fromhex(leaf) for leaf in VECTORS["leaves"]]

small_leaves = st.lists(st.binary(max_size=8), max_size=40)


def slow_root(items: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not items:
        return sha256(b"").digest()
    if len(items) == 1:
        return sha256(b"\x00" + items[0]).digest()
    split = 1 << (len(items) - 1).bit_length() - 1
    return sha256(b"\x01" + slow_root(items[:split]) + slow_root(items[split:])).digest()


def slow_proof(items: list[bytes], index: int) -> tuple[bytes, ...]:
    """RFC 6962 section 2.1.1, word for word."""
    if len(items) == 1:
        return ()
    split = 1 << (len(items) - 1).bit_length() - 1
    if index < split:
        return (*slow_proof(items[:split], index), slow_root(items[split:]))
    return (*slow_proof(items[split:], index - split), slow_root(items[:split]))


@pytest.mark.parametrize(("count", "expected"), list(enumerate(VECTORS["roots"])))
def test_root_is_the_published_one(count: int, expected: str) -> None:
    assert merkle.list_root(LEAVES[:count]).hex() == expected
    assert slow_root(LEAVES[:count]).hex() == expected


@pytest.mark.parametrize("case", VECTORS["inclusion"], ids=lambda case: case["name"])
def test_inclusion_vector(case: dict[str, Any]) -> None:
    proof = [bytes.fromhex(digest) for digest in case["proof"]]
    leaf, root = bytes.fromhex(case["leaf_hash"]), bytes.fromhex(case["root"])
    assert merkle.verify_inclusion(leaf, case["index"], case["count"], proof, root) is case["valid"]


@given(small_leaves)
def test_root_and_proofs_equal_the_definition(items: list[bytes]) -> None:
    hashes = [merkle.leaf_hash(item) for item in items]
    root = merkle.list_root(items)
    assert root == slow_root(items)
    for index, leaf in enumerate(hashes):
        proof = merkle.inclusion_proof(hashes, index)
        assert proof == slow_proof(items, index)
        assert merkle.verify_inclusion(leaf, index, len(items), proof, root)


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40, unique=True), st.data())
def test_tampered_proof_is_refused(items: list[bytes], data: st.DataObject) -> None:
    count = len(items)
    hashes = [merkle.leaf_hash(item) for item in items]
    index = data.draw(st.integers(0, count - 1))
    proof, root = merkle.inclusion_proof(hashes, index), merkle.root(hashes)
    bit = data.draw(st.integers(0, 255))

    def flip(digest: bytes) -> bytes:
        return (int.from_bytes(digest, "big") ^ 1 << bit).to_bytes(32, "big")

    assert not merkle.verify_inclusion(flip(hashes[index]), index, count, proof, root)
    assert not merkle.verify_inclusion(hashes[index], index, count, proof, flip(root))
    assert not merkle.verify_inclusion(hashes[index], index, count, (*proof, root), root)
    assert not merkle.verify_inclusion(hashes[index], count, count, proof, root)
    assert not merkle.verify_inclusion(hashes[index], -1, count, proof, root)
    for other in range(count):
        assert merkle.verify_inclusion(hashes[index], other, count, proof, root) is (other == index)
    for at in range(len(proof)):
        flipped = (*proof[:at], flip(proof[at]), *proof[at + 1 :])
        assert not merkle.verify_inclusion(hashes[index], index, count, flipped, root)
        assert not merkle.verify_inclusion(hashes[index], index, count, (*proof[:at], *proof[at + 1 :]), root)
        short = (*proof[:at], proof[at][:31], *proof[at + 1 :])
        assert not merkle.verify_inclusion(hashes[index], index, count, short, root)


@pytest.mark.parametrize("index", [-1, 3])
def test_proof_of_no_leaf_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"expected an index below 3, got {index}"):
        merkle.inclusion_proof([bytes(32)] * 3, index)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=70), st.integers(0, 4))
def test_roots_of_aligned_subtrees_compose(hashes: list[bytes], height: int) -> None:
    size = 1 << height
    roots = [merkle.root(hashes[at : at + size]) for at in range(0, len(hashes), size)]
    assert merkle.root(roots) == merkle.root(hashes)


@given(st.integers(0, 40 * merkle.LEAF_BYTES), st.integers(0, 3), st.integers(0, 255))
def test_roots_of_aligned_chunks_compose(size: int, height: int, byte: int) -> None:
    data = bytes([byte]) * size
    chunk = merkle.LEAF_BYTES << height
    roots = [merkle.bytes_root(data[at : at + chunk]) for at in range(0, size, chunk)]
    assert merkle.root(roots) == merkle.bytes_root(data)
    assert merkle.bytes_root(data) == slow_root([data[at : at + 4096] for at in range(0, size, 4096)])


@pytest.mark.parametrize("elements", [1, 2**18, 2**18 + 1, 3 * 2**18, 5 * 2**18 + 77])
def test_owners_of_chunks_get_the_root_of_the_tensor(elements: int) -> None:
    tensor = np.arange(elements, dtype="<f4")
    roots = [merkle.bytes_root(tensor[at : at + 2**18].data) for at in range(0, elements, 2**18)]
    assert merkle.root(roots) == merkle.bytes_root(tensor.data)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (3, 5), (1500,), (2, 3, 400)])
def test_any_contiguous_buffer_has_the_root_of_its_bytes(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype="<f4").reshape(shape)
    assert merkle.bytes_root(array.data) == merkle.bytes_root(array.tobytes())
    assert merkle.bytes_root(bytearray(array.tobytes())) == merkle.bytes_root(array.tobytes())
