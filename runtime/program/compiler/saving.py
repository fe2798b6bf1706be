"""What a forward pass keeps for its backward pass: the fewest bytes from which the rest is cheap to compute again.

A backward Program computes its block's forward part anew (decisions/0004), on the same values. So whatever both compute
may be handed over. Products and random numbers are never made twice; sums, norms and activation functions are. The
choice is a minimum cut, as in "Min-cut rematerialization" of PyTorch's AOTAutograd (functorch, 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx

from runtime.program.program import Program
from runtime.program.types import NUMPY


def shared(forward: Program, backward: Program) -> dict[int, int]:
    """For every value of `backward` that `forward` computes too, from the inputs that both begin with, its number."""
    keys: dict[Any, int] = {}
    names = _keys(forward, keys)
    there = {name: value for value, name in enumerate(names)}
    return {value: there[name] for value, name in enumerate(_keys(backward, keys)) if name in there}


def _keys(program: Program, keys: dict[Any, int]) -> list[int]:
    """A number for each value, equal for values computed in the same way."""
    found: list[int] = []
    for place, (_, t) in enumerate(program.inputs):
        found.append(keys.setdefault(("input", place, t), len(keys)))
    for op in program.ops:
        key = (op.name, tuple(sorted(op.attributes.items())), tuple(found[i] for i in op.inputs))
        found.append(keys.setdefault(key, len(keys)))
    return found


def saved_values(backward: Program, common: Mapping[int, int], stable: int) -> list[int]:
    """The values of `backward`, among the `common` ones, that the forward pass keeps."""
    first = len(backward.inputs)
    changing = _changing(backward, stable)
    drawn = _drawn(backward)
    graph = networkx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for value, op in enumerate(backward.ops, first):
        for operand in op.inputs:
            if operand < first or operand not in common or operand not in changing:
                continue
            if value in common:
                graph.add_edge((operand, "out"), (value, "in"))
            else:
                graph.add_edge((operand, "out"), "sink")
        if value in common and value in changing:
            size = op.type.elements * NUMPY[op.type.dtype].itemsize
            graph.add_edge((value, "in"), (value, "out"), capacity=max(size, 1))
            integers = all(backward.types[o].dtype in ("i32", "i64") for o in op.inputs)
            if op.name == "dot" or (value in drawn and integers and op.type.dtype in ("bool", "f32")):
                graph.add_edge("source", (value, "in"))
    _, (_, needs) = networkx.minimum_cut(graph, "source", "sink")
    return sorted(
        value for value in common if ((value, "out") in needs and (value, "in") in graph and (value, "in") not in needs)
    )


def _changing(program: Program, stable: int) -> set[int]:
    found = set(range(stable, len(program.inputs)))
    for value, op in enumerate(program.ops, len(program.inputs)):
        if any(o in found for o in op.inputs):
            found.add(value)
    return found


def _drawn(program: Program) -> set[int]:
    """Values that depend on random words and on no other input."""
    rng = {n for n, (name, _) in enumerate(program.inputs) if name == "rng"}
    others = set(range(len(program.inputs))) - rng
    drawn, mixed = set(rng), set(others)
    for value, op in enumerate(program.ops, len(program.inputs)):
        if any(o in mixed for o in op.inputs):
            mixed.add(value)
        elif any(o in drawn for o in op.inputs):
            drawn.add(value)
    return drawn
