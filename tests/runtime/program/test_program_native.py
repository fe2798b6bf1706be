"""Machine code: the cache of compiled kernels, products on every path, refusals; what is compiled is tested apart."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import executors
from runtime.executors import Announced, compiled
from runtime.program.builder import Builder
from runtime.program.compiler import executor as compiler
from runtime.program.compiler import pairs, products, quads
from runtime.program.compiler.executor import CompiledExecutor, allocate
from runtime.program.compiler.runner import clear, combine
from runtime.program.vectors import FILE, Vector, load
from runtime.testing import local_group, tiny_job, train
from storage import native
from storage.errors import FailureError
from storage.native import Library, features, private
from storage.store import memory_store
from trueweight import cli

MODULE = ("clear", clear("sum", "i64"))
OTHER = ("combine", combine("max", "i32", 2))


def compiled_again(folder: Path, *modules: tuple[str, str]) -> int:
    """How many of the modules a new process would have to compile."""
    library = Library(folder)
    library.add(modules)
    return library.compiled


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    assert compiled_again(tmp_path, MODULE, OTHER) == 2
    assert compiled_again(tmp_path, MODULE, OTHER, MODULE) == 0


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_object_is_compiled_again(tmp_path: Path, damage: bytes | None) -> None:
    compiled_again(tmp_path, MODULE)
    (path,) = tmp_path.glob("*.o")
    good = path.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    path.write_bytes(flipped if damage is None else damage)
    assert compiled_again(tmp_path, MODULE) == 1
    assert path.read_bytes() == good
    assert compiled_again(tmp_path, MODULE) == 0


def test_an_object_under_another_name_is_not_run(tmp_path: Path) -> None:
    compiled_again(tmp_path, MODULE)
    (mine,) = tmp_path.glob("*.o")
    compiled_again(tmp_path, OTHER)
    (other,) = set(tmp_path.glob("*.o")) - {mine}
    mine.write_bytes(other.read_bytes())
    assert compiled_again(tmp_path, MODULE) == 1


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    assert private(tmp_path / "new") == tmp_path / "new"
    tmp_path.chmod(0o777)
    assert private(tmp_path) is None
    assert compiled_again(tmp_path, MODULE) == 1
    assert list(tmp_path.glob("*.o")) == []


def test_processes_share_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from storage.native import Library; "
        "from runtime.program.compiler.runner import clear, combine; "
        "Library(Path(sys.argv[1])).add([('combine', combine('sum', 'i64', n)) for n in range(2, 12)])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert compiled_again(tmp_path, *[("combine", combine("sum", "i64", n)) for n in range(2, 12)]) == 0


@st.composite
def digit_products(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """Digits of a batch of two operands, and whether each lies transposed in memory."""
    m, n = (draw(st.sampled_from([1, 2, 5, 6, 7, 13, 63, 64, 65, 129])) for _ in range(2))
    k = draw(st.sampled_from([1, 3, 4, 5, 31, 64, 67, 128, 260]))
    batch = draw(st.sampled_from([1, 3]))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    a, b = (random.integers(-64, 65, shape).astype(np.int32) for shape in ((batch, m, k), (batch, k, n)))
    match draw(st.sampled_from(["random", "extreme", "triangle", "sparse"])):
        case "extreme":
            a, b = (np.where(x < 0, -64, 64).astype(np.int32) for x in (a, b))
        case "triangle":
            a = np.tril(a) if draw(st.booleans()) else np.triu(a)
        case "sparse":
            a = np.where(random.random(a.shape) < 0.02, a, 0).astype(np.int32)
    return a, b, draw(st.booleans()), draw(st.booleans())


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=digit_products())
def test_products_of_every_shape(case: tuple[np.ndarray, np.ndarray, bool, bool]) -> None:
    """The path of this processor, on 2 threads, against int64 sums by numpy."""
    a, b, left, right = case
    build = Builder()
    inputs = [np.ascontiguousarray(x.swapaxes(1, 2)) if swapped else x for x, swapped in ((a, left), (b, right))]
    x, y = (build.input(name, "i32", *array.shape) for name, array in zip("xy", inputs, strict=True))
    x, y = (v.digit().swap() if swapped else v.digit() for v, swapped in ((x, left), (y, right)))
    executor = THREADS
    (made,) = executor.run(build.finish([build.dot(x, y)]), [executor.put(array) for array in inputs])
    assert np.array_equal(executor.get(made), a.astype(np.int64) @ b.astype(np.int64))


THREADS = CompiledExecutor(2)


def test_the_general_paths_agree_and_one_is_chosen() -> None:
    random = np.random.default_rng(3)
    a, b = (torch.from_numpy(random.integers(-64, 65, (2, 40, 4100)).astype(np.int8)) for _ in range(2))
    want = (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).swapaxes(1, 2)).astype(np.int32)
    for path in products.PATHS.values():
        assert np.array_equal(path(a, b.transpose(1, 2)).numpy(), want)
    assert products.fallback() in products.PATHS
    if {"avx512vnni", "avxvnni"} & features():
        assert products.chosen() == products.VNNI
    else:
        kernels = {"sse2": products.PAIRS, "dotprod": products.SDOT}
        assert products.chosen() == next((k for name, k in kernels.items() if name in features()), products.fallback())


@pytest.mark.parametrize(
    ("module", "lanes", "processor", "instruction"),
    [
        (quads, 16, "znver4", r"vpdpbusd\s.*%zmm"),
        (quads, 8, "alderlake", r"vpdpbusd\s.*%ymm"),
        (quads, 4, "neoverse-n1", r"sdot\s.*16b"),
        (pairs, 16, "skylake-avx512", r"vpmaddwd\s.*%zmm"),
        (pairs, 8, "haswell", r"vpmaddwd\s.*%ymm"),
        (pairs, 4, "x86-64", r"pmaddwd\s.*%xmm"),
    ],
)
def test_other_processors_get_the_instruction(
    module: ModuleType, lanes: int, processor: str, instruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs: LLVM makes their code from the intrinsics that `spelled.py` spells out."""
    monkeypatch.setattr(module, "lanes", lambda: lanes)
    arguments = {"lefts": (True,), "rights": 1, "levels": ((((0, 0),), 0),)} if module is quads else {}
    text = module.product.__wrapped__(**arguments)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    kind = "aarch64" if processor.startswith("neoverse") else "x86_64"
    try:
        target = llvm.Target.from_triple(f"{kind}-unknown-linux-gnu").create_target_machine(cpu=processor, opt=3)
    except RuntimeError as error:
        pytest.skip(f"LLVM has no such target here: {error}")
    assert re.search(instruction, target.emit_assembly(llvm.parse_assembly(text)))


@pytest.mark.parametrize(("bits", "told"), [(1 << 20 | 1 << 6, "+sha2,+dotprod"), (2, "")])
def test_arm_tells_what_llvm_does_not(bits: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AT_HWCAP, which is 16; benchmarks/arm.py has the kernels found so."""
    asked: list[int] = []

    class Library:
        def getauxval(self, kind: ctypes.c_ulong) -> int:
            asked.append(kind.value)
            return bits

    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: Library())
    assert ",".join(native._untold()) == told
    assert asked == [16]


@pytest.fixture
def wrong_vector(monkeypatch: pytest.MonkeyPatch) -> Vector:
    """A vector whose answer has one wrong bit, as a processor that errs would see the right one."""
    right = next(vector for vector in load(FILE) if vector.name == "mul")
    flipped = right.outputs[0].copy()
    flipped.view(np.uint8)[41 * 4] ^= 1
    wrong = Vector(**{**vars(right), "outputs": (flipped,)})
    monkeypatch.setattr(executors, "_vectors", lambda: [wrong])
    return wrong


def test_a_processor_that_misses_a_vector_is_refused(wrong_vector: Vector) -> None:
    x, y = (array.reshape(-1)[41].tobytes().hex() for array in wrong_vector.inputs)
    with pytest.raises(FailureError, match=rf"mul \(mul\), output 0, element 41 of {x}, {y}: expected \w+, got \w+"):
        compiled(1)


def test_run_refuses_and_audit_accuses_nobody(
    wrong_vector: Vector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    store = ["--store", str(tmp_path / "store")]
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "name = 'r'\n[model]\nfamily = 'mlp'\nhidden = [4]\n[data]\nimages = 'digits'\n[training]\n"
        "steps = 1\nbatch = 4\nmicro_batches = 2\n"
    )
    assert cli.main(["run", str(recipe), "--local", *store]) == FailureError.exit_code
    assert "use --executor reference here" in capsys.readouterr().err
    assert cli.main(["run", str(recipe), "--local", "--executor", "reference", "--name", "s", *store]) == 0
    assert cli.main(["audit", "s", *store]) == 2
    assert "does not compute exactly on this processor" in capsys.readouterr().out


def test_too_little_memory_names_the_block_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "LARGE", 0)
    monkeypatch.setattr(compiler, "available", lambda: 100)
    with pytest.raises(FailureError, match=r"would fit: raise \[training\] micro_batches"):
        allocate(2**20, torch.float32)
    monkeypatch.setattr(executors, "_vectors", list)  # they need memory as well
    store = memory_store()
    with pytest.raises(FailureError, match=r"initial weights/block000\.position/0: out of memory: expected .* GiB"):
        train(store, tiny_job(store), group=local_group(compiled))


def test_a_long_compilation_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    announced = Announced(clock=lambda: now[0])
    for done in range(1, 8):
        now[0] += 2
        announced(done)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split()[0] for line in told] == ["3", "6"]
