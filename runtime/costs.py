"""What a step costs and what a stage holds, as numbers: the model that the planner minimises, and nothing measured.

B micro-batches go through stages s, each a range of blocks on a group of hosts that take whole units as they finish:

    T = max_s (B t_s - l_s) + sum_s l_s + sum_s c_s + T_reduce + T_update

`B t_s` is the time in which the group gets B whole units done, or that in which its links carry them where that is
longer; `l_s` is one unit on its fastest host: what filling the pipeline waits for. With one host a stage t_s = l_s, and
this is (B - 1) max t_s + sum t_s + sum c_s + T_reduce + T_update. `c_s` is an activation and its gradient over the
slower of two links. Every host adds an equal part of its stage's gradient sums, updates and sends it on, so the slowest
host and the slowest link of a group decide over T_reduce and T_update, of which the worst stage's counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

WEIGHT_BYTES = SLOT_BYTES = 4
SUM_BYTES = 8
HANDED_OVER = 2
"""Micro-batches for which a worker keeps what forward hands to backward (`runtime.worker.KEPT_MICRO_BATCHES`)."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine for one worker. `speed` is in units of the machine that the model's seconds were measured on.

    `memory` bytes a worker may fill, `bandwidth` bytes/s to and from its peers at once, `latency` seconds to a peer.
    """

    name: str
    speed: float
    memory: int
    bandwidth: float
    latency: float

    @property
    def kind(self) -> tuple[float, int, float, float]:
        """What hosts have in common that may stand in for each other."""
        return -self.speed, -self.memory, -self.bandwidth, self.latency


@dataclass(frozen=True, kw_only=True)
class Block:
    """One place of the chain, by what a micro-batch costs there at speed 1.

    `work` seconds of forward and backward; `prepare` seconds more for the first one after the weights have changed.
    `input_bytes` are what comes in, `handed_bytes` what forward keeps for backward, `working_bytes` what a pass takes.
    """

    work: float
    prepare: float = 0.0
    input_bytes: int = 0
    handed_bytes: int = 0
    working_bytes: int = 0
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A chain of blocks and what training it takes at speed 1.

    `elements` are those of each tensor; `slots` arrays of the optimiser's per weight; `loss` seconds a micro-batch;
    `update` seconds an element, for norm, update and hashes.
    """

    blocks: tuple[Block, ...]
    elements: Mapping[str, int]
    slots: int
    micro_batches: int
    loss: float = 0.0
    update: float = 0.0

    @cached_property
    def _spans(self) -> dict[tuple[int, int], "Span"]:
        return {}

    def span(self, first: int, stop: int) -> "Span":
        """The blocks `first .. stop` as one stage."""
        if (first, stop) not in self._spans:
            self._spans[first, stop] = _span(self, first, stop)
        return self._spans[first, stop]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A range of blocks as one stage, at speed 1. A tensor is owned by the first stage of those that hold it."""

    first: int
    stop: int
    last: bool
    work: float
    prepare: float
    held: int
    owned: int
    input_bytes: int
    """What comes from the stage before it for a micro-batch; 0 for the first stage."""
    output_bytes: int
    kept_bytes: int
    """The inputs of its blocks for one micro-batch, which are kept until it comes back."""
    handed_bytes: int
    working_bytes: int

    def memory_bytes(self, slots: int, replicas: Any, in_flight: Any) -> Any:
        """What one of `replicas` hosts of the stage holds with so many micro-batches in flight; both may be arrays.

        Weights 4, integer sums 8 and optimiser slots 4 each per element, its part of the added gradient, activations.
        """
        state = (WEIGHT_BYTES + SUM_BYTES) * self.held + slots * SLOT_BYTES * self.owned
        totals = -(-SUM_BYTES * self.owned // replicas)
        flying = 1 if self.last else in_flight  # the last stage goes back at once
        activations = flying * self.kept_bytes + np.minimum(flying, HANDED_OVER) * self.handed_bytes
        return state + totals + activations + self.working_bytes


def _span(model: Model, first: int, stop: int) -> Span:
    blocks = model.blocks[first:stop]
    last = stop == len(model.blocks)
    held = {name for block in blocks for name in block.tensors}
    owned = held - {name for block in model.blocks[:first] for name in block.tensors}
    return Span(
        first=first,
        stop=stop,
        last=last,
        work=sum(block.work for block in blocks) + (model.loss if last else 0.0),
        prepare=sum(block.prepare for block in blocks),
        held=sum(model.elements[name] for name in held),
        owned=sum(model.elements[name] for name in owned),
        input_bytes=blocks[0].input_bytes if first else 0,
        output_bytes=0 if last else model.blocks[stop].input_bytes,
        kept_bytes=sum(block.input_bytes for block in blocks),
        handed_bytes=sum(block.handed_bytes for block in blocks),
        working_bytes=max(block.working_bytes for block in blocks),
    )


def spread(speeds: Sequence[float], units: int) -> tuple[int, ...]:
    """The host of each of so many equal units: always the one that would finish it first, the first where several."""
    taken = [0] * len(speeds)
    given = []
    for _ in range(units):
        finished = [(count + 1) / speed for count, speed in zip(taken, speeds, strict=True)]
        host = finished.index(min(finished))
        taken[host] += 1
        given.append(host)
    return tuple(given)


@dataclass(frozen=True)
class Groups:
    """Groups of hosts of a few classes: row g of `counts` [groups, classes] is how many of each class group g has."""

    classes: tuple[Host, ...]
    counts: np.ndarray = field(repr=False)
    micro_batches: int

    @cached_property
    def replicas(self) -> np.ndarray:
        """Hosts of each group."""
        return np.asarray(self.counts.sum(axis=1))

    @cached_property
    def makespan(self) -> np.ndarray:
        """Seconds in which each group gets B whole units done, each of one second at speed 1; infinite for none."""
        speeds = np.array([host.speed for host in self.classes])
        ends = np.unique(np.arange(1, self.micro_batches + 1)[:, None] / speeds)
        done = self.counts @ self._done(ends[None, :])
        enough = done >= self.micro_batches
        return np.asarray(np.where(enough.any(axis=1), ends[enough.argmax(axis=1)], np.inf))

    def _done(self, seconds: np.ndarray) -> np.ndarray:
        """Whole units that a host of each class gets done in `seconds` [..., n]: [classes, n] for one row."""
        speeds = np.array([host.speed for host in self.classes])[:, None]
        return np.asarray(np.floor(seconds * speeds * (1 + 1e-9)))

    @cached_property
    def in_flight(self) -> np.ndarray:
        """The most units that a host of each class takes in a step, [groups, classes]."""
        ends = np.where(np.isfinite(self.makespan), self.makespan, 0.0)
        return np.asarray(np.clip(self._done(ends[None, :]).T, 1, self.micro_batches), np.int64)

    def worst(self, values: Sequence[float]) -> np.ndarray:
        """The largest of the classes' values in each group."""
        return np.asarray(np.where(self.counts > 0, np.array(values), -np.inf).max(axis=1))

    @cached_property
    def fastest(self) -> np.ndarray:
        """The speed of the fastest host."""
        return self.worst([host.speed for host in self.classes])

    @cached_property
    def slowest(self) -> np.ndarray:
        """The speed of the slowest host."""
        return -self.worst([-host.speed for host in self.classes])

    @cached_property
    def slow_link(self) -> np.ndarray:
        """Seconds a byte over the slowest link."""
        return self.worst([1 / host.bandwidth for host in self.classes])

    @cached_property
    def latency(self) -> np.ndarray:
        """The longest latency."""
        return self.worst([host.latency for host in self.classes])

    @cached_property
    def bandwidth(self) -> np.ndarray:
        """Bytes a second of all links together."""
        return np.asarray(self.counts @ np.array([host.bandwidth for host in self.classes]))


class StageCosts(NamedTuple):
    """What a span costs on each group, in seconds [groups]."""

    fits: np.ndarray
    """Whether every host has the memory."""
    busy: np.ndarray
    """B t_s."""
    unit: np.ndarray
    """l_s."""
    reduce: np.ndarray
    update: np.ndarray


def stage_costs(model: Model, span: Span, groups: Groups) -> StageCosts:
    """The costs of one stage on each of many groups of hosts; a group of none does not fit."""
    replicas = np.maximum(groups.replicas, 1)
    fits = groups.replicas > 0
    for number, host in enumerate(groups.classes):
        flying = groups.in_flight[:, number]
        need = span.memory_bytes(model.slots, replicas, flying)
        fits &= (groups.counts[:, number] == 0) | (need <= host.memory)
    with np.errstate(divide="ignore", invalid="ignore"):
        carried = model.micro_batches * (span.input_bytes + span.output_bytes) / groups.bandwidth
        others = span.owned * (replicas - 1) / replicas + (span.held - span.owned)
        wait = np.where(others > 0, groups.latency, 0.0)
        compute = (span.owned / replicas * model.update + span.prepare) / groups.slowest
        sent = others * (WEIGHT_BYTES + model.slots * SLOT_BYTES) * groups.slow_link
        return StageCosts(
            fits=fits,
            busy=np.maximum(span.work * groups.makespan, carried),
            unit=span.work / groups.fastest,
            reduce=others * SUM_BYTES * groups.slow_link + wait,
            update=compute + sent + wait,
        )
