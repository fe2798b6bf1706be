"""Units below the step: what one worker signed in the first step of a segment, replayed alone.

The state before that step is a checkpoint, so only the worker's own micro-batches have to be gone through: forward and
backward, as far as they reach, with the weights alone in memory. What it added from others' work, and the update, take
the whole step.
"""

from collections.abc import Callable, Sequence

from runtime.places import StepFault
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage.codec import decode
from storage.errors import UsageError
from storage.records import Receipt, SegmentRecord
from verification.audit import Diverged
from verification.replay import Replay

MakeReplay = Callable[[Plan], Replay]


def first_receipt(history: History, segment: SegmentRecord, worker: str) -> Receipt:
    """What a worker signed in the first step of a segment; UsageError where it signed nothing."""
    receipts = [decode(Receipt, item) for item in history.items(segment.receipts_object)]
    first = [receipt for receipt in receipts if receipt.step == segment.first_step]
    for receipt in first:
        if receipt.worker == worker:
            return receipt
    known = ", ".join(receipt.worker for receipt in first) or "nobody"
    raise UsageError(
        f"segment {segment.index}: expected a worker that signed its first step ({known}), got {worker!r}; see "
        f"`trueweight show {history.name}`"
    )


def audit_unit(
    history: History, segments: Sequence[SegmentRecord], index: int, worker: str, make: MakeReplay
) -> tuple[Diverged | None, int]:
    """(the first difference of a worker's receipt from a replay of its units, None where it matches; units replayed).

    `make` gives a replay under a plan.
    """
    segment = segments[index]
    receipt = first_receipt(history, segment, worker)
    path = f"segment {index}/step {segment.first_step}/{worker}"
    units = [unit.micro_batch for unit in receipt.units]
    program = TrainingProgram.decode(history.store.get(history.run.programs))
    stages = (*receipt.bounds[:1], *receipt.bounds[-1:], len(receipt.bounds) > 1)
    if stages != (0, len(program.blocks), True) or list(receipt.bounds) != sorted(set(receipt.bounds)):
        right = f"stages of the run's {len(program.blocks)} blocks"
        return Diverged(path=f"{path}/bounds", expected=right, actual=str(receipt.bounds)), 0
    if not units or max(units) >= program.micro_batches or sorted(set(units)) != units:
        return Diverged(path=f"{path}/units", expected="micro-batches of the step", actual=str(units)), 0
    plan = Plan(bounds=receipt.bounds, replicas=1, units=(0,) * program.micro_batches)
    stage, _ = plan.place(worker)
    replay, alone = make(plan), plan.worker(stage, 0)
    if index:
        replay.load_weights(segments[index - 1].poststate)
    else:
        replay.initial()
    try:
        expected = replay.unit(history.run_digest, segment.first_step, alone, units)
    except StepFault as fault:
        return Diverged(path=path, expected=f"a fault: {fault}", actual=receipt.gradient_root.hex()), 0
    for mine, other in zip(expected.units, receipt.units, strict=True):
        for name in ("x", "y", "dy", "dx"):
            values = getattr(mine, name), getattr(other, name)
            if values[0] != values[1]:
                at = f"{path}/micro-batch {other.micro_batch}/{name}"
                return Diverged(path=at, expected=values[0].hex(), actual=values[1].hex()), len(units)
    if expected.gradient_root != receipt.gradient_root:
        given = expected.gradient_root.hex(), receipt.gradient_root.hex()
        return Diverged(path=f"{path}/gradient_root", expected=given[0], actual=given[1]), len(units)
    return None, len(units)

