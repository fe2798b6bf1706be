"""The recipes in recipes/, and a model of one's own, from the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trueweight import cli

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

FACTORY_RECIPE = """
name = "own"
[model]
family = "factory"
factory = "own_model:FUNCTION"
[data]
images = "digits"
[training]
steps = 2
batch = 8
segment = 1
"""
FACTORY = """
import torch
from torch import nn

from runtime.models.initial import Init


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.gain


def blocks(shape):
    scaled = Scaled(shape.features)
    scaled.initial = {"gain": Init(kind="given")}
    return [nn.Flatten(), scaled, nn.Linear(shape.features, shape.classes)]


class Sorting(nn.Module):
    def forward(self, x):
        return torch.sort(x.flatten(1)).values


def sorting(shape):
    return [Sorting(), nn.Linear(shape.features, shape.classes)]
"""


def run(recipe: Path, store: Path, *options: str) -> int:
    fixed = ("--local", "--threads", "1", "--store", str(store), "--keys", str(store.parent / "keys"))
    return cli.main(["run", str(recipe), *fixed, *options])


def shown(store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert cli.main(["show", name, "--store", str(store), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_digits_convnet_reaches_97_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert run(RECIPES / "digits-convnet.toml", store) == 0
    last = shown(store, "digits-convnet", capsys)["losses"][-1]
    assert last["step"] == 199
    assert last["validation_accuracy"] >= 0.97


@pytest.mark.slow
def test_llama_tiny_trains_and_its_audit_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (RECIPES / "llama-tiny.toml").read_text(encoding="utf-8")
    lines = [{"steps": "steps = 2", "segment": "segment = 1", "warmup": "warmup = 1"}.get(line.split(" ")[0], line)
             for line in text.splitlines() if not line.startswith("validat")]  # fmt: skip
    recipe, store = tmp_path / "llama.toml", tmp_path / "store"
    recipe.write_text("\n".join(lines), encoding="utf-8")
    assert run(recipe, store) == 0
    losses = shown(store, "llama-tiny", capsys)["losses"]
    assert losses[1]["loss"] < losses[0]["loss"]
    assert cli.main(["audit", "llama-tiny", "--all", "--store", str(store)]) == 0


@pytest.mark.slow
def test_gpt2_small_is_lowered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", str(RECIPES / "gpt2-small.toml"), "--store", str(tmp_path / "store")]) == 0
    assert "14 blocks, 3 kinds" in capsys.readouterr().out


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of one's own, importable here and nowhere else."""
    (tmp_path / "own_model.py").write_text(FACTORY, encoding="utf-8")
    for function in ("blocks", "sorting"):
        recipe = FACTORY_RECIPE.replace("FUNCTION", function)
        (tmp_path / f"{function}.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    return tmp_path


def test_ones_own_model_is_audited_without_its_code(own: Path) -> None:
    store = own / "store"
    assert run(own / "blocks.toml", store) == 0
    (own / "own_model.py").unlink()
    command = [sys.executable, "-m", "trueweight", "audit", "own", "--all", "--store", str(store)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: match" in done.stdout


def test_an_operator_without_a_rule_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(own / "sorting.toml", own / "store") == 64
    errors = capsys.readouterr().err
    assert "ATen operator 'sort" in errors
    assert "block 0 (Sorting)" in errors
    line = next(i for i, text in enumerate(FACTORY.splitlines(), 1) if "torch.sort" in text)
    assert f"own_model.py:{line}" in errors
    assert cli.main(["runs", "--store", str(own / "store")]) == 0
    assert "no runs yet" in capsys.readouterr().out
