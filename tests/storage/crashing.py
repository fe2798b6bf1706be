"""Run by test_storage_crash.py in a process of its own: commits states to a store, killed at the Nth file-system call.

python crashing.py FOLDER        prints one line of JSON for each kill: the call, and what was found afterwards
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.checking import verify
from storage.checkpoints import load_state
from storage.codec import decode, encode
from storage.collection import collect
from storage.records import Pin, RecordList
from storage.saving import save_state
from storage.store import Store, open_store

CALLS = (
    "open",
    "write",
    "fsync",
    "link",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "stat",
    "listdir",
    "scandir",
    "close",
)


def state(version: int) -> dict[str, np.ndarray]:
    """Two tensors, of which one does not change."""
    frozen = np.arange(3000, dtype=np.int64)
    return {"frozen": frozen, "moving": np.full((70, 70), version, np.float32)}


def current(store: Store) -> bytes:
    """The root that the reference names."""
    return decode(Pin, store.read("runs/a") or b"").state


def commit(store: Store, version: int, base: bytes | None) -> bytes:
    """What a run does after a segment: checkpoint, records, reference."""
    with store.writing("commit"):
        root = save_state(store, state(version), base=base)
        store.put(encode(RecordList(items=(bytes([version]),))))
        store.swap("runs/a", store.read("runs/a"), encode(Pin(state=root)))
    return root


def killed_at(call: int) -> None:
    """From now on count file-system calls, and die at number `call`: before it, or in the middle of a write."""
    count = 0

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                if name == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)

        return counting

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def attempt(folder: Path, call: int) -> int:
    """The signal that ended a commit which was to be killed at the call; 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        store = open_store(str(folder), create=True)
        base = current(store)
        killed_at(call)
        commit(store, 2, base)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def inspect(folder: Path, first: bytes, second: bytes) -> dict[str, Any]:
    """What is left: findings, which state the reference names, whether it loads, whether the commit can be repeated."""
    store = open_store(str(folder), create=False)
    value = current(store)
    version = 1 if value == first else 2
    same = all((load_state(store, value)[name] == array).all() for name, array in state(version).items())
    found: dict[str, Any] = {"findings": [finding.reason for finding in verify(store).findings]}
    found |= {"version": version if value in (first, second) else None, "loads": bool(same)}
    repeated = commit(store, 2, value)
    found["repeated"] = repeated == second and current(store) == second
    found["left"] = len(list((folder / "unfinished").iterdir())) if (folder / "unfinished").exists() else 0
    for lease in (folder / "leases").iterdir():
        os.utime(lease, (1, 1))  # run out, as they would an hour later
    collect(store, age=0, grace=0)
    found["collected"] = not verify(store).findings and not any((folder / "unfinished").iterdir())
    return found


def main() -> None:
    parent = Path(sys.argv[1])
    first = commit(open_store(str(parent / "first"), create=True), 1, None)
    second = commit(open_store(str(parent / "second"), create=True), 2, None)
    call = 0
    while True:
        call += 1
        folder = parent / f"killed-{call}"
        commit(open_store(str(folder), create=True), 1, None)
        ended = attempt(folder, call)
        print(json.dumps({"call": call, "ended": ended, **inspect(folder, first, second)}), flush=True)  # noqa: T201
        if ended == 0:
            return


if __name__ == "__main__":
    main()
