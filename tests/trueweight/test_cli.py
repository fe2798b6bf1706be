import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from runtime.controller import Event, Stepped
from runtime.segments import History
from runtime.testing import TEXT, TINY, tiny_job
from runtime.testing import train as run_job
from runtime.worker import StageWorker
from storage.errors import UsageError
from storage.store import memory_store, open_store
from trueweight import cli, reports, training
from trueweight.interrupts import StopRequest
from trueweight.journal import Journal
from trueweight.locks import Lock, check_lock, read_lock, write_lock
from trueweight.progress import duration

Run = Callable[..., int]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Run:
    """Runs a training command in this process, with the store and the keys below tmp_path.

    With the reference executor unless told otherwise: planning for the compiled one takes longer than such a run.
    """

    def run(command: str, subject: object, *options: str) -> int:
        store, keys = str(tmp_path / "store"), str(tmp_path / "keys")
        fixed = ("--store", store, "--keys", keys, "--local", "--threads", "1")
        return cli.main([command, str(subject), *fixed, "--executor", "reference", *options])

    return run


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_run_show_audit_lock(recipe: Path, train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, lock = str(tmp_path / "store"), tmp_path / "tiny.lock.toml"
    fast = ("--executor", "compiled")
    assert train("run", recipe, "--replicas", "2", "--stages", "2", "--shares", "3,1", "--json", *fast) == 0
    run = told(capsys)
    assert (run["run"], run["status"], run["steps"]) == ("tiny", "finished", 5)

    assert cli.main(["show", "tiny", "--store", store, "--json"]) == 0
    shown = told(capsys)
    assert shown["state"] == run["state"] == shown["segments"][-1]["poststate"]
    assert [worker["worker"] for worker in shown["workers"]] == ["s0r0", "s0r1", "s1r0", "s1r1"]
    assert sum(worker["units"] for worker in shown["workers"]) == 2 * 4 * 5
    assert cli.main(["show", "tiny", "--store", store]) == 0
    assert run["state"][:16] in capsys.readouterr().out

    assert cli.main(["runs", "--store", store, "--json"]) == 0
    assert told(capsys)["runs"] == [
        {"run": "tiny", "status": "finished", "steps": 5, "segments": 3, "state": run["state"]}
    ]

    assert (
        cli.main(["audit", "tiny", "--sample", "2", "--seed", "5", "--threads", "1", "--store", store, "--json"]) == 0
    )
    audited = told(capsys)
    assert (audited["verdict"], audited["replayed"], audited["total"], audited["seed"]) == ("match", 2, 3, 5)
    assert audited["missed"] == [{"forged_segments": 1, "probability": pytest.approx(1 / 3)}]

    assert cli.main(["lock", "tiny", str(lock), "--store", store]) == 0
    assert read_lock(lock).state == run["state"]
    capsys.readouterr()
    assert train("run", recipe, "--lock", str(lock)) == 0
    out = capsys.readouterr().out
    assert "this machine produced the published bytes" in out
    assert "run tiny-2 finished after 5 steps" in out

    lock.write_text(lock.read_text().replace(run["state"], "00" * 32))
    assert train("run", recipe, "--lock", str(lock)) == 70
    assert f"expected the state root {'00' * 32}, got {run['state']}" in capsys.readouterr().err

    diary = tmp_path / "store" / "runs" / "tiny"
    events = [json.loads(line)["event"] for line in (diary / "events.jsonl").read_text().splitlines()]
    assert events[0] == "assembled"
    assert events[-1] == "ended"
    metrics = pq.read_table(diary / "metrics.parquet").to_pylist()
    assert [row["step"] for row in metrics] == list(range(5))
    assert metrics[-1]["loss"] < metrics[0]["loss"]


class OtherRate(StageWorker):
    """Uses the learning rate of another step in step 3."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        return super().update(1 if step == 3 else step, total, exponent, at_once)


def test_audit_exit_codes(
    recipe: Path, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    options = ["--threads", "1", "--store", str(store), "--executor", "reference"]
    with monkeypatch.context() as patch:
        patch.setattr("runtime.worker.StageWorker", OtherRate)
        assert train("run", recipe) == 0
    capsys.readouterr()
    assert cli.main(["audit", "tiny", "--segments", "0", *options]) == 0
    assert cli.main(["audit", "tiny", "--all", *options]) == 1
    out = capsys.readouterr().out
    assert "verdict: diverged\n  path: segment 1/step 3/state_root\n" in out
    assert cli.main(["audit", "tiny", "--segments", "1,7", *options]) == 64

    history = History.open(open_store(str(store), create=False), "tiny")
    damaged = history.segments()[1].steps_object.hex()
    path = store / "objects" / damaged[:2] / damaged[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert cli.main(["audit", "tiny", "--segments", "1", "--json", *options]) == 2
    found = told(capsys)
    assert found["verdict"] == "inconclusive"
    assert damaged in found["reason"]


def test_ctrl_c_then_resume(
    recipe: Path, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient(Journal):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Stepped) and event.record.step == 2:
                signal.raise_signal(signal.SIGINT)

    assert train("run", recipe, "--name", "whole", "--json") == 0
    whole = told(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Journal", Impatient)
        assert train("run", recipe) == 130
    out = capsys.readouterr().out
    assert f"stopped before step 3; go on with: trueweight resume tiny --store {tmp_path / 'store'}" in out
    assert train("resume", "tiny", "--stages", "2", "--json") == 0
    assert told(capsys)["state"] == whole["state"]
    metrics = pq.read_table(tmp_path / "store" / "runs" / "tiny" / "metrics.parquet").to_pylist()
    assert [row["step"] for row in metrics] == list(range(5))
    assert train("resume", "tiny", "--json") == 0
    assert told(capsys)["status"] == "finished"


DYING = """
import os, signal, sys
from runtime.controller import Stepped
from trueweight import cli, training

write = training.Journal.__call__

def dying(self, event):
    write(self, event)
    if isinstance(event, Stepped) and event.record.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

training.Journal.__call__ = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("step", [0, 3])
def test_killed_at_a_step_and_resumed(
    recipe: Path, train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    here = memory_store()
    ended = run_job(here, tiny_job(here))
    fixed = ["--store", str(tmp_path / "store"), "--keys", str(tmp_path / "keys"), "--local", "--executor", "reference"]
    code = DYING.format(step=step)
    killed = subprocess.run([sys.executable, "-c", code, "run", str(recipe), *fixed], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert train("resume", "tiny", "--executor", "compiled", "--json") == 0
    assert told(capsys)["state"] == ended.state_root.hex()


def test_second_ctrl_c_aborts() -> None:
    lines: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(lines.append) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(lines) == 1


def test_a_loss_that_is_not_a_number(
    recipe: Path, train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text().replace("learning_rate = 1e-2", "learning_rate = 1e6\nweight_decay = 1e5")
    recipe.write_text(text)
    assert train("run", recipe) == 70
    errors = capsys.readouterr().err
    assert "error: step " in errors
    assert "operator " in errors
    assert "at element " in errors
    assert "Traceback" not in errors
    assert cli.main(["runs", "--store", str(tmp_path / "store"), "--json"]) == 0
    assert told(capsys)["runs"][0]["status"] == "failed"


def test_the_keys_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "--json"]) == 0
    keys = {(row["table"], row["key"]): row for row in told(capsys)["keys"]}
    assert keys["[training]", "steps"]["default"] == ""
    assert keys["[arithmetic]", "slices"]["default"] == "2"
    assert cli.main(["recipe"]) == 0
    assert "[model] family = 'convnet'" in capsys.readouterr().out


def test_prepare_trains_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "store")
    assert cli.main(["prepare", str(recipe), "--store", store, "--json"]) == 0
    assert set(told(capsys)) == {"recipe", "data", "program"}
    assert cli.main(["runs", "--store", store, "--json"]) == 0
    assert told(capsys) == {"runs": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.toml"], "absent.toml: expected a readable file"),
        (["run"], "RECIPE"),
        (["fly"], "No such command"),
        (["run", "RECIPE", "--replicas", "many"], "integer"),
        (["run", "RECIPE", "--local", "--shares", "3,one"], "--shares '3,one': expected shares such as 3,1"),
        (["run", "RECIPE", "--local", "--shares", "3,1"], "expected 1 shares"),
        (["run", "RECIPE", "--local", "--stages", "9"], "expected 1 to 4 stages for the model's 4 blocks, got 9"),
        (["run", "RECIPE", "--local", "--stages", "0"], "got 0; set --stages"),
        (["run", "RECIPE", "--local", "--address", "1.2.3.4:5"], "drop the other"),
        (["run", "RECIPE", "--auto", "--local"], "got --local; drop it"),
        (["run", "RECIPE", "--auto", "--stages", "2", "--replicas", "0"], "got --stages, --replicas; drop these"),
        (["resume", "RUN", "--auto", "--shares", "3,1"], "got --shares; drop it"),
        (["run", "RECIPE", "--auto", "--threads", "4"], "got --threads; drop it"),
        (["run", "RECIPE", "--local", "--lock", "absent.lock"], "write one with `trueweight lock RUN absent.lock`"),
        (["run", "RECIPE", "--local", "--name", "a b"], "run name 'a b'"),
        (["run", "RECIPE", "--local", "--executor", "fast"], "executor 'fast': expected one of compiled, reference"),
        (["run", "RECIPE", "--local", "--store", "FOLDER"], "is not a store"),
        (["run", "RECIPE", "--local", "--store", "nosuch://bucket"], "choose a folder or a URL"),
        (["resume", "gone"], "run 'gone': expected one of the store's runs (none)"),
        (["show", "gone"], "run 'gone'"),
        (["show", "gone", "--store", "absent"], "no store at absent"),
        (["audit", "gone", "--all"], "run 'gone'"),
        (["audit", "gone", "--all", "--sample", "2"], "expected one of --all"),
        (["audit", "gone", "--segments", "x"], "expected segments such as 3,7"),
        (["audit", "gone", "--seed", "-1"], "--seed -1"),
        (["submit", "RECIPE", "--address", "127.0.0.1:1"], "expected the head's dashboard"),
    ],
)
def test_usage_errors_exit_64(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("not a store")
    cli.main(["prepare", str(recipe), "--store", ".trueweight"]) if "gone" in arguments else None
    arguments = [{"RECIPE": str(recipe), "FOLDER": "folder"}.get(argument, argument) for argument in arguments]
    assert cli.main(arguments) == 64
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_an_unreachable_head_exits_70(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", str(recipe), "--address", "http://127.0.0.1:1"]) == 70
    assert "Ray cluster at http://127.0.0.1:1: expected an answer" in capsys.readouterr().err


def test_a_lock_names_the_root_that_differs(tmp_path: Path) -> None:
    lock = Lock(recipe="aa", data="bb", program="cc", state="dd")
    write_lock(tmp_path / "lock.toml", lock, name="tiny")
    assert read_lock(tmp_path / "lock.toml") == lock
    check_lock(lock, {"data": "bb", "program": "cc"}, tmp_path)
    with pytest.raises(Exception, match="expected the data root bb, got ee; the source of the data has changed"):
        check_lock(lock, {"data": "ee"}, tmp_path)
    (tmp_path / "lock.toml").write_text("recipe = 'aa'")
    with pytest.raises(UsageError, match="KeyError"):
        read_lock(tmp_path / "lock.toml")


def test_loss_curves() -> None:
    assert reports.curve([]) == "-"
    assert reports.curve([2.0]) == "2.0000 ▄ 2.0000"
    assert reports.curve([4.0, 3.0, 2.0, 1.0], width=4) == "4.0000 █▆▃▁ 1.0000"
    assert reports.curve([4.0, 4.0, 1.0, 1.0], width=2) == "4.0000 █▁ 1.0000"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3600, 7380)] == ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 03 min"]
