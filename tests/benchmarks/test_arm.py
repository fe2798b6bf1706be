"""What the emulated ARM is made of, and what it asks for; the emulator itself is for `.ci/run`."""

import shutil
from pathlib import Path

import pytest

from benchmarks import arm
from benchmarks.harness import main
from storage.errors import UsageError


def test_what_is_installed_for_arm_is_what_these_commands_need_there() -> None:
    wanted = dict(line.split("==") for line in arm._installed())
    assert wanted["torch"] == arm.TORCH
    assert {"numpy", "llvmlite", "coincurve", "pycryptodome", "sympy"} <= wanted.keys()
    assert not {"ray", "pytest", "safe-pysha3"} & wanted.keys()


@pytest.mark.parametrize("words", [["--processors", "sdot,m1"], ["--runs", "mine"]])
def test_a_name_that_is_none_is_refused_before_anything_is_made(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["arm", *words, "--folder", str(tmp_path / "arm")])
    assert main(arm.measure, arm.__doc__, add_options=arm.add_options) == 64
    assert f"{words[0]}: expected some of" in capsys.readouterr().err
    assert not (tmp_path / "arm").exists()


def test_without_an_emulator_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="apt-get install qemu-user-static"):
        arm.Emulator(tmp_path)


def test_a_recipe_is_made_small_and_trained(tmp_path: Path) -> None:
    arm.train("quickstart", tmp_path, arm.FAULT)
    text = (tmp_path / "quickstart.toml").read_text()
    assert text.startswith("faults = true\n")
    assert "steps = 2\n" in text
    assert (tmp_path / "store" / "runs" / "faulty" / "faults.txt").exists()
