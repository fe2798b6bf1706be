"""Learning rates and AdamW's bias corrections as committed tables, so that nobody recomputes them.

Every table is computed in binary64 by additions, multiplications and divisions alone and rounded to binary32 once, so
that two submitters' machines write the same table whatever their libm.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.recipe import OptimiserConfig, ScheduleConfig

Table = NDArray[np.float32]

COSINE_TERMS = 12  # the next term of the series is under 2^-70 on [0, pi/2]


def learning_rates(optimiser: OptimiserConfig, schedule: ScheduleConfig, steps: int) -> Table:
    """The learning rate of each step, f32 [steps].

    Step t (from 0) of a warm-up of w steps has (t + 1) / w of the peak: the last of them is at the peak. After it the
    rate stays (constant) or falls with p = (t - w) / (steps - w) along a line or half a cosine to floor times the peak,
    which it would reach at t = steps: no step is spent at a rate of zero.
    """
    return np.array(
        [optimiser.learning_rate * share(schedule, step, steps) for step in range(steps)], dtype=np.float64
    ).astype(np.float32)


def share(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at one step, 0 to 1."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / (steps - schedule.warmup)
    if schedule.kind == "constant":
        return 1.0
    height = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + cosine_of_half_turns(progress))
    return schedule.floor + (1.0 - schedule.floor) * height


def cosine_of_half_turns(turns: float) -> float:
    """cos(pi turns) for turns in [0, 1], within 1e-15, by its series: the same bits on every machine."""
    if turns > 0.5:
        return -cosine_of_half_turns(1.0 - turns)
    square = (math.pi * turns) * (math.pi * turns)
    total = 1.0
    for term in range(COSINE_TERMS, 0, -1):
        total = 1.0 - total * square / (2 * term * (2 * term - 1))
    return total


def bias_corrections(betas: tuple[float, float], steps: int) -> tuple[Table, Table]:
    """1 - beta^t for each beta and t = 1 to steps, two f32 [steps]: AdamW divides its moments by them."""
    first, second = (np.array(corrections(beta, steps), dtype=np.float64).astype(np.float32) for beta in betas)
    return first, second


def corrections(beta: float, steps: int) -> list[float]:
    """1 - beta^t for t = 1 to steps, the power by repeated multiplication."""
    power, table = 1.0, []
    for _ in range(steps):
        power *= beta
        table.append(1.0 - power)
    return table
