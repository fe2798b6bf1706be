"""The records of a run. Each is encoded by `storage.codec`; byte tables in docs/formats.md.

    RunRecord <- SegmentRecord -> previous SegmentRecord ...      linked by digests, newest first from Head
                 SegmentRecord -> RecordList of StepRecords, RecordList of Receipts, checkpoint of the poststate

A Link is the SHA-256 of an object's bytes; roots are Merkle roots (`storage.merkle`), and a State is the root under
which its checkpoint is found (`storage.checkpoints`). What a record names so, it keeps: `storage.reachable` follows.
"""

import dataclasses

from storage.codec import I64, U32, U64, Address, Digest, Link, State, record
from storage.merkle import EMPTY_ROOT

LOSS_BITS = 44
"""Losses are integers on the grid of 2**-44 (docs/arithmetic.md, gradients and losses)."""


@record(kind=1, version=2)
class RunRecord:
    """Everything that fixes a run's bits, and the state it starts from."""

    name: str
    recipe: Link
    programs: Link
    program_root: Digest
    data: Link
    engine: str
    initial_state: State
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


@record(kind=12)
class UnitRecord:
    """One micro-batch through one stage: `merkle.bytes_root` of what came in and what went out, forward and backward.

    `x` of the first stage is the batch's inputs, `y` of the last one the mean loss x 2**44 as an i64. The last stage
    makes its own `dy` and the first one has no `dx`: these are `NO_DIGEST`.
    """

    micro_batch: U32
    x: Digest
    y: Digest
    dy: Digest
    dx: Digest


@record(kind=3, version=3)
class Receipt:
    """What one worker says it did in one step, signed by its key; `signature` is empty until then.

    `bounds` and `replicas` are of the plan that it worked under, and with its id tell its blocks; with the units that
    each replica did they tell its chunks (in version 2 all replicas owned as much). Roots are over its own gradient
    sums, over the chunks of the whole gradient that it owns, and over those of the state that it made from them;
    `exponent` and `square` are what it said of the owned gradient.
    """

    run: Digest
    step: U64
    worker: str
    address: Address
    bounds: tuple[U32, ...]
    replicas: U32
    units: tuple[UnitRecord, ...]
    gradient_root: Digest
    exponent: I64
    reduced_root: Digest
    square: I64
    updated_root: Digest
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) not in (0, 65):
            raise ValueError(f"receipt of {self.worker}: expected a signature of 65 bytes, got {len(self.signature)}")


@record(kind=4, version=2)
class SegmentRecord:
    """A run of steps between two states. `prestate` equals the previous segment's `poststate`.

    `previous` is the digest of the previous SegmentRecord, `NO_DIGEST` in the first; `steps_object` and
    `receipts_object` are the RecordLists of `steps_root` and `receipts_root`.
    """

    run: Digest
    index: U32
    first_step: U64
    steps: U32
    prestate: Digest
    poststate: State
    steps_root: Digest
    receipts_root: Digest
    previous: Link
    steps_object: Link
    receipts_object: Link


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


@record(kind=9)
class Head:
    """The one mutable value of a run: its newest segment and, where it was stopped inside one, the partial segment."""

    run: Link
    segment: Link | None
    partial: Link | None
    status: str


@record(kind=10, version=2)
class Partial:
    """An unfinished segment: the encoded StepRecords and Receipts so far and the state to go on from."""

    index: U32
    first_step: U64
    state: State
    steps: tuple[bytes, ...]
    receipts: tuple[bytes, ...]


@record(kind=11)
class Pin:
    """The value of a reference that keeps one state."""

    state: State


def facts_free(step: StepRecord) -> StepRecord:
    """The part of a step record that an audit compares: no events, no receipts, everything else as it is."""
    return dataclasses.replace(step, events=(), receipts_root=EMPTY_ROOT)
