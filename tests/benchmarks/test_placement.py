"""A worker that the placement benchmark slows has a third of a processor, and all of it again afterwards."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from benchmarks.placement import slowed, stopped_in_turns


def busy() -> None:
    while True:
        pass


def used(process: int) -> float:
    """Seconds of processor that a process has had (fields 14 and 15 of proc(5)'s stat)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def worker() -> Iterator[int]:
    made = multiprocessing.get_context("spawn").Process(target=busy)
    made.start()
    assert made.pid is not None
    while used(made.pid) < 0.5:  # it has started, and turns
        time.sleep(0.05)
    yield made.pid
    made.kill()
    made.join()


def share(process: int) -> float:
    """Of a processor, for half a second or so."""
    before, began = used(process), time.monotonic()
    time.sleep(0.6)
    return (used(process) - before) / (time.monotonic() - began)


@pytest.mark.parametrize("slow", [slowed, stopped_in_turns])
def test_a_slowed_process_has_a_third(slow: Callable[[int], AbstractContextManager[None]], worker: int) -> None:
    seen: list[tuple[float, float]] = []
    while len(seen) < 8:  # others may have the processor at the wrong time
        with slow(worker):
            within = share(worker)
        seen.append((within, share(worker)))
        if 0.15 < within < 0.45 and seen[-1][1] > 1.5 * within:
            break
    within, after = seen[-1]
    assert 0.15 < within < 0.45, seen
    assert after > 1.5 * within, seen
