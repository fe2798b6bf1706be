"""Evidence: one self-contained file that shows, to whoever has the run's digest, how a worker contradicts itself.

    RunRecord <- SegmentRecord -> StepRecord -> Receipt      what was committed, and the worker's signature under it
    Reveal -> Call, Reveal -> operator digests -> leaves     what the worker said when it was asked, signed again
    RunRecord -> TrainingRecord -> Program -> OpRecord       what it had to compute

Checking recomputes the one element from the operands that the worker itself revealed, or shows that an input is not
what the run had committed to. It needs no store, no replay and no trust in who made the file.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from runtime.data import batch_root
from runtime.program.encoding import HeaderRecord, OpRecord, type_from, unpack
from runtime.program.operators import BY_CODE
from runtime.program.program import Op, leaves
from runtime.program.reference import Refused
from runtime.program.single import element
from runtime.program.training import TrainingRecord
from runtime.program.types import NUMPY, Type
from runtime.tracing import Call, additions
from storage import kernels, merkle
from storage.codec import U32, U64, decode, encode, record, record_digest
from storage.errors import IntegrityError, UsageError
from storage.identity import RECEIPT_DOMAIN, signed
from storage.records import Receipt, RunRecord, SegmentRecord, StepRecord, TensorEntry
from verification.pinpoint import Finding, Narrowing
from verification.traces import REVEAL_DOMAIN, Reveal

LARGEST = 64 << 20
"""Bytes of the largest file that is read."""


class FalseEvidence(UsageError):
    """The file does not show what it claims."""

    exit_code = 1


@record(kind=142)
class Item:
    """Number `index` of the `count` items of a list, with its path to the list's root (RFC 6962)."""

    index: U32
    count: U32
    data: bytes
    path: tuple[bytes, ...]


@record(kind=143)
class ValueLeaf:
    """Leaf `number` of a value of the call, with its path to the value's digest."""

    value: U32
    number: U64
    data: bytes
    path: tuple[bytes, ...]


@record(kind=144)
class Answered:
    """A signed answer and those of its items that matter."""

    reveal: Reveal
    items: tuple[Item, ...]


@record(kind=145)
class Operation:
    """The operator at fault, number `number`: the Program's header, the records of the operator and of those whose
    outputs it takes, and the digests and leaves of what it takes and gives."""

    number: U32
    header: Item
    operators: tuple[Item, ...]
    digests: Answered
    leaves: tuple[ValueLeaf, ...]
    element: U64


@record(kind=146)
class WrongInput:
    """An input that is not what was committed: a tensor's entry in the state before, or the batch of the step."""

    number: U32
    before: Item | None
    entry: Item | None
    batch: tuple[bytes, ...]
    rows: tuple[U64, ...]


@record(kind=141)
class Evidence:
    """What a file of evidence holds; the records are encoded as they were committed."""

    run: bytes
    segment: bytes
    step: Item
    receipt: Item
    training: bytes
    calls: Answered | None
    operation: Operation | None
    wrong: WrongInput | None
    claim: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a file of evidence shows. `proven` is what was recomputed here, "" where that takes a replay."""

    run: bytes
    segment: bytes
    step: int
    worker: str
    address: bytes
    proven: str
    claim: str


# ------------------------------------------------------------------------------------------------------------- making


def make_evidence(
    finding: Finding, narrowing: Narrowing, state: Callable[[], Sequence[TensorEntry]] | None
) -> Evidence:
    """The evidence for a finding that names a worker; `state` gives the entries of the state before the step."""
    history, said = narrowing.history, narrowing.answers
    segment = history.segments()[narrowing.segment]
    steps = history.items(segment.steps_object)
    at = narrowing.step - segment.first_step
    receipts = [item for item in history.items(segment.receipts_object) if decode(Receipt, item).step == narrowing.step]
    calls = said.get("calls")
    call: bytes | None = said.get("call")
    return Evidence(
        run=encode(history.run),
        segment=encode(segment),
        step=_item(steps, at),
        receipt=_item(receipts, receipts.index(encode(said["receipt"]))),
        training=encode(narrowing.program.header),
        calls=None
        if calls is None or calls.reveal is None or call is None
        else Answered(reveal=calls.reveal, items=(_item(calls.items, calls.items.index(call)),)),
        operation=_operation(finding, narrowing) if finding.element and "operators" in said else None,
        wrong=_wrong(narrowing, steps, at, state) if finding.element and "operators" not in said else None,
        claim="; ".join(f"{level.level}: {level.at}" for level in finding.path),
    )


def _operation(finding: Finding, narrowing: Narrowing) -> Operation | None:
    said, theirs = narrowing.answers, narrowing.theirs
    assert finding.element is not None
    assert theirs is not None
    program, answer, place = said["program"], said["operators"], said["place"].partition("/")[2]
    number = said["value"] - len(program.inputs)
    op = program.ops[number]
    flat = int(np.ravel_multi_index(finding.element.index, op.type.shape)) if op.type.shape else 0
    needed: dict[int, set[int]] = {said["value"]: {flat * _size(op.type) // merkle.LEAF_BYTES}}

    def read(k: int, numbers: np.ndarray) -> np.ndarray:
        if op.name == "constant":
            return np.asarray(np.frombuffer(program.constants[op.attributes["digest"]], NUMPY[op.type.dtype])[numbers])
        value, kind = op.inputs[k], program.types[op.inputs[k]]
        touched = np.unique(numbers * _size(kind) // merkle.LEAF_BYTES).tolist()
        needed.setdefault(value, set()).update(touched)
        parts = {n: theirs.leaf(finding.worker, place, value, n) for n in touched}
        return _gather(parts, kind, numbers)

    with suppress(Refused, IndexError):  # what is refused contradicts as well
        element(op, [program.types[v] for v in op.inputs], flat, read)
    shown = []
    for value, numbers in sorted(needed.items()):
        hashes = theirs.leaves(finding.worker, place, value)
        shown += [
            ValueLeaf(
                value=value,
                number=n,
                data=theirs.leaf(finding.worker, place, value, n),
                path=merkle.inclusion_proof(hashes, n),
            )
            for n in sorted(numbers)
        ]
    first = len(program.inputs)
    values = sorted(value for value in needed if value >= first)
    items = leaves(program)
    return Operation(
        number=number,
        header=_item(items, 0),
        operators=tuple(_item(items, 1 + value - first) for value in values),
        digests=Answered(reveal=answer.reveal, items=tuple(_item(answer.items, value - first) for value in values)),
        leaves=tuple(shown),
        element=flat,
    )


def _wrong(
    narrowing: Narrowing, steps: Sequence[bytes], at: int, state: Callable[[], Sequence[TensorEntry]] | None
) -> WrongInput | None:
    """What the state before, or the batch, says of the input; None for one that only a replay gives."""
    said = narrowing.answers
    place, number = said["place"].split("/"), said["value"]
    block = next((int(part.removeprefix("block ")) for part in place if part.startswith("block ")), None)
    if block is not None and state is not None and number < len(narrowing.program.blocks[block].tensors):
        entries = [encode(entry) for entry in state()]
        name = f"weight/{narrowing.program.blocks[block].tensors[number]}"
        index = next(n for n, entry in enumerate(entries) if decode(TensorEntry, entry).name == name)
        return WrongInput(
            number=number,
            before=_item(steps, at - 1) if at else None,
            entry=_item(entries, index),
            batch=(),
            rows=(),
        )
    if block == 0 and place[-1] == "forward" and narrowing.batch is not None:
        batch = narrowing.batch(narrowing.step)
        whole = [np.ascontiguousarray(array) for array in (batch.inputs, batch.targets)]
        if sum(array.nbytes for array in whole) <= LARGEST // 4:
            shape = tuple(size for array in whole for size in (len(array.shape), *array.shape))
            kinds = ",".join(str(array.dtype) for array in whole).encode()
            return WrongInput(
                number=number, before=None, entry=None, batch=(kinds, *(a.tobytes() for a in whole)), rows=shape
            )
    return None


def _item(items: Sequence[bytes], index: int) -> Item:
    hashes = [merkle.leaf_hash(item) for item in items]
    return Item(index=index, count=len(items), data=items[index], path=merkle.inclusion_proof(hashes, index))


# ----------------------------------------------------------------------------------------------------------- checking


def read_evidence(data: bytes) -> Evidence:
    """The evidence in a file's bytes; UsageError where it is none."""
    if len(data) > LARGEST:
        raise UsageError(f"evidence: expected at most {LARGEST >> 20} MiB, got {len(data)} bytes; ask for another file")
    try:
        return decode(Evidence, data)
    except IntegrityError as error:
        raise UsageError(f"evidence: {error}; make it again with `trueweight pinpoint`") from error


def check_evidence(evidence: Evidence) -> Shown:
    """What the evidence shows; FalseEvidence where it does not show it, UsageError where it is malformed."""
    try:
        return _checked(evidence)
    except UsageError:
        raise
    except Exception as error:  # the file may be anybody's
        raise UsageError(f"evidence: malformed: {error}; make it again with `trueweight pinpoint`") from error


def _checked(evidence: Evidence) -> Shown:
    run, segment = decode(RunRecord, evidence.run), decode(SegmentRecord, evidence.segment)
    run_digest = record_digest(run)
    _require(segment.run == run_digest, "the segment is of another run")
    step = decode(StepRecord, _in(evidence.step, segment.steps_root, "step"))
    _require(evidence.step.count == segment.steps, "the segment has another number of steps")
    receipt = decode(Receipt, _in(evidence.receipt, step.receipts_root, "receipt"))
    _require(receipt.run == run_digest and receipt.step == step.step, "the receipt is of another step or run")
    _require(signed(RECEIPT_DOMAIN, receipt), "the receipt is not signed by its address")
    training = decode(TrainingRecord, evidence.training)
    _require(merkle.leaf_hash(evidence.training) == run.program_root, "the programs are of another run")
    proven = ""
    if evidence.calls is not None:
        (item,) = evidence.calls.items
        call = decode(Call, _answered(evidence.calls, item, receipt))
        if evidence.operation is not None:
            proven = _operator(evidence.operation, call, receipt, training)
        elif evidence.wrong is not None:
            proven = _input(evidence.wrong, call, segment, step, receipt, training)
    return Shown(
        run=run_digest,
        segment=record_digest(segment),
        step=step.step,
        worker=receipt.worker,
        address=receipt.address,
        proven=proven,
        claim=evidence.claim,
    )


def _operator(shown: Operation, call: Call, receipt: Receipt, training: TrainingRecord) -> str:
    """The operator applied to the revealed operands does not give the revealed output: what it gives instead."""
    header = decode(HeaderRecord, _in(shown.header, call.program, "program's header"))
    _require(shown.header.index == 0, "that is not the program's header")
    known = call.program in training.programs or call.program == _additions(header)
    _require(known, "the call is of no Program of the run")
    first, number = len(header.inputs), shown.number
    types = {v: type_from(entry.type) for v, entry in enumerate(header.inputs)}
    codes = {}
    for item in shown.operators:
        codes[item.index - 1] = decode(OpRecord, _in(item, call.program, "operator"))
        types[first + item.index - 1] = type_from(codes[item.index - 1].type)
    _require(number in codes and number < header.operators, "that is no operator of the Program")
    code = codes[number]
    row = BY_CODE[code.code]
    op = Op(name=row.name, inputs=code.inputs, attributes=unpack(row.name, code.attributes), type=types[first + number])
    digests = dict(enumerate(call.inputs))
    for item in shown.digests.items:
        digests[first + item.index] = _answered(shown.digests, item, receipt)
        _require(item.count == header.operators, "the answer is of another number of operators")
    place = call.place.partition("/")[2]
    _require(shown.digests.reveal.question == f"operators {place}", "the operators are of another call")
    if op.name == "constant":
        _require(digests[first + number] != op.attributes["digest"], "the constant is the Program's")
        return f"operator {number} (constant) is not the constant of the Program"
    parts: dict[int, dict[int, bytes]] = {}
    for leaf in shown.leaves:
        parts.setdefault(leaf.value, {})[leaf.number] = leaf.data
        count = -(-types[leaf.value].elements * _size(types[leaf.value]) // merkle.LEAF_BYTES)
        holds = merkle.verify_inclusion(
            kernels.leaf_hashes(leaf.data), leaf.number, count, leaf.path, digests[leaf.value]
        )
        _require(holds, f"a leaf of value {leaf.value} is not below what the worker said")

    def read(k: int, numbers: np.ndarray) -> np.ndarray:
        return _gather(parts[op.inputs[k]], types[op.inputs[k]], numbers)

    said = _gather(parts[first + number], op.type, np.array([shown.element]))
    operands = [types[v] for v in op.inputs]
    _require(_reads(op, operands) <= sum(len(leaf.data) for leaf in shown.leaves), "leaves of operands are missing")
    try:
        right = element(op, operands, shown.element, read)
    except Refused as refusal:
        return f"operator {number} ({op.name}) had to refuse: {refusal.reason}; the worker said {said[0]}"
    right = np.where(np.isnan(right), np.float32("nan"), right) if right.dtype == np.float32 else right
    _require(right.tobytes() != said.tobytes(), "the operator gives what the worker said: it contradicts nothing")
    return (
        f"operator {number} ({op.name}), element {shown.element}: from the operands that the worker revealed it is "
        f"{right[0]} ({_bits(right)}), and the worker said {said[0]} ({_bits(said)})"
    )


def _reads(op: Op, types: Sequence[Type]) -> int:
    """How many elements of its first operand an operator reads for one element of its output."""
    match op.name:
        case "sum" | "max":
            return math.prod(types[0].shape[axis] for axis in op.attributes["axes"])
        case "dot":
            return types[0].shape[-1]
        case "scatter_add":
            return types[0].elements
    return 1


def _input(
    wrong: WrongInput, call: Call, segment: SegmentRecord, step: StepRecord, receipt: Receipt, training: TrainingRecord
) -> str:
    """The input's digest is not the committed one: what that is."""
    place = call.place.split("/")
    block = int(place[2].removeprefix("block "))
    kind = training.kinds[training.blocks[block].kind]
    _require(call.program in (training.programs[kind.forward], training.programs[kind.backward]), "another Program")
    _require(place[0] == f"step {step.step}", "the call is of another step")
    if wrong.entry is not None:
        before = segment.prestate
        if wrong.before is not None:
            earlier = decode(StepRecord, _in(wrong.before, segment.steps_root, "step before"))
            _require(wrong.before.index == step.step - segment.first_step - 1, "that is not the step before")
            before = earlier.state_root
        entry = decode(TensorEntry, _in(wrong.entry, before, "tensor"))
        _require(entry.name == f"weight/{training.blocks[block].tensors[wrong.number]}", "that is another tensor")
        _require(entry.root != call.inputs[wrong.number], "the input is the committed tensor")
        return f"{call.place} took other values for {entry.name} than the state before the step has"
    kinds = wrong.batch[0].decode().split(",")
    shapes, rest = [], list(wrong.rows)
    while rest:
        count = rest.pop(0)
        shapes.append(tuple(rest[:count]))
        rest = rest[count:]
    inputs, targets = (
        np.frombuffer(data, np.dtype(name)).reshape(shape)
        for data, name, shape in zip(wrong.batch[1:], kinds, shapes, strict=True)
    )
    _require(batch_root(inputs, targets) == step.data, "the batch is not the step's")
    number = int(place[1].removeprefix("micro-batch "))
    _require(training.micro_batches > 0, "the training has no micro-batches")
    _require(block == 0 and receipt.worker.startswith("s0r"), "the worker does not take the data")
    size = len(inputs) // training.micro_batches
    rows = np.ascontiguousarray(inputs[number * size : (number + 1) * size])
    _require(merkle.bytes_root(rows.data) != call.inputs[wrong.number], "the input is the step's batch")
    return f"{call.place} took other inputs than micro-batch {number} of the step's batch"


def _additions(header: HeaderRecord) -> bytes:
    """The root of the Program of additions that has these inputs."""
    lengths = [i.type.shape[0] for i in header.inputs if i.name.startswith("part 0, ") and len(i.type.shape) == 1]
    parts, odd = divmod(len(header.inputs), max(len(lengths), 1))
    return additions(tuple(lengths), parts).root if lengths and not odd else b""


def _in(item: Item, root: bytes, what: str) -> bytes:
    holds = merkle.verify_inclusion(merkle.leaf_hash(item.data), item.index, item.count, item.path, root)
    _require(holds, f"the {what} is not in what was committed")
    return item.data


def _answered(answer: Answered, item: Item, receipt: Receipt) -> bytes:
    reveal = answer.reveal
    same = (reveal.run, reveal.step, reveal.worker, reveal.address)
    _require(same == (receipt.run, receipt.step, receipt.worker, receipt.address), "an answer is of another worker")
    _require(signed(REVEAL_DOMAIN, reveal), "an answer is not signed by the worker")
    return _in(item, reveal.answer, "item")


def _gather(parts: dict[int, bytes], kind: Type, numbers: np.ndarray) -> np.ndarray:
    """Elements out of some leaves of a value."""
    size = _size(kind)
    each = merkle.LEAF_BYTES // size
    arrays = {n: np.frombuffer(data, NUMPY[kind.dtype]) for n, data in parts.items()}
    return np.array([arrays[int(at) // each][int(at) % each] for at in numbers], NUMPY[kind.dtype])


def _size(kind: Type) -> int:
    return NUMPY[kind.dtype].itemsize


def _bits(array: np.ndarray) -> str:
    return f"0x{array.tobytes()[::-1].hex()}"


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise FalseEvidence(f"evidence refused: {why}; it shows nothing")
