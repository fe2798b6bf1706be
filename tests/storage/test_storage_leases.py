"""Leases and sweeps: what a writer writes again, when it waits for a collector, and what ends a lease."""

import json
import threading
from collections.abc import Callable
from hashlib import sha256

import pytest

from storage import leases
from storage.errors import FailureError
from storage.objects import Found, MemoryObjects
from storage.store import OBJECTS, Store, hashed_key
from storage.testing import FaultyObjects

DATA = b"data"
KEY = hashed_key(OBJECTS, sha256(DATA).digest())


class Clock:
    """The clock of a store, which waiting moves on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waited = 0.0
        self.then: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds
        self.then()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def objects(clock: Clock) -> MemoryObjects:
    return MemoryObjects(clock)


@pytest.fixture
def store(objects: MemoryObjects, clock: Clock) -> Store:
    return Store(objects, wait=clock.wait)


def found(objects: MemoryObjects, key: str) -> Found:
    there = objects.find(key)
    assert there is not None
    return there


def lease_keys(objects: MemoryObjects) -> list[str]:
    return [one.key for one in objects.list(leases.FOLDER)]


# ------------------------------------------------------------------------------------------------- a lease's life


def test_lease_is_there_while_writing(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    assert lease_keys(objects) == []
    with store.writing("a test"):
        (key,) = lease_keys(objects)
        told = json.loads(objects.read(key) or b"")
        assert (told["since"], told["purpose"], told["claims"]) == (1000.0, "a test", [])
    assert lease_keys(objects) == []


def test_nested_writing_goes_on(store: Store, objects: MemoryObjects) -> None:
    with store.writing("outer"):
        (key,) = lease_keys(objects)
        with store.writing("inner"):
            assert lease_keys(objects) == [key]
        assert lease_keys(objects) == [key]
    assert lease_keys(objects) == []


def test_overlapping_writers_of_one_store_share_the_lease(store: Store, objects: MemoryObjects) -> None:
    first, second = store.writing("first thread"), store.writing("second thread")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(lease_keys(objects)) == 1
    second.__exit__(None, None, None)
    assert lease_keys(objects) == []


def test_mishap_inside_ends_the_lease(store: Store, objects: MemoryObjects) -> None:
    with pytest.raises(KeyError), store.writing("a test"):
        raise KeyError
    assert lease_keys(objects) == []


def test_store_that_cannot_be_written_is_said_at_once() -> None:
    faulty = FaultyObjects(MemoryObjects())
    store = Store(faulty)

    def refuse(method: str, key: str) -> None:
        if method in ("create", "replace"):
            raise FailureError(f"{method} {key}: read-only")

    faulty.before = refuse
    with pytest.raises(FailureError, match=r"create leases/.*: read-only"), store.writing("a test"):
        pytest.fail("nothing is done")
    faulty.before = lambda method, key: None
    with store.writing("a test"):
        store.put(DATA)


def test_lease_that_cannot_be_given_back_fails_nothing(objects: MemoryObjects, clock: Clock) -> None:
    def refuse(method: str, key: str) -> None:
        if method == "delete":
            raise FailureError(f"{method} {key}: timed out")

    faulty = FaultyObjects(objects, before=refuse)
    store = Store(faulty)
    with store.writing("a test"):
        store.put(DATA)
    assert leases.clock(faulty) == clock.now
    assert len(lease_keys(objects)) == 1, "it runs out by itself"


def test_lease_that_ran_out_lets_no_reference_move(
    store: Store, objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Clock()
    monkeypatch.setattr(leases, "elapsed", ours)
    with store.writing("a test"):
        store.swap("head", None, store.put(b"old"))
        ours.now += leases.LASTS / 2 + 1
        with pytest.raises(FailureError, match=r"was stopped for longer than a lease holds.*run the command again"):
            store.swap("head", sha256(b"old").digest(), store.put(DATA))
    assert store.read("head") == sha256(b"old").digest()
    with store.writing("another test"):
        store.swap("head", sha256(b"old").digest(), store.put(DATA))


class Renewals:
    """Lets the renewing thread write its lease so often, and waits until it has tried."""

    def __init__(self) -> None:
        self.tried, self.fails = threading.Semaphore(0), False
        self.go = threading.Semaphore(0)

    def __call__(self, method: str, key: str) -> None:
        if method == "replace" and threading.current_thread().name == "lease":
            assert self.go.acquire(timeout=30)
            self.tried.release()
            if self.fails:
                raise FailureError("timed out")

    def once(self) -> None:
        self.go.release()
        assert self.tried.acquire(timeout=30)


def test_lease_is_renewed(objects: MemoryObjects, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED", 0.001)
    ours, renewals = Clock(), Renewals()
    monkeypatch.setattr(leases, "elapsed", ours)
    lease = leases.take(FaultyObjects(objects, before=renewals), "a test")
    for fails in (False, True, True, False):
        renewals.fails = fails
        clock.now += leases.LASTS / 10
        ours.now += leases.LASTS / 10
        renewals.once()
    renewals.once()  # the one before has ended
    lease.check()
    (key,) = lease_keys(objects)
    assert found(objects, key).modified == clock.now
    assert json.loads(objects.read(key) or b"")["since"] == lease.since == 1000.0
    ours.now += leases.LASTS
    renewals.once()
    renewals.once()
    with pytest.raises(FailureError, match="longer than a lease holds"):
        lease.check()  # a renewal that comes too late is none
    monkeypatch.setattr(leases, "RENEWED", 999.0)
    renewals.go.release(2)
    lease.end()


def test_renewal_takes_back_no_claim(objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED", 0.001)
    writing, go = threading.Event(), threading.Event()

    def before(method: str, key: str) -> None:
        if method == "replace" and threading.current_thread().name == "lease":
            writing.set()
            assert go.wait(30)

    lease = leases.take(FaultyObjects(objects, before=before), "a test")
    assert writing.wait(30)
    claimant = threading.Thread(target=lease.claim, args=([KEY],))
    claimant.start()
    claimant.join(0.2)  # it waits for the renewal under way, or overtakes it
    monkeypatch.setattr(leases, "RENEWED", 999.0)
    go.set()
    claimant.join()
    thread = lease._thread
    lease._over.set()
    thread.join()
    assert leases.held(objects, 1000.0).claims == {KEY}


# ------------------------------------------------------------------------------------------- what collectors are told


def test_held_is_the_oldest_lease_and_every_claim(objects: MemoryObjects, clock: Clock) -> None:
    old = leases.take(objects, "old")
    clock.now += 10
    young = leases.take(objects, "young")
    old.claim(["packs/a"])
    young.claim(["packs/b", "packs/c"])
    clock.now += 10
    held = leases.held(objects, clock.now)
    assert (held.since, held.claims, held.over) == (1000.0, {"packs/a", "packs/b", "packs/c"}, ())
    old.end()
    assert leases.held(objects, clock.now).since == 1010.0
    young.end()
    assert leases.held(objects, clock.now).since == clock.now


@pytest.mark.parametrize("told", [b"", b"{", b"[]", b'{"since": null}', b'{"purpose": "x"}'])
def test_lease_that_is_being_taken_is_as_young_as_its_file(objects: MemoryObjects, clock: Clock, told: bytes) -> None:
    objects.create("leases/a", told)
    assert leases.held(objects, clock.now + 5).since == clock.now


def test_lease_that_is_not_renewed_is_over(objects: MemoryObjects, clock: Clock) -> None:
    objects.create("leases/a", b"")
    clock.now += leases.LASTS
    assert leases.held(objects, clock.now).over == ()
    clock.now += 1
    assert leases.held(objects, clock.now) == leases.Held(since=clock.now, claims=frozenset(), over=("leases/a",))


def test_clock_is_that_of_the_store(objects: MemoryObjects, clock: Clock) -> None:
    assert leases.clock(objects) == clock.now
    assert list(objects.list("")) == []


# ---------------------------------------------------------------------------------------------------- what is written


def test_old_files_are_written_again_under_a_lease(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    store.put(DATA)
    clock.now += 10
    store.put(DATA)
    assert found(objects, KEY).modified == 1000.0, "without a lease it is taken as it is"
    with store.writing("a test"):
        began = clock.now
        clock.now += 10
        store.put(DATA)
        assert found(objects, KEY).modified == began + 10
        clock.now += 10
        store.put(DATA)
        assert found(objects, KEY).modified == began + 10, "what is younger than the lease is safe"
    assert clock.waited == 0


def test_file_as_old_as_the_lease_is_safe(store: Store, objects: MemoryObjects) -> None:
    store.put(DATA)
    with store.writing("a test"):
        before = dict(objects._held)
        store.put(DATA)
        assert objects._held == before


def test_file_of_another_length_is_written_again(store: Store, objects: MemoryObjects) -> None:
    objects.create(KEY, DATA[:2])
    store.put(DATA)
    assert objects.read(KEY) == DATA


def test_claimed_files_are_taken_as_they_are(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    store.put(DATA)
    clock.now += 10
    with store.writing("a test"):
        store.claim([KEY])
        store.put(DATA)
        assert leases.held(objects, clock.now).claims == {KEY}
    assert found(objects, KEY).modified == 1000.0
    store.claim([KEY])  # nothing without a lease


# ---------------------------------------------------------------------------------------------- sweeps that are at work


@pytest.mark.parametrize("old", [False, True])
def test_put_waits_for_a_sweep_and_puts_again(store: Store, objects: MemoryObjects, clock: Clock, old: bool) -> None:
    if old:
        store.put(DATA)
        clock.now += 10
    sweep, _ = leases.begin_sweep(objects)
    seen: list[bytes | None] = []

    def collect() -> None:
        seen.append(objects.read(KEY))
        objects.delete(KEY)
        objects.delete(sweep)

    clock.then = collect
    with store.writing("a test"):
        store.put(DATA)
    assert seen == [DATA]
    assert objects.read(KEY) == DATA


def test_young_file_is_not_written_again_for_a_sweep(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    with store.writing("a test"):
        store.put(DATA)
        clock.now += 10
        sweep, _ = leases.begin_sweep(objects)
        clock.then = lambda: objects.delete(sweep)
        store.put(DATA)
    assert found(objects, KEY).modified == 1000.0


def test_put_without_a_lease_waits_for_nobody(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    leases.begin_sweep(objects)
    store.put(DATA)
    assert clock.waited == 0


def test_settle_waits_for_the_sweeps_that_are_there(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    sweeps = [leases.begin_sweep(objects)[0] for _ in range(3)]

    def turn() -> None:
        if sweeps:
            leases.begin_sweep(objects)  # later ones see what was written
            objects.delete(sweeps.pop())

    clock.then = turn
    store.settle()
    assert not sweeps
    assert clock.waited == 1.5


def test_claim_waits_for_a_sweep_that_has_not_seen_it(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    sweep, _ = leases.begin_sweep(objects)
    clock.then = lambda: objects.delete(sweep)
    with store.writing("a test"):
        store.claim([KEY])
    assert clock.waited == 0.5


def test_dead_collector_holds_nobody_up_for_ever(store: Store, objects: MemoryObjects, clock: Clock) -> None:
    leases.begin_sweep(objects)
    began = clock.now
    with store.writing("a test"):
        clock.now += 100
        store.put(DATA)
        assert clock.now - began == pytest.approx(leases.SWEEP_LASTS + 100, abs=1)
        assert objects.read(KEY) == DATA
        waited = clock.waited
        for number in range(9):
            store.put(b"%d" % number)
        assert clock.waited == waited, "a sweep that old is nobody's"
    store.settle()
    assert clock.waited == waited
