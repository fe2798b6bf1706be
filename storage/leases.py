"""What keeps a garbage collector away from a writer that has not swung its reference yet.

Two kinds of files, both dated by the clock of the store alone:

- `leases/ID` says: I have been writing since then. While it is renewed, nothing modified since then is deleted.
- `gc/sweeps/ID` says: a collector has listed the store and is deleting. Whoever rewrites an old file, or makes a
  reference to something old, looks afterwards: if a sweep is at work, it waits and looks once more. The collector sets
  it before it lists; so either the collector sees the new file, or the writer sees the sweep.

A lease may claim keys: old files that its writer relies on without writing them again, after the same look.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from storage.errors import FailureError
from storage.objects import ObjectStore

FOLDER = "leases/"
SWEEPS = "gc/sweeps/"
CLOCKS = "gc/clocks/"
LASTS = 3600.0
"""Seconds after its last renewal for which a lease holds."""
RENEWED = 300.0
"""Seconds between renewals."""
SWEEP_LASTS = 600.0
"""Seconds after which a sweep no longer holds anybody up: its collector stops in half that time, or has died."""
_LOOK = 0.5


class Lease:
    """A lease that is held and renewed by a thread; `since` is when it began, by the clock of the store."""

    def __init__(self, objects: ObjectStore, key: str, since: float, purpose: str) -> None:
        self.since = since
        self.claims: frozenset[str] = frozenset()
        self._objects, self._key = objects, key
        self._writes = threading.Lock()
        self._told: dict[str, Any] = {"since": since, "purpose": purpose, "host": socket.gethostname()}
        self._told["process"] = os.getpid()
        self._write()
        self._renewed = elapsed()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def claim(self, keys: Iterable[str]) -> None:
        """No collector that begins from now on deletes one of the keys."""
        with self._writes:
            self.claims |= frozenset(keys)
        self._write()

    def check(self) -> None:
        """FailureError where the lease may have run out, so that what was put under it may have been collected."""
        if elapsed() - self._renewed > LASTS / 2:
            raise FailureError(
                f"lease {self._key} in {self._objects}: this process was stopped for longer than a lease holds, so "
                f"what it wrote may have been collected; nothing was changed: run the command again"
            )

    def end(self) -> None:
        """Give the lease back."""
        self._over.set()
        self._thread.join()
        with suppress(FailureError):  # it runs out by itself, and what was written stands
            self._objects.delete(self._key)

    def _renew(self) -> None:
        while not self._over.wait(RENEWED):
            began = elapsed()
            try:
                self._write()
            except FailureError:
                continue  # tried again; `check` says so when it has been too long
            if began - self._renewed < LASTS / 2:  # else it stays lost
                self._renewed = began

    def _write(self) -> None:
        with self._writes:  # else a renewal that began before a claim could end after it
            self._objects.replace(self._key, json.dumps({**self._told, "claims": sorted(self.claims)}).encode())


def take(objects: ObjectStore, purpose: str) -> Lease:
    """A new lease, visible to every collector from now on."""
    key = f"{FOLDER}{secrets.token_hex(16)}"
    objects.create(key, b"")
    return Lease(objects, key, _modified(objects, key), purpose)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What live leases hold: nothing modified at or after `since`, and none of `claims`, may be deleted.

    `over` are the keys of leases that have run out.
    """

    since: float
    claims: frozenset[str]
    over: tuple[str, ...]


def held(objects: ObjectStore, now: float) -> Held:
    """The leases of the store at the time `now` by its clock."""
    since, over = now, []
    claims: set[str] = set()
    for found in objects.list(FOLDER):
        if found.modified + LASTS < now:
            over.append(found.key)
            continue
        since = min(since, found.modified)  # being taken, it is as young as its file
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(objects.read(found.key) or b"")
            since = min(since, float(told["since"]))
            claims.update(told["claims"])
    return Held(since=since, claims=frozenset(claims), over=tuple(over))


def begin_sweep(objects: ObjectStore) -> tuple[str, float]:
    """(key of a new sweep, now by the clock of the store). Several collectors may sweep at a time."""
    key = f"{SWEEPS}{secrets.token_hex(16)}"
    objects.create(key, b"")
    return key, _modified(objects, key)


def wait_for_sweep(objects: ObjectStore, wait: Callable[[float], None]) -> bool:
    """Whether sweeps were at work; returns when they have ended, or are so old that their collectors must have died."""
    sweeps = list(objects.list(SWEEPS))
    dead = clock(objects) - SWEEP_LASTS if sweeps else 0.0
    first = {found.key for found in sweeps if found.modified > dead}
    waited, left = 0.0, first
    while left and waited < SWEEP_LASTS:
        wait(_LOOK)
        waited += _LOOK
        left = left & {found.key for found in objects.list(SWEEPS)}
    return bool(first)


def clock(objects: ObjectStore) -> float:
    """Now, by the clock of the store: when it says that a file was written."""
    key = f"{CLOCKS}{secrets.token_hex(8)}"
    objects.create(key, b"")
    now = _modified(objects, key)
    with suppress(FailureError):  # a collector tidies it up
        objects.delete(key)
    return now


def _modified(objects: ObjectStore, key: str) -> float:
    found = objects.find(key)
    if found is None:
        raise FailureError(f"store {objects}: {key} vanished as it was written; check who else deletes files there")
    return found.modified


def elapsed() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
