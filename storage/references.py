"""Named values that change by compare-and-swap, on any store that can create a key exclusively.

A reference is a folder of numbered entries, the highest of which holds its value: who wants to change it creates the
next number, and only one can. Numbers start at 1 and have no gaps from the oldest kept entry on. Only garbage
collection removes old ones, never the highest, and none younger than PRUNED_AFTER: a writer that looked, slept and
would then create a number that has come and gone must not succeed, so it looks again after HASTE.

An entry is 16 random bytes, by which a writer knows its own after an answer that was lost; 00 (unset), or 01 and the
value; and the SHA-256 of the entry's key and all that, because nothing else covers a reference.
"""

import re
import secrets
from hashlib import sha256
from urllib.parse import quote, unquote

from storage.errors import Conflict, FailureError, UsageError
from storage.leases import elapsed
from storage.merkle import DIGEST_BYTES
from storage.objects import Found, ObjectStore

FOLDER = "refs/"
HASTE = 60.0
"""Seconds within which a swap creates its entry after it has looked."""
PRUNED_AFTER = 86400.0
"""Seconds for which a superseded entry stays."""
_LOOKS = 5
_NONCE_BYTES = 16
_LONGEST = 200
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_ENTRY = re.compile(r"[0-9]{12}")


class DamagedReference(FailureError):
    """The newest entry of a reference, `key`, is not what was written."""

    key = ""


def read(objects: ObjectStore, name: str) -> bytes | None:
    """The value of a reference, None where it was never set or is unset; UsageError for a name that is none."""
    return _latest(objects, name)[1]


def swap(objects: ObjectStore, name: str, expected: bytes | None, new: bytes | None) -> None:
    """Set the reference (None: unset it) if its value is `expected`, atomically and durably; Conflict otherwise."""
    looked = -HASTE
    while elapsed() - looked >= HASTE:
        looked = elapsed()
        number, found = _latest(objects, name)
        if found != expected:
            raise _conflict(name, expected, found)
    key = f"{_folder(name)}{number + 1:012}"
    entry = _entry(key, new)
    if not objects.create(key, entry) and objects.read(key) != entry:
        raise _conflict(name, expected, read(objects, name))


def names(objects: ObjectStore, prefix: str) -> list[str]:
    """The names of the references that start with `prefix` and are set, ascending."""
    known = sorted({name_of(found.key) for found in objects.list(FOLDER + quote(prefix, safe=""))})
    return [name for name in known if _NAME.fullmatch(name) and _is_set(objects, name)]


def name_of(key: str) -> str:
    """The name of the reference that an entry belongs to."""
    return unquote(key.split("/")[1])


def superseded(objects: ObjectStore) -> list[Found]:
    """Entries below the highest of their reference: history, which nothing reads."""
    entries = [found for found in objects.list(FOLDER) if _ENTRY.fullmatch(found.key.rpartition("/")[2])]
    following = [found.key.rpartition("/")[0] for found in entries[1:]]
    return [found for found, other in zip(entries, following, strict=False) if found.key.rpartition("/")[0] == other]


def _latest(objects: ObjectStore, name: str) -> tuple[int, bytes | None]:
    """(number of the newest entry, its value); (0, None) for a reference without entries."""
    folder = _folder(name)
    for _ in range(_LOOKS):
        numbers = [found.key.rpartition("/")[2] for found in objects.list(folder)]
        number = max((int(text) for text in numbers if _ENTRY.fullmatch(text)), default=0)
        if not number:
            return 0, None
        entry = objects.read(f"{folder}{number:012}")
        if entry is None:
            continue  # a newer one came and this one was collected while we looked
        if not whole(f"{folder}{number:012}", entry):
            error = DamagedReference(
                f"reference {name}: entry {number} in {objects} is damaged; mend it with `trueweight store repair "
                f"--from OTHER`, or delete {folder}{number:012} to go back to the value before"
            )
            error.key = f"{folder}{number:012}"
            raise error
        return number, _value(entry)
    raise FailureError(
        f"reference {name}: {objects} lists entry {number} and does not have it, {_LOOKS} times; check that medium"
    )


def _is_set(objects: ObjectStore, name: str) -> bool:
    """Whether a reference has a value, a damaged one included: who reads that one is told."""
    try:
        return read(objects, name) is not None
    except DamagedReference:
        return True


def whole(key: str, entry: bytes) -> bool:
    """Whether an entry's bytes are those that were written under its key."""
    body, seal = entry[:-DIGEST_BYTES], entry[-DIGEST_BYTES:]
    return len(body) > _NONCE_BYTES and body[_NONCE_BYTES] <= 1 and seal == sha256(key.encode() + body).digest()


def _entry(key: str, value: bytes | None) -> bytes:
    body = secrets.token_bytes(_NONCE_BYTES) + (b"\0" if value is None else b"\1" + value)
    return body + sha256(key.encode() + body).digest()


def _value(entry: bytes) -> bytes | None:
    return entry[_NONCE_BYTES + 1 : -DIGEST_BYTES] if entry[_NONCE_BYTES] else None


def _folder(name: str) -> str:
    if len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise UsageError(
            f"reference {name!r}: expected letters, digits, '_', '.', '-' in parts joined by '/', at most "
            f"{_LONGEST} characters and no part that starts with '.' or '-'; choose another name"
        )
    return f"{FOLDER}{quote(name, safe='')}/"


def _conflict(name: str, expected: bytes | None, found: bytes | None) -> Conflict:
    shown = ["nothing" if value is None else value.hex() for value in (expected, found)]
    return Conflict(
        f"reference {name}: expected {shown[0]}, got {shown[1]}; another process moved it, read it and try again"
    )
