"""Memory that others ask for: what a Program, a state or a batch takes is looked at before it is allocated.

A recipe and a Program may be anybody's. Where their values would not fit, the operating system ends the process, which
tells nobody why; so whatever takes much asks here first.
"""

from pathlib import Path

from storage.errors import FailureError

LARGE = 2**24
"""Bytes from which memory is asked for only after a look at how much there is."""


def available() -> int | None:
    """Bytes of memory that this host can still give, None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def require(size: int, what: str) -> None:
    """Returns where this host can give `size` bytes more; FailureError naming what they are for."""
    free = available() if size >= LARGE else None
    if free is not None and size > free:
        raise FailureError(
            f"out of memory: expected {size / 2**30:.1f} GiB for {what}, got {free / 2**30:.1f} GiB available; use a "
            f"host with more memory, or give this one fewer workers"
        )
