"""A WorkerGroup of Ray actors. Handles are ObjectRefs: arrays go from actor to actor, past the controller."""

import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from runtime.groups import Handle, require_version
from runtime.version import VERSION
from storage.errors import FailureError, TrueweightError

START_SECONDS = 120.0


class WorkerActor:
    """A worker in a process of its own. It is given bytes (`open`) and never code."""

    def __init__(self) -> None:
        self._worker: object | None = None

    def version(self) -> tuple[str, str]:
        """(the Trueweight version here, this host's name)."""
        return VERSION, socket.gethostname()

    def open(self, config: bytes, executor: str) -> None:
        """Build the worker from its encoded WorkerConfig, with the executor of that name."""
        from runtime.executors import named
        from runtime.worker import worker_builder

        self._worker = worker_builder(named(executor))(config)

    def call(self, method: str, returns: int | None, *args: Any) -> Any:
        """The worker's method; with `returns` its tuple of results, which Ray keeps apart."""
        value = getattr(self._worker, method)(*args)
        return value[0] if returns == 1 else value


class RayGroup:
    """Workers as actors of the cluster that this process is connected to (`runtime.actors.cluster`)."""

    def __init__(
        self,
        *,
        cpus: float,
        executor: str = "reference",
        actor: type[WorkerActor] = WorkerActor,
        timeout: float = START_SECONDS,
    ) -> None:
        self._cpus = cpus
        self._executor = executor
        self._actor = actor
        self._timeout = timeout
        self._actors: dict[str, Any] = {}

    def start(self, configs: Mapping[str, bytes]) -> None:
        """See WorkerGroup. FailureError where an actor runs another version or does not come up in time."""
        share = cpus_each(self._cpus, len(configs))
        remote = ray.remote(self._actor).options(num_cpus=share, scheduling_strategy="SPREAD", max_restarts=0)
        self._actors = {worker: remote.remote() for worker in configs}
        found = self._wait({worker: actor.version.remote() for worker, actor in self._actors.items()}, share)
        for worker, (version, host) in found.items():
            require_version(worker, host, version)
        opened = {
            worker: self._actors[worker].open.remote(config, self._executor) for worker, config in configs.items()
        }
        self._wait(opened, share)

    def _wait(self, references: dict[str, Any], share: float) -> dict[str, Any]:
        """The values by worker, within the time limit."""
        ready, late = ray.wait(list(references.values()), num_returns=len(references), timeout=self._timeout)
        if late:
            names = ", ".join(worker for worker, reference in references.items() if reference in late)
            raise FailureError(
                f"workers {names}: expected to start within {self._timeout:g} s on {share:g} CPUs each, got "
                f"{len(ready)} of {len(references)} workers; free CPUs (`ray status`) or ask for fewer workers"
            )
        return dict(zip(references, self.get(list(references.values())), strict=True))

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """See WorkerGroup: ObjectRefs, at once."""
        task = self._actors[worker].call.options(
            num_returns=1 if returns is None else returns, name=f"{worker}.{method}"
        )
        references = task.remote(method, returns, *args)
        return (references,) if returns == 1 else references

    def share(self, value: Any) -> Handle:
        """See WorkerGroup: the value in Ray's object store."""
        return ray.put(value)

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """See WorkerGroup. A worker's TrueweightError comes out as it was raised; a lost worker as a FailureError."""
        try:
            return list(ray.get(list(handles)))
        except RayTaskError as error:
            cause = _root_cause(error)
            if isinstance(cause, TrueweightError):
                raise cause from None
            raise FailureError(f"a worker failed: {error}; see the cause above, then resume the run") from error
        except (RayActorError, GetTimeoutError, RayError) as error:
            raise FailureError(
                f"a worker was lost: {str(error).strip().splitlines()[0]}; check its host's memory and logs "
                f"(`ray list actors`), then resume the run"
            ) from error

    def stop(self) -> None:
        """See WorkerGroup."""
        actors, self._actors = self._actors, {}
        for actor in actors.values():
            ray.kill(actor)


def cpus_each(cpus: float, workers: int) -> float:
    """What each actor asks for: one CPU, or its share of the cluster's where there are more workers than CPUs."""
    return min(1.0, math.floor(cpus / workers * 10_000) / 10_000)


def _root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, below the layers that Ray wraps around a task that depended on it."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
