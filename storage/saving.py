"""Saving a training state: its arrays, cut into frames, into packs and a manifest.

Packs are written first, the manifest last, under the state root. Whoever saves swings a reference to the root
afterwards. The root covers names, dtypes, shapes and bytes alone, so it is the same whatever the sharding, packing,
codec or store.
"""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storage import kernels
from storage.checkpoints import TRANSFERS, WORKERS, open_checkpoint, workers
from storage.frames import FRAME_BYTES, PACK_BYTES, PACK_HEADER, PLAIN, Bytes, Frame, encode_frame, hash_frame
from storage.manifest import (
    FRAME,
    MOST_AXES,
    Manifest,
    decode_manifest,
    encode_manifest,
    seal,
    state_root,
    tensor_bytes,
)
from storage.records import TensorEntry
from storage.store import PACKS, Store, digest_in, hashed_key, missing
from storage.tensors import Array, canonical, dtype_name


class Kind(NamedTuple):
    """What a tensor is, whatever it holds."""

    dtype: str
    shape: tuple[int, ...]


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

    kinds: Mapping[str, Kind]
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
    pieces = (Piece(name, (array := arrays[name]).shape, 0, array) for name in sorted(arrays))
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
    kinds: dict[str, Kind] = {}
    given: set[tuple[str, int]] = set()
    slots: dict[str, dict[int, Place | _Slot]] = {}
    with workers(WORKERS) as pool, workers(TRANSFERS) as transfers:
        packer = _Packer(store, transfers)
        window: deque[tuple[str, int, int, Future[Frame | Place]]] = deque()

        def take() -> None:
            name, number, size, made = window.popleft()
            result = made.result()
            slots[name][number] = packer.add(result) if isinstance(result, Frame) else result
            advance(size)

        for piece in pieces:
            kind = _agreed(kinds, piece.name, Kind(dtype_name(piece.array), piece.shape))
            slots.setdefault(piece.name, {})
            for number, part in _parts(piece):
                if (piece.name, number) in given:
                    raise ValueError(f"shard: expected every frame of {piece.name} once, got frame {number} twice")
                given.add((piece.name, number))
                job = pool.submit(_make, part, known.get((piece.name, kind.dtype, number)), compress)
                window.append((piece.name, number, part.nbytes, job))
                if len(window) > 2 * WORKERS:
                    take()
        while window:
            take()
        packs = packer.finish()
    _hold(store, {slot.pack for found in slots.values() for slot in found.values() if isinstance(slot, Place)})
    places = {
        name: {number: slot.place(packs) if isinstance(slot, _Slot) else slot for number, slot in found.items()}
        for name, found in slots.items()
    }
    return Shard(kinds=kinds, places=places)


def _agreed(kinds: dict[str, Kind], name: str, kind: Kind) -> Kind:
    """The kind, which is noted as the tensor's; ValueError where it has another one, or one that no array has."""
    if len(kind.shape) > MOST_AXES:
        raise ValueError(f"shard: expected at most {MOST_AXES} axes of {name}, got {len(kind.shape)}")
    if kinds.setdefault(name, kind) != kind:
        raise ValueError(f"shard: expected one dtype and shape of {name}, got {kinds[name]} and {kind}")
    return kind


def _hold(store: Store, packs: set[bytes]) -> None:
    """Packs of the base that are used again stay until the new state has a reference; MissingObject otherwise."""
    if packs:
        store.claim(hashed_key(PACKS, digest) for digest in packs)
        for digest in packs:
            if store.objects.find(hashed_key(PACKS, digest)) is None:
                raise missing("pack", digest, store)


def join(store: Store, shards: Sequence[Shard]) -> bytes:
    """The root of the state that the shards make together, its manifest in the store.

    ValueError naming the tensor where shards disagree, frames are missing, or two shards have the same one.
    """
    kinds: dict[str, Kind] = {}
    places: dict[str, dict[int, Place]] = {}
    for shard in shards:
        for name, found in shard.places.items():
            _agreed(kinds, name, shard.kinds[name])
            known = places.setdefault(name, {})
            if known.keys() & found.keys():
                raise ValueError(f"shards: expected every frame of {name} once, got one twice")
            known |= found
    packs: dict[bytes, int] = {}
    entries, rows, first = [], [], [0]
    for name in sorted(places):
        ordered = [places[name][number] for number in sorted(places[name])]
        root = kernels.tree_root(b"".join(place.root for place in ordered))
        entry = TensorEntry(name=name, dtype=kinds[name].dtype, shape=tuple(map(int, kinds[name].shape)), root=root)
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
        self._buffers = [_room(PACK_BYTES + 2 * FRAME_BYTES) for _ in range(TRANSFERS)]
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

    def _append(self, data: bytes | memoryview) -> None:
        end = self._size + len(data)
        self._buffer[self._size : end] = np.frombuffer(data, np.uint8)  # outside Python's lock
        self._size = end

    def _send(self) -> None:
        pack = self._buffer[: self._size].data
        self._sent.append(self._transfers.submit(_put_pack, self._store, pack))


def _room(size: int) -> Bytes:
    """Memory at the start of a page, as direct writes need it, in huge pages where the system has them."""
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)  # shared memory, which mmap gives unasked, has none
    return np.frombuffer(room, np.uint8)


def _put_pack(store: Store, pack: memoryview) -> bytes:
    digest = digest_in(PACKS, pack)
    store.keep(hashed_key(PACKS, digest), pack)
    return digest


def _make(part: Array, known: Place | None, compress: bool) -> Frame | Place:
    """The frame hashed and encoded; only hashed where it is the one that is known."""
    raw = canonical(part).view(np.uint8)
    root, tile = hash_frame(raw)
    if known is not None and known.root == root:
        return known
    codec, stored = encode_frame(raw, part.itemsize) if compress else (PLAIN, raw.data)
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
