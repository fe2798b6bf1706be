"""The seam below everything that is stored: whole byte strings under keys, in a folder, in memory, in a bucket.

Six methods and two promises: a key holds all of its bytes or does not exist, whatever ends the writer; and of several
writers that create one key, one succeeds. Everything else (`storage.store`) is built on these. `storage.testing` has
the suite that every implementation passes.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Data = bytes | bytearray | memoryview
"""What can be written: C-contiguous bytes, which nobody changes meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A key that is there: `size` in bytes, and when it was last written, in seconds by the clock of the store."""

    key: str
    size: int
    modified: float


@runtime_checkable
class ObjectStore(Protocol):
    """Bytes under keys such as `packs/ab/cdef`: parts of `A-Z a-z 0-9 _ . % -` joined by `/`.

    Every method raises FailureError, remedy last, where the medium refuses; nothing is half done then.
    """

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes from `start` up to `stop`, fewer where there are no more; None where the key is not there."""

    def create(self, key: str, data: Data) -> bool:
        """True once `key` holds `data` durably; False, and nothing changed, where it exists already.

        Of writers that race, one is told True.
        """

    def replace(self, key: str, data: Data) -> None:
        """`key` holds `data` durably from now on, and until now what it held before; `modified` is now."""

    def find(self, key: str) -> Found | None:
        """The key's size and time, None where it is not there."""

    def list(self, prefix: str) -> Iterator[Found]:
        """Every key that starts with `prefix`, ascending. What is written meanwhile may be in it or not."""

    def delete(self, key: str) -> None:
        """The key is not there any more; harmless where it was not."""


class MemoryObjects:
    """Keys in this process: the toy, and the model that other stores are compared with. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._held: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._clock = clock

    def __str__(self) -> str:
        return "memory://"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See ObjectStore."""
        held = self._held.get(key)
        return None if held is None else held[0][start:stop]

    def create(self, key: str, data: Data) -> bool:
        """See ObjectStore."""
        with self._lock:
            if key in self._held:
                return False
            self._held[key] = bytes(data), self._clock()
        return True

    def replace(self, key: str, data: Data) -> None:
        """See ObjectStore."""
        with self._lock:
            self._held[key] = bytes(data), self._clock()

    def find(self, key: str) -> Found | None:
        """See ObjectStore."""
        held = self._held.get(key)
        return None if held is None else Found(key=key, size=len(held[0]), modified=held[1])

    def list(self, prefix: str) -> Iterator[Found]:
        """See ObjectStore."""
        with self._lock:
            held = sorted((key, len(data), at) for key, (data, at) in self._held.items() if key.startswith(prefix))
        return (Found(key=key, size=size, modified=at) for key, size, at in held)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with self._lock:
            self._held.pop(key, None)
