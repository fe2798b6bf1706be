"""`trueweight plan` and `trueweight profile` as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from runtime.controller import Controller
from runtime.testing import TEXT, TINY, tiny_job, train
from storage.errors import UsageError
from storage.store import memory_store, open_store
from trueweight import cli, placement_cli
from trueweight.cluster_files import read_file

CLUSTERS = sorted(Path("cluster_configs").resolve().glob("*.toml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with what the first command makes beside it."""
    folder = tmp_path_factory.mktemp("placement")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands, whether or not the command line has them yet."""
    names = {command.name for command in cli.app.registered_commands}
    if not {"plan", "profile"} <= names:
        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        placement_cli.register(app)
        monkeypatch.setattr(cli, "app", app)


def run(folder: Path, command: str, *options: object) -> int:
    fixed = ("--store", folder / "store", "--profiles", folder / "profiles", "--executor", "reference", "--threads", 1)
    return cli.main([command, str(folder / "tiny.toml"), *map(str, (*fixed, *options))])


def told(capsys: pytest.CaptureFixture[str], folder: Path, command: str, *options: object) -> Any:
    capsys.readouterr()
    assert run(folder, command, *options, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def cluster(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return path


TWO = """
[[hosts]]
name = "large"
memory_gib = 16
speed = 3.0
[[hosts]]
name = "board"
memory_gib = 0.5
speed = 1.0
"""


def test_profile_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = told(capsys, folder, "profile")
    assert [row["blocks"] for row in first["kinds"]] == [1, 2, 1]
    assert Path(first["file"]).is_file()
    assert told(capsys, folder, "profile") == first
    assert told(capsys, folder, "profile", "--refresh")["kinds"] != first["kinds"]
    assert run(folder, "profile") == 0
    text = capsys.readouterr().out
    assert "micro-batches/s" in text
    assert "a step here" in text


def test_this_machine_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, folder, "plan")
    assert (plan["bounds"], plan["replicas"], plan["exact"]) == ([0, 4], [1], True)
    assert plan["step_seconds"] == pytest.approx(told(capsys, folder, "profile")["step_seconds"])
    assert plan["tokens_per_second"] == pytest.approx(4 * 8 / plan["step_seconds"])
    assert plan["step_seconds"] == pytest.approx(sum(plan["parts_seconds"].values()))


def test_two_hosts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster(tmp_path, TWO)
    plan = told(capsys, folder, "plan", "--cluster", file)
    assert [host["host"] for stage in plan["stages"] for host in stage["hosts"]] == ["large"]
    assert [(one["host"], one["role"]) for one in plan["excluded"]] == [("board", "verification only")]
    assert "needs" in plan["excluded"][0]["reason"]
    assert run(folder, "plan", "--cluster", file, "--html", tmp_path / "plan.html") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert any(line.startswith("large  |") and "s0  4 of 4 micro-batches" in line for line in lines)
    assert any(line.startswith("board  |") and "verification only: the smallest block" in line for line in lines)
    assert "tokens/s" in text
    assert "no plan is better" in text
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<rect") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "verification only" in page


def test_stages_on_request(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster(tmp_path, '[[hosts]]\nname = "a"\ncount = 3\nmemory_gib = 4\n')
    plan = told(capsys, folder, "plan", "--cluster", file, "--stages", 2)
    assert len(plan["stages"]) == 2
    assert {host["host"] for stage in plan["stages"] for host in stage["hosts"]} <= {"a-1", "a-2", "a-3"}
    assert all(sum(host["units"] for host in stage["hosts"]) == 4 for stage in plan["stages"])
    assert run(folder, "plan", "--cluster", file, "--stages", 9) == 64
    assert "expected 1 to 3 stages for 4 blocks on 3 hosts, got 9; set --stages" in capsys.readouterr().err


def test_what_does_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster(tmp_path, '[[hosts]]\nname = "a"\nmemory_gib = 0.5\n')
    assert run(folder, "plan", "--cluster", file) == 70
    captured = capsys.readouterr()
    assert "alone needs" in captured.err
    assert captured.err.strip().endswith("add hosts with more memory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[hosts", "expected TOML, got"),
        ("", r"\[\[hosts\]\]: expected one or more tables, got none; add the machines"),
        ("hosts = 3", r"hosts: expected a table, got 3; write it as"),
        ("hosts = [1]", r"\[\[hosts\]\]: expected one or more tables"),
        ('[[hosts]]\nname = "a"\n[[host]]\n', "unknown key 'host' at the top: did you mean 'hosts'"),
        ('[[hosts]]\nname = "a"\nmemory = 3', r"unknown key 'memory' in \[\[hosts\]\]: did you mean 'memory_gib'"),
        ("[[hosts]]\ncores = 2", r"name: expected a string, got nothing; add name"),
        ('[[hosts]]\nname = "a"\ncores = -1', "cores: expected an integer of 0 or more, got -1"),
        ('[[hosts]]\nname = "a"\nspeed = "fast"', "speed: expected a number"),
        ('[[hosts]]\nname = "a"\nmbit = 0', "mbit: expected a number above 0"),
        ('[[hosts]]\nname = "a"\nspeed = 1.0\ngops = 3.0', "gops: expected no such key beside speed"),
    ],
)
def test_bad_clusters_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = cluster(tmp_path, text)
    with pytest.raises(UsageError, match=message) as error:
        read_file(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_found_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "plan", "--cluster", tmp_path / "none.toml") == 64
    err = capsys.readouterr().err
    assert "No such file" in err
    assert "recipe tiny" not in err


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.stem)
def test_the_examples(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, folder, "plan", "--cluster", file)
    assert plan["step_seconds"] > 0


def test_speeds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gops = told(capsys, folder, "profile")["gops"]
    alone = told(capsys, folder, "plan")["parts_seconds"]["compute"]
    for line, times in (("speed = 2.5", 2.5), (f"gops = {gops * 2}", 2.0), ("cores = 4", 4.0)):
        file = cluster(tmp_path, f'[[hosts]]\nname = "a"\nmemory_gib = 8\n{line}\n')
        plan = told(capsys, folder, "plan", "--cluster", file)
        assert plan["parts_seconds"]["compute"] == pytest.approx(alone / times, rel=1e-6)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_and_a_resumed_one_follow_the_planner(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where profiles are kept
    threads = []

    class Watched(Controller):
        def __init__(self, **given: Any) -> None:
            threads.append(given["threads"])
            super().__init__(**given)

    monkeypatch.setattr("trueweight.training.Controller", Watched)
    fixed = ("--auto", "--executor", "reference", "--keys", str(tmp_path / "keys"), "--json")
    assert cli.main(["run", str(folder / "tiny.toml"), "--store", str(tmp_path / "new"), *fixed]) == 0
    captured = capsys.readouterr()
    whole = memory_store()
    expected = train(whole, tiny_job(whole)).state_root.hex()
    assert json.loads(captured.out)["state"] == expected
    assert "measuring " in captured.err
    assert "0-3 " in captured.err
    assert "no plan is better" in captured.err
    assert list((tmp_path / ".trueweight" / "profiles").iterdir())
    begun = open_store(str(tmp_path / "begun"), create=True)
    train(begun, tiny_job(begun), stop_before=3)
    assert cli.main(["resume", "tiny", "--store", str(tmp_path / "begun"), *fixed]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == expected
    assert "state before step 3" in captured.err
    assert threads == [0, 0]  # all of the host's
