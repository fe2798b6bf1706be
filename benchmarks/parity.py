"""Exact arithmetic against plain PyTorch float32: gradients of every model family, and the loss after training.

Gradients are compared at the recipes' own start, one micro-batch each, tensor by tensor: |exact - float32| / |float32|.
Training is quickstart's model for --steps steps from the same weights on the same batches, both sides in this process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.baseline import gradients, load_weights, train_baseline
from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES, Lowered, exact_gradients, lowered, weights_of
from runtime.executors import compiled
from runtime.models.chain import Chain
from runtime.program.build import chain_of
from runtime.program.reference import ReferenceExecutor
from runtime.recipe import Recipe, load_recipe, parse_recipe
from runtime.transition import initialise, train_step

GRADIENT_GOAL = 2e-3
LOSS_GOAL = 0.5
TAIL = 20

MLP = """
name = "digits-mlp"
[model]
family = "mlp"
hidden = [64, 64]
activation = "gelu"
[data]
images = "digits"
[training]
steps = 1
batch = 64
"""


def families() -> dict[str, Recipe]:
    """One recipe a model family, without dropout, whose masks torch draws otherwise."""
    found = {name: load_recipe(RECIPES / f"{name}.toml") for name in ("quickstart", "llama-tiny", "digits-convnet")}
    return {**found, "digits-mlp": parse_recipe(MLP)}


def gradient_rows() -> Iterator[Row]:
    """Worst and median relative error of a tensor's gradient, for each family."""
    for name, recipe in families().items():
        tell(f"gradients of {name}")
        run = lowered(recipe)
        crew = run.crew()
        initialise(crew)
        weights = weights_of(crew)
        size = recipe.training.micro_batch
        inputs, target = run.dataset.batch(recipe.seed, 0, size)
        exact = exact_gradients(run.program, ReferenceExecutor(), weights, inputs, target)
        chain = chain_of(recipe, run.dataset)
        load_weights(chain.blocks, weights)
        plain = gradients(chain, inputs, target)
        errors = {k: float(np.linalg.norm(exact[k] - plain[k]) / np.linalg.norm(plain[k])) for k in plain}
        worst = max(errors, key=lambda k: errors[k])
        goal = Goal(relation="<=", limit=GRADIENT_GOAL)
        yield Row(name=f"{name}: worst gradient ({worst} of {len(errors)})", value=errors[worst], unit="rel", goal=goal)
        yield Row(name=f"{name}: median gradient", value=float(np.median(list(errors.values()))), unit="rel")


def exact_losses(run: Lowered, steps: int) -> tuple[list[float], float]:
    """The training loss of each step and the validation loss at the end, in nats.

    On the compiled executor, which is quicker here; its bytes are the reference executor's.
    """
    crew = run.crew(threads=1, executor=compiled)
    initialise(crew)
    losses, record = [], None
    started = time.monotonic()
    for step in range(steps):
        validation = run.feed.validation(step)
        record, _ = train_step(crew, run=bytes(32), step=step, batch=run.feed.batch(step), validation=validation)
        losses.append(record.loss * 2.0**-44 / record.units)
        if (step + 1) % 20 == 0:
            tell(f"exact step {step + 1}/{steps}: loss {losses[-1]:.4f}, {time.monotonic() - started:.0f} s")
    assert record is not None
    loss, _, _, batches = record.validation
    return losses, loss * 2.0**-44 / batches


def plain_losses(run: Lowered, steps: int) -> tuple[list[float], float]:
    """The same in PyTorch float32, from the same weights."""
    crew = run.crew()
    initialise(crew)
    chain = chain_of(run.recipe, run.dataset)
    losses = list(train_baseline(run.recipe, chain, weights_of(crew), run.feed.batch, steps))
    return losses, plain_validation(run, chain, steps - 1)


def plain_validation(run: Lowered, chain: Chain, step: int) -> float:
    """The mean loss over the validation micro-batches of a step."""
    for block in chain.blocks:
        block.eval()
    with torch.no_grad():
        found = [
            chain.loss(chain.output(torch.from_numpy(x)), torch.from_numpy(y)).item()
            for x, y in run.feed.validation(step)
        ]
    return float(np.mean(found))


def training_rows(steps: int, plot: Path | None) -> Iterator[Row]:
    """The losses of both after training, and their difference."""
    recipe = load_recipe(RECIPES / "quickstart.toml")
    training = replace(recipe.training, steps=steps, validate_every=steps, validation_batches=16)
    schedule = replace(recipe.schedule, warmup=min(recipe.schedule.warmup, steps))
    run = lowered(replace(recipe, training=training, schedule=schedule))
    exact, exact_validation = exact_losses(run, steps)
    plain, plain_validation = plain_losses(run, steps)
    tail = min(TAIL, steps)
    goal = Goal(relation="<=", limit=LOSS_GOAL)
    for name, ours, theirs in (
        (f"mean training loss of the last {tail} of {steps} steps", np.mean(exact[-tail:]), np.mean(plain[-tail:])),
        (f"validation loss after {steps} steps", exact_validation, plain_validation),
    ):
        yield Row(name=f"{name}: exact", value=float(ours), unit="nats")
        yield Row(name=f"{name}: PyTorch float32", value=float(theirs), unit="nats")
        yield Row(name=f"{name}: difference", value=100 * abs(float(ours / theirs) - 1), unit="%", goal=goal)
    if plot is not None:
        draw(exact, plain, plot)


def draw(exact: list[float], plain: list[float], path: Path) -> None:
    """Both loss curves and their relative difference, as a picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    above.plot(plain, label="PyTorch float32", linewidth=3, alpha=0.4)
    above.plot(exact, label="Trueweight, exact", linewidth=1)
    above.set_ylabel("training loss (nats)")
    above.legend()
    below.plot(100 * (np.array(exact) / np.array(plain) - 1), linewidth=1)
    below.axhline(0, color="grey", linewidth=0.5)
    below.set_ylabel("difference (%)")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def tell(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--steps", type=int, default=300, help="training steps; 0 compares gradients only")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw the loss curves, .svg or .png")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows for gradients, then for training."""
    yield from gradient_rows()
    if arguments.steps:
        yield from training_rows(arguments.steps, arguments.plot)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
