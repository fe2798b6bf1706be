"""A store: objects under their SHA-256, checkpoints under their state root, references; over any ObjectStore.

Writers put objects first and swing a reference last: a crash leaves unreferenced objects, never a dangling reference.
What a writer puts while it holds a lease is safe from garbage collection until the lease ends (docs/storage.md); a
reference is what keeps it afterwards.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import sleep
from urllib.parse import unquote, urlsplit

from storage import leases, merkle, references
from storage.errors import FailureError, IntegrityError, MissingObject, UsageError
from storage.local import UNFINISHED, LocalObjects
from storage.merkle import DIGEST_BYTES
from storage.objects import Data, Found, MemoryObjects, ObjectStore

MARKER = "trueweight-store"
FORMAT = b"trueweight-store 2\n"
MOST_BYTES = 1 << 30
"""Bytes of the largest object: a store may be anybody's, and objects are read whole."""
OBJECTS, PACKS, CHECKPOINTS = "objects/", "packs/", "checkpoints/"
_ROOT = re.compile("checkpoints/([0-9a-f]{64})")
_HASHED = re.compile("[a-z]+/([0-9a-f]{2})/([0-9a-f]{62})")


class Store:
    """Objects and references in one place. `objects` is the medium, `wait` sleeps for seconds.

    Safe for several threads; any number of processes may work on one medium.
    """

    def __init__(self, objects: ObjectStore, *, wait: Callable[[float], None] = sleep) -> None:
        self.objects = objects
        self._wait = wait
        self._lease: leases.Lease | None = None
        self._writing, self._writers = Lock(), 0

    def __str__(self) -> str:
        return str(self.objects)

    # ------------------------------------------------------------------------------------------------- objects

    def put(self, data: bytes) -> bytes:
        """The digest of `data`, which is durable from now on; putting the same bytes again changes nothing."""
        if len(data) > MOST_BYTES:
            raise FailureError(f"object in {self}: expected at most {MOST_BYTES} bytes, got {len(data)}; cut it up")
        digest = sha256(data).digest()
        self.keep(hashed_key(OBJECTS, digest), data)
        return digest

    def get(self, digest: bytes) -> bytes:
        """The bytes, hashed again on every read. MissingObject; IntegrityError where they are not what was put."""
        data = self.objects.read(hashed_key(OBJECTS, digest), 0, MOST_BYTES + 1)
        if data is None:
            raise missing("object", digest, self)
        if len(data) > MOST_BYTES:
            raise IntegrityError(
                f"object {digest.hex()} in {self}: expected at most {MOST_BYTES} bytes, got more; nothing that "
                f"Trueweight writes is as long: take the run from another store",
                digest=digest.hex(),
            )
        return checked(OBJECTS, digest, data, self)

    def has(self, digest: bytes) -> bool:
        """Whether an object of this digest is there (its bytes are not read)."""
        return self.objects.find(hashed_key(OBJECTS, digest)) is not None

    def digests(self) -> Iterator[bytes]:
        """Every object's digest, ascending."""
        found = (digest_of(found.key) for found in self.objects.list(OBJECTS))
        return (digest for digest in found if digest is not None)

    def keep(self, key: str, data: Data) -> None:
        """`key`, whose bytes follow from its name, holds `data`, and no garbage collection takes it from this writer.

        An older file of the same length is taken as it is where there is no lease, and written anew where there is one:
        a collector that has seen it unreferenced leaves alone what is younger than the lease.
        """
        while True:
            found = self.objects.find(key)
            if found is None:
                if not self.objects.create(key, data):
                    continue  # another writer was quicker: look at what it wrote
            elif found.size != len(data) or not self._holds(found):
                self.objects.replace(key, data)
            if self._lease is None:
                return
            # A sweep that began before may have seen the key as it was. One that begins from here on sees it as it is.
            if leases.wait_for_sweep(self.objects, self._wait):
                continue
            found = self.objects.find(key)
            if found and found.size == len(data) and self._holds(found):
                return

    def keep_manifest(self, root: bytes, data: bytes) -> None:
        """The manifest of the state `root` is `data`, in place of one that says otherwise where its frames lie."""
        key = CHECKPOINTS + root.hex()
        if self.objects.read(key) not in (None, data):
            self.objects.replace(key, data)
        self.keep(key, data)

    # ---------------------------------------------------------------------------------------------- references

    def read(self, name: str) -> bytes | None:
        """The value of a reference, None where it is not set."""
        return references.read(self.objects, name)

    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> None:
        """Set the reference (None: unset it) if its value is `expected`, atomically and durably; Conflict otherwise."""
        if self._lease:
            self._lease.check()
        references.swap(self.objects, name, expected, new)

    def names(self, prefix: str) -> list[str]:
        """The names of set references that start with `prefix`, ascending."""
        return references.names(self.objects, prefix)

    # -------------------------------------------------------------------------------------------------- leases

    def _holds(self, found: Found) -> bool:
        """Whether a file is safe from collectors as it is, as far as this writer's lease goes."""
        lease = self._lease
        return lease is None or found.modified >= lease.since or found.key in lease.claims

    @contextmanager
    def writing(self, purpose: str) -> Iterator[None]:
        """While this lasts, nothing that is put here is collected; every command that writes works inside.

        Raises FailureError at once where the store cannot be written. Nested or in several threads, one lease is held
        until the last one leaves.
        """
        with self._writing:
            self._lease = self._lease or leases.take(self.objects, purpose)
            self._writers += 1
        try:
            yield
        finally:
            with self._writing:
                self._writers -= 1
                if not self._writers:
                    self._lease.end()
                    self._lease = None

    def claim(self, keys: Iterable[str]) -> None:
        """What is there of the keys is not collected while `writing` lasts, however old: `keep` takes it as it is."""
        fresh = set(keys) - self._lease.claims if self._lease else set()
        if self._lease and fresh:
            self._lease.claim(fresh)
            self.settle()

    def settle(self) -> None:
        """Returns once no sweep that began before this call is at work: what a new reference leads to stays."""
        leases.wait_for_sweep(self.objects, self._wait)


def memory_store() -> Store:
    """A store in this process."""
    return Store(MemoryObjects())


def open_store(url: str, create: bool) -> Store:
    """The store at a path or URL: `file://`, `memory://` (a new one each time), `s3://`, `gs://`, what fsspec opens.

    With `create` a place that is empty becomes a store. UsageError where there is none, or something else.
    """
    parts = urlsplit(url)
    if url == "memory://":
        return memory_store()
    if not url:
        raise UsageError("store '': expected a folder or a URL such as s3://bucket/path; name one")
    if "://" not in url or parts.scheme == "file":
        path = Path(unquote(parts.netloc + parts.path) if parts.scheme == "file" else url)
        if path.exists() and not path.is_dir():
            raise UsageError(f"store {path}: expected a folder, got a file; choose another path")
        return _marked(LocalObjects(path), create)
    from storage.remote import open_remote

    return _marked(open_remote(url), create)


def _marked(objects: ObjectStore, create: bool) -> Store:
    """The store over `objects`, which carries the marker of this format, or gets it."""
    found = objects.read(MARKER)
    if found is None and any(not other.key.startswith(UNFINISHED) for other in objects.list("")):
        found = objects.read(MARKER)  # a process that makes the store meanwhile writes it first
        if found is None:
            raise UsageError(f"{objects} is not a store: expected a file {MARKER!r} in it; choose another folder")
    if found is None:
        if not create:
            raise UsageError(f"no store at {objects}: expected a folder with a file {MARKER!r}; check the path")
        objects.create(MARKER, FORMAT)
        found = objects.read(MARKER)
    if found != FORMAT:
        raise UsageError(
            f"store {objects}: expected format {FORMAT!r}, got {(found or b'')[:40]!r}; "
            f"use the Trueweight that wrote it"
        )
    return Store(objects)


def hashed_key(folder: str, digest: bytes) -> str:
    """The key of what is named by its digest: `objects/ab/cdef...`."""
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"object digest: expected {DIGEST_BYTES} bytes, got {len(digest)}")
    name = digest.hex()
    return f"{folder}{name[:2]}/{name[2:]}"


def digest_of(key: str) -> bytes | None:
    """The digest in such a key, None where the key is another."""
    match = _HASHED.fullmatch(key)
    return bytes.fromhex(match[1] + match[2]) if match else None


def root_of(key: str) -> bytes | None:
    """The state root in the key of a manifest, None where the key is another."""
    match = _ROOT.fullmatch(key)
    return bytes.fromhex(match[1]) if match else None


def digest_in(folder: str, data: Data) -> bytes:
    """What names bytes in a folder: the SHA-256 of an object, the Merkle root of a pack, which is hashed faster."""
    return merkle.bytes_root(data) if folder == PACKS else sha256(data).digest()


def checked(folder: str, digest: bytes, data: bytes, where: object) -> bytes:
    """`data`, which `digest` names in the folder; IntegrityError naming the object or pack otherwise."""
    found = digest_in(folder, data)
    if found != digest:
        raise IntegrityError(
            f"{folder[:-2]} {digest.hex()} in {where} is damaged: its bytes hash to {found.hex()}; mend it with "
            f"`trueweight store repair --from OTHER`",
            digest=digest.hex(),
        )
    return data


def missing(what: str, digest: bytes, where: object) -> FailureError:
    """The error for something that a store should have: it says where to get it from."""
    name = digest.hex()
    return MissingObject(
        f"{what} {name} is missing in {where}; fetch it with `trueweight store repair --from OTHER`", digest=name
    )
