"""Learning-rate and bias-correction tables against their definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import schedule
from runtime.recipe import OptimiserConfig, ScheduleConfig

PEAK = OptimiserConfig(learning_rate=0.002)


def rates(steps: int, **keys: object) -> list[float]:
    table = schedule.learning_rates(PEAK, ScheduleConfig(**keys), steps)  # type: ignore[arg-type]
    assert table.dtype == np.float32
    assert table.shape == (steps,)
    return [float(rate) for rate in table]


def test_constant_with_warmup() -> None:
    assert rates(5, warmup=2) == [float(np.float32(rate)) for rate in (0.001, 0.002, 0.002, 0.002, 0.002)]
    assert rates(2) == [float(np.float32(0.002))] * 2


def test_linear_falls_from_the_peak_towards_the_floor() -> None:
    assert rates(6, kind="linear", warmup=2, floor=0.5) == pytest.approx(
        [0.001, 0.002, 0.002, 0.00175, 0.0015, 0.00125], rel=1e-7
    )


def test_cosine_is_half_a_turn() -> None:
    expected = [0.002 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 40))) for step in range(40)]
    assert rates(40, kind="cosine", floor=0.1) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_may_take_every_step(kind: str) -> None:
    assert rates(4, kind=kind, warmup=4) == pytest.approx([0.0005, 0.001, 0.0015, 0.002], rel=1e-7)


@given(st.floats(0, 1))
def test_cosine_series_against_libm(turns: float) -> None:
    assert schedule.cosine_of_half_turns(turns) == pytest.approx(math.cos(math.pi * turns), abs=1e-15)


def test_cosine_is_exact_where_it_is_known() -> None:
    assert schedule.cosine_of_half_turns(0.0) == 1.0
    assert schedule.cosine_of_half_turns(1.0) == -1.0


def test_tables_are_pinned() -> None:
    """The same bits on every machine: the tables are part of the committed programs."""
    cosine = schedule.learning_rates(PEAK, ScheduleConfig(kind="cosine", warmup=3, floor=0.1), 8)
    assert cosine.tobytes().hex() == "3ec32e3a3ec3ae3a6f12033b6f12033b5f9def3ae0a1b43ac073573a85f9c239"
    assert schedule.bias_corrections((0.9, 0.95), 3)[1].tobytes().hex() == "cdcc4c3d14aec73d4a0c123e"


def test_bias_corrections_against_exact_arithmetic() -> None:
    for beta, table in zip((0.9, 0.999), schedule.bias_corrections((0.9, 0.999), 200), strict=True):
        assert table.dtype == np.float32
        exact = [float(1 - Fraction(beta) ** step) for step in range(1, 201)]
        assert table.tolist() == pytest.approx(exact, rel=1.2e-7)
    assert schedule.bias_corrections((0.0, 0.0), 2)[0].tolist() == [1.0, 1.0]
