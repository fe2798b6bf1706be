"""`trueweight store ...` as a user types it, over the store of a tiny run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime.segments import History
from runtime.testing import tiny_job, train
from storage.checkpoints import load_state
from storage.codec import encode
from storage.records import Pin
from storage.saving import save_state
from storage.store import open_store
from trueweight.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the tiny run, which no test may change."""
    folder = tmp_path_factory.mktemp("stores") / "trained"
    store = open_store(str(folder), create=True)
    train(store, tiny_job(store))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "store"))


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """What a command prints with --json, once it has left with the code."""
    capsys.readouterr()
    assert main(["store", *map(str, arguments), "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 64) -> str:
    """What a command says on stderr when it leaves with the code."""
    capsys.readouterr()
    assert main(["store", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def age(folder: Path) -> None:
    """Make every file of a store a week older."""
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - 7 * 86400))


def test_ls_and_du(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "ls", "--store", folder)["checkpoints"]
    history = History.open(open_store(str(folder), create=False), "tiny")
    assert [(row["of"], row["segment"], row["steps"]) for row in rows] == [
        ("tiny", None, 0), ("tiny", 0, 2), ("tiny", 1, 4), ("tiny", 2, 5),
    ]  # fmt: skip
    assert [row["state"] for row in rows[1:]] == [segment.poststate.hex() for segment in history.segments()]
    assert all(row["own"] > 0 and row["logical"] == rows[0]["logical"] for row in rows)
    usage = told(capsys, "du", "--store", folder)
    assert usage["logical"] == sum(row["logical"] for row in rows)
    assert usage["ratio"] == pytest.approx(usage["logical"] / usage["stored"])
    assert usage["dedup"] == pytest.approx(usage["logical"] / usage["distinct"])
    assert usage["dedup"] == 1
    files = {one["kind"]: one["files"] for one in usage["kinds"]}
    assert files["packs"] == files["manifests"] == 4
    assert main(["store", "ls", "--store", str(folder)]) == main(["store", "du", "--store", str(folder)]) == 0
    assert "4 checkpoints: logical" in capsys.readouterr().out
    store = open_store(str(folder), create=False)
    state = load_state(store, history.segments()[-1].poststate)
    other = save_state(store, state | {"one more": np.ones(100, np.float32)}, base=history.segments()[-1].poststate)
    store.swap("pins/other", None, encode(Pin(state=other)))
    more = told(capsys, "du", "--store", folder)
    assert more["logical"] == usage["logical"] + rows[0]["logical"] + 400
    assert more["distinct"] == usage["distinct"] + 400
    assert more["dedup"] == pytest.approx(more["logical"] / more["distinct"])


def test_verify_finds_and_repair_mends(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "verify", "--store", folder)["whole"]
    sample = told(capsys, "verify", "--sample", 459, "--seed", 7, "--store", folder)
    assert (sample["leaves"], sample["seed"], sample["whole"]) == (459, 7, True)
    assert sample["detection"][1]["found"] == pytest.approx(0.99, abs=1e-3)
    packs = sorted((folder / "packs").rglob("*"), key=str)
    pack = next(path for path in packs if path.is_file())
    data = bytearray(pack.read_bytes())
    data[40] ^= 1
    pack.write_bytes(data)
    gone = next(path for path in reversed(packs) if path.is_file() and path != pack)
    gone.unlink()
    findings = told(capsys, "verify", "--store", folder, code=1)["findings"]
    assert {finding["kind"] for finding in findings} == {"damaged", "missing"}
    assert any(finding["tensor"] and finding["leaf"] is not None for finding in findings)
    mended = told(capsys, "repair", "--from", trained, "--store", folder)
    assert len(mended["mended"]) == 2
    assert mended["failed"] == []
    assert told(capsys, "verify", "--store", folder)["whole"]
    assert told(capsys, "repair", "--from", trained, "--store", folder)["mended"] == []


def test_forget_pin_and_gc(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = told(capsys, "pin", "tiny", "--segment", 1, "--name", "kept", "--store", folder)["state"]
    assert told(capsys, "gc", "--store", folder)["deleted"] == []
    told(capsys, "forget", "tiny", "--store", folder)
    age(folder)
    assert len(told(capsys, "gc", "--dry-run", "--grace", "0s", "--store", folder)["deleted"]) > 10
    first = told(capsys, "gc", "--store", folder)
    assert (first["deleted"], len(first["condemned"]) > 10) == ([], True)
    second = told(capsys, "gc", "--grace", "0s", "--store", folder)
    assert len(second["deleted"]) == len(first["condemned"])
    (row,) = told(capsys, "ls", "--store", folder)["checkpoints"]
    assert (row["of"], row["state"]) == ("kept", root)
    assert load_state(open_store(str(folder), create=False), bytes.fromhex(root))
    told(capsys, "unpin", "kept", "--store", folder)
    age(folder)
    told(capsys, "gc", "--grace", "0s", "--store", folder)
    assert told(capsys, "ls", "--store", folder)["checkpoints"] == []


def test_copy_brings_up_to_date_and_refuses_another_history(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "copy"
    done = told(capsys, "copy", folder, target)
    assert (done["references"], done["there"]) == (["runs/tiny"], 0)
    assert told(capsys, "copy", folder, target) == {
        **done,
        "written": 0,
        "written_bytes": 0,
        "there": done["written"],
        "references": [],
    }
    assert told(capsys, "verify", "--store", target)["whole"]
    assert History.open(open_store(str(target), create=False), "tiny").head.status == "finished"
    other = tmp_path / "other"
    store = open_store(str(other), create=True)
    train(store, tiny_job(store, steps=7), stop_before=0)
    assert "has another history" in refused(capsys, "copy", folder, other, "tiny", code=70)
    assert "expected a run or pin of" in refused(capsys, "copy", folder, target, "nobody")


def test_a_copy_that_was_cut_off_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "copy"
    whole = told(capsys, "copy", folder, target)["written"]
    shutil.rmtree(target / "refs")
    gone = [path for path in (target / "packs").rglob("*") if path.is_file()][:2]
    for path in gone:
        path.unlink()
    age(target)
    done = told(capsys, "copy", folder, target)
    assert (done["written"], done["there"]) == (2, whole - 2)
    assert told(capsys, "verify", "--store", target)["whole"]


def test_a_longer_history_of_the_same_run_moves_the_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, target = tmp_path / "here", tmp_path / "copy"
    store = open_store(str(here), create=True)
    train(store, tiny_job(store), stop_before=2)
    told(capsys, "copy", here, target)
    train(store, tiny_job(store))
    assert told(capsys, "copy", here, target, "tiny")["references"] == ["runs/tiny"]
    assert len(History.open(open_store(str(target), create=False), "tiny").segments()) == 3
    assert "has another history" in refused(capsys, "copy", target, folder, code=70)


def test_prove_and_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(folder), create=False)
    segment = History.open(store, "tiny").segments()[1]
    name, array = next(
        (n, a) for n, a in load_state(store, segment.poststate).items() if n.startswith("m/") and a.ndim == 2
    )
    file = tmp_path / "proof.json"
    arguments = ["--segment", "1", "--tensor", name, "--index", "3,2", "--store", str(folder)]
    assert main(["store", "prove", "tiny", *arguments, "--out", str(file)]) == 0
    shutil.rmtree(folder)  # the check needs no store
    shown = told(capsys, "check-proof", file, "--root", segment.poststate.hex())
    assert shown["value"] == array[3, 2].item()
    assert shown["bits"] == f"{int(array[3, 2].view(np.uint32)):08x}"
    assert (shown["segment"], shown["state_root"]) == (1, segment.poststate.hex())
    assert "it is about state" in refused(capsys, "check-proof", file, "--root", "00" * 32, code=1)
    proof = json.loads(file.read_text())
    proof["element"]["value"] += 1
    file.write_text(json.dumps(proof))
    assert "proof refused" in refused(capsys, "check-proof", file, code=1)
    file.write_text("{}")
    assert "expected the fields" in refused(capsys, "check-proof", file)


def test_export_and_import(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, whole = tmp_path / "w.safetensors", tmp_path / "state.safetensors"
    told(capsys, "export", "tiny", out, "--store", folder)
    state = load_state(
        open_store(str(folder), create=False),
        bytes.fromhex(told(capsys, "ls", "--store", folder)["checkpoints"][-1]["state"]),
    )
    weights = load_file(out)
    assert weights.keys() == {name.removeprefix("weight/") for name in state if name.startswith("weight/")}
    assert all(array.tobytes() == state[f"weight/{name}"].tobytes() for name, array in weights.items())
    root = told(capsys, "export", "tiny", whole, "--all", "--store", folder)["state_root"]
    assert told(capsys, "import", whole, "again", "--store", tmp_path / "new")["state"] == root
    assert told(capsys, "ls", "--store", tmp_path / "new")["checkpoints"][0]["of"] == "again"
    assert "holds another state" in refused(capsys, "import", out, "again", "--store", tmp_path / "new")
    save_file({"x": np.zeros(3, np.float16)}, tmp_path / "half.safetensors")
    assert "float32" in refused(capsys, "import", tmp_path / "half.safetensors", "half", "--store", tmp_path / "new")
    assert "expected a path where nothing is" in refused(capsys, "export", "tiny", out, "--store", folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pin", "nobody"), "run 'nobody': expected one of the store's runs (tiny)"),
        (("pin", "tiny", "--segment", "9"), "--segment 9: expected one below 3"),
        (("unpin", "nobody"), "pins/nobody: expected one of those in"),
        (("forget", "nobody"), "runs/nobody: expected one of those in"),
        (("gc", "--age", "soon"), "--age 'soon': expected a time such as 90s, 30m, 12h or 7d"),
        (("prove", "tiny", "--tensor", "weight/nothing", "--index", "0"), "tensor 'weight/nothing': expected one of"),
        (
            ("prove", "tiny", "--tensor", "weight/block000.position", "--index", "1,x"),
            "--index '1,x': expected numbers",
        ),
        (("prove", "tiny", "--tensor", "weight/block000.position", "--index", "99,0"), "whose shape is"),
        (("check-proof", "nowhere.json"), "proof nowhere.json"),
        (("export", "tiny", "x.safetensors", "--format", "csv"), "csv"),
    ],
)
def test_mistakes_are_told_with_the_remedy(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    where = () if arguments[0] == "check-proof" else ("--store", str(trained))
    assert words in refused(capsys, *arguments, *where)


def test_every_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "ls",
        "du",
        "verify",
        "gc",
        "copy",
        "repair",
        "pin",
        "unpin",
        "forget",
        "prove",
        "check-proof",
        "export",
        "import",
    ):
        assert main(["store", command, "--help"]) == 0
        assert "--help" in capsys.readouterr().out
