"""Demands for data that a segment commits to: what is open on a ledger, and the leaf with which it is answered.

The ledger names a leaf by the root of its tree: of a state (a leaf is a tensor's entry), of a segment's steps, or of a
tensor of the state (4 KiB of its bytes).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ledger.port import NATIVE, Account, Event, Leaf, Ledger, Run, Segment, Tree
from ledger.rules import demand_name
from runtime.segments import History
from storage import merkle
from storage.checkpoints import Checkpoint, open_checkpoint
from storage.codec import encode
from storage.errors import FailureError, TrueweightError, UsageError
from storage.manifest import itemsize, tensor_bytes
from storage.proofs import prove
from storage.records import SegmentRecord, TensorEntry


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A demand for leaf `index` of the `count` below `root`; to be answered before `until`."""

    segment: Segment
    record: SegmentRecord
    tree: Tree
    root: bytes
    index: int
    count: int
    account: Account
    until: int

    def __str__(self) -> str:
        return f"segment {self.record.index}: leaf {self.index} of {self.count} of {self.tree.name.lower()}"


def open_demands(ledger: Ledger, events: Iterable[Event], segment: Segment, record: SegmentRecord) -> list[Demand]:
    """The demands on a segment that wait for an answer, in the order in which they were made."""
    found: dict[bytes, Demand] = {}
    for event in events:
        if event.name != "Demanded" or event.args["segment"] != segment.name:
            continue
        args = event.args
        name = demand_name(segment, args["root"], args["index"], args["count"])
        state = ledger.read("demand_of", name)
        if state.account != NATIVE:
            found[name] = Demand(
                segment=segment,
                record=record,
                tree=Tree(args["tree"]),
                root=args["root"],
                index=args["index"],
                count=args["count"],
                account=state.account,
                until=state.until,
            )
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `demand` takes: the tree, the leaf's number, and where the tree is a tensor's its entry in the state."""

    tree: Tree
    index: int
    entry: Leaf

    @classmethod
    def of(cls, history: History, terms: Run, record: SegmentRecord, tree: Tree, index: int, tensor: str) -> "Wanted":
        """The demand for a leaf; UsageError where there is no such one. A tensor's needs the state's manifest."""
        if (tree == Tree.TENSOR) != bool(tensor):
            raise UsageError(f"--tree {tree.name.lower()}: expected --tensor NAME with tensor and no other; correct it")
        entry, count = Leaf(), terms.tensors if tree == Tree.STATE else record.steps
        if tree == Tree.TENSOR:
            checkpoint = open_checkpoint(history.store, record.poststate)
            number = checkpoint.number(tensor)
            entry, count = _entry(checkpoint, number), _leaves(checkpoint.manifest.tensors[number])
        if not 0 <= index < count:
            raise UsageError(f"--leaf {index}: expected one below {count}, the leaves of that tree; correct it")
        return cls(tree=tree, index=index, entry=entry)


def answer_to(history: History, demand: Demand) -> tuple[bytes, tuple[bytes, ...]]:
    """(leaf, proof) that answer a demand, from the run's store; FailureError where the store has not got them."""
    try:
        data, proof = _shown(history, demand)
    except TrueweightError as error:
        raise FailureError(f"{demand}: expected its data in the store, got {error}") from error
    leaf = merkle.leaf_hash(data)
    if not merkle.verify_inclusion(leaf, demand.index, demand.count, proof, demand.root):
        raise FailureError(f"{demand}: the store's data are others than were committed; restore it from a copy")
    return data, proof


def _shown(history: History, demand: Demand) -> tuple[bytes, tuple[bytes, ...]]:
    if demand.tree == Tree.STEPS:
        return _item(history.items(demand.record.steps_object), demand.index)
    checkpoint = open_checkpoint(history.store, demand.record.poststate)
    tensors = checkpoint.manifest.tensors
    if demand.tree == Tree.STATE:
        return _item([encode(entry) for entry in tensors], demand.index)
    asked = (demand.root, demand.count)
    name = next((entry.name for entry in tensors if (entry.root, _leaves(entry)) == asked), "")
    if not name:
        raise FailureError(f"no tensor of root {demand.root.hex()}; restore the store from a copy")
    entry = tensors[checkpoint.number(name)]
    flat = demand.index * (merkle.LEAF_BYTES // itemsize(entry))
    at = [int(part) for part in np.unravel_index(flat, entry.shape)] if entry.shape else []
    proof = prove(checkpoint, name, at)
    return bytes.fromhex(proof["leaf"]["bytes"]), tuple(bytes.fromhex(digest) for digest in proof["leaf_path"])


def _item(items: Iterable[bytes], index: int) -> tuple[bytes, tuple[bytes, ...]]:
    whole = list(items)
    if index >= len(whole):
        raise FailureError(f"a list of {len(whole)}; restore the store from a copy")
    return whole[index], merkle.inclusion_proof([merkle.leaf_hash(item) for item in whole], index)


def _entry(checkpoint: Checkpoint, number: int) -> Leaf:
    entries = [encode(entry) for entry in checkpoint.manifest.tensors]
    data, proof = _item(entries, number)
    return Leaf(data=data, index=number, count=len(entries), proof=proof)


def _leaves(entry: TensorEntry) -> int:
    return -(-tensor_bytes(entry) // merkle.LEAF_BYTES)
