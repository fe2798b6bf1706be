"""What each step sees: batches, validation and segment bounds, as functions of the recipe and the data alone."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.data import Dataset
from runtime.recipe import Recipe


class Batch(NamedTuple):
    """Inputs and targets of equal length, rows in order."""

    inputs: np.ndarray
    targets: np.ndarray

    def micro_batch(self, index: int, count: int) -> "Batch":
        """Number `index` of `count` equal parts."""
        size = len(self.inputs) // count
        rows = slice(index * size, (index + 1) * size)
        return Batch(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The batches of a recipe over a prepared dataset; the trainer and the verifier read the same ones."""

    recipe: Recipe
    dataset: Dataset

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.training.steps

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        return Batch(*self.dataset.batch(self.recipe.seed, step, self.recipe.training.batch))

    def validation(self, step: int) -> tuple[Batch, ...]:
        """The validation micro-batches due after a step; none where validation is not due."""
        training = self.recipe.training
        if not training.validate_every or (step + 1) % training.validate_every:
            return ()
        size = training.micro_batch
        self.dataset.require_memory(size * training.validation_batches)
        return tuple(Batch(*self.dataset.validation_batch(i, size)) for i in range(training.validation_batches))

    def segment(self, index: int) -> range:
        """The steps of one segment; the last segment may be shorter."""
        size = self.recipe.training.segment
        return range(index * size, min((index + 1) * size, self.steps))

    @property
    def segments(self) -> int:
        """Segments of the whole run."""
        return -(-self.steps // self.recipe.training.segment)
