"""Units below the step: what one worker signed in the first step of a segment, replayed alone.

The state before that step is a checkpoint, so only the worker's own micro-batches have to be gone through: forward and
backward, as far as they reach, with the weights alone in memory. What it added from others' work, and the update, take
the whole step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from runtime.places import StepFault
from runtime.plan import Plan
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage import merkle
from storage.codec import decode
from storage.errors import TrueweightError, UsageError
from storage.identity import receipt_signer_ok
from storage.records import Receipt, SegmentRecord
from verification.audit import FAILURES, Diverged, Inconclusive, Match, Verdict, printable
from verification.replay import Material, fitting_checkpoint
from verification.unit_replay import UnitReplay, initial_weights, stored_weights

MakeExecutor = Callable[[], Executor]


@dataclass(frozen=True, kw_only=True)
class UnitAudit:
    """The verdict on what `worker` signed in the first step of segment `index`.

    `units` is how many micro-batches were replayed, `share` which part they are of all that the step's workers signed
    for, `seconds` how long it took.
    """

    index: int
    first_step: int
    worker: str
    address: str = ""
    units: int = 0
    share: float = 0.0
    seconds: float
    prestate: str
    poststate: str
    verdict: Verdict


def unit_verdict(
    history: History,
    segments: Sequence[SegmentRecord],
    index: int,
    worker: str,
    make: MakeExecutor,
    material: Material | None = None,
) -> UnitAudit:
    """The audit of one worker's units; whatever keeps it from its end is inconclusive. See `audit_unit`.

    UsageError where the run has no such segment, or the worker signed nothing in its first step.
    """
    segment, started = committed(history, segments, index), perf_counter()
    address, units, share = "", 0, 0.0
    verdict: Verdict = Match()
    try:
        receipts = first_receipts(history, segment)
    except FAILURES as error:
        verdict = _inconclusive(index, worker, error)
    else:
        address = f"0x{_receipt_of(history, segment, receipts, worker).address.hex()}"
        try:
            difference, units = audit_unit(history, segments, index, worker, make, material)
            share = units / max(sum(len(receipt.units) for receipt in receipts), 1)
            verdict = difference or verdict
        except FAILURES as error:
            verdict = _inconclusive(index, worker, error)
    return UnitAudit(
        index=index,
        first_step=segment.first_step,
        worker=worker,
        address=address,
        units=units,
        share=share,
        seconds=perf_counter() - started,
        prestate=segment.prestate.hex(),
        poststate=segment.poststate.hex(),
        verdict=verdict,
    )


def committed(history: History, segments: Sequence[SegmentRecord], index: int) -> SegmentRecord:
    """A segment by its number; UsageError where the run has none such."""
    if not 0 <= index < len(segments):
        raise UsageError(
            f"segment {index}: expected one of the run's {len(segments)} committed segments; see "
            f"`trueweight show {history.name}`"
        )
    return segments[index]


def first_receipts(history: History, segment: SegmentRecord) -> list[Receipt]:
    """What was signed in the first step of a segment, in the order of the records, once for each worker's name."""
    receipts = [decode(Receipt, item) for item in history.items(segment.receipts_object)]
    named: dict[str, Receipt] = {}
    for receipt in receipts:
        if receipt.step == segment.first_step:
            named.setdefault(receipt.worker, receipt)
    return list(named.values())


def first_receipt(history: History, segment: SegmentRecord, worker: str) -> Receipt:
    """What a worker signed in the first step of a segment; UsageError where it signed nothing."""
    return _receipt_of(history, segment, first_receipts(history, segment), worker)


def _receipt_of(history: History, segment: SegmentRecord, receipts: Sequence[Receipt], worker: str) -> Receipt:
    for receipt in receipts:
        if receipt.worker == worker:
            return receipt
    known = ", ".join(receipt.worker for receipt in receipts) or "nobody"
    raise UsageError(
        f"segment {segment.index}: expected a worker that signed its first step ({known}), got {worker!r}; see "
        f"`trueweight show {history.name}`"
    )


def _inconclusive(index: int, worker: str, error: BaseException) -> Inconclusive:
    told = printable(" ".join(str(error).split()))
    kind = "" if isinstance(error, TrueweightError) and told else type(error).__name__
    reason = ": ".join(part for part in (f"segment {index}, worker {printable(worker)}", kind, told) if part)
    return Inconclusive(reason=reason)


def audit_unit(
    history: History,
    segments: Sequence[SegmentRecord],
    index: int,
    worker: str,
    make: MakeExecutor,
    material: Material | None = None,
) -> tuple[Diverged | None, int]:
    """(the first difference of a worker's receipt from a replay of its units, None where it matches; units replayed).

    `make` gives the executor that replays them, `material` is the run's, read where it is not given.
    """
    segment = segments[index]
    receipt = first_receipt(history, segment, worker)
    if found := _contradiction(history, segments, index, receipt):
        return found, 0
    path = f"segment {index}/step {segment.first_step}/{printable(worker)}"
    units = [unit.micro_batch for unit in receipt.units]
    material = material or Material.read(history.store, history.run)
    program = material.program
    if program.root != history.run.program_root:
        roots = program.root.hex(), history.run.program_root.hex()
        return Diverged(path="run/program_root", expected=roots[0], actual=roots[1]), 0
    if not _whole(receipt, program):
        right = f"stages of the run's {len(program.blocks)} blocks"
        return Diverged(path=f"{path}/bounds", expected=right, actual=printable(str(receipt.bounds))), 0
    stage = _stage(receipt)
    if stage is None:
        right = f"a worker of {len(receipt.bounds) - 1} stages of {receipt.replicas} replicas"
        return Diverged(path=f"{path}/worker", expected=right, actual=printable(worker)), 0
    if any(unit >= program.micro_batches for unit in units) or sorted(set(units)) != units:
        return Diverged(path=f"{path}/units", expected="micro-batches of the step", actual=printable(str(units))), 0
    if not units:  # one that came late, or that others were quicker than
        root = merkle.list_root(())
        found = Diverged(path=f"{path}/gradient_root", expected=root.hex(), actual=receipt.gradient_root.hex())
        return None if receipt.gradient_root == root else found, 0
    executor = make()
    if index:
        checkpoint = fitting_checkpoint(history.store, segments[index - 1].poststate, program)
        weights = stored_weights(checkpoint, program)
    else:
        weights = initial_weights(executor, program, material.feed.recipe.seed)
    replay = UnitReplay(
        executor=executor,
        material=material,
        weights=weights,
        step=segment.first_step,
        blocks=range(*receipt.bounds[stage : stage + 2]),
    )
    try:
        replay.run(units)
    except StepFault as fault:
        return Diverged(path=path, expected=f"a fault: {fault}", actual=receipt.gradient_root.hex()), 0
    for mine, other in zip(replay.units, receipt.units, strict=True):
        for name in ("x", "y", "dy", "dx"):
            values = getattr(mine, name), getattr(other, name)
            if values[0] != values[1]:
                at = f"{path}/micro-batch {other.micro_batch}/{name}"
                return Diverged(path=at, expected=values[0].hex(), actual=values[1].hex()), len(units)
    if replay.gradient_root != receipt.gradient_root:
        given = replay.gradient_root.hex(), receipt.gradient_root.hex()
        return Diverged(path=f"{path}/gradient_root", expected=given[0], actual=given[1]), len(units)
    return None, len(units)


def stage_of(receipt: Receipt, program: TrainingProgram) -> range | None:
    """The blocks that a receipt's worker had; None where its plan is none of this program, or has no such worker."""
    stage = _stage(receipt) if _whole(receipt, program) else None
    return None if stage is None else range(*receipt.bounds[stage : stage + 2])


def _whole(receipt: Receipt, program: TrainingProgram) -> bool:
    """Whether the stages of a receipt's plan are all blocks, each once."""
    ends = (*receipt.bounds[:1], *receipt.bounds[-1:], len(receipt.bounds) > 1)
    return ends == (0, len(program.blocks), True) and list(receipt.bounds) == sorted(set(receipt.bounds))


def _stage(receipt: Receipt) -> int | None:
    """The stage that a worker's id tells; None where its plan has no such worker."""
    try:
        stage, replica = Plan.place(receipt.worker)
    except ValueError:
        return None
    return stage if stage < len(receipt.bounds) - 1 and replica < receipt.replicas else None


def _contradiction(
    history: History, segments: Sequence[SegmentRecord], index: int, receipt: Receipt
) -> Diverged | None:
    """Where the records contradict themselves: other receipts than were committed to, another start, no signature."""
    segment = segments[index]
    root = merkle.list_root(history.items(segment.receipts_object))
    if root != segment.receipts_root:
        path = f"segment {index}/receipts_root"
        return Diverged(path=path, expected=root.hex(), actual=segment.receipts_root.hex())
    before = segments[index - 1].poststate if index else history.run.initial_state
    if before != segment.prestate:
        return Diverged(path=f"segment {index}/prestate", expected=before.hex(), actual=segment.prestate.hex())
    path = f"segment {index}/step {receipt.step}/receipt of {printable(receipt.worker)}"
    if receipt.run != history.run_digest:
        return Diverged(path=path, expected="a step of this run", actual="another")
    if not receipt_signer_ok(receipt):
        return Diverged(path=path, expected=f"signed by {receipt.address.hex()}", actual="not so")
    return None
