"""What one worker does: its blocks forward and backward, its share of the gradient sums, its chunks of the update.

Everything between workers is a numpy array or a digest; everything inside runs through the Executor seam. Sums are
integers (`runtime.integers`), so it is free who adds what, and when.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtime import memory
from runtime.groups import WorkerConfig, WrongValue
from runtime.integers import ExactSum, open_arrays, sum_exactly
from runtime.places import StepFault, at
from runtime.plan import Plan
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram, rng_input
from runtime.program.types import NUMPY, Type
from runtime.shards import GRADIENT, WEIGHT, Chunk, ChunkRoots, Shares, make_layout
from storage import merkle
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import FailureError
from storage.identity import Identity, load_or_create, sign_receipt
from storage.records import Receipt, TensorEntry, UnitRecord

Bundle = dict[Chunk, ExactSum]
"""Gradient sums that one worker sends another, by chunk."""
Parts = dict[tuple[str, Chunk], np.ndarray]
"""Parts of a state, flat float32, by key (`weight` or an optimiser slot) and chunk."""

KEPT_MICRO_BATCHES = 2
"""For so many micro-batches at a time a worker keeps what backward needs of forward; for others it is made again."""


class StageWorker:
    """One replica of one stage, with the whole state of the stage: weights of its blocks, slots of what it is home to.

    Until `commit` a step changes nothing of it: `update` and `store` put the next state beside it, and gradient sums
    stay what they are. So a step in which another worker is lost can be finished with the workers that are left.
    """

    keeps: ClassVar[int] = KEPT_MICRO_BATCHES

    def __init__(
        self, *, config: WorkerConfig, program: TrainingProgram, executor: Executor, identity: Identity | None = None
    ) -> None:
        self._program = program
        self._executor = executor
        self._identity = identity
        self._seed = config.seed
        self._settle_at(config.worker, config.plan)
        self._index = {name: tensor for tensor, name in enumerate(self._layout.names)}
        held, homed = self._layout.holds(self._id), self._layout.homed(self._id)
        # Weights and gradient sums of what it holds, optimiser slots of what it is home to.
        elements, kept = (sum(map(self._layout.size, tensors)) for tensors in (held, homed))
        memory.require(12 * elements + 4 * len(program.slots) * kept, f"the state of worker {self._id}")
        self._weights = {tensor: np.zeros(self._layout.size(tensor), np.float32) for tensor in held}
        self._handles: dict[int, Any] = {}
        self._slots = {
            (slot, tensor): np.zeros(self._layout.size(tensor), np.float32)
            for slot in program.slots
            for tensor in homed
        }
        self._fetch = 0
        """The last of the fetches by which tensors came."""
        self._exchange = 0
        """The last of the exchanges that this worker took part in."""
        self._next: Parts = {}
        """The state after the step, where it is known already."""
        self._kept: dict[int, list[tuple[Any, Any]]] = {}
        self._sums: dict[int, ExactSum] = {}
        self._memory: dict[int, np.ndarray] = {}
        """Where sums are kept, step after step: what `gradients` handed out is good until the next step begins."""
        self._units: dict[int, dict[str, bytes]] = {}
        """Digests of what came in and went out for each micro-batch of `_step`."""
        self._step = -1
        self._totals: dict[Chunk, Any] = {}
        self._rooms: dict[Chunk, np.ndarray] = {}
        """Memory for totals, which the system would have to clear anew each step."""
        self._gradient_root = merkle.EMPTY_ROOT
        self._sum_roots: dict[Chunk, bytes] = {}
        self._sealed = False
        """Whether `_sum_roots` are those of the sums as they are."""
        self._exponent = self._square = 0
        self._reduced_root = self._updated_root = merkle.EMPTY_ROOT
        self._hashers = ThreadPoolExecutor(config.threads or os.cpu_count() or 1)

    def _settle_at(self, worker: str, plan: Plan) -> None:
        self._id, self._plan = worker, plan
        self._layout = make_layout(plan, self._program)
        self._stage, _ = plan.place(worker)
        self._blocks = plan.stages[self._stage]

    # ------------------------------------------------------------------------------------------------------- state

    def initialise(self) -> tuple[Any, ...]:
        """(chunk roots of the owned initial state, then its parts for each of `layout.holders_of(self)`)."""
        self._next = {}
        self._slots = {place: np.zeros(array.size, np.float32) for place, array in self._slots.items()}
        for chunk in self._layout.owned(self._id):
            length = self._layout.length(chunk)
            rng = self._executor.put(
                rng_input(self._seed, step=0, micro_batch=0, place=chunk.tensor, offset=chunk.offset)
            )
            with at(f"initial weights/{self._place(chunk)}"):
                (weight,) = self._arrays(self._program.init_program(chunk.tensor, length), [rng])
            self._made(chunk, {WEIGHT: weight}, at_once=max(self._plan.replicas) == 1)
        return self._published()

    def load(self, key: str, tensor: int, array: np.ndarray) -> None:
        """Take a whole tensor of the state: a weight, or an optimiser slot where this worker is home to it."""
        flat = np.asarray(array, np.float32).reshape(-1)
        self._step = -1
        if key == WEIGHT:
            self._weights.setdefault(tensor, np.empty(flat.size, np.float32))[:] = flat
            self._renew()
        elif tensor in self._layout.homed(self._id):
            self._slots.setdefault((key, tensor), np.empty(flat.size, np.float32))[:] = flat

    def fetch(self, key: str, tensor: int) -> dict[int, np.ndarray]:
        """The owned chunks of one tensor of the state, by part: flat float32."""
        owned = (chunk for chunk in self._layout.owned(self._id) if chunk.tensor == tensor)
        return {chunk.part: self._state(key, chunk) for chunk in owned}

    def give(self, key: str, tensor: int) -> np.ndarray:
        """A whole tensor of the state, flat float32, for a worker that is to hold it too."""
        return self._weights[tensor] if key == WEIGHT else self._slots[key, tensor]

    def take(self, fetch: int, key: str, tensor: int, array: np.ndarray) -> tuple[bytes, ...]:
        """Keep a tensor that another worker gave, whether or not the plan has it here yet: the roots of its chunks.

        `fetch` numbers what belongs together. What is of an earlier one has been long on its way and is not kept.
        """
        if fetch < self._fetch:
            return ()
        self._fetch = fetch
        flat = np.array(array, np.float32)
        if key == WEIGHT:
            self._weights[tensor] = flat
            self._renew()
        else:
            self._slots[key, tensor] = flat
        return tuple(self._roots([flat[self._layout.span(chunk)] for chunk in self._layout.chunks(tensor)]))

    def roots(self) -> ChunkRoots:
        """The chunk roots of the owned state."""
        places = [(key, chunk) for key in self._keys for chunk in self._layout.owned(self._id)]
        return dict(zip(places, self._roots([self._state(*place) for place in places]), strict=True))

    def regroup(self, worker: str, plan: bytes) -> None:
        """Work at another place, or among other workers, from now on; gradient sums of the step are kept.

        What the place does not need is let go. FailureError where something is missing: `take` it first.
        """
        self._settle_at(worker, decode(Plan, plan))
        held, homed = set(self._layout.holds(worker)), set(self._layout.homed(worker))
        lacking = (held - set(self._weights)) | {
            t for t in homed for s in self._program.slots if (s, t) not in self._slots
        }
        if lacking:
            raise FailureError(f"worker {worker}: expected the state of its stage, got none of tensor {min(lacking)}")
        self._weights = {tensor: array for tensor, array in self._weights.items() if tensor in held}
        self._slots = {place: array for place, array in self._slots.items() if place[1] in homed}
        self._memory = {tensor: array for tensor, array in self._memory.items() if tensor in held}
        self._totals = {}  # but not `_next`: that step may be committed among others already
        self._renew()

    @property
    def _keys(self) -> tuple[str, ...]:
        return WEIGHT, *self._program.slots

    def _state(self, key: str, chunk: Chunk) -> np.ndarray:
        whole = self._weights[chunk.tensor] if key == WEIGHT else self._slots[key, chunk.tensor]
        return whole[self._layout.span(chunk)]

    # ---------------------------------------------------------------------------------------- forward and backward

    def _begin(self, step: int) -> None:
        """Whatever is kept of another step is of no use any more."""
        if step != self._step:
            self._step = step
            self._units, self._sums, self._kept, self._sum_roots = {}, {}, {}, {}
            self._sealed = False

    def forward(self, step: int, micro_batch: int, x: np.ndarray) -> np.ndarray:
        """The stage's output for one micro-batch; its blocks' inputs are kept for `backward`."""
        y = self._executor.get(self._forward(step, micro_batch, x))
        self._note(step, micro_batch, x=x, y=y)
        return y

    def last(self, step: int, micro_batch: int, x: np.ndarray, target: np.ndarray) -> tuple[int, np.ndarray | None]:
        """The last stage in one go: (mean loss x 2**44, gradient of the stage's input, None for the first stage)."""
        y = self._forward(step, micro_batch, x)
        loss, dy = self._loss(step, micro_batch, y, target)
        del y  # of a language model's head the largest array of all
        total = self._executor.get(loss)
        dx = self._backward(step, micro_batch, dy)
        self._note(step, micro_batch, x=x, y=total, dx=dx)
        return int(total), dx

    def backward(self, step: int, micro_batch: int, dy: np.ndarray) -> np.ndarray | None:
        """The gradient of the stage's input (None for the first); the weights' gradients join this worker's sums."""
        _require("dy", dy, self._program.kind_of(self._blocks[-1]).backward.inputs[-1][1])
        dx = self._backward(step, micro_batch, self._executor.put(dy))
        self._note(step, micro_batch, dy=dy, dx=dx)
        return dx

    def output(self, step: int, micro_batch: int, x: np.ndarray) -> np.ndarray:
        """What `forward` gave, made once more for others."""
        self._begin(step)
        kept = self._kept.get(micro_batch)
        y = self._executor.get(self._forward(step, micro_batch, x))
        if kept is None:
            del self._kept[micro_batch]
        else:
            self._kept[micro_batch] = kept
        return y

    def gradient(
        self, step: int, micro_batch: int, x: np.ndarray, target: np.ndarray | None, dy: np.ndarray | None
    ) -> np.ndarray | None:
        """The gradient of the stage's input, made once more for others: nothing joins this worker's sums.

        The last stage is given the target, any other what its output's gradient is.
        """
        y = self._forward(step, micro_batch, x)
        handle = self._loss(step, micro_batch, y, target)[1] if dy is None else self._executor.put(dy)
        return self._backward(step, micro_batch, handle, counted=False)

    def _loss(self, step: int, micro_batch: int, y: Any, target: np.ndarray | None) -> list[Any]:
        assert target is not None
        with at(f"step {step}/micro-batch {micro_batch}/loss"):
            return self._executor.run(self._program.loss, [y, self._executor.put(target)])

    def _note(self, step: int, micro_batch: int, **arrays: np.ndarray | None) -> None:
        """Keep the digests of what came in or went out for the step's receipt."""
        self._begin(step)
        noted = self._units.setdefault(micro_batch, {})
        noted |= {name: merkle.bytes_root(array.data) for name, array in arrays.items() if array is not None}

    def _forward(self, step: int, micro_batch: int, x: np.ndarray) -> Any:
        self._begin(step)
        if self._stage:
            _require("x", x, self._program.kind_of(self._blocks[0]).forward.inputs[-2][1])
        kept = self._kept[micro_batch] = []
        handle = self._executor.put(x)
        for block in self._blocks:
            kind, parameters = self._program.kind_of(block), self._parameters(block)
            arguments = [*parameters, handle, self._block_rng(step, micro_batch, block)]
            with at(f"step {step}/micro-batch {micro_batch}/block {block}/forward"):
                if len(self._kept) > self.keeps:
                    made, saved = self._executor.run(kind.forward, arguments, stable=len(parameters)), None
                else:
                    made, saved = self._executor.forward(kind.forward, kind.backward, arguments, stable=len(parameters))
            kept.append((handle, saved))
            (handle,) = made
        return handle

    def _backward(self, step: int, micro_batch: int, dy: Any, *, counted: bool = True) -> np.ndarray | None:
        kept = self._kept.pop(micro_batch)
        for block in reversed(self._blocks):
            names = self._program.blocks[block].tensors
            kind, parameters, (x, saved) = self._program.kind_of(block), self._parameters(block), kept.pop()
            arguments = [*parameters, x, self._block_rng(step, micro_batch, block), dy]
            with at(f"step {step}/micro-batch {micro_batch}/block {block}/backward"):
                sums = self._open_sums(names, kind.gradient_bounds) if counted else []
                results = self._executor.backward(
                    kind.forward, kind.backward, arguments, saved, sums, stable=len(parameters)
                )
            if counted and not sums:
                made = [self._executor.get(gradient) for gradient in results[len(results) - len(names) :]]
                with at(f"step {step}/micro-batch {micro_batch}/block {block}/sum"):
                    self._add(names, made)
            dy = results[0] if len(results) > (0 if sums else len(names)) else None
        return None if dy is None or not self._stage else self._executor.get(dy)

    def _sum(self, tensor: int) -> ExactSum:
        """The step's sum of a tensor's gradients so far, to add to."""
        self._sealed = False
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
        if len(set(names)) != len(names):
            return []
        return open_arrays([self._sum(self._index[name]) for name in names], bounds)

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
        self._begin(-1)
        self._next, self._totals = {}, {}

    def forsake(self, step: int) -> dict[int, dict[str, bytes]]:
        """Forget what was done of a step, as others do it again: the digests of what came in and went out of each unit.

        They are by micro-batch, then by what: `x`, `y`, `dy` and `dx` as far as it got.
        """
        made = self._units if step == self._step else {}
        self.drop()
        return made

    # -------------------------------------------------------------------------------------------- reduce and update

    def seal(self, step: int) -> None:
        """Hash the gradient sums of the step, which are all there for now: `gradients` has the less to do."""
        self._begin(step)
        if self._sealed:
            return
        sums = self._sums
        chunks = [chunk for tensor in sorted(sums) for chunk in self._layout.chunks(tensor)]
        roots = self._roots([sums[chunk.tensor].value[self._layout.span(chunk)] for chunk in chunks])
        self._sum_roots = dict(zip(chunks, roots, strict=True))
        self._gradient_root = merkle.list_root([self._gradient_entry(tensor) for tensor in sorted(sums)])
        self._sealed = True

    def gradients(self, step: int, shares: Shares, exchange: int) -> tuple[Bundle, ...]:
        """One bundle of gradient sums of the step for each of `layout.owners_for(self)` under these shares.

        `exchange` numbers what belongs together: what comes late of one before, begun in vain, is not looked at.
        """
        self.seal(step)
        self._exchange = exchange
        self._layout = self._layout.sharing(shares)
        sums = self._sums
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

    def reduce(self, step: int, exchange: int, *bundles: Bundle) -> tuple[int, ChunkRoots]:
        """(largest exponent of the owned gradient, root of each owned chunk of it) of the sums of all bundles."""
        if exchange != self._exchange:
            return 0, {}
        exponents = []
        self._totals = {}
        owned = self._layout.owned(self._id)
        rooms, self._rooms = self._rooms, {}
        for chunk in owned:
            length = self._layout.length(chunk)
            parts = [bundle[chunk] for bundle in bundles if chunk in bundle]
            room = self._rooms[chunk] = rooms.pop(chunk) if chunk in rooms else np.empty(length, np.int64)
            with at(f"step {step}/reduce/{self._place(chunk)}"):
                self._totals[chunk] = self._executor.put(sum_exactly(parts, room).total())
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

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[Any, ...]:
        """(chunk roots of the owned state after the step, then its parts for each of `layout.holders_of(self)`).

        With `at_once` it takes the place of the state before: for those who do not go on where a worker is lost.
        """
        self._renew()
        self._next = {}
        scalars = [
            self._executor.put(np.array(value, dtype))
            for value, dtype in ((total, np.int64), (exponent, np.int32), (step, np.int64))
        ]
        for chunk in self._layout.owned(self._id):
            program = self._program.update_program(chunk.tensor, self._layout.length(chunk))
            handles = [self._executor.put(self._state(key, chunk)) for key in self._keys]
            with at(f"step {step}/update/{self._place(chunk)}"):
                results = self._arrays(program, [*handles, self._totals.pop(chunk), *scalars])
                _finite(results, self._keys, chunk.offset)
            self._made(chunk, dict(zip(self._keys, results, strict=True)), at_once=at_once)
        return self._published()

    def store(self, exchange: int, *parts: Parts) -> None:
        """Take the next state of chunks that others own, for `commit`."""
        for part in parts if exchange >= self._exchange else ():
            self._next |= part

    def commit(self) -> None:
        """The next state is the state from now on."""
        self._apply()
        self._renew()

    def _made(self, chunk: Chunk, arrays: Mapping[str, np.ndarray], *, at_once: bool) -> None:
        """The next state of an owned chunk, which is the state at once or by `commit`."""
        self._next |= {(key, chunk): array for key, array in arrays.items()}
        if at_once:
            self._apply()

    def _apply(self) -> None:
        for (key, chunk), array in self._next.items():
            self._state(key, chunk)[:] = array
        self._next = {}

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
            replicas=self._plan.replicas[self._stage],
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
        """(chunk roots of what this worker made of the next state, the parts of it that each other holder keeps)."""
        layout, me = self._layout, self._id
        places = [(key, chunk) for key in self._keys for chunk in layout.owned(me)]
        arrays = {place: self._next[place] if place in self._next else self._state(*place) for place in places}
        roots: ChunkRoots = dict(zip(arrays, self._roots(list(arrays.values())), strict=True))
        self._updated_root = merkle.list_root([roots[place] for place in sorted(roots)])
        parts = (
            {place: arrays[place] for place in layout.parts(me, other, self._keys)} for other in layout.holders_of(me)
        )
        return roots, *parts

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
        return self._executor.put(rng_input(self._seed, step=step, micro_batch=micro_batch, place=block))


def _require(what: str, array: Any, expected: Type) -> None:
    """WrongValue where a worker was given an array of another type."""
    if not isinstance(array, np.ndarray) or array.dtype != NUMPY[expected.dtype] or array.shape != expected.shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise WrongValue(f"gave {what} as {got}, expected {expected}; nothing of that worker is used any more")


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
