"""Segments once more, from stored state, Programs and data: the trainer's own transition on one local worker.

Nothing of the submitter's is imported. A Program is data, and so is everything else that is read here.
"""

from collections.abc import Callable, Sequence

from runtime.data import open_dataset
from runtime.executors import reference
from runtime.feed import Feed
from runtime.groups import LocalGroup
from runtime.plan import Plan, make_plan
from runtime.program.training import TrainingProgram
from runtime.recipe import decode_recipe
from runtime.shards import WEIGHT
from runtime.transition import Crew, assemble, forward_backward, initialise, place, restore, train_step
from runtime.worker import worker_builder
from storage.checkpoints import load_state
from storage.codec import decode
from storage.records import Receipt, RunRecord, StepRecord
from storage.store import Store

Build = Callable[[bytes], object]


class Replay:
    """A run's recipe, data and programs on workers in this process, one unless `plan` says more; it holds one state.

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
    ) -> None:
        self._store = store
        recipe = decode_recipe(store.get(run.recipe))
        self.feed = Feed(recipe=recipe, dataset=open_dataset(store, run.data))
        programs = store.get(run.programs)
        program = TrainingProgram.decode(programs)
        self.program = program
        self.program_root = program.root
        self.crew: Crew = assemble(
            LocalGroup(build or worker_builder(reference)),
            plan=plan or make_plan(blocks=len(program.blocks), micro_batches=program.micro_batches),
            program=program,
            programs=programs,
            seed=recipe.seed,
            keys=keys,
            threads=threads,
        )

    def initial(self) -> bytes:
        """The root of the initial state, which is computed and held from now on."""
        return initialise(self.crew)

    def load(self, state: bytes) -> None:
        """Hold the stored state of that root, with every frame of it checked."""
        restore(self.crew, load_state(self._store, state))

    def load_weights(self, state: bytes) -> None:
        """Hold the weights of the stored state of that root, which is all that forward and backward take."""
        place(self.crew, load_state(self._store, state, lambda name: name.startswith(f"{WEIGHT}/")))

    def unit(self, run: bytes, step: int, worker: str, micro_batches: Sequence[int]) -> Receipt:
        """What a worker has to say of some micro-batches: of its receipt all but what follows from the others' work."""
        forward_backward(self.crew, step, self.feed.batch(step), micro_batches)
        group = self.crew.group
        group.call(worker, "gradients", returns=len(self.crew.layout.owners_for(worker)))
        (claim,) = group.get([group.call(worker, "claim", run, step)])
        self.crew.gather("drop")
        return decode(Receipt, claim)

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
