"""How much a store holds, and how much of it is shared."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from storage import references
from storage.checkpoints import Checkpoint
from storage.leases import FOLDER as LEASES
from storage.local import UNFINISHED
from storage.manifest import tensor_bytes
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store

KINDS = {
    PACKS: "packs",
    CHECKPOINTS: "manifests",
    OBJECTS: "objects",
    references.FOLDER: "references",
    UNFINISHED: "unfinished",
    LEASES: "leases",
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Files and bytes of one kind."""

    kind: str
    files: int
    stored: int


def usage(store: Store) -> list[Usage]:
    """What each kind of file takes; `other` is what a store's folder holds beside them, such as diaries."""
    counts: dict[str, list[int]] = {kind: [0, 0] for kind in (*KINDS.values(), "other")}
    for found in store.objects.list(""):
        count = counts[KINDS.get(found.key.split("/")[0] + "/", "other")]
        count[0] += 1
        count[1] += found.size
    return [Usage(kind=kind, files=files, stored=size) for kind, (files, size) in counts.items() if files]


def logical_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of a checkpoint's tensors."""
    return sum(map(tensor_bytes, checkpoint.manifest.tensors))


def own_bytes(checkpoints: Iterable[Checkpoint]) -> list[tuple[int, int]]:
    """For each checkpoint, (logical, stored) bytes of those of its frames that no earlier one has."""
    seen: set[tuple[bytes, int]] = set()
    found = []
    for checkpoint in checkpoints:
        manifest, logical, stored = checkpoint.manifest, 0, 0
        sizes = manifest.frames["size"].astype(np.int64) + manifest.tiles
        for row, length, size in zip(manifest.frames, manifest.lengths, sizes, strict=True):
            place = manifest.packs[int(row["pack"])], int(row["offset"])
            if place not in seen:
                seen.add(place)
                logical += int(length)
                stored += int(size)
        found.append((logical, stored))
    return found
