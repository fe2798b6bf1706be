"""Workers as something to call: the seam between the controller and wherever the workers live.

`LocalGroup` runs them in this process, one call after the other; `runtime.actors.group.RayGroup` as Ray actors. A
call returns a handle at once. Handles may be passed to further calls: what one worker made goes straight to the next.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from runtime.plan import Plan
from runtime.version import VERSION
from storage.codec import U32, U64, record
from storage.errors import FailureError

Handle = Any
"""What a call returns: opaque to the caller, a value or a reference to one."""


@record(kind=101)
class WorkerConfig:
    """All that a worker is started with, as bytes: no code, only a Program. `keys` is a folder, "" for no receipts."""

    worker: str
    plan: Plan
    programs: bytes
    seed: U64
    keys: str
    threads: U32


class WorkerGroup(Protocol):
    """Workers by id. Calls to one worker run in the order in which they were made."""

    def start(self, configs: Mapping[str, bytes]) -> None:
        """Start one worker for each id with its encoded WorkerConfig; FailureError naming a worker that will not do."""

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """A handle for the method's result or, with `returns`, a tuple of handles for its tuple of that length."""

    def share(self, value: Any) -> Handle:
        """A handle for a value that several calls take."""

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """The values of handles in order; raises what the worker that made one raised."""

    def stop(self) -> None:
        """End every worker of the group; harmless when repeated."""


class LocalGroup:
    """Workers in this process: a call has run when it returns, and its handle is the value."""

    def __init__(self, build: Callable[[bytes], object]) -> None:
        self._build = build
        self._workers: dict[str, object] = {}

    def start(self, configs: Mapping[str, bytes]) -> None:
        """Build every worker."""
        self._workers = {worker: self._build(config) for worker, config in configs.items()}

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """The method's result."""
        value = getattr(self._workers[worker], method)(*args)
        if returns is not None and len(value) != returns:
            raise ValueError(f"{worker}.{method}: expected {returns} results, got {len(value)}")
        return value

    def share(self, value: Any) -> Handle:
        """The value itself."""
        return value

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """The values themselves."""
        return list(handles)

    def stop(self) -> None:
        """Forget the workers."""
        self._workers = {}


def require_version(worker: str, host: str, found: str) -> None:
    """FailureError naming the worker and its host where it runs another Trueweight than this controller."""
    if found != VERSION:
        raise FailureError(
            f"worker {worker} on host {host}: expected Trueweight {VERSION} as on the controller, got {found}; "
            f"install the same version on every host of the cluster"
        )
