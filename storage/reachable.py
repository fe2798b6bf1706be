"""What a store's references lead to: the objects, checkpoints and packs that are alive, and what is lost among them.

Records name what they need by Links and States (`storage.codec`); a reference holds a record, such as a run's Head or a
Pin, or the 32 bytes of an object's digest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from storage.checkpoints import Checkpoint, open_checkpoint
from storage.codec import links, record_in
from storage.errors import FailureError, IntegrityError, MissingObject
from storage.merkle import DIGEST_BYTES
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store, hashed_key


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Something that a reference needs and the store has not, or has damaged; `error` says what is wrong."""

    key: str
    reference: str
    error: FailureError


@dataclass(kw_only=True)
class Reach:
    """The digests that references lead to. `checkpoints` are opened, by state root."""

    objects: set[bytes] = field(default_factory=set)
    checkpoints: dict[bytes, Checkpoint] = field(default_factory=dict)
    packs: set[bytes] = field(default_factory=set)
    lost: list[Lost] = field(default_factory=list)

    def keys(self) -> Iterator[str]:
        """The keys of everything that is alive, in the order in which it has to be written."""
        yield from (hashed_key(PACKS, digest) for digest in sorted(self.packs))
        yield from (CHECKPOINTS + root.hex() for root in sorted(self.checkpoints))
        yield from (hashed_key(OBJECTS, digest) for digest in sorted(self.objects))


def reachable(store: Store, names: Iterable[str] | None = None) -> Reach:
    """What the references lead to, all of them or those named. What is lost is told, not raised."""
    found = Reach()
    for name in store.names("") if names is None else names:
        try:
            value = store.read(name)
            todo = list(named_by(value)) if value else []
        except FailureError as error:
            found.lost.append(Lost(key=getattr(error, "key", f"reference {name}"), reference=name, error=error))
            continue
        while todo:
            kind, digest = todo.pop()
            if kind == "state":
                _checkpoint(store, digest, name, found)
            elif digest not in found.objects:
                found.objects.add(digest)
                todo += _object(store, digest, name, found)
    return found


def named_by(value: bytes) -> Iterator[tuple[str, bytes]]:
    """(what it is, digest) of what a reference's value names; FailureError where it names nothing that is known."""
    if len(value) == DIGEST_BYTES:
        return iter([("object", value)])
    record: Any = record_in(value)
    if record is not None:
        return links(record)
    raise FailureError(
        f"a reference of {len(value)} bytes: expected a record or a digest that this Trueweight knows; use a newer one"
    )


def _object(store: Store, digest: bytes, name: str, found: Reach) -> list[tuple[str, bytes]]:
    try:
        record = record_in(store.get(digest))
    except (MissingObject, IntegrityError) as error:
        found.lost.append(Lost(key=hashed_key(OBJECTS, digest), reference=name, error=error))
        return []
    return [] if record is None else list(links(record))


def _checkpoint(store: Store, root: bytes, name: str, found: Reach) -> None:
    if root in found.checkpoints:
        return
    try:
        checkpoint = found.checkpoints[root] = open_checkpoint(store, root)
    except (MissingObject, IntegrityError) as error:
        found.lost.append(Lost(key=CHECKPOINTS + root.hex(), reference=name, error=error))
        return
    found.packs.update(checkpoint.manifest.packs)
