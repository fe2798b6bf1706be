"""When a run goes by another plan: decisions over hosts that are names and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from runtime.costs import Block, Host, Model
from runtime.plan import Plan
from runtime.planner import make_placement
from runtime.revision import EVERY_SECONDS, SEVERAL, ByPlanner, Revision, Standing, graded, kept, off, settled
from storage.errors import FailureError

MODEL = Model(
    blocks=tuple(Block(work=1.0, tensors=("tied", f"own{b}") if b in (0, 5) else (f"own{b}",)) for b in range(6)),
    elements={"tied": 1000, **{f"own{b}": 100 for b in range(6)}},
    slots=2,
    micro_batches=8,
)


def host(name: str, speed: float = 1.0, **given: float) -> Host:
    fixed = {"memory": 2**30, "bandwidth": 1e9, "latency": 0.0}
    return Host(name=name, speed=speed, **{**fixed, **given})  # type: ignore[arg-type]


@dataclass
class OnPaper:
    """Hosts that are there."""

    there: list[Host]
    sent: dict[str, str] = field(default_factory=dict)

    def hosts(self) -> Sequence[Host]:
        return self.there

    def at(self) -> Mapping[str, str]:
        return self.sent

    def send(self, workers: Mapping[str, str]) -> None:
        self.sent |= workers


class Run:
    """A run that follows what a reviser says; `slow` is how many times as long as measured hosts take."""

    def __init__(self, *hosts: Host, model: Model = MODEL, steps_left: int = 10**6) -> None:
        self.model, self.sites, self.steps_left, self.now = model, OnPaper(list(hosts)), steps_left, 0.0
        self.slow: dict[str, float] = {}
        self.reviser = ByPlanner(model=model, sites=self.sites)
        self.revision = self.reviser.begin()

    def step(self) -> Revision | None:
        """What is said after a step, which is done."""
        self.now += 1.0
        plan, places = self.revision.plan, self.revision.places
        speeds = {one.name: one.speed for one in self.sites.there}
        seconds = {
            place: self.model.span(*plan.bounds[s : s + 2]).work * self.slow.get(name, 1.0) / speeds[name]
            for place, name in places.items()
            if name in speeds
            for s, _ in [Plan.place(place)]
        }
        standing = Standing(plan=plan, hosts=places, seconds=seconds, steps_left=self.steps_left, now=self.now)
        said = self.reviser.revise(standing)
        self.revision = said or self.revision
        return said

    def steps(self, count: int) -> list[Revision]:
        return [said for said in (self.step() for _ in range(count)) if said]


def halves(**given: float) -> tuple[Host, Host]:
    """Two hosts of which neither can hold the whole model."""
    return host("a", memory=HALF, **given), host("b", memory=HALF, **given)


BIG = replace(MODEL, elements={name: 10**6 if name != "tied" else size for name, size in MODEL.elements.items()})
"""28 MB a block, of which a half takes four at most."""
HALF = 2**27


def test_off_is_all_of_the_last_several_on_one_side() -> None:
    assert off([1.0, *[1.3] * SEVERAL])
    assert off([0.7] * SEVERAL)
    assert not off([1.3] * (SEVERAL - 1))
    assert not off([*[1.3] * SEVERAL, 1.2])
    assert not off([1.3, 0.7] * SEVERAL)


def test_hosts_about_alike_are_alike() -> None:
    assert graded(host("a", 1.0)).kind == graded(host("b", 1.02)).kind
    assert graded(host("a", 1.0)).kind != graded(host("b", 1.1)).kind
    assert graded(host("a", 3.0)).speed == pytest.approx(3.0, rel=0.026)
    assert graded(host("a", memory=2**30 + 5)).memory == 2**30
    link = graded(replace(host("a"), bandwidth=1.5 * 2**30, latency=0.003))
    assert (link.bandwidth, link.latency) == (2**30, 2**-8)
    assert graded(replace(host("a"), latency=0.0)).latency == graded(replace(host("a"), latency=5e-5)).latency > 0


def test_what_a_stage_keeps() -> None:
    bounds = (0, 2, 6)
    assert kept(MODEL, bounds, 0) == {
        ("weight", "tied"): 4000, ("weight", "own0"): 400, ("weight", "own1"): 400,
        ("slots", "tied"): 8000, ("slots", "own0"): 800, ("slots", "own1"): 800,
    }  # fmt: skip
    assert kept(MODEL, bounds, 1)["weight", "tied"] == 4000
    assert ("slots", "tied") not in kept(MODEL, bounds, 1)


def test_hosts_that_are_alike_stay_where_their_state_is() -> None:
    hosts = [*halves(), host("c", memory=HALF)]
    placement = make_placement(BIG, hosts, stages=3)
    assert placement.bounds == (0, 2, 4, 6)
    where = {"c": 0, "a": 2, "b": 1}
    assert settled(BIG, placement, hosts, placement.bounds, where) == ((("c",), ("b",), ("a",)), 0)
    _, moved = settled(BIG, placement, hosts, placement.bounds, {"a": 0, "b": 1})
    assert moved == sum(kept(BIG, placement.bounds, 2).values())


def test_nothing_is_said_while_nothing_changes() -> None:
    run = Run(*halves(), model=BIG)
    assert run.revision.plan.bounds == (0, 3, 6)
    assert run.revision.told == "placed: blocks 0-2 on a | 3-5 on b"
    assert run.steps(100) == []


def test_a_host_that_slows_down_gets_fewer_blocks_after_several_steps() -> None:
    run = Run(*halves(), model=BIG)
    assert run.revision.plan.bounds == (0, 3, 6)
    assert run.steps(10) == []
    run.slow["a"] = 2.0
    assert run.steps(SEVERAL - 1) == []
    (said,) = run.steps(40)
    assert said.plan.bounds == (0, 2, 6)
    assert said.hosts == (("a",), ("b",))
    assert said.told.startswith("moved: blocks 0-2 on a | 3-5 on b, now 0-1 on a | 2-5 on b, saves ")
    assert run.steps(100) == []
    run.slow.clear()
    (back,) = run.steps(100)
    assert back.plan.bounds == (0, 3, 6)


def test_all_being_slower_alike_is_no_reason() -> None:
    run = Run(*halves(), model=BIG)
    run.slow = {"a": 3.0, "b": 3.0}
    assert run.steps(100) == []


def test_a_hiccup_is_no_reason_and_neither_are_few_steps_left() -> None:
    run = Run(*halves(), model=BIG)
    for _ in range(10):
        run.slow["a"] = 3.0
        assert run.steps(SEVERAL - 1) == []
        run.slow["a"] = 1.0
        assert run.step() is None
    short = Run(*halves(bandwidth=1e3), model=BIG, steps_left=3)
    short.slow["a"] = 2.0
    assert short.steps(100) == []


def test_it_decides_because_of_speeds_only_every_so_often() -> None:
    run = Run(*halves(), model=BIG)
    run.step()
    run.slow["a"] = 2.0
    said = [(run.now, found) for found in (run.step() for _ in range(100)) if found]
    assert len(said) == 1
    assert said[0][0] >= EVERY_SECONDS


def test_a_host_that_joins_is_used_where_that_pays() -> None:
    run = Run(host("a"))
    run.step()
    run.sites.there.append(host("b"))
    said = run.step()
    assert said is not None
    assert sorted(said.places.values()) == ["a", "b"]
    assert run.steps(100) == []
    late = Run(host("a", bandwidth=1e3), steps_left=1)
    late.sites.there.append(host("b", bandwidth=1e3))
    assert late.steps(100) == []


def test_a_host_that_is_about_to_go_is_left_at_once_however_few_steps_there_are() -> None:
    run = Run(*halves(), model=BIG, steps_left=1)
    run.step()
    run.sites.there = [run.sites.there[0], host("c", memory=HALF)]
    said = run.step()
    assert said is not None
    assert said.hosts == (("a",), ("c",))
    assert said.told == "moved: blocks 0-2 on a | 3-5 on b, now 0-2 on a | 3-5 on c"


def test_where_the_hosts_do_not_suffice_it_stays_and_a_run_does_not_begin() -> None:
    run = Run(*halves(), model=BIG)
    run.sites.there.pop()
    assert run.steps(10) == []
    with pytest.raises(FailureError, match="no division of the blocks over the hosts fits"):
        run.reviser.begin()
    run.sites.there.clear()
    assert run.steps(10) == []
    with pytest.raises(FailureError, match="no host is left"):
        run.reviser.begin()
