"""Checkpoints: training states in a store, found under their root and checked up to it on every read.

A tensor's bytes are cut into frames (`storage.frames`), which lie in packs; the manifest (`storage.manifest`), found
under the state root, says where. `storage.saving` writes them.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np

from storage import kernels, merkle
from storage.errors import FailureError, IntegrityError, UsageError
from storage.frames import FRAME_BYTES, Bytes, decode_frame, hash_frame
from storage.manifest import DTYPES, MOST_BYTES, Manifest, decode_manifest, itemsize, tensor_bytes, unseal
from storage.records import TensorEntry
from storage.store import CHECKPOINTS, PACKS, Store, hashed_key, missing
from storage.tensors import Array

WORKERS = max(2, os.cpu_count() or 1)
"""Threads that hash and compress, or decompress and check."""
TRANSFERS = 4
"""Packs under way to the store at a time, and spans from it: what bounds memory."""
_SPAN_BYTES = 4 << 20
_GAP_BYTES = 64 << 10


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

    def load(
        self, names: Callable[[str], bool] | None = None, room: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The arrays by name, all or those that `names` accepts, every byte checked.

        They are writable memory of their own, but for names in `room`: its arrays are filled, and hold anything after
        an error. New memory would have to be mapped page by page, which takes half as long as the checks.

        Raises MissingObject, or IntegrityError naming pack, tensor and leaf; UsageError where an array of `room` is not
        of the tensor's shape and type, in C order and writable.
        """
        found: dict[str, Array] = {}
        into: dict[int, Bytes] = {}
        for number, entry in enumerate(self.manifest.tensors):
            if names is None or names(entry.name):
                given = (room or {}).get(entry.name)
                flat = np.empty(tensor_bytes(entry), np.uint8) if given is None else _octets(entry, given)
                found[entry.name] = flat.view(DTYPES[entry.dtype]).reshape(entry.shape) if given is None else given
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
        with workers(max(WORKERS, TRANSFERS)) as pool:
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


def _octets(entry: TensorEntry, array: Array) -> Bytes:
    """The bytes of an array that a tensor is loaded into."""
    right = array.shape == tuple(entry.shape) and array.dtype == DTYPES[entry.dtype]
    if not (right and array.flags.c_contiguous and array.flags.writeable):
        raise UsageError(
            f"{entry.name}: expected room for {entry.dtype} {list(entry.shape)} in C order, got {array.dtype} "
            f"{list(array.shape)}; give another array, or none"
        )
    return array.reshape(-1).view(np.uint8)


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


def load_state(
    store: Store,
    root: bytes,
    names: Callable[[str], bool] | None = None,
    room: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The arrays of a checkpoint by name, all of them or those that `names` accepts; see `Checkpoint.load`."""
    return open_checkpoint(store, root).load(names, room)


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads; what is still queued is dropped when something fails."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
