"""The reference executor: the same bytes on every kernel and thread count, faults that say where, a proof of it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from runtime.models.gpt import Layer
from runtime.program import reference
from runtime.program.builder import Builder
from runtime.program.executor import ArithmeticFault
from runtime.program.lowering import lower_block
from runtime.program.program import Program, encode_program
from runtime.program.reference import ReferenceExecutor, prove
from runtime.program.types import NUMPY
from runtime.recipe import GptConfig
from storage.errors import FailureError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def gpt_backward() -> tuple[Program, list[np.ndarray]]:
    """A GPT block's backward with dropout, and inputs for it.

    Its feed-forward and its scores have 65,536 elements: torch runs an operator in one thread below 32,768.
    """
    torch.manual_seed(0)
    block = Layer(GptConfig(layers=1, width=64, heads=4, dropout=0.1))
    x = torch.randn(4, 64, 64)
    made, _ = lower_block(block, x, slices=2, terms=4, name="block 0")
    weights = [p.detach().numpy() for p in block.parameters()]
    source = np.random.default_rng(1)
    dy = (source.standard_normal(x.shape) * 2.0 ** source.integers(-30, 3, x.shape)).astype(np.float32)
    return made.backward, [*weights, x.numpy(), np.array([1, 2, 3, 4, 5, 0]), dy]


def digest(arrays: list[np.ndarray]) -> str:
    return sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


@pytest.fixture(scope="module")
def expected(gpt_backward: tuple[Program, list[np.ndarray]]) -> str:
    program, inputs = gpt_backward
    executor = ReferenceExecutor()
    return digest([executor.get(h) for h in executor.run(program, [executor.put(a) for a in inputs])])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_byte(count: int, gpt_backward: Any, expected: str, run_program: Any) -> None:
    program, inputs = gpt_backward
    torch.set_num_threads(count)
    assert digest(run_program(program, *inputs)) == expected


RUNNER = """
import sys
import numpy as np
import torch
from hashlib import sha256
from runtime.program.program import decode_program
from runtime.program.reference import ReferenceExecutor
program = decode_program(open(sys.argv[1], "rb").read())
inputs = np.load(sys.argv[2])
executor = ReferenceExecutor()
handles = executor.run(program, [executor.put(inputs[f"arr_{i}"]) for i in range(len(inputs.files))])
print(torch.backends.cpu.get_cpu_capability())
print(sha256(b"".join(executor.get(h).tobytes() for h in handles)).hexdigest())
"""


def test_instruction_sets_change_no_byte(gpt_backward: Any, expected: str, tmp_path: Path) -> None:
    """Every kernel choice of oneDNN and of ATen, each in a process of its own, two at a time."""
    program, inputs = gpt_backward
    (tmp_path / "program").write_bytes(encode_program(program))
    np.savez(tmp_path / "inputs.npz", *inputs)
    command = [sys.executable, "-c", RUNNER, str(tmp_path / "program"), str(tmp_path / "inputs.npz")]
    cases = [
        {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": capability}
        for isa in ("SSE41", "AVX2", "")
        for capability in ("default", "avx2", "")
    ]
    clean = {k: v for k, v in os.environ.items() if k not in cases[0]} | {"PYTHONPATH": str(REPOSITORY)}
    seen = set()
    for pair in (cases[i : i + 2] for i in range(0, len(cases), 2)):
        started = [
            subprocess.Popen(
                command,
                env=clean | {"OMP_NUM_THREADS": "1"} | {k: v for k, v in case.items() if v},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for case in pair
        ]
        for case, process in zip(pair, started, strict=True):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, f"{case}: {err}"
            capability, found = out.split()
            seen.add(capability)
            assert found == expected, f"{case} ({capability}): other bytes"
    assert "DEFAULT" in seen, "ATEN_CPU_CAPABILITY had no effect"


def test_running_twice_and_observing_change_nothing(gpt_backward: Any, expected: str, executor: Any) -> None:
    program, inputs = gpt_backward
    handles = [executor.put(a) for a in inputs]
    before = digest(inputs)
    seen: list[int] = []
    found = executor.run(program, handles, observe=lambda number, _: seen.append(number))
    assert digest([executor.get(h) for h in found]) == expected
    assert seen == list(range(len(program.ops)))
    assert digest([executor.get(h) for h in executor.run(program, handles)]) == expected
    assert digest(inputs) == before, "an input was written to"


def test_observed_values_have_the_types_of_the_program(executor: Any) -> None:
    b = Builder()
    x = b.input("x", "f32", 2, 3)
    program = b.finish([(x * 2.0).sqrt().rint("i32"), (x.bits().digit().swap()), x < 1.0, b.iota(0)])
    seen = []
    executor.run(program, [executor.put(np.ones((2, 3), np.float32))], observe=lambda n, a: seen.append((n, a)))
    for number, array in seen:
        t = program.ops[number].type
        assert (array.dtype, array.shape) == (NUMPY[t.dtype], t.shape)
    assert [number for number, _ in seen] == list(range(len(program.ops)))


def test_profile_collects_seconds_by_operator(gpt_backward: Any) -> None:
    program, inputs = gpt_backward
    profile: dict[str, float] = {}
    executor = ReferenceExecutor(profile=profile)
    executor.run(program, [executor.put(a) for a in inputs])
    assert set(profile) == set(program.histogram)
    assert all(seconds >= 0 for seconds in profile.values())


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.bool_])
def test_put_and_get_keep_shape_and_bytes(shape: tuple[int, ...], dtype: Any, executor: Any) -> None:
    array = np.array(np.random.default_rng(1).integers(0, 2, shape), dtype)
    found = executor.get(executor.put(array))
    assert found.shape == shape
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_put_takes_strides_and_read_only_arrays(executor: Any) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    array.flags.writeable = False
    for view in (array, array.T, array[::-1, ::2], np.broadcast_to(array[:1], (5, 4))):
        assert executor.get(executor.put(view)).tobytes() == view.tobytes()


# faults --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.parts = nn.Sequential(nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.parts(self.first(x))
        return y


def net() -> tuple[Any, list[np.ndarray]]:
    torch.manual_seed(0)
    block = Net()
    made, _ = lower_block(block, torch.zeros(5, 3), slices=2, terms=1, name="block 0")
    return made, [p.detach().numpy().copy() for p in block.parameters()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_fault_names_operator_label_and_element(value: float, run_program: Any) -> None:
    made, weights = net()
    x = np.ones((5, 3), np.float32)
    x[3, 1] = value
    with pytest.raises(ArithmeticFault) as caught:
        run_program(made.evaluate, *weights, x)
    fault = caught.value
    op = made.evaluate.ops[fault.operator]
    assert (op.name, op.label) == (fault.opcode, fault.label) == ("rint", "first, addmm")
    assert fault.element == 3 * 3 + 1
    assert not np.isfinite(fault.value)
    for part in (f"operator {fault.operator} (rint, first, addmm)", "at element 10", "got "):
        assert part in str(fault)


def test_a_bad_weight_is_found_in_its_own_layer(run_program: Any) -> None:
    made, weights = net()
    weights[2][1, 2] = np.nan
    rng, dy = np.array([1, 2, 3, 4, 5, 0]), np.ones((5, 2), np.float32)
    for program, more in ((made.evaluate, ()), (made.forward, (rng,)), (made.backward, (rng, dy))):
        with pytest.raises(ArithmeticFault) as caught:
            run_program(program, *weights, np.ones((5, 3), np.float32), *more)
        assert caught.value.label.startswith("parts.1, ")


def test_a_fault_in_the_gradient(run_program: Any) -> None:
    made, weights = net()
    dy = np.zeros((5, 2), np.float32)
    dy[4, 1] = 1e30  # finite, and beyond the grid of gradients
    with pytest.raises(ArithmeticFault, match=r"rint.*expected \|x\| < 2\^63"):
        run_program(made.backward, *weights, np.ones((5, 3), np.float32), np.array([1, 2, 3, 4, 5, 0]), dy)


def test_a_fault_crosses_processes_whole() -> None:
    fault = ArithmeticFault(operator=3, opcode="rint", label="here", element=7, value=1e30, reason="expected less")
    again = pickle.loads(pickle.dumps(fault))
    assert str(again) == str(fault)
    assert vars(again) == vars(fault)


# proof ---------------------------------------------------------------------------------------------------------------


def broken_add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Flushes subnormals, as some accelerators do."""
    made = a + b
    return torch.where(made.abs() < 2.0**-126, made * 0.0, made)


WRONG = {
    "sqrt": lambda x: torch.reciprocal(torch.rsqrt(x)),
    "div": lambda a, b: a * torch.reciprocal(b),
    "add": broken_add,
    "sub": lambda a, b: torch.add(a, b, alpha=-1) + 0.0,
    "mul": lambda a, b: torch.nan_to_num(a * b),
    "float": lambda x: x.double().float(),
    "shl": lambda x, amount: x * 2**amount + 1,
    "dot": lambda a, b: torch.matmul(a.half(), b.half()).to(torch.int32),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_finds_a_wrong_meaning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.MEANING, name, WRONG[name])  # type: ignore[arg-type]
    with pytest.raises(FailureError, match=f"does not compute '{name}.*' exactly: element"):
        prove.__wrapped__("cpu")


def test_the_proof_finds_flushed_subnormals() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(FailureError, match="does not compute"):
            prove.__wrapped__("cpu")
    finally:
        torch.set_flush_denormal(False)
    prove.__wrapped__("cpu")


def test_an_executor_is_proved_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[str] = []
    monkeypatch.setattr(reference, "prove", proved.append)
    ReferenceExecutor()
    assert proved == ["cpu"]
