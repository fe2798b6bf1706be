"""A cluster of several hosts on one machine, each a raylet of its own: for tests and benchmarks of what goes wrong."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
"""A host that vanishes is noticed in seconds."""


@dataclass(kw_only=True)
class Hosts:
    """Raylets on this machine, of one CPU each unless told otherwise; the head's stays."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, count: int) -> Hosts:
        """A new cluster of so many hosts."""
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": HEALTH})
        hosts = cls(cluster=cluster)
        for _ in range(count - 1):
            hosts.join()
        return hosts

    def join(self, *, cpus: int = 1, name: str = "") -> None:
        """One more host, with a name where `trueweight cluster up` would have given it one."""
        labels = {"trueweight.host": name} if name else {}
        self.nodes.append(self.cluster.add_node(num_cpus=cpus, labels=labels))

    @property
    def address(self) -> str:
        """Where to join it."""
        return str(self.cluster.address)

    def stop(self) -> None:
        """End all of it."""
        self.cluster.shutdown()

    def leave(self, at: int) -> None:
        """A host goes away."""
        self.cluster.remove_node(self.nodes.pop(at), allow_graceful=True)

    def raylets(self) -> list[psutil.Process]:
        """The raylets but the head's."""
        return [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in self.nodes]

    def forget(self, at: int) -> None:
        """A host whose raylet was killed: what is left of it is ended."""
        self.cluster.remove_node(self.nodes.pop(at), allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """The processes of all workers."""
        found = []
        for node in (self.cluster.head_node, *self.nodes):
            with suppress(psutil.Error):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found += [one for one in raylet.children() if one.name().startswith("ray::WorkerActor")]
        return found
