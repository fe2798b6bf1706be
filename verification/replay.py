"""Segments once more, from stored state, Programs and data: the trainer's own transition on one local worker.

Nothing of the submitter's is imported. A Program is data, and so is everything else that is read here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.data import open_dataset
from runtime.executors import reference
from runtime.feed import Feed
from runtime.groups import LocalGroup, WorkerGroup
from runtime.plan import Plan, make_plan
from runtime.program.training import TrainingProgram
from runtime.recipe import decode_recipe
from runtime.shards import WEIGHT
from runtime.transition import Crew, assemble, initialise, restore, train_step
from runtime.worker import worker_builder
from storage.checkpoints import Checkpoint, open_checkpoint
from storage.codec import decode
from storage.errors import FailureError
from storage.records import Receipt, RunRecord, StepRecord
from storage.store import Store

Build = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run committed to before its first step, as far as a replay needs it: `programs` is `program` encoded."""

    feed: Feed
    program: TrainingProgram
    programs: bytes = field(repr=False)

    @property
    def program_root(self) -> bytes:
        """The root of the stored Programs, which the run's record has to state."""
        return self.program.root

    @classmethod
    def read(cls, store: Store, run: RunRecord) -> "Material":
        """The material of a run; FailureError where its parts do not go together."""
        recipe = decode_recipe(store.get(run.recipe))
        feed = Feed(recipe=recipe, dataset=open_dataset(store, run.data))
        programs = store.get(run.programs)
        program = TrainingProgram.decode(programs)
        if program.micro_batches != recipe.training.micro_batches:
            raise FailureError(
                f"programs {run.programs.hex()}: expected the recipe's {recipe.training.micro_batches} micro-batches, "
                f"got {program.micro_batches}; they are of another recipe, and nothing can be replayed"
            )
        return cls(feed=feed, program=program, programs=programs)


def fitting_checkpoint(store: Store, state: bytes, program: TrainingProgram) -> Checkpoint:
    """The checkpoint of a state that is no larger than the Programs' own: manifests may claim any shapes.

    FailureError where it is.
    """
    checkpoint = open_checkpoint(store, state)
    shapes = {f"{key}/{spec.name}": spec.shape for key in (WEIGHT, *program.slots) for spec in program.tensors}
    for entry in checkpoint.manifest.tensors:
        expected = shapes.get(entry.name)
        if expected is None or math.prod(entry.shape) > math.prod(expected):
            raise FailureError(
                f"state {state.hex()}: expected the tensors of the run's programs, got {entry.name} of "
                f"{list(entry.shape)}; take the checkpoint from another copy of the store"
            )
    return checkpoint


class Replay:
    """A run's recipe, data and programs on workers, one unless `plan` says more; it holds one state.

    The workers are in this process, made by `build`, unless a `group` says where.

    Raises MissingObject or IntegrityError naming an object that the store lacks or that is damaged.
    """

    def __init__(
        self,
        store: Store,
        run: RunRecord,
        *,
        threads: int = 1,
        build: Build | None = None,
        plan: Plan | None = None,
        keys: str = "",
        group: WorkerGroup | None = None,
        material: Material | None = None,
    ) -> None:
        self._store = store
        material = material or Material.read(store, run)
        program = material.program
        self.feed, self.program, self.program_root = material.feed, program, material.program_root
        self.crew: Crew = assemble(
            group or LocalGroup(build or worker_builder(reference)),
            plan=plan or make_plan(blocks=len(program.blocks), micro_batches=program.micro_batches),
            program=program,
            programs=material.programs,
            seed=material.feed.recipe.seed,
            keys=keys,
            threads=threads,
        )

    def initial(self) -> bytes:
        """The root of the initial state, which is computed and held from now on."""
        return initialise(self.crew)

    def load(self, state: bytes) -> None:
        """Hold the stored state of that root, with every frame of it checked."""
        restore(self.crew, self._checkpoint(state).load())

    def _checkpoint(self, state: bytes) -> Checkpoint:
        return fitting_checkpoint(self._store, state, self.program)

    def step(self, step: int) -> StepRecord:
        """The record of one step, without events; the next state is held from now on."""
        record, _ = train_step(
            self.crew, run=bytes(32), step=step, batch=self.feed.batch(step), validation=self.feed.validation(step)
        )
        return record

    def claims(self, run: bytes, step: int) -> dict[str, Receipt]:
        """What each worker has to say of the step that was just made, unsigned."""
        claims = self.crew.gather("claim", run, step)
        return {worker: decode(Receipt, claim) for worker, claim in zip(self.crew.workers, claims, strict=True)}
