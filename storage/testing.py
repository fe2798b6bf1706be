"""The suite that every store passes: `for check in STORE_CHECKS: check(an_empty_store)`.

Each check takes an empty store and raises AssertionError, saying what a store promises and this one does not do.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from storage.errors import Conflict, MissingObject, TrueweightError, UsageError
from storage.objects import ObjectStore, RefStore, Store

_SAMPLES = (b"", b"\0", b"a", b"a\n", bytes(range(256)) * 16, b"frame" * 300_000)


def check_seams(store: Store) -> None:
    """The store has every method of both protocols."""
    _require(isinstance(store, ObjectStore), "is an ObjectStore")
    _require(isinstance(store, RefStore), "is a RefStore")


def check_objects(store: Store) -> None:
    """What was put comes back under its SHA-256, and is listed once."""
    for sample in _SAMPLES:
        _require(store.put(sample) == sha256(sample).digest(), "put returns the SHA-256 of the bytes")
        _require(store.put(sample) == sha256(sample).digest(), "put of the same bytes again is allowed")
    for sample in _SAMPLES:
        digest = sha256(sample).digest()
        _require(store.has(digest), "has finds what was put")
        _require(store.get(digest) == sample, "get returns what was put")
    listed = list(store.digests())
    _require(listed == sorted(sha256(sample).digest() for sample in _SAMPLES), "digests are complete, once, ascending")


def check_missing(store: Store) -> None:
    """An object that was never put is missing by name."""
    digest = sha256(b"never put").digest()
    _require(not store.has(digest), "has does not find what was never put")
    _require(list(store.digests()) == [], "a new store is empty")
    try:
        store.get(digest)
    except MissingObject as error:
        _require(error.digest == digest.hex() and digest.hex() in str(error), "MissingObject names the object")
    else:
        raise AssertionError("a store promises: get of an object that is not there raises MissingObject")


def check_references(store: Store) -> None:
    """References are set, moved and listed; unset ones read as None."""
    _require(store.read("runs/a") is None, "an unset reference reads as None")
    store.swap("runs/a", None, b"1")
    store.swap("runs", None, b"not a folder")
    store.swap("runs/b.c-d_e", None, b"")
    store.swap("runs/a", b"1", b"2")
    _require(store.read("runs/a") == b"2", "swap sets the value")
    _require(store.read("runs/b.c-d_e") == b"", "an empty value is a value")
    _require(store.names("runs/") == ["runs/a", "runs/b.c-d_e"], "names are those with the prefix, ascending")
    _require(store.names("") == ["runs", "runs/a", "runs/b.c-d_e"], "the empty prefix lists every name")
    _require(store.names("other") == [], "a prefix of nothing lists nothing")
    _require(list(store.digests()) == [], "references are no objects")


def check_compare_and_swap(store: Store) -> None:
    """A swap that expects another value changes nothing."""
    _raises(Conflict, lambda: store.swap("head", b"0", b"1"), "swap of an unset reference that expects a value")
    _require(store.read("head") is None, "a refused swap leaves the reference unset")
    store.swap("head", None, b"1")
    _raises(Conflict, lambda: store.swap("head", None, b"2"), "swap of a set reference that expects none")
    _raises(Conflict, lambda: store.swap("head", b"0", b"2"), "swap that expects another value")
    _require(store.read("head") == b"1", "a refused swap leaves the value")


def check_names(store: Store) -> None:
    """Names that could leave the store, hide in it or clash with its own files are refused."""
    for name in (
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        ".lock",
        "a b",
        "a\n",
        "a\0b",
        "ä",
        "a" * 201,
    ):
        _raises(UsageError, lambda name=name: store.swap(name, None, b""), f"swap of {name!r}")  # type: ignore[misc]
    _require(store.names("") == [], "refused names leave nothing behind")


def check_racing_swaps(store: Store) -> None:
    """Of writers that race with the same expectation, one wins: a counter loses no increment."""
    writers, increments = 4, 8
    store.swap("counter", None, b"0")

    def count() -> None:
        done = 0
        while done < increments:
            seen = store.read("counter") or b""
            try:
                store.swap("counter", seen, str(int(seen) + 1).encode())
            except Conflict:
                continue
            done += 1

    with ThreadPoolExecutor(writers) as pool:
        for job in [pool.submit(count) for _ in range(writers)]:
            job.result()
    _require(store.read("counter") == str(writers * increments).encode(), "racing swaps lose no update")


STORE_CHECKS: tuple[Callable[[Store], None], ...] = (
    check_seams,
    check_objects,
    check_missing,
    check_references,
    check_compare_and_swap,
    check_names,
    check_racing_swaps,
)


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"a store promises: {promise}")


def _raises(kind: type[TrueweightError], act: Callable[[], None], what: str) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"a store promises: {what} raises {kind.__name__}")
