"""Model and compiled contract of the ledger in lock-step: steps, refusals by error, gas by function.

Episodes of random calls, each with a ledger of its own; `benchmarks/lockstep.py` says what is compared. The first
difference ends the benchmark with an error. Every function has to have been reached, and every error.

`--foreign` settles a run on an anvil of slow blocks instead, as on somebody's node; a quarter of an hour.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from benchmarks import foreign
from benchmarks.harness import Goal, Row, main
from benchmarks.lockstep import ERRORS, Lockstep
from ledger.purse import FUNCTIONS
from storage.errors import UsageError

EPISODE = 400


@dataclass
class Tally:
    """What was reached, over all episodes."""

    steps: int = 0
    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    gas: dict[str, list[int]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Functions that never succeeded and errors that never came."""
        return [*sorted(FUNCTIONS - set(self.done)), *(error for error in ERRORS if error not in self.refused)]


def drive(steps: int, seed: int) -> Tally:
    """At least so many steps, in whole episodes; Difference where model and contract part."""
    tally, started = Tally(), perf_counter()
    episode = 0
    while tally.steps < steps:
        played = Lockstep(f"{seed} {episode}")
        played.play(min(EPISODE, steps - tally.steps))
        played.wind_up()
        tally.steps += played.steps
        tally.done += played.done
        tally.refused += played.refused
        for function, used in played.contract.gas.items():
            tally.gas.setdefault(function, []).extend(used)
        episode += 1
    tally.seconds = perf_counter() - started
    return tally


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--steps", type=int, default=10_000, help="calls to make, at least")
    parser.add_argument("--foreign", action="store_true", help="settle a run on a node of slow blocks instead")
    parser.add_argument("--block-time", type=int, default=12, help="seconds between its blocks")
    parser.add_argument("--seed", type=int, default=1, help="a seed gives the same calls")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Steps and their rate, what was reached how often, gas of the calls that were not refused."""
    if arguments.foreign:
        yield from measure_foreign(arguments.block_time)
        return
    if arguments.steps < 1:
        raise UsageError(f"--steps {arguments.steps}: expected at least 1; choose e.g. 10000")
    tally = drive(arguments.steps, arguments.seed)
    yield Row(name="steps", value=tally.steps, unit="")
    yield Row(name="rate", value=tally.steps / tally.seconds, unit="steps/s")
    for error in ERRORS:
        yield Row(name=f"refused: {error}", value=tally.refused[error], unit="")
    for function, used in sorted(tally.gas.items()):
        yield Row(name=f"{function}: done", value=tally.done[function], unit="")
        yield Row(name=f"{function}: least", value=min(used), unit="gas")
        yield Row(name=f"{function}: median", value=median(used), unit="gas")
        yield Row(name=f"{function}: most", value=max(used), unit="gas")
    yield Row(
        name="functions and errors not reached", value=len(tally.missing), unit="", goal=Goal(relation="==", limit=0)
    )


def measure_foreign(block_time: int) -> Iterator[Row]:
    """How long a settlement takes on a node of somebody's that is stopped in the middle, and whether it ends."""
    if block_time < 1:
        raise UsageError(f"--block-time {block_time}: expected at least 1; choose e.g. 12")
    found = foreign.settle(block_time=block_time)
    yield Row(name="settlement", value=found.seconds, unit="s")
    yield Row(name="blocks", value=found.blocks, unit="")
    yield Row(name="transactions", value=found.transactions, unit="")
    yield Row(name="segments final", value=found.final, unit="", goal=Goal(relation="==", limit=found.segments))
    yield Row(name="run closed", value=float(found.status == "closed"), unit="", goal=Goal(relation="==", limit=1))


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
