"""Training programs: their bytes, what they refuse, and the optimiser against binary64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.program.build import build_training_program
from runtime.program.operators import OperatorError
from runtime.program.optimiser import exponent_program, slots_of, square_program, update_program
from runtime.program.training import (
    CHUNK,
    BlockSpec,
    KindRecord,
    Sized,
    TensorSpec,
    TrainingFile,
    TrainingProgram,
    TrainingRecord,
    chunk_lengths,
)
from runtime.recipe import OptimiserConfig, ScheduleConfig, parse_recipe
from runtime.schedule import learning_rates
from storage import merkle
from storage.codec import decode, encode
from storage.errors import IntegrityError

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60, database=None)
REFUSALS = (IntegrityError, OperatorError)

RECIPE = """
name = "tiny"
[model]
family = "mlp"
hidden = [6, 6]
dropout = 0.5
[data]
images = "digits"
[training]
steps = 4
batch = 4
micro_batches = 2
"""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What the build needs to know of a dataset."""

    shape: tuple[int, ...] = (1, 2, 3)
    vocab: int = 5
    is_text: bool = False


@cache
def tiny() -> TrainingProgram:
    return build_training_program(parse_recipe(RECIPE), Images())


# bytes ---------------------------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    data = tiny().encode()
    again = TrainingProgram.decode(data)
    assert again == tiny()
    assert again.encode() == data
    assert again.root == tiny().root == merkle.leaf_hash(encode(tiny().header))


def test_the_root_covers_every_program() -> None:
    record = tiny().header
    assert record.programs == tuple(p.root for p in tiny().programs)
    assert len(set(record.programs)) == len(record.programs), "a program twice"


def test_what_it_says_of_the_model() -> None:
    made = tiny()
    assert [(t.name, t.shape, t.decay) for t in made.tensors] == [
        ("block000.linear.bias", (6,), False),
        ("block000.linear.weight", (6, 6), True),
        ("block001.linear.bias", (6,), False),
        ("block001.linear.weight", (6, 6), True),
        ("block002.linear.bias", (5,), False),
        ("block002.linear.weight", (5, 6), True),
    ]
    assert [b.tensors[0] for b in made.blocks] == [f"block00{i}.linear.weight" for i in range(3)]
    assert made.slots == ("m", "v")
    assert made.micro_batches == 2
    for index, spec in enumerate(made.tensors):
        elements = int(np.prod(spec.shape))
        assert [str(t) for t in made.init_program(index, elements).output_types] == [f"f32[{elements}]"]
        assert [str(t) for t in made.update_program(index, elements).output_types] == [f"f32[{elements}]"] * 3
        assert [str(t) for t in made.exponent_program(elements).output_types] == ["i32[]"]
        assert [str(t) for t in made.square_program(elements).output_types] == ["i64[]"]


def test_calling_conventions() -> None:
    made = tiny()
    for index, block in enumerate(made.blocks):
        kind = made.kind_of(index)
        names = [name for name, _ in kind.forward.inputs]
        assert len(names) == len(block.tensors) + 2
        assert names[-2:] == ["x", "rng"]
        assert [n for n, _ in kind.backward.inputs] == [*names, "dy"]
        assert [n for n, _ in kind.evaluate.inputs] == names[:-1]
        assert [t.dtype for t in kind.backward.output_types] == ["f32"] + ["i64"] * len(block.tensors)
        assert len(kind.forward.outputs) == len(kind.evaluate.outputs) == 1
    assert [str(t) for t in made.loss.output_types] == ["i64[]", "f32[2, 5]"]
    assert [str(t) for t in made.metric.output_types] == ["i64[]"] * 3


@given(st.data())
@REPEATABLE
def test_changed_bytes_are_refused_or_another_training(data: st.DataObject) -> None:
    good = tiny().encode()
    changed = bytearray(good)
    header = len(encode(tiny().header))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, header + 8), st.integers(0, len(good) - 1)))
        changed[place] = data.draw(st.integers(0, 255))
    size = data.draw(st.sampled_from([len(good), len(good), len(good) // 2, header]))
    if bytes(changed[:size]) == good:
        return
    try:
        found = TrainingProgram.decode(bytes(changed[:size]))
    except REFUSALS:
        return
    assert found.root != tiny().root


def changed_header(**changes: Any) -> bytes:
    return encode(dataclasses.replace(decode(TrainingFile, tiny().encode()), header=header_with(**changes)))


def header_with(**changes: Any) -> TrainingRecord:
    return dataclasses.replace(tiny().header, **changes)


def spec(**changes: Any) -> TensorSpec:
    return dataclasses.replace(tiny().tensors[0], **changes)


REST = tiny().tensors[1:]
HUGE = (2**63, 2**63)
HEADERS: dict[str, dict[str, Any]] = {
    "loss out of range": {"loss": 99},
    "kind out of range": {"kinds": (KindRecord(forward=0, backward=99, evaluate=0),)},
    "update out of range": {"tensors": (spec(update=(Sized(elements=6, program=99),)), *REST)},
    "no blocks": {"blocks": ()},
    "no micro-batches": {"micro_batches": 0},
    "unknown kind": {"blocks": (BlockSpec(kind=9, tensors=()),)},
    "unknown tensor": {"blocks": (BlockSpec(kind=0, tensors=("nobody",)),)},
    "unsorted tensors": {"tensors": (*REST, tiny().tensors[0])},
    "tensor twice": {"tensors": (tiny().tensors[0], *tiny().tensors)},
    "another length": {"tensors": (spec(shape=(7,)), *REST)},
    "no initial values": {"tensors": (spec(initial=()), *REST)},
    "no norm": {"exponent": ()},
    "a tensor of 2^126 elements": {"tensors": (spec(shape=HUGE), *REST)},
    "other roots": {"programs": (bytes(32), *tiny().header.programs[1:])},
    "a root too many": {"programs": (*tiny().header.programs, bytes(32))},
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_cannot_run_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="training program"):
        TrainingProgram.decode(changed_header(**HEADERS[name]))


def test_a_program_changed_under_its_root_is_refused() -> None:
    file = decode(TrainingFile, tiny().encode())
    swapped = (file.programs[1], file.programs[0], *file.programs[2:])
    with pytest.raises(IntegrityError, match="roots"):
        TrainingProgram.decode(encode(dataclasses.replace(file, programs=swapped)))


@pytest.mark.parametrize("elements", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
def test_chunks(elements: int) -> None:
    lengths = list(chunk_lengths(elements))
    assert sum(lengths) == elements
    assert all(n == CHUNK for n in lengths[:-1])
    assert all(0 < n <= CHUNK for n in lengths)


# optimiser -----------------------------------------------------------------------------------------------------------

STEPS = 20
SCHEDULE = ScheduleConfig(kind="cosine", warmup=3, floor=0.1)
OPTIMISERS = {
    "adamw": OptimiserConfig(learning_rate=3e-3),
    "adamw without clipping": OptimiserConfig(learning_rate=3e-3, clip=0.0),
    "adamw without decay": OptimiserConfig(weight_decay=0.0, betas=(0.5, 0.999), eps=1e-4),
    "sgd": OptimiserConfig(kind="sgd", learning_rate=0.1, momentum=0.9),
    "sgd nesterov": OptimiserConfig(kind="sgd", learning_rate=0.1, momentum=0.8, nesterov=True, clip=0.0),
    "sgd plain": OptimiserConfig(kind="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip=0.5),
}


def reference_step(
    config: OptimiserConfig, w: np.ndarray, slots: list[np.ndarray], g: np.ndarray, norm: float, step: int, decay: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One step in binary64, from the textbook (Loshchilov and Hutter 2019; Sutskever et al. 2013)."""
    rate = float(learning_rates(config, SCHEDULE, STEPS)[step])
    if config.clip:
        g = g * min(1.0, config.clip / (norm + 1e-6))
    if config.kind == "adamw":
        (b1, b2), (m, v) = config.betas, slots
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        first, second = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
        direction, slots = first / (np.sqrt(second) + config.eps), [m, v]
    else:
        momentum = config.momentum * slots[0] + g
        direction, slots = (g + config.momentum * momentum if config.nesterov else momentum), [momentum]
    decayed = w * (1 - rate * config.weight_decay) if decay else w
    return decayed - rate * direction, slots


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser(name: str, micro_batches: int, decay: bool, run_program: Any) -> None:
    config, n = OPTIMISERS[name], 4099
    update = update_program(
        n, micro_batches=micro_batches, steps=STEPS, decay=decay, optimiser=config, schedule=SCHEDULE
    )
    source = np.random.default_rng(1)
    w = source.standard_normal(n).astype(np.float32)
    slots = [np.zeros(n, np.float32) for _ in slots_of(config)]
    exact, exact_slots = w.astype(np.float64), [s.astype(np.float64) for s in slots]
    clipped, tolerance = 0, 4e-6 if config.clip else 1e-6  # the norm is one of 15-bit squares
    for step in range(STEPS):
        size = 10.0 ** source.uniform(-3, 1)
        total = np.rint(source.standard_normal(n) * size * 2.0**44).astype(np.int64)
        mean = total * 2.0**-44 / micro_batches
        (e,) = run_program(exponent_program(n, micro_batches), total)
        (square,) = run_program(square_program(n, micro_batches), total, e)
        norm = float(np.linalg.norm(mean))
        clipped += bool(config.clip) and norm > config.clip
        w, *slots = run_program(update, w, *slots, total, square, e, np.array(step, np.int64))
        exact, exact_slots = reference_step(config, exact, exact_slots, mean, norm, step, decay)
        for found, wanted in ((w, exact), *zip(slots, exact_slots, strict=True)):
            assert found.dtype == np.float32
            assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted), step
    assert bool(config.clip) == (0 < clipped < STEPS)


def test_the_norm_is_as_close_as_its_15_bits(run_program: Any) -> None:
    total = np.rint(np.random.default_rng(2).standard_normal(10_000) * 2.0**40).astype(np.int64)
    (e,) = run_program(exponent_program(10_000, 1), total)
    (square,) = run_program(square_program(10_000, 1), total, e)
    norm = (float(square) * 4.0 ** (int(e) - 126 - 15)) ** 0.5
    assert abs(norm / np.linalg.norm(total * 2.0**-44) - 1) < 1e-6


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_gradient_of_zeros_and_a_step_too_far(kind: str, run_program: Any) -> None:
    from runtime.program.executor import ArithmeticFault

    config = OptimiserConfig(kind=kind, weight_decay=0.0)
    update = update_program(3, micro_batches=1, steps=STEPS, decay=True, optimiser=config, schedule=SCHEDULE)
    w, zeros, total = np.array([1.0, -0.0, 2.0**-140], np.float32), np.zeros(3, np.float32), np.zeros(3, np.int64)
    slots = [zeros for _ in slots_of(config)]
    nothing = (np.array(0, np.int64), np.array(0, np.int32))
    found = run_program(update, w, *slots, total, *nothing, np.array(0, np.int64))
    assert found[0].tobytes() == w.tobytes()
    assert all((s == 0).all() for s in found[1:])
    with pytest.raises(ArithmeticFault, match=rf"take.*\[0, {STEPS}\)"):
        run_program(update, w, *slots, total, *nothing, np.array(STEPS, np.int64))
