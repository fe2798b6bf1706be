"""Media and stores: the suites on each, suites that catch mutants, and what kills and full disks leave of a folder."""

import errno
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storage.errors import Conflict, FailureError, IntegrityError, MissingObject, UsageError
from storage.local import UNFINISHED, LocalObjects
from storage.objects import Data, Found, MemoryObjects, ObjectStore
from storage.remote import FsspecObjects, open_remote
from storage.store import FORMAT, MARKER, Store, memory_store, open_store
from storage.testing import OBJECT_CHECKS, STORE_CHECKS, FaultyObjects


def fsspec_memory() -> FsspecObjects:
    return open_remote(f"memory://{secrets.token_hex(8)}/store")


@pytest.fixture(params=["memory", "local", "fsspec", "s3", "faulty"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Every medium, empty."""
    if request.param == "s3":
        return open_remote(request.getfixturevalue("bucket") + "/some/where")
    made: dict[str, Callable[[], ObjectStore]] = {
        "memory": MemoryObjects,
        "local": lambda: LocalObjects(tmp_path / "store"),
        "fsspec": fsspec_memory,
        "faulty": lambda: FaultyObjects(MemoryObjects()),
    }
    return made[request.param]()


@pytest.mark.parametrize("check", OBJECT_CHECKS, ids=lambda check: check.__name__)
def test_media_conform(check: Callable[[ObjectStore], None], objects: ObjectStore) -> None:
    check(objects)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_stores_conform(check: Callable[[Store], None], objects: ObjectStore) -> None:
    check(Store(objects))


# ------------------------------------------------------------------------------------------------ suites catch mutants


class Mutant(MemoryObjects):
    """A medium with one fault, made by overriding one method."""


class Overwrites(Mutant):
    def create(self, key: str, data: Data) -> bool:
        self.replace(key, data)
        return True


class OverwritesAndSaysSo(Mutant):
    def create(self, key: str, data: Data) -> bool:
        new = self.find(key) is None
        self.replace(key, data)
        return new


class LooksThenWrites(Mutant):
    """All writers of a race look before the first one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(4)

    def create(self, key: str, data: Data) -> bool:
        new = self.find(key) is None
        if key.startswith("race/"):
            self.barrier.wait(30)
        if new:
            self.replace(key, data)
        return new


class LastWriterWins(Mutant):
    """One is told True, but the bytes of another stay."""

    def create(self, key: str, data: Data) -> bool:
        if super().create(key, data):
            return True
        if key.startswith("race/"):
            self.replace(key, data)
        return False


class LosesTheEnd(Mutant):
    def create(self, key: str, data: Data) -> bool:
        return super().create(key, bytes(data)[:1_000_000])


class KeepsTheBuffer(Mutant):
    def create(self, key: str, data: Data) -> bool:
        with self._lock:
            return self._held.setdefault(key, (data, 1.0))[0] is data


class KeepsTheOldValue(Mutant):
    def replace(self, key: str, data: Data) -> None:
        self.create(key, data)


class OverwritesInPlace(Mutant):
    def replace(self, key: str, data: Data) -> None:
        rest = (self.read(key) or b"")[len(data) :]
        super().replace(key, bytes(data) + rest)


class TimeGoesBack(Mutant):
    def __init__(self) -> None:
        super().__init__(clock=iter(range(10**6, 0, -1)).__next__)


class HasNoTime(Mutant):
    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0)


class IgnoresRanges(Mutant):
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return super().read(key)


class IncludesTheStop(Mutant):
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return super().read(key, start, None if stop is None else stop + 1)


class EmptyMeansAll(Mutant):
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return super().read(key, start, stop or None)


class MissingIsEmpty(Mutant):
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return super().read(key, start, stop) or b""


class EmptyIsMissing(Mutant):
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return super().read(key, start, stop) or None


class FindsFolders(Mutant):
    def find(self, key: str) -> Found | None:
        return super().find(key) or next(self.list(key), None)


class ListsAnotherSize(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        return (Found(key=found.key, size=found.size + 1, modified=found.modified) for found in super().list(prefix))


class ListsAnotherTime(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        return (Found(key=found.key, size=found.size, modified=found.modified + 1) for found in super().list(prefix))


class MissesTheLast(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        return iter(list(super().list(prefix))[:-1])


class ListsTwice(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        return (found for found in super().list(prefix) for _ in range(2))


class ListsBackwards(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        return reversed(list(super().list(prefix)))


class ListsByParts(Mutant):
    """As a walk over folders does: a folder's keys where its name stands, without the slash."""

    def list(self, prefix: str) -> Iterator[Found]:
        return iter(sorted(super().list(prefix), key=lambda found: found.key.split("/")))


class ListsFoldersOnly(Mutant):
    def list(self, prefix: str) -> Iterator[Found]:
        folder = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        return super().list(folder)


class TakesPercentForQuoting(Mutant):
    def create(self, key: str, data: Data) -> bool:
        return super().create(key.replace("%2F", "/"), data)


class DeletesNothing(Mutant):
    def delete(self, key: str) -> None:
        return


class DeletesOnce(Mutant):
    def delete(self, key: str) -> None:
        del self._held[key]


class DeletesThePrefix(Mutant):
    def delete(self, key: str) -> None:
        for found in list(self.list(key)):
            super().delete(found.key)


class RemembersTheDeleted(Mutant):
    def create(self, key: str, data: Data) -> bool:
        self.gone = getattr(self, "gone", set())
        return key not in self.gone and super().create(key, data)

    def delete(self, key: str) -> None:
        self.gone = getattr(self, "gone", set()) | {key}
        super().delete(key)


class SaysNotWhere(Mutant):
    def __str__(self) -> str:
        return ""


class HasNoDelete(Mutant):
    delete = None  # type: ignore[assignment]


@pytest.mark.parametrize("mutant", Mutant.__subclasses__())
def test_suite_catches(mutant: Callable[[], ObjectStore]) -> None:
    caught = []
    for check in OBJECT_CHECKS:
        try:
            check(mutant())
        except (AssertionError, KeyError, TypeError):
            caught.append(check.__name__)
    assert caught


# --------------------------------------------------------------------------------------------------- against the toy


class StoresAgainstToy(RuleBasedStateMachine):
    """Every operation on a folder, reopened at will, and on fsspec's memory, does what it does on the toy."""

    contents = st.binary(max_size=3)
    names = st.sampled_from(["a", "a/b", "a/c", "A", "a-b"])
    keys = st.sampled_from(["k/a", "k/a.b", "k/a%2Fb", "k/b/c", "kk"])
    values = st.none() | st.sampled_from([b"0", b"1"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.stores = [memory_store(), open_store(self.folder.name, create=True), Store(fsspec_memory())]

    def all(self, act: Callable[[Store], Any]) -> None:
        outcomes = []
        for store in self.stores:
            try:
                outcomes.append(act(store))
            except (Conflict, MissingObject) as error:
                outcomes.append(type(error))
        assert outcomes == outcomes[:1] * len(outcomes)

    @rule(data=contents)
    def put(self, data: bytes) -> None:
        self.all(lambda store: store.put(data))

    @rule(data=contents)
    def get(self, data: bytes) -> None:
        digest = sha256(data).digest()
        self.all(lambda store: (store.has(digest), store.get(digest)))

    @rule(name=names, expected=values, new=values)
    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> None:
        self.all(lambda store: store.swap(name, expected, new))

    @rule(name=names)
    def read(self, name: str) -> None:
        self.all(lambda store: (store.read(name), store.names(name)))

    @rule(key=keys, data=contents)
    def create(self, key: str, data: bytes) -> None:
        self.all(lambda store: store.objects.create(key, data))

    @rule(key=keys, data=contents)
    def replace(self, key: str, data: bytes) -> None:
        self.all(lambda store: store.objects.replace(key, data))

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.all(lambda store: store.objects.delete(key))

    @rule(key=keys, start=st.integers(0, 4), size=st.integers(0, 4))
    def read_part(self, key: str, start: int, size: int) -> None:
        self.all(lambda store: store.objects.read(key, start, start + size))

    @rule(prefix=st.sampled_from(["", "k", "k/", "k/a", "k/a%", "k/b", "kk", "objects/"]))
    def list_keys(self, prefix: str) -> None:
        self.all(lambda store: [found.size for found in store.objects.list(prefix) if found.key.startswith("k")])

    @rule()
    def reopen(self) -> None:
        self.stores[1] = open_store(self.folder.name, create=False)

    @invariant()
    def same_contents(self) -> None:
        self.all(lambda store: (list(store.digests()), store.names("")))

    def teardown(self) -> None:
        self.folder.cleanup()


StoresAgainstToy.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestStoresAgainstToy = StoresAgainstToy.TestCase


# ------------------------------------------------------------------------------------------------ faults in any medium


@pytest.mark.parametrize("fails", range(12))
def test_fault_at_any_call_loses_nothing(fails: int) -> None:
    faulty = FaultyObjects(MemoryObjects())
    store = Store(faulty)
    store.swap("head", None, store.put(b"old"))
    faulty.calls.clear()

    def before(method: str, key: str) -> None:
        if len(faulty.calls) > fails:
            raise FailureError(f"{method} {key}: no")

    def write() -> None:
        store.swap("head", sha256(b"old").digest(), store.put(b"new"))

    faulty.before = before
    try:
        write()
        done = True
    except FailureError:
        done = False
    sound = Store(faulty.objects)
    assert done == (sound.read("head") == sha256(b"new").digest())
    assert sound.get(sound.read("head") or b"") == (b"new" if done else b"old")
    faulty.before = lambda method, key: None
    if not done:
        write()
    assert sound.get(sound.read("head") or b"") == b"new"


def test_torn_write_is_written_again() -> None:
    faulty = FaultyObjects(MemoryObjects(), torn="objects/")
    with pytest.raises(FailureError, match="short write"):
        Store(faulty).put(b"data")
    digest = sha256(b"data").digest()
    with pytest.raises(IntegrityError, match="is damaged"):
        Store(faulty).get(digest)
    Store(faulty).put(b"data")
    assert Store(faulty).get(digest) == b"data"


def test_damaged_reads_are_integrity_errors() -> None:
    faulty = FaultyObjects(MemoryObjects(), changed=lambda key, data: data[:-1] + b"!")
    store = Store(faulty)
    digest = store.put(b"data")
    with pytest.raises(IntegrityError, match=f"object {digest.hex()} in faulty memory:// is damaged"):
        store.get(digest)
    store.swap("head", None, digest)
    with pytest.raises(FailureError, match="reference head"):
        store.read("head")


# ------------------------------------------------------------------------------------------------------- in a folder


def local_store(path: Path) -> Store:
    return open_store(str(path), create=True)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_flipped_byte_is_an_integrity_error_that_names_the_object(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    digest = store.put(b"weights")
    (path,) = files(tmp_path / "objects")
    assert path == tmp_path / "objects" / digest.hex()[:2] / digest.hex()[2:]
    for data in (b"Weights", b"weight", b"weights\0", b""):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=f"object {digest.hex()} in {tmp_path} is damaged") as caught:
            store.get(digest)
        assert caught.value.digest == digest.hex()


def test_object_that_lost_its_end_is_written_again(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    digest = store.put(b"weights")
    (path,) = files(tmp_path / "objects")
    path.write_bytes(b"wei")
    assert store.put(b"weights") == digest
    assert store.get(digest) == b"weights"


def fail_with(code: int, after: int = 0) -> Callable[..., int]:
    """An os.write that writes `after` bytes and then fails."""
    real = os.write
    left = after

    def write(file: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(code, os.strerror(code))
        done = real(file, data[:left])
        left -= done
        return done

    return write


@pytest.mark.parametrize("after", [0, 5])
def test_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    store = local_store(tmp_path)
    store.swap("head", None, b"old")
    kept = store.put(b"kept")
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail_with(errno.ENOSPC, after))
        with pytest.raises(FailureError, match=rf"writing {tmp_path}.*: No space left on device; free space") as caught:
            store.put(b"does not fit")
        assert caught.value.exit_code == 70
        with pytest.raises(FailureError, match=r"writing .*head/000000000002: No space left"):
            store.swap("head", b"old", b"a new value")
    assert files(tmp_path) == before
    assert store.read("head") == b"old"
    assert list(store.digests()) == [kept]
    assert store.get(store.put(b"does not fit")) == b"does not fit"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:3]))
    store = local_store(tmp_path)
    assert store.get(store.put(b"seven and eight")) == b"seven and eight"


@pytest.mark.parametrize("call", ["link", "replace"])
def test_failed_renames_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    objects = LocalObjects(tmp_path)
    objects.create("a", b"old")
    before = files(tmp_path)

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(FailureError, match="Input/output error; check that disk"):
        objects.create("b", b"new") if call == "link" else objects.replace("a", b"new")
    assert files(tmp_path) == before
    assert objects.read("a") == b"old"


KILLED = """
import os, sys
from storage.store import open_store
store = open_store(sys.argv[1], create=False)
real, calls = getattr(os, sys.argv[2]), 0
def dying(*args):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        if sys.argv[2] == "write":
            real(args[0], args[1][:2])
        os._exit(9)
    return real(*args)
setattr(os, sys.argv[2], dying)
store.swap("head", b"old", store.put(b"new object"))
store.objects.replace("replaced", b"new")
"""


@pytest.mark.parametrize("call", ["write", "link", "replace", "fsync", "unlink"])
def test_killed_writer_leaves_a_sound_store(tmp_path: Path, call: str) -> None:
    deaths = 0
    for after in range(99):
        path = tmp_path / str(after)
        store = local_store(path)
        store.swap("head", None, b"old")
        store.objects.replace("replaced", b"old")
        command = [sys.executable, "-c", KILLED, str(path), call, str(after)]
        code = subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode
        store = open_store(str(path), create=False)
        found = store.read("head")
        assert found is not None
        assert found == b"old" or store.get(found) == b"new object"
        assert store.objects.read("replaced") in (b"old", b"new")
        for digest in store.digests():
            store.get(digest)
        assert store.names("") == ["head"]
        assert all(UNFINISHED in str(left) for left in files(path) if left.name.startswith(".tmp-"))
        store.swap("head", found, store.put(b"new object"))  # whatever the dead process left is in nobody's way
        if not code:
            break
        assert code == 9
        deaths += 1
    assert deaths >= {"link": 2, "replace": 1}.get(call, 3)


def test_killed_creation_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / ".tmp-1-0123").write_bytes(b"truew")
    assert local_store(tmp_path).names("") == []


def test_strangers_files_are_not_objects(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    digest = store.put(b"data")
    (tmp_path / "objects" / "README").write_text("not an object")
    (tmp_path / "objects" / digest.hex()[:2] / ".tmp-1-0123").write_bytes(b"half")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / ".tmp-1-0123").write_bytes(b"half")
    (tmp_path / "refs" / "head").mkdir()
    (tmp_path / "refs" / "head" / "README").write_text("not an entry")
    assert list(store.digests()) == [digest]
    assert store.names("") == []
    store.swap("head", None, digest)
    assert store.names("") == ["head"]


def test_store_that_another_process_makes_meanwhile_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = MemoryObjects()

    def before(method: str, key: str) -> None:
        if (method, key) == ("list", ""):
            objects.create(MARKER, FORMAT)
            objects.create("leases/1", b"")

    monkeypatch.setattr("storage.remote.open_remote", lambda url: FaultyObjects(objects, before=before))
    assert open_store("s3://bucket", create=True).names("") == []


def test_digest_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="expected 32 bytes, got 3"):
        memory_store().get(b"abc")


def test_folder_that_is_no_store_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for create in (True, False):
        with pytest.raises(UsageError, match=f"{tmp_path} is not a store: expected a file '{MARKER}'") as caught:
            open_store(str(tmp_path), create=create)
        assert caught.value.exit_code == 64
    assert files(tmp_path) == [tmp_path / "thesis.tex"]


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UsageError, match="expected a folder, got a file"):
        local_store(path)
    with pytest.raises(FailureError, match=r"making the folder .*: File exists; a file is in the place of a folder"):
        local_store(path / "below")


@pytest.mark.parametrize("marker", [b"", b"trueweight-store 1\n", b"trueweight-store 2", b"\xff" * 99])
def test_store_of_another_format_is_refused(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / MARKER).write_bytes(marker)
    with pytest.raises(UsageError, match="expected format b'trueweight-store 2"):
        local_store(tmp_path)
    assert FORMAT == b"trueweight-store 2\n"


def test_open_store(tmp_path: Path) -> None:
    path = tmp_path / "a folder"
    with pytest.raises(UsageError, match=f"no store at {path}"):
        open_store(str(path), create=False)
    assert not path.exists()
    digest = open_store(str(path), create=True).put(b"data")
    assert open_store(path.as_uri(), create=False).get(digest) == b"data"
    assert isinstance(open_store("memory://", create=False).objects, MemoryObjects)
    with pytest.raises(UsageError, match="expected a folder or a URL"):
        open_store("", create=True)


def test_unreadable_store_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = local_store(tmp_path)
    digest = store.put(b"data")

    def refuse(self: Path, *_args: object, **_options: object) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("open", "iterdir", "stat", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    for act in (
        lambda: store.get(digest),
        lambda: store.has(digest),
        lambda: store.read("head"),
        lambda: store.objects.delete("head"),
    ):
        with pytest.raises(FailureError, match=f"{tmp_path}.*: Permission denied; give this user access"):
            act()


def test_a_reference_whose_listed_entry_is_never_there_is_told() -> None:
    class Forgets(MemoryObjects):
        def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
            return None if key.startswith("refs/") else super().read(key, start, stop)

    store = Store(Forgets())
    store.objects.create("refs/runs%2Fa/000000000001", b"entry")
    with pytest.raises(FailureError, match=r"reference runs/a: .* lists entry 1 and does not have it, 5 times; check"):
        store.read("runs/a")
