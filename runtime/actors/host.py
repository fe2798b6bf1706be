"""What `trueweight cluster` runs on each host, over SSH: JSON in, JSON out. `python -m runtime.actors.host OPERATION`.

A node of ours is one `ray start --block` in a session of its own. Its record, node.json, holds the process's id and
start time, so that nothing else is ever stopped.
"""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from runtime.actors import security
from runtime.version import VERSION
from storage.errors import FailureError, TrueweightError, UsageError

NODE, LOG, ENVIRONMENT = "node.json", "ray.log", "env"
STOP_SECONDS = 20.0
_RAY = ("-m", "ray.scripts.scripts")
_STARTED = "Ray runtime started"
_TICK = 0.1


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that runs: its supervisor's process id and start time (in ticks since boot), and what it was told."""

    pid: int
    born: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a host keeps what belongs to one cluster. Several hosts may share a home: each has a folder below it."""

    folder: str
    cluster: str
    host: str

    @property
    def shared(self) -> Path:
        """Token, ca.crt and cluster.json."""
        return Path(self.folder).expanduser() / self.cluster

    @property
    def own(self) -> Path:
        """This host's certificate, its node's record and log."""
        return self.shared / security.HOSTS / self.host

    @property
    def scratch(self) -> Path:
        """Ray's folder, for nobody else's eyes: sockets below it have to stay within 107 characters."""
        name = hashlib.sha256(f"{self.own}".encode()).hexdigest()[:8]
        return Path(f"/tmp/tw-{os.getuid()}") / name  # noqa: S108 - made with mode 0700 and checked for its owner


# ------------------------------------------------------------------------------------------------------- operations


def probe(place: Place, _: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, size, and the node that runs here for this cluster, if any."""
    node = running(place)
    return {**versions(), **size(), "running": asdict(node) if node else None}


def versions() -> dict[str, str]:
    """What must be equal on all hosts."""
    return {"python": platform.python_version(), "ray": version_of("ray"), "trueweight": VERSION}


def size() -> dict[str, float]:
    """CPUs that this process may use, memory in GiB."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpus": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30, 1)}


def start(place: Place, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write token, certificates and record; start Ray; return once it runs. A node that runs already is left alone."""
    from runtime.profiles import FOLDER, latest  # takes its time, and only a start needs it

    digest = str(request["digest"])
    node = running(place)
    if node is not None:
        if node.digest != digest:
            raise UsageError(
                f"host {place.host}: expected no node, or one with this configuration, got another (process "
                f"{node.pid}); run `trueweight cluster down` first"
            )
        return {"pid": node.pid, "was_running": True}
    for name, text in request["files"].items():
        target = (place.own if name in (security.KEY, security.CERTIFICATE) else place.shared) / name
        security.write_private(target, str(text))
        if name == security.CA:
            security.write_private(place.own / name, str(text))
    by_hand = _credentials(place, tls=bool(request["tls"])).environment()
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in by_hand.items()]
    security.write_private(place.own / ENVIRONMENT, "".join(lines))
    shutil.rmtree(place.scratch, ignore_errors=True)  # an earlier node's logs were kept until now
    measured = latest(Path(FOLDER))
    rate = measured.gops if measured else 0.0
    command = [sys.executable, *_RAY, *labelled(request["ray"], rate), f"--temp-dir={_private(place.scratch)}"]
    log = place.own / LOG
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=_environment(place, tls=bool(request["tls"])),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=place.own,
            start_new_session=True,
        )
    node = Node(pid=process.pid, born=_born(process.pid) or 0, digest=digest)
    security.write_private(place.own / NODE, json.dumps(asdict(node)))
    _await_start(place, node, process, log, float(request["wait"]))
    return {"pid": node.pid, "was_running": False}


def labelled(arguments: Sequence[str], gops: float) -> list[str]:
    """Ray's arguments, with 10^9 digit operations a second as this host has measured them as a label; 0 for none."""
    more = f",trueweight.gops={gops:.0f}" if gops else ""
    return [argument + more * argument.startswith("--labels=") for argument in arguments]


def _await_start(place: Place, node: Node, process: "subprocess.Popen[bytes]", log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while _STARTED not in (text := log.read_text(encoding="utf-8", errors="replace")):
        ended = process.poll() is not None
        if ended or time.monotonic() > end:
            _end(node)
            (place.own / NODE).unlink(missing_ok=True)
            got = f"exit code {process.returncode}" if ended else "nothing"
            last = " | ".join(text.strip().splitlines()[-3:])
            raise FailureError(
                f"host {place.host}: expected Ray to start within {seconds:g} s, got {got}: {last}; see {log} there"
            )
        time.sleep(_TICK)


def stop(place: Place, _: Mapping[str, Any]) -> dict[str, Any]:
    """End the node that `start` recorded here, and no other process."""
    node = running(place)
    if node is not None:
        _end(node)
    (place.own / NODE).unlink(missing_ok=True)
    return {"stopped": node is not None}


def forget(place: Place, _: Mapping[str, Any]) -> dict[str, Any]:
    """The cluster is no longer known here, so that its token is not offered to whoever takes its address next."""
    (place.shared / security.CLUSTER).unlink(missing_ok=True)
    return {}


def nodes(place: Place, request: Mapping[str, Any]) -> dict[str, Any]:
    """On the head: what Ray says of its nodes that are alive, by the host's name."""
    from runtime.actors.cluster import joined

    environment = _credentials(place, tls=bool(request["tls"])).environment()
    with (
        _silent(),
        security.applied(environment),
        joined(str(request["address"]), timeout=float(request["wait"])),
    ):
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return {
            node["Labels"].get("trueweight.host", node["NodeID"]): {
                "id": node["NodeID"],
                "address": node["NodeManagerAddress"],
                "cpus": node["Resources"].get("CPU", 0.0),
                "free_cpus": free.get(node["NodeID"], {}).get("CPU", 0.0),
                "memory_gib": round(node["Resources"].get("memory", 0.0) / 2**30, 1),
                "labels": {key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/")},
            }
            for node in ray.nodes()
            if node["Alive"]
        }


def drain(place: Place, request: Mapping[str, Any]) -> dict[str, Any]:
    """On the head: take no new work on these hosts, and return once they have none or after `grace` seconds."""
    grace = float(request["grace"])
    wanted = set(request["hosts"])
    found = {host: about for host, about in nodes(place, request).items() if host in wanted}
    environment = _environment(place, tls=bool(request["tls"]))
    why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=trueweight cluster down"]
    why.append(f"--deadline-remaining-seconds={max(1, round(grace))}")
    asked = {
        host: subprocess.Popen(
            [sys.executable, *_RAY, "drain-node", f"--address={request['address']}", f"--node-id={about['id']}", *why],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for host, about in found.items()
    }
    end = time.monotonic() + grace + 5
    accepted = {host for host, process in asked.items() if _code(process, end) == 0}
    while accepted and time.monotonic() < end:
        left = nodes(place, request)
        if all(host not in left or left[host]["free_cpus"] >= left[host]["cpus"] for host in accepted):
            break
        time.sleep(_TICK)
    return {"drained": sorted(accepted), "refused": sorted(set(found) - accepted)}


def _code(process: "subprocess.Popen[bytes]", end: float) -> int:
    try:
        return process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


# -------------------------------------------------------------------------------------------------------- processes


def running(place: Place) -> Node | None:
    """The node that `start` recorded here, where its process is still that process."""
    try:
        node = Node(**json.loads((place.own / NODE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return node if _born(node.pid) == node.born else None


def _end(node: Node) -> None:
    """Ask the supervisor to end, which ends its node; kill what is left of its session after a while."""
    if _born(node.pid) != node.born:
        return
    members = _session(node.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(node.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end and any(_born(pid) == born for pid, born in members.items()):
        time.sleep(_TICK)
    for pid, born in (members | _session(node.pid)).items():
        if _born(pid) == born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> dict[int, int]:
    """Process id to start time of all in the session: nothing that Ray starts leaves it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                if os.getsid(pid) == leader and (born := _born(pid)):
                    found[pid] = born
    return found


def _born(pid: int) -> int | None:
    """When the process started, in ticks since boot (field 22 of proc(5)'s stat); None for none, or for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _environment(place: Place, *, tls: bool) -> dict[str, str]:
    """This process's environment with the cluster's credentials. A job's `python` is the one that runs this.

    Nothing of SSH's: where it sees SSH_CLIENT, the bash that starts a job reads ~/.bashrc, which may put another
    `python` first.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SSH"))}
    path = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), kept.get("PATH"))))
    told = {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | told | _credentials(place, tls=tls).environment() | security.HEALTH


def _credentials(place: Place, *, tls: bool) -> security.Credentials:
    return security.Credentials(token=place.shared / security.TOKEN, certificates=place.own if tls else None)


def _private(folder: Path) -> Path:
    """The folder, which only this user can enter."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    found = folder.parent.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.parent.is_symlink():
        raise FailureError(
            f"{folder.parent}: expected a folder of mode 0700 of user {os.getuid()}, got {found.st_mode & 0o777:o} of "
            f"{found.st_uid}; remove it"
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _silent() -> Any:
    """Standard output is for the answer: what Ray prints goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


OPERATIONS: Mapping[str, Callable[[Place, Mapping[str, Any]], dict[str, Any]]] = {
    operation.__name__: operation for operation in (probe, start, stop, forget, nodes, drain)
}


def main(arguments: Sequence[str]) -> int:
    """Run one operation on the request at standard input; the exit code. Errors come out as JSON, too."""
    request = json.load(sys.stdin)
    place = Place(**request["place"])
    try:
        answer = OPERATIONS[arguments[0]](place, request)
    except TrueweightError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
