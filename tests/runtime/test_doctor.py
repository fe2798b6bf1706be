import json
from typing import Any

import numpy as np
import pytest

from runtime import executors
from runtime.doctor import examine
from runtime.executors import reference
from runtime.program.block_vectors import make_blocks
from runtime.program.operators import OPERATORS
from runtime.program.reference import ReferenceExecutor
from runtime.program.vectors import BLOCKS, FILE, Mismatch, Vector, check, load, make, text
from storage.errors import FailureError
from trueweight import cli


@pytest.fixture(scope="module")
def vectors() -> list[Vector]:
    return load(FILE)


class Flipping(ReferenceExecutor):
    """A device with one wrong bit in what `scale` gives, where it gives anything."""

    def _apply(self, program: Any, name: str, attributes: Any, operands: Any) -> Any:
        made = super()._apply(program, name, attributes, operands)
        if name == "scale" and made.numel():
            made = made.clone()
            made.view(-1)[-1] = -made.view(-1)[-1]
        return made


class Broken(ReferenceExecutor):
    """A device that does not start."""

    def __init__(self) -> None:
        raise FailureError("the device does not compute 'sqrt' exactly")


def test_the_file_is_what_the_reference_executor_gives() -> None:
    assert text(make(reference(1))) == FILE.read_text(encoding="utf-8"), (
        "run python -m runtime.program.vectors runtime/program/vectors.json"
    )
    assert text(make_blocks(reference(1))) == BLOCKS.read_text(encoding="utf-8"), (
        "run python -m runtime.program.block_vectors runtime/program/block_vectors.json"
    )


def test_every_operator_is_in_the_vectors(vectors: list[Vector]) -> None:
    assert {name for vector in vectors for name in vector.program.histogram} == set(OPERATORS)
    assert sum(vector.fault is not None for vector in vectors) >= 5
    assert len({vector.name for vector in vectors}) == len(vectors)


def test_every_flipped_bit_is_found_at_its_element(vectors: list[Vector]) -> None:
    executor = reference(1)
    for vector in vectors:
        for number, array in enumerate(vector.outputs):
            element = array.size // 2
            flipped = np.atleast_1d(array).copy()
            flipped.reshape(-1).view(np.uint8)[element * array.itemsize] ^= 1
            outputs = tuple(flipped.reshape(array.shape) if i == number else o for i, o in enumerate(vector.outputs))
            found = check(executor, Vector(**{**vars(vector), "outputs": outputs}))
            assert isinstance(found, Mismatch), vector.name
            assert found.place == f"output {number}, element {element}"


def test_a_missing_or_displaced_fault_is_found(vectors: list[Vector]) -> None:
    executor = reference(1)
    faulty = next(vector for vector in vectors if vector.fault == 1)
    other = check(executor, Vector(**{**vars(faulty), "fault": 0}))
    assert str(other).endswith("fault: expected a fault at element 0, got a fault at element 1")
    none = check(executor, Vector(**{**vars(faulty), "fault": None}))
    assert str(none).endswith("expected no fault, got a fault at element 1")


def test_a_wrong_device_is_named_with_both_bytes(vectors: list[Vector]) -> None:
    wrong, broken, right = examine({"wrong": Flipping, "broken": Broken, "right": ReferenceExecutor}, vectors)
    assert wrong.failure.startswith("scale (scale), output 0, element 95 of f0cfe6bf, 49010000: expected ")
    assert broken.failure == "the device does not compute 'sqrt' exactly"
    assert right.failure == ""
    assert right.product_gops > 0
    assert right.memory_gbs > 0


def test_doctor_says_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)["executors"]
    assert first["executor"] == "compiled on cpu"
    assert first["path"]
    assert min(first[key] for key in ("product_gops", "float_gflops", "elementwise_gflops", "memory_gbs")) > 0
    assert first["failure"] == ""
    assert cli.main(["doctor"]) == 0
    assert "GOP/s" in capsys.readouterr().out


def test_doctor_compares_vectors_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(executors, "found", lambda: {"reference": lambda: reference(1), "flipping": Flipping})
    assert cli.main(["doctor", "--vectors", "--json"]) == 1
    right, wrong = json.loads(capsys.readouterr().out)["executors"]
    assert (right["failure"], right["path"], right["product_gops"]) == ("", "float32 BLAS", 0)
    assert "output 0, element 95" in wrong["failure"]
    assert cli.main(["doctor", "--vectors"]) == 1
    out = capsys.readouterr().out
    assert "exact" in out
    assert "GOP/s" not in out


def test_doctor_refuses_a_wrong_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(executors, "found", lambda: {"flipping": Flipping})
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert "flipping: scale (scale), output 0, element 95 of f0cfe6bf, 49010000: expected " in captured.err
    assert "give this device no exact work" in captured.err
