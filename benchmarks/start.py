"""How long the compiled executor takes to get ready for the quickstart, with an empty kernel cache and with a full one.

Each start is a process of its own. What is counted is making the executor, its known-answer vectors included, and a
first step's time above that of later steps: planning, compiling or loading every kernel of the training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES, Lowered, lowered
from runtime.executors import compiled
from runtime.program.training import TrainingProgram
from runtime.recipe import load_recipe
from runtime.transition import initialise, train_step

LATER = 4
WARM = 3


def child(program: Path) -> None:
    """Prints the seconds that getting ready took, as JSON."""
    recipe = load_recipe(RECIPES / "quickstart.toml")
    run = lowered(recipe)  # for the data; the programs are the parent's
    ready = Lowered(recipe=recipe, dataset=run.dataset, program=TrainingProgram.decode(program.read_bytes()))
    started = time.perf_counter()
    crew = ready.crew(threads=1, executor=compiled)
    initialise(crew)
    made = time.perf_counter() - started
    steps = []
    for step in range(1 + LATER):
        started = time.perf_counter()
        train_step(crew, run=bytes(32), step=step, batch=ready.feed.batch(step))
        steps.append(time.perf_counter() - started)
    print(json.dumps(made + steps[0] - statistics.median(steps[1:])))


def measure(_arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds of a cold start and the median of warm ones."""
    with TemporaryDirectory() as name:
        program = Path(name) / "program"
        program.write_bytes(lowered(load_recipe(RECIPES / "quickstart.toml")).program.encode())
        environment = {**os.environ, "XDG_CACHE_HOME": name}
        spent = []
        for _ in range(1 + WARM):
            command = [sys.executable, "-m", "benchmarks.start", "--child", str(program)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            spent.append(float(json.loads(done.stdout)))
    yield Row(name="cold start: every kernel compiled", value=spent[0], unit="s", goal=Goal(relation="<", limit=60))
    warm = statistics.median(spent[1:])
    yield Row(name="warm start: every kernel read", value=warm, unit="s", goal=Goal(relation="<", limit=3))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
        raise SystemExit(0)
    raise SystemExit(main(measure, __doc__))
