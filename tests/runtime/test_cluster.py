"""Tokens, certificates and failure detection, on Ray nodes that this file starts and stops."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.actors import security
from runtime.actors.certificates import issue, make_authority
from runtime.actors.cluster import Cluster, joined
from runtime.actors.security import Credentials, known, local, make_token
from storage.errors import FailureError, UsageError

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
VARIABLES = (*security.EXPLICIT, "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def no_ray_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the user has set nothing, and no cluster of an earlier `up` lies in the home folder."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# ------------------------------------------------------------------------------------------------------ files


def test_a_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = make_token(tmp_path / "new" / "token")
    text = path.read_text()
    assert (len(text), path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (64, 0o600, 0o700)
    assert make_token(path).read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["token"]


def test_a_token_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "token").mkdir()
    with pytest.raises(FailureError, match="expected to write it"):
        make_token(tmp_path / "token")


def test_certificates_verify_under_their_authority(tmp_path: Path) -> None:
    from cryptography import x509

    make_authority(tmp_path, "lab")
    issue(tmp_path, tmp_path / "one", "one", ["10.0.0.1", "one.lan"])
    ca = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    made = x509.load_pem_x509_certificate((tmp_path / "one" / "host.crt").read_bytes())
    made.verify_directly_issued_by(ca)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "10.0.0.1"]
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "one.lan"]
    for key in (tmp_path / "ca.key", tmp_path / "one" / "host.key"):
        assert key.stat().st_mode & 0o777 == 0o600


def test_certificates_are_kept_until_something_changes(tmp_path: Path) -> None:
    def certificate() -> bytes:
        return (tmp_path / "one" / "host.crt").read_bytes()

    make_authority(tmp_path, "lab")
    issue(tmp_path, tmp_path / "one", "one", ["10.0.0.1"])
    first = certificate()
    make_authority(tmp_path, "lab")
    issue(tmp_path, tmp_path / "one", "one", ["10.0.0.1"])
    assert certificate() == first
    issue(tmp_path, tmp_path / "one", "one", ["10.0.0.2"])
    second = certificate()
    assert second != first
    (tmp_path / "ca.key").unlink()
    make_authority(tmp_path, "lab")  # another authority: what the old one signed is of no use
    issue(tmp_path, tmp_path / "one", "one", ["10.0.0.2"])
    assert certificate() != second


def record(folder: Path, *, tls: bool, **hosts: str) -> None:
    told = {"address": "10.0.0.1", "port": 6379, "dashboard_port": 8265, "tls": tls, "hosts": hosts}
    security.write_private(folder / "cluster.json", json.dumps(told))


def test_a_cluster_is_known_by_its_address(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    record(lab, tls=True, one="10.0.0.1", here="127.0.0.1")
    for host in ("one", "here"):
        security.write_private(lab / "hosts" / host / "host.key", "key")
    found = Credentials(token=lab / "token", certificates=lab / "hosts" / "here")
    for address in ("10.0.0.1:6379", "http://10.0.0.1:8265", "http://localhost:8265", "http://127.0.0.1:8265/"):
        assert known(address, str(tmp_path)) == found
    for address in ("10.0.0.2:6379", "10.0.0.1:6380", "http://10.0.0.2:8265", "http://10.0.0.1:6379"):
        assert known(address, str(tmp_path)) is None
    assert found.environment()["RAY_TLS_SERVER_KEY"] == str(lab / "hosts" / "here" / "host.key")
    assert known("10.0.0.1:6379", str(tmp_path / "none")) is None
    record(tmp_path / "other", tls=False)  # two clusters at one address: neither is guessed
    assert known("10.0.0.1:6379", str(tmp_path)) is None
    (tmp_path / "other" / "cluster.json").write_text("{")
    assert known("10.0.0.1:6379", str(tmp_path)) == found


def test_a_users_own_choice_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with local():
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the token of another cluster")
    before = dict(os.environ)
    with local():
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert file.stat().st_mode & 0o777 == 0o600
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ.items() >= security.HEALTH.items()
    assert dict(os.environ) == before
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------ real clusters


class Nodes:
    """A head and one more node on this machine, as two hosts would run them."""

    def __init__(self, folder: Path, *, tls: bool, secured: bool = True) -> None:
        from ray.util import get_node_ip_address

        self.folder = folder
        self.ip = get_node_ip_address()
        self.port = free_port()
        self.address = f"{self.ip}:{self.port}"
        self.credentials = Credentials(token=make_token(folder / "token"), certificates=folder / "own" if tls else None)
        if tls:
            make_authority(folder, "test")
            issue(folder, folder / "own", "test", [self.ip])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        told = self.credentials.environment() if secured else {"RAY_AUTH_MODE": "disabled"}
        self.environment = {**kept, **told, **security.HEALTH, "RAY_USAGE_STATS_ENABLED": "0"}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *options: str) -> "subprocess.Popen[bytes]":
        log = self.folder / f"{name}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.ip}"]
        command += [f"--temp-dir={self.folder}/ray", "--num-cpus=1", "--object-store-memory=80000000"]
        command += [f"--labels=trueweight.host={name}", *options]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, env=self.environment, stdout=sink, stderr=sink, start_new_session=True)
        self.processes.append(process)
        return process

    def wait(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        log = self.folder / f"{name}.log"
        end = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def head(self) -> None:
        """The first node. Ray gives it 30 s to come up, which a busy machine may not: then once more."""
        for attempt in range(2):
            options = [f"--port={self.port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
            process = self.start("head", "--head", *options)
            try:
                self.wait("head", process)
                return
            except AssertionError as error:
                if attempt or "timed out during startup" not in str(error):
                    raise
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.processes.remove(process)  # it is no node

    def other(self, name: str) -> None:
        options = [f"--address={self.address}", f"--dashboard-agent-listen-port={free_port()}"]
        self.wait(name, self.start(name, *options))

    def raylet(self, process: "subprocess.Popen[bytes]") -> int:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if "raylet" in Path(f"/proc/{pid}/comm").read_text())

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the session that we started it in
                process.wait()


def free_port() -> int:
    """Outside of the range that Ray gives to its workers."""
    import random
    import socket

    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


@contextlib.contextmanager
def nodes(*, tls: bool = False, secured: bool = True) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))  # short: Ray's sockets lie below it
    made = Nodes(folder, tls=tls, secured=secured)
    try:
        made.head()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_we_start_asks_for_its_token_and_others_are_joined_without() -> None:
    import ray

    with joined() as cluster:
        assert cluster.started
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600

        @ray.remote(num_cpus=0)
        def seen() -> tuple[str | None, str | None]:
            return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")

        assert ray.get(seen.remote()) == ("token", str(token))
        assert joins_elsewhere(cluster, {}) == "none"
        assert joins_elsewhere(cluster, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}) == "RAY_AUTH_TOKEN"
        assert joins_elsewhere(cluster, dict(os.environ)) == "joined"
    assert not token.exists()
    # The same process, afterwards: a cluster of somebody's who has no token.
    with nodes(secured=False) as tokenless, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", tokenless.address)
        with joined() as found:
            assert not found.started
            assert found.address == tokenless.address
            assert "RAY_AUTH_MODE" not in os.environ


def joins_elsewhere(cluster: Cluster, environment: dict[str, str]) -> str:
    """How `joined` ends in another process: joined, or which token was refused."""
    code = (
        "import sys\n"
        "from runtime.actors.cluster import joined\n"
        "from storage.errors import FailureError\n"
        "try:\n"
        f"    with joined({cluster.address!r}): print('joined')\n"
        "except FailureError as error:\n"
        "    text = str(error); assert 'expected its token, got' in text, text\n"
        "    print(text.split('got ')[1].split(';')[0].removeprefix('the one in '))\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_and_a_hanging_node_are_noticed_within_seconds_and_tls_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    with nodes(tls=True) as made:
        for name in security.EXPLICIT:
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(FailureError, match="expected a cluster without TLS, got one with it"), joined(made.address):
            pass
        certificates = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": "/nowhere"}
        with (
            security.applied(made.credentials.environment() | certificates),
            pytest.raises(UsageError, match="expected certificates to read"),
            joined(made.address),
        ):
            pass
        made.other("one")
        made.other("two")
        with security.applied(made.credentials.environment()), joined(made.address):
            _, one, two = (made.raylet(process) for process in made.processes)
            assert seconds_until_dead("one", one, signal.SIGKILL) < 5
            assert seconds_until_dead("two", two, signal.SIGSTOP) < 8  # 4.5 s, and what the machine is busy with
            os.kill(two, signal.SIGKILL)
            assert [node["Labels"]["trueweight.host"] for node in ray.nodes() if node["Alive"]] == ["head"]


def seconds_until_dead(host: str, pid: int, how: signal.Signals) -> float:
    import ray

    begin = time.monotonic()
    os.kill(pid, how)
    while any(node["Alive"] and node["Labels"]["trueweight.host"] == host for node in ray.nodes()):
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    logging.getLogger(__name__).info("%s noticed after %.1f s", how.name, time.monotonic() - begin)
    return time.monotonic() - begin


# ------------------------------------------------------------------------------------------- configurations of others


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_autoscaler_files_are_valid_for_the_installed_ray(name: str) -> None:
    import yaml
    from ray._private.label_utils import validate_label_key, validate_label_value
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    ready = prepare_config(given)
    validate_config(ready)
    for kind in ready["available_node_types"].values():
        for key, value in kind["labels"].items():
            assert validate_label_key(key) is None
            validate_label_value(value)
    for step in ("head_start_ray_commands", "worker_start_ray_commands"):
        *_, start = given[step]
        assert start.index("node.sh") < start.index("ray start")
    assert f"~/.trueweight/cluster/{name}" in given["file_mounts"]
    assert given["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_kuberay_asks_for_token_and_tls_and_has_the_installed_ray() -> None:
    import ray
    import yaml

    cluster = yaml.safe_load((CONFIGS / "kuberay.yaml").read_text())
    spec = cluster["spec"]
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert spec["authOptions"] == {"mode": "token", "secretName": "trueweight-token"}
    assert spec["tlsOptions"] == {"enabled": True}
    assert spec["rayVersion"] == ray.__version__
    images = set()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        images.add(container["image"])
        told = {one["name"]: one["value"] for one in container["env"]}
        assert told.items() >= security.HEALTH.items()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    (image,) = images
    assert not image.endswith(":latest")


SRUN = """#!/usr/bin/env bash
# Runs the step here: srun [options] bash -c SCRIPT ARGUMENTS...
while [[ $1 == -* ]]; do [ "$1" = -w ] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2" = "show hostnames" ] && tr ',' '\\n' <<<"$3"
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
def test_a_slurm_job_trains_and_leaves_nothing_behind(tmp_path: Path) -> None:
    from runtime.testing import TEXT, TINY

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    scratch = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))  # short: Ray's sockets lie below it
    script = CONFIGS / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TRUEWEIGHT_"))}
    environment = kept | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(CONFIGS.parent),
        "TRUEWEIGHT_PYTHON": sys.executable,
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NODELIST": "alone",
        "SLURM_CPUS_PER_TASK": "2",
    }
    options = ["--replicas", "2", "--executor", "reference", "--store", str(tmp_path / "store")]
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "tiny.toml"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    logs = [log.read_text() for log in tmp_path.glob(".trueweight/cluster/*/logs/*")]
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    assert "final state" in done.stdout
    assert list(tmp_path.glob(".trueweight/cluster/*/token")) == []
    assert list(tmp_path.glob(".trueweight/cluster/*/hosts/*/host.key")) == []
    assert [path.name for path in scratch.iterdir() if path.name.startswith("tw-")] == []
    shutil.rmtree(scratch)
    end = time.monotonic() + 20  # a worker needs a moment to see that its node is gone
    while left := processes_naming(str(tmp_path)):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def processes_naming(text: str) -> list[str]:
    """Command lines that name the text or run in an environment that does."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "environ").read_bytes() and entry.name != str(os.getpid()):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
