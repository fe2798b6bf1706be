"""A whole training step beside PyTorch: eager float32, torch.compile float32, eager bfloat16 autocast, and exact.

Forward and backward of every micro-batch, then the update, all sides in turn on the same weights and batches: medians,
and medians of the ratios pair by pair. Ours hashes the gradient and the new state as well, as training does. The models
are GPTs without dropout: torch's CPU attention is fused only without, so this is where PyTorch is strongest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.baseline import load_weights, make_optimiser, update
from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES, Lowered, lowered, weights_of
from runtime.executors import torch_threads
from runtime.groups import LocalGroup
from runtime.models.chain import Chain
from runtime.models.initial import named_parameters
from runtime.plan import make_plan
from runtime.program.build import chain_of
from runtime.program.compiler.executor import CompiledExecutor
from runtime.recipe import Recipe, load_recipe
from runtime.schedule import learning_rates
from runtime.transition import Crew, assemble, initialise, train_step
from runtime.worker import StageWorker, worker_builder
from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT and its micro-batch, with the least ratios that we want to PyTorch's (our speed over theirs)."""

    base: str
    layers: int
    width: int
    heads: int
    context: int
    sequences: int
    micro_batches: int
    goals: tuple[tuple[str, float], ...]


SLOW = ("compile", "bfloat16")
"""The sides that may be left out."""
SMALL = (("eager float32", 1.5), ("torch.compile float32", 1.2), ("eager bfloat16", 0.7))
SHAPES = {
    "gpt-256": Shape(
        base="quickstart",
        layers=4,
        width=256,
        heads=4,
        context=256,
        sequences=4,
        micro_batches=4,
        goals=(("eager float32", 1.2),),
    ),
    "gpt2-small-512": Shape(
        base="gpt2-small",
        layers=12,
        width=768,
        heads=12,
        context=512,
        sequences=1,
        micro_batches=4,
        goals=SMALL,
    ),
    "gpt2-small-1024": Shape(
        base="gpt2-small",
        layers=12,
        width=768,
        heads=12,
        context=1024,
        sequences=1,
        micro_batches=2,
        goals=SMALL,
    ),
}

Step = Callable[[int], None]


def recipe_of(shape: Shape, dropout: float = 0.0) -> Recipe:
    """The shape as a recipe: some two thousand tokens a step."""
    read = load_recipe(RECIPES / f"{shape.base}.toml")
    model: Any = read.model
    return replace(
        read,
        model=replace(model, layers=shape.layers, width=shape.width, heads=shape.heads, dropout=dropout),
        data=replace(read.data, context=shape.context),
        training=replace(
            read.training,
            batch=shape.sequences * shape.micro_batches,
            micro_batches=shape.micro_batches,
            validation_batches=1,
        ),
    )


# --------------------------------------------------------------------------------------------------------------- peers


def peer(
    recipe: Recipe, chain: Chain, start: dict[str, NDArray[np.float32]], run: Lowered, *, compiled: bool, half: bool
) -> Step:
    """A step of plain PyTorch from the given weights, compiled as one function of the batch or eager."""
    load_weights(chain.blocks, start)
    parameters = list(named_parameters(chain.blocks).values())
    optimiser = make_optimiser(recipe.optimiser, chain.blocks)
    rates = learning_rates(recipe.optimiser, recipe.schedule, recipe.training.steps)

    def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return chain.loss(chain.output(x), target)

    called = torch.compile(loss) if compiled else loss

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()

    def step(number: int) -> None:
        batch = run.feed.batch(number)
        count = recipe.training.micro_batches
        for part in (batch.micro_batch(m, count) for m in range(count)):
            x, target = torch.from_numpy(part.inputs.copy()), torch.from_numpy(part.targets.copy())
            with precision():
                value = called(x, target) / count
            value.backward()  # type: ignore[no-untyped-call]
        update(optimiser, parameters, float(rates[number]), recipe.optimiser.clip)

    return step


# ---------------------------------------------------------------------------------------------------------------- ours


class TimedGroup(LocalGroup):
    """Workers in this process that note how long each method took."""

    def __init__(self, build: Callable[[bytes], object]) -> None:
        super().__init__(build)
        self.spent: dict[str, float] = {}

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """The method's result."""
        started = time.perf_counter()
        try:
            return super().call(worker, method, *args, returns=returns)
        finally:
            self.spent[method] = self.spent.get(method, 0.0) + time.perf_counter() - started


class TimedWorker(StageWorker):
    """A worker that notes how long it hashed."""

    hashed = 0.0

    def _roots(self, arrays: Sequence[NDArray[Any]]) -> list[bytes]:
        started = time.perf_counter()
        roots = super()._roots(arrays)
        TimedWorker.hashed += time.perf_counter() - started
        return roots


def exact_crew(run: Lowered, threads: int, profile: dict[str, float]) -> tuple[Crew, TimedGroup]:
    """One worker on the compiled executor."""
    make = worker_builder(lambda count: CompiledExecutor(count, profile=profile), TimedWorker)
    group = TimedGroup(make)
    plan = make_plan(blocks=len(run.program.blocks), micro_batches=run.program.micro_batches)
    programs = run.program.encode()
    crew = assemble(
        group, plan=plan, program=run.program, programs=programs, seed=run.recipe.seed, keys="", threads=threads
    )
    return crew, group


def breakdown(steps: int, profile: dict[str, float], spent: dict[str, float]) -> dict[str, float]:
    """Seconds a step by what they went to; the parts add up to the steps' time in the worker."""
    parts = {name: seconds / steps for name, seconds in profile.items()}
    parts["hashing of gradient and state"] = TimedWorker.hashed / steps
    parts["everything else"] = sum(spent.values()) / steps - sum(parts.values())
    return parts


# ------------------------------------------------------------------------------------------------------------- measure


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which models (default: all)")
    parser.add_argument("--threads", default="1,2", help="thread counts (default: 1,2)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps after two that warm up")
    parser.add_argument("--dropout", type=float, default=0.0, help="on all sides; the recipes have 0.1 (default: none)")
    parser.add_argument("--without", default="", help="leave out some of compile,bfloat16: they take minutes")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows for each shape and thread count."""
    names = arguments.shapes.split(",")
    for name in names:
        if name not in SHAPES:
            raise UsageError(f"--shapes {name}: expected some of {','.join(SHAPES)}; correct it")
    for name in without(arguments):
        if name not in SLOW:
            raise UsageError(f"--without {name}: expected some of {','.join(SLOW)}; correct it")
    for name in names:
        run = lowered(recipe_of(SHAPES[name], arguments.dropout))
        for threads in map(int, arguments.threads.split(",")):
            label = f"{name}, dropout {arguments.dropout:g}" if arguments.dropout else name
            yield from measure_one(label, SHAPES[name], run, threads, arguments)


def without(arguments: argparse.Namespace) -> list[str]:
    """The sides to leave out."""
    return [name for name in arguments.without.split(",") if name]


def measure_one(name: str, shape: Shape, run: Lowered, threads: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one model with one thread count."""
    torch.set_num_threads(threads)
    recipe, label = run.recipe, f"{name}, {threads} thread{'s'[: threads > 1]}"
    profile: dict[str, float] = {}
    crew, group = exact_crew(run, threads, profile)
    initialise(crew)
    start = weights_of(crew)

    def ours(number: int) -> None:
        torch.set_num_threads(torch_threads(threads))
        train_step(crew, run=bytes(32), step=number, batch=run.feed.batch(number))
        torch.set_num_threads(threads)

    def make(*, compiled: bool = False, half: bool = False) -> Step:
        return peer(recipe, chain_of(recipe, run.dataset), start, run, compiled=compiled, half=half)

    sides: dict[str, Step] = {"exact": ours, "eager float32": make()}
    left_out = without(arguments)
    if "bfloat16" not in left_out:
        sides["eager bfloat16"] = make(half=True)
    if "compile" not in left_out:
        sides["torch.compile float32"] = make(compiled=True)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(arguments.steps + 2):
        if number == 2:
            profile.clear()
            group.spent.clear()
            TimedWorker.hashed = 0.0
        for side, step in sides.items():
            started = time.perf_counter()
            step(number)
            if number >= 2:
                times[side].append(time.perf_counter() - started)
    for side, found in times.items():
        yield Row(name=f"{label}: step, {side}", value=statistics.median(found), unit="s")
    goals = dict(shape.goals)
    for side, found in times.items():
        if side != "exact":
            ratios = [theirs / own for theirs, own in zip(found, times["exact"], strict=True)]
            goal = Goal(relation=">=", limit=goals[side]) if side in goals else None
            yield Row(name=f"{label}: exact over {side}", value=statistics.median(ratios), unit="x", goal=goal)
    unhashed = statistics.median(times["exact"]) - TimedWorker.hashed / arguments.steps
    eager = statistics.median(times["eager float32"])
    yield Row(name=f"{label}: exact without its hashing over eager float32", value=eager / unhashed, unit="x")
    for part, seconds in sorted(breakdown(arguments.steps, profile, group.spent).items(), key=lambda item: -item[1]):
        yield Row(name=f"{label}: exact, {part}", value=seconds, unit="s")


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
