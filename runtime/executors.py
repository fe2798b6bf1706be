"""The executors by name: the one place of the runtime that imports them."""

from collections.abc import Callable, Mapping
from functools import partial

from runtime.program.executor import Executor


def reference(threads: int) -> Executor:
    """The reference executor on this machine's CPU with `threads` threads, 0 for torch's own choice."""
    import torch

    from runtime.program.reference import ReferenceExecutor

    if threads:
        torch.set_num_threads(threads)
    return ReferenceExecutor()


def found() -> Mapping[str, Callable[[], Executor]]:
    """Every executor that this host could run, by name, not yet made: making one proves its device."""
    import torch

    from runtime.program.reference import ReferenceExecutor

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {f"reference on {device}": partial(ReferenceExecutor, device) for device in devices}
