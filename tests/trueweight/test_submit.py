"""A recipe as a job of a real head with token authentication, started and stopped here."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from runtime.testing import TEXT, TINY, tiny_job, train
from storage.store import memory_store, open_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, for a moment at least."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Head:
    """A Ray head with its dashboard; `environment` is what a client with the right token has."""

    def __init__(self, folder: Path) -> None:
        keep = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
        self.environment = {**keep, **token, "HOME": str(folder), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        port, dashboard, agent, grpc, client = free_ports(5)
        self.url = f"http://127.0.0.1:{dashboard}"
        options = {
            "--node-ip-address": "127.0.0.1",
            "--port": port,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": dashboard,
            "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": grpc,
            "--ray-client-server-port": client,
            "--num-cpus": 2,
            "--temp-dir": folder / "ray",
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
        command += [f"{name}={value}" for name, value in options.items()]
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=folder)

    def wait(self) -> None:
        """Return once the job server answers."""
        session = requests.Session()
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=_retry()))
        token = self.environment["RAY_AUTH_TOKEN"]
        with session:
            answer = session.get(f"{self.url}/api/version", headers={"Authorization": f"Bearer {token}"}, timeout=60)
        assert answer.ok, self.log.read_text()

    def stop(self) -> None:
        """End the head that this test started, and only that."""
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _retry() -> object:
    from urllib3.util import Retry

    return Retry(total=240, connect=240, backoff_factor=0.25, backoff_max=0.25, status_forcelist=(500, 502, 503, 504))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))  # short: Ray's sockets lie below it
    started = Head(folder)
    try:
        started.wait()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


def submit(head: Head, recipe: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trueweight", "submit", str(recipe), "--address", head.url, *options]
    merged = {**head.environment, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=merged, cwd=recipe.parent, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


def test_a_submitted_recipe_gives_the_same_root(head: Head, recipe: Path, tmp_path: Path) -> None:
    here = memory_store()
    ended = train(here, tiny_job(here))
    store = tmp_path / "store"
    done = submit(head, recipe, "--stages", "2", "--replicas", "2", "--store", str(store))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 workers" in done.stdout
    assert f"final state {ended.state_root.hex()}" in done.stdout
    assert open_store(str(store), create=False).names("runs/") == ["runs/tiny"]
    assert re.search(r"job raysubmit_\w+ at", done.stdout)


def test_ray_job_submit_of_the_quickstart_gives_the_published_bytes(head: Head, tmp_path: Path) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    entry = ["python", "-m", "trueweight", "run", "recipes/quickstart.toml", "--replicas", "2", "--stages", "2"]
    entry += ["--lock", "recipes/quickstart.lock.toml", "--store", str(tmp_path / "store")]
    command = [ray, "job", "submit", "--address", head.url, "--working-dir", ".", "--", *entry]
    done = subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 40/40" in done.stdout
    assert "this machine produced the published bytes" in done.stdout


def test_the_jobs_exit_code_comes_back(head: Head, recipe: Path, tmp_path: Path) -> None:
    done = submit(head, recipe, "--stages", "9", "--store", str(tmp_path / "store"))
    assert done.returncode == 64, done.stdout + done.stderr
    assert "expected 1 to 4 stages" in done.stdout


def test_a_wrong_token_is_refused(head: Head, recipe: Path) -> None:
    done = submit(head, recipe, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 70, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
