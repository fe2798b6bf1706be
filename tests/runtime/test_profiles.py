import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import profiles
from runtime.executors import reference
from runtime.profiles import (
    HostProfile,
    cached,
    fit_link,
    host_of,
    latest,
    load,
    made_up,
    make_model,
    measure,
    peak_bytes,
    profile_file,
    save,
)
from runtime.program.builder import Builder
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram
from runtime.program.types import Type
from runtime.testing import tiny_program
from storage.errors import FailureError


@pytest.fixture(scope="module")
def program() -> TrainingProgram:
    return TrainingProgram.decode(tiny_program())


@pytest.fixture(scope="module")
def measured(program: TrainingProgram) -> HostProfile:
    return measure(program, reference, executor="reference", threads=1, repeats=1)


def never(_: int) -> Executor:
    raise AssertionError("measured again")


def test_every_part_is_measured(program: TrainingProgram, measured: HostProfile) -> None:
    assert len(measured.kinds) == len(program.kinds)
    assert all(kind.forward > 0 and kind.backward > 0 and kind.prepare >= 0 for kind in measured.kinds)
    assert measured.loss > 0
    assert measured.update > 0
    assert measured.gops > 0
    assert (measured.program, measured.executor, measured.threads) == (program.root.hex(), "reference", 1)


def test_medians_by_the_clock(program: TrainingProgram) -> None:
    ticks = iter(range(10**6))
    made = measure(program, reference, executor="reference", threads=1, repeats=2, clock=lambda: float(next(ticks)))
    assert {(kind.forward, kind.backward, kind.prepare) for kind in made.kinds} == {(1.0, 1.0, 0.0)}
    assert (made.loss, made.start) == (1.0, 0.0)


def test_what_the_first_time_takes_longer_is_the_start(program: TrainingProgram) -> None:
    spent = [0.0]

    def late() -> float:
        """A clock whose second reading is late: the first pass of the first kind."""
        spent.append(spent[-1] + (31.0 if len(spent) == 2 else 1.0))
        return spent[-1]

    made = measure(program, reference, executor="reference", threads=1, repeats=2, clock=late)
    assert made.start == 30.0


def test_the_model_is_the_program_with_seconds(program: TrainingProgram, measured: HostProfile) -> None:
    model = make_model(program, measured)
    assert len(model.blocks) == len(program.blocks) == 4
    assert (model.slots, model.micro_batches) == (2, 4)
    # One row of 8 positions a micro-batch: tokens are i32 or i64, activations f32 of width 8.
    assert [block.input_bytes for block in model.blocks][1:] == [8 * 8 * 4] * 3
    assert model.blocks[1].work == model.blocks[2].work == pytest.approx(measured.unit_seconds([1]))
    assert model.update == pytest.approx(measured.update / 1e6)
    tied = set(model.blocks[0].tensors) & set(model.blocks[-1].tensors)
    assert len(tied) == 1
    whole, second = model.span(0, 4), model.span(3, 4)
    assert whole.held == whole.owned == sum(model.elements.values())
    assert second.held - second.owned == model.elements[tied.pop()]  # held twice, owned by the first stage
    assert host_of(measured).speed == 1.0
    assert host_of(measured).memory == measured.memory - profiles.RESERVED


def test_a_span_needs_what_its_worker_holds(program: TrainingProgram, measured: HostProfile) -> None:
    model = make_model(program, measured)
    span = model.span(0, 2)
    least = int(span.memory_bytes(2, 2, 1))
    assert least == 12 * span.held + 8 * span.owned + 4 * span.owned + span.kept_bytes + span.working_bytes
    assert int(span.memory_bytes(2, 2, 4)) == least + 3 * span.kept_bytes
    last = model.span(2, 4)
    assert int(last.memory_bytes(2, 1, 4)) == int(last.memory_bytes(2, 1, 1))  # goes back at once


def test_peak_bytes_of_a_program() -> None:
    b = Builder()
    x = b.input("x", "f32", 10)
    y = x + x
    z = y * y
    program = b.finish([z + x])
    assert peak_bytes(program) == 80  # two of the arrays at a time


def test_made_up_arrays_are_the_same_every_time() -> None:
    one, other = (made_up(Type("f32", (3, 4)), "w") for _ in range(2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, made_up(Type("f32", (3, 4)), "v"))
    assert made_up(Type("i64", (6,)), "rng").tolist() == [0] * 6


# -------------------------------------------------------------------------------------------------------------- cache


def test_kept_and_read_again(program: TrainingProgram, tmp_path: Path) -> None:
    told: list[str] = []
    kept = cached(program, reference, executor="reference", threads=1, folder=tmp_path / "new", tell=told.append)
    assert told == ["measuring 3 kinds of block with the reference executor and 1 threads"]
    again = cached(program, never, executor="reference", threads=1, folder=tmp_path / "new", tell=told.append)
    assert again == kept
    assert len(told) == 1
    with pytest.raises(AssertionError, match="measured again"):
        cached(program, never, executor="reference", threads=1, folder=tmp_path / "new", refresh=True)
    with pytest.raises(AssertionError, match="measured again"):
        cached(program, never, executor="reference", threads=2, folder=tmp_path / "new")


def test_the_latest_of_all_kept_is_the_hosts_rate(
    program: TrainingProgram, measured: HostProfile, tmp_path: Path
) -> None:
    assert latest(tmp_path / "none") is None
    for number, (moment, gops) in enumerate([(5.0, 50.0), (9.0, 90.0), (7.0, 70.0)]):
        save(tmp_path / f"{number}.json", replace(measured, measured=moment, gops=gops))
    save(tmp_path / "elsewhere.json", replace(measured, measured=99.0, host="elsewhere"))
    save(tmp_path / "older.json", replace(measured, measured=99.0, version="0.0.0"))
    (tmp_path / "damaged.json").write_text(json.dumps({"profile": {}, "sha256": ""}))
    (tmp_path / "nothing.json").write_text("")
    found = latest(tmp_path)
    assert found is not None
    assert found.gops == 90.0


def _key(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.__setitem__(name, value)


FOREIGN = {
    "another host": _key("host", "elsewhere"),
    "another program": _key("program", "00" * 32),
    "another executor": _key("executor", "compiled"),
    "other threads": _key("threads", 7),
    "other cores": _key("cores", 10**6),
    "another version": _key("version", "0.0.0"),
    "fewer kinds": lambda body: body["kinds"].pop(),
    "no kinds": _key("kinds", None),
    "kinds that are none": _key("kinds", [1, 2, 3]),
    "a negative time": _key("loss", -1.0),
    "no number": _key("update", "fast"),
    "true": _key("memory", True),
    "a fraction of a core": _key("cores", 1.5),
    "infinite": _key("gops", float("inf")),
    "nan": lambda body: body["kinds"][0].__setitem__("forward", float("nan")),
    "an unknown key": _key("more", 1),
    "a missing key": lambda body: body.pop("loss"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_another_profile_is_not_trusted(
    name: str, program: TrainingProgram, measured: HostProfile, tmp_path: Path
) -> None:
    path = profile_file(tmp_path, program, executor="reference", threads=1)
    save(path, measured)
    assert load(path, program, executor="reference", threads=1) == measured
    body = json.loads(path.read_text())["profile"]
    FOREIGN[name](body)
    path.write_text(json.dumps({"profile": body, "sha256": profiles._digest(body)}))
    assert load(path, program, executor="reference", threads=1) is None


def test_every_damaged_byte_is_found(program: TrainingProgram, measured: HostProfile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save(path, measured)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        found = load(path, program, executor="reference", threads=1)
        assert found is None or found == measured  # a changed space is no change
    for damaged in (b"", b"[]", b"null", b"\xff", data[:-40], b"[" * 1000):
        path.write_bytes(damaged)
        assert load(path, program, executor="reference", threads=1) is None
    assert load(tmp_path / "none.json", program, executor="reference", threads=1) is None


def test_a_damaged_file_is_measured_again(program: TrainingProgram, tmp_path: Path) -> None:
    path = profile_file(tmp_path, program, executor="reference", threads=1)
    path.write_text("{}")
    made = cached(program, reference, executor="reference", threads=1, folder=tmp_path)
    assert load(path, program, executor="reference", threads=1) == made


def test_a_folder_that_cannot_be_is_told(program: TrainingProgram, measured: HostProfile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailureError, match="file"):
        save(tmp_path / "file" / "p.json", measured)


# ---------------------------------------------------------------------------------------------------------------- use


def test_a_link_from_its_transfers() -> None:
    bandwidth, latency = fit_link([(size, 0.002 + size / 1e8) for size in (10**3, 10**6, 10**7)])
    assert bandwidth == pytest.approx(1e8)
    assert latency == pytest.approx(0.002)
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_link([(5, 1.0), (5, 2.0)])
