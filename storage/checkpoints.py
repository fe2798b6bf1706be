"""A training state as named arrays in a store, under its root.

A tensor's bytes are its elements in C order, little-endian, every NaN written as 0x7fc00000. They are cut into frames
(`storage.frames`), which lie in packs; the manifest (`storage.manifest`), found under the state root, says where. The
root covers names, dtypes, shapes and bytes alone, so it is the same whatever the sharding, packing, codec or store.

Packs are written first, the manifest last. Whoever saves swings a reference to the root afterwards.
"""

import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage import kernels, merkle
from storage.errors import FailureError, IntegrityError, UsageError
from storage.frames import (
    FRAME_BYTES,
    PACK_BYTES,
    PACK_HEADER,
    PLAIN,
    Bytes,
    Frame,
    decode_frame,
    encode_frame,
    hash_frame,
)
from storage.manifest import (
    DTYPES,
    FRAME,
    MOST_AXES,
    MOST_BYTES,
    Manifest,
    decode_manifest,
    encode_manifest,
    itemsize,
    seal,
    state_root,
    tensor_bytes,
    unseal,
)
from storage.records import TensorEntry
from storage.store import CHECKPOINTS, PACKS, Store, hashed_key, missing

Array = NDArray[Any]

WORKERS = max(2, os.cpu_count() or 1)
"""Threads that hash and compress, or decompress and check."""
TRANSFERS = 4
"""Packs under way to the store at a time, and spans from it: what bounds memory."""
_SPAN_BYTES = 4 << 20
_GAP_BYTES = 64 << 10
_NAMES = {np.dtype(form): name for name, form in DTYPES.items()}


def dtype_name(array: Array) -> str:
    """The name under which records know the array's dtype: a key of `DTYPES`; ValueError for any other dtype."""
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise ValueError(f"array: expected a dtype of {', '.join(DTYPES)}, got {array.dtype}; convert it first")
    return name


def canonical(array: Array) -> Array:
    """The array as its bytes are hashed: C-contiguous, little-endian, NaN as 0x7fc00000; -0 stays -0.

    Shares memory with the argument where nothing had to change.
    """
    ready = np.asarray(array, dtype=DTYPES[dtype_name(array)], order="C")
    return _without_nans(ready.reshape(-1)).reshape(ready.shape) if ready.dtype.kind == "f" else ready


def _without_nans(flat: Array) -> Array:
    nans = np.isnan(flat)
    if not nans.any():
        return flat
    return np.where(nans, np.uint32(0x7FC00000), flat.view("<u4")).astype("<u4", copy=False).view("<f4")


def entry_for(name: str, array: Array) -> TensorEntry:
    """The entry that commits to the array's name, dtype, shape and bytes."""
    ready = canonical(array)
    return TensorEntry(name=name, dtype=dtype_name(ready), shape=ready.shape, root=merkle.bytes_root(ready.data))


# ------------------------------------------------------------------------------------------------------- saving


class Piece(NamedTuple):
    """A run of a tensor's frames, from frame number `first` on: `array` is flat, and `shape` that of the whole tensor.

    All frames but the tensor's last hold 1 MiB.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    array: Array


class Place(NamedTuple):
    """Where a saved frame lies, and its root."""

    root: bytes
    pack: bytes
    offset: int
    size: int
    codec: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Frames of a state that are in the store: `places[name]` by frame number. `join` makes a checkpoint of shards."""

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Mapping[int, Place]]


def save_state(
    store: Store,
    arrays: Mapping[str, Array],
    *,
    base: bytes | None = None,
    compress: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> bytes:
    """The state root of the named arrays, all of them in the store: packs first, manifest last.

    Frames that the checkpoint with root `base` has under the same name are not stored again. `advance` is told how many
    bytes are done. An array is asked for when its turn comes, by name.
    """
    pieces = (_whole(name, arrays[name]) for name in sorted(arrays))
    return join(store, [save_shard(store, pieces, base=base, compress=compress, advance=advance)])


def save_shard(
    store: Store,
    pieces: Iterable[Piece],
    *,
    base: bytes | None = None,
    compress: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> Shard:
    """The places of the pieces' frames, once all their bytes are in the store.

    Frames are hashed, compressed and decompressed again by WORKERS threads, and packs written by TRANSFERS more.
    """
    known = _known(store, base) if base else {}
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    slots: dict[str, dict[int, Place | _Slot]] = {}
    with _workers(WORKERS) as pool, _workers(TRANSFERS) as transfers:
        packer = _Packer(store, transfers)
        window: deque[tuple[str, int, int, Future[Frame | Place]]] = deque()

        def take() -> None:
            name, number, size, made = window.popleft()
            result = made.result()
            slots[name][number] = packer.add(result) if isinstance(result, Frame) else result
            advance(size)

        for piece in pieces:
            kind = (dtype_name(piece.array), piece.shape)
            if len(piece.shape) > MOST_AXES:
                raise ValueError(f"shard: expected at most {MOST_AXES} axes of {piece.name}, got {len(piece.shape)}")
            if (dtypes.setdefault(piece.name, kind[0]), shapes.setdefault(piece.name, kind[1])) != kind:
                raise ValueError(f"shard: expected one dtype and shape of {piece.name}, got {kind} and others")
            done = slots.setdefault(piece.name, {})
            for number, part in _parts(piece):
                if number in done or any(waiting[:2] == (piece.name, number) for waiting in window):
                    raise ValueError(f"shard: expected every frame of {piece.name} once, got frame {number} twice")
                job = pool.submit(_make, part, known.get((piece.name, kind[0], number)), compress)
                window.append((piece.name, number, part.nbytes, job))
                if len(window) > 2 * WORKERS:
                    take()
        while window:
            take()
        packs = packer.finish()
    places = {
        name: {number: slot.place(packs) if isinstance(slot, _Slot) else slot for number, slot in found.items()}
        for name, found in slots.items()
    }
    return Shard(dtypes=dtypes, shapes=shapes, places=places)


def join(store: Store, shards: Sequence[Shard]) -> bytes:
    """The root of the state that the shards make together, its manifest in the store.

    ValueError naming the tensor where shards disagree, frames are missing, or two shards have the same one.
    """
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, dict[int, Place]] = {}
    for shard in shards:
        for name, found in shard.places.items():
            kind = (shard.dtypes[name], shard.shapes[name])
            if (dtypes.setdefault(name, kind[0]), shapes.setdefault(name, kind[1])) != kind:
                raise ValueError(f"shards: expected one dtype and shape of {name}, got {kind} and others")
            known = places.setdefault(name, {})
            if known.keys() & found.keys():
                raise ValueError(f"shards: expected every frame of {name} once, got one twice")
            known |= found
    packs: dict[bytes, int] = {}
    entries, rows, first = [], [], [0]
    for name in sorted(places):
        ordered = [places[name][number] for number in sorted(places[name])]
        root = kernels.tree_root(b"".join(place.root for place in ordered))
        entry = TensorEntry(name=name, dtype=dtypes[name], shape=tuple(map(int, shapes[name])), root=root)
        count = -(-tensor_bytes(entry) // FRAME_BYTES)
        if sorted(places[name]) != list(range(count)):
            raise ValueError(f"shards: expected {count} frames of {name}, got {len(ordered)}")
        entries.append(entry)
        rows += [(np.frombuffer(p.root, np.uint8), packs.setdefault(p.pack, len(packs)), *p[2:]) for p in ordered]
        first.append(len(rows))
    manifest = Manifest(tensors=tuple(entries), first=np.array(first), frames=np.array(rows, FRAME), packs=tuple(packs))
    root = state_root(manifest.tensors)
    stream = encode_manifest(manifest)
    decode_manifest(root, stream)
    store.keep_manifest(root, seal(stream))
    return root


class _Slot(NamedTuple):
    """A frame in pack number `pack` of this save, whose digest is not known before it is full."""

    root: bytes
    pack: int
    offset: int
    size: int
    codec: int

    def place(self, packs: Sequence[bytes]) -> Place:
        return Place(self.root, packs[self.pack], *self[2:])


class _Packer:
    """Collects cells into packs and sends full ones to the store, TRANSFERS at a time, each in memory of its own."""

    def __init__(self, store: Store, transfers: ThreadPoolExecutor) -> None:
        self._store, self._transfers = store, transfers
        room = PACK_BYTES + 2 * FRAME_BYTES
        self._buffers = [np.empty(room, np.uint8).data for _ in range(TRANSFERS)]  # numpy asks for huge pages
        self._sent: list[Future[bytes]] = []
        self._begin()

    def add(self, frame: Frame) -> _Slot:
        slot = _Slot(frame.root, len(self._sent), self._size, len(frame.stored), frame.codec)
        self._append(frame.stored)
        self._append(frame.tile)
        if self._size >= PACK_BYTES:
            self._send()
            self._begin()
        return slot

    def finish(self) -> list[bytes]:
        """The digests of the packs, all of them in the store."""
        if self._size > len(PACK_HEADER):
            self._send()
        return [pack.result() for pack in self._sent]

    def _begin(self) -> None:
        number = len(self._sent)
        if number >= TRANSFERS:
            self._sent[number - TRANSFERS].result()  # whose memory this is
        self._buffer, self._size = self._buffers[number % TRANSFERS], 0
        self._append(PACK_HEADER)

    def _append(self, data: bytes) -> None:
        self._buffer[self._size : self._size + len(data)] = data
        self._size += len(data)

    def _send(self) -> None:
        pack = self._buffer[: self._size]
        self._sent.append(self._transfers.submit(_put_pack, self._store, pack))


def _put_pack(store: Store, pack: memoryview) -> bytes:
    digest = sha256(pack).digest()
    store.keep(hashed_key(PACKS, digest), pack)
    return digest


def _make(part: Array, known: Place | None, compress: bool) -> Frame | Place:
    """The frame hashed and encoded; only hashed where it is the one that is known."""
    raw = canonical(part).view(np.uint8)
    root, tile = hash_frame(raw)
    if known is not None and known.root == root:
        return known
    codec, stored = encode_frame(raw, part.itemsize) if compress else (PLAIN, raw.tobytes())
    return Frame(root, tile, codec, stored)


def _parts(piece: Piece) -> Iterator[tuple[int, Array]]:
    """The frames of a piece by number; ValueError unless they are whole, but for the tensor's last one."""
    flat = np.ascontiguousarray(piece.array).reshape(-1)
    step, length = FRAME_BYTES // flat.itemsize, math.prod(piece.shape)
    stop = piece.first * step + len(flat)
    if stop > length or (stop < length and len(flat) % step):
        raise ValueError(
            f"shard: expected whole frames of {piece.name}, {length} elements in all, got elements up to {stop}"
        )
    for number, at in enumerate(range(0, len(flat), step), piece.first):
        yield number, flat[at : at + step]


def _known(store: Store, base: bytes) -> dict[tuple[str, str, int], Place]:
    """The places of a checkpoint's frames by tensor, dtype and number."""
    manifest = open_checkpoint(store, base).manifest
    return {
        (entry.name, entry.dtype, number): Place(
            row["root"].tobytes(), manifest.packs[row["pack"]], int(row["offset"]), int(row["size"]), int(row["codec"])
        )
        for entry, start, stop in zip(manifest.tensors, manifest.first, manifest.first[1:], strict=False)
        for number, row in enumerate(manifest.frames[start:stop])
    }


def _whole(name: str, array: Array) -> Piece:
    return Piece(name, array.shape, 0, array)


# ------------------------------------------------------------------------------------------------------ loading


class DamagedFrame(IntegrityError):
    """A frame of a pack is not what was saved: `digest` names the pack, `leaf` is the leaf of the tensor if known."""

    def __init__(self, message: str, *, digest: str, tensor: str | None = None, leaf: int | None = None) -> None:
        super().__init__(message, digest=digest)
        self.tensor, self.leaf = tensor, leaf

    def __reduce__(self) -> tuple[object, ...]:
        return partial(DamagedFrame, digest=self.digest, tensor=self.tensor, leaf=self.leaf), (str(self),)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of a store whose manifest has been read and checked against its root."""

    store: Store
    root: bytes
    manifest: Manifest

    @property
    def names(self) -> list[str]:
        """The tensors' names, ascending."""
        return [entry.name for entry in self.manifest.tensors]

    def number(self, name: str) -> int:
        """The number of a tensor; UsageError where the state has none of that name."""
        at = bisect_left(self.manifest.tensors, name, key=lambda entry: entry.name)
        if at == len(self.manifest.tensors) or self.manifest.tensors[at].name != name:
            near = ", ".join(get_close_matches(name, self.names, 3, 0.3)) or "none is like it"
            raise UsageError(f"tensor {name!r}: expected one of the state's {len(self.names)} ({near}); choose one")
        return at

    def load(self, names: Callable[[str], bool] | None = None) -> dict[str, Array]:
        """The arrays by name (their own, writable memory), all or those that `names` accepts, every byte checked.

        Raises MissingObject, or IntegrityError naming pack, tensor and leaf.
        """
        found: dict[str, Array] = {}
        into: dict[int, Bytes] = {}
        for number, entry in enumerate(self.manifest.tensors):
            if names is None or names(entry.name):
                flat = np.empty(tensor_bytes(entry), np.uint8)
                found[entry.name] = flat.view(DTYPES[entry.dtype]).reshape(entry.shape)
                into |= self._slices(number, flat, 0)
        self._fill(into)
        return found

    def load_range(self, name: str, start: int, stop: int) -> Array:
        """Elements `start` to `stop` of a tensor in C order, flat; the frames that hold them are read and checked."""
        number = self.number(name)
        entry = self.manifest.tensors[number]
        size = itemsize(entry)
        length, each = tensor_bytes(entry) // size, FRAME_BYTES // size
        if not 0 <= start <= stop <= length:
            raise UsageError(f"{name}: expected a range of its {length} elements, got {start} to {stop}; correct it")
        first, end = start // each, -(-stop // each) if stop > start else start // each
        flat = np.empty((min(end * each, length) - first * each) * size, np.uint8)
        self._fill(self._slices(number, flat, first))
        whole: Array = flat.view(DTYPES[entry.dtype])
        return whole[start - first * each : stop - first * each]

    def visit(self, frames: Iterable[int], act: Callable[[int, memoryview, memoryview], None]) -> None:
        """Call `act(frame, stored bytes, tile)` for frames by their number in the manifest, in several threads.

        Neighbours are read together. A pack that ends early gives fewer bytes. MissingObject where a pack is not there.
        """
        with _workers(max(WORKERS, TRANSFERS)) as pool:
            for done in [pool.submit(self._visit_span, span, act) for span in self._spans(frames)]:
                done.result()

    def read_frame(self, frame: int, stored: memoryview, tile: memoryview, out: Bytes) -> bytes:
        """The hashes of the frame's leaves, once `out` holds its bytes; DamagedFrame where they are others."""
        row, (tensor, _) = self.manifest.frames[frame], self.manifest.tensor_of(frame)
        try:
            decode_frame(int(row["codec"]), stored, itemsize(self.manifest.tensors[tensor]), out)
        except ValueError as error:
            raise self._damaged(frame, str(error)) from error
        root, hashes = hash_frame(out)
        if root != row["root"].tobytes():
            good = len(tile) == len(hashes) and kernels.tree_root(bytes(tile)) == row["root"].tobytes()
            leaf = _first_difference(hashes, bytes(tile)) if good else None
            raise self._damaged(frame, "its bytes are others than were saved", leaf)
        return hashes

    def check_tile(self, frame: int, tile: memoryview, hashes: bytes) -> None:
        """DamagedFrame unless the stored hashes of a good frame's leaves are `hashes`."""
        if tile != hashes:
            leaf = _first_difference(hashes, bytes(tile))
            raise self._damaged(frame, "its bytes are good, the stored hash of a leaf is not", leaf)

    def _damaged(self, frame: int, why: str, leaf: int | None = None) -> FailureError:
        """The error for a frame, `leaf` being the number of the leaf in it."""
        digest = self.manifest.packs[int(self.manifest.frames["pack"][frame])].hex()
        tensor, number = self.manifest.tensor_of(frame)
        name, first = self.manifest.tensors[tensor].name, number * merkle.CHUNK_LEAVES
        at = None if leaf is None else first + leaf
        leaves = int(self.manifest.tiles[frame]) // merkle.DIGEST_BYTES
        where = f"one of leaves {first} to {first + leaves - 1}" if at is None else f"leaf {at}"
        return DamagedFrame(
            f"pack {digest} in {self.store} is damaged: {name}, frame {number}, {where}: {why}; mend it with "
            f"`trueweight store repair --from OTHER`",
            digest=digest,
            tensor=name,
            leaf=at,
        )

    def _slices(self, tensor: int, flat: Bytes, first: int) -> dict[int, Bytes]:
        """Where the bytes of a tensor's frames go, from frame `first` on, as many as `flat` takes."""
        start = int(self.manifest.first[tensor]) + first
        return {start + at // FRAME_BYTES: flat[at : at + FRAME_BYTES] for at in range(0, len(flat), FRAME_BYTES)}

    def _fill(self, into: dict[int, Bytes]) -> None:
        def act(frame: int, stored: memoryview, tile: memoryview) -> None:
            self.read_frame(frame, stored, tile, into[frame])

        self.visit(into, act)

    def _spans(self, frames: Iterable[int]) -> Iterator[list[int]]:
        """The frames in the order in which they lie, cut where a read would be long or would skip much."""
        chosen = np.fromiter(frames, np.int64)
        rows = self.manifest.frames
        chosen = chosen[np.lexsort((rows["offset"][chosen], rows["pack"][chosen]))]
        packs, starts = rows["pack"][chosen], rows["offset"][chosen].astype(np.int64)
        ends = starts + rows["size"][chosen] + self.manifest.tiles[chosen]
        begin = 0
        for at in range(1, len(chosen) + 1):
            if (
                at == len(chosen)
                or packs[at] != packs[begin]
                or starts[at] > ends[at - 1] + _GAP_BYTES
                or ends[at] - starts[begin] > _SPAN_BYTES
            ):
                yield chosen[begin:at].tolist()
                begin = at

    def _visit_span(self, span: list[int], act: Callable[[int, memoryview, memoryview], None]) -> None:
        rows, tiles = self.manifest.frames, self.manifest.tiles
        digest = self.manifest.packs[int(rows["pack"][span[0]])]
        start, last = int(rows["offset"][span[0]]), span[-1]
        stop = int(rows["offset"][last]) + int(rows["size"][last]) + int(tiles[last])
        data = self.store.objects.read(hashed_key(PACKS, digest), start, stop)
        if data is None:
            raise missing("pack", digest, self.store)
        view = memoryview(data)
        for frame in span:
            at = int(rows["offset"][frame]) - start
            end = at + int(rows["size"][frame])
            act(frame, view[at:end], view[end : end + int(tiles[frame])])


def _first_difference(hashes: bytes, tile: bytes) -> int:
    """The number of the first digest that differs."""
    size = merkle.DIGEST_BYTES
    return next(at for at in range(0, len(hashes), size) if hashes[at : at + size] != tile[at : at + size]) // size


def open_checkpoint(store: Store, root: bytes) -> Checkpoint:
    """The checkpoint of a state root, its manifest checked; MissingObject or IntegrityError otherwise."""
    data = store.objects.read(CHECKPOINTS + root.hex(), 0, MOST_BYTES + 1)  # whose length is checked next
    if data is None:
        raise missing("checkpoint", root, store)
    return Checkpoint(store=store, root=root, manifest=decode_manifest(root, unseal(root, data)))


def load_state(store: Store, root: bytes, names: Callable[[str], bool] | None = None) -> dict[str, Array]:
    """The arrays of a checkpoint by name, all of them or those that `names` accepts; see `Checkpoint.load`."""
    return open_checkpoint(store, root).load(names)


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads; what is still queued is dropped when something fails."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
