"""A medium that fails on purpose: any ObjectStore behind a plan of faults."""

from collections.abc import Callable, Iterator

from storage.errors import FailureError
from storage.objects import Data, Found, ObjectStore

Fault = Callable[[str, str], None]
"""Told (method, key) before each call; raises what is to go wrong, or returns."""


class FaultyObjects:
    """`objects`, but `before` is called first and may raise; `changed` replaces the bytes of reads.

    `torn` makes the next write of a key that contains it write half its bytes in place, as a file system without
    rename would, and fail.
    """

    def __init__(
        self,
        objects: ObjectStore,
        *,
        before: Fault = lambda _method, _key: None,
        changed: Callable[[str, bytes], bytes] = lambda _key, data: data,
        torn: str | None = None,
    ) -> None:
        self.objects = objects
        self.before, self.changed, self.torn = before, changed, torn
        self.calls: list[tuple[str, str]] = []

    def __str__(self) -> str:
        return f"faulty {self.objects}"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See ObjectStore."""
        self._call("read", key)
        data = self.objects.read(key, start, stop)
        return None if data is None else self.changed(key, data)

    def create(self, key: str, data: Data) -> bool:
        """See ObjectStore."""
        self._call("create", key)
        self._tear(key, data)
        return self.objects.create(key, data)

    def replace(self, key: str, data: Data) -> None:
        """See ObjectStore."""
        self._call("replace", key)
        self._tear(key, data)
        self.objects.replace(key, data)

    def find(self, key: str) -> Found | None:
        """See ObjectStore."""
        self._call("find", key)
        return self.objects.find(key)

    def list(self, prefix: str) -> Iterator[Found]:
        """See ObjectStore."""
        self._call("list", prefix)
        return self.objects.list(prefix)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._call("delete", key)
        self.objects.delete(key)

    def _call(self, method: str, key: str) -> None:
        self.calls.append((method, key))
        self.before(method, key)

    def _tear(self, key: str, data: Data) -> None:
        if self.torn is not None and self.torn in key:
            self.torn = None
            self.objects.replace(key, data[: len(data) // 2])
            raise FailureError(f"writing {key}: short write; free space on that disk, then run the command again")
