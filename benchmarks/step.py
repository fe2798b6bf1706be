"""A training step on the reference and the compiled executor beside PyTorch float32, and where its time goes.

Whole steps of a recipe on one local worker with one thread, all three in turn; medians after a step that warms up.
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
from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES, lowered, weights_of
from runtime.executors import compiled
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
    """Medians of a whole step on each side, then seconds a step by primitive in descending order."""
    torch.set_num_threads(1)
    recipe, steps = load_recipe(arguments.recipe), arguments.steps
    run = lowered(recipe, arguments.recipe.parent)
    profile: dict[str, float] = {}
    crews = {
        "reference executor": run.crew(executor=lambda _: ReferenceExecutor(profile=profile)),
        "compiled executor": run.crew(threads=1, executor=compiled),
    }
    for crew in crews.values():
        initialise(crew)
    start = weights_of(crews["reference executor"])
    plain = train_baseline(recipe, chain_of(recipe, run.dataset), start, run.feed.batch, steps + 1)
    times: dict[str, list[float]] = {name: [] for name in (*crews, "PyTorch float32")}
    for step in range(steps + 1):
        batch = run.feed.batch(step)
        if step == 1:
            profile.clear()
        for name, crew in crews.items():
            times[name].append(seconds(partial(train_step, crew, run=bytes(32), step=step, batch=batch)))
        times["PyTorch float32"].append(seconds(lambda: next(plain)))
    measured = {name: found[1:] for name, found in times.items()}
    for name, found in measured.items():
        yield Row(name=f"step, {name}", value=statistics.median(found), unit="s")
    for name in crews:
        ratios = [a / b for a, b in zip(measured[name], measured["PyTorch float32"], strict=True)]
        yield Row(name=f"{name} / float32, median of pairs", value=statistics.median(ratios), unit="x")
    gains = [a / b for a, b in zip(measured["reference executor"], measured["compiled executor"], strict=True)]
    goal = Goal(relation=">=", limit=20)
    yield Row(name="reference / compiled, median of pairs", value=statistics.median(gains), unit="x", goal=goal)
    yield Row(name="compiled executor: first step, compilation included", value=times["compiled executor"][0], unit="s")
    for name, spent in sorted(profile.items(), key=lambda item: -item[1]):
        yield Row(name=f"reference, primitive {name}", value=spent / steps, unit="s")
    other = sum(measured["reference executor"]) - sum(profile.values())
    yield Row(name="reference, gradient sums, hashing, everything else", value=other / steps, unit="s")


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
