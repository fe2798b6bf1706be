import argparse
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import SCALES, Scale, add_options, check, make_state, measure, nudge, shapes_of
from benchmarks.harness import main
from storage.errors import FailureError, UsageError

TINY = Scale(layers=1, width=16, vocabulary=64, context=16)


def test_the_full_state_is_gpt_2_small() -> None:
    shapes = shapes_of(SCALES["full"])
    assert sum(map(math.prod, shapes.values())) == 124_439_808
    assert shapes["h.5.mlp.c_fc.weight"] == (768, 3072)
    assert len(shapes) == 2 + 12 * 12 + 2


def test_a_nudge_changes_every_tensor_and_is_found() -> None:
    state = make_state(TINY)
    again = make_state(TINY)
    check("same", again, state)
    nudge(iter(again.values()))
    assert all(np.mean(again[name] != state[name]) > 0.9 for name in state)
    with pytest.raises(FailureError, match="expected the saved bytes"):
        check("other", again, state)
    with pytest.raises(FailureError, match=r"a difference in m/wte\.weight"):
        check("short", {name: array for name, array in state.items() if name != "m/wte.weight"}, state)


@pytest.mark.parametrize("wrong", [["--scale", "huge"], ["--rounds", "0"]])
def test_wrong_use_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(measure, checkpoint.__doc__, add_options=add_options, arguments=wrong)
    assert code == UsageError.exit_code
    assert " ".join(wrong) in capsys.readouterr().err


def test_every_side_saves_and_loads_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCALES", {"tiny": TINY})
    rows = list(measure(argparse.Namespace(scale="tiny", rounds=2, folder=tmp_path)))
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for side in ("ours", "ours, plain", "DCP", "DCP, 2 threads", "torch.save", "safetensors"):
        assert {f"save, {side}", f"load, {side}", f"cold load, {side}", f"stored, {side}"} <= set(names)
    assert "save, disk alone" in names
    assert [row.name for row in rows if row.goal] == [
        "save: time of ours / DCP",
        "stall: time of later Saver.copy / DCP's save",
        "load: time of ours / DCP",
        "cold load: time of ours / DCP",
        "load: time of ours, one tensor / all",
    ]
    assert not any(tmp_path.iterdir())
