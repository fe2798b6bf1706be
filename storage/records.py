"""The records of a run. Each is encoded by `storage.codec`; byte tables in docs/formats.md.

    RunRecord <- SegmentRecord -> previous SegmentRecord ...      linked by digests, newest first from Head
                 SegmentRecord -> RecordList of StepRecords, RecordList of Receipts, Checkpoint of the poststate

"Digest" fields that point to an object hold SHA-256 of its bytes; "root" fields hold Merkle roots (`storage.merkle`).
"""

import dataclasses

from storage.codec import I64, U32, U64, Address, Digest, record
from storage.merkle import EMPTY_ROOT

NO_DIGEST = bytes(32)
"""What `SegmentRecord.previous` holds in the first segment."""

LOSS_BITS = 44
"""Losses are integers on the grid of 2**-44 (docs/arithmetic.md, gradients and losses)."""


@record(kind=1)
class RunRecord:
    """Everything that fixes a run's bits, and the state it starts from."""

    name: str
    recipe: Digest
    programs: Digest
    program_root: Digest
    data: Digest
    engine: str
    initial_state: Digest
    initial_checkpoint: Digest
    version: str


@record(kind=2)
class StepRecord:
    """One step: facts that a replay must reproduce, then who was there (`events`, `receipts_root`).

    `loss` sums mean loss x 2**44 over micro-batches; `validation` is empty or (loss sum, hits, count, batches).
    """

    step: U64
    data: Digest
    loss: I64
    units: U32
    gradient_root: Digest
    state_root: Digest
    validation: tuple[I64, ...]
    events: tuple[str, ...]
    receipts_root: Digest

    def __post_init__(self) -> None:
        if len(self.validation) not in (0, 4):
            raise ValueError(f"step {self.step}: expected 0 or 4 validation values, got {len(self.validation)}")


@record(kind=3)
class Receipt:
    """What one worker says it did in one step, signed by its key; `signature` is empty until then."""

    run: Digest
    step: U64
    worker: str
    address: Address
    stage: U32
    units: tuple[U32, ...]
    gradient_root: Digest
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) not in (0, 65):
            raise ValueError(f"receipt of {self.worker}: expected a signature of 65 bytes, got {len(self.signature)}")


@record(kind=4)
class SegmentRecord:
    """A run of steps between two states. `prestate` equals the previous segment's `poststate`.

    `previous` is the digest of the previous SegmentRecord, `NO_DIGEST` in the first; `checkpoint` is the Checkpoint of
    the poststate; `steps_object` and `receipts_object` are the RecordLists of `steps_root` and `receipts_root`.
    """

    run: Digest
    index: U32
    first_step: U64
    steps: U32
    prestate: Digest
    poststate: Digest
    steps_root: Digest
    receipts_root: Digest
    previous: Digest
    checkpoint: Digest
    steps_object: Digest
    receipts_object: Digest


@record(kind=5)
class RecordList:
    """Encoded records in order; their Merkle root is `merkle.list_root(items)`."""

    items: tuple[bytes, ...]


@record(kind=6)
class TensorEntry:
    """A logical tensor: `root` is `merkle.bytes_root` of its little-endian bytes, whatever the sharding or storage."""

    name: str
    dtype: str
    shape: tuple[U64, ...]
    root: Digest


@record(kind=7)
class TensorFrames:
    """A tensor and the objects that hold its bytes: frames of 1 MiB, the last one shorter."""

    entry: TensorEntry
    frames: tuple[Digest, ...]


@record(kind=8)
class Checkpoint:
    """Manifest of a whole state after `step` steps; tensors sorted by name, no name twice."""

    step: U64
    state_root: Digest
    tensors: tuple[TensorFrames, ...]


@record(kind=9)
class Head:
    """The one mutable value of a run: its newest segment and, where it was stopped inside one, the partial segment."""

    run: Digest
    segment: Digest | None
    partial: Digest | None
    status: str


@record(kind=10)
class Partial:
    """An unfinished segment: the encoded StepRecords and Receipts so far and the Checkpoint to go on from."""

    index: U32
    first_step: U64
    checkpoint: Digest
    steps: tuple[bytes, ...]
    receipts: tuple[bytes, ...]


def facts_free(step: StepRecord) -> StepRecord:
    """The part of a step record that an audit compares: no events, no receipts, everything else as it is."""
    return dataclasses.replace(step, events=(), receipts_root=EMPTY_ROOT)
