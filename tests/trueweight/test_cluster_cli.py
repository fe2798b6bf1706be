"""A cluster over SSH for real: two hosts, each a network namespace with its own address and its own sshd."""

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime.actors import host as hosts_side
from runtime.actors import security
from runtime.profiles import HostProfile, save
from runtime.testing import TEXT, TINY
from runtime.version import VERSION
from storage.errors import FailureError, UsageError
from trueweight import ssh_cluster
from trueweight.cli import main
from trueweight.static_cluster import read_cluster

ROOT = Path(__file__).parents[2]
MEASURED = HostProfile(
    host=platform.node(), cores=1, memory=2**30, kinds=(), loss=0.1, update=0.1, start=0.1, bandwidth=1e8, latency=1e-3,
    gops=1234.4, program="", executor="compiled", threads=1, version=VERSION, measured=1.0,
)  # fmt: skip
STATIC = ROOT / "cluster_configs" / "static.toml"
FILE = """
[cluster]
name = "lab"
head = "two"
[[hosts]]
name = "one"
address = "10.0.0.1"
cores = 4
memory_gib = 2
speed = 1.5
mbit = 1000
latency_ms = 0.2
[[hosts]]
name = "two"
address = "10.0.0.2"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "lab.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------- the file


def test_a_cluster_file_is_read_head_first(tmp_path: Path) -> None:
    made = read_cluster(written(tmp_path, FILE))
    assert [host.name for host in made.hosts] == ["two", "one"]
    assert made.address == "10.0.0.2:6379"
    assert ssh_cluster.ray_arguments(made, made.head) == [
        "start",
        "--block",
        "--node-ip-address=10.0.0.2",
        "--head",
        "--port=6379",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
        "--labels=trueweight.host=two",
    ]
    assert ssh_cluster.ray_arguments(made, made.hosts[1])[3:] == [
        "--address=10.0.0.2:6379",
        "--num-cpus=4",
        "--memory=2147483648",
        "--labels=trueweight.host=one,trueweight.speed=1.5",
    ]


def test_the_published_file_is_read() -> None:
    made = read_cluster(STATIC)
    assert made.cluster.tls
    assert len(made.hosts) > 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("cores = 4", "core = 4"), "unknown key 'core' in [[hosts]]: did you mean 'cores'?"),
        (("[cluster]", "[clusters]"), "unknown key 'clusters' at the top: did you mean 'cluster'?"),
        (("cores = 4", "cores = -1"), "[[hosts]] cores: expected an integer of 0 or more, got -1"),
        (('"10.0.0.1"', '"one.lan"'), "expected address to be an IP address, got 'one.lan'"),
        (('"10.0.0.1"', '"10.0.0.2"'), "expected each host once, got 10.0.0.2 twice"),
        (("cores = 4", "count = 4"), "[[hosts]] one: expected count 1, got 4"),
        (('head = "two"', 'head = "tow"'), "head: expected a host's name or address, got 'tow'; did you mean"),
        (('name = "lab"', 'name = "a lab"'), "[cluster] name: expected lower-case letters"),
        (('name = "lab"', "name = 1"), "[cluster] name: expected a string, got 1"),
        (("[[hosts]]", "[[host]]"), "unknown key 'host' at the top: did you mean 'hosts'?"),
        (("[cluster]", "[cluster"), "expected TOML, got"),
    ],
)
def test_a_wrong_file_ends_with_the_key_to_change(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_cluster(written(tmp_path, FILE.replace(*change)))


def test_no_file_and_no_hosts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected to read it"):
        read_cluster(tmp_path / "none.toml")
    with pytest.raises(UsageError, match=r"\[\[hosts\]\]: expected one or more"):
        read_cluster(written(tmp_path, '[cluster]\nname = "lab"\n'))


def test_a_dry_run_prints_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "up", str(written(tmp_path, FILE)), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "one: ssh -T -o ConnectTimeout=15" in told
    assert "10.0.0.1 'python3 -m runtime.actors.host start'" in told
    assert "ray start --block --node-ip-address=10.0.0.2 --head" in told


def test_a_hosts_measured_rate_is_a_label_of_its_node() -> None:
    asked = ["start", "--block", "--labels=trueweight.host=one,trueweight.speed=2"]
    assert hosts_side.labelled(asked, 0.0) == asked
    assert hosts_side.labelled(asked, 1849.6) == [*asked[:2], f"{asked[2]},trueweight.gops=1850"]


def test_a_host_that_is_away_is_told_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        text = f'[cluster]\nname = "lab"\nfolder = "{tmp_path}"\n[ssh]\nport = {free.getsockname()[1]}\n'
    if shutil.which("ssh") is None:
        pytest.skip("no ssh on PATH: apt-get install openssh-client")
    path = written(tmp_path, text + '[[hosts]]\nname = "one"\naddress = "127.0.0.1"\n')
    assert main(["cluster", "up", str(path)]) == 70
    assert "host one (127.0.0.1): expected SSH to let us in, got" in capsys.readouterr().err
    assert main(["cluster", "status", str(path)]) == 70
    assert "unreachable" in capsys.readouterr().out
    assert main(["cluster", "down", str(path)]) == 70


def test_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read_cluster(written(tmp_path, FILE))
    answer = {**hosts_side.versions(), **hosts_side.size(), "running": None, "ray": "2.9.0"}
    monkeypatch.setattr(ssh_cluster, "ask", lambda *_, **__: answer)
    with pytest.raises(FailureError, match=r"host two \(10\.0\.0\.2\): expected ray [\d.]+ as here, got 2\.9\.0"):
        ssh_cluster.up(made, seconds=1, tell=print)


def test_keys_for_a_cluster_that_something_else_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--folder", str(tmp_path)]
    assert main(["cluster", "keys", "aws", *kept]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'aws'}\n"
    token = (tmp_path / "aws" / "token").read_text()
    assert main(["cluster", "keys", "aws", "--here", "10.0.0.1", *kept]) == 0
    lines = capsys.readouterr().out
    shown = subprocess.run(
        ["bash", "-c", f'{lines}cat "$RAY_AUTH_TOKEN_PATH" "$RAY_TLS_SERVER_CERT"; echo $RAY_USE_TLS$RAY_AUTH_MODE'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith(f"{token}-----BEGIN CERTIFICATE-----")
    assert shown.endswith("1token\n")
    assert main(["cluster", "keys", "plain", "--no-tls", "--here", "10.0.0.1", *kept]) == 0
    assert "TLS" not in capsys.readouterr().out
    for wrong in (["../aws"], ["aws", "--here", "../x"]):
        assert main(["cluster", "keys", *wrong, *kept]) == 64


# --------------------------------------------------------------------------------------------------------- for real


def run(*command: str, timeout: float = 30) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout).stdout


class Lab:
    """Two namespaces behind a bridge, `one` and `two`, whose sshd let this process's key in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"tw{os.getpid() % 100000}"
        self.net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.servers: list[subprocess.Popen[bytes]] = []
        self.names = {"one": f"{self.net}.1", "two": f"{self.net}.2"}
        self.port = 2222

    def build(self) -> None:
        bridge = f"{self.prefix}br"
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.254/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        (self.folder / "environment").write_text("", encoding="utf-8")
        for name, address in self.names.items():
            inside, outside = f"{self.prefix}{name}", f"{self.prefix}v{name}"
            run("ip", "netns", "add", inside)
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", inside)
            run("ip", "link", "set", outside, "master", bridge, "up")
            for command in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                run("ip", "-n", inside, *command)
            run("ip", "-n", inside, "link", "set", "lo", "up")
            self.servers.append(self.sshd(inside, address))
        for address in self.names.values():
            self.await_port(address)

    def sshd(self, inside: str, address: str) -> "subprocess.Popen[bytes]":
        options = {
            "Port": self.port,
            "ListenAddress": address,
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "yes",
            "SetEnv": f"PYTHONPATH={ROOT} HOME={self.folder}",
        }
        command = ["ip", "netns", "exec", inside, str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null"]
        for key, value in options.items():
            command += ["-o", f"{key}={value}"]
        with (self.folder / f"sshd-{address}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def await_port(self, address: str) -> None:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection((address, self.port), timeout=1):
                return
            assert time.monotonic() < end, [log.read_text() for log in self.folder.glob("sshd*.log")]

    def file(self, *, port: int = 6379) -> Path:
        path = self.folder / "lab.toml"
        path.write_text(
            f'[cluster]\nname = "lab"\npython = "{sys.executable}"\nfolder = "{self.folder}/kept"\nport = {port}\n'
            f'[ssh]\nuser = "root"\nport = {self.port}\nkey = "{self.folder}/key"\n'
            f'options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]\n'
            + "".join(
                f'[[hosts]]\nname = "{name}"\naddress = "{address}"\ncores = 1\nspeed = {speed}\nmbit = 100\n'
                for (name, address), speed in zip(self.names.items(), (1.0, 0.5), strict=True)
            ),
            encoding="utf-8",
        )
        return path

    def inside(self, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """The command on that host, where cluster files lie in the lab's folder."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return subprocess.run(
            ["ip", "netns", "exec", f"{self.prefix}{name}", *command],
            env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def trust(self) -> None:
        """What `up` left lies where commands on the hosts look for it."""
        (self.folder / ".trueweight").mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self.folder / ".trueweight" / "cluster").symlink_to(self.folder / "kept")

    def remove(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait(timeout=10)
        for name in self.names:
            place = hosts_side.Place(folder=str(self.folder / "kept"), cluster="lab", host=name)
            shutil.rmtree(place.scratch, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", f"{self.prefix}{name}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.prefix}br"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    for tool in ("sshd", "ssh", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH: apt-get install openssh-server openssh-client iproute2")
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    folder = Path(tempfile.mkdtemp(prefix="twlab", dir="/tmp"))
    Path("/run/sshd").mkdir(exist_ok=True)
    made = Lab(folder)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        main(["cluster", "down", str(made.file()), "--grace", "0"])
        made.remove()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    def tell(*arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["cluster", *arguments, "--json"])
        captured = capsys.readouterr()
        assert "not drained" not in captured.err
        return code, json.loads(captured.out) if captured.out else captured.err

    return tell


def supervisors(lab: Lab) -> dict[str, int]:
    files = (lab.folder / "kept").glob("lab/hosts/*/node.json")
    return {file.parent.name: json.loads(file.read_text())["pid"] for file in files}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
def test_up_run_down_over_ssh(lab: Lab, told: Callable[..., tuple[int, Any]]) -> None:
    file = str(lab.file())
    save(lab.folder / ".trueweight" / "profiles" / "kept.json", MEASURED)
    code, answer = told("up", file)
    assert code == 0, answer
    states = [(host["name"], host["state"], host["cpus"]) for host in answer["hosts"]]
    assert states == [("one", "up", 1), ("two", "up", 1)]
    assert [host["labels"]["trueweight.speed"] for host in answer["hosts"]] == ["1", "0.5"]
    assert [host["labels"]["trueweight.gops"] for host in answer["hosts"]] == ["1234", "1234"]
    first = supervisors(lab)

    kept = lab.folder / "kept" / "lab"
    secret = [kept / "token", kept / "ca.key", *kept.glob("hosts/*/host.key")]
    assert [path.stat().st_mode & 0o777 for path in secret] == [0o600] * 4

    code, answer = told("up", file)  # once more: nothing is started again
    assert (code, supervisors(lab)) == (0, first), answer

    lab.trust()
    (lab.folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (lab.folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    trueweight = (sys.executable, "-m", "trueweight")
    recipe, address = str(lab.folder / "tiny.toml"), lab.names["one"]
    options = ("--replicas", "2", "--executor", "reference", "--store", str(lab.folder / "store"))
    done = lab.inside("one", *trueweight, "run", recipe, "--address", f"{address}:6379", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    job = lab.inside(
        "one", *trueweight, "submit", recipe, "--address", "http://127.0.0.1:8265", "--name", "again", *options
    )
    assert job.returncode == 0, job.stdout + job.stderr
    roots = [re.search(r"final state (\w+)", text.stdout) for text in (done, job)]
    assert roots[0]
    assert roots[1]
    assert roots[0].group(1) == roots[1].group(1), [text.stdout + text.stderr for text in (done, job)]

    code, answer = told("down", file, "--host", "two", "--grace", "5")
    assert (code, answer["stopped"]) == (0, ["two"])
    code, answer = told("status", file)
    assert code == 70
    assert [(host["name"], host["state"]) for host in answer["hosts"]] == [("one", "up"), ("two", "down")]

    code, answer = told("up", file)  # goes on where it stopped
    assert code == 0, answer
    assert supervisors(lab)["one"] == first["one"]

    code, answer = told("up", str(lab.file(port=6380)))
    assert (code, "take it down first" in answer) == (64, True)

    code, answer = told("down", str(lab.file()), "--grace", "0")
    assert (code, sorted(answer["stopped"])) == (0, ["one", "two"])
    assert security.known(f"{lab.names['one']}:6379", str(lab.folder / "kept")) is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
def test_a_slow_link_and_a_partition_that_heals_change_no_bit(lab: Lab, told: Callable[..., tuple[int, Any]]) -> None:
    code, answer = told("up", str(lab.file()))
    assert code == 0, answer
    folder, wide = lab.folder / "partition", ("--executor", "reference", "--json")
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "long.toml").write_text(TINY.replace("steps = 5", "steps = 24"), encoding="utf-8")
    trueweight = (sys.executable, "-m", "trueweight", "run", str(folder / "long.toml"))
    alone = lab.inside("one", *trueweight, "--local", "--store", str(folder / "alone"), *wide)
    for name in lab.names:
        slow_link(f"{lab.prefix}{name}")
    reachable = f"{lab.names['one']}:6379"
    command = [*trueweight, "--address", reachable, "--replicas", "2", "--store", str(folder / "store"), *wide]
    lab.trust()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(lab.inside, "one", *command)
        diary = folder / "store" / "runs" / "tiny" / "events.jsonl"
        await_lines(diary, "stepped", 5)
        run("ip", "-n", f"{lab.prefix}two", "link", "set", "eth0", "down")
        await_lines(diary, "changed", 1)
        run("ip", "-n", f"{lab.prefix}two", "link", "set", "eth0", "up")
        done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["state"] == json.loads(alone.stdout)["state"]
    events = [json.loads(line) for line in diary.read_text().splitlines()]
    assert next(event["what"] for event in events if event["event"] == "changed").startswith("lost s0r")
    told("down", str(lab.file()), "--grace", "0")


def slow_link(namespace: str) -> None:
    """20 Mbit/s, and 10 ms where the kernel has netem (that of some machines has not)."""
    link = ["tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root"]
    if subprocess.run([*link, "netem", "delay", "10ms", "rate", "20mbit"], capture_output=True, check=False).returncode:
        run(*link, "tbf", "rate", "20mbit", "burst", "32k", "latency", "200ms")


def await_lines(diary: Path, event: str, count: int) -> None:
    """Return once the diary has so many events of a kind."""
    end = time.monotonic() + 90
    while not diary.exists() or diary.read_text().count(f'"event": "{event}"') < count:
        assert time.monotonic() < end, diary.read_text()[-2000:] if diary.exists() else "no diary"
        time.sleep(0.1)
