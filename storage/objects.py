"""Content-addressed objects and named references.

An object is bytes under their SHA-256. A reference is the only thing that changes, and only by compare-and-swap.
Writers put objects first and swing the reference last: a crash leaves unreferenced objects, never a dangling reference.
`storage.testing` has the suite that every store passes.
"""

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import quote, unquote, urlsplit

from storage.errors import Conflict, FailureError, IntegrityError, MissingObject, UsageError
from storage.files import TEMPORARY, file_failure, make_folder, write_whole
from storage.merkle import DIGEST_BYTES

MARKER = "trueweight-store"
FORMAT = b"trueweight-store 1\n"
_FOLDER = re.compile("[0-9a-f]{2}")
_FILE = re.compile("[0-9a-f]{62}")
_REFERENCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_LONGEST_REFERENCE = 200


@runtime_checkable
class ObjectStore(Protocol):
    """Bytes under their SHA-256 digest (32 bytes)."""

    def put(self, data: bytes) -> bytes:
        """The digest of `data`, which is durable from now on; putting the same bytes again changes nothing."""

    def get(self, digest: bytes) -> bytes:
        """The bytes, hashed again on every read. MissingObject; IntegrityError where they are not what was put."""

    def has(self, digest: bytes) -> bool:
        """Whether an object of this digest is there (its bytes are not read)."""

    def digests(self) -> Iterator[bytes]:
        """Every object's digest, ascending."""


@runtime_checkable
class RefStore(Protocol):
    """Small mutable values under names such as `runs/quickstart`."""

    def read(self, name: str) -> bytes | None:
        """The value, or None where the reference was never set."""

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """Set the value if it is `expected` (None: unset), atomically and durably; Conflict otherwise."""

    def names(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, ascending."""


@runtime_checkable
class Store(ObjectStore, RefStore, Protocol):
    """Objects and references in one place."""


def open_store(url: str, create: bool) -> Store:
    """The store at `memory://` (a new one each time), a path or `file://`; UsageError where there is none.

    With `create` a folder that is missing or empty becomes a store.
    """
    parts = urlsplit(url)
    if url == "memory://":
        return MemoryStore()
    if parts.scheme == "file":
        return LocalStore(Path(unquote(parts.netloc + parts.path)), create=create)
    if not url or "://" in url:
        raise UsageError(f"store {url!r}: expected a path, file:// or memory://; choose a local folder")
    return LocalStore(Path(url), create=create)


class MemoryStore:
    """A store in this process: the toy, and the model that other stores are compared with."""

    def __init__(self) -> None:
        self._objects: dict[bytes, bytes] = {}
        self._references: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, data: bytes) -> bytes:
        """See ObjectStore."""
        digest = sha256(data).digest()
        self._objects[digest] = bytes(data)
        return digest

    def get(self, digest: bytes) -> bytes:
        """See ObjectStore."""
        if digest not in self._objects:
            raise _missing(digest)
        return checked(digest, self._objects[digest])

    def has(self, digest: bytes) -> bool:
        """See ObjectStore."""
        return digest in self._objects

    def digests(self) -> Iterator[bytes]:
        """See ObjectStore."""
        return iter(sorted(self._objects))

    def read(self, name: str) -> bytes | None:
        """See RefStore."""
        return self._references.get(_valid(name))

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """See RefStore."""
        with self._lock:
            _expect(name, expected, self.read(name))
            self._references[name] = bytes(new)

    def names(self, prefix: str) -> list[str]:
        """See RefStore."""
        return sorted(name for name in self._references if name.startswith(prefix))


class LocalStore:
    """A store in a folder: `trueweight-store` (format), `objects/ab/cdef...`, `refs/NAME`; see docs/formats.md."""

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path)
        self._objects = self.path / "objects"
        self._references = self.path / "refs"
        self._check_marker(create)

    def __repr__(self) -> str:
        return f"LocalStore({str(self.path)!r})"

    def put(self, data: bytes) -> bytes:
        """See ObjectStore."""
        digest = sha256(data).digest()
        path = self._object(digest)
        if not self._holds(path, len(data)):
            make_folder(path.parent)
            write_whole(path, data)
        return digest

    def get(self, digest: bytes) -> bytes:
        """See ObjectStore."""
        path = self._object(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise _missing(digest, f" in {self.path}") from None
        except OSError as error:
            raise file_failure("reading", path, error) from error
        return checked(digest, data, f" in {path}")

    def has(self, digest: bytes) -> bool:
        """See ObjectStore."""
        return self._object(digest).is_file()

    def digests(self) -> Iterator[bytes]:
        """See ObjectStore."""
        for folder in sorted(self._objects.iterdir()):
            if _FOLDER.fullmatch(folder.name):
                names = sorted(path.name for path in folder.iterdir())
                yield from (bytes.fromhex(folder.name + name) for name in names if _FILE.fullmatch(name))

    def read(self, name: str) -> bytes | None:
        """See RefStore."""
        path = self._reference(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_failure("reading", path, error) from error

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """See RefStore."""
        path = self._reference(name)
        with self._locked():
            _expect(name, expected, self.read(name))
            write_whole(path, new)

    def names(self, prefix: str) -> list[str]:
        """See RefStore."""
        found = (unquote(path.name) for path in self._references.iterdir() if not path.name.startswith("."))
        return sorted(name for name in found if name.startswith(prefix))

    def _check_marker(self, create: bool) -> None:
        marker = self.path / MARKER
        try:
            if not marker.exists():
                self._check_fresh(create)
                make_folder(self.path)
                write_whole(marker, FORMAT)
            found = marker.read_bytes()
        except OSError as error:
            raise file_failure("opening the store", self.path, error) from error
        if found != FORMAT:
            raise UsageError(
                f"store {self.path}: expected format {FORMAT!r}, got {found[:40]!r}; use the Trueweight that wrote it"
            )
        make_folder(self._objects)
        make_folder(self._references)

    def _check_fresh(self, create: bool) -> None:
        """UsageError unless the folder may become a store; temporary files are of a creation that was cut off."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"store {self.path}: expected a folder, got a file; choose another path")
        if self.path.is_dir() and any(not child.name.startswith(TEMPORARY) for child in self.path.iterdir()):
            raise UsageError(f"{self.path} is not a store: expected a file {MARKER!r} in it; choose another folder")
        if not create:
            raise UsageError(f"no store at {self.path}: expected a folder with a file {MARKER!r}; check the path")

    def _object(self, digest: bytes) -> Path:
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"object digest: expected {DIGEST_BYTES} bytes, got {len(digest)}")
        name = digest.hex()
        return self._objects / name[:2] / name[2:]

    def _reference(self, name: str) -> Path:
        return self._references / quote(_valid(name), safe="")

    @staticmethod
    def _holds(path: Path, size: int) -> bool:
        """Whether the object is there in its full length: a file system may lose the end of a file in a power cut."""
        try:
            return path.stat().st_size == size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise file_failure("reading", path, error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One swap at a time over all processes; the system drops the lock of a process that dies."""
        path = self._references / ".lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise file_failure("opening", path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def checked(digest: bytes, data: bytes, where: str = "") -> bytes:
    """`data`, whose SHA-256 is `digest`; IntegrityError naming the object otherwise."""
    found = sha256(data).digest()
    if found != digest:
        raise IntegrityError(
            f"object {digest.hex()}{where} is damaged: its bytes hash to {found.hex()}; restore it from another copy",
            digest=digest.hex(),
        )
    return data


def _missing(digest: bytes, where: str = "") -> FailureError:
    return MissingObject(
        f"object {digest.hex()} is missing{where}; restore it from another copy of the store", digest=digest.hex()
    )


def _valid(name: str) -> str:
    if len(name) > _LONGEST_REFERENCE or not _REFERENCE.fullmatch(name):
        raise UsageError(
            f"reference {name!r}: expected letters, digits, '_', '.', '-' in parts joined by '/', at most "
            f"{_LONGEST_REFERENCE} characters and no part that starts with '.' or '-'; choose another name"
        )
    return name


def _expect(name: str, expected: bytes | None, found: bytes | None) -> None:
    if found != expected:
        shown = ["nothing" if value is None else value.hex() for value in (expected, found)]
        raise Conflict(
            f"reference {name}: expected {shown[0]}, got {shown[1]}; another process moved it, read it and try again"
        )
