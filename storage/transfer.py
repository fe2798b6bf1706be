"""Copies between stores, and repair from another one. Everything is checked on the way; a reference moves last.

Files are named by what they hold, so a copy that was cut off goes on where it stopped.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from storage import references
from storage.checking import Advance, Finding, silent, verify
from storage.checkpoints import TRANSFERS, load_state, open_checkpoint, workers
from storage.codec import decode, record_in
from storage.errors import Conflict, FailureError, IntegrityError, MissingObject, UsageError
from storage.manifest import decode_manifest, unseal
from storage.reachable import Reach, named_by, reachable
from storage.records import Head, SegmentRecord
from storage.saving import save_state
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store, checked, digest_of, hashed_key, missing, root_of


@dataclass(kw_only=True)
class Copied:
    """What a copy did: files written, files that were there, references moved."""

    written: int = 0
    written_bytes: int = 0
    there: int = 0
    references: list[str] = field(default_factory=list)


def copy(source: Store, target: Store, names: Iterable[str] | None = None, *, advance: Advance = silent) -> Copied:
    """Bring references, all or those named, and everything that they need to another store.

    A reference of the target is moved where it is unset or an older state of the same run. Conflict where it is
    anything else, before anything is copied; MissingObject or IntegrityError where the source is not whole.
    """
    chosen = source.names("") if names is None else list(names)
    values = {name: _value(source, name) for name in chosen}
    reach = reachable(source, chosen)
    if reach.lost:
        raise reach.lost[0].error
    seen = {name: target.read(name) for name in chosen}
    for name, value in values.items():
        if seen[name] not in (None, value) and not _older(source, seen[name] or b"", value):
            raise Conflict(
                f"reference {name}: {target} has another history than {source}; nothing was copied: copy into another "
                f"store, or `trueweight store forget` the one there"
            )
    told = Copied()
    with target.writing(f"copy from {source}"):
        _copy_files(source, target, list(reach.keys()), told, advance)
        for name, value in values.items():
            if seen[name] != value:
                target.swap(name, seen[name], value)
                told.references.append(name)
    return told


def _copy_files(source: Store, target: Store, keys: list[str], told: Copied, advance: Advance) -> None:
    """Bring what is missing: manifests last, as the target may hold another of a state, which is replaced."""
    target.claim(keys)
    manifests = [key for key in keys if key.startswith(CHECKPOINTS)]
    done = 0
    for part in ([key for key in keys if key not in set(manifests)], manifests):
        with workers(TRANSFERS) as pool:
            for size in pool.map(lambda key: _bring(source, target, key), part):
                done += 1
                told.written += bool(size)
                told.written_bytes += size
                told.there += not size
                advance("copying", done, len(keys))


def _bring(source: Store, target: Store, key: str) -> int:
    """How many bytes had to be written."""
    is_manifest = key.startswith(CHECKPOINTS)
    if not is_manifest and target.objects.find(key):
        return 0
    data = sound(source, key)
    if is_manifest and target.objects.read(key) == data:
        return 0
    _keep(target, key, data)
    return len(data)


def sound(store: Store, key: str) -> bytes:
    """The bytes of an object, a pack or a manifest, if they are what the key says; MissingObject, IntegrityError."""
    folder = next(folder for folder in (OBJECTS, PACKS, CHECKPOINTS) if key.startswith(folder))
    digest = root_of(key) or digest_of(key)
    if digest is None:
        raise ValueError(f"{key}: expected the key of an object, a pack or a checkpoint")
    data = store.objects.read(key)
    if data is None:
        raise missing(folder[:-2] if folder != CHECKPOINTS else "checkpoint", digest, store)
    if folder != CHECKPOINTS:
        return checked(folder, digest, data, store)
    decode_manifest(digest, unseal(digest, data))
    return data


def _keep(store: Store, key: str, data: bytes) -> None:
    root = root_of(key)
    if root is None:
        store.keep(key, data)
    else:
        store.keep_manifest(root, data)


def _value(store: Store, name: str) -> bytes:
    value = store.read(name)
    if value is None:
        known = ", ".join(store.names("")) or "none"
        raise UsageError(f"reference {name!r}: expected one of those in {store} ({known}); choose one")
    return value


def _older(source: Store, old: bytes, new: bytes) -> bool:
    """Whether a Head is an earlier one of the same run as another."""
    first, last = record_in(old), record_in(new)
    if not isinstance(first, Head) or not isinstance(last, Head) or first.run != last.run:
        return False
    digest = last.segment
    while digest is not None and digest != first.segment:
        segment = decode(SegmentRecord, source.get(digest))
        digest = segment.previous if segment.index else None
    return digest == first.segment


# ------------------------------------------------------------------------------------------------------- repair


@dataclass(kw_only=True)
class Repaired:
    """What was mended, and the findings that the other store could not mend, with the reason."""

    mended: list[Finding] = field(default_factory=list)
    failed: list[tuple[Finding, str]] = field(default_factory=list)


def repair(store: Store, other: Store, *, advance: Advance = silent) -> Repaired:
    """Fetch from `other` whatever `verify` finds missing or damaged here, until nothing more can be mended.

    States that lie in a pack which the other store has not are taken from its checkpoints of the same roots.
    """
    told = Repaired()
    tried: set[str] = set()
    with store.writing(f"repair from {other}"):
        while True:
            findings = [one for one in verify(store, advance=advance).findings if one.key not in tried]
            if not findings:
                return told
            for finding in {one.key: one for one in findings}.values():
                tried.add(finding.key)
                try:
                    _mend(store, other, finding)
                except (FailureError, ValueError) as error:
                    told.failed.append((finding, str(error)))
                else:
                    told.mended.append(finding)


def _mend(store: Store, other: Store, finding: Finding) -> None:
    key = finding.key
    if key.startswith(references.FOLDER):
        _mend_reference(store, other, key)
        return
    if not key.startswith((OBJECTS, PACKS, CHECKPOINTS)):
        raise ValueError(f"{key} has no counterpart in another store")
    try:
        data = sound(other, key)
    except MissingObject:
        if not key.startswith(PACKS):
            raise
        _save_anew(store, other, key)
        return
    if root := root_of(key):
        for digest in open_checkpoint(other, root).manifest.packs:
            pack = hashed_key(PACKS, digest)
            if store.objects.find(pack) is None:
                store.keep(pack, sound(other, pack))
    store.objects.replace(key, data)


def _save_anew(store: Store, other: Store, pack: str) -> None:
    """Take the states that lie in a pack from the other store, which packed them otherwise, then drop the pack.

    MissingObject, and nothing is changed, where the other store lacks one of them.
    """
    for root in _lying_in(store, pack):
        open_checkpoint(other, root)
    for root in _lying_in(store, pack):
        save_state(store, load_state(other, root))
    if not _lying_in(store, pack):  # else it has been made again
        store.objects.delete(pack)


def _lying_in(store: Store, pack: str) -> list[bytes]:
    """The roots of the checkpoints whose manifests name a pack; damaged manifests are findings of their own."""
    digest, roots = digest_of(pack), []
    for root in filter(None, (root_of(found.key) for found in store.objects.list(CHECKPOINTS))):
        with suppress(IntegrityError, MissingObject):
            if digest in open_checkpoint(store, root).manifest.packs:
                roots.append(root)
    return roots


def _mend_reference(store: Store, other: Store, key: str) -> None:
    """Put the other store's value of a reference in the place of a damaged entry; a superseded one is dropped."""
    if any(found.key == key for found in references.superseded(store.objects)):
        store.objects.delete(key)
        return
    name = references.name_of(key)
    value = _value(other, name)
    reach: Reach = reachable(other, [name])
    if reach.lost or not list(named_by(value)):
        raise FailureError(f"reference {name} is not whole in {other}; repair that one first")
    _copy_files(other, store, list(reach.keys()), Copied(), silent)
    store.objects.delete(key)
    store.swap(name, store.read(name), value)
