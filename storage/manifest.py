"""The manifest of a checkpoint: which tensors make the state, and where their frames lie. One Arrow IPC stream.

It is found under the state root, which covers names, dtypes, shapes and bytes; where the bytes lie is covered by
nothing and need not be: frames are hashed when they are read. So a manifest may come from anybody, and
`decode_manifest` takes nothing on trust: every check happens before anything is allocated for what it speaks of.
"""

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import kernels, merkle
from storage.codec import encode
from storage.errors import FailureError, IntegrityError
from storage.frames import FRAME_BYTES, PACK_HEADER, PLAIN, SHUFFLED
from storage.records import TensorEntry

FORMAT = b"trueweight-checkpoint 1"
DTYPES = {"f32": "<f4", "i8": "|i1", "i32": "<i4", "i64": "<i8", "bool": "|b1"}
FRAME = np.dtype([("root", "u1", 32), ("pack", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("codec", "u1")])
"""Where a frame lies: `size` stored bytes from `offset` of pack number `pack`, then its leaf hashes."""

_BYTES_OF_DIGEST = pa.binary(merkle.DIGEST_BYTES)
_FRAME_FIELDS = [
    pa.field("root", _BYTES_OF_DIGEST, nullable=False),
    pa.field("pack", pa.uint32(), nullable=False),
    pa.field("offset", pa.uint64(), nullable=False),
    pa.field("size", pa.uint32(), nullable=False),
    pa.field("codec", pa.uint8(), nullable=False),
]
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.field("item", pa.uint64(), nullable=False)), nullable=False),
        pa.field("root", _BYTES_OF_DIGEST, nullable=False),
        pa.field("frames", pa.list_(pa.field("item", pa.struct(_FRAME_FIELDS), nullable=False)), nullable=False),
    ]
)
MOST_BYTES = 1 << 30
_FARTHEST = 1 << 48
MOST_AXES = 32
_MOST_SHOWN = 500
_PACK = re.compile("[0-9a-f]{64}")
_HEADER, _COMPRESSION = 2, 3  # the fields' numbers in Message and RecordBatch, Arrow's Message.fbs


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Tensors sorted by name; the frames of tensor i are `frames[first[i] : first[i + 1]]` (dtype `FRAME`)."""

    tensors: tuple[TensorEntry, ...]
    first: NDArray[np.int64]
    frames: NDArray[Any]
    packs: tuple[bytes, ...]

    def tensor_of(self, frame: int) -> tuple[int, int]:
        """(number of the tensor, number of the frame in it) of a frame."""
        tensor = int(np.searchsorted(self.first, frame, "right")) - 1
        return tensor, frame - int(self.first[tensor])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The bytes of each frame: 1 MiB, but for the last one of a tensor."""
        found = np.full(len(self.frames), FRAME_BYTES, np.int64)
        for entry, stop in zip(self.tensors, self.first[1:], strict=True):
            if size := tensor_bytes(entry):
                found[stop - 1] = (size - 1) % FRAME_BYTES + 1
        return found

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """The bytes of each frame's leaf hashes."""
        leaves = -(-self.lengths // merkle.LEAF_BYTES)
        return leaves * merkle.DIGEST_BYTES


def state_root(entries: Sequence[TensorEntry]) -> bytes:
    """Root over the encoded entries sorted by name; ValueError where two have the same name."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise ValueError(f"state: expected every tensor once, got {first.name!r} twice")
    return merkle.list_root([encode(entry) for entry in ordered])


def tensor_bytes(entry: TensorEntry, *, of_empty: bool = True) -> int:
    """The size of a tensor in bytes, whatever the shape claims; on demand with lengths of 0 taken as 1."""
    return math.prod((length or not of_empty) for length in entry.shape) * itemsize(entry)


def itemsize(entry: TensorEntry) -> int:
    """The bytes of an element."""
    return np.dtype(DTYPES[entry.dtype]).itemsize


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as an Arrow IPC stream of one uncompressed record batch."""
    frames = manifest.frames
    structs = pa.StructArray.from_arrays(
        [
            pa.FixedSizeBinaryArray.from_buffers(
                _BYTES_OF_DIGEST, len(frames), [None, pa.py_buffer(frames["root"].tobytes())]
            ),
            *(pa.array(np.ascontiguousarray(frames[name])) for name in ("pack", "offset", "size", "codec")),
        ],
        fields=_FRAME_FIELDS,
    )
    columns = [
        pa.array([entry.name for entry in manifest.tensors], pa.string()),
        pa.array([entry.dtype for entry in manifest.tensors], pa.string()),
        pa.array([entry.shape for entry in manifest.tensors], SCHEMA.field("shape").type),
        pa.array([entry.root for entry in manifest.tensors], _BYTES_OF_DIGEST),
        pa.ListArray.from_arrays(pa.array(manifest.first, pa.int32()), structs, type=SCHEMA.field("frames").type),
    ]
    packs = "\n".join(digest.hex() for digest in manifest.packs)
    schema = SCHEMA.with_metadata({"format": FORMAT, "packs": packs})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    made: bytes = sink.getvalue().to_pybytes()
    return made


def seal(stream: bytes) -> bytes:
    """The manifest as it is stored: the stream, then its SHA-256, so that a flipped bit is found even in padding."""
    return stream + sha256(stream).digest()


def unseal(root: bytes, data: bytes) -> bytes:
    """The stream of a stored manifest of the state `root`; IntegrityError where it is not what was stored."""
    stream, digest = data[: -merkle.DIGEST_BYTES], data[-merkle.DIGEST_BYTES :]
    if sha256(stream).digest() != digest:
        raise _refused(root, f"its {len(data)} bytes do not end in their SHA-256")
    return stream


def decode_manifest(root: bytes, data: bytes) -> Manifest:
    """The manifest in `data`, if it is one of the state `root`; IntegrityError with the reason for anything else."""
    try:
        manifest = _read(data)
        _check_frames(manifest)
        found = state_root(manifest.tensors)
        if found != root:
            raise ValueError(f"expected state root {root.hex()}, got {found.hex()}")
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        raise _refused(root, _shown(error)) from error
    return manifest


def _refused(root: bytes, why: str) -> FailureError:
    name = root.hex()
    return IntegrityError(
        f"checkpoint {name}: its manifest is refused: {why}; mend it with `trueweight store repair --from OTHER`",
        digest=name,
    )


def _shown(error: Exception) -> str:
    """The reason on one short line: names in a manifest may be long, or move the cursor of a terminal."""
    text = " ".join(str(error)[:_MOST_SHOWN].split())
    return "".join(character if character.isprintable() else "?" for character in text)


# ----------------------------------------------------------------------------------------------------- reading


def _read(data: bytes) -> Manifest:
    """The columns as they stand, their types and counts checked."""
    batch, metadata = _batch(data)
    lines = metadata.get(b"packs", b"").decode().split("\n")
    packs = lines if lines != [""] else []
    if not all(_PACK.fullmatch(pack) for pack in packs) or len(set(packs)) < len(packs):
        raise ValueError("expected packs named by 64 hexadecimal digits, each once")
    names, dtypes, shapes, roots = (batch.column(index).to_pylist() for index in range(4))
    entries = tuple(
        TensorEntry(name=name, dtype=dtype, shape=tuple(shape), root=root)
        for name, dtype, shape, root in zip(names, dtypes, shapes, roots, strict=True)
    )
    if any(first >= second for first, second in pairwise(names)):
        raise ValueError("expected every tensor once, sorted by name")
    lists = batch.column(4)
    structs = lists.values
    frames = np.empty(len(structs), FRAME)
    frames["root"] = _digests(structs.field("root"))
    for name in ("pack", "offset", "size", "codec"):
        frames[name] = structs.field(name).to_numpy()
    # Arrow allows a column of no lists to have no offsets, and would read the first one outside the buffer.
    first = lists.offsets.to_numpy().astype(np.int64) if len(lists) else np.zeros(1, np.int64)
    if first[0] != 0 or first[-1] != len(frames):
        raise ValueError(f"expected the frames of the tensors to be all {len(frames)}, got {first[0]} to {first[-1]}")
    return Manifest(tensors=entries, first=first, frames=frames, packs=tuple(map(bytes.fromhex, packs)))


def _batch(data: bytes) -> tuple[Any, dict[bytes, bytes]]:
    """(the stream's one record batch, its schema's metadata); the stream holds nothing else and is not compressed."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} bytes, got {len(data)}")
    source = pa.BufferReader(data)
    messages = pa.ipc.MessageReader.open_stream(source)
    kinds = []
    for message in messages:
        kinds.append(message.type)
        header = message.metadata.to_pybytes()
        if message.type == "schema" and b"ARROW:extension" in header:
            # Types of extensions have readers of their own, some of which overflow the stack (JSON in pyarrow 19).
            raise ValueError("expected the columns of docs/formats.md, got an extension type")
        if message.type == "record batch" and _compressed(header):
            raise ValueError("expected an uncompressed record batch, got a compressed one")
        if len(kinds) > 2:
            break
    if kinds != ["schema", "record batch"]:
        raise ValueError(f"expected a schema and one record batch, got {', '.join(kinds) or 'nothing'}")
    if source.tell() != len(data) or data[-8:] != b"\xff\xff\xff\xff\0\0\0\0":
        raise ValueError(f"expected an end of stream at byte {len(data)}, got {source.tell()} bytes of messages")
    with pa.ipc.open_stream(data) as reader:
        metadata = reader.schema.metadata or {}
        if metadata.get(b"format") != FORMAT:
            found = metadata.get(b"format", b"none")[:40]
            raise ValueError(f"expected format {FORMAT!r}, got {found!r}; use the Trueweight that wrote it")
        if not reader.schema.equals(SCHEMA):
            raise ValueError("expected the columns of docs/formats.md, got others")
        batch = reader.read_next_batch()
    batch.validate(full=True)
    if any(column.null_count for column in _all(batch.columns)):
        raise ValueError("expected no null")
    return batch, metadata


def _all(columns: Sequence[Any]) -> list[Any]:
    """The columns with their children."""
    found = list(columns)
    for column in columns:
        if pa.types.is_list(column.type):
            found += _all([column.values])
        elif pa.types.is_struct(column.type):
            found += _all([column.field(index) for index in range(column.type.num_fields)])
    return found


def _compressed(message: bytes) -> bool:
    """Whether the record batch of an IPC message names a compression: its buffers' sizes would be the writer's claim.

    The message is a flatbuffer (Arrow columnar format, Message.fbs) that the reader has verified: tables begin with the
    distance back to their list of fields.
    """

    def table(at: int) -> int:
        return at + int(struct.unpack_from("<I", message, at)[0])

    def field(start: int, number: int) -> int:
        fields = start - int(struct.unpack_from("<i", message, start)[0])
        (size,) = struct.unpack_from("<H", message, fields)
        at = 4 + 2 * number
        return int(struct.unpack_from("<H", message, fields + at)[0]) if at < size else 0

    top = table(0)
    header = field(top, _HEADER)
    if not header:
        raise ValueError("expected a record batch, got a message without one")
    return field(table(top + header), _COMPRESSION) != 0


def _digests(column: Any) -> NDArray[np.uint8]:
    """A column of digests as bytes (n, 32)."""
    whole = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    size = merkle.DIGEST_BYTES
    return whole[column.offset * size : (column.offset + len(column)) * size].reshape(-1, size)


# ---------------------------------------------------------------------------------------------------- checking


def _check_frames(manifest: Manifest) -> None:
    """ValueError unless every tensor has its frames, they hash to its root, and none lies across another.

    Equal frames may share a place: packs are named by their bytes, so two writers of the same frames make one pack.
    """
    for entry, start, stop in zip(manifest.tensors, manifest.first, manifest.first[1:], strict=False):
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.name}: expected a dtype of {', '.join(DTYPES)}, got {entry.dtype!r}")
        if len(entry.shape) > MOST_AXES or tensor_bytes(entry, of_empty=False) > _FARTHEST:
            raise ValueError(f"{entry.name}: expected a shape that an array can have, got {list(entry.shape)[:9]}")
        count = -(-tensor_bytes(entry) // FRAME_BYTES)
        if stop - start != count:
            raise ValueError(f"{entry.name}: expected {count} frames, got {stop - start}")
        found = kernels.tree_root(manifest.frames["root"][start:stop].tobytes())
        if found != entry.root:
            raise ValueError(f"{entry.name}: expected root {entry.root.hex()}, got {found.hex()} from its frames")
    frames, lengths = manifest.frames, manifest.lengths
    sizes = frames["size"].astype(np.int64)
    plain, shuffled = frames["codec"] == PLAIN, frames["codec"] == SHUFFLED
    _refuse(manifest, ~(plain | shuffled), "expected codec 0 or 1")
    _refuse(manifest, plain & (sizes != lengths), "expected a plain frame of its own length")
    _refuse(manifest, shuffled & ((sizes == 0) | (sizes >= lengths)), "expected a compressed frame below its length")
    _refuse(manifest, frames["pack"] >= len(manifest.packs), f"expected a pack below {len(manifest.packs)}")
    far = (frames["offset"] < len(PACK_HEADER)) | (frames["offset"] > _FARTHEST)
    _refuse(manifest, far, f"expected an offset from {len(PACK_HEADER)} to 2^48")
    order = np.lexsort((frames["offset"], frames["pack"]))
    ends = frames["offset"].astype(np.int64) + sizes + manifest.tiles
    before, after = order[:-1], order[1:]
    overlaps = np.zeros(len(frames), np.bool_)
    same = frames["pack"][before] == frames["pack"][after]
    shared = (frames[before] == frames[after]) & (lengths[before] == lengths[after])
    overlaps[after] = same & ~shared & (ends[before] > frames["offset"][after].astype(np.int64))
    _refuse(manifest, overlaps, "expected a place of its own, got one that overlaps another frame's")


def _refuse(manifest: Manifest, wrong: NDArray[np.bool_], expected: str) -> None:
    if wrong.any():
        tensor, number = manifest.tensor_of(int(wrong.argmax()))
        raise ValueError(f"{manifest.tensors[tensor].name}, frame {number}: {expected}")
