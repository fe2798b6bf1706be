"""The compiled executor gives the reference executor's bytes, whatever the Program, the processor or the shapes."""

import dataclasses
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.executors import compiled
from runtime.program import functions, sums
from runtime.program.build import build_training_program
from runtime.program.builder import Builder, Value
from runtime.program.compiled import CompiledExecutor, Kernel, schedule
from runtime.program.executor import ArithmeticFault
from runtime.program.kernels import STATEMENTS
from runtime.program.operators import OPERATORS
from runtime.program.program import Program
from runtime.program.reference import ReferenceExecutor
from runtime.program.vectors import check, floats, load
from runtime.recipe import parse_recipe
from runtime.testing import local_group, tiny_job, train
from storage.objects import MemoryStore

TEXT, IMAGES = ((8,), 61, True), ((1, 8, 8), 10, False)
FAMILIES = {
    "gpt": (TEXT, "layers = 1\nwidth = 12\nheads = 3\ndropout = 0.2"),
    "llama": (TEXT, "layers = 1\nwidth = 16\nheads = 4\nkv_heads = 2"),
    "mlp": (IMAGES, "hidden = [9, 7]\nactivation = 'silu'\ndropout = 0.1"),
    "convnet": (IMAGES, "channels = [4, 6]\ngroups = 2"),
}
REFERENCE, COMPILED = ReferenceExecutor(), CompiledExecutor()


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


def check_same(program: Program, inputs: list[np.ndarray]) -> None:
    assert outcome(COMPILED, program, inputs) == outcome(REFERENCE, program, inputs)


def test_every_statement_is_an_operator_of_the_table() -> None:
    assert set(STATEMENTS) < set(OPERATORS)


def test_vectors() -> None:
    assert [str(found) for found in (check(COMPILED, vector) for vector in load()) if found] == []


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "isa"), [("generic", "SSE41"), ("x86-64-v3", "AVX2")])
def test_vectors_on_other_instruction_sets(processor: str, isa: str) -> None:
    code = (
        "from runtime.executors import compiled; from runtime.program.vectors import check, load; e = compiled(1); "
        "print([str(m) for m in (check(e, v) for v in load()) if m])"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


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
    for program in training.programs:
        check_same(program, [example(name, t.dtype, t.shape, data[1], random) for name, t in program.inputs])


STEPS = (
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
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, list[np.ndarray]]:
    """A chain of elementwise operators, repeated rows and columns, sums and views over small odd shapes."""
    rows, cols = draw(st.sampled_from([(1, 1), (3, 5), (7, 1), (1, 9), (0, 4), (5, 17)]))
    b = Builder()
    shapes = {"full": (rows, cols), "row": (rows, 1), "column": (1, cols)}
    values: list[Value] = [b.input(name, "f32", *shape) for name, shape in shapes.items()]
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7)):
        x, y = (draw(st.sampled_from(values)) for _ in range(2))
        try:
            values.append(step(x, y))
        except ValueError:  # shapes that numpy would not broadcast either
            continue
    start = draw(st.integers(0, 20))
    sizes = [v.type.elements for v in values[:3]]
    arrays = [floats(start + i, max(size, 1))[:size] for i, size in enumerate(sizes)]
    return b.finish(values[-3:]), [a.reshape(s) for a, s in zip(arrays, shapes.values(), strict=True)]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=programs())
def test_random_programs(case: tuple[Program, list[np.ndarray]]) -> None:
    check_same(*case)


def test_a_chain_is_one_loop_and_a_repeated_row_is_never_made() -> None:
    b = Builder()
    x, row = b.input("x", "f32", 4, 6), b.input("row", "f32", 4, 1)
    steps = schedule(b.finish([functions.exp(x * row + 0.5)])).steps
    assert len(steps) == 1
    assert isinstance(steps[0], Kernel)
    assert steps[0].inputs == ((0, "full"), (1, "row"))


def test_a_fault_is_named_as_the_reference_names_it() -> None:
    b = Builder()
    x = b.input("x", "f32", 9)
    with b.label("here"):
        program = b.finish([functions.exp(x * 2.0)])
    bad = np.array([0, 1, 2, np.nan, 4, np.nan, 6, 7, 8], np.float32)
    check_same(program, [bad])
    with pytest.raises(ArithmeticFault, match=r"rint, here\): .* at element 3: got nan"):
        COMPILED.run(program, [COMPILED.put(bad)])


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
def test_a_whole_run_ends_in_the_same_state() -> None:
    here, there = MemoryStore(), MemoryStore()
    assert train(here, tiny_job(here), group=local_group(compiled)) == train(there, tiny_job(there))
