"""The compiled executor gives the reference executor's bytes, whatever the Program, the processor or the shapes."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.executors import compiled
from runtime.program import functions, sums
from runtime.program.build import build_training_program
from runtime.program.builder import Builder, Value
from runtime.program.compiler.executor import CompiledExecutor
from runtime.program.compiler.graph import ELEMENTWISE, REDUCTIONS, SUNK, VIEWS, make_graph
from runtime.program.compiler.loops import MEANING
from runtime.program.compiler.plan import Buffer, Loop, Plan, make_plan
from runtime.program.compiler.saving import saved_values, shared
from runtime.program.executor import ArithmeticFault
from runtime.program.operators import OPERATORS, OperatorError
from runtime.program.program import Program
from runtime.program.random import PURPOSE_DROPOUT, words
from runtime.program.reference import ReferenceExecutor
from runtime.program.training import KindSpec, TrainingProgram
from runtime.program.vectors import check, floats, load
from runtime.recipe import parse_recipe
from runtime.testing import local_group, tiny_job, tiny_program, train
from storage import native
from storage.store import memory_store

TEXT, IMAGES = ((8,), 61, True), ((1, 8, 8), 10, False)
FAMILIES = {
    "gpt": (TEXT, "layers = 1\nwidth = 12\nheads = 3\ndropout = 0.2"),
    "llama": (TEXT, "layers = 1\nwidth = 16\nheads = 4\nkv_heads = 2"),
    "mlp": (IMAGES, "hidden = [9, 7]\nactivation = 'silu'\ndropout = 0.1"),
    "convnet": (IMAGES, "channels = [4, 6]\ngroups = 2"),
}
REFERENCE, COMPILED, PAIRED = ReferenceExecutor(), CompiledExecutor(1), CompiledExecutor(2)


class Data(NamedTuple):
    shape: tuple[int, ...]
    vocab: int
    is_text: bool


def outcome(executor: ReferenceExecutor, program: Program, inputs: list[np.ndarray]) -> Any:
    """The outputs' types and bytes, or what the fault says."""
    try:
        made = executor.run(program, [executor.put(array) for array in inputs])
    except ArithmeticFault as fault:
        return str(fault)
    return [(array.dtype, array.shape, array.tobytes()) for array in map(executor.get, made)]


def check_same(program: Program, inputs: list[np.ndarray], stable: int = 0) -> None:
    """The reference's outcome with 1 and with 2 threads, and again while the first inputs stay what they are."""
    want = outcome(REFERENCE, program, inputs)
    for executor in (COMPILED, PAIRED):
        assert outcome(executor, program, inputs) == want
    if stable and isinstance(want, list):
        handles = [COMPILED.put(array) for array in inputs]
        for _ in range(2):
            made = COMPILED.run(program, handles, stable=stable)
            assert [(a.dtype, a.shape, a.tobytes()) for a in map(COMPILED.get, made)] == want
        COMPILED.forget()


def plan_of(*values: Value) -> Plan:
    return make_plan(make_graph(values[0].builder.finish(list(values))))


def test_every_operator_of_the_table_has_a_place() -> None:
    elsewhere = {"literal", "constant", "iota", "dot", "take", "scatter_add", "concat"}
    assert set(MEANING) == ELEMENTWISE
    assert ELEMENTWISE | REDUCTIONS | VIEWS | elsewhere == set(OPERATORS)


@pytest.mark.parametrize("threads", [1, 2])
def test_vectors(threads: int) -> None:
    executor = COMPILED if threads == 1 else PAIRED
    assert [str(found) for found in (check(executor, vector) for vector in load()) if found] == []


HOST = {part[1:] for part in llvm.get_host_cpu_features().flatten().split(",") if part.startswith("+")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "features", "isa"),
    [
        ("generic", "", "SSE41"),
        ("x86-64-v3", "", "AVX2"),
        ("x86-64-v3", "avxvnni", "AVX2_VNNI"),
        ("x86-64-v4", "", "AVX512_CORE"),
        ("x86-64-v4", "avx512vnni", "AVX512_CORE_VNNI"),
        ("", "", ""),
    ],
)
def test_a_run_on_other_instruction_sets(processor: str, features: str, isa: str) -> None:
    """Vectors and a whole run of the tiny recipe, in a process of its own with another processor's instructions."""
    if not {*native.LEVELS.get(processor, ()), *filter(None, [features])} <= HOST:
        pytest.skip(f"this processor has not all of {processor} {features}")
    code = (
        "from runtime.executors import compiled; from runtime.testing import local_group, tiny_job, train; "
        "from storage.store import memory_store; store = memory_store(); "
        "print(train(store, tiny_job(store), group=local_group(compiled), threads=2).state_root.hex())"
    )
    chosen = {"NUMBA_CPU_NAME": processor, "ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa.lower()[:4]}
    chosen["NUMBA_CPU_FEATURES"] = features and f"+{features}"
    environment = {**os.environ, **{k: v for k, v in chosen.items() if v}}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    store = memory_store()
    want = train(store, tiny_job(store)).state_root.hex()
    assert done.stdout.strip() == want, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lanes"), [("quads", 4), ("quads", 8), ("quads", 16), ("pairs", 4), ("pairs", 8), ("pairs", 16)]
)
def test_product_kernels_of_processors_that_are_not_here(kind: str, lanes: int) -> None:
    """Their code with one instruction spelled out, in a process of its own."""
    script = Path(__file__).with_name("spelled.py")
    command = [sys.executable, str(script), kind, str(lanes)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def example(name: str, dtype: str, shape: tuple[int, ...], classes: int, random: np.random.Generator) -> np.ndarray:
    """A sensible input of a training program by its name."""
    if name == "rng":
        return np.array([11, 12, 3, 1, 2, 0])
    if dtype == "f32":
        normal = (random.standard_normal(shape) * 0.3).astype(np.float32)
        return np.abs(normal) if name == "v" else normal
    if name in ("x", "target"):
        return random.integers(0, classes, shape)
    ranges = {"gradient": 2**43, "square": 2**30, "exponent": 140, "step": 2}
    return np.asarray(random.integers(0, ranges[name], shape), np.int32 if dtype == "i32" else np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_of_a_family(family: str) -> None:
    data, options = FAMILIES[family]
    table = "corpus = 'kjv'\ncontext = 8" if data[2] else "images = 'digits'"
    text = f"name = 't'\n[model]\nfamily = '{family}'\n{options}\n[data]\n{table}\n[training]\nsteps = 4\nbatch = 6\n"
    training = build_training_program(parse_recipe(text + "micro_batches = 2\n"), Data(*data))
    random = np.random.default_rng(5)

    def inputs(program: Program) -> list[np.ndarray]:
        return [example(name, t.dtype, t.shape, data[1], random) for name, t in program.inputs]

    for program in training.programs:
        parameters = [name for name, _ in program.inputs]
        check_same(program, inputs(program), parameters.index("x") if "x" in parameters else 0)
    for kind in training.kinds:
        check_pair(kind, inputs(kind.backward))


def check_pair(kind: KindSpec, inputs: list[np.ndarray]) -> None:
    """Forward, then backward from what it kept, several micro-batches at a time, gradients returned or added."""
    parameters = len(inputs) - 3
    handles = [REFERENCE.put(array) for array in inputs]
    want = [REFERENCE.get(made).tobytes() for made in REFERENCE.run(kind.forward, handles[:-1])]
    wanted = [REFERENCE.get(made) for made in REFERENCE.run(kind.backward, handles)]
    for executor in (COMPILED, PAIRED):
        kept = []
        for _ in range(2):
            made, saved = executor.forward(kind.forward, kind.backward, handles[:-1], stable=parameters)
            assert [executor.get(array).tobytes() for array in made] == want
            kept.append(saved)
        got = executor.backward(kind.forward, kind.backward, handles, kept[0], stable=parameters)
        assert [executor.get(array).tobytes() for array in got] == [array.tobytes() for array in wanted]
        gradients = wanted[len(wanted) - parameters :]
        sums = [np.full(array.size, 3, np.int64) for array in gradients]
        for saved in (kept[1], None):
            rest = executor.backward(kind.forward, kind.backward, handles, saved, sums, stable=parameters)
            assert len(rest) == len(wanted) - parameters
        for total, gradient in zip(sums, gradients, strict=True):
            assert np.array_equal(total, 2 * gradient.reshape(-1) + 3)
        executor.forget()


Step = Callable[[Value, Value], Value]
STEPS: tuple[Step, ...] = (
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: x / y,
    functions.maximum,
    lambda x, y: functions.absolute(x).sqrt() - y,
    lambda x, y: x.scale((y.bits() >> 23) - 127),
    lambda x, y: x.builder.select(x < y, x, 1.5),
    lambda x, y: (x.bits() ^ y.bits()).float(),
    lambda x, y: x.transpose(1, 0).reshape(*x.shape) + y,
    lambda x, y: sums.row_sum(x, 0, keep=True),
    lambda x, y: x.rint("i32").float() + y,
    lambda x, y: sums.row_sum(x * y, 1, keep=True),
    lambda x, y: sums.row_max(x, 1, keep=True),
    lambda x, y: sums.row_max(x, 0, keep=True) - y,
    lambda x, y: x.slice(0, 0, x.shape[0], 2),
    lambda x, y: x.builder.concat([x, y], 1),
    lambda x, y: sums.matmul(x, y.transpose(1, 0)),
    lambda x, y: sums.matmul(x.transpose(1, 0), y, 3),
    lambda x, y: sums.from_grid(sums.to_grid(x * 2.0**-20, 3)),
)


JOINS: tuple[Step, ...] = (
    lambda x, y: x.builder.concat([x + 1.0, y * 2.0], 0),
    lambda x, y: x.builder.concat([x - y, y, x * y], 1),
    lambda x, y: x.builder.concat([x, functions.absolute(x), x], 0),
    lambda x, y: x.builder.concat([v.reshape(v.type.elements, 1) for v in (x * y, x + y, x - y, x / 3.0)], 1),
    lambda x, y: x.builder.select(x < 0.5, 1.0, 0.0),
    lambda x, y: (x.bits() >> 3 << 2).float(),
    lambda x, y: x.reshape(x.shape[1], x.shape[0]),
    lambda x, y: x.reshape(2, x.type.elements // 2).transpose(1, 0),
    lambda x, y: x * y + x,
    lambda x, y: sums.row_sum(x, 1, keep=True),
    lambda x, y: x.slice(0, 0, x.shape[0], 2),
    lambda x, y: x.bits().cast("i64").float().scale(-9),
)
"""Concatenations of values that loops make, and what is made of them."""


@st.composite
def programs(draw: st.DrawFn, steps: tuple[Step, ...] = STEPS) -> tuple[Program, list[np.ndarray]]:
    """A chain of elementwise operators, repeated rows and columns, sums and views over small odd shapes."""
    rows, cols = draw(st.sampled_from([(1, 1), (3, 5), (7, 1), (1, 9), (0, 4), (5, 17), (66, 70), (130, 4)]))
    b = Builder()
    shapes = {"full": (rows, cols), "row": (rows, 1), "column": (1, cols)}
    values: list[Value] = [b.input(name, "f32", *shape) for name, shape in shapes.items()]
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=7)):
        x, y = (draw(st.sampled_from(values)) for _ in range(2))
        try:
            values.append(step(x, y))
        except (ValueError, OperatorError):  # shapes that numpy would not broadcast either
            continue
    start = draw(st.integers(0, 20))
    sizes = [v.type.elements for v in values[:3]]
    arrays = [floats(start + i, max(size, 1))[:size] for i, size in enumerate(sizes)]
    return b.finish(values[-3:]), [a.reshape(s) for a, s in zip(arrays, shapes.values(), strict=True)]


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=programs())
def test_random_programs(case: tuple[Program, list[np.ndarray]]) -> None:
    check_same(*case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=programs(JOINS))
def test_random_concatenations(case: tuple[Program, list[np.ndarray]]) -> None:
    check_same(*case)


def loops(plan: Plan) -> list[Loop]:
    return [step for step in plan.main.steps if isinstance(step, Loop)]


def test_a_chain_is_one_loop_and_a_repeated_row_is_never_made() -> None:
    b = Builder()
    x, row = b.input("x", "f32", 4, 6), b.input("row", "f32", 4, 1)
    (loop,) = loops(plan_of(functions.exp(x * row + 0.5)))
    assert (loop.reads, len(loop.writes)) == ((0, 1), 1)


def test_a_mask_of_random_words_is_bytes_that_one_loop_writes() -> None:
    b = Builder()
    rng, x = b.input("rng", "i64", 6), b.input("x", "f32", 32, 64)
    mask = words(rng, 2048, purpose=PURPOSE_DROPOUT, operator=3) < 2**31
    plan = plan_of(mask.reshape(32, 64), b.select(mask, 1.0, 0.0).reshape(32, 64) * x)
    assert [type(step) for step in plan.main.steps] == [Loop, Loop]
    first, second = loops(plan)
    (made,) = first.writes
    assert plan.buffers[made] == Buffer("bool", 2048)
    assert made in second.reads
    check_same(plan.graph.program, [np.array([11, 12, 3, 1, 2, 0]), floats(3, 2048).reshape(32, 64)])


def test_a_long_chain_on_parts_does_not_multiply() -> None:
    """A Program is anybody's, and planning takes longer than in proportion."""
    b = Builder()
    x = b.input("x", "f32", 16, 4)
    v = b.concat([x * float(n + 2) for n in range(8)], 0)
    for _ in range(2000):
        v = v * 1.5
    assert len(make_graph(b.finish([v])).ops) < 2000 + 2 * SUNK


def test_a_norm_and_a_softmax_are_one_loop_each() -> None:
    b = Builder()
    x = b.input("x", "f32", 40, 48)
    centred = x - sums.row_mean(x, 1, keep=True)
    norm = centred / sums.row_mean(centred * centred, 1, keep=True).sqrt()
    e = functions.exp(norm - sums.row_max(norm, 1, keep=True))
    (loop,) = loops(plan_of(e / sums.row_sum(e, 1, keep=True, bound=1)))
    assert loop.reads == (0,)


def test_quantisation_is_one_pass_and_three_slices_are_two_products() -> None:
    b = Builder()
    x, y = b.input("x", "f32", 64, 64), b.input("y", "f32", 64, 64)
    for slices, products in ((2, 1), (3, 2)):
        plan = plan_of(sums.matmul(x, y.transpose(1, 0), slices))
        made = [s for s in plan.main.steps if not isinstance(s, Loop) or s.kind == "products"]
        assert len(made) == products
        assert sum(isinstance(s, Loop) and s.kind == "loops" for s in plan.main.steps) == 3


def test_what_depends_on_parameters_alone_is_done_before() -> None:
    b = Builder()
    w, x = b.input("w", "f32", 64, 64), b.input("x", "f32", 64, 64)
    plan = make_plan(make_graph(b.finish([sums.matmul(x, w)])), stable=1)
    assert {r for step in plan.main.steps for r in step.reads}.isdisjoint({0})
    assert {r for step in plan.before.steps for r in step.reads if r < 2} == {0}


def in_parts() -> Program:
    """A concatenation whose parts two kernels make, and between them a third that is the last to read an array."""
    b = Builder()
    x, y, z = b.input("x", "f32", 4, 64), b.input("y", "i64", 3, 100), b.input("z", "f32", 5, 64)
    first, between, last = x + 1.0, b.scatter_add(b.iota(3), y, 3) * 3, z * 2.0
    joined = b.concat([first, last], 0)
    return b.finish([between, sums.row_sum(joined, 1)])


@pytest.mark.parametrize("which", ["a block's backward", "a concatenation in parts"])
def test_no_two_living_buffers_share_memory(which: str) -> None:
    program = in_parts() if which == "a concatenation in parts" else gpt().kinds[1].backward
    plan = make_plan(make_graph(program))
    for part in (plan.before, plan.main):
        alive: dict[int, range] = {}
        for step, dead in zip(part.steps, part.dead, strict=True):
            for buffer in step.writes:
                if buffer in part.offsets:
                    start = part.offsets[buffer]
                    alive[buffer] = range(start, start + plan.buffers[buffer].bytes)
            spans = sorted((r.start, r.stop) for r in alive.values() if len(r))
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            for buffer in dead:
                alive.pop(buffer, None)
        assert max(part.offsets.values(), default=0) < max(part.arena, 1)


@cache
def gpt() -> TrainingProgram:
    return TrainingProgram.decode(tiny_program())


def test_backward_makes_no_product_that_forward_has_made() -> None:
    kind = gpt().kinds[1]
    common = shared(kind.forward, kind.backward)
    handed = saved_values(kind.backward, common, len(kind.backward.inputs) - 3)
    graph = make_graph(kind.backward, given=handed, known=common)
    first = len(kind.backward.inputs)
    forward = sum(kind.backward.ops[v - first].name == "dot" for v in common if v >= first)
    alone = sum(op.name == "product" for op in make_graph(kind.backward).ops.values())
    assert forward > 0
    assert alone - sum(op.name == "product" for op in graph.ops.values()) == forward // 3
    drawn = [kind.backward.ops[v - first].type.dtype for v in handed]
    assert "bool" in drawn  # dropout's masks, a byte an element, rather than ten rounds of Philox again


def test_a_fault_is_named_as_the_reference_names_it() -> None:
    b = Builder()
    x = b.input("x", "f32", 9)
    with b.label("here"):
        program = b.finish([functions.exp(x * 2.0)])
    bad = np.array([0, 1, 2, np.nan, 4, np.nan, 6, 7, 8], np.float32)
    check_same(program, [bad])
    with pytest.raises(ArithmeticFault, match=r"rint, here\): .* at element 3: got nan"):
        COMPILED.run(program, [COMPILED.put(bad)])


@pytest.mark.parametrize("bound", [1, 8, 22, 23, 24, 31])
@pytest.mark.parametrize("size", [1, 67])
def test_what_rint_refuses_is_told_to_the_last_bit(bound: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder()
    program = b.finish([b.input("x", "f32", size).rint("i32", bound=bound)])
    limit = np.float32(2.0**bound)
    most = limit - np.float32(1) if bound <= 23 else np.nextafter(limit, np.float32(0))
    below = [most, -most, np.float32(-0.0), np.float32(0.25)]
    half = [limit - np.float32(0.5)] * (bound <= 23)  # rounds to 2^b
    for bad in (
        *half,
        limit,
        -limit,
        np.float32(2) * limit,
        np.float32(np.inf),
        np.float32(-np.inf),
        np.float32(np.nan),
    ):
        x = np.resize(np.array(below, np.float32), size)
        x[size // 2] = bad
        assert "expected" in outcome(REFERENCE, program, [x])
        check_same(program, [x])
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceExecutor, "run", None)  # it would be asked about what a kernel refuses
        (made,) = COMPILED.run(program, [COMPILED.put(x := np.resize(np.array(below, np.float32), size))])
        assert COMPILED.get(made).tolist() == np.rint(x).tolist()


@pytest.mark.parametrize("name", ["take", "rint"])
def test_an_operator_that_nobody_reads_still_faults(name: str) -> None:
    """The builder drops such operators; a Program from elsewhere may have them, and every executor must agree on it."""
    b = Builder()
    x, i = b.input("x", "f32", 3), b.input("i", "i64", 2)
    read = b.finish([x + 1.0, b.take(x, i) if name == "take" else x.rint("i32")])
    program = dataclasses.replace(read, outputs=read.outputs[:1])
    inputs = [np.array([0.0, np.nan, 2.0], np.float32), np.array([0, 5])]
    assert "expected" in outcome(REFERENCE, program, inputs)
    check_same(program, inputs)


@pytest.mark.slow
def test_fifty_steps_end_in_the_same_state() -> None:
    here, there = memory_store(), memory_store()
    made = train(here, tiny_job(here, steps=50), group=local_group(compiled), threads=2)
    assert made.step == 50
    assert made == train(there, tiny_job(there, steps=50))
