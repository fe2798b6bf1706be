"""Plans by Program, made once in a process: its workers and replays run the same ones, each with memory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from runtime.program.compiler.axes import View
from runtime.program.compiler.graph import make_graph
from runtime.program.compiler.plan import Plan, make_plan
from runtime.program.compiler.saving import saved_values, shared
from runtime.program.program import Program

REMEMBERED = 256
"""Plans of each kind: a training program has some tens of Programs, counted with the sizes of their chunks."""


@dataclass(frozen=True)
class Handover:
    """A forward plan and what it leaves to the backward one.

    `common` are the values of the backward Program that both compute, `given` where those lie that are handed over,
    `handed` their buffers, by number there and here.
    """

    plan: Plan
    common: Mapping[int, int]
    given: Mapping[int, View]
    handed: Mapping[int, int]


@lru_cache(REMEMBERED)
def plan_alone(program: Program, stable: int) -> Plan:
    """The plan of a Program whose first `stable` inputs are parameters."""
    return make_plan(make_graph(program), stable=stable)


@lru_cache(REMEMBERED)
def plan_forward(forward: Program, backward: Program, stable: int) -> Handover:
    """The plan of `forward` that keeps what `backward` would take long to compute again."""
    common = shared(forward, backward)
    handed = saved_values(backward, common, stable)
    plan = make_plan(make_graph(forward, saved=[common[v] for v in handed]), stable=stable)
    homes: dict[int, int] = {}  # one number for each buffer that is handed over: a value's that lies in it
    for value in handed:
        homes.setdefault(plan.views[common[value]].buffer, value)
    given = {v: replace(plan.views[common[v]], buffer=homes[plan.views[common[v]].buffer]) for v in handed}
    return Handover(plan, common, given, {value: buffer for buffer, value in homes.items()})


@lru_cache(REMEMBERED)
def plan_backward(forward: Program, backward: Program, stable: int, sums: int) -> Plan:
    """The plan of `backward` after the forward plan, whose last `sums` outputs are added to arrays."""
    left = plan_forward(forward, backward, stable)
    graph = make_graph(backward, given=list(left.given), known=left.common, sums=sums)
    return make_plan(graph, stable=stable, given=left.given)
