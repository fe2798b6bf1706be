"""One worker's units once more, block by block, with one block's weights and gradient sums in memory at a time.

A worker goes through its blocks with one micro-batch after the other, and holds the weights and sums of them all. Here
a block has all micro-batches, then the next: its weights are read, used and let go, twice, and its sums are hashed as
soon as they are complete. Every value is a function of the same bytes, so it is the same value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from runtime import memory
from runtime.feed import Batch
from runtime.integers import ExactSum, open_arrays
from runtime.places import at
from runtime.program.executor import Executor, Handle
from runtime.program.training import TrainingProgram, chunk_lengths, rng_input
from runtime.shards import GRADIENT, WEIGHT
from storage import merkle
from storage.checkpoints import Checkpoint
from storage.codec import NO_DIGEST, encode
from storage.errors import FailureError
from storage.records import TensorEntry, UnitRecord
from verification.replay import Material

Weights = Callable[[Sequence[str]], list[np.ndarray]]
"""Gives the weights of these tensors, f32 in their shapes."""


def stored_weights(checkpoint: Checkpoint, program: TrainingProgram) -> Weights:
    """The weights of a stored state, every byte checked; the other tensors of the state are not read."""
    shapes = {spec.name: spec.shape for spec in program.tensors}

    def weights(names: Sequence[str]) -> list[np.ndarray]:
        wanted = {f"{WEIGHT}/{name}": shapes[name] for name in names}
        found = checkpoint.load(wanted.__contains__)
        for name, shape in wanted.items():
            array = found.get(name)
            if array is None or array.shape != shape or array.dtype != np.float32:
                got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
                raise FailureError(
                    f"state {checkpoint.root.hex()}: expected {name} as float32 {list(shape)}, as in the run's "
                    f"programs, got {got}; take the checkpoint from another copy of the store"
                )
        return [found[name] for name in wanted]

    return weights


def initial_weights(executor: Executor, program: TrainingProgram, seed: int) -> Weights:
    """The weights before the first step, made anew."""
    number = {spec.name: tensor for tensor, spec in enumerate(program.tensors)}

    def weights(names: Sequence[str]) -> list[np.ndarray]:
        return [initial(number[name]) for name in names]

    def initial(tensor: int) -> np.ndarray:
        spec = program.tensors[tensor]
        made = np.empty(math.prod(spec.shape), np.float32)
        start = 0
        for part, length in enumerate(chunk_lengths(made.size)):
            rng = executor.put(rng_input(seed, step=0, micro_batch=0, place=tensor, offset=start))
            with at(f"initial weights/{spec.name}/{part}"):
                (chunk,) = executor.run(program.init_program(tensor, length), [rng])
            made[start : start + length] = executor.get(chunk)
            start += length
        return made.reshape(spec.shape)

    return weights


@dataclass(kw_only=True)
class UnitReplay:
    """Micro-batches of one step forward through all blocks and backward as far as `blocks` begin.

    `blocks` are the worker's stage; `units` and `gradient_root` are what its receipt states of these micro-batches once
    `run` has ended. Raises StepFault where the arithmetic refuses a value.
    """

    executor: Executor
    material: Material
    weights: Weights
    step: int
    blocks: range
    _sums: dict[str, ExactSum] = field(default_factory=dict, init=False)
    _entries: dict[str, bytes] = field(default_factory=dict, init=False)
    _noted: dict[int, dict[str, bytes]] = field(default_factory=dict, init=False)

    def run(self, micro_batches: Sequence[int]) -> None:
        """Go through these micro-batches of the step."""
        program, batch = self._program, self.material.feed.batch(self.step)
        units = {m: batch.micro_batch(m, program.micro_batches) for m in micro_batches}
        taken = self._forward({m: self.executor.put(unit.inputs) for m, unit in units.items()})
        self._backward(taken, units)

    @property
    def units(self) -> tuple[UnitRecord, ...]:
        """The digests of what came in and went out, by micro-batch."""
        none = {"x": NO_DIGEST, "y": NO_DIGEST, "dy": NO_DIGEST, "dx": NO_DIGEST}
        return tuple(UnitRecord(micro_batch=m, **none | noted) for m, noted in sorted(self._noted.items()))

    @property
    def gradient_root(self) -> bytes:
        """The root over the sums of the gradients of the stage's tensors."""
        return merkle.list_root([self._entries[name] for name in sorted(self._entries)])

    @property
    def _program(self) -> TrainingProgram:
        return self.material.program

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {spec.name: math.prod(spec.shape) for spec in self._program.tensors}

    def _forward(self, values: dict[int, Handle]) -> dict[int, dict[int, Handle]]:
        """What each block from the stage's first on takes, by block and micro-batch."""
        taken = {}
        for block in range(len(self._program.blocks)):
            if block == self.blocks.start:
                self._note(values, "x")
            if block == self.blocks.stop:
                self._note(values, "y")
            if block >= self.blocks.start:
                taken[block] = values
            if block + 1 == len(self._program.blocks):
                break  # backward begins with it
            program, parameters = self._program.kind_of(block).forward, self._parameters(block)
            made = {}
            for m, x in values.items():
                with at(f"{self._place(m)}/block {block}/forward"):
                    arguments = [*parameters, x, self._block_rng(m, block)]
                    (made[m],) = self.executor.run(program, arguments, stable=len(parameters))
            values = made
        return taken

    def _backward(self, taken: dict[int, dict[int, Handle]], units: dict[int, Batch]) -> None:
        last = len(self._program.blocks) - 1
        gradients: dict[int, Handle] = {}
        losses: dict[int, Handle] = {}
        for block in reversed(range(self.blocks.start, last + 1)):
            if block + 1 == self.blocks.stop and block < last:
                self._note(gradients, "dy")
            kind, parameters, inputs = self._program.kind_of(block), self._parameters(block), taken.pop(block)
            for m, unit in units.items():
                arguments = [*parameters, inputs.pop(m), self._block_rng(m, block)]
                with at(f"{self._place(m)}/block {block}/forward"):
                    (y,), saved = self.executor.forward(kind.forward, kind.backward, arguments, stable=len(parameters))
                if block == last:
                    with at(f"{self._place(m)}/loss"):
                        target = self.executor.put(unit.targets)
                        losses[m], gradients[m] = self.executor.run(self._program.loss, [y, target])
                del y
                self._block_backward(block, m, [*arguments, gradients.pop(m)], saved, gradients)
            self._complete(block)
            if block == self.blocks.start and block:
                self._note(gradients, "dx")
        if self.blocks.stop == last + 1:
            self._note(losses, "y")

    def _block_backward(
        self, block: int, m: int, arguments: list[Handle], saved: object, gradients: dict[int, Handle]
    ) -> None:
        """One micro-batch back through a block: its input's gradient, if it has one, joins `gradients`."""
        kind, names = self._program.kind_of(block), self._program.blocks[block].tensors
        counted = block in self.blocks
        arrays = self._open_sums(names, kind.gradient_bounds) if counted else []
        with at(f"{self._place(m)}/block {block}/backward"):
            results = self.executor.backward(kind.forward, kind.backward, arguments, saved, arrays, stable=len(names))
        made = len(results) - (0 if arrays else len(names))
        if made:
            gradients[m] = results[0]
        if counted and not arrays:
            with at(f"{self._place(m)}/block {block}/sum"):
                for name, gradient in zip(names, results[made:], strict=True):
                    self._sum(name).add(ExactSum(self.executor.get(gradient).reshape(-1)))

    def _open_sums(self, names: Sequence[str], bounds: Sequence[int | None]) -> list[np.ndarray]:
        return open_arrays([self._sum(name) for name in names], bounds) if len(set(names)) == len(names) else []

    def _sum(self, name: str) -> ExactSum:
        if name not in self._sums:
            self._sums[name] = ExactSum(np.zeros(self._sizes[name], np.int64), bound=0)
        return self._sums[name]

    def _complete(self, block: int) -> None:
        """Hash the sums to which no earlier block of the stage adds, and let them go."""
        earlier = {name for b in range(self.blocks.start, block) for name in self._program.blocks[b].tensors}
        for spec in self._program.tensors:
            if spec.name in self._sums and spec.name not in earlier:
                root = merkle.bytes_root(self._sums.pop(spec.name).value.data)
                entry = TensorEntry(name=f"{GRADIENT}/{spec.name}", dtype="i64", shape=spec.shape, root=root)
                self._entries[spec.name] = encode(entry)

    def _parameters(self, block: int) -> list[Handle]:
        """A block's weights, in the place of those of the block before."""
        self.executor.forget()
        names = self._program.blocks[block].tensors
        memory.require(12 * sum(self._sizes[name] for name in set(names)), f"the weights and sums of block {block}")
        return [self.executor.put(array) for array in self.weights(names)]

    def _note(self, values: dict[int, Handle], name: str) -> None:
        for m, value in values.items():
            self._noted.setdefault(m, {})[name] = merkle.bytes_root(self.executor.get(value).data)

    def _place(self, micro_batch: int) -> str:
        return f"step {self.step}/micro-batch {micro_batch}"

    def _block_rng(self, micro_batch: int, block: int) -> Handle:
        seed = self.material.feed.recipe.seed
        return self.executor.put(rng_input(seed, step=self.step, micro_batch=micro_batch, place=block))
