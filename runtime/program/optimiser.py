"""Norm and update Programs of a chunk: exact global norm, clipping, AdamW and SGD on one rounding an operation."""

from __future__ import annotations

from runtime.program import sums
from runtime.program.builder import Builder, Value
from runtime.program.functions import minimum
from runtime.program.program import Program
from runtime.recipe import OptimiserConfig, ScheduleConfig
from runtime.schedule import bias_corrections, learning_rates

NORM_EPS = 1e-6
"""As in torch.nn.utils.clip_grad_norm_: coefficient = clip / (norm + 1e-6), at most 1."""


def slots_of(config: OptimiserConfig) -> tuple[str, ...]:
    """What the optimiser keeps for every weight."""
    return ("m", "v") if config.kind == "adamw" else ("momentum",)


def _mean_gradient(total: Value, micro_batches: int) -> Value:
    g = sums.from_grid(total)
    return g if micro_batches == 1 else g / float(micro_batches)


def exponent_program(elements: int, micro_batches: int) -> Program:
    """G -> the largest biased exponent of the mean gradient."""
    b = Builder()
    g = _mean_gradient(b.input("gradient", "i64", elements), micro_batches)
    return b.finish([(g.bits() & 0x7FFFFFFF).max(0) >> 23])


def square_program(elements: int, micro_batches: int) -> Program:
    """G, E -> the sum of squares of the mean gradient, each rounded to 15 bits on the grid of E."""
    b = Builder()
    total = b.input("gradient", "i64", elements)
    e = sums.row_scale(b.input("exponent", "i32"))
    q = _mean_gradient(total, micro_batches).scale(sums.NORM_BITS - e).rint("i32")
    return b.finish([(q * q).sum(0)])


def _clipped(g: Value, total: Value, exponent: Value, clip: float) -> Value:
    if clip == 0:
        return g
    norm = total.float().sqrt().scale(sums.row_scale(exponent) - sums.NORM_BITS)
    return g * minimum(clip / (norm + NORM_EPS), 1.0)


def update_program(
    elements: int, *, micro_batches: int, steps: int, decay: bool, optimiser: OptimiserConfig, schedule: ScheduleConfig
) -> Program:
    """w, slots, G, total square, E, step -> w, slots. Weight decay is decoupled; tables are constants by step."""
    b = Builder()
    w = b.input("weight", "f32", elements)
    slots = [b.input(slot, "f32", elements) for slot in slots_of(optimiser)]
    total = b.input("gradient", "i64", elements)
    square, exponent, step = b.input("square", "i64"), b.input("exponent", "i32"), b.input("step", "i64")
    g = _clipped(_mean_gradient(total, micro_batches), square, exponent, optimiser.clip)
    rate = b.take(b.constant(learning_rates(optimiser, schedule, steps)), step)
    if optimiser.kind == "adamw":
        m, v = slots
        (beta1, beta2), (first, second) = optimiser.betas, bias_corrections(optimiser.betas, steps)
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + (g * g) * (1 - beta2)
        corrected = (v / b.take(b.constant(second), step)).sqrt() + optimiser.eps
        direction, slots = (m / b.take(b.constant(first), step)) / corrected, [m, v]
    else:
        momentum = slots[0] * optimiser.momentum + g
        direction, slots = (g + momentum * optimiser.momentum if optimiser.nesterov else momentum), [momentum]
    if decay and optimiser.weight_decay:
        direction = direction + w * optimiser.weight_decay
    return b.finish([w - direction * rate, *slots])
