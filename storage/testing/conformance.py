"""The suites. Each check takes an empty store and raises AssertionError, saying what it promises and does not keep."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from storage.errors import Conflict, MissingObject, TrueweightError, UsageError
from storage.objects import ObjectStore
from storage.store import Store

_SAMPLES = (b"", b"\0", b"a", b"a\n", bytes(range(256)) * 16, b"frame" * 300_000)

# ------------------------------------------------------------------------------------------------- ObjectStore


def check_seam(objects: ObjectStore) -> None:
    """The medium has every method, and says where it is."""
    _require(isinstance(objects, ObjectStore), "is an ObjectStore")
    _require(bool(str(objects)), "str() says where it is")


def check_create(objects: ObjectStore) -> None:
    """A key is created once, with all its bytes."""
    for number, sample in enumerate(_SAMPLES):
        key = f"objects/ab/{number}"
        _require(objects.find(key) is None and objects.read(key) is None, "a key that was never written is not there")
        _require(objects.create(key, sample), "create of a new key is True")
        _require(objects.read(key) == sample, "read returns what was created")
        _require(not objects.create(key, b"other"), "create of a key that is there is False")
        _require(objects.read(key) == sample, "and changes nothing")
        found = objects.find(key)
        _require(found is not None and (found.key, found.size) == (key, len(sample)), "find tells key and size")


def check_buffers(objects: ObjectStore) -> None:
    """Whatever holds bytes can be written."""
    data = bytearray(range(256))
    objects.create("a", memoryview(data)[1:])
    objects.replace("b", data)
    data[:] = bytes(256)
    _require(objects.read("a") == bytes(range(1, 256)), "create keeps its own copy")
    _require(objects.read("b") == bytes(range(256)), "replace keeps its own copy")


def check_replace(objects: ObjectStore) -> None:
    """A key is replaced as a whole, and its time goes on."""
    objects.replace("a/b", b"long old value")
    first = objects.find("a/b")
    objects.replace("a/b", b"new")
    second = objects.find("a/b")
    _require(objects.read("a/b") == b"new", "read returns what was put last")
    _require(first is not None and second is not None and second.size == 3, "find tells the size of what was put last")
    if first and second:
        _require(second.modified >= first.modified > 0, "modified never goes back")


def check_ranges(objects: ObjectStore) -> None:
    """Parts of a key can be read."""
    data = bytes(range(256)) * 5000
    objects.create("packs/a", data)
    for start, stop in ((0, 1), (0, 0), (5, 5), (77, 1_000_003), (len(data) - 1, len(data)), (0, len(data))):
        _require(objects.read("packs/a", start, stop) == data[start:stop], f"read({start}, {stop}) returns that part")
    _require(objects.read("packs/a", 9) == data[9:], "read without an end goes to the end")
    _require(objects.read("packs/a", len(data) - 3, len(data) + 9) == data[-3:], "read beyond the end is cut")
    _require(objects.read("packs/a", len(data), len(data) + 9) == b"", "read after the end is empty")
    _require(objects.read("packs/b", 3, 9) is None, "a part of a key that is not there is None")


def check_list(objects: ObjectStore) -> None:
    """Keys are listed once, ascending, by any prefix."""
    _require(list(objects.list("")) == [], "an empty store lists nothing")
    keys = ["a", "b/c", "b/c.d", "b/cc/a", "b/d/e/f", "b%2Fx", "bb", "refs/x/000000000001"]
    for key in reversed(keys):
        objects.create(key, key.encode())
    _require([found.key for found in objects.list("")] == sorted(keys), "the empty prefix lists all, ascending")
    for prefix in ("b", "b/", "b/c", "b/cc", "b/d/", "b/d/e/f", "refs/", "x", "a/", "b/c/"):
        expected = [key for key in sorted(keys) if key.startswith(prefix)]
        found = list(objects.list(prefix))
        _require([one.key for one in found] == expected, f"the prefix {prefix!r} lists its keys")
        _require([one.size for one in found] == [len(key) for key in expected], "with their sizes")
        _require(all(objects.find(one.key) == one for one in found), "as find does")
    _require(objects.find("b") is None and objects.read("b") is None, "what keys begin with is no key")


def check_delete(objects: ObjectStore) -> None:
    """A deleted key is gone, and may be created again."""
    objects.create("a/b", b"1")
    objects.create("a/bc", b"2")
    objects.delete("a/b")
    objects.delete("a/b")
    objects.delete("never/there")
    _require(objects.find("a/b") is None and objects.read("a/b") is None, "a deleted key is not there")
    _require([found.key for found in objects.list("")] == ["a/bc"], "nor listed, and others stay")
    _require(objects.create("a/b", b"2") and objects.read("a/b") == b"2", "a deleted key can be created")


def check_racing_creates(objects: ObjectStore) -> None:
    """Of writers that race to create a key, one wins, and its bytes stay."""
    with ThreadPoolExecutor(4) as pool:
        for number in range(8):
            key, values = f"race/{number}", [bytes([writer]) * 999 for writer in range(4)]
            won = list(pool.map(lambda value, key=key: objects.create(key, value), values))
            _require(won.count(True) == 1, "one of racing creates is True")
            _require(objects.read(key) == values[won.index(True)], "and its bytes are there")


OBJECT_CHECKS: tuple[Callable[[ObjectStore], None], ...] = (
    check_seam,
    check_create,
    check_buffers,
    check_replace,
    check_ranges,
    check_list,
    check_delete,
    check_racing_creates,
)

# ------------------------------------------------------------------------------------------------------- Store


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
    store.swap("runs/gone", None, b"1")
    store.swap("runs/gone", b"1", None)
    _require(store.read("runs/gone") is None, "swap to None unsets")
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
