"""Manifests and frames: golden files that every version reads, and hostile ones that are refused with the reason.

The files under `vectors/checkpoint-1` and `corpus` are written by hand, never by a test run:

    PYTHONPATH=. python tests/storage/test_storage_manifest.py golden    vectors/checkpoint-1, once for each format
    PYTHONPATH=. python tests/storage/test_storage_manifest.py corpus    corpus/manifest and corpus/frames

A golden store is never written again: a later format gets a folder of its own beside it. A fuzzer's finding is put into
the corpus as a file whose name begins with `fuzz-`. A file of `corpus/manifest` is a state root and the Arrow stream of
a manifest, one of `corpus/frames` is u8 codec, u8 item size, u32 length (little-endian) and the stored bytes.
"""

import json
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage import merkle
from storage.checkpoints import load_state, open_checkpoint
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import IntegrityError, MissingObject
from storage.frames import FRAME_BYTES, PLAIN, SHUFFLED, decode_frame, encode_frame
from storage.manifest import (
    DTYPES,
    FORMAT,
    SCHEMA,
    Manifest,
    decode_manifest,
    encode_manifest,
    seal,
    state_root,
    unseal,
)
from storage.records import Head, RecordList, SegmentRecord, TensorEntry
from storage.saving import save_state
from storage.store import CHECKPOINTS, Store, memory_store, open_store

FILES = Path(__file__).parent
GOLDEN = FILES / "vectors" / "checkpoint-1"
CORPUS = FILES / "corpus"
Array = np.ndarray[Any, Any]
State = dict[str, Array]
END = b"\xff\xff\xff\xff\0\0\0\0"
MOST = 1 << 20
"""Bytes that refusing a few KB may take."""

# --------------------------------------------------------------------------------------------------- sound manifests


def small_state() -> State:
    """Four tensors, four frames: plain, none, compressed, and one of two frames of which the last is plain."""
    sparse = np.zeros(FRAME_BYTES + 3, np.bool_)
    sparse[[5, FRAME_BYTES + 1]] = True
    return {
        "a": np.array([1.5, -0.0, 1e-40], np.float32),
        "b": np.zeros((0, 3), np.int32),
        "c": np.arange(600, dtype=np.int64).reshape(20, 30),
        "z": sparse,
    }


@cache
def small() -> tuple[bytes, bytes, Store]:
    """(state root, the manifest's stream, the store they are in)."""
    store = memory_store()
    root = save_state(store, small_state())
    return root, stream_of(store, root), store


def stream_of(store: Store, root: bytes) -> bytes:
    return unseal(root, store.objects.read(CHECKPOINTS + root.hex()) or b"")


def equal(found: Manifest, expected: Manifest) -> bool:
    return (
        (found.tensors, found.packs) == (expected.tensors, expected.packs)
        and np.array_equal(found.first, expected.first)
        and np.array_equal(found.frames, expected.frames)
    )


def test_manifest_round_trip() -> None:
    root, data, _ = small()
    manifest = decode_manifest(root, data)
    assert encode_manifest(manifest) == data
    assert equal(decode_manifest(root, encode_manifest(manifest)), manifest)
    assert [entry.name for entry in manifest.tensors] == ["a", "b", "c", "z"]
    assert manifest.first.tolist() == [0, 1, 1, 2, 4]
    assert manifest.lengths.tolist() == [12, 4800, FRAME_BYTES, 3]
    assert manifest.tiles.tolist() == [32, 64, 256 * 32, 32]
    assert manifest.frames["codec"].tolist() == [PLAIN, SHUFFLED, SHUFFLED, PLAIN]
    assert [manifest.tensor_of(frame) for frame in range(4)] == [(0, 0), (2, 0), (3, 0), (3, 1)]


def test_empty_manifest_round_trip() -> None:
    store = memory_store()
    root = save_state(store, {})
    data = stream_of(store, root)
    manifest = decode_manifest(root, data)
    assert (manifest.tensors, manifest.packs, manifest.first.tolist(), len(manifest.frames)) == ((), (), [0], 0)
    assert encode_manifest(manifest) == data


def test_manifest_of_many_packs_round_trip() -> None:
    root, data, _ = small()
    manifest = decode_manifest(root, data)
    packs = tuple(sha256(bytes([number])).digest() for number in range(4))
    frames = manifest.frames.copy()
    frames["pack"] = [3, 1, 0, 2]
    frames["offset"] = [8, 8, 1 << 48, 1 << 33]
    changed = replace(manifest, frames=frames, packs=packs)
    assert equal(decode_manifest(root, encode_manifest(changed)), changed)


def test_stored_manifest_ends_in_its_hash() -> None:
    root, data, store = small()
    stored = store.objects.read(CHECKPOINTS + root.hex()) or b""
    assert stored == seal(data) == data + sha256(data).digest()
    other = memory_store()
    for size in [*range(0, len(stored), 61), len(stored) - 1]:
        other.objects.replace(CHECKPOINTS + root.hex(), stored[:size])
        with pytest.raises(IntegrityError, match=f"its manifest is refused: its {size} bytes do not end in their SHA"):
            open_checkpoint(other, root)
    changed = bytearray(stored)
    for at in range(0, len(stored), 7):
        changed[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError, match=f"its {len(stored)} bytes do not end in their SHA-256"):
            unseal(root, bytes(changed))
        changed[at] ^= 1 << at % 8


# ------------------------------------------------------------------------------------------------------------ golden

DEPTH = 1024
"""Bytes above which the golden file lists a tensor's bytes that are not zero."""


def golden_states() -> tuple[State, State]:
    """What the golden store's two checkpoints hold; the second one shares frames with the first."""
    mask = np.zeros(FRAME_BYTES + 4097, np.bool_)
    mask[[0, 4096, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 4096]] = True
    bits = np.array([0x3FC00000, 0x80000000, 0x7F800000, 0x7FC00000, 0x00000001, 0xC0490FDB], np.uint32)
    first: State = {
        "counter": np.array(41, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "layer.0/mask": mask,
        "layer.0/weight": bits.view(np.float32).reshape(2, 3),
        "numbers": (np.arange(255, dtype=np.int32) // 7 * 1000 - 9).reshape(5, 51),
        "ä/bytes": np.arange(-128, 128, dtype=np.int16).astype(np.int8),
    }
    return first, {**first, "counter": np.array(-42, np.int64), "numbers": first["numbers"][::-1] * 3}


def golden_records(states: tuple[bytes, bytes]) -> tuple[RecordList, SegmentRecord, Head]:
    steps = RecordList(items=(b"step", b""))
    root = merkle.list_root(steps.items)
    listed = sha256(encode(steps)).digest()
    segment = SegmentRecord(
        run=sha256(b"run").digest(),
        index=0,
        first_step=1,
        steps=2,
        prestate=states[0],
        poststate=states[1],
        steps_root=root,
        receipts_root=root,
        previous=NO_DIGEST,
        steps_object=listed,
        receipts_object=listed,
    )
    return steps, segment, Head(run=segment.run, segment=sha256(encode(segment)).digest(), partial=None, status="done")


def write_golden() -> None:
    """Makes the golden store; only where there is none."""
    GOLDEN.mkdir(parents=True)
    store = open_store(str(GOLDEN / "store"), create=True)
    first, second = golden_states()
    roots = [save_state(store, first)]
    roots.append(save_state(store, second, base=roots[0]))
    steps, segment, head = golden_records((roots[0], roots[1]))
    records = [store.put(encode(each)) for each in (steps, segment)] + [store.put(b"opaque bytes\n")]
    before = encode(replace(head, segment=None, status="running"))
    store.swap("runs/golden", None, before)
    store.swap("runs/golden", before, encode(head))
    store.swap("runs/gone", None, b"1")
    store.swap("runs/gone", b"1", None)
    shutil.rmtree(GOLDEN / "store" / "unfinished")
    expected = {
        "checkpoints": {
            root.hex(): [described(name, array) for name, array in sorted(state.items())]
            for root, state in zip(roots, (first, second), strict=True)
        },
        "objects": {digest.hex(): store.get(digest).hex() for digest in records},
        "references": {"runs/golden": encode(head).hex(), "runs/gone": None},
        "files": {
            path.relative_to(GOLDEN / "store").as_posix(): sha256(path.read_bytes()).hexdigest()
            for path in sorted((GOLDEN / "store").rglob("*"))
            if path.is_file()
        },
    }
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def described(name: str, array: Array) -> dict[str, Any]:
    """A tensor as the golden file has it: its bytes in hexadecimal, of a long one those that are not zero."""
    data = np.ascontiguousarray(array).tobytes()
    dtype = next(key for key, form in DTYPES.items() if array.dtype == form)
    found = {"name": name, "dtype": dtype, "shape": list(array.shape), "root": merkle.bytes_root(data).hex()}
    if len(data) <= DEPTH:
        return {**found, "bytes": data.hex()}
    return {**found, "nonzero": {str(at): data[at] for at in np.flatnonzero(np.frombuffer(data, np.uint8)).tolist()}}


def bytes_of(tensor: dict[str, Any]) -> bytes:
    if "bytes" in tensor:
        return bytes.fromhex(tensor["bytes"])
    data = bytearray(int(np.prod(tensor["shape"])) * np.dtype(DTYPES[tensor["dtype"]]).itemsize)
    for at, value in tensor["nonzero"].items():
        data[int(at)] = value
    return bytes(data)


@pytest.fixture(params=sorted(path.name for path in (FILES / "vectors").glob("checkpoint-*")))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    """A copy of a golden store, and what is in it."""
    folder = FILES / "vectors" / request.param
    shutil.copytree(folder / "store", tmp_path / "store")
    return open_store(str(tmp_path / "store"), create=False), json.loads((folder / "expected.json").read_text())


def test_golden_checkpoints_are_read_to_the_byte(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    for root, tensors in expected["checkpoints"].items():
        checkpoint = open_checkpoint(store, bytes.fromhex(root))
        entries = [
            TensorEntry(
                name=one["name"], dtype=one["dtype"], shape=tuple(one["shape"]), root=bytes.fromhex(one["root"])
            )
            for one in tensors
        ]
        assert list(checkpoint.manifest.tensors) == entries
        assert merkle.list_root([encode(entry) for entry in entries]).hex() == root
        loaded = checkpoint.load()
        for one in tensors:
            assert loaded[one["name"]].tobytes() == bytes_of(one)
            assert (loaded[one["name"]].dtype, loaded[one["name"]].shape) == (DTYPES[one["dtype"]], tuple(one["shape"]))
            assert merkle.bytes_root(bytes_of(one)).hex() == one["root"]
        assert save_state(memory_store(), loaded).hex() == root


def test_golden_objects_and_references_are_read_to_the_byte(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    assert {digest.hex(): store.get(digest).hex() for digest in store.digests()} == expected["objects"]
    for name, value in expected["references"].items():
        found = store.read(name)
        assert (found and found.hex()) == value
    assert store.names("") == [name for name, value in expected["references"].items() if value is not None]
    head = decode(Head, store.read("runs/golden") or b"")
    segment = decode(SegmentRecord, store.get(head.segment or b""))
    assert segment.poststate.hex() in expected["checkpoints"]
    assert decode(RecordList, store.get(segment.steps_object)).items == (b"step", b"")


def test_golden_files_are_what_they_were(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    found = {
        each.key: sha256(store.objects.read(each.key) or b"").hexdigest()
        for each in store.objects.list("")
        if not each.key.endswith(".DS_Store")
    }
    assert found == expected["files"]


def test_golden_store_has_every_kind_of_frame(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    manifests = [open_checkpoint(store, bytes.fromhex(root)).manifest for root in expected["checkpoints"]]
    assert {int(codec) for each in manifests for codec in each.frames["codec"]} == {PLAIN, SHUFFLED}
    assert {entry.dtype for each in manifests for entry in each.tensors} == set(DTYPES)
    assert [len(each.packs) for each in manifests] == [1, 2]
    assert max(int(stop - start) for start, stop in pairwise(manifests[0].first)) == 2


# ------------------------------------------------------------------------------------------------- hostile manifests


@dataclass
class Draft:
    """A manifest that may be changed in any way: rows of `SCHEMA`, and the schema's metadata."""

    rows: list[dict[str, Any]]
    metadata: dict[Any, Any]
    schema: pa.Schema = SCHEMA

    def frame(self, name: str, number: int = 0) -> dict[str, Any]:
        return self.row(name)["frames"][number]

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["name"] == name)

    def batch(self) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(self.rows, schema=self.schema.with_metadata(self.metadata))

    def root(self) -> bytes:
        """The state root that the rows speak of, in their order."""
        keys = ("name", "dtype", "shape", "root")
        entries = [TensorEntry(**{key: row[key] for key in keys} | {"shape": tuple(row["shape"])}) for row in self.rows]
        return merkle.list_root([encode(entry) for entry in entries])


def draft() -> Draft:
    root, data, _ = small()
    with pa.ipc.open_stream(data) as reader:
        batch = reader.read_next_batch()
    assert root == state_root(decode_manifest(root, data).tensors)
    return Draft(batch.to_pylist(), dict(batch.schema.metadata))


def stream(*batches: pa.RecordBatch, schema: pa.Schema | None = None, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, schema or batches[0].schema, options=pa.ipc.IpcWriteOptions(**options) if options else None
    ) as writer:
        for batch in batches:
            writer.write_batch(batch)
    made: bytes = sink.getvalue().to_pybytes()
    return made


Forged = tuple[bytes, bytes]
"""A state root and a manifest."""


def rows(change: Callable[[Draft], None]) -> Callable[[], Forged]:
    """A sound stream of changed rows under the root of those rows: nothing else is wrong."""

    def make() -> Forged:
        made = draft()
        change(made)
        return made.root(), stream(made.batch())

    return make


def octets(change: Callable[[bytes], bytes]) -> Callable[[], Forged]:
    """The good manifest's bytes, changed."""

    def make() -> Forged:
        root, data, _ = small()
        return root, change(data)

    return make


def columns(change: Callable[[list[Any]], list[Any]], schema: pa.Schema = SCHEMA) -> Callable[[], Forged]:
    """A stream of changed columns under a schema."""

    def make() -> Forged:
        made = draft()
        batch = made.batch()
        whole = schema.with_metadata(made.metadata)
        return made.root(), stream(pa.RecordBatch.from_arrays(change(batch.columns), schema=whole))

    return make


# Flatbuffers: a table begins with the distance back to its list of fields (Arrow's Message.fbs and Schema.fbs).


@dataclass(frozen=True)
class Message:
    """Where a message's metadata and body are in a stream."""

    start: int
    body: int
    end: int


def messages(data: bytes) -> list[Message]:
    found, at = [], 0
    while data[at : at + 8] != END:
        (size,) = struct.unpack_from("<i", data, at + 4)
        start = at + 8
        length = field(data, table(data, start), 3)
        body = start + size
        at = body + (struct.unpack_from("<q", data, length)[0] if length else 0)
        found.append(Message(start, body, at))
    return found


def table(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def slot(data: bytes, of: int, number: int) -> int:
    """Where a table's list of fields has field `number`."""
    return of - int(struct.unpack_from("<i", data, of)[0]) + 4 + 2 * number


def field(data: bytes, of: int, number: int) -> int:
    """Where a field of a table is, 0 where it is left out."""
    at = slot(data, of, number)
    (size,) = struct.unpack_from("<H", data, slot(data, of, -2))
    (offset,) = struct.unpack_from("<H", data, at) if at < slot(data, of, -2) + size else (0,)
    return of + offset if offset else 0


def numbers(data: bytes) -> dict[str, int]:
    """Where the header of the record batch has its 64-bit numbers."""
    message = messages(data)[1]
    top = table(data, message.start)
    batch = table(data, field(data, top, 2))
    found = {"body": field(data, top, 3), "rows": field(data, batch, 0)}
    for kind, number, parts in (("node", 1, ("length", "nulls")), ("buffer", 2, ("offset", "length"))):
        vector = table(data, field(data, batch, number))
        for index in range(struct.unpack_from("<I", data, vector)[0]):
            for part in (0, 1):
                found[f"{kind} {index} {parts[part]}"] = vector + 4 + 16 * index + 8 * part
    return {name: at for name, at in found.items() if at}


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    packed = struct.pack(form, value)
    return data[:at] + packed + data[at + len(packed) :]


def without_header(data: bytes) -> bytes:
    """The record batch's message names a record batch and has none, its list of fields moved behind everything."""
    first, message = messages(data)[:2]
    top = table(data, message.start)
    header = data[message.start : message.body]
    fields = bytearray(data[slot(data, top, -2) : slot(data, top, 4)])
    fields[8:10] = b"\0\0"
    header = put(header, top - message.start, "<i", top - message.body) + bytes(fields) + bytes(-len(fields) % 8)
    start = data[first.end : first.end + 4] + struct.pack("<i", len(header))
    return data[: first.end] + start + header + data[message.body :]


def big_endian(data: bytes) -> bytes:
    """The schema says big-endian: the field that is left out lies where some other number is 1."""
    message = messages(data)[0]
    schema = table(data, field(data, table(data, message.start), 2))
    ones = [at for at in range(schema + 12, message.body, 2) if data[at : at + 2] == b"\1\0"]
    return put(data, slot(data, schema, 0), "<H", ones[0] - schema)


def list_offsets(column: int, *changed: int) -> Callable[[bytes], bytes]:
    """The offsets of a column of lists or texts are others; shape has buffer 7 and frames have buffer 13."""

    def change(data: bytes) -> bytes:
        start = messages(data)[1].body + struct.unpack_from("<q", data, numbers(data)[f"buffer {column} offset"])[0]
        for number, value in enumerate(changed):
            data = put(data, start + 4 * number, "<i", value)
        return data

    return change


def no_offsets() -> Forged:
    """The empty state, whose columns of lists have buffers of no bytes: Arrow would read one number outside."""
    store = memory_store()
    root = save_state(store, {})
    data = stream_of(store, root)
    for name, at in numbers(data).items():
        if name.startswith("buffer"):
            data = put(data, at, "<q", 0)
    return root, data


def blocks(size: int, fill: int = 0) -> bytes:
    """zstd blocks that repeat one byte (RFC 8878, section 3.1.1.2): 4 bytes for each 128 KiB."""
    most = 1 << 17
    runs = [most] * (size // most) + [size % most] * (size % most > 0)
    return b"".join(
        struct.pack("<I", (number == len(runs) - 1) | 1 << 1 | run << 3)[:3] + bytes([fill])
        for number, run in enumerate(runs)
    )


def zstd(body: bytes, content: int | None, window: int = 0x50, dictionary: int = 0, flags: int = 0) -> bytes:
    """A zstd frame (RFC 8878, section 3.1.1): window 0x50 is 1 MiB; content None leaves the size out."""
    has_content = 0xC0 if content is not None else 0
    ids = struct.pack("<I", dictionary) if dictionary else b""
    size = struct.pack("<Q", content) if content is not None else b""
    return b"\x28\xb5\x2f\xfd" + bytes([has_content | (3 if ids else 0) | flags, window]) + ids + size + body


def compressed(codec: str) -> Forged:
    made = draft()
    return made.root(), stream(made.batch(), compression=codec)


def bomb() -> Forged:
    """The names are 1 GiB of zeros in 32 KiB of zstd."""
    root, data = compressed("zstd")
    packed = struct.pack("<q", 1 << 30) + zstd(blocks(1 << 30), 1 << 30, 0xA0)
    packed += bytes(-len(packed) % 8)
    message = messages(data)[1]
    at = numbers(data)
    data = put(data, at["buffer 2 offset"], "<q", message.end - message.body)
    data = put(data, at["buffer 2 length"], "<q", len(packed))
    data = put(data, at["body"], "<q", message.end - message.body + len(packed))
    return root, data[: message.end] + packed + END


def lie(codec: str) -> Forged:
    """A compressed buffer that says it is 1 TiB."""
    root, data = compressed(codec)
    (offset,) = struct.unpack_from("<q", data, numbers(data)["buffer 4 offset"])
    return root, put(data, messages(data)[1].body + offset, "<q", 1 << 40)


def extension(name: str, storage: pa.DataType, value: str) -> Callable[[], Forged]:
    """The column of names is of an extension type, whose metadata Arrow hands to a reader of its own."""
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": value}
    made = pa.field("name", storage, metadata=metadata)

    def make() -> Forged:
        schema = pa.schema([made, *list(SCHEMA)[1:]], metadata=draft().metadata)
        return small()[0], stream(
            pa.RecordBatch.from_arrays([pa.array([], each.type) for each in schema], schema=schema)
        )

    return make


def two_schemas(data: bytes) -> bytes:
    schema = messages(data)[0]
    return data[: schema.end] + data


def batch_first(data: bytes) -> bytes:
    schema, batch = messages(data)
    return data[schema.end : batch.end] + data[: schema.end] + END


def tensor_message(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pa.ipc.write_tensor(pa.Tensor.from_numpy(np.arange(4)), sink)
    return data[: messages(data)[0].end] + sink.getvalue().to_pybytes() + END


def file_format() -> Forged:
    made = draft()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, made.batch().schema) as writer:
        writer.write_batch(made.batch())
    return made.root(), sink.getvalue().to_pybytes()


def dictionary() -> Forged:
    made = draft()
    batch = made.batch()
    names = batch.column(0).dictionary_encode()
    schema = pa.schema([pa.field("name", names.type, nullable=False), *list(SCHEMA)[1:]], metadata=made.metadata)
    return made.root(), stream(pa.RecordBatch.from_arrays([names, *batch.columns[1:]], schema=schema))


def several_batches() -> Forged:
    made = draft()
    batch = made.batch()
    return made.root(), stream(batch.slice(0, 2), batch.slice(2))


def extra_column() -> Forged:
    made = draft()
    schema = SCHEMA.append(pa.field("more", pa.uint8())).with_metadata(made.metadata)
    more = [*made.batch().columns, pa.array([0] * len(made.rows), pa.uint8())]
    return made.root(), stream(pa.RecordBatch.from_arrays(more, schema=schema))


def no_metadata() -> Forged:
    made = draft()
    return made.root(), stream(made.batch().replace_schema_metadata(None))


def field_of(name: str, kind: pa.DataType, nullable: bool = False) -> pa.Schema:
    at = SCHEMA.get_field_index(name)
    return SCHEMA.set(at, pa.field(name, kind, nullable=nullable))


def recast(name: str, kind: pa.DataType) -> Callable[[], Forged]:
    """A column of another type, cast."""
    at = SCHEMA.get_field_index(name)
    return columns(lambda of: [*of[:at], of[at].cast(kind), *of[at + 1 :]], field_of(name, kind))


def set_metadata(key: str, value: bytes | None) -> Callable[[], Forged]:
    def change(made: Draft) -> None:
        made.metadata.pop(key.encode())
        if value is not None:
            made.metadata[key.encode()] = value

    return rows(change)


def set_row(name: str, /, **values: Any) -> Callable[[], Forged]:
    return rows(lambda made: made.row(name).update(values))


def set_frame(name: str, number: int = 0, **values: Any) -> Callable[[], Forged]:
    return rows(lambda made: made.frame(name, number).update(values))


def nothing_of(name: str) -> Callable[[], Forged]:
    """A row's value is null, though the schema says that there is none."""

    def make() -> Forged:
        made = draft()
        root = made.root()
        made.rows[1][name] = None
        return root, stream(made.batch())

    return make


def null_in_frame(name: str) -> Callable[[], Forged]:
    return set_frame("c", **{name: None})


def invalid_text() -> Forged:
    made = draft()
    batch = made.batch()
    raw = pa.array([b"\xff\xfe", b"b", b"c", b"z"]).view(pa.string())
    return made.root(), stream(pa.RecordBatch.from_arrays([raw, *batch.columns[1:]], schema=batch.schema))


def overlap(by: int) -> Callable[[], Forged]:
    """The frame of c begins so many bytes before the cell of a ends."""

    def change(made: Draft) -> None:
        before = made.frame("a")
        made.frame("c")["offset"] = before["offset"] + before["size"] + 32 - by

    return rows(change)


def like_its_neighbour(**but: int) -> Callable[[], Forged]:
    """Two tensors of the same bytes in one place, but for something."""

    def change(made: Draft) -> None:
        made.rows.insert(1, deepcopy(made.rows[0]) | {"name": "aa"})
        for key, value in but.items():
            made.frame("aa")[key] += value

    return rows(change)


def long_and_short(made: Draft) -> None:
    """Two frames of one root and place that differ in length."""
    made.rows.insert(3, deepcopy(made.rows[2]) | {"name": "cc", "shape": [500]})


def swap_roots(made: Draft) -> None:
    a, c = made.row("a"), made.row("c")
    a["root"], c["root"] = c["root"], a["root"]


def swap_frames(made: Draft) -> None:
    made.row("z")["frames"].reverse()


def unsorted(made: Draft) -> None:
    made.rows.reverse()


def twice(made: Draft) -> None:
    made.rows.insert(1, deepcopy(made.rows[1]))


def many_axes(count: int) -> Callable[[], Forged]:
    return set_row("b", shape=[0] * count)


def cut_frames(made: Draft) -> None:
    made.row("z")["frames"].pop()


def more_frames(made: Draft) -> None:
    made.row("b")["frames"] = [deepcopy(made.frame("a"))]


def without(name: str) -> Callable[[], Forged]:
    """A tensor is left out, under the root of the whole state."""

    def make() -> Forged:
        made = draft()
        root = made.root()
        made.rows.remove(made.row(name))
        return root, stream(made.batch())

    return make


def under_the_old_root(change: Callable[[Draft], None]) -> Callable[[], Forged]:
    def make() -> Forged:
        made = draft()
        change(made)
        return small()[0], stream(made.batch())

    return make


HEX = "[0-9a-f]{64}"
PACKED = "expected packs named by 64 hexadecimal digits, each once"
MEMBERS = "expected the columns of docs/formats.md"
ONE_BATCH = "expected a schema and one record batch, got "
SQUEEZED = "expected an uncompressed record batch, got a compressed one"
FEW_DIGITS = b"0123456789abcdef" * 4

HOSTILE: dict[str, tuple[Callable[[], Forged], str]] = {
    # the stream
    "nothing": (octets(lambda _: b""), "."),
    "zeros": (octets(lambda _: bytes(4096)), "."),
    "text": (octets(lambda _: b"{}\n" * 99), "."),
    "only an end": (octets(lambda _: END), "expected|got nothing"),
    "no end": (octets(lambda data: data[:-8]), "expected an end of stream"),
    "two ends": (octets(lambda data: data + END), "expected an end of stream at byte"),
    "trailing byte": (octets(lambda data: data + b"\0"), "expected an end of stream at byte"),
    "trailing zeros": (octets(lambda data: data + bytes(64)), "expected an end of stream at byte"),
    "another manifest behind": (octets(lambda data: data + data), "expected an end of stream at byte"),
    "leading byte": (octets(lambda data: b"\0" + data), "."),
    "file instead of stream": (file_format, "."),
    "two schemas": (octets(two_schemas), ONE_BATCH + "schema, schema"),
    "batch before schema": (octets(batch_first), ONE_BATCH + "record batch, schema"),
    "schema alone": (octets(lambda data: data[: messages(data)[0].end] + END), ONE_BATCH + "schema;"),
    "two batches": (several_batches, ONE_BATCH + "schema, record batch, record batch"),
    "dictionary batch": (dictionary, ONE_BATCH + "schema, dictionary"),
    "tensor message": (octets(tensor_message), ONE_BATCH + "schema, tensor"),
    "batch without a header": (octets(without_header), "."),
    "big-endian": (octets(big_endian), "."),
    "zstd body": (lambda: compressed("zstd"), SQUEEZED),
    "lz4 body": (lambda: compressed("lz4"), SQUEEZED),
    "zstd bomb of 1 GiB": (bomb, SQUEEZED),
    "zstd body that claims 1 TiB": (lambda: lie("zstd"), SQUEEZED),
    "lz4 body that claims 1 TiB": (lambda: lie("lz4"), SQUEEZED),
    # the schema
    "format version 2": (
        set_metadata("format", b"trueweight-checkpoint 2"),
        "expected format b'trueweight-checkpoint 1', got b'trueweight-checkpoint 2'; use the Trueweight that wrote it",
    ),
    "format of a longer name": (set_metadata("format", FORMAT + b"0"), "expected format .*, got b'trueweight-.* 10'"),
    "format of a megabyte": (set_metadata("format", b"x" * 999_999), "expected format .*, got b'x{40}'"),
    "no format": (set_metadata("format", None), "expected format .*, got b'none'"),
    "no metadata": (no_metadata, "expected format .*, got b'none'"),
    "another column": (extra_column, MEMBERS),
    "a column less": (columns(lambda of: of[:4], SCHEMA.remove(4)), MEMBERS),
    "columns in another order": (
        columns(lambda of: [of[1], of[0], *of[2:]], pa.schema([SCHEMA.field(at) for at in (1, 0, 2, 3, 4)])),
        MEMBERS,
    ),
    "columns of another name": (columns(list, SCHEMA.set(0, pa.field("Name", pa.string(), nullable=False))), MEMBERS),
    "no columns": (columns(lambda _: [], pa.schema([])), MEMBERS),
    "names that may be null": (columns(list, field_of("name", pa.string(), nullable=True)), MEMBERS),
    "long names": (recast("name", pa.large_string()), MEMBERS),
    "view of names": (recast("name", pa.string_view()), MEMBERS),
    "names in bytes": (recast("name", pa.binary()), MEMBERS),
    "signed shape": (recast("shape", pa.list_(pa.field("item", pa.int64(), nullable=False))), MEMBERS),
    "roots of any length": (recast("root", pa.binary()), MEMBERS),
    "extension type": (extension("arrow.json", pa.string(), ""), "expected the columns .*got an extension type"),
    "extension type of deep JSON": (
        extension("arrow.fixed_shape_tensor", pa.list_(pa.float32(), 4), '{"shape":' + "[" * 200_000),
        "expected the columns .*got an extension type",
    ),
    # packs
    "pack that is a path": (set_metadata("packs", b"../../etc/passwd"), PACKED),
    "pack that ends in a path": (set_metadata("packs", b"../" * 20 + b"passwd"), PACKED),
    "pack in capitals": (set_metadata("packs", FEW_DIGITS.upper()), PACKED),
    "pack too short": (set_metadata("packs", FEW_DIGITS[:-1]), PACKED),
    "pack shorter by a byte": (set_metadata("packs", FEW_DIGITS[:-2]), PACKED),
    "pack too long": (set_metadata("packs", FEW_DIGITS + b"00"), PACKED),
    "pack with spaces": (set_metadata("packs", b" " + FEW_DIGITS), PACKED),
    "pack with other digits": (set_metadata("packs", "\u0660".encode() * 64), PACKED),
    "pack of no text": (set_metadata("packs", b"\xff" * 64), "utf-8"),
    "packs end in a line": (set_metadata("packs", FEW_DIGITS + b"\n"), PACKED),
    "packs between empty lines": (set_metadata("packs", b"\n" + FEW_DIGITS), PACKED),
    "packs in lines of DOS": (set_metadata("packs", FEW_DIGITS + b"\r\n" + b"0" * 64), PACKED),
    "pack twice": (set_metadata("packs", FEW_DIGITS + b"\n" + FEW_DIGITS), PACKED),
    "no packs": (set_metadata("packs", b""), "a, frame 0: expected a pack below 0"),
    "packs left out": (set_metadata("packs", None), "a, frame 0: expected a pack below 0"),
    # nulls
    "null name": (nothing_of("name"), "expected no null|Null|null"),
    "null dtype": (nothing_of("dtype"), "expected no null|Null|null"),
    "null shape": (nothing_of("shape"), "expected no null|Null|null"),
    "null root": (nothing_of("root"), "expected no null|Null|null"),
    "null frames": (nothing_of("frames"), "expected no null|Null|null"),
    "null axis": (under_the_old_root(lambda made: made.row("c").update(shape=[20, None])), "null"),
    "null frame": (under_the_old_root(lambda made: made.row("c").update(frames=[None])), "null"),
    "null root of a frame": (null_in_frame("root"), "null"),
    "null pack": (null_in_frame("pack"), "null"),
    "null offset": (null_in_frame("offset"), "null"),
    "null size": (null_in_frame("size"), "null"),
    "null codec": (null_in_frame("codec"), "null"),
    # tensors
    "tensors not sorted": (rows(unsorted), "expected every tensor once, sorted by name"),
    "tensor twice": (rows(twice), "expected every tensor once, sorted by name"),
    "name that is no text": (invalid_text, "UTF8|utf-8|utf8"),
    "tensor left out": (without("b"), f"expected state root {HEX}, got {HEX}"),
    "last tensor left out": (without("z"), f"expected state root {HEX}, got {HEX}"),
    "another name": (
        under_the_old_root(
            lambda made: made.row("c").update(name="../x") or made.rows.sort(key=lambda row: row["name"])
        ),
        f"expected state root {HEX}, got {HEX}",
    ),
    "another dtype of that size": (under_the_old_root(lambda made: made.row("a").update(dtype="i32")), "state root"),
    "another shape of that size": (under_the_old_root(lambda made: made.row("c").update(shape=[600])), "state root"),
    "unknown dtype": (set_row("a", dtype="f16"), "a: expected a dtype of f32, i8, i32, i64, bool, got 'f16'"),
    "dtype of numpy": (set_row("a", dtype="<f4"), "a: expected a dtype of .*, got '<f4'"),
    "dtype of objects": (set_row("a", dtype="O"), "a: expected a dtype of .*, got 'O'"),
    "no dtype": (set_row("a", dtype=""), "a: expected a dtype of .*, got ''"),
    "shape that wraps around": (set_row("a", shape=[2**63, 2**63]), r"a: expected a shape that an array can have"),
    "longest axis": (set_row("a", shape=[2**64 - 1]), "a: expected a shape that an array can have"),
    "empty shape with a huge axis": (set_row("b", shape=[0, 2**63]), "b: expected a shape that an array can have"),
    "huge axis before an empty one": (set_row("b", shape=[2**64 - 1, 0]), "b: expected a shape that an array can have"),
    "empty shape of huge axes": (set_row("b", shape=[2**31, 0, 2**31]), "b: expected a shape that an array can have"),
    "too many axes": (many_axes(33), "b: expected a shape that an array can have"),
    "ten thousand axes": (many_axes(10_000), "b: expected a shape that an array can have"),
    "tensor of a terabyte": (set_row("a", shape=[1 << 38]), "a: expected 1048576 frames, got 1"),
    "tensor longer than its frames": (set_row("z", shape=[2 * FRAME_BYTES + 1]), "z: expected 3 frames, got 2"),
    "tensor shorter than its frames": (set_row("z", shape=[FRAME_BYTES]), "z: expected 1 frames, got 2"),
    "wrong root of a tensor": (
        set_row("c", root=bytes(32)),
        f"c: expected root {'00' * 32}, got {HEX} from its frames",
    ),
    "swapped roots of tensors": (rows(swap_roots), f"a: expected root {HEX}, got {HEX} from its frames"),
    "wrong root of an empty tensor": (set_row("b", root=bytes(32)), f"b: expected root {'00' * 32}, got e3b0c442"),
    "wrong state root": (lambda: (bytes(32), small()[1]), f"expected state root {'00' * 32}, got {HEX}"),
    # frames
    "a frame less": (rows(cut_frames), "z: expected 2 frames, got 1"),
    "a frame more": (rows(more_frames), "b: expected 0 frames, got 1"),
    "no frames": (set_row("a", frames=[]), "a: expected 1 frames, got 0"),
    "swapped frames": (rows(swap_frames), f"z: expected root {HEX}, got {HEX} from its frames"),
    "wrong root of a frame": (set_frame("z", 1, root=bytes(32)), f"z: expected root {HEX}, got {HEX} from its frames"),
    "lists that begin late": (
        octets(list_offsets(13, 1)),
        "expected the frames of the tensors to be all 4, got 1 to 4",
    ),
    "lists that end early": (octets(list_offsets(13, 0, 1, 1, 2, 3)), "to be all 4, got 0 to 3"),
    "lists that end late": (octets(list_offsets(13, 0, 1, 1, 2, 5)), "ffset|expected"),
    "lists that go back": (octets(list_offsets(13, 0, 3, 1, 2, 4)), "ffset"),
    "lists that begin below 0": (octets(list_offsets(13, -1)), "ffset"),
    "lists far outside": (octets(list_offsets(13, 0, 1, 1, 2, 2**31 - 1)), "ffset|expected"),
    "axes far outside": (octets(list_offsets(7, 0, 2**31 - 1)), "ffset"),
    "names far outside": (octets(list_offsets(1, 0, 2**31 - 1)), "ffset"),
    "names that go back": (octets(list_offsets(1, 0, 1, 0)), "ffset"),
    "overlap of one byte": (overlap(1), "c, frame 0: expected a place of its own, got one that overlaps"),
    "overlap of a tile": (overlap(32), "c, frame 0: expected a place of its own, got one that overlaps"),
    "same place, other frame": (overlap(44), "(a|c), frame 0: expected a place of its own, got one that overlaps"),
    "same frame, a byte on": (like_its_neighbour(offset=1), "aa, frame 0: expected a place of its own"),
    "same frame, other length": (rows(long_and_short), "(c|cc), frame 0: expected a place of its own"),
    "offset in the header": (set_frame("a", offset=7), "a, frame 0: expected an offset from 8 to 2.48"),
    "offset zero": (set_frame("a", offset=0), "a, frame 0: expected an offset from 8 to 2.48"),
    "offset huge": (set_frame("z", 1, offset=2**48 + 1), "z, frame 1: expected an offset from 8 to 2.48"),
    "offset largest": (set_frame("z", 1, offset=2**64 - 1), "z, frame 1: expected an offset from 8 to 2.48"),
    "offset below zero": (set_frame("z", 1, offset=2**63), "z, frame 1: expected an offset from 8 to 2.48"),
    "codec 2": (set_frame("c", codec=2), "c, frame 0: expected codec 0 or 1"),
    "codec 255": (set_frame("c", codec=255), "c, frame 0: expected codec 0 or 1"),
    "plain frame said to be compressed": (set_frame("a", codec=1), "a, frame 0: expected a compressed frame below its"),
    "compressed frame said to be plain": (set_frame("c", codec=0), "c, frame 0: expected a plain frame of its own"),
    "plain frame too short": (set_frame("a", size=11), "a, frame 0: expected a plain frame of its own length"),
    "plain frame too long": (set_frame("a", size=13), "a, frame 0: expected a plain frame of its own length"),
    "compressed frame of no bytes": (
        set_frame("c", size=0),
        "c, frame 0: expected a compressed frame below its length",
    ),
    "compressed frame of its length": (set_frame("c", size=4800), "c, frame 0: expected a compressed frame below its"),
    "compressed frame of 4 GiB": (set_frame("c", size=2**32 - 1), "c, frame 0: expected a compressed frame below its"),
    "pack out of range": (set_frame("c", pack=1), "c, frame 0: expected a pack below 1"),
    "pack far out of range": (set_frame("c", pack=2**32 - 1), "c, frame 0: expected a pack below 1"),
}


POOLS: list[pa.MemoryPool] = []
"""Pools that Arrow was given: its buffers go back to them when they are collected, however late."""


@contextmanager
def frugal(most: int = MOST) -> Iterator[None]:
    """Python, numpy and Arrow never hold more than so many bytes more than before."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] + pool.max_memory() < most
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


@pytest.mark.parametrize(("forge", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_manifest_is_refused(forge: Callable[[], Forged], reason: str) -> None:
    root, data = forge()
    expected = f"checkpoint {root.hex()}: its manifest is refused: .*({reason})"
    with frugal(MOST + 3 * len(data)), pytest.raises(IntegrityError, match=expected) as caught:
        decode_manifest(root, data)
    assert caught.value.digest == root.hex()
    text = str(caught.value)
    assert text.endswith("; mend it with `trueweight store repair --from OTHER`")
    assert len(text) < 800
    assert text.isprintable()


def test_the_draft_of_hostile_manifests_is_sound() -> None:
    """Else they might be refused for another reason."""
    root, data, _ = small()
    assert rows(lambda made: None)() == (root, data)
    assert equal(decode_manifest(*columns(list)()), decode_manifest(root, data))


def test_names_are_shown_short_and_printable() -> None:
    name = "\x1b[2J\u202e\r" + "x" * 100_000
    for changes in ({"dtype": "f16"}, {"shape": [2**63] * 30}, {"frames": []}, {"root": bytes(32)}):
        root, data = set_row("a", name=name, **changes)()
        with pytest.raises(IntegrityError) as caught:
            decode_manifest(root, data)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 800


ACCEPTED: dict[str, Callable[[], Forged]] = {
    "equal frames in one place": like_its_neighbour(),
    "columns of lists without offsets, for no tensor": no_offsets,
    "name that looks like a path": set_row("a", name="../../etc/passwd"),
    "more metadata": rows(lambda made: made.metadata.update({b"written by": b"a later version"})),
    "thirty-two axes": many_axes(32),
    "a gap between frames": set_frame("z", 1, offset=2**48),
    "frame before the one before": rows(
        lambda made: made.frame("z", 1).update(offset=8) or made.frame("a").update(offset=99_999)
    ),
}


@pytest.mark.parametrize("forge", ACCEPTED.values(), ids=ACCEPTED)
def test_unusual_manifest_is_read(forge: Callable[[], Forged]) -> None:
    root, data = forge()
    manifest = decode_manifest(root, data)
    assert state_root(manifest.tensors) == root
    assert manifest.first[-1] == len(manifest.frames)


def test_manifest_cut_anywhere_is_refused() -> None:
    root, data, _ = small()
    for size in range(len(data)):
        with pytest.raises(IntegrityError):
            decode_manifest(root, data[:size])
        assert harmless(root, data[:size] + END)  # an end may lie across the padding before it


def harmless(root: bytes, data: bytes) -> bool:
    """Whether the bytes are refused, or mean what they meant: else loading must fail, or give the same state."""
    good_root, good, store = small()
    try:
        found = decode_manifest(root, data)
    except IntegrityError:
        return True
    expected = decode_manifest(good_root, good)
    if equal(found, expected):
        return True
    assert found.tensors == expected.tensors
    other = memory_store()
    for each in store.objects.list(""):
        other.objects.create(each.key, store.objects.read(each.key) or b"")
    other.objects.replace(CHECKPOINTS + root.hex(), seal(data))
    try:
        loaded = load_state(other, root)
    except (IntegrityError, MissingObject):
        return True
    return all(loaded[name].tobytes() == array.tobytes() for name, array in small_state().items())


def test_no_flipped_bit_changes_a_value() -> None:
    root, data, _ = small()
    changed = bytearray(data)
    for at in range(len(data)):
        for bit in range(8):
            changed[at] ^= 1 << bit
            assert harmless(root, bytes(changed)), (at, bit)
            changed[at] ^= 1 << bit


EXTREMES = [0, 1, -1, 7, 8, 64, 1 << 20, 1 << 31, 1 << 32, 1 << 48, 1 << 62, (1 << 63) - 1, -(1 << 63)]


def test_no_number_of_the_batch_header_is_trusted() -> None:
    root, data, _ = small()
    for name, at in numbers(data).items():
        (good,) = struct.unpack_from("<q", data, at)
        for value in {*EXTREMES, good - 1, good + 1, good + 8, good - 8} - {good}:
            changed = put(data, at, "<q", value)
            with frugal(), suppress(IntegrityError):
                decode_manifest(root, changed)
            assert harmless(root, changed), name


def test_no_field_of_a_message_is_needed_to_refuse_it() -> None:
    """Every field of the flatbuffers' tables is left out, or lies elsewhere."""
    root, data, _ = small()
    for message in messages(data):
        top = table(data, message.start)
        for of in (top, table(data, field(data, top, 2))):
            for number in range((struct.unpack_from("<H", data, slot(data, of, -2))[0] - 4) // 2):
                for value in (0, 2, 4, 8, 16, 0x7FFF, 0xFFFF):
                    assert harmless(root, put(data, slot(data, of, number), "<H", value)), (of, number, value)


# -------------------------------------------------------------------------------------------------- generated manifests

hostile_number = st.sampled_from([0, 1, 2, 7, 8, 20, 52, 84, 2**31, 2**32 - 1]) | st.integers(0, 300)
hostile_frame = st.fixed_dictionaries(
    {
        "root": st.sampled_from([bytes(32), merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")]),
        "pack": st.integers(0, 2),
        "offset": hostile_number | st.sampled_from([2**48, 2**48 + 1, 2**63, 2**64 - 1]),
        "size": hostile_number,
        "codec": st.integers(0, 2),
    }
)
hostile_row = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b", "c", "d", "../x"]),
        "dtype": st.sampled_from([*DTYPES, "i8", "i8", "f16"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 20, 2**20, 2**20 + 1, 2**63]), max_size=2),
        "frames": st.lists(hostile_frame, max_size=3),
    }
)


def follows_rules(made: Draft) -> bool:
    """The rules of docs/formats.md, one by one."""
    cells = []
    packs = made.metadata[b"packs"].split(b"\n")
    names = [row["name"] for row in made.rows]
    if names != sorted(set(names)):
        return False
    for row in made.rows:
        if row["dtype"] not in DTYPES:
            return False
        size = np.dtype(DTYPES[row["dtype"]]).itemsize
        claimed = size
        for axis in row["shape"]:
            size, claimed = size * axis, claimed * max(axis, 1)
        if claimed > 2**48 or len(row["frames"]) != -(-size // FRAME_BYTES):
            return False
        for number, frame in enumerate(row["frames"]):
            length = min(FRAME_BYTES, size - number * FRAME_BYTES)
            right = frame["size"] == length if frame["codec"] == 0 else 0 < frame["size"] < length
            if frame["codec"] > 1 or not right or frame["pack"] >= len(packs) or not 8 <= frame["offset"] <= 2**48:
                return False
            end = frame["offset"] + frame["size"] + -(-length // 4096) * 32
            cells.append((frame["pack"], frame["offset"], end, length, frame["codec"], frame["root"]))
    return all(one == two or one[0] != two[0] or one[2] <= two[1] or two[2] <= one[1] for one in cells for two in cells)


@settings(deadline=None, max_examples=300)
@given(st.lists(hostile_row, max_size=3), st.booleans(), st.integers(1, 2))
def test_a_manifest_is_read_if_and_only_if_it_follows_the_rules(
    made: list[dict[str, Any]], tidy: bool, packs: int
) -> None:
    for row in made:
        row["root"] = merkle.root([frame["root"] for frame in row["frames"]])
    if tidy:
        made = sorted({row["name"]: row for row in made}.values(), key=lambda row: row["name"])
    names = b"\n".join(sha256(bytes([number])).hexdigest().encode() for number in range(packs))
    forged = Draft(made, {b"format": FORMAT, b"packs": names})
    root, data = forged.root(), stream(forged.batch())
    if follows_rules(forged):
        manifest = decode_manifest(root, data)
        assert [entry.name for entry in manifest.tensors] == [row["name"] for row in made]
        assert encode_manifest(manifest) == data
    else:
        with pytest.raises(IntegrityError):
            decode_manifest(root, data)


# ------------------------------------------------------------------------------------------------------------ frames

LENGTH = 300_000
Hostile = tuple[int, bytes, int]
"""A codec, stored bytes and the length that the frame should have."""
WHOLE = blocks(LENGTH)
FRAMES: dict[str, tuple[Hostile, str]] = {
    "plain, too short": ((PLAIN, bytes(LENGTH - 1), LENGTH), f"expected {LENGTH} plain bytes, got {LENGTH - 1}"),
    "plain, too long": ((PLAIN, bytes(LENGTH + 1), LENGTH), f"expected {LENGTH} plain bytes, got {LENGTH + 1}"),
    "plain, nothing": ((PLAIN, b"", LENGTH), f"expected {LENGTH} plain bytes, got 0"),
    "nothing": ((SHUFFLED, b"", LENGTH), "expected a zstd frame"),
    "four bytes": ((SHUFFLED, b"\x28\xb5\x2f\xfd", LENGTH), "expected a zstd frame"),
    "gzip": ((SHUFFLED, b"\x1f\x8b\x08" + bytes(99), LENGTH), "expected a zstd frame"),
    "zstd of 2016": ((SHUFFLED, b"\x27\xb5\x2f\xfd" + zstd(WHOLE, LENGTH)[4:], LENGTH), "expected a zstd frame"),
    "claims 1 GiB and is": (
        (SHUFFLED, zstd(blocks(1 << 30), 1 << 30), LENGTH),
        f"of {LENGTH} bytes .*got one of {1 << 30}",
    ),
    "claims its length and is 1 GiB": ((SHUFFLED, zstd(blocks(1 << 30), LENGTH), LENGTH), "expected a zstd frame"),
    "claims its length and is a byte more": ((SHUFFLED, zstd(blocks(LENGTH + 1), LENGTH), LENGTH), "expected"),
    "claims its length and is a byte less": ((SHUFFLED, zstd(blocks(LENGTH - 1), LENGTH), LENGTH), "expected"),
    "claims its length and is nothing": ((SHUFFLED, zstd(b"\x01\0\0", LENGTH), LENGTH), "expected"),
    "claims a byte more": ((SHUFFLED, zstd(WHOLE, LENGTH + 1), LENGTH), f"of {LENGTH} bytes .*got one of {LENGTH + 1}"),
    "claims the most that can be": ((SHUFFLED, zstd(WHOLE, 2**64 - 3), LENGTH), "got one of"),
    "claims what stands for unknown": ((SHUFFLED, zstd(WHOLE, 2**64 - 1), LENGTH), "got one of"),
    "claims nothing": ((SHUFFLED, zstd(WHOLE, None), LENGTH), "got one of"),
    "two frames": (
        (SHUFFLED, zstd(blocks(200_000), 200_000) + zstd(blocks(100_000), 100_000), LENGTH),
        "got one of 200000",
    ),
    "a whole frame and another": ((SHUFFLED, zstd(WHOLE, LENGTH) * 2, LENGTH), "expected a zstd frame that is"),
    "a whole frame and a byte": ((SHUFFLED, zstd(WHOLE, LENGTH) + b"\0", LENGTH), "expected a zstd frame that is"),
    "a whole frame and one to skip": (
        (SHUFFLED, zstd(WHOLE, LENGTH) + b"\x50\x2a\x4d\x18\x04\0\0\0skip", LENGTH),
        "expected a zstd frame that is",
    ),
    "frame to skip": ((SHUFFLED, b"\x50\x2a\x4d\x18" + struct.pack("<I", LENGTH) + bytes(LENGTH), LENGTH), "expected"),
    "one to skip and a whole frame": (
        (SHUFFLED, b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd(WHOLE, LENGTH), LENGTH),
        "got one of 4",
    ),
    "cut": ((SHUFFLED, zstd(WHOLE, LENGTH)[:-1], LENGTH), f"expected {LENGTH} bytes in a zstd frame"),
    "cut behind its header": ((SHUFFLED, zstd(b"", LENGTH), LENGTH), f"expected {LENGTH} bytes in a zstd frame"),
    "no last block": ((SHUFFLED, zstd(blocks(LENGTH + 1)[:-4], LENGTH), LENGTH), "expected"),
    "window of 2 MiB": ((SHUFFLED, zstd(WHOLE, LENGTH, 0x58), LENGTH), "expected a zstd frame"),
    "window of 2 GiB": ((SHUFFLED, zstd(WHOLE, LENGTH, 0xA8), LENGTH), "expected a zstd frame"),
    "window of 3.75 TiB": ((SHUFFLED, zstd(WHOLE, LENGTH, 0xFF), LENGTH), "expected a zstd frame"),
    "needs a dictionary": ((SHUFFLED, zstd(WHOLE, LENGTH, dictionary=7), LENGTH), "expected a zstd frame"),
    "reserved bit": ((SHUFFLED, zstd(WHOLE, LENGTH, flags=8), LENGTH), "expected a zstd frame"),
    "wrong checksum": ((SHUFFLED, zstd(WHOLE, LENGTH, flags=4) + b"\1\2\3\4", LENGTH), "expected a zstd frame"),
    "no checksum": ((SHUFFLED, zstd(WHOLE, LENGTH, flags=4), LENGTH), "expected a zstd frame that is"),
    "reserved kind of block": ((SHUFFLED, zstd(b"\x07\0\0", LENGTH), LENGTH), "expected a zstd frame"),
    "block of 2 MiB": ((SHUFFLED, zstd(struct.pack("<I", 3 | 1 << 24)[:3] + b"\0", LENGTH), LENGTH), "expected"),
}


@pytest.mark.parametrize(("frame", "reason"), FRAMES.values(), ids=FRAMES)
def test_hostile_frame_is_refused(frame: Hostile, reason: str) -> None:
    codec, stored, length = frame
    out = np.ones(length, np.uint8)
    with frugal(), pytest.raises(ValueError, match=reason):
        decode_frame(codec, stored, 4, out)


def test_zstd_frames_by_hand_are_sound() -> None:
    """Else the hostile ones might be refused for another reason."""
    for size in (1, 4096, LENGTH, FRAME_BYTES):
        out = np.ones(size, np.uint8)
        decode_frame(SHUFFLED, zstd(blocks(size), size), 1, out)
        assert not out.any()


@pytest.mark.parametrize("itemsize", [1, 4, 8])
@pytest.mark.parametrize("size", [8, 800, 4096, 70_000 * 8, FRAME_BYTES])
def test_frame_round_trip(size: int, itemsize: int) -> None:
    for raw in (np.zeros(size, np.uint8), np.random.default_rng(size).integers(0, 256, size, np.uint8)):
        codec, stored = encode_frame(raw, itemsize)
        assert (codec == SHUFFLED) == (len(stored) < size)
        out = np.ones(size, np.uint8)
        decode_frame(codec, stored, itemsize, out)
        assert np.array_equal(out, raw)
        assert len(stored) <= size


# -------------------------------------------------------------------------------------------------------------- fuzz

edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(0, 7)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("remove"), st.integers(0, 1 << 16), st.integers(1, 64)),
        st.tuples(st.just("number"), st.integers(0, 1 << 13), st.sampled_from(EXTREMES)),
        st.tuples(st.just("copy"), st.integers(0, 1 << 16), st.integers(0, 1 << 16)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """The bytes after edits; positions wrap around."""
    made = bytearray(data)
    for kind, where, what in changes:
        at = where % max(1, len(made))
        if kind == "set":
            made[at : at + len(what)] = what
        elif kind == "flip" and made:
            made[at] ^= 1 << what
        elif kind == "insert":
            made[at:at] = what
        elif kind == "remove":
            del made[at : at + what]
        elif kind == "number":
            at = where * 8 % max(8, len(made)) // 8 * 8
            made[at : at + 8] = struct.pack("<q", what)
        elif kind == "copy":
            start = what % max(1, len(made))
            made[at : at + 64] = made[start : start + 64]
        elif kind == "cut":
            del made[at:]
    return bytes(made)


@cache
def seeds() -> list[Forged]:
    """Manifests to begin with: sound ones, and such as are nearly so."""
    root, data, _ = small()
    return [(root, data), no_offsets(), like_its_neighbour()(), compressed("lz4"), dictionary()]


@settings(deadline=None, max_examples=400)
@given(st.integers(0, 4), edits)
@example(0, [("set", 0, b"\0")])
def test_any_edit_of_a_manifest_is_refused_or_harmless(seed: int, changes: list[tuple[str, int, Any]]) -> None:
    root, data = seeds()[seed]
    changed = edited(data, changes)
    if seed == 0:
        assert harmless(root, changed)
        return
    try:
        manifest = decode_manifest(root, changed)
    except IntegrityError:
        return
    assert state_root(manifest.tensors) == root


@cache
def frame_seeds() -> list[tuple[int, bytes, Array]]:
    """(item size, stored bytes, bytes) of compressed frames."""
    found = []
    for itemsize, raw in (
        (1, np.arange(5000) % 3),
        (4, np.arange(3000) // 5),
        (8, np.arange(600)),
        (8, np.zeros(70_000, np.int64)),
    ):
        octets = raw.astype({1: np.int8, 4: np.int32, 8: np.int64}[itemsize]).view(np.uint8)
        codec, stored = encode_frame(octets, itemsize)
        assert codec == SHUFFLED
        found.append((itemsize, stored, octets))
    return found


def guarded_decode(codec: int, stored: bytes, itemsize: int, length: int) -> Array | None:
    """The frame, None where it is refused; nothing is written outside of it."""
    room = np.full(length + 128, 0xA5, np.uint8)
    try:
        decode_frame(codec, stored, itemsize, room[64:-64])
    except ValueError:
        return None
    finally:
        assert (room[:64] == 0xA5).all()
        assert (room[-64:] == 0xA5).all()
    return room[64:-64]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 3), edits, st.sampled_from([0, 0, 0, 1, -1, 4096]))
def test_any_edit_of_a_frame_is_refused_or_stays_inside(
    seed: int, changes: list[tuple[str, int, Any]], longer: int
) -> None:
    itemsize, stored, octets = frame_seeds()[seed]
    changed = edited(stored, changes)
    found = guarded_decode(SHUFFLED, changed, itemsize, len(octets) + longer)
    if changed == stored:
        assert (found is None) == (longer != 0)


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 2), st.sampled_from([1, 4, 8]), st.integers(1, 64))
def test_any_bytes_as_a_frame_are_refused_or_stay_inside(stored: bytes, codec: int, itemsize: int, length: int) -> None:
    found = guarded_decode(codec, stored, itemsize, length * itemsize)
    assert codec != PLAIN or (found is None) == (len(stored) != length * itemsize)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_manifest_are_refused(data: bytes) -> None:
    for start in (b"", b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\x40\0\0\0\x10\0\0\0"):
        with pytest.raises(IntegrityError):
            decode_manifest(bytes(32), start + data)


# ------------------------------------------------------------------------------------------------------------ corpus


def corpus(kind: str) -> list[Path]:
    return sorted((CORPUS / kind).iterdir())


@pytest.mark.parametrize("path", corpus("manifest"), ids=lambda path: path.name)
def test_manifest_of_the_corpus_is_refused_or_read(path: Path) -> None:
    whole = path.read_bytes()
    root, manifest = whole[:32], None
    with frugal(), suppress(IntegrityError):
        manifest = decode_manifest(root, whole[32:])
    assert manifest is None or state_root(manifest.tensors) == root
    assert path.name.startswith("fuzz-") or (manifest is not None) == path.name.startswith("good")


@pytest.mark.parametrize("path", corpus("frames"), ids=lambda path: path.name)
def test_frame_of_the_corpus_is_refused_or_read(path: Path) -> None:
    whole = path.read_bytes()
    codec, itemsize, length = struct.unpack_from("<BBI", whole)
    found = guarded_decode(codec, whole[6:], itemsize, length)
    assert path.name.startswith("fuzz-") or (found is not None) == path.name.startswith("good")


def write_corpus() -> None:
    """Writes the hostile cases that are small, in bytes: for other implementations, and for later versions of Arrow."""
    manifests: dict[str, Callable[[], Forged]] = {name: forge for name, (forge, _) in HOSTILE.items()}
    manifests |= {f"good {name}": forge for name, forge in ACCEPTED.items()} | {"good": lambda: small()[:2]}
    frames = {name: frame for name, (frame, _) in FRAMES.items()}
    for number, (_, stored, raw) in enumerate(frame_seeds()):
        frames[f"good {number}"] = (SHUFFLED, stored, len(raw))
    for name, forge in manifests.items():
        data = b"".join(forge())
        if len(data) < 4096:
            _write("manifest", name, data)
    for name, (codec, stored, length) in frames.items():
        number = name.removeprefix("good ")
        itemsize = frame_seeds()[int(number)][0] if number.isdigit() else 4
        if len(stored) < 4096:
            _write("frames", name, struct.pack("<BBI", codec, itemsize, length) + stored)


def _write(kind: str, name: str, data: bytes) -> None:
    (CORPUS / kind).mkdir(parents=True, exist_ok=True)
    slug = "".join(character if character.isalnum() else "-" for character in name)
    (CORPUS / kind / slug).write_bytes(data)


if __name__ == "__main__":
    {"golden": write_golden, "corpus": write_corpus}[sys.argv[1]]()
