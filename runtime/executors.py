"""The executors by name: the one place of the runtime that imports them."""

from runtime.program.executor import Executor


def reference(threads: int) -> Executor:
    """The reference executor on this machine's CPU with `threads` threads, 0 for torch's own choice."""
    import torch

    from runtime.program.reference import ReferenceExecutor

    if threads:
        torch.set_num_threads(threads)
    return ReferenceExecutor()
