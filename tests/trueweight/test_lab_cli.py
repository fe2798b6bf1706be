"""`trueweight diff` and `trueweight selfcheck`: exit codes, what is told, what is written."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.executors import Make
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.testing import TEXT, TINY
from storage.store import open_store
from trueweight import cli, lab_cli
from verification.selfcheck import Bench, LocalCore, Workload

FLIP = "kind=flip,step=2,worker=s1r0,place=micro-batch 2/block 2/forward,operator=700,element=3,bit=10"
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command: (exit code, what it printed)."""

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err * (code == 64)

    return run


@pytest.fixture(scope="module", autouse=True)
def decoded_once() -> Iterator[None]:
    """Every worker of every run decodes the same Programs, which takes longer than a step of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgram, "decode", cache(TrainingProgram.decode))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores `one` with the run `left`, `two` with `right` and with `spoiled`, which has a fault."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tiny = TINY.replace("steps = 5", "steps = 3")
    (folder / "tiny.toml").write_text(tiny, encoding="utf-8")
    (folder / "faulty.toml").write_text(tiny.replace("seed = 7", "seed = 7\nfaults = true"), encoding="utf-8")
    for recipe, name, store, more in (
        ("tiny", "left", "one", ()),
        ("tiny", "right", "two", ("--replicas", "2", "--stages", "2")),
        ("faulty", "spoiled", "two", ("--replicas", "2", "--stages", "2", "--inject", FLIP)),
    ):
        places = ("--store", folder / store, "--keys", folder / "keys", "--executor", "reference")
        arguments = ["run", folder / f"{recipe}.toml", "--local", "--name", name, *places, *more, "--json"]
        assert cli.main([str(argument) for argument in arguments]) == 0
    return folder


# --------------------------------------------------------------------------------------------------------------- diff


def test_equal_runs_of_two_stores(folder: Path, command: Command) -> None:
    stores = ("--store", folder / "one", "--other-store", folder / "two")
    code, out = command("diff", "left", "right", *stores)
    assert (code, out.splitlines()[-1]) == (0, "verdict: equal; 3 steps and 24 signed values are equal")
    code, out = command("diff", "left", "right", *stores, "--json")
    told = json.loads(out)
    assert (code, told["verdict"], told["lengths"], told["runs"]) == (0, "equal", [3, 3], ["left", "right"])


def test_a_difference_is_followed_to_the_unit_and_the_element(folder: Path, command: Command) -> None:
    code, out = command("diff", "right", "spoiled", "--store", folder / "two")
    assert code == 1
    lines = [line.strip() for line in out.splitlines()]
    for line in ("segment: segment 1", "step: step 2, loss", "unit: micro-batch 2, blocks 2 to 3, forward: y"):
        assert line in lines
    assert sum("by s1r0 0x" in line for line in lines) == 2
    assert any(line.startswith("element: [") for line in lines)
    assert lines[-1].startswith("verdict: differ at segment 1/step 2/loss; 2 steps and ")
    code, out = command("diff", "right", "spoiled", "--store", folder / "two", "--json")
    told = json.loads(out)
    assert (code, told["verdict"], told["unit"]["blocks"], told["unit"]["micro_batch"]) == (1, "differ", [2, 4], 2)
    assert [place["level"] for place in told["state"]] == ["state", "tensor", "leaf", "element"]


def test_operators_say_which_run_agrees_with_this_machine(folder: Path, command: Command) -> None:
    places = ("--store", folder / "two", "--keys", folder / "keys", "--executor", "reference")
    code, out = command("diff", "right", "spoiled", *places, "--operators", "--json")
    right, spoiled = json.loads(out)["replays"]
    assert (code, right["agrees"], right["finding"]) == (1, True, None)
    assert spoiled["agrees"] is False
    finding = spoiled["finding"]
    assert (finding["worker"], finding["number"], finding["index"]) == ("s1r0", 700, [0, 3])


def test_what_cannot_be_compared_exits_2(folder: Path, command: Command, tmp_path: Path) -> None:
    assert command("store", "copy", folder / "two", tmp_path / "copy")[0] == 0
    copy = open_store(str(tmp_path / "copy"), create=False)
    digest = History.open(copy, "right").segments()[1].steps_object.hex()
    (tmp_path / "copy" / "objects" / digest[:2] / digest[2:]).unlink()
    code, out = command("diff", "left", "right", "--store", folder / "one", "--other-store", tmp_path / "copy")
    assert code == 2
    assert "verdict: incomparable" in out
    assert digest in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "left", "gone", "--store", "one"], "run 'gone': expected one of the store's runs (left)"),
        (["diff", "left", "right", "--store", "absent"], "no store at"),
        (["selfcheck", "--hours", "1", "--rounds", "1"], "expected one of --hours and --rounds"),
        (["selfcheck", "--threads", "9999"], "--threads 9999: expected at most"),
        (["selfcheck", "--run", "gone", "--store", "one"], "run 'gone'"),
        (["selfcheck", "--log", "absent/log"], "--log absent/log: expected a folder at absent"),
        (["selfcheck", "--executor", "fast"], "executor 'fast'"),
    ],
)
def test_usage_errors(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    code, out = command(*arguments)
    assert code == 64
    assert message in out


# ---------------------------------------------------------------------------------------------------------- selfcheck


class Core(LocalCore):
    """A core in this process; number 1 loses a bit of its memory in the second round."""

    def __init__(self, number: int, workload: Workload, make: Make, memory: int) -> None:
        super().__init__(number, Bench(workload, make(1), memory))
        self._rounds = 0

    def ready(self) -> None:
        pass

    def start(self, pattern: int, expected: Any) -> None:
        self._rounds += 1
        original = self._bench._walk

        def walk(pattern: int) -> Any:
            for work, made, digest in original(pattern):
                if self.number == 1 and self._rounds == 2 and work.program is not None:
                    self._bench._buffer[0, 7] = np.uint64(1)
                yield work, made, digest

        self._bench._walk = walk  # type: ignore[method-assign]
        super().start(pattern, expected)
        self._bench._walk = original  # type: ignore[method-assign]


def test_a_mismatch_is_told_logged_and_exits_1(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lab_cli, "ProcessCore", Core)
    monkeypatch.setattr(lab_cli, "host_cores", lambda: [0, 1])
    log = tmp_path / "log.jsonl"
    options = ("--rounds", "2", "--memory", "1", "--executor", "reference", "--log", log)
    code, out = command("selfcheck", *options)
    assert code == 1
    assert "MISMATCH on core 1, round 1, pattern 1: memory" in out
    assert "input 0 memory, element [0, 7]" in out
    assert out.splitlines()[-1] == "verdict: mismatch"
    code, out = command("selfcheck", *options, "--json")
    told = json.loads(out)
    assert (code, told["verdict"], told["rounds"]) == (1, "mismatch", 2)
    assert told["cores"] == [{"core": 0, "mismatches": 0}, {"core": 1, "mismatches": 1}]
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines == [told["mismatches"][0]] * 2


def test_no_mismatch_exits_0_and_gives_the_same_digest_again(
    command: Command, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(lab_cli, "ProcessCore", Core)
    monkeypatch.setattr(lab_cli, "host_cores", lambda: [0])
    digests = []
    for more in (("--memory", "1"), ("--memory", "2"), ("--memory", "1", "--run", "left", "--store", folder / "one")):
        code, out = command("selfcheck", "--rounds", "1", "--executor", "reference", *more, "--json")
        told = json.loads(out)
        assert (code, told["verdict"], told["interrupted"]) == (0, "no mismatch", False)
        digests.append(told["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_no_memory_exits_2(command: Command) -> None:
    code, out = command("selfcheck", "--rounds", "1", "--memory", str(10**9))
    assert code == 2
    assert "give it a smaller --memory, or less --threads" in out


def test_ctrl_c_ends_with_what_was_done() -> None:
    arguments = ["selfcheck", "--hours", "1", "--threads", "1", "--memory", "1", "--executor", "reference", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trueweight", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "stopping after this round" in err
    told = json.loads(out)
    assert (process.returncode, told["interrupted"], told["verdict"]) == (0, True, "no mismatch")
    assert told["rounds"] >= 1
