"""Who holds and who owns which part of the state: a pure function of the plan and the tensors.

A stage's replicas all hold the weights of its blocks, and the optimiser slots of those tensors that no stage before
holds: so the others can go on when one of them is gone. Each tensor is cut into chunks of `CHUNK` elements, and each
chunk is owned by one worker: it adds the chunk's gradients, updates it, and sends the result to the others. Since all
hold everything, who owns what may change with every step: a replica owns as much as it did of the step's units. A chunk
is a power of two of Merkle leaves, so the owners' roots compose to the root of the whole tensor (`storage.merkle`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapreplace
from typing import NamedTuple

from runtime.plan import Plan
from runtime.program.training import CHUNK, TrainingProgram
from storage import merkle
from storage.records import TensorEntry

WEIGHT = "weight"
GRADIENT = "gradient"
Shares = tuple[tuple[int, ...], ...]


class Chunk(NamedTuple):
    """Number `part` of the chunks of tensor number `tensor` (in the order of the program's tensors)."""

    tensor: int
    part: int

    @property
    def offset(self) -> int:
        """The first element of the chunk in its flattened tensor."""
        return self.part * CHUNK


ChunkRoots = dict[tuple[str, Chunk], bytes]
"""Merkle roots of chunks by key (`gradient`, `weight` or an optimiser slot) and chunk."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The plan together with the tensors that its workers hold. `held[s]` are the tensors of stage s, ascending.

    `shares[s][r]` is how much replica r of stage s owns, against the others: units that it takes.
    """

    plan: Plan
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    held: tuple[tuple[int, ...], ...]
    shares: Shares

    def sharing(self, shares: Shares) -> "Layout":
        """The same with other shares."""
        return self if shares == self.shares else replace(self, shares=shares)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(map(math.prod, self.shapes))

    def size(self, tensor: int) -> int:
        """The number of elements of a tensor."""
        return self._sizes[tensor]

    def length(self, chunk: Chunk) -> int:
        """The number of elements of a chunk."""
        return min(CHUNK, self.size(chunk.tensor) - chunk.offset)

    def span(self, chunk: Chunk) -> slice:
        """Where the chunk lies in its flattened tensor."""
        return slice(chunk.offset, chunk.offset + self.length(chunk))

    def chunks(self, tensor: int) -> tuple[Chunk, ...]:
        """The chunks of a tensor, in order."""
        return tuple(Chunk(tensor, part) for part in range(-(-self.size(tensor) // CHUNK)))

    def holds(self, worker: str) -> tuple[int, ...]:
        """The tensors whose weights a worker holds, ascending."""
        return self.held[self.plan.place(worker)[0]]

    @cached_property
    def _homes(self) -> tuple[tuple[int, ...], ...]:
        seen: set[int] = set()
        homes = []
        for tensors in self.held:
            homes.append(tuple(tensor for tensor in tensors if tensor not in seen))
            seen.update(tensors)
        return tuple(homes)

    def homed(self, worker: str) -> tuple[int, ...]:
        """The tensors whose optimiser slots a worker keeps: those that its stage is the first to hold, ascending."""
        return self._homes[self.plan.place(worker)[0]]

    @cached_property
    def owners(self) -> Mapping[Chunk, str]:
        """The owner of every chunk: a replica of the first stage that holds its tensor, the least loaded for its share.

        Replicas without a share own nothing. All who look agree: loads are whole numbers.
        """
        owners: dict[Chunk, str] = {}
        for stage, tensors in enumerate(self._homes):
            fresh = [chunk for tensor in tensors for chunk in self.chunks(tensor)]
            loads = [(0, replica, 0) for replica, share in enumerate(self.shares[stage]) if share]
            for chunk in sorted(fresh, key=lambda chunk: (-self.length(chunk), chunk)):
                _, replica, elements = loads[0]
                elements += self.length(chunk)
                heapreplace(loads, ((elements << 32) // self.shares[stage][replica], replica, elements))
                owners[chunk] = self.plan.worker(stage, replica)
        return owners

    @cached_property
    def _owned(self) -> Mapping[str, tuple[Chunk, ...]]:
        owned: dict[str, list[Chunk]] = {worker: [] for worker in self.plan.workers}
        for chunk, worker in self.owners.items():
            owned[worker].append(chunk)
        return {worker: tuple(sorted(chunks)) for worker, chunks in owned.items()}

    def owned(self, worker: str) -> tuple[Chunk, ...]:
        """The chunks that a worker owns, ascending."""
        return self._owned[worker]

    @cached_property
    def _teams(self) -> tuple[tuple[str, ...], ...]:
        """The replicas of each stage."""
        return tuple(map(self.plan.team, range(len(self.plan.replicas))))

    @cached_property
    def _owners_for(self) -> tuple[tuple[str, ...], ...]:
        """The owners of chunks of what each stage holds, in the order of the plan's workers."""
        tensors = {worker: {chunk.tensor for chunk in chunks} for worker, chunks in self._owned.items()}
        return tuple(
            tuple(worker for worker, owned in tensors.items() if not owned.isdisjoint(held)) for held in self.held
        )

    def holders(self, chunk: Chunk) -> tuple[str, ...]:
        """The workers that hold a chunk's tensor, whose gradients are added for it."""
        return tuple(
            worker for team, held in zip(self._teams, self.held, strict=True) if chunk.tensor in held for worker in team
        )

    def shared(self, owner: str, holder: str) -> tuple[Chunk, ...]:
        """The chunks that `owner` owns of tensors that `holder` holds: what travels between the two."""
        held = set(self.holds(holder))
        return tuple(chunk for chunk in self.owned(owner) if chunk.tensor in held)

    def owners_for(self, holder: str) -> tuple[str, ...]:
        """The workers that own a chunk of what `holder` holds: where its gradients go."""
        return self._owners_for[self.plan.place(holder)[0]]

    def holders_of(self, owner: str) -> tuple[str, ...]:
        """The other workers that hold a chunk of what `owner` owns: where its part of the next state goes."""
        tensors = {chunk.tensor for chunk in self.owned(owner)}
        teams = (team for team, held in zip(self._teams, self.held, strict=True) if not tensors.isdisjoint(held))
        return tuple(worker for team in teams for worker in team if worker != owner)

    def parts(self, owner: str, holder: str, keys: Sequence[str]) -> list[tuple[str, Chunk]]:
        """What `owner` sends `holder` of the next state: weights, and to the replicas of its stage all `keys`."""
        same = self.plan.place(owner)[0] == self.plan.place(holder)[0]
        return [(key, chunk) for key in keys if same or key == WEIGHT for chunk in self.shared(owner, holder)]


def make_layout(plan: Plan, program: TrainingProgram) -> Layout:
    """The layout of a training program's tensors under a plan. A tied tensor is held by every stage that names it."""
    names = tuple(spec.name for spec in program.tensors)
    number = {name: tensor for tensor, name in enumerate(names)}
    held = tuple(
        tuple(sorted({number[name] for block in stage for name in program.blocks[block].tensors}))
        for stage in plan.stages
    )
    shapes = tuple(tuple(spec.shape) for spec in program.tensors)
    return Layout(plan=plan, names=names, shapes=shapes, held=held, shares=shares_of(plan))


def shares_of(plan: Plan) -> Shares:
    """The units that a plan gives each replica of each stage."""
    counted = map(Counter, plan.units)
    return tuple(
        tuple(taken[replica] for replica in range(count)) for count, taken in zip(plan.replicas, counted, strict=True)
    )


def tensor_entries(
    layout: Layout, roots: Mapping[tuple[str, Chunk], bytes], *, keys: tuple[str, ...], dtype: str
) -> list[TensorEntry]:
    """One entry for each key and tensor, named `key/tensor`, its root composed from the roots of its chunks."""
    return [
        TensorEntry(
            name=f"{key}/{name}",
            dtype=dtype,
            shape=layout.shapes[tensor],
            root=merkle.root([roots[key, chunk] for chunk in layout.chunks(tensor)]),
        )
        for key in keys
        for tensor, name in enumerate(layout.names)
    ]
