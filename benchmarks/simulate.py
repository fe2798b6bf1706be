"""A simulated fleet whose hosts come and go: how much of its time is computing that counts, and against the ideal.

The controller, roster and work are those of a real run; hosts, links and time are not (runtime/simulation.py). The
default is a fleet of preemptible machines of one provider: 10 Gbit/s, speeds log-uniform from 0.5 to 2, half of those
that leave say so two minutes before, and for each another comes. A unit is one sequence of 1,024 tokens through GPT-2
small, 4 s at speed 1: half of what two cores of our machine take (docs/performance.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.harness import Goal, Row, main
from runtime.fleet import Fleet
from runtime.simulation import Load, simulate
from storage.errors import UsageError

USEFUL = Goal(relation=">", limit=0.90)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--leave-per-hour", type=float, default=0.3, help="share of the hosts that leave in an hour")
    parser.add_argument("--hours", type=float, default=0.3, help="virtual hours from the first step on")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--units", type=int, default=128, help="micro-batches a step for each host")
    parser.add_argument("--mbit", type=float, nargs=2, default=(10_000.0, 10_000.0), help="slowest and fastest link")
    parser.add_argument("--weights", type=float, default=124e6)
    parser.add_argument("--spells-per-hour", type=float, default=0.0, help="how often a host is slow for a while")
    parser.add_argument("--spell", type=float, default=120.0, help="seconds for which it is")
    parser.add_argument("--slowness", type=float, default=20.0, help="how many times slower it is then")
    parser.add_argument("--wait", action="store_true", help="wait for stragglers, as if they could not sit out")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one simulated run."""
    if not 1 <= arguments.stages <= arguments.hosts or not 0 <= arguments.leave_per_hour < 1:
        raise UsageError("simulate: expected 1 to --hosts stages and --leave-per-hour from 0 to below 1; change them")
    fleet = Fleet(
        hosts=arguments.hosts,
        seed=arguments.seed,
        leave_per_hour=arguments.leave_per_hour,
        mbit=tuple(arguments.mbit),
        spells_per_hour=arguments.spells_per_hour,
        spell=arguments.spell,
        slowness=arguments.slowness,
    )
    load = Load(weights=arguments.weights, micro_batches=arguments.hosts * arguments.units // arguments.stages)
    report = simulate(fleet, load, stages=arguments.stages, seconds=3600 * arguments.hours, sit_out=not arguments.wait)
    hours = report.seconds / 3600
    yield Row(name="useful work", value=report.useful, unit="of host-seconds", goal=USEFUL)
    yield Row(name="units done, of the sum of speeds", value=report.against_ideal, unit="")
    yield Row(name="steps", value=report.steps, unit="")
    yield Row(name="steps an hour", value=report.steps / hours, unit="1/h")
    ideal = report.power / (load.unit * load.micro_batches) / hours
    yield Row(name="steps an hour, ideal", value=ideal, unit="1/h")
    for what, times in report.changes.items():
        yield Row(name=f"workers that {WERE[what]}", value=times, unit="")
    yield Row(name="units lost with their worker", value=report.lost_units, unit="")
    yield Row(name="exchanges begun, a step", value=(report.exchanges - 1) / max(report.steps, 1), unit="")
    yield Row(name="steps redone", value=report.redone, unit="")
    yield Row(name="times back to a checkpoint", value=report.falls, unit="")
    for phase in ("units", "exchange", "reshaping", "saving"):
        yield Row(name=f"time in {phase}", value=report.phases.get(phase, 0.0) / report.seconds, unit="of the run")


WERE = {"lost": "were lost", "left": "left with notice", "joined": "joined", "sat out": "sat a step out"}

if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
