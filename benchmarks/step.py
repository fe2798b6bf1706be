"""Where a training step's time goes on the reference executor, primitive by primitive, beside PyTorch float32.

Whole steps of a recipe on one local worker with one thread, alternating with the same step in PyTorch; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.baseline import train_baseline
from benchmarks.harness import Row, main
from benchmarks.local import RECIPES, lowered, weights_of
from runtime.program.build import chain_of
from runtime.program.reference import ReferenceExecutor
from runtime.recipe import load_recipe
from runtime.transition import initialise, train_step


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--recipe", type=Path, default=RECIPES / "quickstart.toml", help="the recipe to take steps of")
    parser.add_argument("--steps", type=int, default=5, help="measured steps after one that warms up")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Medians of a whole step, then seconds a step by primitive in descending order."""
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe)
    run = lowered(recipe, arguments.recipe.parent)
    profile: dict[str, float] = {}
    crew = run.crew(executor=lambda _: ReferenceExecutor(profile=profile))
    initialise(crew)
    plain = train_baseline(recipe, chain_of(recipe, run.dataset), weights_of(crew), run.feed.batch, arguments.steps + 1)
    exact_times, plain_times = [], []
    for step in range(arguments.steps + 1):
        batch = run.feed.batch(step)
        if step == 1:
            profile.clear()
        exact_times.append(seconds(partial(train_step, crew, run=bytes(32), step=step, batch=batch)))
        plain_times.append(seconds(lambda: next(plain)))
    exact, float32 = statistics.median(exact_times[1:]), statistics.median(plain_times[1:])
    yield Row(name="exact step, reference executor", value=exact, unit="s")
    yield Row(name="the same step, PyTorch float32", value=float32, unit="s")
    ratios = [a / b for a, b in zip(exact_times[1:], plain_times[1:], strict=True)]
    yield Row(name="exact / float32, median of pairs", value=statistics.median(ratios), unit="x")
    for name, spent in sorted(profile.items(), key=lambda item: -item[1]):
        yield Row(name=f"primitive {name}", value=spent / arguments.steps, unit="s")
    other = sum(exact_times[1:]) - sum(profile.values())
    yield Row(name="sums of gradients, hashing, everything else", value=other / arguments.steps, unit="s")


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
