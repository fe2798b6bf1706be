"""Checkpoints: exact bytes back, one root whatever the storage, and every damage named."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from storage import merkle
from storage.checkpoints import (
    DTYPES,
    FRAME_BYTES,
    canonical,
    dtype_name,
    entry_for,
    load_state,
    open_checkpoint,
    save_manifest,
    save_state,
    save_tensor,
    state_root,
)
from storage.codec import decode, encode
from storage.errors import IntegrityError, MissingObject
from storage.objects import MemoryStore
from storage.records import Checkpoint, TensorEntry, TensorFrames

any_array = st.sampled_from(sorted(DTYPES.values())).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
STATE = {
    "weight/big": np.arange(2 * 2**18 + 5, dtype=np.float32),
    "weight/a": np.array([[1.5, -0.0], [np.inf, 1e-40]], dtype=np.float32),
    "count": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.int32),
    "mask": np.array([True, False]),
    "digits": np.array([-64, 63], dtype=np.int8),
}


class Damaged(MemoryStore):
    """A store in which an object's bytes can be replaced behind its back."""

    def damage(self, digest: bytes, change: Callable[[bytes], bytes]) -> None:
        self._objects[digest] = change(self._objects[digest])


@pytest.fixture
def store() -> Damaged:
    return Damaged()


@given(st.dictionaries(st.text(max_size=5), any_array, max_size=4))
def test_state_comes_back_to_the_bit(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    store = MemoryStore()
    digest, root = save_state(store, 3, arrays)
    loaded = load_state(store, digest)
    assert list(loaded) == sorted(arrays)
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape
        assert loaded[name].dtype == array.dtype
        assert loaded[name].tobytes() == canonical(array).tobytes()
    assert root == state_root(entry_for(name, array) for name, array in loaded.items())
    assert save_state(store, 3, dict(reversed(loaded.items()))) == (digest, root)


def test_big_tensor_is_cut_into_frames_whose_roots_compose(store: Damaged) -> None:
    array = STATE["weight/big"]
    tensor = save_tensor(store, "weight/big", array)
    frames = [store.get(frame) for frame in tensor.frames]
    assert [len(frame) for frame in frames] == [FRAME_BYTES, FRAME_BYTES, 20]
    assert b"".join(frames) == array.tobytes()
    assert merkle.root([merkle.bytes_root(frame) for frame in frames]) == tensor.entry.root


def test_manifest_of_frames_saved_apart_is_that_of_the_whole(store: Damaged) -> None:
    tensors = [save_tensor(store, name, array) for name, array in STATE.items()]
    assert save_manifest(store, 5, tensors) == save_state(store, 5, STATE)


def test_state_root_is_the_list_root_of_sorted_entries() -> None:
    entries = [entry_for(name, array) for name, array in STATE.items()]
    expected = merkle.list_root([encode(entry) for entry in sorted(entries, key=lambda entry: entry.name)])
    assert state_root(entries) == state_root(reversed(entries)) == expected
    with pytest.raises(ValueError, match="expected every tensor once, got 'count' twice"):
        state_root([*entries, entry_for("count", np.zeros(1, np.int8))])


def test_nan_has_one_form_and_negative_zero_stays() -> None:
    bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], dtype=np.uint32)
    expected = [0x7FC00000, 0x7FC00000, 0x7FC00000, 0x80000000, 0x7F800000, 0x00000001]
    assert canonical(bits.view(np.float32)).view(np.uint32).tolist() == expected
    assert canonical(bits[:1].view(np.float32).reshape(())).shape == ()
    assert bits[0] == 0x7FC00001  # the argument is left alone


def test_layout_and_byte_order_of_the_argument_do_not_matter() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for other in (np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2], array.astype(">f4")):
        assert entry_for("x", other) == entry_for("x", array)
    assert entry_for("x", array.T).root != entry_for("x", array).root
    assert entry_for("x", array).root == merkle.bytes_root(array.tobytes())


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a dtype of f32, i8, i32, i64, bool, got float64"):
        dtype_name(np.zeros(3))


def test_some_tensors_can_be_loaded_alone(store: Damaged) -> None:
    digest, _ = save_state(store, 1, STATE)
    loaded = load_state(store, digest, lambda name: name.startswith("weight/"))
    assert list(loaded) == ["weight/a", "weight/big"]
    loaded["weight/a"][0, 0] = 2.0  # its own memory
    assert load_state(store, digest)["weight/a"][0, 0] == 1.5


def test_damaged_or_missing_frame_is_named(store: Damaged) -> None:
    digest, _ = save_state(store, 1, STATE)
    frame = open_checkpoint(store, digest).tensors[-1].frames[1]
    store.damage(frame, lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:])
    with pytest.raises(IntegrityError, match=f"object {frame.hex()}") as caught:
        load_state(store, digest)
    assert caught.value.digest == frame.hex()
    assert "count" in load_state(store, digest, lambda name: name != "weight/big")
    del store._objects[frame]
    with pytest.raises(MissingObject, match=frame.hex()):
        load_state(store, digest)


def test_damaged_manifest_is_named(store: Damaged) -> None:
    digest, _ = save_state(store, 1, STATE)
    store.damage(digest, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=f"object {digest.hex()}"):
        load_state(store, digest)


def forge(store: MemoryStore, digest: bytes, change: Callable[[Checkpoint], Checkpoint]) -> bytes:
    """The digest of a changed manifest whose object is sound."""
    return store.put(encode(change(decode(Checkpoint, store.get(digest)))))


def first(tensor: Callable[[TensorFrames], TensorFrames]) -> Callable[[Checkpoint], Checkpoint]:
    """Change the first tensor and make the state root agree again."""

    def change(checkpoint: Checkpoint) -> Checkpoint:
        tensors = (tensor(checkpoint.tensors[0]), *checkpoint.tensors[1:])
        root = state_root(each.entry for each in tensors)
        return dataclasses.replace(checkpoint, tensors=tensors, state_root=root)

    return change


def entry(**changes: Any) -> Callable[[TensorFrames], TensorFrames]:
    return lambda tensor: dataclasses.replace(tensor, entry=dataclasses.replace(tensor.entry, **changes))


FORGERIES: dict[str, tuple[Callable[[Checkpoint], Checkpoint], str]] = {
    "another state root": (
        lambda made: dataclasses.replace(made, state_root=bytes(32)),
        f"expected state root {'00' * 32}",
    ),
    "another order": (
        lambda made: dataclasses.replace(made, tensors=made.tensors[::-1]),
        "expected every tensor once, sorted by name",
    ),
    "a tensor twice": (
        lambda made: dataclasses.replace(made, tensors=made.tensors[:1] * 2),
        "expected every tensor once, sorted by name",
    ),
    "a tensor left out": (
        lambda made: dataclasses.replace(made, tensors=made.tensors[1:]),
        "expected state root",
    ),
    "an unknown dtype": (
        first(entry(dtype="f16")),
        "count: expected a dtype of f32, i8, i32, i64, bool, got 'f16'",
    ),
    "another shape": (first(entry(shape=(2,))), "count: expected 16 bytes, got 8"),
    "a shape that wraps around": (first(entry(shape=(2**63, 2**63))), "count: expected [0-9]+ frames, got 1"),
    "another tensor root": (first(entry(root=bytes(32))), f"count: expected root {'00' * 32}"),
    "no frames": (
        first(lambda tensor: dataclasses.replace(tensor, frames=())),
        "count: expected 1 frames, got 0",
    ),
    "a frame twice": (
        first(lambda tensor: dataclasses.replace(tensor, frames=tensor.frames * 2)),
        "count: expected 1 frames, got 2",
    ),
}


@pytest.mark.parametrize(("change", "message"), FORGERIES.values(), ids=FORGERIES)
def test_forged_manifest_is_refused(store: Damaged, change: Callable[[Checkpoint], Checkpoint], message: str) -> None:
    digest, _ = save_state(store, 1, STATE)
    with pytest.raises(IntegrityError, match=message):
        load_state(store, forge(store, digest, change))


def test_manifest_cannot_name_one_tensor_twice(store: Damaged) -> None:
    made = TensorEntry(name="a", dtype="f32", shape=(0,), root=merkle.EMPTY_ROOT)
    tensors = [TensorFrames(entry=made, frames=())] * 2
    with pytest.raises(ValueError, match="got 'a' twice"):
        save_manifest(store, 1, tensors)
