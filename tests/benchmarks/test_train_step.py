import argparse

import pytest

from benchmarks import start, train_step
from benchmarks.harness import main
from benchmarks.train_step import Shape, add_options, measure
from storage.errors import UsageError

TINY = Shape(
    base="quickstart",
    layers=1,
    width=16,
    heads=2,
    context=16,
    sequences=2,
    micro_batches=2,
    goals=(("eager float32", 0),),
)


@pytest.mark.parametrize(
    ("option", "value", "known"), [("--shapes", "gpt-3", "gpt-256"), ("--without", "bf", "compile")]
)
def test_what_is_unknown_is_refused(option: str, value: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(measure, train_step.__doc__, add_options=add_options, arguments=[option, value])
    assert code == UsageError.exit_code
    assert f"{option} {value}: expected some of {known}" in capsys.readouterr().err


@pytest.mark.slow
def test_every_side_takes_steps_and_the_breakdown_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "SHAPES", {"tiny": TINY})
    given = argparse.Namespace(shapes="tiny", threads="1", steps=2, without="compile", dropout=0.1)
    rows = {row.name.removeprefix("tiny, dropout 0.1, 1 thread: "): row for row in measure(given)}
    for side in ("exact", "eager float32", "eager bfloat16"):
        assert rows[f"step, {side}"].value > 0
    assert rows["exact over eager float32"].met
    parts = [row.value for name, row in rows.items() if name.startswith("exact, ")]
    assert len(parts) >= 5
    assert 0 < sum(parts) < 1.5 * rows["step, exact"].value


@pytest.mark.slow
def test_starts_are_counted_from_an_empty_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every start is a process of its own; of warm ones, whose median counts, one does here."""
    monkeypatch.setattr(start, "WARM", 1)
    assert main(start.measure, start.__doc__, arguments=["--json"]) in (0, 1)
    told = capsys.readouterr().out
    assert '"cold start: every kernel compiled"' in told
    assert '"warm start: every kernel read"' in told
