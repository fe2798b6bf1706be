"""What tests of runs share: a job that trains in a second, and the suite that every WorkerGroup passes."""

from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from runtime.controller import Controller, Elastic, Ended, Event, Job, Stepped
from runtime.data import open_dataset, prepare
from runtime.executors import Make, reference
from runtime.feed import Feed
from runtime.groups import LocalGroup, WorkerGroup
from runtime.plan import Plan, make_plan
from runtime.program.training import TrainingProgram
from runtime.recipe import Recipe, parse_recipe
from runtime.segments import History, run_names
from runtime.transition import StateView, assemble, crew_names, initialise, restore
from runtime.worker import StageWorker, worker_builder
from storage.store import Store, memory_store

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.program.executor import Executor, Observer
    from runtime.program.program import Program

TINY = """
name = "tiny"
seed = 7
[model]
family = "gpt"
layers = 2
width = 8
heads = 2
dropout = 0.1
[data]
url = "text.txt"
context = 8
validation = 0.2
[training]
steps = 5
batch = 4
micro_batches = 4
segment = 2
validate_every = 2
validation_batches = 2
[optimiser]
learning_rate = 1e-2
[schedule]
kind = "cosine"
warmup = 2
"""
TEXT = "In the beginning was the word, and every word was eight bits long. " * 20


@cache
def tiny_program(steps: int = 5) -> bytes:
    """The encoded TrainingProgram of the tiny recipe, built once: a GPT of two layers with tied embeddings."""
    return _build(memory_store(), tiny_recipe(steps))


def tiny_recipe(steps: int = 5) -> Recipe:
    """The tiny recipe; its text is expected as text.txt beside it."""
    return parse_recipe(TINY.replace("steps = 5", f"steps = {steps}"), source="tiny")


def tiny_job(store: Store, *, name: str = "tiny", steps: int = 5) -> Job:
    """The tiny recipe with data and programs in `store`."""
    recipe = tiny_recipe(steps)
    store.put(recipe.canonical())
    data = _prepare(store, recipe)
    feed = Feed(recipe=recipe, dataset=open_dataset(store, data))
    encoded = tiny_program(steps)
    program = TrainingProgram.decode(encoded)
    return Job(name=name, feed=feed, program=program, programs=store.put(encoded), data=data)


def train(
    store: Store,
    job: Job,
    *,
    group: WorkerGroup | None = None,
    plan: Plan | None = None,
    stop_before: int | None = None,
    keys: str = "",
    threads: int = 1,
    elastic: Elastic | None = None,
    watch: Callable[[Event], None] = lambda _: None,
) -> Ended:
    """The job trained, from where its run in the store stands; asked to stop before step `stop_before`.

    `watch` is told every event.
    """
    history = History.open(store, job.name) if job.name in run_names(store) else None
    done = history.position().next_step if history else 0

    def observe(event: Event) -> None:
        nonlocal done
        if isinstance(event, Stepped):
            done = event.record.step + 1
        watch(event)

    return Controller(
        store=store,
        job=job,
        group=group or local_group(),
        plan=plan or plan_for(job),
        history=history,
        keys=keys,
        threads=threads,
        elastic=elastic,
        observe=observe,
        stop=lambda: stop_before is not None and done >= stop_before,
    ).run()


@cache
def _remembering() -> "Callable[[], Executor]":
    from runtime.program.reference import ReferenceExecutor

    outputs: dict[bytes, list[Tensor]] = {}

    class Remembering(ReferenceExecutor):
        """The reference executor, which looks up what some executor of this process was given before."""

        def run(
            self, program: "Program", inputs: "Sequence[Tensor]", observe: "Observer | None" = None, *, stable: int = 0
        ) -> "list[Tensor]":
            if observe is not None:
                return super().run(program, inputs, observe, stable=stable)
            self._check(program, inputs)
            digest = sha256(program.root)
            for tensor in inputs:  # their types are the program's
                digest.update(tensor.contiguous().numpy().data)
            key = digest.digest()
            if key not in outputs:
                outputs[key] = super().run(program, inputs, stable=stable)
            return [tensor.clone() for tensor in outputs[key]]

    return Remembering


def remembered(threads: int) -> "Executor":
    """A reference executor that computes nothing twice: for tests of what happens around the arithmetic.

    Equal bytes in give equal bytes out, so whoever hands a Program other bytes has them computed. Tests of executors,
    and replays that judge a run, compute everything.
    """
    reference(threads)
    return _remembering()()


def local_group(make: Make = remembered) -> LocalGroup:
    """Workers in this process, with reference executors that remember unless told otherwise."""
    return LocalGroup(worker_builder(make))


def workers_of(kind: type[StageWorker]) -> LocalGroup:
    """Workers in this process that are of another class: what cheats and faults are made of."""
    build = worker_builder(remembered)

    def made(config: bytes) -> StageWorker:
        worker = build(config)
        worker.__class__ = kind
        return worker

    return LocalGroup(made)


def plan_for(job: Job, *, stages: int = 1, replicas: int = 1, shares: tuple[int, ...] | None = None) -> Plan:
    """A plan for the job's blocks and micro-batches."""
    return make_plan(
        blocks=len(job.program.blocks),
        stages=stages,
        replicas=replicas,
        micro_batches=job.feed.recipe.training.micro_batches,
        shares=shares,
    )


def check_worker_group(group: WorkerGroup, job: Job, programs: bytes) -> None:
    """The suite that every WorkerGroup passes, over two stages of two replicas; AssertionError where it fails."""
    plan = plan_for(job, stages=2, replicas=2)
    crew = assemble(group, plan=plan, program=job.program, programs=programs, seed=7, keys="", threads=1)
    root = initialise(crew)
    state = {name: np.array(array) for name, array in StateView(crew).items()}
    assert set(state) == set(crew_names(crew))
    restore(crew, {name: array * 0 for name, array in state.items()})
    assert not any(array.any() for array in StateView(crew).values())
    assert initialise(crew) == root
    first, second = crew.workers[0], crew.workers[-1]
    shared = group.share(np.arange(3))
    assert [value.tolist() for value in group.get([shared])] == [[0, 1, 2]]
    one, two = (group.call(worker, "fetch", "weight", 0) for worker in (first, second))
    assert all(isinstance(value, dict) for value in group.get([one, two]))
    (bundle,) = group.call(first, "gradients", 0, crew.layout.shares, 0, returns=len(crew.layout.owners_for(first)))[:1]
    assert group.get([bundle]) == [{}]
    assert group.wait([bundle, one], 1.0) == [(0, None), (1, None)]
    group.stop([second])
    group.stop()
    group.stop()


def _prepare(store: Store, recipe: Recipe) -> bytes:
    with TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(TEXT, encoding="utf-8")
        return prepare(recipe.data, store, folder=Path(folder))


def _build(store: Store, recipe: Recipe) -> bytes:
    from runtime.program.build import build_training_program

    return build_training_program(recipe, open_dataset(store, _prepare(store, recipe))).encode()
