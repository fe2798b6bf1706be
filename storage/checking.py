"""Verification of a store: every byte hashed and decoded again, or a random sample of leaves; damage is located.

A finding names the file and, where the file holds tensors, the tensor and the leaf. A pack is hashed whole, so a
flipped bit is found even where it changes no tensor's value.
"""

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage import merkle, references
from storage.checkpoints import TRANSFERS, Checkpoint, DamagedFrame, open_checkpoint, workers
from storage.errors import IntegrityError, MissingObject
from storage.reachable import Reach, reachable
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store, checked, digest_of, hashed_key, root_of

Advance = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Damage in the file `key`. `tensor` and `leaf` say where, as far as it can be told; `kind` is damaged or missing.

    `checkpoint` is the state root of a checkpoint that is harmed.
    """

    key: str
    kind: str
    reason: str
    checkpoint: str | None = None
    tensor: str | None = None
    leaf: int | None = None


@dataclass(kw_only=True)
class Verified:
    """What was looked at, and the findings, by key. A sample looks at parts of files, and leaves `files` at 0."""

    files: int = 0
    read_bytes: int = 0
    checkpoints: int = 0
    leaves: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify(store: Store, *, advance: Advance = silent) -> Verified:
    """The findings over every file of the store, whether something needs it or not.

    `advance` is told what is being read, and how many of how many bytes are done.
    """
    return _Verification(store, advance).everything()


def verify_sample(store: Store, count: int, seed: int, *, advance: Advance = silent) -> Verified:
    """The findings over `count` leaves drawn at random from all leaves of the checkpoints that references need.

    Each is drawn with replacement, as a function of the seed; its frame is read, and checked up to the state root.
    """
    told = Verified()
    reach = reachable(store)
    told.findings += [_of_error(lost.key, lost.error) for lost in reach.lost]
    alive = [reach.checkpoints[root] for root in sorted(reach.checkpoints)]
    told.checkpoints = len(alive)
    # where the leaves of each checkpoint end among all, and those of each frame among its checkpoint's
    frames = [np.cumsum(one.manifest.tiles) // merkle.DIGEST_BYTES for one in alive]
    ends = np.cumsum([int(leaves[-1]) if len(leaves) else 0 for leaves in frames], dtype=np.int64)
    total = int(ends[-1]) if alive else 0
    told.leaves = count if total else 0
    draw = random.Random(seed)  # noqa: S311 - a sample that anybody can draw again, not a secret
    chosen: dict[int, set[int]] = {}
    for _ in range(told.leaves):
        leaf = draw.randrange(total)
        at = int(np.searchsorted(ends, leaf, "right"))
        within = leaf - (int(ends[at - 1]) if at else 0)
        chosen.setdefault(at, set()).add(int(np.searchsorted(frames[at], within, "right")))
    counter = _Counter(told, advance, sum(_stored(alive[at], picked) for at, picked in chosen.items()))
    for at, picked in chosen.items():
        told.findings += _frames(alive[at], sorted(picked), counter)
    return told


def detection(share: float, sample: int) -> float:
    """The probability that a sample of so many leaves meets damage of this share of all leaves."""
    return 1 - (1 - share) ** sample


class _Counter:
    """Counts the bytes that several threads have read, and tells who watches."""

    def __init__(self, told: Verified, advance: Advance, total: int) -> None:
        self._told, self._advance, self._total = told, advance, total
        self._lock = threading.Lock()

    def __call__(self, what: str, size: int) -> None:
        with self._lock:
            self._told.read_bytes += size
            self._advance(what, self._told.read_bytes, max(self._total, self._told.read_bytes))


class _Verification:
    """One pass over a whole store."""

    def __init__(self, store: Store, advance: Advance) -> None:
        self._store, self._advance = store, advance
        self._told = Verified()

    def everything(self) -> Verified:
        objects = self._store.objects
        files = [found for folder in (OBJECTS, PACKS, CHECKPOINTS, references.FOLDER) for found in objects.list(folder)]
        total = sum(found.size * (2 if found.key.startswith(PACKS) else 1) for found in files)
        self._count = _Counter(self._told, self._advance, total)
        reach = reachable(self._store)
        by_folder: dict[str, list[str]] = {}
        for found in files:
            by_folder.setdefault(found.key.split("/")[0] + "/", []).append(found.key)
        broken = [finding for folder in (OBJECTS, PACKS) for finding in self._hashed(folder, by_folder.get(folder, []))]
        located: set[str] = set()
        for key in by_folder.get(CHECKPOINTS, []):
            located |= self._checkpoint(key, reach)
        self._told.findings += [finding for finding in broken if finding.key not in located]
        self._references(by_folder.get(references.FOLDER, []))
        known = {finding.key for finding in self._told.findings}
        lost = [_of_error(lost.key, lost.error) for lost in reach.lost]
        self._told.findings += [finding for finding in lost if finding.key not in known]
        self._told.files = len(files)
        self._told.findings.sort(key=lambda finding: (finding.key, finding.tensor or "", finding.leaf or 0))
        return self._told

    def _hashed(self, folder: str, keys: Sequence[str]) -> list[Finding]:
        """The findings over files that are named by their bytes."""

        def look(key: str) -> Finding | None:
            digest = digest_of(key)
            if digest is None:
                return Finding(key=key, kind="damaged", reason=f"expected a name for {folder}; nothing reads it")
            data = self._store.objects.read(key)
            if data is None:
                return None  # collected since it was listed
            self._count(folder[:-1], len(data))
            try:
                checked(folder, digest, data, self._store)
            except IntegrityError as error:
                return _of_error(key, error)
            return None

        with workers(TRANSFERS) as pool:
            return [finding for finding in pool.map(look, keys) if finding]

    def _checkpoint(self, key: str, reach: Reach) -> set[str]:
        """Note the findings of one checkpoint; the keys of the packs in which damage was located."""
        root = root_of(key)
        if root is None:
            reason = f"expected a name for {CHECKPOINTS}; nothing reads it"
            self._told.findings.append(Finding(key=key, kind="damaged", reason=reason))
            return set()
        try:
            checkpoint = open_checkpoint(self._store, root)
        except MissingObject:
            return set()  # collected since it was listed
        except IntegrityError as error:
            self._told.findings.append(_of_error(key, error))
            return set()
        self._told.checkpoints += 1
        found = _frames(checkpoint, range(len(checkpoint.manifest.frames)), self._count)
        if root not in reach.checkpoints:  # garbage, which loses its packs before it goes itself
            found = [finding for finding in found if finding.kind != "missing"]
        self._told.leaves += int(np.sum(checkpoint.manifest.tiles)) // merkle.DIGEST_BYTES
        self._told.findings += found
        return {finding.key for finding in found}

    def _references(self, keys: Iterable[str]) -> None:
        for key in keys:
            entry = self._store.objects.read(key)
            if entry is not None and not references.whole(key, entry):
                reason = "the entry does not hash to its seal"
                self._told.findings.append(Finding(key=key, kind="damaged", reason=reason))


def _stored(checkpoint: Checkpoint, frames: Iterable[int]) -> int:
    """The bytes that the frames take, tiles included."""
    chosen = list(frames)
    return int(np.sum(checkpoint.manifest.frames["size"][chosen]) + np.sum(checkpoint.manifest.tiles[chosen]))


def _frames(checkpoint: Checkpoint, frames: Iterable[int], count: _Counter) -> list[Finding]:
    """The findings over some frames of a checkpoint, tiles included."""
    manifest, objects = checkpoint.manifest, checkpoint.store.objects
    found: list[Finding] = []

    def look(frame: int, stored: memoryview, tile: memoryview) -> None:
        out = np.empty(int(manifest.lengths[frame]), np.uint8)
        try:
            checkpoint.check_tile(frame, tile, checkpoint.read_frame(frame, stored, tile, out))
        except DamagedFrame as error:
            found.append(_of_error(hashed_key(PACKS, bytes.fromhex(error.digest)), error, checkpoint))
        count("frames", len(stored) + len(tile))

    missing = [objects.find(hashed_key(PACKS, digest)) is None for digest in manifest.packs]
    for digest, is_missing in zip(manifest.packs, missing, strict=True):
        if is_missing:
            reason = "the pack is not there"
            key = hashed_key(PACKS, digest)
            found.append(Finding(key=key, kind="missing", reason=reason, checkpoint=checkpoint.root.hex()))
    checkpoint.visit([frame for frame in frames if not missing[manifest.frames["pack"][frame]]], look)
    return found


def _of_error(key: str, error: Exception, checkpoint: Checkpoint | None = None) -> Finding:
    return Finding(
        key=key,
        kind="missing" if isinstance(error, MissingObject) else "damaged",
        reason=str(error),
        checkpoint=checkpoint.root.hex() if checkpoint else None,
        tensor=getattr(error, "tensor", None),
        leaf=getattr(error, "leaf", None),
    )
