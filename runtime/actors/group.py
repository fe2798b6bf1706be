"""A WorkerGroup of Ray actors. Arrays go from actor to actor, past the controller.

Ray notices within milliseconds that a process has ended, but takes long over hosts that vanish and never minds a
process that stands still. So every worker answers a heartbeat from a thread of its own, and one that does not is
taken for lost.
"""

import math
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.groups import Handle, ValueLost, WorkerConfig, WorkersLost, require_version
from runtime.version import VERSION
from storage.codec import decode, encode
from storage.errors import FailureError, TrueweightError

START_SECONDS = 120.0
BEAT, SILENCE = 1.0, 5.0
"""Seconds between heartbeats, and without an answer until a worker is taken for lost."""
SCAN = 0.25
"""Seconds between looks at the heartbeats."""
GET_SECONDS = 600.0
"""How long results are waited for while every worker's heart beats."""


class WorkerActor:
    """A worker in a process of its own. It is given bytes (`open`) and never code."""

    def __init__(self) -> None:
        self._worker: object | None = None

    def version(self) -> tuple[str, str, int, str]:
        """(the Trueweight version here, this host's name, the process, Ray's id of the node)."""
        return VERSION, socket.gethostname(), os.getpid(), ray.get_runtime_context().get_node_id()

    def open(self, config: bytes, executor: str) -> None:
        """Build the worker from its encoded WorkerConfig, with the executor of that name."""
        from runtime.executors import named
        from runtime.worker import worker_builder

        self._worker = worker_builder(named(executor))(config)

    def call(self, method: str, returns: int | None, *args: Any) -> Any:
        """The worker's method; with `returns` its tuple of results, which Ray keeps apart. None more at the end.

        That last one is small: it tells that the call is done without moving what it gave.
        """
        value = getattr(self._worker, method)(*args)
        return (*(value if returns is not None else (value,)), None)

    @ray.method(concurrency_group="heart")
    def beat(self) -> None:
        """Here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A handle: where the value will be, and what is there once the call is done."""

    value: Any
    done: Any
    worker: str


@dataclass(kw_only=True)
class _Member:
    """An actor, its host and process, and its heartbeat: when it was last asked, and the answer to come."""

    actor: Any
    host: str = ""
    pid: int = 0
    node: str = ""
    asked: float = 0.0
    answer: Any = None


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Where a worker goes: Ray's id of the node, all of whose `cpus` it asks for."""

    node: str
    cpus: int


class RayGroup:
    """Workers as actors of the cluster that this process is connected to (`runtime.actors.cluster`).

    `cpus` are the CPUs that the first workers share out evenly; those that come later ask for as much each. Those that
    are pinned (`pin`) have a node to themselves: one that does not come up there is lost with the node, for others to
    be taken.
    """

    def __init__(
        self,
        *,
        cpus: float,
        executor: str = "reference",
        actor: type[WorkerActor] = WorkerActor,
        timeout: float = START_SECONDS,
        silence: float = SILENCE,
    ) -> None:
        self._cpus = cpus
        self._executor = executor
        self._actor = actor
        self._timeout = timeout
        self._silence = silence
        self._members: dict[str, _Member] = {}
        self._changing = Lock()  # workers are started in threads of their own
        self._share = 0.0
        self._scanned = 0.0
        self._starting: dict[str, _Member] = {}
        self._pins: dict[str, Pin] = {}
        self.failed: dict[str, float] = {}
        """When a pinned worker last did not come up on a node."""

    def start(self, configs: Mapping[str, bytes]) -> None:
        """See WorkerGroup. FailureError where an actor runs another version or does not come up in time."""
        self._share = self._share or cpus_each(self._cpus, len(configs))
        with self._changing:
            fresh = {worker: _Member(actor=self._options(worker).remote()) for worker in configs}
            self._starting = self._starting | fresh
        try:
            found = self._all({worker: member.actor.version.remote() for worker, member in fresh.items()})
            for worker, (version, host, pid, node) in found.items():
                require_version(worker, host, version)
                fresh[worker].host, fresh[worker].pid, fresh[worker].node = host, pid, node
            opened = {worker: self._threaded(worker, configs[worker]) for worker in configs}
            self._all({worker: fresh[worker].actor.open.remote(opened[worker], self._executor) for worker in configs})
        except BaseException:
            for member in fresh.values():
                ray.kill(member.actor)
            with self._changing:
                self._starting = {name: member for name, member in self._starting.items() if name not in fresh}
            raise
        with self._changing:
            wanted = {name: member for name, member in fresh.items() if name in self._starting}
            self._starting = {name: member for name, member in self._starting.items() if name not in fresh}
            self._members = self._members | wanted

    def pin(self, pins: Mapping[str, Pin]) -> None:
        """Workers of these names will be started on these nodes."""
        self._pins |= pins

    def nodes(self) -> dict[str, str]:
        """Ray's id of each worker's node."""
        return {worker: member.node for worker, member in self._members.items()}

    def _options(self, worker: str) -> Any:
        """The class of an actor with what it asks Ray for."""
        pin = self._pins.get(worker)
        where = NodeAffinitySchedulingStrategy(node_id=pin.node, soft=False) if pin else "SPREAD"
        remote: Any = ray.remote
        # Out of order: a heartbeat must not wait for what a call before it waits for.
        return remote(concurrency_groups={"heart": 1})(self._actor).options(
            num_cpus=pin.cpus if pin else self._share,
            scheduling_strategy=where,
            max_restarts=0,
            allow_out_of_order_execution=True,
        )

    def _threaded(self, worker: str, config: bytes) -> bytes:
        """The config of a worker; a pinned one has a thread for each CPU of its node unless it says how many."""
        pin = self._pins.get(worker)
        if pin is None or (asked := decode(WorkerConfig, config)).threads:
            return config
        return encode(replace(asked, threads=pin.cpus))

    def _all(self, references: dict[str, Any]) -> dict[str, Any]:
        """The values by worker, within the time limit."""
        ready, late = ray.wait(list(references.values()), num_returns=len(references), timeout=self._timeout)
        if pinned := [worker for worker in self._pins if references.get(worker) in late]:
            raise self._fails(dict.fromkeys(pinned, f"it did not come up in {self._timeout:g} s"))
        if late:
            names = ", ".join(worker for worker, reference in references.items() if reference in late)
            raise FailureError(
                f"workers {names}: expected to start within {self._timeout:g} s on {self._share:g} CPUs each, got "
                f"{len(ready)} of {len(references)} workers; free CPUs (`ray status`) or ask for fewer workers"
            )
        values = {}
        for worker, reference in references.items():
            try:
                values[worker] = ray.get(reference)
            except RayError as error:
                if worker in self._pins:
                    raise self._fails({worker: _first_line(_root_cause(error))}) from error
                raise self._translated(worker, error) from error
        return values

    def _fails(self, workers: Mapping[str, str]) -> WorkersLost:
        """Note the nodes on which pinned workers did not come up."""
        self.failed |= {self._pins[worker].node: time.monotonic() for worker in workers}
        return WorkersLost(workers)

    # ------------------------------------------------------------------------------------------------------- calls

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """See WorkerGroup: Handles, at once."""
        if worker not in self._members:
            raise WorkersLost({worker: "it was stopped"})
        count = 1 if returns is None else returns
        task = self._members[worker].actor.call.options(num_returns=count + 1, name=f"{worker}.{method}")
        made = task.remote(method, returns, *(arg.value if isinstance(arg, Reference) else arg for arg in args))
        *values, done = made if isinstance(made, list) else [made]
        handles = tuple(Reference(value=value, done=done, worker=worker) for value in values)
        return handles[0] if returns is None else handles

    def share(self, value: Any) -> Handle:
        """See WorkerGroup: the value in Ray's object store."""
        return Reference(value=(reference := ray.put(value)), done=reference, worker="")

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """See WorkerGroup. A worker's TrueweightError comes out as it was raised."""
        pending = list(range(len(handles)))
        deadline = time.monotonic() + GET_SECONDS
        while pending:
            finished = self.wait([handles[number] for number in pending], self._silence)
            for _, error in finished:
                if error is not None:
                    raise error
            if not finished and time.monotonic() > deadline:
                late = sorted({handles[number].worker for number in pending})
                raise WorkersLost(dict.fromkeys(late, f"no result in {GET_SECONDS:.0f} s"))
            ready = {number for number, _ in finished}
            pending = [number for at, number in enumerate(pending) if at not in ready]
        values = []
        for handle in handles:
            try:
                values.append(ray.get(handle.value, timeout=GET_SECONDS))
            except (RayError, GetTimeoutError) as error:
                raise self._translated(handle.worker, error) from error
        return values

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        """See WorkerGroup; heartbeats are looked at meanwhile."""
        deadline = time.monotonic() + timeout
        numbers: dict[Any, list[int]] = {}
        for number, handle in enumerate(handles):
            numbers.setdefault(handle.done, []).append(number)
        while True:
            self._listen()
            left = deadline - time.monotonic()
            pause = max(min(SCAN, left), 0.0)
            if not numbers:
                time.sleep(pause)
            elif ray.wait(list(numbers), num_returns=1, timeout=pause)[0]:
                ready, _ = ray.wait(list(numbers), num_returns=len(numbers), timeout=0)
                return [(number, self._error(handles[number])) for one in ready for number in numbers[one]]
            if left <= 0:
                return []

    def _error(self, handle: Reference) -> FailureError | None:
        """What a call that is done raised."""
        if not handle.worker:
            return None
        try:
            ray.get(handle.done, timeout=self._silence)
        except (RayError, GetTimeoutError) as error:
            return self._translated(handle.worker, error)
        return None

    def _translated(self, worker: str, error: Exception) -> FailureError:
        """What a call's error means to whoever made the call."""
        cause = _root_cause(error)
        if isinstance(cause, FailureError):
            return cause
        if isinstance(cause, TrueweightError):
            return FailureError(str(cause))
        if isinstance(cause, RayActorError) and cause is error and self._is_of(worker, cause):
            return WorkersLost({worker: _first_line(cause)})
        if isinstance(cause, RayActorError | ObjectLostError | GetTimeoutError):
            return ValueLost(f"a value between workers is gone ({worker}: {_first_line(cause)}); resume the run")
        return FailureError(f"worker {worker} failed: {error}; see the cause above, then resume the run")

    def _is_of(self, worker: str, error: RayActorError) -> bool:
        """Whether the actor that died is the worker, and not one whose result it was to take."""
        member = self._members.get(worker)
        told = getattr(error, "actor_id", None)
        return member is None or told in (None, member.actor._actor_id.hex())

    # ------------------------------------------------------------------------------------------------------- hearts

    def _listen(self) -> None:
        """Ask who is there and hear who answers; WorkersLost naming all that do not."""
        now = time.monotonic()
        if now - self._scanned < SCAN:
            return
        late, self._scanned = now - self._scanned > self._silence, now  # nobody listened: not the workers' fault
        lost: dict[str, str] = {}
        for worker, member in list(self._members.items()):
            if member.answer is None:
                if now - member.asked >= BEAT:
                    member.asked, member.answer = now, member.actor.beat.remote()
                continue
            if ray.wait([member.answer], timeout=0)[0]:
                try:
                    ray.get(member.answer)
                except RayError as error:
                    lost[worker] = _first_line(error)
                member.answer = None
            elif late:
                member.asked = now
            elif now - member.asked > self._silence:
                lost[worker] = f"no heartbeat from host {member.host} in {self._silence:g} s"
        if lost:
            raise WorkersLost(lost)

    def stop(self, workers: Sequence[str] | None = None) -> None:
        """See WorkerGroup. A process that stands still is ended by its host, and a start that is under way fails."""
        with self._changing:
            known = self._members | self._starting
            names = list(known) if workers is None else [name for name in workers if name in known]
            members = [known[name] for name in names]
            self._members, self._starting = (
                {name: member for name, member in those.items() if name not in names}
                for those in (self._members, self._starting)
            )
        for member in members:
            with suppress(RayError, ValueError):
                ray.kill(member.actor)
            if workers is not None and member.node:
                with suppress(RayError, ValueError):
                    _end_process(member)

    def processes(self) -> dict[str, int]:
        """The process of each worker on its host."""
        return {worker: member.pid for worker, member in self._members.items()}

    # -------------------------------------------------------------------------------------------------- membership

    def room(self) -> int:
        """See Membership: by the CPUs that nobody has."""
        free: dict[str, float] = ray.available_resources()
        return int(free.get("CPU", 0.0) / self._share + 1e-6) if self._share else 0

    def leaving(self) -> Mapping[str, str]:
        """See Membership: the workers on nodes that Ray is draining (`ray drain-node`, a spot instance's notice)."""
        draining = set(draining_nodes())
        return {
            worker: f"host {member.host} is leaving"
            for worker, member in self._members.items()
            if member.node in draining
        }


def draining_nodes() -> Iterable[str]:
    """Ray's ids of the nodes that are about to leave."""
    from ray._private.state import state

    with suppress(AttributeError):
        return list(state.get_draining_nodes())
    return []


def _end_process(member: _Member) -> None:
    """Have the host of a lost worker end its process, should it be there still."""
    where = NodeAffinitySchedulingStrategy(node_id=member.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=where, max_retries=0).remote(member.pid)


def _kill(pid: int) -> None:
    """End a Ray worker's process, if that is what it is."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


def cpus_each(cpus: float, workers: int) -> float:
    """What each actor asks for: one CPU, or its share of the cluster's where there are more workers than CPUs."""
    return min(1.0, math.floor(cpus / workers * 10_000) / 10_000)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, below the layers that Ray wraps around a task that depended on it."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
