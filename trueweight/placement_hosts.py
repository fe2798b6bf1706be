"""Clusters on paper: hosts in TOML, for planning before there is a cluster to ask.

A file for `trueweight cluster up` will do as well: its other tables and its addresses are not looked at.

[[hosts]]
name = "desk"          # desk-1, desk-2, ... where count is more than 1
count = 2
cores = 8
memory_gib = 16
speed = 1.5            # times the machine that measured; or gops, as `trueweight doctor` shows; else by cores
mbit = 1000
latency_ms = 0.5
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from runtime.costs import Host
from runtime.fields import Section, about, suggestion
from runtime.profiles import RESERVED, HostProfile
from storage.errors import UsageError

TABLES = ("hosts", "cluster", "ssh")


@dataclass(frozen=True, kw_only=True)
class HostConfig(Section):
    """One [[hosts]] table: machines that are alike."""

    table: ClassVar[str] = "[hosts]"

    name: str = field(metadata=about("the host's name, in rows and plans"))
    count: int = field(default=1, metadata=about("so many like it", low=1, high=10_000))
    cores: int = field(default=1, metadata=about("threads of its worker", low=1))
    address: str = field(default="", metadata=about("where it is reached, which planning does not need"))
    memory_gib: float = field(default=0.0, metadata=about("GiB of memory; 0: as the machine that measured", low=0))
    speed: float = field(default=0.0, metadata=about("times the machine that measured; 0: by cores", low=0))
    gops: float = field(default=0.0, metadata=about("10^9 digit operations a second, as in `doctor`", low=0))
    mbit: float = field(default=1000.0, metadata=about("Mbit/s to and from its peers", above=0))
    latency_ms: float = field(default=0.5, metadata=about("milliseconds to a peer", low=0))

    def _unused(self) -> Mapping[str, str]:
        return {"gops": "beside speed"} if self.speed else {}

    def hosts(self, profile: HostProfile) -> list[Host]:
        """The hosts, their speed in units of the profile's host with its threads."""
        memory = int(self.memory_gib * 2**30) or profile.memory
        by_gops = self.gops / profile.gops if profile.gops else 0.0
        names = [self.name] if self.count == 1 else [f"{self.name}-{n}" for n in range(1, self.count + 1)]
        return [
            Host(
                name=name,
                speed=self.speed or by_gops or self.cores / profile.threads,
                memory=max(memory - RESERVED, 0),
                bandwidth=self.mbit * 1e6 / 8,
                latency=self.latency_ms / 1e3,
            )
            for name in names
        ]


def load_cluster(path: Path) -> tuple[HostConfig, ...]:
    """The hosts of a cluster file. UsageError: no such file, no TOML, unknown or missing keys, values out of range."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cluster {path}: {error.strerror}; name a file in TOML, such as those in cluster_configs/"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cluster {path}: not valid TOML: {error}; correct that line") from error
    try:
        return _hosts(given)
    except UsageError as error:
        raise UsageError(f"cluster {path}: {error}") from None


def _hosts(given: Mapping[str, object]) -> tuple[HostConfig, ...]:
    for key in given:
        if key not in TABLES:
            raise UsageError(f"unknown key {key!r} at the top: {suggestion(key, TABLES)}")
    tables = given.get("hosts")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError("expected one or more [[hosts]] tables, got none; add one with name and speed")
    return tuple(HostConfig.read(table) for table in tables)
