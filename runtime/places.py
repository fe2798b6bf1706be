"""Where in a step the work is: what faults name, traces are keyed by and injected faults aim at.

A place is a path such as `step 3/micro-batch 1/block 0/forward`, `step 3/micro-batch 1/loss`, `step 3/update/wte/0`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from runtime.program.executor import ArithmeticFault
from storage.errors import FailureError

HERE: ContextVar[str] = ContextVar("place", default="")
"""The place of the call that is being made; "" outside of a worker's calls."""


class StepFault(FailureError):
    """The arithmetic refuses a value, a NaN, an infinity or an overflow, here as on every machine; names the place."""


@contextmanager
def at(place: str) -> Iterator[None]:
    """Be at a place, and say so of what fails there."""
    token = HERE.set(place)
    try:
        yield
    except ArithmeticFault as fault:
        remedy = "the same happens on every machine: lower the learning rate or clip the gradient, in a new run"
        raise StepFault(f"{place}: {fault}; {remedy}") from fault
    except StepFault as fault:
        raise StepFault(f"{place}: {fault}") from fault
    except FailureError as error:  # no memory, a kernel that would not compile: says nothing of the run
        raise FailureError(f"{place}: {error}") from error
    finally:
        HERE.reset(token)
