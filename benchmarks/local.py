"""A recipe in this process, without a store on disk: what benchmarks and their peers start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.data import Dataset, open_dataset, prepare
from runtime.executors import reference
from runtime.feed import Feed
from runtime.groups import LocalGroup
from runtime.plan import make_plan
from runtime.program.build import build_training_program
from runtime.program.executor import Executor, Handle
from runtime.program.training import TrainingProgram
from runtime.recipe import Recipe
from runtime.transition import Crew, StateView, assemble
from runtime.worker import worker_builder
from storage.store import memory_store

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A recipe with its data and its programs."""

    recipe: Recipe
    dataset: Dataset
    program: TrainingProgram

    @property
    def feed(self) -> Feed:
        """The recipe's batches."""
        return Feed(recipe=self.recipe, dataset=self.dataset)

    def crew(self, *, threads: int = 0, executor: Callable[[int], Executor] = reference) -> Crew:
        """One local worker for the whole chain, with no state yet."""
        plan = make_plan(blocks=len(self.program.blocks), micro_batches=self.program.micro_batches)
        return assemble(
            LocalGroup(worker_builder(executor)),
            plan=plan,
            program=self.program,
            programs=self.program.encode(),
            seed=self.recipe.seed,
            keys="",
            threads=threads,
        )


def lowered(recipe: Recipe, folder: Path = RECIPES) -> Lowered:
    """The recipe's data prepared and its model lowered; relative paths start in `folder`."""
    store = memory_store()
    dataset = open_dataset(store, prepare(recipe.data, store, folder=folder))
    return Lowered(recipe=recipe, dataset=dataset, program=build_training_program(recipe, dataset))


def weights_of(crew: Crew) -> dict[str, NDArray[np.float32]]:
    """The crew's weights by tensor name."""
    state = StateView(crew)
    return {name: state[f"weight/{name}"] for name in crew.layout.names}


def exact_gradients(
    program: TrainingProgram,
    executor: Executor,
    weights: dict[str, NDArray[np.float32]],
    inputs: NDArray[np.generic],
    target: NDArray[np.generic],
) -> dict[str, NDArray[np.float64]]:
    """The gradient of one micro-batch's mean loss by tensor name, from the integers on the grid 2^-44."""
    held = {name: executor.put(array) for name, array in weights.items()}
    rng = [executor.put(np.array([0, 0, 0, 0, block, 0])) for block in range(len(program.blocks))]

    def parameters(block: int) -> Sequence[Handle]:
        return [held[name] for name in program.blocks[block].tensors]

    activations = [executor.put(inputs)]
    for block in range(len(program.blocks)):
        arguments = [*parameters(block), activations[-1], rng[block]]
        activations += executor.run(program.kind_of(block).forward, arguments)
    _, dy = executor.run(program.loss, [activations.pop(), executor.put(target)])
    found: dict[str, NDArray[np.float64]] = {}
    for block in reversed(range(len(program.blocks))):
        arguments = [*parameters(block), activations.pop(), rng[block], dy]
        results = executor.run(program.kind_of(block).backward, arguments)
        names = program.blocks[block].tensors
        dy = results[0]
        for name, handle in zip(names, results[len(results) - len(names) :], strict=True):
            found[name] = found.get(name, 0.0) + executor.get(handle) * 2.0**-44
    return found
