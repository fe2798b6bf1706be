"""Segments once more, from stored state, Programs and data: the trainer's own transition on one local worker.

Nothing of the submitter's is imported. A Program is data, and so is everything else that is read here.
"""

from collections.abc import Callable

from runtime.data import open_dataset
from runtime.executors import reference
from runtime.feed import Feed
from runtime.groups import LocalGroup
from runtime.plan import make_plan
from runtime.program.training import TrainingProgram
from runtime.recipe import decode_recipe
from runtime.transition import Crew, assemble, initialise, restore, train_step
from runtime.worker import worker_builder
from storage.checkpoints import load_state
from storage.records import RunRecord, StepRecord
from storage.store import Store

Build = Callable[[bytes], object]


class Replay:
    """A run's recipe, data and programs on one worker in this process; it holds one state at a time.

    Raises MissingObject or IntegrityError naming an object that the store lacks or that is damaged.
    """

    def __init__(self, store: Store, run: RunRecord, *, threads: int = 1, build: Build | None = None) -> None:
        self._store = store
        recipe = decode_recipe(store.get(run.recipe))
        self.feed = Feed(recipe=recipe, dataset=open_dataset(store, run.data))
        programs = store.get(run.programs)
        program = TrainingProgram.decode(programs)
        self.program_root = program.root
        self._crew: Crew = assemble(
            LocalGroup(build or worker_builder(reference)),
            plan=make_plan(blocks=len(program.blocks), micro_batches=program.micro_batches),
            program=program,
            programs=programs,
            seed=recipe.seed,
            keys="",
            threads=threads,
        )

    def initial(self) -> bytes:
        """The root of the initial state, which is computed and held from now on."""
        return initialise(self._crew)

    def load(self, state: bytes) -> None:
        """Hold the stored state of that root, with every frame of it checked."""
        restore(self._crew, load_state(self._store, state))

    def step(self, step: int) -> StepRecord:
        """The record of one step, without events and receipts; the next state is held from now on."""
        record, _ = train_step(
            self._crew, run=bytes(32), step=step, batch=self.feed.batch(step), validation=self.feed.validation(step)
        )
        return record
