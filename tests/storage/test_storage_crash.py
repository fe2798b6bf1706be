"""A save that is killed anywhere, or whose medium fails anywhere, loses nothing that was committed."""

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from storage.checking import verify
from storage.checkpoints import load_state
from storage.codec import decode, encode
from storage.errors import FailureError, IntegrityError
from storage.local import LocalObjects
from storage.objects import MemoryObjects
from storage.records import Pin
from storage.saving import save_state
from storage.store import Store, open_store
from storage.testing import FaultyObjects

HERE = Path(__file__).parent


def test_a_writer_killed_at_every_file_system_call_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "crashing.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 80
    assert [kill["ended"] for kill in kills] == [9] * (len(kills) - 1) + [0]
    for kill in kills:
        assert kill["findings"] == [], kill
        assert kill["loads"], kill
        assert kill["repeated"], kill
        assert kill["collected"], kill
    versions = [kill["version"] for kill in kills]
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    assert any(kill["left"] for kill in kills)  # it was killed inside writes, too


def state(version: int) -> dict[str, np.ndarray]:
    return {"frozen": np.arange(3000, dtype=np.int64), "moving": np.full((70, 70), version, np.float32)}


def current(store: Store) -> bytes:
    return decode(Pin, store.read("runs/a") or b"").state


def commit(store: Store, version: int, base: bytes | None = None) -> bytes:
    with store.writing("commit"):
        root = save_state(store, state(version), base=base)
        store.swap("runs/a", store.read("runs/a"), encode(Pin(state=root)))
    return root


@pytest.mark.parametrize("method", ["create", "replace", "find", "list", "read", "delete"])
def test_a_medium_that_fails_at_any_call_loses_nothing(method: str) -> None:
    call = 0
    while True:
        call += 1
        seen = 0

        def fail(called: str, key: str, call: int = call) -> None:
            nonlocal seen
            if called == method:
                seen += 1
                if seen == call:
                    raise FailureError(f"{called} {key}: Input/output error; check that disk")

        memory = MemoryObjects()
        first = commit(Store(memory), 1)
        with suppress(FailureError):
            commit(Store(FaultyObjects(memory, before=fail)), 2, first)
        store = Store(memory)
        assert verify(store).findings == []
        value = current(store)
        assert (load_state(store, value)["moving"] == (1 if value == first else 2)).all()
        second = commit(store, 2, value)
        assert (load_state(store, second)["moving"] == 2).all()
        if seen < call:
            break
    assert call > 1


def test_a_torn_write_is_found_and_mended_by_the_next_save() -> None:
    memory = MemoryObjects()
    with pytest.raises(FailureError, match="short write"):
        commit(Store(FaultyObjects(memory, torn="packs/")), 1)
    assert [finding.kind for finding in verify(Store(memory)).findings] == ["damaged"]
    root = commit(Store(memory), 1)
    assert verify(Store(memory)).findings == []
    assert (load_state(Store(memory), root)["moving"] == 1).all()


def test_a_read_of_other_bytes_is_never_taken(tmp_path: Path) -> None:
    memory = MemoryObjects()
    root = commit(Store(memory), 1)

    def flip(key: str, data: bytes) -> bytes:
        return data[:20] + bytes([data[20] ^ 1]) + data[21:] if key.startswith(wanted) else data

    for wanted in ("packs/", "checkpoints/", "refs/"):
        store = Store(FaultyObjects(memory, changed=flip))
        with pytest.raises(FailureError, match=r"damaged|refused"):
            load_state(store, root) if wanted != "refs/" else store.read("runs/a")
    with pytest.raises(IntegrityError):
        load_state(Store(FaultyObjects(memory, changed=lambda _, data: data[:-1])), root)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ETIMEDOUT, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "link", "open"])
def test_what_the_system_refuses_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    store = open_store(str(tmp_path), create=True)
    first = commit(store, 1)
    original = getattr(os, call)

    def refuse(*args: object, **named: object) -> object:
        if call != "open" or "unfinished" in str(args[0]):
            raise OSError(number, os.strerror(number))
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(FailureError, match=f"writing {tmp_path}/.*: {os.strerror(number)}; "):
            commit(store, 2)
    assert current(store) == first
    assert verify(store).findings == []
    assert list((tmp_path / "unfinished").iterdir()) == []
    assert commit(store, 2) == current(store)


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:7])))
    data = bytes(range(256)) * 3
    LocalObjects(tmp_path).create("a/b", data)
    assert (tmp_path / "a" / "b").read_bytes() == data


@pytest.mark.parametrize("start", [0, 1, 4096])
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (3 << 20) + 4095])
def test_large_files_are_written_past_the_page_cache_whole(tmp_path: Path, start: int, size: int) -> None:
    room = memoryview(mmap(-1, start + size))
    room[:] = np.random.default_rng(size).bytes(start + size)
    LocalObjects(tmp_path).create("packs/a", room[start:])
    assert (tmp_path / "packs" / "a").read_bytes() == bytes(room[start:])


@pytest.mark.parametrize("refused", ["open", "write", "cut"])
def test_where_the_system_does_not_write_past_the_cache_it_writes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    originals, direct = (os.open, os.write), set()

    def opening(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no")
        file = originals[0](path, flags, *mode)  # type: ignore[arg-type]
        if flags & os.O_DIRECT:
            direct.add(file)
        return file

    def writing(file: int, data: memoryview) -> int:
        if file in direct and refused == "write":
            raise OSError(errno.EINVAL, "no")
        return originals[1](file, data[: 3 * 4096] if file in direct else data)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "write", writing)
    data = memoryview(mmap(-1, (1 << 20) + 77))
    data[:] = bytes(range(251)) * 4177 + bytes(len(data) - 251 * 4177)
    LocalObjects(tmp_path).create("packs/a", data)
    assert (tmp_path / "packs" / "a").read_bytes() == bytes(data)
    assert bool(direct) == (refused != "open")
