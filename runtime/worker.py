"""What one worker does: its blocks forward and backward, its share of the gradient sums, its chunks of the update.

Everything between workers is a numpy array or a digest; everything inside runs through the Executor seam. Sums are
integers (`runtime.integers`), so it is free who adds what, and when.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from runtime import memory
from runtime.groups import WorkerConfig
from runtime.integers import ExactSum, sum_exactly
from runtime.places import StepFault, at
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram
from runtime.shards import GRADIENT, WEIGHT, Chunk, make_layout
from storage import merkle
from storage.codec import NO_DIGEST, decode, encode
from storage.identity import Identity, load_or_create, sign_receipt
from storage.records import Receipt, TensorEntry, UnitRecord

Bundle = dict[Chunk, Any]
"""What one worker sends another: gradient sums or new weights by chunk."""
ChunkRoots = dict[tuple[str, Chunk], bytes]
"""Merkle roots of chunks by key (`gradient`, `weight` or an optimiser slot) and chunk."""


KEPT_MICRO_BATCHES = 2
"""For so many micro-batches at a time a worker keeps what backward needs of forward; for others it is made again."""


class StageWorker:
    """One replica of one stage. Weights of its blocks are whole; optimiser slots are only those of its own chunks."""

    def __init__(
        self, *, config: WorkerConfig, program: TrainingProgram, executor: Executor, identity: Identity | None = None
    ) -> None:
        self._id = config.worker
        self._plan = config.plan
        self._program = program
        self._executor = executor
        self._identity = identity
        self._layout = make_layout(config.plan, program)
        self._stage, _ = config.plan.place(config.worker)
        self._blocks = config.plan.stages[self._stage]
        self._key = (config.seed & 0xFFFFFFFF, config.seed >> 32)
        names = self._layout.names
        self._index = {name: tensor for tensor, name in enumerate(names)}
        held = self._layout.holds(self._id)
        elements = sum(map(self._layout.size, held))
        owned = sum(map(self._layout.length, self._layout.owned(self._id)))
        # Weights and gradient sums of what it holds, optimiser slots of what it owns.
        memory.require(12 * elements + 4 * len(program.slots) * owned, f"the state of worker {self._id}")
        self._weights = {tensor: np.zeros(self._layout.size(tensor), np.float32) for tensor in held}
        self._handles: dict[int, Any] = {}
        self._slots = {
            (slot, chunk): np.zeros(self._layout.length(chunk), np.float32)
            for slot in program.slots
            for chunk in self._layout.owned(self._id)
        }
        self._kept: dict[int, list[tuple[Any, Any]]] = {}
        self._sums: dict[int, ExactSum] = {}
        self._memory: dict[int, np.ndarray] = {}
        """Where sums are kept, step after step: what `gradients` handed out is used up when the next step begins."""
        self._units: dict[int, dict[str, bytes]] = {}
        """Digests of what came in and went out for each micro-batch of `_step`."""
        self._step = -1
        self._totals: dict[Chunk, Any] = {}
        self._gradient_root = merkle.EMPTY_ROOT
        self._sum_roots: dict[Chunk, bytes] = {}
        self._exponent = self._square = 0
        self._reduced_root = self._updated_root = merkle.EMPTY_ROOT
        self._hashers = ThreadPoolExecutor(config.threads or os.cpu_count() or 1)

    # ------------------------------------------------------------------------------------------------------- state

    def initialise(self) -> tuple[Any, ...]:
        """(chunk roots of the initial state, then one bundle of weights for each of `layout.holders_of(self)`)."""
        for chunk in self._layout.owned(self._id):
            program = self._program.init_program(chunk.tensor, self._layout.length(chunk))
            rng = self._rng(step=0, micro_batch=0, place=chunk.tensor, offset=chunk.offset)
            with at(f"initial weights/{self._place(chunk)}"):
                self._weights[chunk.tensor][self._layout.span(chunk)] = self._arrays(program, [rng])[0]
        for array in self._slots.values():
            array[:] = 0
        return self._published()

    def load(self, key: str, tensor: int, array: np.ndarray) -> None:
        """Take a whole tensor: weights are kept whole, an optimiser slot only in the chunks that this worker owns."""
        flat = np.asarray(array, np.float32).reshape(-1)
        self._step = -1
        if key == WEIGHT:
            self._weights[tensor][:] = flat
            self._renew()
            return
        for chunk in self._layout.owned(self._id):
            if chunk.tensor == tensor:
                self._slots[key, chunk] = flat[self._layout.span(chunk)].copy()

    def fetch(self, key: str, tensor: int) -> dict[int, np.ndarray]:
        """The owned chunks of one tensor of the state, by part: flat float32."""
        owned = (chunk for chunk in self._layout.owned(self._id) if chunk.tensor == tensor)
        if key == WEIGHT:
            return {chunk.part: self._weights[tensor][self._layout.span(chunk)] for chunk in owned}
        return {chunk.part: self._slots[key, chunk] for chunk in owned}

    # ---------------------------------------------------------------------------------------- forward and backward

    def forward(self, step: int, micro_batch: int, x: np.ndarray) -> np.ndarray:
        """The stage's output for one micro-batch; its blocks' inputs are kept for `backward`."""
        y = self._executor.get(self._forward(step, micro_batch, x))
        self._note(step, micro_batch, x=x, y=y)
        return y

    def last(self, step: int, micro_batch: int, x: np.ndarray, target: np.ndarray) -> tuple[int, np.ndarray | None]:
        """The last stage in one go: (mean loss x 2**44, gradient of the stage's input, None for the first stage)."""
        y = self._forward(step, micro_batch, x)
        with at(f"step {step}/micro-batch {micro_batch}/loss"):
            loss, dy = self._executor.run(self._program.loss, [y, self._executor.put(target)])
        del y  # of a language model's head the largest array of all
        total = self._executor.get(loss)
        dx = self._backward(step, micro_batch, dy)
        self._note(step, micro_batch, x=x, y=total, dx=dx)
        return int(total), dx

    def backward(self, step: int, micro_batch: int, dy: np.ndarray) -> np.ndarray | None:
        """The gradient of the stage's input (None for the first); the weights' gradients join this worker's sums."""
        dx = self._backward(step, micro_batch, self._executor.put(dy))
        self._note(step, micro_batch, dy=dy, dx=dx)
        return dx

    def _note(self, step: int, micro_batch: int, **arrays: np.ndarray | None) -> None:
        """Keep the digests of what came in or went out for the step's receipt."""
        if step != self._step:
            self._step, self._units = step, {}
        noted = self._units.setdefault(micro_batch, {})
        noted |= {name: merkle.bytes_root(array.data) for name, array in arrays.items() if array is not None}

    def _forward(self, step: int, micro_batch: int, x: np.ndarray) -> Any:
        kept = self._kept[micro_batch] = []
        handle = self._executor.put(x)
        for block in self._blocks:
            kind, parameters = self._program.kind_of(block), self._parameters(block)
            arguments = [*parameters, handle, self._block_rng(step, micro_batch, block)]
            with at(f"step {step}/micro-batch {micro_batch}/block {block}/forward"):
                if len(self._kept) > KEPT_MICRO_BATCHES:
                    made, saved = self._executor.run(kind.forward, arguments, stable=len(parameters)), None
                else:
                    made, saved = self._executor.forward(kind.forward, kind.backward, arguments, stable=len(parameters))
            kept.append((handle, saved))
            (handle,) = made
        return handle

    def _backward(self, step: int, micro_batch: int, dy: Any) -> np.ndarray | None:
        kept = self._kept.pop(micro_batch)
        for block in reversed(self._blocks):
            names = self._program.blocks[block].tensors
            kind, parameters, (x, saved) = self._program.kind_of(block), self._parameters(block), kept.pop()
            arguments = [*parameters, x, self._block_rng(step, micro_batch, block), dy]
            with at(f"step {step}/micro-batch {micro_batch}/block {block}/backward"):
                sums = self._open_sums(names, kind.gradient_bounds)
                results = self._executor.backward(
                    kind.forward, kind.backward, arguments, saved, sums, stable=len(parameters)
                )
            if not sums:
                made = [self._executor.get(gradient) for gradient in results[len(results) - len(names) :]]
                with at(f"step {step}/micro-batch {micro_batch}/block {block}/sum"):
                    self._add(names, made)
            dy = results[0] if len(results) > (0 if sums else len(names)) else None
        return None if dy is None or not self._stage else self._executor.get(dy)

    def _sum(self, tensor: int) -> ExactSum:
        """The step's sum of a tensor's gradients so far."""
        if tensor not in self._sums:
            if tensor not in self._memory:
                self._memory[tensor] = np.empty(self._layout.size(tensor), np.int64)
            self._memory[tensor].fill(0)
            self._sums[tensor] = ExactSum(self._memory[tensor], bound=0)
        return self._sums[tensor]

    def _add(self, names: Sequence[str], gradients: Sequence[np.ndarray]) -> None:
        """Add a unit's gradients of some tensors to the step's sums."""
        for name, gradient in zip(names, gradients, strict=True):
            self._sum(self._index[name]).add(ExactSum(gradient.reshape(-1)))

    def _open_sums(self, names: Sequence[str], bounds: Sequence[int | None]) -> list[np.ndarray]:
        """The arrays that a backward pass may add its gradients to unseen; none where one could leave its range."""
        if None in bounds or len(set(names)) != len(names):
            return []
        sums = [self._sum(self._index[name]) for name in names]
        if not all(total.takes(bound) for total, bound in zip(sums, bounds, strict=True) if bound is not None):
            return []
        return [total.value for total in sums]

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """The stage's output without dropout; nothing is kept."""
        return self._executor.get(self._evaluate(x))

    def measure(self, x: np.ndarray, target: np.ndarray) -> tuple[int, int, int]:
        """The last stage of a validation batch: (mean loss x 2**44, hits, count)."""
        results = self._executor.run(self._program.metric, [self._evaluate(x), self._executor.put(target)])
        loss, hits, count = (int(self._executor.get(result)) for result in results)
        return loss, hits, count

    def _evaluate(self, x: np.ndarray) -> Any:
        handle = self._executor.put(x)
        for block in self._blocks:
            with at(f"validation/block {block}"):
                program, parameters = self._program.kind_of(block).evaluate, self._parameters(block)
                (handle,) = self._executor.run(program, [*parameters, handle], stable=len(parameters))
        return handle

    def drop(self) -> None:
        """Forget the gradients that were added up so far: the step is not gone through to its end."""
        self._sums, self._kept = {}, {}
        self._step = -1

    # -------------------------------------------------------------------------------------------- reduce and update

    def gradients(self) -> tuple[Bundle, ...]:
        """One bundle of gradient sums for each of `layout.owners_for(self)`; this worker's own sums start anew."""
        sums, self._sums = self._sums, {}
        chunks = [chunk for tensor in sorted(sums) for chunk in self._layout.chunks(tensor)]
        roots = self._roots([sums[chunk.tensor].value[self._layout.span(chunk)] for chunk in chunks])
        self._sum_roots = dict(zip(chunks, roots, strict=True))
        self._gradient_root = merkle.list_root([self._gradient_entry(tensor) for tensor in sorted(sums)])
        return tuple(
            {
                chunk: sums[chunk.tensor].part(self._layout.span(chunk))
                for chunk in self._layout.shared(owner, self._id)
                if chunk.tensor in sums
            }
            for owner in self._layout.owners_for(self._id)
        )

    def _gradient_entry(self, tensor: int) -> bytes:
        name, shape = self._layout.names[tensor], self._layout.shapes[tensor]
        root = merkle.root([self._sum_roots[chunk] for chunk in self._layout.chunks(tensor)])
        return encode(TensorEntry(name=f"{GRADIENT}/{name}", dtype="i64", shape=shape, root=root))

    def _roots(self, arrays: Sequence[np.ndarray]) -> list[bytes]:
        """The Merkle roots of arrays, by as many threads as the worker has."""
        return list(self._hashers.map(merkle.bytes_root, [array.data for array in arrays]))

    def reduce(self, step: int, *bundles: Bundle) -> tuple[int, ChunkRoots]:
        """(largest exponent of the owned gradient, root of each owned chunk of it) of the sums of all bundles."""
        exponents = []
        owned = self._layout.owned(self._id)
        for chunk in owned:
            length = self._layout.length(chunk)
            parts = [bundle[chunk] for bundle in bundles if chunk in bundle]
            with at(f"step {step}/reduce/{self._place(chunk)}"):
                self._totals[chunk] = self._executor.put(sum_exactly(parts, length).total())
                (exponent,) = self._executor.run(self._program.exponent_program(length), [self._totals[chunk]])
            exponents.append(int(self._executor.get(exponent)))
        self._exponent = max(exponents, default=0)
        alone = {chunk for chunk in owned if self._layout.holders(chunk) == (self._id,) and chunk in self._sum_roots}
        others = [chunk for chunk in owned if chunk not in alone]
        roots = {(GRADIENT, chunk): self._sum_roots[chunk] for chunk in alone}
        fresh = self._roots([self._executor.get(self._totals[chunk]) for chunk in others])
        roots |= {(GRADIENT, chunk): root for chunk, root in zip(others, fresh, strict=True)}
        self._reduced_root = merkle.list_root([roots[GRADIENT, chunk] for chunk in owned])
        return self._exponent, roots

    def squares(self, exponent: int) -> int:
        """The sum of squares of the owned gradient on the grid of `exponent`, the largest one of all workers."""
        e = self._executor.put(np.array(exponent, np.int32))
        total = 0
        for chunk, gradient in self._totals.items():
            with at(f"step {self._step}/square/{self._place(chunk)}"):
                (square,) = self._executor.run(self._program.square_program(self._layout.length(chunk)), [gradient, e])
            total += int(self._executor.get(square))
        self._square = total
        return total

    def update(self, step: int, total: int, exponent: int) -> tuple[Any, ...]:
        """(chunk roots of the owned state after the step, then a bundle of weights for each of `holders_of(self)`)."""
        self._renew()
        scalars = [
            self._executor.put(np.array(value, dtype))
            for value, dtype in ((total, np.int64), (exponent, np.int32), (step, np.int64))
        ]
        for chunk in self._layout.owned(self._id):
            program = self._program.update_program(chunk.tensor, self._layout.length(chunk))
            weight = self._weights[chunk.tensor][self._layout.span(chunk)]
            state = [weight, *(self._slots[slot, chunk] for slot in self._program.slots)]
            handles = [self._executor.put(array) for array in state]
            with at(f"step {step}/update/{self._place(chunk)}"):
                results = self._arrays(program, [*handles, self._totals.pop(chunk), *scalars])
                _finite(results, (WEIGHT, *self._program.slots), chunk.offset)
            for array, result in zip(state, results, strict=True):
                array[:] = result
        return self._published()

    def store(self, *bundles: Bundle) -> None:
        """Take the new weights of every chunk that this worker holds."""
        for bundle in bundles:
            for chunk, array in bundle.items():
                target = self._weights[chunk.tensor][self._layout.span(chunk)]
                if not np.shares_memory(target, array):  # its own are there already
                    target[:] = array
        self._renew()

    def receipt(self, run: bytes, step: int) -> bytes:
        """The encoded, signed receipt of what this worker did in the step; b"" for a worker without a key."""
        return b"" if self._identity is None else encode(sign_receipt(self._identity, self._claim(run, step)))

    def claim(self, run: bytes, step: int) -> bytes:
        """The encoded receipt without its signature: what a replay compares with a signed one."""
        return encode(self._claim(run, step))

    def _claim(self, run: bytes, step: int) -> Receipt:
        given = {"x": NO_DIGEST, "y": NO_DIGEST, "dy": NO_DIGEST, "dx": NO_DIGEST}
        return Receipt(
            run=run,
            step=step,
            worker=self._id,
            address=self._identity.address if self._identity else bytes(20),
            bounds=self._plan.bounds,
            replicas=self._plan.replicas,
            units=tuple(UnitRecord(micro_batch=m, **given | noted) for m, noted in sorted(self._units.items())),
            gradient_root=self._gradient_root,
            exponent=self._exponent,
            reduced_root=self._reduced_root,
            square=self._square,
            updated_root=self._updated_root,
            signature=b"",
        )

    def _renew(self) -> None:
        """Nothing that was made from weights or shares memory with them is used again: they change in place."""
        self._handles.clear()
        self._executor.forget()

    def _published(self) -> tuple[Any, ...]:
        weights = {c: self._weights[c.tensor][self._layout.span(c)] for c in self._layout.owned(self._id)}
        arrays = {**{(WEIGHT, chunk): array for chunk, array in weights.items()}, **self._slots}
        roots: ChunkRoots = dict(zip(arrays, self._roots(list(arrays.values())), strict=True))
        self._updated_root = merkle.list_root([roots[key] for key in sorted(roots)])
        bundles = (
            {chunk: weights[chunk] for chunk in self._layout.shared(self._id, holder)}
            for holder in self._layout.holders_of(self._id)
        )
        return roots, *bundles

    # ----------------------------------------------------------------------------------------------- executor's side

    def _place(self, chunk: Chunk) -> str:
        return f"{self._layout.names[chunk.tensor]}/{chunk.part}"

    def _arrays(self, program: Any, inputs: Sequence[Any]) -> list[np.ndarray]:
        return [self._executor.get(result) for result in self._executor.run(program, inputs)]

    def _parameters(self, block: int) -> list[Any]:
        return [self._parameter(self._index[name]) for name in self._program.blocks[block].tensors]

    def _parameter(self, tensor: int) -> Any:
        if tensor not in self._handles:
            shaped = self._weights[tensor].reshape(self._layout.shapes[tensor])
            self._handles[tensor] = self._executor.put(shaped)
        return self._handles[tensor]

    def _block_rng(self, step: int, micro_batch: int, block: int) -> Any:
        return self._rng(step=step, micro_batch=micro_batch, place=block, offset=0)

    def _rng(self, *, step: int, micro_batch: int, place: int, offset: int) -> Any:
        return self._executor.put(np.array([*self._key, step, micro_batch, place, offset], np.int64))


def _finite(arrays: Sequence[np.ndarray], names: Sequence[str], offset: int) -> None:
    """StepFault naming the first NaN or infinite element of a new state; `offset` is where its chunk starts."""
    for name, array in zip(names, arrays, strict=True):
        bad = ~np.isfinite(array)
        if bad.any():
            element = int(bad.argmax())
            raise StepFault(
                f"{name} became {array[element]} at element {offset + element}, expected a finite number; "
                "lower the learning rate or clip the gradient"
            )


def worker_builder(
    executor: Callable[[int], Executor], kind: type[StageWorker] | None = None
) -> Callable[[bytes], StageWorker]:
    """A function that builds a worker from its encoded WorkerConfig, with an executor made for its thread count."""

    def build(data: bytes) -> StageWorker:
        config = decode(WorkerConfig, data)
        identity = load_or_create(Path(config.keys).expanduser() / "worker.key") if config.keys else None
        program = TrainingProgram.decode(config.programs)
        return (kind or StageWorker)(
            config=config, program=program, executor=executor(config.threads), identity=identity
        )

    return build
