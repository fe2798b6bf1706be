"""From torch modules to Programs: trace with torch.func and make_fx, then rewrite every ATen operator by its rule.

One trace yields a block's forward and backward, so both see the same operators on the same values; each Program keeps
what its outputs need. Every operator is labelled with the path of its module and the ATen operator it came from.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from runtime.program import random, sums
from runtime.program.aten import RULES, Unsupported
from runtime.program.builder import Builder, Value
from runtime.program.operators import OperatorError
from runtime.program.program import Program
from runtime.program.types import Type, type_of
from storage.errors import UsageError

KEPT = ("embedding_dense_backward", "select_backward", "slice_backward")
"""Operators lowered by a rule of their own although torch decomposes them: the rule is shorter and adds less."""

BACKWARD = "<backward>"
"""Stands for the module while gradients are traced."""


TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class BlockPrograms:
    """What one distinct block becomes; conventions in `training.py`."""

    forward: Program
    backward: Program
    evaluate: Program


@dataclass
class Source:
    """Where an operator comes from: module path inside the block, and file and line of the submitter's code."""

    module: str = ""
    line: str = ""


class _SourceMode(TorchFunctionMode):
    """Notes for every torch function that the model calls where it was called from."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._path: list[str] = []
        self._hooks = [
            hook
            for name, module in block.named_modules()
            for hook in (
                module.register_forward_pre_hook(lambda m, a, n=name: self._path.append(n)),
                module.register_forward_hook(lambda m, a, o: self._leave()),
            )
        ]

    def _leave(self) -> None:
        self._path.pop()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if fx_traceback.current_meta.get("custom") == {"module": BACKWARD}:
            return func(*args, **(kwargs or {}))
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        known = frame is not None and frame.f_code.co_filename != __file__
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}" if known else ""
        path = self._path[-1] if self._path else ""
        fx_traceback.current_meta["custom"] = {"module": path, "line": line}
        return func(*args, **(kwargs or {}))


@contextmanager
def _sources(module: nn.Module) -> Iterator[None]:
    mode = _SourceMode(module)
    try:
        with fx_traceback.preserve_node_meta(), mode:
            yield
    finally:
        mode.remove()


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, down to the core operators; making the table takes as long as tracing a layer."""
    table = dict(core_aten_decompositions())
    return {k: v for k, v in table.items() if not any(name in str(k) for name in KEPT)}


@contextmanager
def _traceable(name: str) -> Iterator[None]:
    """Turns torch's refusals of a model into the submitter's UsageError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"{name}: expected a model that torch can trace for this input, got {type(error).__name__}: {reason}; let "
            "no shape or branch depend on values, register tensors that are not parameters as buffers, and keep no "
            "running statistics (track_running_stats=False)"
        ) from error


def trace(function: Callable[..., Any], arguments: Sequence[Any], module: nn.Module) -> fx.Graph:
    """The core ATen graph of a function of tensors, without in-place operators; no arithmetic is done."""
    with sdpa_kernel(SDPBackend.MATH), _sources(module):
        made = make_fx(
            functionalize(function, remove="mutations"), decomposition_table=_decompositions(), tracing_mode="fake"
        )
        return made(*arguments).graph


class Lowering:
    """One walk over a graph, from given Values for its placeholders to Values for its outputs."""

    def __init__(self, builder: Builder, *, slices: int, name: str, rng: Value | None) -> None:
        self.builder = builder
        self.slices = slices
        self._name = name
        self._rng = rng
        self._drawn = 0

    def random_words(self, elements: int) -> Value:
        """The next operator's Philox words, i64[elements]."""
        if self._rng is None:
            raise Unsupported("a random operator where the Program draws none")
        drawn, self._drawn = self._drawn, self._drawn + 1
        return random.words(self._rng, elements, purpose=random.PURPOSE_DROPOUT, operator=drawn)

    def lower(self, graph: fx.Graph, placeholders: Sequence[Value]) -> list[Any]:
        """The graph's outputs, flattened; UsageError where an operator has no rule, naming it and its source."""
        values: dict[fx.Node, Any] = {}
        given = iter(placeholders)
        sources = _attribute(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], lambda n: values[n]))
            elif node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = self._apply(node, values, sources[node])
        raise AssertionError("a graph without an output")

    def _apply(self, node: fx.Node, values: Mapping[fx.Node, Any], source: Source) -> Any:
        full = str(node.target).removeprefix("aten.")
        name = full.split(".")[0]
        found = RULES.get(full.removesuffix(".default")) or RULES.get(name)
        if found is None or node.op != "call_function":
            raise self._refusal(full, source, "has no lowering rule")
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("layout", "device", "pin_memory", "memory_format")}
        label = f"{source.module}, {name}" if source.module else name
        try:
            with self.builder.label(label):
                return found(self, *args, **fx.node.map_arg(kwargs, lambda n: values[n]))
        except (Unsupported, OperatorError) as error:
            raise self._refusal(full, source, f"cannot be lowered: {error}") from error

    def _refusal(self, operator: str, source: Source, why: str) -> UsageError:
        where = f"module {source.module or 'itself'!r} of {self._name}"
        return UsageError(
            f"ATen operator {operator!r} {why} (in {where}{', at ' + source.line if source.line else ''}). "
            "Rewrite that line with supported operators, or add a rule to runtime/program/aten/"
        )


def _attribute(graph: fx.Graph) -> dict[fx.Node, Source]:
    """The source of each node. A backward node takes that of the latest forward value it reads, where it reads one."""
    found: dict[fx.Node, Source] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    backward = False
    for node in graph.nodes:
        note = node.meta.get("custom") or {}
        backward = backward or note.get("module") == BACKWARD
        if backward:
            read = [n for n in node.all_input_nodes if n in found and found[n].module]
            found[node] = found[max(read, key=lambda n: order[n])] if read else Source()
        else:
            found[node] = Source(note.get("module", ""), note.get("line", ""))
    return found


@dataclass(frozen=True, kw_only=True)
class _Traced:
    """A block's graph from (parameters, buffers, x, dy) to (y, [dx,] gradients), and what its Programs take."""

    graph: fx.Graph
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Sequence[np.ndarray]
    x: Type
    output: Tensor

    @property
    def differentiable(self) -> bool:
        """Whether there is a dx."""
        return self.x.dtype == "f32"


def _trace_block(block: nn.Module, example: Tensor, name: str) -> _Traced:
    parameters: dict[str, Tensor] = {k: p.detach() for k, p in block.named_parameters(remove_duplicate=False)}
    buffers: dict[str, Tensor] = dict(block.named_buffers())
    x = type_of(np.empty(example.shape, example.numpy().dtype))

    def call(p: Mapping[str, Tensor], b: Mapping[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(block, (dict(p), dict(b)), (x,), tie_weights=False)

    with torch.no_grad():
        output = call(parameters, buffers, example)
    _check_output(output, name)

    def step(p: list[Tensor], b: list[Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
        named, held = dict(zip(parameters, p, strict=True)), dict(zip(buffers, b, strict=True))
        arguments = (named, x) if example.is_floating_point() else (named,)
        y, pull = torch.func.vjp(lambda q, z=x: call(q, held, z), *arguments)[:2]
        fx_traceback.current_meta["custom"] = {"module": BACKWARD}
        gradients, *dx = pull(dy)
        return [y, *dx, *(gradients[k] for k in parameters)]

    arguments = (list(parameters.values()), list(buffers.values()), example, torch.empty_like(output))
    return _Traced(
        graph=trace(step, arguments, block),
        parameters={k: tuple(p.shape) for k, p in parameters.items()},
        buffers=[b.detach().cpu().numpy() for b in buffers.values()],
        x=x,
        output=output,
    )


def _block_program(
    traced: _Traced, outputs: Callable[[list[Value]], list[Value]], *, slices: int, name: str, draws: bool, pulls: bool
) -> Program:
    """The Program of some of a trace's outputs, with an `rng` input if it `draws` and a `dy` input if it `pulls`."""
    b = Builder()
    weights = [b.input(k, "f32", *shape) for k, shape in traced.parameters.items()]
    x = b.input("x", traced.x.dtype, *traced.x.shape)
    rng = b.input("rng", "i64", random.RNG_WORDS) if draws else None
    dy = b.input("dy", "f32", *traced.output.shape) if pulls else b.full("f32", traced.output.shape, 0.0)
    lowering = Lowering(b, slices=slices, name=name, rng=rng)
    values = lowering.lower(traced.graph, [*weights, *map(b.constant, traced.buffers), x, dy])
    return b.finish(outputs(values))


def lower_block(
    block: nn.Module, example: Tensor, *, slices: int, terms: int, name: str
) -> tuple[BlockPrograms, Tensor]:
    """The Programs of one block for inputs like `example`, and an output with the shape that the next block gets.

    `terms` is how many of its gradients may be added exactly: micro-batches times the blocks that share a tensor.
    Traced twice, training and evaluating: dropout is the difference, and only `forward` takes random words.
    """
    with _traceable(name):
        training = _trace_block(block.train(), example, name)
        evaluating = _trace_block(block.eval(), example, name)
    block.train()
    first = 2 if training.differentiable else 1

    def gradients(values: list[Value]) -> list[Value]:
        return [*values[1:first], *(sums.to_grid(g, terms) for g in values[first:])]

    made = BlockPrograms(
        forward=_block_program(training, lambda v: v[:1], slices=slices, name=name, draws=True, pulls=False),
        backward=_block_program(training, gradients, slices=slices, name=name, draws=True, pulls=True),
        evaluate=_block_program(evaluating, lambda v: v[:1], slices=slices, name=name, draws=False, pulls=False),
    )
    return made, training.output


def _check_output(output: Any, name: str) -> None:
    if not isinstance(output, Tensor) or output.dtype != torch.float32:
        got = f"{output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"{name}: expected one float32 tensor as its output, got {got}; return one tensor from forward"
        )


def lower_loss(
    loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, *, terms: int, slices: int
) -> Program:
    """loss(y, target) -> (mean loss on the grid, dy); `terms` such losses may be added exactly."""
    module = loss if isinstance(loss, nn.Module) else nn.Identity()

    def step(y: Tensor, t: Tensor) -> Any:
        value, pull = torch.func.vjp(lambda z: loss(z, t), y)[:2]
        fx_traceback.current_meta["custom"] = {"module": BACKWARD}
        return [value, *pull(torch.ones(()))]

    with _traceable("the loss"):
        graph = trace(step, (output, target), module)
    b = Builder()
    y, t = b.input("y", "f32", *output.shape), b.input("target", "i64", *target.shape)
    value, dy = Lowering(b, slices=slices, name="the loss", rng=None).lower(graph, [y, t])
    return b.finish([sums.to_grid(value, terms), dy])


def lower_metric(
    loss: Callable[[Tensor, Tensor], Tensor],
    hits: Callable[[Tensor, Tensor], Tensor],
    output: Tensor,
    target: Tensor,
    *,
    terms: int,
    slices: int,
) -> Program:
    """metric(y, target) -> (mean loss on the grid, hits, count), all i64 scalars."""
    with _traceable("the metric"):
        graph = trace(lambda y, t: [loss(y, t), hits(y, t)], (output, target), nn.Identity())
    b = Builder()
    y, t = b.input("y", "f32", *output.shape), b.input("target", "i64", *target.shape)
    value, hit = Lowering(b, slices=slices, name="the metric", rng=None).lower(graph, [y, t])
    return b.finish([sums.to_grid(value, terms), hit, b.literal("i64", target.numel())])
