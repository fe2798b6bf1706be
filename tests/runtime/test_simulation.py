"""The controller over fleets that are not there: the same seed the same history, and nothing lost or counted twice."""

import math

import pytest

from runtime.fleet import Fleet, Host, Spells, VirtualClock
from runtime.simulation import Load, Report, SimulatedGroup, simulate
from runtime.work import Line

QUICK = {"mbit": (20_000.0, 20_000.0), "latency": (1e-4, 1e-4), "away": 5.0}
SMALL = Load(weights=4e6, blocks=4, micro_batches=128, segment=3, activation=1e5)


def run(fleet: Fleet, *, load: Load = SMALL, stages: int = 1, steps: int = 5) -> tuple[Report, SimulatedGroup]:
    group = SimulatedGroup(fleet, load, VirtualClock())
    return simulate(fleet, load, stages=stages, steps=steps, group=group), group


def counted_once(group: SimulatedGroup, load: Load, stages: int, steps: int) -> None:
    everything = {(stage, unit) for stage in range(stages) for unit in range(load.micro_batches)}
    for step in range(steps):
        assert set(group.steps[step].units) == everything
        assert set(group.steps[step].units.values()) == {1}


@pytest.mark.parametrize("stages", [1, 2])
def test_the_same_seed_gives_the_same_history(stages: int) -> None:
    fleet = Fleet(hosts=12, leave_per_hour=0.99, seed=5, **QUICK)
    (first, one), (second, two) = (run(fleet, stages=stages, steps=6) for _ in range(2))
    assert one.log == two.log
    assert first == second
    assert first.changes["lost"]
    other, another = run(Fleet(hosts=12, leave_per_hour=0.99, seed=6, **QUICK), stages=stages, steps=6)
    assert another.log != one.log
    assert other.root == first.root


@pytest.mark.parametrize("stages", [1, 3])
def test_every_unit_counts_once_a_step_whoever_leaves(stages: int) -> None:
    fleet = Fleet(hosts=12, leave_per_hour=0.999, seed=2, **QUICK)
    report, group = run(fleet, stages=stages, steps=8)
    counted_once(group, SMALL, stages, 8)
    assert report.changes["lost"] > 2
    assert report.changes["left"]
    assert report.changes["joined"]
    assert report.useful < 1


def test_a_quiet_fleet_is_busy_and_ends_with_the_same_root() -> None:
    quiet, group = run(Fleet(hosts=4, leave_per_hour=0.0, speeds=(1.0, 1.0), **QUICK))
    counted_once(group, SMALL, 1, 5)
    assert quiet.useful > 0.95
    assert quiet.against_ideal > 0.95
    assert (quiet.lost_units, quiet.redone, quiet.falls) == (0, 0, 0)
    disturbed, _ = run(Fleet(hosts=12, leave_per_hour=0.999, **QUICK))
    assert disturbed.root == quiet.root


def test_all_replicas_of_a_stage_lost_is_back_to_the_checkpoint() -> None:
    fleet = Fleet(hosts=6, leave_per_hour=0.0, **QUICK)
    group = SimulatedGroup(fleet, SMALL, VirtualClock())
    crash(group, [host for host in group.machines.hosts if host.number >= 3], at=640.0)
    report = simulate(fleet, SMALL, stages=2, steps=8, group=group)
    assert (report.falls, report.steps) == (1, 8)
    assert report.redone > 0
    counted_once(group, SMALL, 2, 8)
    undisturbed, _ = run(fleet, stages=2, steps=8)
    assert report.root == undisturbed.root


def crash(group: SimulatedGroup, hosts: list[Host], at: float) -> None:
    for host in hosts:
        host.dies = at
        group.machines.expect_end(host)


def test_slow_hosts_take_what_they_can() -> None:
    fleet = Fleet(hosts=4, leave_per_hour=0.0, speeds=(1.0, 1.0), **QUICK)
    group = SimulatedGroup(fleet, SMALL, VirtualClock())
    slow = group.machines.hosts[0]
    slow.speed = 1 / 3
    report = simulate(fleet, SMALL, steps=5, group=group)
    share = group.units_of(slow) / (5 * SMALL.micro_batches)
    assert share == pytest.approx(1 / 10, rel=0.1)
    assert report.against_ideal > 0.9


def test_shares_that_are_fixed_wait_for_the_slowest() -> None:
    fleet = Fleet(hosts=4, leave_per_hour=0.0, speeds=(1.0, 1.0), **QUICK)
    group = SimulatedGroup(fleet, SMALL, VirtualClock())
    group.machines.hosts[0].speed = 1 / 3
    report = simulate(fleet, SMALL, steps=3, fixed=True, group=group)
    assert report.against_ideal < 0.5


def test_what_is_computed_in_a_spell_takes_longer_while_it_lasts() -> None:
    fleet = Fleet(hosts=1, spells_per_hour=1.0, spell=10.0, slowness=5.0)
    first = Spells(fleet, 0, 0.0)._next
    takes = [Spells(fleet, 0, 0.0).stretched(first + after, 4.0) for after in (-4.0, -2.0, 0.0, 8.0, 12.0)]
    assert takes == pytest.approx([4.0, 2.0 + 10.0, 10.0 + 2.0, 2.0 + 3.6, 4.0])
    assert Spells(Fleet(hosts=1), 0, 0.0).stretched(first, 4.0) == 4.0


def test_stragglers_that_sit_out_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(weights=4e6, blocks=4, micro_batches=160, segment=5, activation=1e5)
    fleet = Fleet(hosts=20, leave_per_hour=0.0, spells_per_hour=6.0, spell=100.0, speeds=(1.0, 1.0), **QUICK)
    reports = []
    for grace in (3.0, math.inf):
        monkeypatch.setattr("runtime.work.GRACE", grace)
        report, group = run(fleet, load=load, steps=15)
        counted_once(group, load, 1, 15)
        reports.append(report)
    out, waited = reports
    assert out.root == waited.root
    assert (out.changes["sat out"] > 3, waited.changes["sat out"]) == (True, 0)
    assert out.seconds < 0.75 * waited.seconds


def test_a_line_is_what_looking_at_all_gives() -> None:
    ends = {"a": (3.0, 0), "b": (2.0, 1), "c": (2.0, 0), "d": None}
    line = Line(list(ends), lambda worker: ends[worker], 1.0)
    assert line.first() == ("c", 2.0)
    ends["c"] = (9.0, 1)  # later without notice, as time does it
    assert line.first() == ("b", 2.0)
    ends["d"], ends["b"] = (1.0, 0), None
    line.moved("d")
    line.moved("b")
    assert line.first() == ("d", 1.0)
    assert line.busy == ["b"]
    for worker in ends:
        ends[worker] = None
        line.moved(worker)
    assert line.first() is None


def test_time_beside_is_not_everybodys() -> None:
    clock = VirtualClock()
    later = clock.beside(lambda: clock.sleep(5.0))
    assert (clock.now(), later.done()) == (0.0, False)
    clock.sleep(5.0)
    assert later.done()
    assert later.result() is None
