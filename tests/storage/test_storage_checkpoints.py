"""Checkpoints: exact bytes back, one root whatever the storage, nothing stored twice, and every damage named."""

import io
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from storage import kernels, merkle, saving
from storage.checkpoints import DamagedFrame, load_state, open_checkpoint
from storage.codec import encode
from storage.errors import FailureError, IntegrityError, MissingObject, UsageError
from storage.frames import FRAME_BYTES, PACK_HEADER, PLAIN, SHUFFLED
from storage.manifest import DTYPES, state_root
from storage.objects import MemoryObjects
from storage.records import TensorEntry
from storage.saving import Piece, join, save_shard, save_state
from storage.store import CHECKPOINTS, PACKS, Store, hashed_key, memory_store, open_store
from storage.tensors import canonical, dtype_name, entry_for
from storage.testing import FaultyObjects

Array = np.ndarray[Any, Any]
State = dict[str, Array]

LEAF = merkle.LEAF_BYTES
NOISE = np.random.default_rng(7)
BIG = NOISE.standard_normal(2 * 2**18 + 5, np.float32)
"""Three frames that do not shrink much."""
STATE: State = {
    "weight/big": BIG,
    "weight/a": np.array([[1.5, -0.0], [np.inf, 1e-40]], np.float32),
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.int32),
    "mask": np.arange(FRAME_BYTES + 9) % 3 == 0,
    "digits": np.array([-64, 63], np.int8),
    "order": np.arange(2**17 + 1, dtype=np.int64),
}
any_array = st.sampled_from(sorted(DTYPES.values())).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: memory_store(),
    "local": lambda path: open_store(str(path / "store"), create=True),
}


@pytest.fixture
def store() -> Store:
    return memory_store()


def sizes(store: Store, folder: str = PACKS) -> dict[str, int]:
    return {found.key: found.size for found in store.objects.list(folder)}


def same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    """Whether names, shapes, dtypes and canonical bytes are equal."""
    return list(found) == sorted(expected) and all(
        found[name].shape == array.shape
        and found[name].dtype == array.dtype.newbyteorder("<")
        and found[name].tobytes() == canonical(array).tobytes()
        for name, array in expected.items()
    )


def root_of(state: Mapping[str, Array]) -> bytes:
    """The state root, from the definition."""
    entries = []
    for name, array in sorted(state.items()):
        data = canonical(array).tobytes()
        leaves = [merkle.leaf_hash(data[at : at + LEAF]) for at in range(0, len(data), LEAF)]
        entries.append(TensorEntry(name=name, dtype=dtype_name(array), shape=array.shape, root=merkle.root(leaves)))
    return merkle.list_root([encode(entry) for entry in entries])


# --------------------------------------------------------------------------------------------------- bytes and roots


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), any_array, max_size=4), st.booleans())
def test_state_comes_back_to_the_bit(arrays: State, compress: bool) -> None:
    store = memory_store()
    root = save_state(store, arrays, compress=compress)
    loaded = load_state(store, root)
    assert same(loaded, arrays)
    assert root == root_of(arrays) == state_root([entry_for(name, array) for name, array in loaded.items()])
    assert save_state(memory_store(), dict(reversed(loaded.items()))) == root


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_large_tensors_come_back_to_the_bit(make: Callable[[Path], Store], compress: bool, tmp_path: Path) -> None:
    store = make(tmp_path)
    root = save_state(store, STATE, compress=compress)
    assert root == root_of(STATE)
    assert same(load_state(store, root), STATE)
    codecs = open_checkpoint(store, root).manifest.frames["codec"]
    assert set(codecs) == ({PLAIN, SHUFFLED} if compress else {PLAIN})


def test_big_tensor_is_cut_into_frames_whose_roots_compose(store: Store) -> None:
    checkpoint = open_checkpoint(store, save_state(store, {"big": BIG}))
    parts = [BIG.tobytes()[at : at + FRAME_BYTES] for at in range(0, BIG.nbytes, FRAME_BYTES)]
    assert [len(part) for part in parts] == checkpoint.manifest.lengths.tolist() == [FRAME_BYTES, FRAME_BYTES, 20]
    roots = [merkle.bytes_root(part) for part in parts]
    assert [root.tobytes() for root in checkpoint.manifest.frames["root"]] == roots
    assert merkle.root(roots) == checkpoint.manifest.tensors[0].root == merkle.bytes_root(BIG.tobytes())


def test_state_root_is_the_list_root_of_sorted_entries() -> None:
    entries = [entry_for(name, array) for name, array in STATE.items()]
    expected = merkle.list_root([encode(entry) for entry in sorted(entries, key=lambda entry: entry.name)])
    assert state_root(entries) == state_root(entries[::-1]) == expected
    with pytest.raises(ValueError, match="expected every tensor once, got 'count' twice"):
        state_root([*entries, entry_for("count", np.zeros(1, np.int8))])


def test_root_covers_name_dtype_shape_and_every_bit() -> None:
    array = np.arange(6, dtype=np.int32)
    flipped = array.copy()
    flipped.view(np.uint32)[5] ^= 1 << 31
    states: list[State] = [
        {"x": array},
        {"y": array},
        {"x": array.view(np.float32)},
        {"x": array.reshape(2, 3)},
        {"x": array.reshape(3, 2)},
        {"x": flipped},
        {"x": array, "y": np.zeros(0, np.int8)},
        {"x": array, "y": np.zeros((0, 1), np.int8)},
        {},
    ]
    assert len({save_state(memory_store(), state) for state in states}) == len(states)


def test_nan_has_one_form_and_negative_zero_stays(store: Store) -> None:
    bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    expected = [0x7FC00000, 0x7FC00000, 0x7FC00000, 0x80000000, 0x7F800000, 0x00000001]
    assert canonical(bits.view(np.float32)).view(np.uint32).tolist() == expected
    assert canonical(bits[:1].view(np.float32).reshape(())).shape == ()
    loaded = load_state(store, save_state(store, {"x": bits.view(np.float32)}))["x"]
    assert loaded.view(np.uint32).tolist() == expected
    assert bits[0] == 0x7FC00001  # the argument is left alone


def layouts(array: Array) -> dict[str, Array]:
    """The same elements in other memory."""
    return {
        "Fortran": np.asfortranarray(array),
        "strided": np.repeat(array, 2, axis=0)[::2],
        "reversed": np.ascontiguousarray(array[::-1])[::-1],
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "unaligned": np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape),
        "broadcast": np.broadcast_to(array[:1], array.shape) if (array == array[:1]).all() else array,
    }


@pytest.mark.parametrize("layout", layouts(np.zeros((1, 1))))
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_layout_and_byte_order_of_the_argument_do_not_matter(store: Store, layout: str, dtype: str) -> None:
    rows = 1 if layout == "broadcast" else 4
    array = np.tile(np.arange(6 * rows).reshape(rows, 6) % 5 - 2, (4 // rows, 1)).astype(dtype)
    other = layouts(array)[layout]
    assert entry_for("x", other) == entry_for("x", array)
    root = save_state(store, {"x": other})
    assert root == root_of({"x": array})
    assert same(load_state(store, root), {"x": array})


def test_big_endian_nan_is_the_nan_of_records(store: Store) -> None:
    array = np.array([1.0, np.nan, -0.0, 1e-40], ">f4")
    root = save_state(store, {"x": array})
    assert root == root_of({"x": array})
    assert load_state(store, root)["x"].view("<u4").tolist() == [0x3F800000, 0x7FC00000, 0x80000000, 0x000116C2]


def test_entry_depends_on_the_order_of_elements() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert entry_for("x", array.T).root != entry_for("x", array).root
    assert entry_for("x", array).root == merkle.bytes_root(array.tobytes())


@pytest.mark.parametrize("dtype", ["f8", "f2", "u1", "i2", "u4", "c8", "U3", "S3", "O", "M8[s]", "i4,i4"])
def test_unknown_dtype_is_refused(store: Store, dtype: str) -> None:
    array = np.zeros(3, dtype)
    with pytest.raises(ValueError, match="expected a dtype of f32, i8, i32, i64, bool, got"):
        dtype_name(array)
    with pytest.raises(ValueError, match="expected a dtype of f32, i8, i32, i64, bool, got"):
        save_state(store, {"x": array})
    assert sizes(store, "") == {}


def test_integers_of_c_have_the_names_of_their_size() -> None:
    assert dtype_name(np.zeros(1, np.longlong)) == "i64"
    assert dtype_name(np.zeros(1, np.intc)) == "i32"
    assert dtype_name(np.zeros(1, ">i8")) == "i64"


# ----------------------------------------------------------------------------------------------------- partial loads


def test_some_tensors_can_be_loaded_alone(store: Store) -> None:
    root = save_state(store, STATE)
    loaded = load_state(store, root, lambda name: name.startswith("weight/"))
    assert same(loaded, {name: STATE[name] for name in ("weight/a", "weight/big")})
    assert load_state(store, root, lambda _: False) == {}


def test_loaded_arrays_are_the_callers_own(store: Store) -> None:
    root = save_state(store, STATE)
    before = {found.key: store.objects.read(found.key) for found in store.objects.list("")}
    first, second = load_state(store, root), load_state(store, root)
    for name, array in first.items():
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array.fill(0)
        assert not np.shares_memory(array, second[name])
    assert same(second, STATE)
    assert before == {found.key: store.objects.read(found.key) for found in store.objects.list("")}


def test_a_state_is_loaded_into_arrays_that_are_there(store: Store) -> None:
    root = save_state(store, STATE)
    room = {name: np.full_like(array, 7) for name, array in STATE.items() if name != "weight/big"}
    loaded = load_state(store, root, room=room)
    assert same(loaded, STATE)
    assert {name for name, array in loaded.items() if array is room.get(name)} == set(room)
    name = next(name for name, array in STATE.items() if array.ndim == 2 and min(array.shape) > 1)
    right = np.zeros_like(STATE[name])
    still = right.copy()
    still.flags.writeable = False
    for wrong in (right[:1], right.astype(np.float64), np.asfortranarray(right), right[::-1], still):
        with pytest.raises(UsageError, match="give another array, or none"):
            load_state(store, root, room={name: wrong})


def test_saving_leaves_its_arguments_alone(store: Store) -> None:
    state = {name: array.copy() for name, array in STATE.items()}
    state["nan"] = np.array([0x7FC00001], np.uint32).view(np.float32)
    before = {name: array.tobytes() for name, array in state.items()}
    for array in state.values():
        array.flags.writeable = False
    save_state(store, state)
    assert before == {name: array.tobytes() for name, array in state.items()}


def test_unknown_name_is_a_mistake_that_suggests_the_nearest(store: Store) -> None:
    checkpoint = open_checkpoint(store, save_state(store, STATE))
    assert checkpoint.names == sorted(STATE)
    assert [checkpoint.number(name) for name in sorted(STATE)] == list(range(len(STATE)))
    with pytest.raises(UsageError, match=r"tensor 'weight/bog': expected one of the state's 7 \(weight/big.*choose"):
        checkpoint.load_range("weight/bog", 0, 1)
    for name in ("", "a", "zzz"):
        with pytest.raises(UsageError, match="expected one of the state's 7"):
            checkpoint.number(name)


class Ranges(MemoryObjects):
    """Notes how many bytes each read of a pack takes."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        data = super().read(key, start, stop)
        if key.startswith(PACKS):
            self.taken.append(len(data or b""))
        return data


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_range_of_a_tensor_is_that_of_the_array(dtype: str, compress: bool) -> None:
    size = np.dtype(DTYPES[dtype]).itemsize
    each = FRAME_BYTES // size
    array = (np.arange(2 * each + 5) * 40503 % 251 % (2 if dtype == "bool" else 100)).astype(DTYPES[dtype])
    objects = Ranges()
    store = Store(objects)
    root = save_state(store, {"a": array[:9], "x": array.reshape(-1, 1), "z": array[:0]}, compress=compress)
    checkpoint = open_checkpoint(store, root)
    cells = checkpoint.manifest.frames["size"] + checkpoint.manifest.tiles
    ends = [0, 1, 4, each - 1, each, each + 1, 2 * each - 1, 2 * each, 2 * each + 1, len(array) - 1, len(array)]
    for start in ends:
        for stop in [end for end in ends if end >= start]:
            objects.taken.clear()
            found = checkpoint.load_range("x", start, stop)
            assert found.dtype == array.dtype
            assert np.array_equal(found, array[start:stop])
            first, last = start // each, -(-stop // each) if stop > start else start // each
            assert sum(objects.taken) == cells[1 + first : 1 + last].sum()  # no other frame was read
    for number, name in enumerate("az"):
        length = 9 * (1 - number)
        assert np.array_equal(checkpoint.load_range(name, 0, length), array[:length])


def test_neighbours_are_read_together_in_spans_that_memory_can_hold() -> None:
    objects = Ranges()
    store = Store(objects)
    root = save_state(store, {"x": np.tile(BIG, 6), "y": np.arange(9)}, compress=False)
    load_state(store, root)
    cell = FRAME_BYTES + 256 * merkle.DIGEST_BYTES
    assert sum(objects.taken) == sum(sizes(store).values()) - len(PACK_HEADER)
    assert 3 * cell <= max(objects.taken) < 4 << 20
    objects.taken.clear()
    checkpoint = open_checkpoint(store, root)
    checkpoint.visit(range(0, 12, 2), lambda frame, stored, tile: None)
    assert objects.taken == [cell] * 6  # what lies between is not read


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, len(BIG) + 1), (len(BIG) + 1, len(BIG) + 1)])
def test_range_outside_the_tensor_is_a_mistake(store: Store, start: int, stop: int) -> None:
    checkpoint = open_checkpoint(store, save_state(store, {"big": BIG}))
    with pytest.raises(UsageError, match=f"big: expected a range .* {len(BIG)} elements, got {start} to {stop}"):
        checkpoint.load_range("big", start, stop)


# ------------------------------------------------------------------------------------------------------------ shards


def cut(state: Mapping[str, Array], shards: int) -> list[list[Piece]]:
    """Every tensor's frames dealt out to the shards in turn, last ones first; neighbours make one piece."""
    dealt: list[list[Piece]] = [[] for _ in range(shards)]
    for number, (name, array) in enumerate(sorted(state.items())):
        flat, step = array.reshape(-1), FRAME_BYTES // array.itemsize
        if shards == 1:
            dealt[0].append(Piece(name, array.shape, 0, flat))
            continue
        for frame in reversed(range(max(1, -(-len(flat) // step)))):
            piece = Piece(name, array.shape, frame, flat[frame * step : (frame + 1) * step])
            dealt[(number + frame) % shards].append(piece)
    return dealt


@pytest.mark.parametrize("pack_bytes", [1 << 12, 1 << 25], ids=["small packs", "large packs"])
@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "plain"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_root_is_that_of_the_tensors_whatever_sharding_packing_codec_and_store(
    make: Callable[[Path], Store],
    shards: int,
    compress: bool,
    pack_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "PACK_BYTES", pack_bytes)
    store = make(tmp_path)
    saved = [save_shard(store, pieces, compress=compress) for pieces in cut(STATE, shards)]
    root = join(store, saved)
    assert root == root_of(STATE)
    assert join(store, saved[::-1]) == root  # in any order
    assert same(load_state(store, root), STATE)
    assert (len(sizes(store)) > shards) == (pack_bytes < LEAF * 2)


def test_shards_may_be_saved_at_the_same_time(store: Store) -> None:
    with ThreadPoolExecutor(3) as pool:
        saved = list(pool.map(lambda pieces: save_shard(store, pieces), cut(STATE, 3)))
    root = join(store, saved)
    assert root == root_of(STATE)
    assert same(load_state(store, root), STATE)


def test_one_root_has_one_manifest_the_last_one(store: Store) -> None:
    root = save_state(store, STATE)
    first = store.objects.read(CHECKPOINTS + root.hex())
    assert save_state(store, STATE, compress=False) == root
    assert store.objects.read(CHECKPOINTS + root.hex()) != first
    assert set(open_checkpoint(store, root).manifest.frames["codec"]) == {PLAIN}
    assert same(load_state(store, root), STATE)
    assert list(sizes(store, CHECKPOINTS)) == [CHECKPOINTS + root.hex()]


STEP = FRAME_BYTES // 4
X = np.arange(2 * STEP + 5, dtype=np.int32)


def piece(first: int, frames: int = 1, array: Array = X, shape: tuple[int, ...] = X.shape) -> Piece:
    return Piece("x", shape, first, array.reshape(-1)[first * STEP : (first + frames) * STEP])


Y = Piece("y", (3,), 0, X[:3])
SHARDS: dict[str, tuple[list[list[Piece]], str]] = {
    "first frame missing": ([[piece(1, 2), Y]], "expected 3 frames of x, got 2"),
    "middle frame missing": ([[piece(0)], [piece(2)]], "expected 3 frames of x, got 2"),
    "last frame missing": ([[piece(0, 2)], [Y]], "expected 3 frames of x, got 2"),
    "no frame at all": ([[Piece("x", X.shape, 0, X[:0])]], "expected 3 frames of x, got 0"),
    "a frame too many": (
        [[piece(0, 3), Piece("x", X.shape, 3, X[:4])]],
        "x",
    ),
    "a frame of an empty tensor": ([[Piece("x", (0, 3), 0, X[:4])]], "x"),
    "a frame twice": ([[piece(0, 2)], [piece(1, 2)]], "expected every frame of x once, got one twice"),
    "a frame twice, with other bytes": ([[piece(0, 3)], [piece(1, 1, X + 1)]], "every frame of x once"),
    "a frame twice in one shard": ([[piece(0, 3), piece(1, 1, X + 1)]], "x.*(once|twice)"),
    "other dtypes": ([[piece(0)], [piece(1, 2, X.view(np.float32))]], "expected one dtype and shape of x"),
    "other shapes": ([[piece(0)], [piece(1, 2, shape=(len(X), 1))]], "expected one dtype and shape of x"),
    "other dtypes in one shard": ([[piece(0), piece(1, 2, X.view(np.float32))]], "one dtype and shape of x"),
    "other shapes in one shard": ([[piece(0), piece(1, 2, shape=(len(X), 1))]], "one dtype and shape of x"),
    "a short frame that is not the last": (
        [[piece(0), Piece("x", X.shape, 1, X[STEP : STEP + 100]), piece(2)]],
        "x",
    ),
    "a long last frame": ([[piece(0, 2), Piece("x", X.shape, 2, X[:6])]], "x"),
    "a short last frame": ([[piece(0, 2), Piece("x", X.shape, 2, X[:4])]], "x"),
}


@pytest.mark.parametrize(("shards", "message"), SHARDS.values(), ids=SHARDS)
def test_shards_that_do_not_make_the_state_are_refused(store: Store, shards: list[list[Piece]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(store, [save_shard(store, pieces) for pieces in shards])
    assert sizes(store, CHECKPOINTS) == {}


def test_shard_whose_frames_are_numbered_otherwise_is_refused(store: Store) -> None:
    shard = save_shard(store, [piece(0, 3)])
    for numbers in ((1, 2, 3), (0, 1, 3), (-1, 0, 1)):
        places = {"x": dict(zip(numbers, shard.places["x"].values(), strict=True))}
        with pytest.raises(ValueError, match="expected 3 frames of x"):
            join(store, [replace(shard, places=places)])


def test_no_shards_make_the_empty_state(store: Store) -> None:
    assert join(store, []) == save_state(store, {}) == merkle.EMPTY_ROOT
    assert load_state(store, merkle.EMPTY_ROOT) == {}
    assert sizes(store) == {}


# ------------------------------------------------------------------------------------------------------------- dedup


@pytest.mark.parametrize("compress", [True, False])
def test_what_the_base_has_is_not_stored_again(store: Store, compress: bool) -> None:
    base = save_state(store, STATE, compress=compress)
    before = sizes(store)
    assert save_state(store, STATE, base=base, compress=compress) == base
    assert sizes(store) == before
    changed = {**STATE, "weight/big": BIG.copy(), "count": np.array(8, np.int64)}
    changed["weight/big"][STEP + 3] = 0.5  # in the second frame of three
    root = save_state(store, changed, base=base, compress=compress)
    (new,) = sizes(store).keys() - before.keys()
    checkpoint = open_checkpoint(store, root)
    pack = [digest.hex() for digest in checkpoint.manifest.packs].index("".join(new.split("/")[1:]))
    fresh = checkpoint.manifest.frames["pack"] == pack
    assert [checkpoint.manifest.tensor_of(frame) for frame in np.flatnonzero(fresh)] == [
        (checkpoint.number("count"), 0),
        (checkpoint.number("weight/big"), 1),
    ]
    cells = checkpoint.manifest.frames["size"] + checkpoint.manifest.tiles
    assert sizes(store)[new] == len(PACK_HEADER) + cells[fresh].sum()
    assert same(load_state(store, root), changed)
    assert same(load_state(store, base), STATE)


def test_frozen_tensors_cost_nothing_over_many_saves(store: Store) -> None:
    state: State = {"frozen": BIG, "step": np.array(0, np.int64)}
    base = save_state(store, state)
    written = sum(sizes(store).values())
    for step in range(1, 6):
        state["step"] = np.array(step, np.int64)
        base = save_state(store, state, base=base)
        assert same(load_state(store, base), state)
    cell = len(PACK_HEADER) + 8 + merkle.DIGEST_BYTES
    assert sum(sizes(store).values()) == written + 5 * cell


def test_tensors_that_come_grow_or_go_keep_what_is_equal(store: Store) -> None:
    base = save_state(store, {"a": BIG, "b": STATE["order"]})
    grown = np.concatenate([BIG, BIG[:7]])
    root = save_state(store, {"a": grown, "c": STATE["order"]}, base=base)
    packs = open_checkpoint(store, root).manifest
    assert [row["pack"] for row in packs.frames[:3]] == [0, 0, 1]
    assert same(load_state(store, root), {"a": grown, "c": STATE["order"]})


def test_same_state_makes_the_same_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PACK_BYTES", 1 << 12)
    stores = [memory_store() for _ in range(3)]
    for one in stores:
        save_state(one, STATE)
        before = sizes(one, "")
        save_state(one, dict(reversed(STATE.items())))
        assert sizes(one, "") == before
    assert len(sizes(stores[0])) > 2
    assert [sizes(one, "") for one in stores] == [before] * 3


def test_equal_frames_of_two_shards_share_a_pack(store: Store) -> None:
    moments = np.zeros(STEP, np.float32)
    shards = [save_shard(store, [Piece(name, moments.shape, 0, moments)]) for name in ("first", "second")]
    root = join(store, shards)
    assert len(sizes(store)) == 1
    assert same(load_state(store, root), {"first": moments, "second": moments})
    assert same(load_state(store, root, lambda name: name == "second"), {"second": moments})


def test_pack_that_equals_one_of_the_base_is_shared(store: Store) -> None:
    """Two counters that take the same step in two saves."""
    states = [{"a": np.array(a), "b": np.array(b)} for a, b in ((0, 0), (1, 0), (1, 1))]
    base = None
    for state in states:
        base = save_state(store, state, base=base)
        assert same(load_state(store, base), state)
    assert len(sizes(store)) == 2


def test_same_bytes_of_another_dtype_are_stored_anew(store: Store) -> None:
    numbers = np.arange(20000, dtype=np.int64)
    for dtype in ("<i8", "<i4", "<f4", "|i1", "<i8"):
        base = save_state(store, {"x": numbers})
        state = {"x": numbers.view(dtype)}
        assert same(load_state(store, save_state(store, state, base=base)), state)


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_ten_thousand_small_tensors_take_few_files(make: Callable[[Path], Store], tmp_path: Path) -> None:
    store = make(tmp_path)
    values = NOISE.integers(0, 1 << 30, 10_000)
    state: State = {f"layer.{number}": np.array([value]) for number, value in enumerate(values)}
    root = save_state(store, state)
    assert len(sizes(store, "")) <= 5
    assert same(load_state(store, root), state)


# ------------------------------------------------------------------------------------------------------------ damage


def at_of(store: Store, root: bytes, name: str, number: int = 0) -> tuple[str, int, int, int]:
    """(key of the pack, where the frame's bytes begin, where its tile begins, where that ends)."""
    checkpoint = open_checkpoint(store, root)
    frame = int(checkpoint.manifest.first[checkpoint.number(name)]) + number
    row = checkpoint.manifest.frames[frame]
    start, size = int(row["offset"]), int(row["size"])
    key = hashed_key(PACKS, checkpoint.manifest.packs[row["pack"]])
    return key, start, start + size, start + size + int(checkpoint.manifest.tiles[frame])


def flip(store: Store, key: str, *places: int) -> None:
    data = bytearray(store.objects.read(key) or b"")
    for at in places:
        data[at] ^= 1 << at % 8
    store.objects.replace(key, bytes(data))


PLACES = [0, 1, LEAF - 1, LEAF, 5 * LEAF + 77, 255 * LEAF, FRAME_BYTES - 1]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_flip_in_a_plain_frame_names_tensor_and_leaf(store: Store, number: int, place: int) -> None:
    root = save_state(store, STATE, compress=False)
    key, start, _, _ = at_of(store, root, "weight/big", number)
    flip(store, key, start + place)
    leaf = number * 256 + place // LEAF
    pack = "".join(key.split("/")[1:])
    with pytest.raises(
        DamagedFrame, match=f"pack {pack} in memory:// .*weight/big, frame {number}.*leaf {leaf}\\b"
    ) as e:
        load_state(store, root)
    assert (e.value.tensor, e.value.leaf, e.value.digest) == ("weight/big", leaf, pack)
    assert "store repair" in str(e.value)
    others = load_state(store, root, lambda name: name != "weight/big")
    assert same(others, {name: array for name, array in STATE.items() if name != "weight/big"})
    checkpoint = open_checkpoint(store, root)
    good = checkpoint.load_range("weight/big", (1 - number) * STEP, (2 - number) * STEP)  # the other frame
    assert np.array_equal(good, BIG[(1 - number) * STEP : (2 - number) * STEP])
    with pytest.raises(DamagedFrame):
        checkpoint.load_range("weight/big", STEP - 1, STEP + 1)


def test_flip_in_the_short_last_leaf_is_named(store: Store) -> None:
    root = save_state(store, STATE, compress=False)
    for name, number, leaf in (("weight/big", 2, 512), ("count", 0, 0), ("digits", 0, 0), ("mask", 1, 256)):
        key, start, _, _ = at_of(store, root, name, number)
        flip(store, key, start)
        with pytest.raises(DamagedFrame) as caught:
            load_state(store, root, lambda each, name=name: each == name)  # type: ignore[misc]
        assert (caught.value.tensor, caught.value.leaf) == (name, leaf)
        flip(store, key, start)
    assert same(load_state(store, root), STATE)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**17 * 8 - 1))
def test_flip_in_a_compressed_frame_is_refused(place: int) -> None:
    store = memory_store()
    state: State = {"x": np.arange(2**17) // 3, "y": np.arange(5)}
    root = save_state(store, state)
    key, start, tile, _ = at_of(store, root, "x")
    assert tile - start < FRAME_BYTES
    flip(store, key, start + place % (tile - start))
    try:
        loaded = load_state(store, root)
    except DamagedFrame as error:
        caught = error
    else:
        assert same(loaded, state)  # zstd has bits that mean nothing
        return
    assert caught.tensor == "x"
    assert caught.leaf is None or 0 <= caught.leaf < 256


def test_damaged_tile_does_no_harm_until_the_frame_is_damaged_too(store: Store) -> None:
    root = save_state(store, STATE, compress=False)
    key, start, tile, end = at_of(store, root, "weight/big", 1)
    for place in (tile, tile + 31, end - 1):
        flip(store, key, place)
        assert same(load_state(store, root), STATE)
        flip(store, key, start + 9 * LEAF)
        with pytest.raises(DamagedFrame, match=r"weight/big, frame 1.*256") as caught:
            load_state(store, root)
        assert (caught.value.tensor, caught.value.leaf) == ("weight/big", None)
        flip(store, key, start + 9 * LEAF, place)
    assert same(load_state(store, root), STATE)


def test_damaged_tile_is_found_where_it_is_asked_for(store: Store) -> None:
    checkpoint = open_checkpoint(store, save_state(store, {"x": BIG}))
    key, _, tile, _ = at_of(store, checkpoint.root, "x", 1)
    seen = []

    def act(frame: int, stored: memoryview, tile: memoryview) -> None:
        out = np.empty(checkpoint.manifest.lengths[frame], np.uint8)
        checkpoint.check_tile(frame, tile, checkpoint.read_frame(frame, stored, tile, out))
        seen.append(frame)

    checkpoint.visit(range(3), act)
    assert sorted(seen) == [0, 1, 2]
    flip(store, key, tile + 32 * 7 + 5)
    with pytest.raises(DamagedFrame, match="x, frame 1, leaf 263") as caught:
        checkpoint.visit(range(3), act)
    assert (caught.value.tensor, caught.value.leaf) == ("x", 263)


def test_damaged_frame_keeps_its_place_across_processes(store: Store) -> None:
    root = save_state(store, {"x": BIG}, compress=False)
    key, start, _, _ = at_of(store, root, "x", 1)
    flip(store, key, start)
    with pytest.raises(DamagedFrame) as caught:
        load_state(store, root)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (DamagedFrame, str(caught.value))
    assert (again.digest, again.tensor, again.leaf) == (caught.value.digest, "x", 256)


def test_header_of_a_pack_holds_nothing_of_a_tensor(store: Store) -> None:
    root = save_state(store, {"x": BIG})
    key, start, _, _ = at_of(store, root, "x")
    assert (store.objects.read(key) or b"")[:start] == PACK_HEADER
    flip(store, key, 0)
    assert same(load_state(store, root), {"x": BIG})


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("where", ["header", "frame", "last byte of the frame", "tile", "empty"])
def test_pack_that_lost_its_end_is_named(store: Store, where: str, compress: bool) -> None:
    state: State = {"x": np.arange(2**17)}
    root = save_state(store, state, compress=compress)
    key, start, tile, end = at_of(store, root, "x")
    kept = {"header": start, "frame": start + 100, "last byte of the frame": tile - 1, "tile": end - 1, "empty": 0}
    store.objects.replace(key, (store.objects.read(key) or b"")[: kept[where]])
    if where == "tile":
        assert same(load_state(store, root), state)
        return
    with pytest.raises(DamagedFrame, match="x, frame 0") as caught:
        load_state(store, root)
    assert (caught.value.tensor, caught.value.leaf) == ("x", None)


def test_missing_pack_is_named(store: Store) -> None:
    root = save_state(store, STATE)
    (key,) = sizes(store)
    store.objects.delete(key)
    pack = "".join(key.split("/")[1:])
    for act in (lambda: load_state(store, root), lambda: open_checkpoint(store, root).load_range("count", 0, 1)):
        with pytest.raises(MissingObject, match=f"pack {pack} is missing in memory://; fetch it with") as caught:
            act()
        assert caught.value.digest == pack


def test_damaged_and_missing_manifests_are_named(store: Store) -> None:
    root = save_state(store, STATE)
    key = CHECKPOINTS + root.hex()
    good = store.objects.read(key) or b""
    for bad in (good[:-1], good + b"\0", b"", good[:500] + b"\0" * 500 + good[1000:]):
        store.objects.replace(key, bad)
        with pytest.raises(
            IntegrityError, match=f"checkpoint {root.hex()}: its manifest is refused: .*repair"
        ) as caught:
            load_state(store, root)
        assert caught.value.digest == root.hex()
    store.objects.delete(key)
    with pytest.raises(MissingObject, match=f"checkpoint {root.hex()} is missing in memory://"):
        load_state(store, root)


def test_manifest_of_another_state_is_refused(store: Store) -> None:
    one, two = (save_state(store, {"x": np.array(value)}) for value in (1, 2))
    store.objects.replace(CHECKPOINTS + one.hex(), store.objects.read(CHECKPOINTS + two.hex()) or b"")
    with pytest.raises(IntegrityError, match=f"expected state root {one.hex()}, got {two.hex()}"):
        load_state(store, one)


def test_packs_swapped_are_refused(store: Store) -> None:
    roots = [save_state(store, {"x": BIG + add}, compress=False) for add in (0, 1)]
    keys = [at_of(store, root, "x")[0] for root in roots]
    held = [store.objects.read(key) or b"" for key in keys]
    for key, data in zip(keys, held[::-1], strict=True):
        store.objects.replace(key, data)
    for root in roots:
        with pytest.raises(DamagedFrame):
            load_state(store, root)


# ----------------------------------------------------------------------------------------------- faults in the middle


class Compressor:
    """zstd that compresses other bytes than it was given."""

    def __init__(self, compression_params: zstandard.ZstdCompressionParameters) -> None:
        self._real = REAL_COMPRESSOR(compression_params=compression_params)

    def compress(self, sample: bytes) -> bytes:
        return self._real.compress(sample)

    def stream_reader(self, data: memoryview, size: int) -> io.BytesIO:
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        return io.BytesIO(self._real.compress(changed))


class Broken(Compressor):
    """zstd whose output is damaged on its way."""

    def stream_reader(self, data: memoryview, size: int) -> io.BytesIO:
        made = bytearray(self._real.compress(data))
        made[-1] ^= 0xFF
        return io.BytesIO(bytes(made))


class Decompressor:
    """zstd that gives other bytes than were compressed."""

    def __init__(self, max_window_size: int) -> None:
        self._real = REAL_DECOMPRESSOR(max_window_size=max_window_size)

    def stream_reader(self, data: memoryview) -> io.BytesIO:
        made = bytearray(self._real.decompress(data))
        made[0] ^= 0x80
        return io.BytesIO(made)


NORMAL = np.random.default_rng(1).standard_normal(2**19, np.float32)
REAL_COMPRESSOR, REAL_DECOMPRESSOR = zstandard.ZstdCompressor, zstandard.ZstdDecompressor


@pytest.mark.parametrize("state", [np.zeros(2**19, np.float32), NORMAL], ids=["zeros", "noise"])
@pytest.mark.parametrize(
    ("name", "faulty"),
    [("ZstdCompressor", Compressor), ("ZstdCompressor", Broken), ("ZstdDecompressor", Decompressor)],
    ids=["compresses others", "damages its output", "decompresses others"],
)
def test_fault_in_compression_is_caught_before_anything_is_stored(
    store: Store, name: str, faulty: type, state: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zstandard, name, faulty)
    with pytest.raises((FailureError, ValueError), match=r"other bytes than were compressed|expected .*zstd frame"):
        save_state(store, {"x": state})
    assert sizes(store, "") == {}


def test_fault_in_byte_planes_is_caught_before_anything_is_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernels.shuffle

    def shuffle(data: Any, itemsize: int, out: memoryview) -> None:
        real(data, itemsize, out)
        out[5] ^= 4

    monkeypatch.setattr(kernels, "shuffle", shuffle)
    with pytest.raises(FailureError, match="nothing was stored of it; test this machine's memory"):
        save_state(store, {"x": np.zeros(2**19, np.float32)})
    assert sizes(store, "") == {}


def failing(folder: str, after: int, method: str = "create") -> FaultyObjects:
    """A medium whose call number `after` on keys of a folder fails, and all later ones."""
    calls = count()

    def before(called: str, key: str) -> None:
        if called == method and key.startswith(folder) and next(calls) >= after:
            raise FailureError(f"writing {key}: disk full; free space")

    return FaultyObjects(MemoryObjects(), before=before)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_error_of_the_store_ends_the_save_and_its_threads(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PACK_BYTES", 1 << 19)
    objects = failing(PACKS, after)
    store, running = Store(objects), set(threading.enumerate())
    state: State = {"x": np.tile(BIG, 4), "y": BIG}
    with pytest.raises(FailureError, match=f"writing {PACKS}.*: disk full; free space"):
        save_state(store, state)
    assert set(threading.enumerate()) <= running
    assert sizes(store, CHECKPOINTS) == {}
    objects.before = lambda method, key: None
    assert same(load_state(store, save_state(store, state)), state)
    assert set(threading.enumerate()) <= running


def test_error_of_the_last_write_leaves_no_checkpoint() -> None:
    store = Store(failing(CHECKPOINTS, 0))
    with pytest.raises(FailureError, match="disk full"):
        save_state(store, {"x": BIG})
    assert len(sizes(store)) == 1
    with pytest.raises(MissingObject):
        load_state(store, root_of({"x": BIG}))


def test_error_of_a_read_ends_the_load_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PACK_BYTES", 1 << 19)
    objects = failing(PACKS, 2, "read")
    store = Store(objects)
    root = save_state(store, {"x": np.tile(BIG, 4)})
    running = set(threading.enumerate())
    with pytest.raises(FailureError, match="disk full"):
        load_state(store, root)
    assert set(threading.enumerate()) <= running


@pytest.mark.parametrize("culprit", ["pieces", "advance", "interrupt"])
def test_error_of_the_caller_ends_the_save_and_its_threads(store: Store, culprit: str) -> None:
    running = set(threading.enumerate())

    def pieces() -> Iterator[Piece]:
        yield Piece("a", BIG.shape, 0, BIG)
        if culprit != "advance":
            raise KeyboardInterrupt("enough") if culprit == "interrupt" else LookupError("enough")
        yield Piece("b", BIG.shape, 0, BIG)

    def advance(done: int) -> None:
        if culprit == "advance":
            raise LookupError("enough")

    with pytest.raises((LookupError, KeyboardInterrupt), match="enough"):
        save_shard(store, pieces(), advance=advance)
    assert set(threading.enumerate()) <= running


def test_base_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(MissingObject, match=f"checkpoint {'07' * 32} is missing"):
        save_state(store, STATE, base=b"\x07" * 32)


# ------------------------------------------------------------------------------------------------------ how it is used


def test_progress_counts_every_byte_once(store: Store) -> None:
    done: list[int] = []
    root = save_state(store, STATE, advance=done.append)
    assert sum(done) == sum(array.nbytes for array in STATE.values())
    again: list[int] = []
    save_state(store, STATE, base=root, advance=again.append)
    assert again == done


def test_arrays_are_asked_for_one_by_one_in_order(store: Store) -> None:
    class Asked(dict[str, Array]):
        order: list[str] = []  # noqa: RUF012

        def __getitem__(self, name: str) -> Array:
            self.order.append(name)
            return super().__getitem__(name)

    asked = Asked(STATE)
    assert save_state(store, asked) == root_of(STATE)
    assert asked.order == sorted(STATE)


def test_threads_save_and_load_in_one_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PACK_BYTES", 1 << 18)
    states: list[State] = [{"x": BIG[:STEP] + number, "n": np.array(number)} for number in range(6)]

    def work(state: State) -> bool:
        root = save_state(store, state)
        return root == root_of(state) and same(load_state(store, root), state)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, states * 2))
    assert len(sizes(store, CHECKPOINTS)) == 6


def test_one_checkpoint_serves_several_threads(store: Store) -> None:
    checkpoint = open_checkpoint(store, save_state(store, STATE))
    starts = [0, 5, STEP - 2, STEP, 2 * STEP - 1, 17]

    def read(start: int) -> bool:
        return np.array_equal(checkpoint.load_range("weight/big", start, start + 5), BIG[start : start + 5])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, starts * 4))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "C:\\x", ".", "", "a\nb", "\0", "\x1b[2J", "ä"])
def test_names_are_never_paths(name: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "inside" / "store"), create=True)
    state: State = {name: np.arange(5)}
    root = save_state(store, state)
    assert same(load_state(store, root), state)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["store"]
    folders: Iterable[str] = ("trueweight-store", "packs", "checkpoints", "unfinished")
    assert sorted(path.name for path in (tmp_path / "inside" / "store").iterdir()) == sorted(folders)
