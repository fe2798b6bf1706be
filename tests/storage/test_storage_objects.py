"""Stores: the conformance suite on each, a random comparison with the toy, and what kills and full disks leave."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storage.errors import Conflict, FailureError, IntegrityError, MissingObject, UsageError
from storage.objects import MARKER, LocalStore, MemoryStore, Store, open_store
from storage.testing import STORE_CHECKS

STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "local": lambda path: LocalStore(path / "store"),
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Store], None], make: Callable[[Path], Store], tmp_path: Path) -> None:
    check(make(tmp_path))


class LocalStoreAgainstToy(RuleBasedStateMachine):
    """Every operation on a LocalStore, reopened at will, does what it does on the MemoryStore."""

    contents = st.binary(max_size=3)
    names = st.sampled_from(["a", "a/b", "a/c", "A", "a-b"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.store, self.toy = LocalStore(self.folder.name), MemoryStore()

    def both(self, act: Callable[[Store], Any]) -> None:
        outcomes = []
        for store in (self.store, self.toy):
            try:
                outcomes.append(act(store))
            except (Conflict, MissingObject) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]

    @rule(data=contents)
    def put(self, data: bytes) -> None:
        self.both(lambda store: store.put(data))

    @rule(data=contents)
    def get(self, data: bytes) -> None:
        digest = sha256(data).digest()
        self.both(lambda store: (store.has(digest), store.get(digest)))

    @rule(name=names, expected=st.none() | st.sampled_from([b"0", b"1"]), new=st.sampled_from([b"0", b"1"]))
    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        self.both(lambda store: store.swap(name, expected, new))

    @rule(name=names)
    def read(self, name: str) -> None:
        self.both(lambda store: (store.read(name), store.names(name)))

    @rule()
    def reopen(self) -> None:
        self.store = LocalStore(self.folder.name, create=False)

    @invariant()
    def same_contents(self) -> None:
        self.both(lambda store: (list(store.digests()), store.names("")))

    def teardown(self) -> None:
        self.folder.cleanup()


LocalStoreAgainstToy.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestLocalStoreAgainstToy = LocalStoreAgainstToy.TestCase


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_flipped_byte_is_an_integrity_error_that_names_the_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    digest = store.put(b"weights")
    (path,) = files(tmp_path / "objects")
    assert path == tmp_path / "objects" / digest.hex()[:2] / digest.hex()[2:]
    for data in (b"Weights", b"weight", b"weights\0", b""):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=f"object {digest.hex()} in {path} is damaged") as caught:
            store.get(digest)
        assert caught.value.digest == digest.hex()


def test_object_that_lost_its_end_is_written_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
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
    store = LocalStore(tmp_path)
    store.swap("head", None, b"old")
    kept = store.put(b"kept")
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail_with(errno.ENOSPC, after))
        with pytest.raises(FailureError, match=rf"writing {tmp_path}.*: No space left on device; free space") as caught:
            store.put(b"does not fit")
        assert caught.value.exit_code == 70
        with pytest.raises(FailureError, match=r"writing .*head: No space left"):
            store.swap("head", b"old", b"a new value")
    assert files(tmp_path) == before
    assert store.read("head") == b"old"
    assert list(store.digests()) == [kept]
    assert store.get(store.put(b"does not fit")) == b"does not fit"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:3]))
    store = LocalStore(tmp_path)
    assert store.get(store.put(b"seven and eight")) == b"seven and eight"


def test_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    before = files(tmp_path)

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FailureError, match="Input/output error; check that disk"):
        store.put(b"data")
    assert files(tmp_path) == before


KILLED = """
import os, sys
from storage.objects import LocalStore
store = LocalStore(sys.argv[1])
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
"""


@pytest.mark.parametrize("call", ["write", "replace", "fsync"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_writer_leaves_a_sound_store(tmp_path: Path, call: str, after: int) -> None:
    store = LocalStore(tmp_path)
    store.swap("head", None, b"old")
    command = [sys.executable, "-c", KILLED, str(tmp_path), call, str(after)]
    code = subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode
    assert code == (9 if after < {"write": 2, "replace": 2, "fsync": 5}[call] else 0)
    store = LocalStore(tmp_path, create=False)
    found = store.read("head")
    assert found is not None
    assert found == b"old" or store.get(found) == b"new object"
    for digest in store.digests():
        store.get(digest)
    assert store.names("") == ["head"]
    store.swap("head", found, store.put(b"new object"))  # the dead process's lock is gone with it


def test_killed_creation_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-0123").write_bytes(b"truew")
    assert LocalStore(tmp_path).names("") == []


def test_strangers_files_are_not_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    digest = store.put(b"data")
    (tmp_path / "objects" / "README").write_text("not an object")
    (tmp_path / "objects" / digest.hex()[:2] / ".tmp-1-0123").write_bytes(b"half")
    (tmp_path / "refs" / ".tmp-1-0123").write_bytes(b"half")
    assert list(store.digests()) == [digest]
    assert store.names("") == []


def test_digest_of_another_length_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 32 bytes, got 3"):
        LocalStore(tmp_path).get(b"abc")


def test_folder_that_is_no_store_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for create in (True, False):
        with pytest.raises(UsageError, match=f"{tmp_path} is not a store: expected a file '{MARKER}'") as caught:
            LocalStore(tmp_path, create=create)
        assert caught.value.exit_code == 64
    assert files(tmp_path) == [tmp_path / "thesis.tex"]


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UsageError, match="expected a folder, got a file"):
        LocalStore(path)
    with pytest.raises(FailureError, match=r"making the folder .*: File exists; a file is in the place of a folder"):
        LocalStore(path / "below")


@pytest.mark.parametrize("marker", [b"", b"trueweight-store 2\n", b"trueweight-store 1", b"\xff" * 99])
def test_store_of_another_format_is_refused(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / MARKER).write_bytes(marker)
    with pytest.raises(UsageError, match="expected format b'trueweight-store 1"):
        LocalStore(tmp_path)


def test_open_store(tmp_path: Path) -> None:
    path = tmp_path / "a folder"
    with pytest.raises(UsageError, match=f"no store at {path}"):
        open_store(str(path), create=False)
    assert not path.exists()
    digest = open_store(str(path), create=True).put(b"data")
    assert open_store(path.as_uri(), create=False).get(digest) == b"data"
    assert isinstance(open_store("memory://", create=False), MemoryStore)
    for url in ("s3://bucket/runs", "memory://other", ""):
        with pytest.raises(UsageError, match="expected a path, file:// or memory://"):
            open_store(url, create=True)


def test_unreadable_store_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    digest = store.put(b"data")

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for act in (lambda: store.get(digest), lambda: store.read("head"), lambda: LocalStore(tmp_path)):
        with pytest.raises(FailureError, match=f"{tmp_path}.*: Permission denied; give this user access"):
            act()
