"""Saves in the background: copies that training cannot reach, one save at a time, and errors where they belong."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from storage import saves
from storage.checkpoints import load_state, open_checkpoint
from storage.errors import FailureError
from storage.manifest import DTYPES
from storage.objects import MemoryObjects
from storage.saves import Saver
from storage.saving import save_state
from storage.store import CHECKPOINTS, PACKS, Store, memory_store
from storage.testing import FaultyObjects

Array = np.ndarray[Any, Any]
State = dict[str, list[Array]]
SHAPES: dict[str, tuple[int, ...]] = {"weights": (4, 3), "step": (), "none": (0, 2)}
WAIT = 60
"""Seconds after which a test gives up on a thread."""


def state(step: int) -> State:
    """Tensors as workers give them: flat pieces, in order."""
    weights = np.arange(12, dtype=np.float32) + step
    return {
        "weights": [weights[:5], weights[5:5], weights[5:]],
        "step": [np.array([step])],
        "none": [np.empty(0, np.int8)],
    }


def whole(step: int) -> dict[str, Array]:
    return {name: np.concatenate(pieces).reshape(SHAPES[name]) for name, pieces in state(step).items()}


def root_of(step: int) -> bytes:
    return save_state(memory_store(), whole(step))


def same(found: dict[str, Array], step: int) -> bool:
    expected = whole(step)
    return list(found) == sorted(expected) and all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in expected.items()
    )


@pytest.fixture
def store() -> Store:
    return memory_store()


@pytest.fixture
def saver(store: Store) -> Iterator[Saver]:
    made = Saver(store)
    yield made
    made.close()


class Gate(MemoryObjects):
    """A medium whose writes of packs wait until the gate is open; it tells when one has come."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def create(self, key: str, data: Any) -> bool:
        if key.startswith(PACKS):
            self.reached.set()
            assert self.open.wait(WAIT)
        return super().create(key, data)


def test_what_was_copied_is_saved(store: Store, saver: Saver) -> None:
    copies = saver.copy(state(1), SHAPES)
    assert {name: array.shape for name, array in copies.items()} == SHAPES
    root = saver.save(copies, root_of(1)).result(WAIT)
    assert root == root_of(1)
    assert same(load_state(store, root), 1)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_is_copied_to_the_bit(store: Store, saver: Saver, dtype: str) -> None:
    array = np.frombuffer(bytes(range(256)) * 8, np.uint8)
    array = (array % 2 if dtype == "|b1" else array).view(dtype)
    copies = saver.copy({"x": [array[:3], array[3:]]}, {"x": (8, len(array) // 8)})
    assert copies["x"].tobytes() == array.tobytes()
    assert (copies["x"].dtype, copies["x"].shape) == (array.dtype, (8, len(array) // 8))


def test_copies_do_not_follow_the_live_arrays(store: Store, saver: Saver) -> None:
    live = state(1)
    copies = saver.copy(live, SHAPES)
    for pieces in live.values():
        for piece in pieces:
            assert not any(np.shares_memory(piece, copy) for copy in copies.values())
            piece.fill(99)
    assert same(load_state(store, saver.save(copies, root_of(1)).result(WAIT)), 1)


def test_training_may_change_the_state_while_it_is_saved() -> None:
    gate = Gate()
    store = Store(gate)
    saver = Saver(store)
    live = state(1)
    gate.open.clear()
    saved = saver.save(saver.copy(live, SHAPES), root_of(1))
    assert gate.reached.wait(WAIT)
    for pieces in live.values():
        for piece in pieces:
            piece += 1
    assert not saved.done()
    gate.open.set()
    assert same(load_state(store, saved.result(WAIT)), 1)
    saver.close()


def test_next_copy_waits_for_the_save_before_it() -> None:
    """Its memory is used again, so it must be in the store by then."""
    gate = Gate()
    saver = Saver(Store(gate))
    gate.open.clear()
    first = saver.save(saver.copy(state(1), SHAPES), root_of(1))
    assert gate.reached.wait(WAIT)
    done: list[bool] = []

    def second() -> Future[bytes]:
        copies = saver.copy(state(2), SHAPES)
        done.append(first.done())
        return saver.save(copies, root_of(2))

    result: list[Future[bytes]] = []
    trainer = threading.Thread(target=lambda: result.append(second()))
    trainer.start()
    assert not done
    gate.open.set()
    trainer.join(WAIT)
    assert done == [True]
    assert first.result(WAIT) == root_of(1)
    assert result[0].result(WAIT) == root_of(2)
    saver.close()


def test_memory_is_used_again(saver: Saver) -> None:
    first = dict(saver.copy(state(1), SHAPES))
    saver.save(first, root_of(1))
    second = dict(saver.copy(state(2), SHAPES))
    assert all(second[name] is first[name] for name in SHAPES)
    assert same({name: second[name] for name in sorted(second)}, 2)


def test_tensors_may_change_shape_or_dtype_come_and_go(store: Store, saver: Saver) -> None:
    saver.copy(state(1), SHAPES)
    changed: State = {"weights": [np.ones(4, np.float32)], "step": [np.array([1], np.int32)], "new": [np.array([True])]}
    copies = saver.copy(changed, {"weights": (2, 2), "step": (), "new": (1,)})
    expected = {"weights": np.ones((2, 2), np.float32), "step": np.array(1, np.int32), "new": np.array([True])}
    root = saver.save(copies, save_state(memory_store(), expected)).result(WAIT)
    loaded = load_state(store, root)
    assert {name: (array.dtype, array.tolist()) for name, array in loaded.items()} == {
        name: (array.dtype, array.tolist()) for name, array in expected.items()
    }


def test_saves_end_in_their_order_one_at_a_time(monkeypatch: pytest.MonkeyPatch, store: Store, saver: Saver) -> None:
    real, running, order = save_state, threading.Lock(), []

    def one(store: Store, copies: dict[str, Array], **options: Any) -> bytes:
        assert running.acquire(blocking=False)  # else two are at work
        root = real(store, copies, **options)
        order.append(root)
        running.release()
        return root

    monkeypatch.setattr(saves, "save_state", one)
    roots = [root_of(step) for step in range(5)]
    futures = [saver.save(whole(step), roots[step]) for step in range(5)]
    assert [future.result(WAIT) for future in futures] == roots == order


def test_only_what_changed_is_stored_again(store: Store, saver: Saver) -> None:
    written = []
    frozen = np.arange(5000, dtype=np.int64)
    for step in range(3):
        state: State = {"frozen": [frozen], "step": [np.array([step])]}
        expected = save_state(memory_store(), {"frozen": frozen, "step": np.array(step)})
        saver.save(saver.copy(state, {"frozen": (5000,), "step": ()}), expected).result(WAIT)
        assert saver.base == expected
        written.append(sum(found.size for found in store.objects.list(PACKS)))
    assert written[1] - written[0] == written[2] - written[1] == 8 + 8 + 32  # a pack of one number


def test_base_may_be_a_checkpoint_that_was_loaded(store: Store, saver: Saver) -> None:
    saver.base = save_state(store, whole(1))
    before = [found.key for found in store.objects.list("")]
    assert saver.save(saver.copy(state(1), SHAPES), root_of(1)).result(WAIT) == saver.base
    assert [found.key for found in store.objects.list("")] == before


def failing(folder: str) -> tuple[Store, Callable[[], None]]:
    """A store that cannot write in a folder, and what mends it."""
    broken = True

    def before(method: str, key: str) -> None:
        if broken and method == "create" and key.startswith(folder):
            raise FailureError("writing: disk full; free space")

    def mend() -> None:
        nonlocal broken
        broken = False

    return Store(FaultyObjects(MemoryObjects(), before=before)), mend


@pytest.mark.parametrize("folder", [PACKS, CHECKPOINTS])
def test_error_comes_out_of_its_own_save_and_the_next_one_works(folder: str) -> None:
    store, mend = failing(folder)
    saver = Saver(store)
    running = threading.active_count()
    first = saver.save(saver.copy(state(1), SHAPES), root_of(1))
    assert isinstance(first.exception(WAIT), FailureError)
    with pytest.raises(FailureError, match="disk full; free space"):
        first.result(WAIT)
    assert saver.base is None
    mend()
    second = saver.save(saver.copy(state(2), SHAPES), root_of(2))
    assert second.result(WAIT) == saver.base == root_of(2)
    assert same(load_state(store, root_of(2)), 2)
    assert threading.active_count() <= running + 1  # the saver's own
    saver.close()
    assert threading.active_count() <= running


def test_other_root_than_the_trainers_is_a_failure_of_memory(store: Store, saver: Saver) -> None:
    saver.save(saver.copy(state(1), SHAPES), root_of(1)).result(WAIT)
    wrong = saver.save(saver.copy(state(2), SHAPES), root_of(3))
    message = f"expected state root {root_of(3).hex()}, got {root_of(2).hex()}; a worker's memory changed .*resume"
    with pytest.raises(FailureError, match=message):
        wrong.result(WAIT)
    assert saver.base == root_of(1)  # the last one that is known to be good
    right = saver.save(saver.copy(state(3), SHAPES), root_of(3))
    assert right.result(WAIT) == saver.base == root_of(3)


def test_error_of_a_save_does_not_stop_the_next_copy(store: Store, saver: Saver) -> None:
    wrong = saver.save(saver.copy(state(1), SHAPES), bytes(32))
    copies = saver.copy(state(2), SHAPES)
    assert wrong.done()
    assert same({name: copies[name] for name in sorted(copies)}, 2)


def test_error_of_a_copy_comes_out_at_once(saver: Saver) -> None:
    with pytest.raises(ValueError, match=r"dimension|shape|size"):
        saver.copy({"x": [np.zeros(3, np.float32)]}, {"x": (4,)})
    copies = saver.copy(state(1), SHAPES)
    assert saver.save(copies, root_of(1)).result(WAIT) == root_of(1)


def test_base_that_was_collected_is_an_error_of_the_save(store: Store, saver: Saver) -> None:
    saver.base = bytes(32)
    with pytest.raises(FailureError, match=f"checkpoint {'00' * 32} is missing"):
        saver.save(saver.copy(state(1), SHAPES), root_of(1)).result(WAIT)
    saver.base = None
    assert saver.save(saver.copy(state(1), SHAPES), root_of(1)).result(WAIT) == root_of(1)


def test_close_waits_for_the_last_save() -> None:
    gate = Gate()
    saver = Saver(Store(gate))
    running = threading.active_count()
    gate.open.clear()
    saved = saver.save(saver.copy(state(1), SHAPES), root_of(1))
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=saver.close)
    closing.start()
    assert not saved.done()
    gate.open.set()
    closing.join(WAIT)
    assert saved.done()
    assert saved.result(0) == root_of(1)
    assert threading.active_count() <= running
    with pytest.raises(RuntimeError, match="after shutdown"):
        saver.save(whole(1), root_of(1))


def test_saved_state_has_the_manifest_of_any_save(store: Store, saver: Saver) -> None:
    root = saver.save(saver.copy(state(1), SHAPES), root_of(1)).result(WAIT)
    other = memory_store()
    save_state(other, whole(1))
    key = CHECKPOINTS + root.hex()
    assert store.objects.read(key) == other.objects.read(key)
    assert open_checkpoint(store, root).names == sorted(SHAPES)
