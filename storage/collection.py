"""Garbage collection: mark what references lead to, sweep what is old and twice found without one.

The first pass that finds a file unreferenced condemns it; a later one, at least `grace` afterwards, deletes it if it is
still unreferenced and unchanged: so who is reading a checkpoint whose reference goes away has that time to finish.
Nothing younger than `age` or than the oldest live lease is touched. `storage.leases` says why writers lose nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from storage import leases, references
from storage.errors import FailureError, IntegrityError
from storage.local import UNFINISHED
from storage.objects import Found, ObjectStore
from storage.reachable import Reach, reachable
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store

CONDEMNED = "gc/condemned"
AGE = 86400.0
GRACE = 3600.0


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a pass did: files deleted, files condemned (by this pass or before), and what is too young or held.

    `left` holds the files that a sweep cut short, or a failed deletion, left to the next pass.
    """

    deleted: tuple[Found, ...]
    condemned: tuple[Found, ...]
    young: tuple[Found, ...]
    left: tuple[Found, ...]
    alive: int
    alive_bytes: int


def collect(
    store: Store,
    *,
    age: float = AGE,
    grace: float = GRACE,
    dry_run: bool = False,
    seconds: Callable[[], float] = monotonic,
) -> Collected:
    """One pass over the store. `age` and `grace` are seconds by the clock of the store.

    With `dry_run` nothing is deleted or condemned, and `deleted` is what would be. IntegrityError, and nothing is
    deleted, where something that a reference needs is lost: what it led to cannot be told from garbage.
    """
    objects = store.objects
    with _sweep(objects, dry_run, seconds) as (now, began):
        held = leases.held(objects, now)
        candidates = [found for folder in (UNFINISHED, CHECKPOINTS, PACKS, OBJECTS) for found in objects.list(folder)]
        alive = _marked(store)
        known = _condemned(objects)
        deleted, condemned, young, left = [], [], [], []
        since: dict[str, tuple[float, float]] = {}
        for found in candidates:
            if found.key in alive or found.key in held.claims:
                continue
            if found.modified >= min(now - age, held.since):
                young.append(found)
                continue
            first, modified = known.get(found.key, (now, found.modified))
            since[found.key] = (first if modified == found.modified else now), found.modified
            if now - since[found.key][0] < grace:
                condemned.append(found)
            elif not dry_run and (seconds() - began > leases.SWEEP_LASTS / 2 or not _deleted(objects, found.key)):
                left.append(found)
            else:
                deleted.append(found)
                del since[found.key]
        if not dry_run:
            objects.replace(CONDEMNED, json.dumps(since).encode())
            _tidy(objects, held, now)
    living = [found for found in candidates if found.key in alive]
    return Collected(
        deleted=tuple(deleted),
        condemned=tuple(condemned),
        young=tuple(young),
        left=tuple(left),
        alive=len(living),
        alive_bytes=sum(found.size for found in living),
    )


@contextmanager
def _sweep(objects: ObjectStore, dry_run: bool, seconds: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """(now by the clock of the store, now by ours); writers see a sweep at work meanwhile."""
    began = seconds()
    if dry_run:
        yield leases.clock(objects), began
        return
    key, now = leases.begin_sweep(objects)
    try:
        yield now, began
    finally:
        _deleted(objects, key)  # or it runs out


def _marked(store: Store) -> set[str]:
    found: Reach = reachable(store)
    if found.lost:
        first = found.lost[0]
        raise IntegrityError(
            f"store {store}: {len(found.lost)} of the things that references need are lost, first {first.key}, which "
            f"{first.reference} needs ({first.error}); nothing was collected: repair the store, or forget that "
            f"reference, then collect",
            digest=getattr(first.error, "digest", ""),
        )
    return set(found.keys())


def _condemned(objects: ObjectStore) -> dict[str, tuple[float, float]]:
    """(condemned since, modified) by key; nothing where the list is damaged: condemning begins anew."""
    try:
        told = json.loads(objects.read(CONDEMNED) or b"{}")
        return {str(key): (float(since), float(modified)) for key, (since, modified) in told.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _deleted(objects: ObjectStore, key: str) -> bool:
    """Whether the file is gone; one that would not go is left to the next pass."""
    try:
        objects.delete(key)
    except FailureError:
        return False
    return True


def _tidy(objects: ObjectStore, held: leases.Held, now: float) -> None:
    """Delete what only helped others: superseded reference entries, leases and sweeps that ran out, clock readings."""
    gone = [found.key for found in references.superseded(objects) if now - found.modified > references.PRUNED_AFTER]
    gone += held.over
    for prefix in (leases.SWEEPS, leases.CLOCKS):
        gone += [found.key for found in objects.list(prefix) if now - found.modified > 2 * leases.SWEEP_LASTS]
    for key in gone:
        _deleted(objects, key)
