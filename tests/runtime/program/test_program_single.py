"""Single elements against the reference executor, over every operator of whole training programs and of the vectors."""

import numpy as np
import pytest

from runtime.program.operators import OPERATORS
from runtime.program.program import Program
from runtime.program.reference import ReferenceExecutor
from runtime.program.single import element
from runtime.program.training import TrainingProgram
from runtime.program.vectors import FILE, load
from runtime.testing import tiny_program


def check(program: Program, inputs: list[np.ndarray], draws: int, seed: int) -> set[str]:
    """Some elements of every operator's output are computed alone to the same bits; the names of the operators."""
    executor = ReferenceExecutor()
    values = [np.asarray(array) for array in inputs]
    executor.run(program, [executor.put(array) for array in inputs], lambda _, array: values.append(array.copy()))
    random = np.random.default_rng(seed)
    names = set()
    for number, op in enumerate(program.ops):
        made = values[len(inputs) + number].reshape(-1)
        operands = [values[v].reshape(-1) for v in op.inputs]
        if op.name == "constant":
            operands = [np.frombuffer(program.constants[op.attributes["digest"]], made.dtype)]

        def read(k: int, at: np.ndarray, operands: list[np.ndarray] = operands) -> np.ndarray:
            return operands[k][at]

        for flat in {0, made.size - 1, *random.integers(0, max(made.size, 1), draws).tolist()} if made.size else ():
            found = element(op, [program.types[v] for v in op.inputs], flat, read)
            assert executor.get(executor.put(found)).tobytes() == made[flat : flat + 1].tobytes(), (number, op.name)
        names.add(op.name)
    return names


def inputs_of(program: Program, seed: int) -> list[np.ndarray]:
    """Plausible inputs: small floats, tokens, gradients, the state of a random stream."""
    random = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    for name, kind in program.inputs:
        if kind.dtype == "f32":
            made.append(random.normal(0, 1, kind.shape).astype(np.float32))
        elif name == "rng":
            made.append(np.array([7, 0, 3, 1, 0, 0], np.int64))
        else:
            made.append(random.integers(0, 8, kind.shape).astype(np.int64 if kind.dtype == "i64" else np.int32))
    return made


def test_every_operator_of_a_training_program() -> None:
    program = TrainingProgram.decode(tiny_program())
    names: set[str] = set()
    for number, kind in enumerate(program.kinds):
        for part in (kind.forward, kind.backward):
            names |= check(part, inputs_of(part, number), 2, number)
    names |= check(program.loss, inputs_of(program.loss, 9), 2, 9)
    assert {"dot", "take", "scatter_add", "sum", "max", "transpose", "slice", "broadcast", "rint", "select"} <= names


def test_every_operator_of_the_known_answer_vectors() -> None:
    names: set[str] = set()
    for number, vector in enumerate(one for one in load(FILE) if one.fault is None):
        names |= check(vector.program, list(vector.inputs), 4, number)
    assert names == set(OPERATORS)


def test_an_index_outside_is_refused() -> None:
    vector = next(one for one in load(FILE) if any(op.name == "take" for op in one.program.ops))
    op = next(op for op in vector.program.ops if op.name == "take")
    types = [vector.program.types[v] for v in op.inputs]
    with pytest.raises(IndexError, match="expected an index in"):
        element(op, types, 0, lambda k, at: np.full(at.shape, types[0].shape[0], np.int64))
