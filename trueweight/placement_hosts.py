"""Clusters on paper: the hosts of a cluster file as the planner sees them, before there is a cluster to ask."""

from runtime.costs import Host
from runtime.profiles import RESERVED, HostProfile
from trueweight.cluster_files import HostTable


def planned_hosts(table: HostTable, profile: HostProfile) -> list[Host]:
    """The hosts of a table, their speed in units of the profile's host with its threads."""
    memory = int(table.memory_gib * 2**30) or profile.memory
    by_gops = table.gops / profile.gops if profile.gops else 0.0
    names = [table.name] if table.count == 1 else [f"{table.name}-{n}" for n in range(1, table.count + 1)]
    return [
        Host(
            name=name,
            speed=table.speed or by_gops or max(table.cores, 1) / profile.threads,
            memory=max(memory - RESERVED, 0),
            bandwidth=table.mbit * 1e6 / 8,
            latency=table.latency_ms / 1e3,
        )
        for name in names
    ]
