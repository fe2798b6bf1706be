"""A training state as named arrays in a store, under one root.

A tensor's bytes are its elements in C order, little-endian, every NaN written as 0x7fc00000. Frames of 1 MiB are 256
leaves each, a power of two, so whoever holds a frame can hash it alone and the frames' roots give the tensor's root.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import merkle
from storage.codec import decode, encode
from storage.errors import FailureError, IntegrityError
from storage.objects import ObjectStore
from storage.records import Checkpoint, TensorEntry, TensorFrames

Array = NDArray[Any]

FRAME_BYTES = merkle.CHUNK_LEAVES * merkle.LEAF_BYTES
DTYPES = {"f32": "<f4", "i8": "|i1", "i32": "<i4", "i64": "<i8", "bool": "|b1"}
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
    if ready.dtype.kind == "f":
        nans = np.isnan(ready)
        if nans.any():
            bits = np.where(nans, np.uint32(0x7FC00000), ready.view("<u4"))
            return bits.astype("<u4", copy=False).view("<f4").reshape(ready.shape)
    return ready


def entry_for(name: str, array: Array) -> TensorEntry:
    """The entry that commits to the array's name, dtype, shape and bytes."""
    ready = canonical(array)
    return TensorEntry(name=name, dtype=dtype_name(ready), shape=ready.shape, root=merkle.bytes_root(ready.data))


def state_root(entries: Iterable[TensorEntry]) -> bytes:
    """Root over the encoded entries sorted by name; ValueError where two have the same name."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise ValueError(f"state: expected every tensor once, got {first.name!r} twice")
    return merkle.list_root([encode(entry) for entry in ordered])


def save_tensor(store: ObjectStore, name: str, array: Array) -> TensorFrames:
    """The tensor's entry and frames, once all its bytes are in the store."""
    ready = canonical(array)
    data = ready.tobytes()
    frames = tuple(store.put(data[at : at + FRAME_BYTES]) for at in range(0, len(data), FRAME_BYTES))
    return TensorFrames(entry=entry_for(name, ready), frames=frames)


def save_manifest(store: ObjectStore, step: int, tensors: Iterable[TensorFrames]) -> tuple[bytes, bytes]:
    """(checkpoint digest, state root) of tensors whose frames are in the store already."""
    ordered = tuple(sorted(tensors, key=lambda tensor: tensor.entry.name))
    root = state_root(tensor.entry for tensor in ordered)
    return store.put(encode(Checkpoint(step=step, state_root=root, tensors=ordered))), root


def save_state(store: ObjectStore, step: int, arrays: Mapping[str, Array]) -> tuple[bytes, bytes]:
    """(checkpoint digest, state root) of the named arrays, all of them in the store: frames first, manifest last."""
    return save_manifest(store, step, [save_tensor(store, name, arrays[name]) for name in sorted(arrays)])


def open_checkpoint(store: ObjectStore, digest: bytes) -> Checkpoint:
    """The manifest, with its state root, order and frame counts checked; IntegrityError where they do not hold."""
    checkpoint = decode(Checkpoint, store.get(digest))
    names = [tensor.entry.name for tensor in checkpoint.tensors]
    if names != sorted(set(names)):
        raise _damaged(digest, "expected every tensor once, sorted by name")
    found = state_root(tensor.entry for tensor in checkpoint.tensors)
    if found != checkpoint.state_root:
        raise _damaged(digest, f"expected state root {checkpoint.state_root.hex()}, got {found.hex()}")
    for tensor in checkpoint.tensors:
        entry = tensor.entry
        if entry.dtype not in DTYPES:
            raise _damaged(digest, f"{entry.name}: expected a dtype of {', '.join(DTYPES)}, got {entry.dtype!r}")
        frames = -(-_size(entry) // FRAME_BYTES)
        if len(tensor.frames) != frames:
            raise _damaged(digest, f"{entry.name}: expected {frames} frames, got {len(tensor.frames)}")
    return checkpoint


def load_tensor(store: ObjectStore, tensor: TensorFrames) -> Array:
    """The array (its own, writable memory), its frames' digests and its root checked; IntegrityError otherwise."""
    entry = tensor.entry
    data = bytearray().join(store.get(frame) for frame in tensor.frames)
    if len(data) != _size(entry):
        raise _damaged(entry.root, f"{entry.name}: expected {_size(entry)} bytes, got {len(data)}")
    found = merkle.bytes_root(data)
    if found != entry.root:
        raise _damaged(entry.root, f"{entry.name}: expected root {entry.root.hex()}, got {found.hex()}")
    array: Array = np.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
    return array


def load_state(store: ObjectStore, digest: bytes, names: Callable[[str], bool] | None = None) -> dict[str, Array]:
    """The arrays of a checkpoint by name, all of them or those that `names` accepts, in the order of their names.

    Checks every frame's digest, every loaded tensor's root and the state root over all entries. Raises MissingObject,
    or IntegrityError naming the object.
    """
    checkpoint = open_checkpoint(store, digest)
    wanted = [tensor for tensor in checkpoint.tensors if names is None or names(tensor.entry.name)]
    return {tensor.entry.name: load_tensor(store, tensor) for tensor in wanted}


def _size(entry: TensorEntry) -> int:
    size = np.dtype(DTYPES[entry.dtype]).itemsize
    for length in entry.shape:  # Python integers: a forged shape must not wrap around
        size *= length
    return size


def _damaged(digest: bytes, why: str) -> FailureError:
    name = digest.hex()
    return IntegrityError(f"checkpoint object {name}: {why}; resume from another checkpoint", digest=name)
