"""A static list of hosts, in TOML: the file that `trueweight cluster` brings up over SSH."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from runtime.actors import security
from runtime.fields import Section, about, suggestion
from storage.errors import UsageError
from trueweight.cluster_files import NAME, NAMES, HostTable, read_file


@dataclass(frozen=True, kw_only=True)
class ClusterTable(Section):
    """[cluster]: what all hosts have in common."""

    table: ClassVar[str] = "cluster"

    name: str = field(metadata=about(f"the cluster's name: {NAMES}"))
    head: str = field(default="", metadata=about("name or address of the head's host; the first host without"))
    port: int = field(default=6379, metadata=about("the head's port", low=1024, high=65535))
    dashboard_port: int = field(
        default=8265, metadata=about("port of dashboard and job server, on the head's loopback", low=1024, high=65535)
    )
    tls: bool = field(default=True, metadata=about("encrypt what goes between hosts"))
    python: str = field(default="python3", metadata=about("the Python that has Trueweight, on each host"))
    folder: str = field(default=security.FOLDER, metadata=about("where hosts keep token, certificate and log"))

    def _check(self) -> None:
        if not NAME.fullmatch(self.name):
            raise self.refusal("name", NAMES, self.name, "change name")
        if any(10002 <= port <= 19999 for port in (self.port, self.dashboard_port)):  # Ray's workers take these
            raise self.refusal("port", "ports outside of 10002 to 19999", self.port, "change port or dashboard_port")


@dataclass(frozen=True, kw_only=True)
class SshTable(Section):
    """[ssh]: how to reach the hosts; what is not said here is said by ~/.ssh/config."""

    table: ClassVar[str] = "ssh"

    user: str = field(default="", metadata=about("login on the hosts"))
    port: int = field(default=0, metadata=about("port of sshd; 0 leaves it to ssh", low=0, high=65535))
    key: str = field(default="", metadata=about("file of the private key"))
    options: tuple[str, ...] = field(default=("BatchMode=yes",), metadata=about("ssh -o options"))


@dataclass(frozen=True, kw_only=True)
class StaticCluster:
    """A cluster file: [cluster], [ssh] and [[hosts]], the head first."""

    cluster: ClusterTable
    ssh: SshTable
    hosts: tuple[HostTable, ...]

    @property
    def head(self) -> HostTable:
        """The host that the head runs on."""
        return self.hosts[0]

    @property
    def address(self) -> str:
        """HOST:PORT of the head, with brackets around an IPv6 address."""
        host = self.head.address
        return f"[{host}]:{self.cluster.port}" if ":" in host else f"{host}:{self.cluster.port}"

    @property
    def here(self) -> Path:
        """Where this machine keeps the cluster's token, authority and certificates."""
        return Path(self.cluster.folder).expanduser() / self.cluster.name

    def place(self, host: HostTable) -> dict[str, str]:
        """Where the host keeps them, for `runtime.actors.host`."""
        return {"folder": self.cluster.folder, "cluster": self.cluster.name, "host": host.name}

    def named(self, name: str) -> HostTable:
        """The host of that name. UsageError suggests the nearest."""
        for host in self.hosts:
            if host.name == name:
                return host
        near = suggestion(name, [host.name for host in self.hosts])
        raise UsageError(f"--host {name!r}: expected a host of the file, got none; {near}")


def require_name(name: str) -> None:
    """Return where the text may name a cluster's folder."""
    if not NAME.fullmatch(name):
        raise UsageError(f"NAME {name!r}: expected {NAMES}; choose another")


def read_cluster(path: Path) -> StaticCluster:
    """The cluster in a TOML file. UsageError names the key to change."""
    file = read_file(path)
    try:
        cluster, ssh = ClusterTable.read(file.cluster), SshTable.read(file.ssh)
        _check_hosts(file.hosts)
        return StaticCluster(cluster=cluster, ssh=ssh, hosts=_head_first(file.hosts, cluster.head))
    except UsageError as error:
        raise UsageError(f"cluster file {path}: {error}") from None


def _check_hosts(hosts: Sequence[HostTable]) -> None:
    seen: set[str] = set()
    for host in hosts:
        if host.count != 1:
            raise UsageError(
                f"[[hosts]] {host.name}: expected count 1, got {host.count}; give each machine its own [[hosts]] with "
                f"an address (a count is for `trueweight plan`)"
            )
        try:
            ipaddress.ip_address(host.address)
        except ValueError:
            raise UsageError(
                f"[[hosts]] {host.name}: expected address to be an IP address, got {host.address!r}; set address to "
                f"the one that the other hosts reach it by"
            ) from None
        for key in (host.name, host.address):
            if key in seen:
                raise UsageError(f"[[hosts]] {host.name}: expected each host once, got {key} twice; remove one")
            seen.add(key)


def _head_first(hosts: tuple[HostTable, ...], head: str) -> tuple[HostTable, ...]:
    found = [host for host in hosts if head in ("", host.name, host.address)]
    if not found:
        raise UsageError(
            f"[cluster] head: expected a host's name or address, got {head!r}; "
            f"{suggestion(head, [host.name for host in hosts])}"
        )
    return (found[0], *(host for host in hosts if host is not found[0]))
