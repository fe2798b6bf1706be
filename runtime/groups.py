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


class WorkersLost(FailureError):
    """Some workers are gone, or to be taken for gone: what they held and had not handed over is lost with them."""

    def __init__(self, lost: Mapping[str, str]) -> None:
        self.lost = dict(lost)
        told = "; ".join(f"{worker} was lost ({reason})" for worker, reason in self.lost.items())
        super().__init__(f"worker {told}; check its host's memory and logs, then `trueweight resume` the run")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.lost,)


class ValueLost(FailureError):
    """A call could not be made: a value that it takes went with the host that kept it."""


class WrongValue(FailureError):
    """A worker was given what no sound worker makes: whoever made it is at fault, and not the one that says so."""


class WorkerGroup(Protocol):
    """Workers by id. What is called of one worker runs one at a time.

    Calls that do not wait for each other's results run in the order in which they were made. Any method raises
    WorkersLost once it finds that workers are gone.
    """

    def start(self, configs: Mapping[str, bytes]) -> None:
        """Start one more worker for each id with its encoded WorkerConfig; FailureError naming one that will not do."""

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """A handle for the method's result or, with `returns`, a tuple of handles for its tuple of that length."""

    def share(self, value: Any) -> Handle:
        """A handle for a value that several calls take."""

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """The values of handles in order; raises what the worker that made one raised."""

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        """(number, what its worker raised) of those of the handles that are finished; [] where none is in `timeout` s.

        Their values stay where they are.
        """

    def stop(self, workers: Sequence[str] | None = None) -> None:
        """End some workers of the group, all without; harmless when repeated."""


class Membership(Protocol):
    """What the machines have to say about a group while it works."""

    def room(self) -> int:
        """How many more workers could be started now."""

    def leaving(self) -> Mapping[str, str]:
        """The workers whose hosts are about to go, with the reason."""


class LocalGroup:
    """Workers in this process: a call has run when it returns, and its handle is the value."""

    def __init__(self, build: Callable[[bytes], object]) -> None:
        self._build = build
        self._workers: dict[str, object] = {}

    def start(self, configs: Mapping[str, bytes]) -> None:
        """Build every worker."""
        self._workers |= {worker: self._build(config) for worker, config in configs.items()}

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

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        """All of them, without waiting: what they stand for has been done."""
        del timeout
        return [(number, None) for number in range(len(handles))]

    def stop(self, workers: Sequence[str] | None = None) -> None:
        """Forget the workers."""
        for worker in list(self._workers if workers is None else workers):
            self._workers.pop(worker, None)


def require_version(worker: str, host: str, found: str) -> None:
    """FailureError naming the worker and its host where it runs another Trueweight than this controller."""
    if found != VERSION:
        raise FailureError(
            f"worker {worker} on host {host}: expected Trueweight {VERSION} as on the controller, got {found}; "
            f"install the same version on every host of the cluster"
        )
