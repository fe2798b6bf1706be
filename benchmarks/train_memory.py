"""Peak memory of a training step on the compiled executor beside PyTorch eager float32, each in a process of its own.

Both processes get the same model and batches and take three steps; the operating system tells their peak. Ours holds
i64 sums of gradients and digits of all weights, and keeps what backward needs; PyTorch keeps its own activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.baseline import train_baseline
from benchmarks.harness import Goal, Row, main
from benchmarks.local import lowered
from benchmarks.train_step import SHAPES, recipe_of
from runtime.executors import compiled
from runtime.feed import Batch
from runtime.groups import LocalGroup
from runtime.models.chain import build_chain
from runtime.models.initial import named_parameters
from runtime.models.shape import DataShape
from runtime.plan import make_plan
from runtime.program.training import TrainingProgram
from runtime.transition import assemble, initialise, train_step
from runtime.worker import worker_builder

STEPS = 3


def child(side: str, shape: str, folder: Path) -> None:
    """Takes the steps and prints this process's peak in bytes, and before any of it, as JSON."""
    torch.set_num_threads(1)
    recipe = recipe_of(SHAPES[shape])
    data = np.load(folder / "batch.npz")
    before = _peak()
    if side == "exact":
        programs = (folder / "program").read_bytes()
        program = TrainingProgram.decode(programs)
        crew = assemble(
            LocalGroup(worker_builder(compiled)),
            plan=make_plan(blocks=len(program.blocks), micro_batches=program.micro_batches),
            program=program,
            programs=programs,
            seed=recipe.seed,
            keys="",
            threads=1,
        )
        initialise(crew)
        batch = Batch(inputs=data["inputs"], targets=data["targets"])
        for step in range(STEPS):
            train_step(crew, run=bytes(32), step=step, batch=batch)
    else:
        chain = build_chain(
            recipe.model, DataShape(example=tuple(data["inputs"].shape[1:]), classes=int(data["vocab"]))
        )
        start = {k: p.detach().numpy().copy() * np.float32(0.02) for k, p in named_parameters(chain.blocks).items()}
        list(train_baseline(recipe, chain, start, lambda _: (data["inputs"], data["targets"]), STEPS))
    print(json.dumps({"peak": _peak(), "before": before}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shapes", default="gpt2-small-512,gpt2-small-1024", help="which models of train_step")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Peaks of both sides above what they began with, and their ratio, for each shape."""
    for shape in arguments.shapes.split(","):
        run = lowered(recipe_of(SHAPES[shape]))
        batch = run.feed.batch(0)
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "program").write_bytes(run.program.encode())
            np.savez(folder / "batch.npz", inputs=batch.inputs, targets=batch.targets, vocab=run.dataset.vocab)
            peaks = {}
            for side in ("exact", "eager float32"):
                command = [sys.executable, "-m", "benchmarks.train_memory", "--child", side, shape, name]
                told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                peaks[side] = told["peak"] - told["before"]
                yield Row(name=f"{shape}: peak memory, {side}", value=peaks[side] / 2**30, unit="GiB")
        ratio = peaks["exact"] / peaks["eager float32"]
        yield Row(name=f"{shape}: exact / eager", value=ratio, unit="x", goal=Goal(relation="<=", limit=1.3))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        raise SystemExit(0)
    raise SystemExit(main(measure, __doc__, add_options=add_options))
