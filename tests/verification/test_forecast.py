"""Forecasts: the cost model's sums for units and segments. `benchmarks.audit --parts larger` has them beside audits."""

import dataclasses
import math

import pytest

from runtime.executors import reference
from runtime.profiles import RESERVED, HostProfile, KindProfile, measure
from runtime.program.training import TrainingProgram
from runtime.testing import tiny_job, tiny_program
from storage.store import memory_store
from verification.forecast import Rates, measure_rates, segment_forecast, unit_forecast

PROGRAM = TrainingProgram.decode(tiny_program())
FREE = Rates(stored=math.inf, made=math.inf, hashed=math.inf)


@pytest.fixture(scope="module")
def measured() -> HostProfile:
    return measure(PROGRAM, reference, executor="reference", threads=1, repeats=1)


@pytest.fixture(scope="module")
def profile(measured: HostProfile) -> HostProfile:
    """One of round numbers: each kind 1 s forward and 2 s backward, the loss 10 s."""
    kind = KindProfile(forward=1.0, backward=2.0, prepare=0.0, handed_bytes=0)
    return dataclasses.replace(measured, kinds=(kind,) * len(PROGRAM.kinds), loss=10.0, update=0.0)


@pytest.mark.parametrize(
    ("blocks", "seconds"),
    [
        (range(4), 3 + 4 * 3 + 10),  # three blocks forward, all four forward again and backward
        (range(2, 4), 3 + 2 * 3 + 10),
        (range(2), 3 + 4 * 3 + 10),  # a first stage needs what comes back from the others
    ],
)
def test_units_go_forward_and_as_far_back_as_the_stage(profile: HostProfile, blocks: range, seconds: float) -> None:
    made = unit_forecast(PROGRAM, profile, FREE, blocks=blocks, micro_batches=5, stored=True)
    assert made.seconds == pytest.approx(5 * seconds)


def test_weights_are_read_on_both_ways_and_prepared_then(profile: HostProfile) -> None:
    rates = dataclasses.replace(FREE, stored=100.0, made=50.0)
    free = unit_forecast(PROGRAM, profile, FREE, blocks=range(2, 4), micro_batches=1, stored=True)
    elements = [
        sum(math.prod(spec.shape) for spec in PROGRAM.tensors if spec.name in b.tensors) for b in PROGRAM.blocks
    ]
    read = 4 * (sum(elements[:3]) + sum(elements[2:]))
    assert free.read == read
    stored = unit_forecast(PROGRAM, profile, rates, blocks=range(2, 4), micro_batches=1, stored=True)
    assert stored.seconds - free.seconds == pytest.approx(read / 100)
    made = unit_forecast(PROGRAM, profile, rates, blocks=range(2, 4), micro_batches=1, stored=False)
    assert (made.read, made.seconds - free.seconds) == (0, pytest.approx(read / 50))
    kinds = tuple(dataclasses.replace(kind, prepare=1.0) for kind in profile.kinds)
    prepared = dataclasses.replace(profile, kinds=kinds)
    late = unit_forecast(PROGRAM, prepared, FREE, blocks=range(2, 4), micro_batches=1, stored=True)
    assert late.seconds - free.seconds == pytest.approx(3 + 2)


def test_memory_grows_with_micro_batches_and_has_the_process_in_it(profile: HostProfile) -> None:
    one, many = (
        unit_forecast(PROGRAM, profile, FREE, blocks=range(4), micro_batches=m, stored=True).memory for m in (1, 9)
    )
    assert RESERVED < one < many < RESERVED + 2**24


def test_segments_are_their_steps_and_validations(profile: HostProfile) -> None:
    feed = tiny_job(memory_store()).feed  # five steps in segments of two; every second one is validated on two batches
    step = 4 * (4 * 3 + 10)
    found = [segment_forecast(PROGRAM, profile, FREE, feed=feed, index=index).seconds for index in range(3)]
    assert found == [2 * step + 2 * (4 + 10)] * 2 + [step]


def test_rates_are_bytes_by_the_clock() -> None:
    ticks = iter(range(0, 100, 2))
    found = measure_rates(reference(1), PROGRAM, 7, clock=lambda: float(next(ticks)))
    largest = max(math.prod(spec.shape) for spec in PROGRAM.tensors)
    assert found == Rates(stored=2**24 / 2, made=4 * largest / 2, hashed=2**24 / 2)
