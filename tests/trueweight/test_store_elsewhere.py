"""Runs in stores that are not folders: in a bucket, and behind a web server that only shows files."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.segments import History
from runtime.testing import TEXT, TINY, tiny_job, train
from storage.checking import verify
from storage.checkpoints import load_state
from storage.frames import FRAME_BYTES
from storage.saving import Piece, join, save_shard, save_state
from storage.store import memory_store, open_store
from trueweight.cli import main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def expected() -> str:
    """The final root of the tiny run."""
    store = memory_store()
    return train(store, tiny_job(store)).state_root.hex()


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_run_in_a_bucket(
    bucket: str, recipe: Path, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{bucket}/runs"
    arguments = ["--local", "--store", store, "--keys", tmp_path / "keys"]
    assert told(capsys, "run", recipe, *arguments)["state"] == expected
    assert told(capsys, "runs", "--store", store)["runs"][0]["status"] == "finished"
    assert told(capsys, "audit", "tiny", "--segments", "1", "--store", store)["verdict"] == "match"
    assert told(capsys, "store", "verify", "--store", store)["whole"]
    copied = told(capsys, "store", "copy", store, tmp_path / "copy")
    assert copied["references"] == ["runs/tiny"]
    assert told(capsys, "audit", "tiny", "--all", "--store", tmp_path / "copy")["verdict"] == "match"
    told(capsys, "store", "forget", "tiny", "--store", store)
    assert len(told(capsys, "store", "gc", "--age", "0s", "--grace", "0s", "--store", store)["deleted"]) > 10
    told(capsys, "store", "copy", tmp_path / "copy", store)
    assert told(capsys, "store", "prove", "tiny", "--tensor", "m/block000.position", "--index", "1,1", "--store", store)


def test_wrong_credentials_are_told_before_anything_is_done(
    bucket: str, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert main(["run", str(recipe), "--local", "--store", bucket]) == 70
    captured = capsys.readouterr()
    assert "access denied" in captured.err
    assert "check AWS_PROFILE or AWS_ACCESS_KEY_ID" in captured.err
    assert captured.out == ""


def test_the_root_is_the_same_for_any_shards_here_and_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    array = np.arange(5 * FRAME_BYTES // 4 + 3, dtype=np.float32)
    state = {"x": array, "y": np.arange(9, dtype=np.int64)}
    step = FRAME_BYTES // 4
    roots = set()
    for url in (f"{bucket}/shards", str(tmp_path / "store")):
        store = open_store(url, create=True)
        for compress in (True, False):
            roots.add(save_state(store, state, compress=compress))
            for count in (1, 2, 3):
                frames = [Piece("x", array.shape, at, array[at * step : (at + 1) * step]) for at in range(6)]
                pieces = [*frames, Piece("y", (9,), 0, state["y"])]
                shards = [save_shard(store, pieces[shard::count], compress=compress) for shard in range(count)]
                roots.add(join(store, shards))
        (root,) = roots
        assert all((load_state(store, root)[name] == values).all() for name, values in state.items())
        assert verify(store).findings == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/store"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_store_that_a_web_server_shows_can_be_audited_and_not_written(
    web: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "store"), create=True)
    train(store, tiny_job(store))
    assert told(capsys, "audit", "tiny", "--segments", "1,2", "--store", web)["verdict"] == "match"
    assert History.open(open_store(web, create=False), "tiny").head.status == "finished"
    assert main(["run", str(recipe), "--local", "--store", web]) == 64
    assert "can be read, not written" in capsys.readouterr().err
