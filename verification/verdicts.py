"""The witness of a verdict on a ledger: what only a replay of the segment yields.

The segment's beacon, drawn after the commitment, names one call of one of its steps. The witness is a hash of the
digests of all operators' outputs of that call. It is the same for everybody who computes them, on any plan and machine,
and nothing that was published before has it.
"""

from collections.abc import Callable
from hashlib import sha256

from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage import merkle
from storage.records import SegmentRecord
from verification.pinpoint import traces_at
from verification.replay import Replay

_WITNESS = b"trueweight-witness-v1\0"


def witness(
    history: History,
    segment: SegmentRecord,
    beacon: bytes,
    replay: Callable[[], Replay],
    observe: Callable[[str], None] = lambda _: None,
) -> bytes:
    """32 bytes. `replay` gives traced workers on the plan of one worker. Raises what a replay raises."""
    program = TrainingProgram.decode(history.store.get(history.run.programs))
    draw = int.from_bytes(sha256(_WITNESS + beacon).digest(), "big")
    draw, step = divmod(draw, segment.steps)
    draw, micro_batch = divmod(draw, program.micro_batches)
    traces = traces_at(history, segment.index, segment.first_step + step, replay, observe)
    answer = traces.operators("s0r0", f"micro-batch {micro_batch}/block {draw % len(program.blocks)}/forward")
    return sha256(_WITNESS + beacon + merkle.list_root(answer.items)).digest()
