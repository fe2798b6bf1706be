"""Proofs that one element of a tensor is in a state, and the state in a segment: JSON that anybody checks offline.

    element -> leaf of 4 KiB -> tensor root -> TensorEntry -> state root (-> SegmentRecord, whose digest a ledger has)

Every step is an RFC 6962 inclusion proof; siblings come from the leaves of one frame, from the roots of the tensor's
frames and from the entries of the manifest, so the prover reads one frame and the verifier a few kilobytes. The fields
are in docs/formats.md. Everything in a proof is hashed, so a proof that passes says what its root says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import merkle
from storage.checkpoints import Checkpoint
from storage.codec import decode, encode, record_digest
from storage.errors import IntegrityError, UsageError
from storage.foreign import parse_json
from storage.frames import FRAME_BYTES
from storage.manifest import DTYPES, itemsize, tensor_bytes
from storage.records import SegmentRecord, TensorEntry

FORMAT = "trueweight-proof-1"


class FalseProof(UsageError):
    """A proof does not show what it claims."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Proven:
    """What a checked proof shows: the element's value and its place, below `state_root`.

    `segment` is the record that commits to that root as its poststate, and `segment_digest` its digest, where given.
    """

    state_root: bytes
    entry: TensorEntry
    index: tuple[int, ...]
    value: int | float | bool
    bits: str
    segment: SegmentRecord | None
    segment_digest: bytes | None


def prove(
    checkpoint: Checkpoint, name: str, index: Sequence[int], segment: SegmentRecord | None = None
) -> dict[str, Any]:
    """The proof of an element of a tensor, as JSON values; `segment` is the one whose poststate the checkpoint is."""
    number = checkpoint.number(name)
    manifest, entry = checkpoint.manifest, checkpoint.manifest.tensors[number]
    flat = _flat(entry, index)
    leaf, _ = divmod(flat * itemsize(entry), merkle.LEAF_BYTES)
    frame, within = divmod(leaf, merkle.CHUNK_LEAVES)
    first, stop = int(manifest.first[number]), int(manifest.first[number + 1])
    raw, hashes = _frame(checkpoint, first + frame)
    leaves = [hashes[at : at + merkle.DIGEST_BYTES] for at in range(0, len(hashes), merkle.DIGEST_BYTES)]
    roots = [root.tobytes() for root in manifest.frames["root"][first:stop]]
    path = (*merkle.inclusion_proof(leaves, within), *merkle.inclusion_proof(roots, frame))
    entries = [merkle.leaf_hash(encode(one)) for one in manifest.tensors]
    data = raw[within * merkle.LEAF_BYTES : (within + 1) * merkle.LEAF_BYTES]
    value, bits = _element(entry, flat, data)
    return {
        "format": FORMAT,
        "element": {"index": list(index), "value": value if np.isfinite(value) else str(value), "bits": bits},
        "leaf": {"index": leaf, "count": -(-tensor_bytes(entry) // merkle.LEAF_BYTES), "bytes": data.hex()},
        "leaf_path": [digest.hex() for digest in path],
        "tensor": {"name": name, "dtype": entry.dtype, "shape": list(entry.shape), "root": entry.root.hex()},
        "tensor_index": number,
        "tensor_count": len(entries),
        "tensor_path": [digest.hex() for digest in merkle.inclusion_proof(entries, number)],
        "state_root": checkpoint.root.hex(),
        "segment": None if segment is None else encode(segment).hex(),
    }


def check(proof: Mapping[str, Any]) -> Proven:
    """What the proof shows; FalseProof where it does not show it, UsageError where it is none."""
    try:
        return _checked(proof)
    except (KeyError, TypeError, ValueError, AttributeError, IntegrityError) as error:
        raise UsageError(
            f"proof: expected the fields of docs/formats.md, got a fault in {error}; make it again with "
            f"`trueweight store prove`"
        ) from error


def read_proof(text: str) -> dict[str, Any]:
    """The proof in a JSON text; UsageError where it is none."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UsageError(f"proof: expected JSON, got {error}; make it again with `trueweight store prove`") from error
    if not isinstance(found, dict):
        raise UsageError("proof: expected a JSON object; make it again with `trueweight store prove`")
    return found


def _checked(proof: Mapping[str, Any]) -> Proven:
    if proof["format"] != FORMAT:
        raise UsageError(f"proof: expected format {FORMAT!r}, got {proof['format']!r}; use the Trueweight that made it")
    told, leaf = proof["tensor"], proof["leaf"]
    entry = TensorEntry(
        name=told["name"], dtype=told["dtype"], shape=tuple(told["shape"]), root=bytes.fromhex(told["root"])
    )
    index = tuple(proof["element"]["index"])
    flat = _flat(entry, index)
    size, data, root = tensor_bytes(entry), bytes.fromhex(leaf["bytes"]), bytes.fromhex(proof["state_root"])
    number, count = flat * itemsize(entry) // merkle.LEAF_BYTES, -(-size // merkle.LEAF_BYTES)
    _require((leaf["index"], leaf["count"]) == (number, count), f"expected leaf {number} of {count}")
    length = min(merkle.LEAF_BYTES, size - number * merkle.LEAF_BYTES)
    _require(len(data) == length, f"expected a leaf of {length} bytes, got {len(data)}")
    path = [bytes.fromhex(digest) for digest in proof["leaf_path"]]
    holds = merkle.verify_inclusion(merkle.leaf_hash(data), number, count, path, entry.root)
    _require(holds, "the leaf is not below the tensor's root")
    path = [bytes.fromhex(digest) for digest in proof["tensor_path"]]
    leaf_of_entry = merkle.leaf_hash(encode(entry))
    holds = merkle.verify_inclusion(leaf_of_entry, proof["tensor_index"], proof["tensor_count"], path, root)
    _require(holds, "the tensor is not below the state root")
    value, bits = _element(entry, flat, data)
    _require(proof["element"]["bits"] == bits, f"the element's bits are {bits}, not {proof['element']['bits']}")
    shown = value if np.isfinite(value) else str(value)
    _require(proof["element"]["value"] == shown, f"the element is {value}, not {proof['element']['value']}")
    segment = None if proof["segment"] is None else decode(SegmentRecord, bytes.fromhex(proof["segment"]))
    _require(segment is None or segment.poststate == root, "the segment ends in another state")
    return Proven(
        state_root=root,
        entry=entry,
        index=index,
        value=value,
        bits=bits,
        segment=segment,
        segment_digest=None if segment is None else record_digest(segment),
    )


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise FalseProof(f"proof refused: {why}; ask for another one")


def _flat(entry: TensorEntry, index: Sequence[int]) -> int:
    """The number of an element in C order; UsageError where the tensor has none there."""
    shape = list(entry.shape)
    if entry.dtype not in DTYPES or len(index) != len(shape):
        raise UsageError(f"--index {list(index)}: expected {len(shape)} numbers for {entry.name} of shape {shape}")
    flat = 0
    for at, length in zip(index, shape, strict=True):
        if type(at) is not int or not 0 <= at < length:
            raise UsageError(f"--index {list(index)}: expected an element of {entry.name}, whose shape is {shape}")
        flat = flat * length + at
    return flat


def _element(entry: TensorEntry, flat: int, leaf: bytes) -> tuple[Any, str]:
    """(value, big-endian hexadecimal bits) of an element in its leaf."""
    size = itemsize(entry)
    at = flat * size % merkle.LEAF_BYTES
    found = np.frombuffer(leaf[at : at + size], DTYPES[entry.dtype])[0]
    return found.item(), leaf[at : at + size][::-1].hex()


def _frame(checkpoint: Checkpoint, frame: int) -> tuple[bytes, bytes]:
    """(bytes, hashes of the leaves) of a frame, checked."""
    out = np.empty(min(FRAME_BYTES, int(checkpoint.manifest.lengths[frame])), np.uint8)
    hashes: list[bytes] = []
    checkpoint.visit([frame], lambda at, stored, tile: hashes.append(checkpoint.read_frame(at, stored, tile, out)))
    return out.tobytes(), hashes[0]
