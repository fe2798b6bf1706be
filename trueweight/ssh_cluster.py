"""A static list of hosts as a Ray cluster, over SSH: brought up, looked at, taken down."""

import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.actors import security
from runtime.actors.host import versions
from storage.errors import FailureError, TrueweightError, UsageError
from trueweight.cluster_files import HostTable
from trueweight.static_cluster import StaticCluster

Tell = Callable[[str], None]
SSH_SECONDS = 15.0
START_SECONDS = 90.0
STOP_SECONDS = 60.0
_AT_ONCE = 32
_MODULE = "runtime.actors.host"


# ---------------------------------------------------------------------------------------------------------- commands


def ray_arguments(made: StaticCluster, host: HostTable) -> list[str]:
    """What `ray` is given on that host. A head's dashboard, which is not encrypted, stays on its loopback."""
    command = ["start", "--block", f"--node-ip-address={host.address}"]
    if host is made.head:
        command += ["--head", f"--port={made.cluster.port}", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={made.cluster.dashboard_port}"]
    else:
        command += [f"--address={made.address}"]
    command += [f"--num-cpus={host.cores}"] if host.cores else []
    command += [f"--memory={round(host.memory_gib * 2**30)}"] if host.memory_gib else []
    speed = f",trueweight.speed={host.speed:g}" if host.speed else ""
    return [*command, f"--labels=trueweight.host={host.name}{speed}"]


def ssh_command(made: StaticCluster, host: HostTable, operation: str) -> list[str]:
    """The local command that runs one operation of `runtime.actors.host` there."""
    ssh = made.ssh
    command = ["ssh", "-T", "-o", f"ConnectTimeout={SSH_SECONDS:g}", "-o", "ServerAliveInterval=5"]
    command += ["-o", "BatchMode=yes"]  # a question for a password would wait for ever
    for option in ssh.options:
        command += ["-o", option]
    command += ["-p", str(ssh.port)] if ssh.port else []
    command += ["-i", str(Path(ssh.key).expanduser())] if ssh.key else []
    command += ["-l", ssh.user] if ssh.user else []
    python = made.cluster.python
    quoted = f"~/{shlex.quote(python[2:])}" if python.startswith("~/") else shlex.quote(python)
    return [*command, host.address, f"{quoted} -m {_MODULE} {operation}"]


def ask(made: StaticCluster, host: HostTable, operation: str, seconds: float, **request: Any) -> dict[str, Any]:
    """The answer of one operation on one host. FailureError where it cannot be reached, or fails, or takes too long."""
    where = f"host {host.name} ({host.address})"
    limit = seconds + SSH_SECONDS
    try:
        done = subprocess.run(
            ssh_command(made, host, operation),
            input=json.dumps({"place": made.place(host), **request}),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError("ssh: expected it on PATH, got nothing; install an OpenSSH client") from None
    except subprocess.TimeoutExpired:
        raise FailureError(
            f"{where}: expected {operation} within {limit:g} s, got nothing; look at the host, then give the command "
            f"again"
        ) from None
    if done.returncode != 0:
        raise _refused(made, where, operation, done)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise FailureError(
            f"{where}: expected an answer to {operation}, got {done.stdout[-200:]!r}; let its login shell print nothing"
        ) from None
    if "error" in answer:
        kind = UsageError if answer.get("exit_code") == UsageError.exit_code else FailureError
        raise kind(str(answer["error"]))
    return answer


def _refused(
    made: StaticCluster, where: str, operation: str, done: "subprocess.CompletedProcess[str]"
) -> TrueweightError:
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    if done.returncode == 255:  # ssh's own
        return FailureError(
            f"{where}: expected SSH to let us in, got {last}; correct [ssh] or address, try ssh by hand"
        )
    if "No module named" in last or done.returncode in (126, 127):
        return UsageError(
            f"{where}: expected Trueweight for {made.cluster.python}, got {last}; install it there, or set [cluster] "
            f"python to the one that has it"
        )
    return FailureError(f"{where}: expected {operation} to succeed, got exit code {done.returncode}: {last}; see there")


def ask_all(
    made: StaticCluster,
    hosts: Iterable[HostTable],
    operation: str,
    seconds: float,
    request: Callable[[HostTable], Mapping[str, Any]] = lambda _: {},
) -> tuple[dict[str, dict[str, Any]], dict[str, TrueweightError]]:
    """(answers, errors) by host name, all asked at once."""
    answers: dict[str, dict[str, Any]] = {}
    errors: dict[str, TrueweightError] = {}
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        asked = {host.name: pool.submit(ask, made, host, operation, seconds, **request(host)) for host in hosts}
        for name, future in asked.items():
            try:
                answers[name] = future.result()
            except TrueweightError as error:
                errors[name] = error
    return answers, errors


def require_all(errors: Mapping[str, TrueweightError]) -> None:
    """Raise the first error, with the others as notes."""
    if errors:
        first, *others = errors.values()
        for other in others:
            first.add_note(f"also: {other}")
        raise first


# ---------------------------------------------------------------------------------------------------------------- up


def up(made: StaticCluster, *, seconds: float, tell: Tell) -> None:
    """The cluster runs as the file says. What runs already is left alone, so the command can be given again."""
    found, errors = ask_all(made, made.hosts, "probe", SSH_SECONDS)
    require_all(errors)
    for host in made.hosts:
        _require_versions(host, found[host.name])
    prepare(made)
    requests = {host.name: _start_request(made, host, seconds) for host in made.hosts}
    _require_same_configuration(made, found, requests)
    run = {host.name for host in made.hosts if found[host.name]["running"]}
    if run and made.head.name not in run:
        tell(f"the head is gone: stopping {', '.join(sorted(run))} first")
        require_all(ask_all(made, [host for host in made.hosts if host.name in run], "stop", STOP_SECONDS)[1])
        run = set()
    for hosts in ([made.head], made.hosts[1:]):
        for host in hosts:
            tell(f"{host.name}: {'runs already' if host.name in run else 'starting Ray'}")
        require_all(ask_all(made, hosts, "start", seconds, lambda host: requests[host.name])[1])


def prepare(made: StaticCluster) -> None:
    """Token, authority and a certificate per host lie on this machine, before any head starts."""
    here = made.here
    security.make_token(here / security.TOKEN)
    if made.cluster.tls:
        from runtime.actors.certificates import issue, make_authority

        make_authority(here, made.cluster.name)
        for host in made.hosts:
            issue(here, here / security.HOSTS / host.name, host.name, [host.address])
    security.write_private(here / security.CLUSTER, record(made))


def record(made: StaticCluster) -> str:
    """cluster.json: how this machine and the hosts know the cluster again by its address."""
    return json.dumps(
        {
            "address": made.head.address,
            "port": made.cluster.port,
            "dashboard_port": made.cluster.dashboard_port,
            "tls": made.cluster.tls,
            "hosts": {host.name: host.address for host in made.hosts},
        }
    )


def _start_request(made: StaticCluster, host: HostTable, seconds: float) -> dict[str, Any]:
    files = {security.TOKEN: made.here / security.TOKEN}
    if made.cluster.tls:
        own = made.here / security.HOSTS / host.name
        files |= {name: own / name for name in (security.CA, security.CERTIFICATE, security.KEY)}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    command = ray_arguments(made, host)
    return {
        "ray": command,
        "files": texts | {security.CLUSTER: record(made)},
        "tls": made.cluster.tls,
        "wait": seconds,
        "digest": hashlib.sha256(json.dumps([command, texts, made.cluster.tls]).encode()).hexdigest(),
    }


def _require_versions(host: HostTable, found: Mapping[str, Any]) -> None:
    for name, ours in versions().items():
        if found[name] != ours:
            raise FailureError(
                f"host {host.name} ({host.address}): expected {name} {ours} as here, got {found[name]}; install "
                f"{name} {ours} there"
            )


def _require_same_configuration(
    made: StaticCluster, found: Mapping[str, Mapping[str, Any]], requests: Mapping[str, Mapping[str, Any]]
) -> None:
    for host in made.hosts:
        node = found[host.name]["running"]
        if node and node["digest"] != requests[host.name]["digest"]:
            raise UsageError(
                f"host {host.name} ({host.address}): expected a node as the file and the token here say, got another "
                f"that runs since an earlier `up`; take it down first with `trueweight cluster down`"
            )


# ---------------------------------------------------------------------------------------------------- status and down


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """One host: `state` is up, starting (its process runs but the head does not know it), down or unreachable."""

    name: str
    address: str
    state: str
    head: bool
    cpus: float = 0.0
    free_cpus: float = 0.0
    memory_gib: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def status(made: StaticCluster) -> list[HostStatus]:
    """Each host as it is now, the head first. Never raises for a host that is away."""
    found, errors = ask_all(made, made.hosts, "probe", SSH_SECONDS)
    nodes: dict[str, Any] = {}
    if found.get(made.head.name, {}).get("running"):
        try:
            nodes = ask(made, made.head, "nodes", SSH_SECONDS, **_how(made))
        except TrueweightError as error:
            errors.setdefault(made.head.name, error)
    return [
        _status_of(host, host is made.head, found.get(host.name), nodes.get(host.name), str(errors.get(host.name, "")))
        for host in made.hosts
    ]


def _status_of(
    host: HostTable, head: bool, found: Mapping[str, Any] | None, node: Mapping[str, Any] | None, reason: str
) -> HostStatus:
    known: dict[str, Any] = {"name": host.name, "address": host.address, "head": head, "reason": reason}
    if found is None:
        return HostStatus(**known, state="unreachable")
    known["versions"] = {name: found[name] for name in versions()}
    if node is None:
        state = "starting" if found["running"] else "down"
        return HostStatus(**known, state=state, cpus=found["cpus"], memory_gib=found["memory_gib"])
    return HostStatus(**known, state="up", **{key: node[key] for key in ("cpus", "free_cpus", "memory_gib", "labels")})


def down(made: StaticCluster, *, only: str, grace: float, tell: Tell) -> list[str]:
    """The names of the hosts whose node was stopped: all of them, or the one named `only`.

    Nodes take no new work first and have `grace` seconds to end what they do. Hosts that are away are told at the end.
    """
    chosen = [made.named(only)] if only else list(made.hosts)
    found, errors = ask_all(made, {host.name: host for host in (made.head, *chosen)}.values(), "probe", SSH_SECONDS)
    workers = [host for host in chosen if host is not made.head and found.get(host.name, {}).get("running")]
    if grace > 0 and workers and found.get(made.head.name, {}).get("running"):
        _drain(made, workers, grace, tell)
    stopped: list[str] = []
    reachable = [host for host in chosen if host.name in found]
    # The head last: nodes that lose it complain in their logs.
    for hosts in ([host for host in reachable if host is not made.head], [made.head] if made.head in reachable else []):
        answers, failed = ask_all(made, hosts, "stop", STOP_SECONDS)
        errors |= failed
        stopped += [name for name, answer in answers.items() if answer["stopped"]]
    if not only:
        ask_all(made, reachable, "forget", SSH_SECONDS)
        (made.here / security.CLUSTER).unlink(missing_ok=True)
    names = {host.name for host in chosen}
    require_all({name: error for name, error in errors.items() if name in names})
    return stopped


def _drain(made: StaticCluster, workers: Sequence[HostTable], grace: float, tell: Tell) -> None:
    names = [host.name for host in workers]
    tell(f"{', '.join(names)}: no new work, {grace:g} s to end what they do")
    try:
        answer = ask(made, made.head, "drain", grace + STOP_SECONDS, hosts=names, grace=grace, **_how(made))
    except TrueweightError as error:
        tell(f"not drained, stopped all the same: {error}")
        return
    if answer["refused"]:
        tell(f"not drained, stopped all the same: {', '.join(answer['refused'])}")


def _how(made: StaticCluster) -> dict[str, Any]:
    return {"address": made.address, "tls": made.cluster.tls, "wait": SSH_SECONDS}
