"""The file that says which hosts there are, in TOML: `trueweight plan` and `trueweight cluster` read the same one."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from runtime.fields import Section, about, suggestion
from storage.errors import UsageError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
NAMES = "lower-case letters, digits and '-', 32 at most"
_TABLES = {"cluster": dict, "ssh": dict, "hosts": list}


@dataclass(frozen=True, kw_only=True)
class HostTable(Section):
    """One [[hosts]] table: a machine, or for planning `count` that are alike."""

    table: ClassVar[str] = "[hosts]"

    name: str = field(metadata=about(f"the host's name: {NAMES}"))
    address: str = field(default="", metadata=about("its IP address, as the other hosts and this one reach it"))
    count: int = field(default=1, metadata=about("so many like it, for planning", low=1, high=10_000))
    cores: int = field(default=0, metadata=about("CPUs for Ray; 0: all that there are, 1 for planning", low=0))
    memory_gib: float = field(default=0.0, metadata=about("GiB; 0: all, for planning as here", low=0))
    speed: float = field(default=0.0, metadata=about("times the machine that measured, a label; 0: by cores", low=0))
    gops: float = field(default=0.0, metadata=about("10^9 digit operations a second, as in `doctor`", low=0))
    mbit: float = field(default=1000.0, metadata=about("Mbit/s to and from its peers, for planning", above=0))
    latency_ms: float = field(default=0.5, metadata=about("milliseconds to a peer, for planning", low=0))

    def _check(self) -> None:
        if not NAME.fullmatch(self.name):
            raise self.refusal("name", NAMES, self.name, "change name")

    def _unused(self) -> Mapping[str, str]:
        return {"gops": "beside speed"} if self.speed else {}


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """What a file says: its hosts, and its other tables as they stand."""

    path: Path
    hosts: tuple[HostTable, ...]
    cluster: Mapping[str, Any]
    ssh: Mapping[str, Any]


def read_file(path: Path) -> ClusterFile:
    """The tables of a cluster file. UsageError: no file, no TOML, unknown or missing keys, values out of range."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cluster file {path}: expected to read it, got {error.strerror}; name one, such as in cluster_configs/"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cluster file {path}: expected TOML, got {error}; correct it") from error
    try:
        return _file(path, given)
    except UsageError as error:
        raise UsageError(f"cluster file {path}: {error}") from None


def _file(path: Path, given: Mapping[str, Any]) -> ClusterFile:
    for key, value in given.items():
        if key not in _TABLES:
            raise UsageError(f"unknown key {key!r} at the top: {suggestion(key, tuple(_TABLES))}")
        if not isinstance(value, _TABLES[key]):
            raise UsageError(f"{key}: expected a table, got {value!r}; write it as [{key}], hosts as [[hosts]]")
    tables = given.get("hosts")
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError("[[hosts]]: expected one or more tables, got none; add the machines, each with a name")
    hosts = tuple(HostTable.read(table) for table in tables)
    return ClusterFile(path=path, hosts=hosts, cluster=given.get("cluster", {}), ssh=given.get("ssh", {}))
