"""What a replay takes, by the cost model: a host's profile of the run's own Programs, and nothing replayed.

A segment costs its steps on one host: `B (t + loss) + prepare + elements x update` each, and a forward pass of every
validation batch. A worker's units go forward through all blocks, and forward and backward from the last one to the
first of its stage, with each block's weights read once on the way there and once on the way back (`unit_replay`).
What a store takes to send bytes is not known here; what it takes to decompress and hash them is measured. Plans and
kernels of the first micro-batch (`HostProfile.start`) count once for all that is replayed in a process.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from runtime.feed import Feed
from runtime.profiles import RESERVED, HostProfile, make_model
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram
from storage import merkle
from storage.checkpoints import open_checkpoint
from storage.saving import save_state
from storage.store import memory_store
from verification.unit_replay import initial_weights

WEIGHT_BYTES, SUM_BYTES, DIGIT_BYTES = 4, 8, 8
"""Of an element: a weight, a gradient sum, and a weight's packed digits in both orientations."""
_PROBED = 1 << 22
"""Elements of the arrays that rates are measured on."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes a second of f32 weights that are read from a store (in memory), made for the first step, and hashed."""

    stored: float
    made: float
    hashed: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of compute, bytes of memory at most (operators unfused), and bytes of state that are read, raw."""

    seconds: float
    memory: int
    read: int


def measure_rates(
    executor: Executor, program: TrainingProgram, seed: int, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """This host's rates, on a tensor of normal numbers and on the program's largest."""
    array = np.random.default_rng(1).standard_normal(_PROBED).astype(np.float32)
    store = memory_store()
    saved = save_state(store, {"probe": array})
    sizes = _sizes(program)
    largest = max(sizes, key=lambda name: sizes[name])
    make = initial_weights(executor, program, seed)
    make([largest])  # compiles
    return Rates(
        stored=array.nbytes / _seconds(lambda: open_checkpoint(store, saved).load(), clock),
        made=WEIGHT_BYTES * sizes[largest] / _seconds(lambda: make([largest]), clock),
        hashed=array.nbytes / _seconds(lambda: merkle.bytes_root(array.data), clock),
    )


def _seconds(action: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    action()
    return max(clock() - started, 1e-9)


def unit_forecast(
    program: TrainingProgram, profile: HostProfile, rates: Rates, *, blocks: range, micro_batches: int, stored: bool
) -> Forecast:
    """The audit of so many micro-batches of a worker whose stage is `blocks`, after a `stored` state or the initial."""
    kinds = [profile.kinds[block.kind] for block in program.blocks]
    sizes = _sizes(program)
    elements = [sum(sizes[name] for name in set(block.tensors)) for block in program.blocks]
    back = range(blocks.start, len(kinds))
    visits = [*range(len(kinds) - 1), *back]
    read = WEIGHT_BYTES * sum(elements[block] for block in visits)
    owned = {name for block in blocks for name in program.blocks[block].tensors}
    seconds = micro_batches * (
        sum(kind.forward for kind in kinds[:-1]) + profile.unit_seconds([program.blocks[b].kind for b in back])
    )
    seconds += micro_batches * profile.loss + sum(kinds[block].prepare for block in visits)
    seconds += read / (rates.stored if stored else rates.made)
    seconds += SUM_BYTES * sum(sizes[name] for name in owned) / rates.hashed
    memory = RESERVED + _most(program, profile, sizes, blocks, micro_batches)
    return Forecast(seconds=seconds, memory=memory, read=read if stored else 0)


def _sizes(program: TrainingProgram) -> dict[str, int]:
    return {spec.name: math.prod(spec.shape) for spec in program.tensors}


def _most(
    program: TrainingProgram, profile: HostProfile, sizes: Mapping[str, int], blocks: range, micro_batches: int
) -> int:
    """Bytes of arrays on the way back, where there are the most: those of one block, and what lies between blocks."""
    parts = make_model(program, profile).blocks
    most = 0
    for block in range(blocks.start, len(parts)):
        part = parts[block]
        between = sum(one.input_bytes for one in parts[blocks.start : block + 1]) + part.input_bytes
        weights = (WEIGHT_BYTES + DIGIT_BYTES) * sum(sizes[name] for name in part.tensors)
        shared = {name for one in parts[blocks.start : block] for name in one.tensors}
        since = {name for one in parts[block : blocks.stop] for name in one.tensors}
        counted = since & shared | (set(part.tensors) if block in blocks else set())
        sums = SUM_BYTES * sum(sizes[name] for name in counted)
        most = max(most, micro_batches * between + weights + sums + part.handed_bytes + part.working_bytes)
    return most


def segment_forecast(
    program: TrainingProgram, profile: HostProfile, rates: Rates, *, feed: Feed, index: int
) -> Forecast:
    """The audit of one segment on one host, from its stored prestate, or the initial one for the first."""
    model, steps = make_model(program, profile), feed.segment(index)
    span = model.span(0, len(model.blocks))
    state = WEIGHT_BYTES * (1 + model.slots) * span.owned
    training = feed.recipe.training
    due = sum((step + 1) % training.validate_every == 0 for step in steps) if training.validate_every else 0
    forward = sum(profile.kinds[block.kind].forward for block in program.blocks) + profile.loss
    step = model.micro_batches * span.work + span.prepare + span.owned * model.update
    return Forecast(
        seconds=len(steps) * step
        + due * training.validation_batches * forward
        + state / (rates.stored if index else rates.made),
        memory=RESERVED + int(span.memory_bytes(model.slots, 1, 1)) + DIGIT_BYTES * span.held,
        read=state if index else 0,
    )
