"""The hosts of a Ray cluster for the planner: one worker a node, with all of the node's CPUs; measured by themselves.

A node measures itself in a task that is pinned to it. It is sent the recipe's Programs, as workers are, and no code.
Then each takes arrays of several sizes from the next one: that is its link.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.actors.group import Pin, RayGroup, draining_nodes
from runtime.costs import Host, Model
from runtime.profiles import FOLDER, HostProfile, cached, fit_link, host_of, make_model
from runtime.program.training import TrainingProgram
from runtime.version import VERSION
from storage.errors import FailureError, TrueweightError

MEASURE_SECONDS = 600.0
"""How long nodes may take to measure themselves before a run begins without them."""
LINK_SECONDS = 60.0
"""How long measuring a link may take; without, it is what the profile says."""
SIZES = (2**17, 2**17, 2**20, 2**22, 2**23)
"""Bytes of what a node takes from another to measure its link; the first opens it and does not count."""
BUSY_SECONDS = 30.0
"""How long a run waits for others to leave where they are at work on every node, such as workers of a controller that
was killed a moment ago."""
LOOK_SECONDS = 2.0
"""How often Ray is asked which nodes there are."""
RETRY_SECONDS = 60.0
"""How long a node on which a worker did not come up is left alone."""
_TICK = 0.5


@dataclass(kw_only=True)
class _Site:
    """A node: its name for people, its CPUs and memory as Ray has them; `profile` once it has measured itself.

    `samples` are arrays that it keeps for others to take. `link` is (bytes a second, latency in seconds).
    """

    node: str
    name: str
    cpus: int
    memory: int
    task: Any
    samples: list[Any]
    profile: HostProfile | None = None
    left_out: str = ""
    taking: Any = None
    since: float = 0.0
    link: tuple[float, float] | None = None


class RaySites:
    """See `runtime.revision.Sites`: the nodes of the cluster that this process is connected to.

    `programs` is the encoding of `program`; `folder` is where each host keeps its profiles. Nodes with less than a CPU,
    and those that others are at work on, are left out, and so are those that cannot measure themselves.
    """

    def __init__(
        self,
        group: RayGroup,
        *,
        program: TrainingProgram,
        programs: bytes,
        executor: str,
        folder: str = FOLDER,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._group, self._program, self._executor, self._folder, self._tell = group, program, executor, folder, tell
        self._programs = ray.put(programs)
        self._sites: dict[str, _Site] = {}
        """By Ray's id of the node."""
        self._usable: set[str] = set()
        """Nodes that are there and not about to leave."""
        self._busy: set[str] = set()
        """Nodes of which it was told that others are at work on them."""
        self._looked = float("-inf")
        self._reference: HostProfile | None = None

    def model(self, seconds: float = MEASURE_SECONDS) -> Model:
        """What the program costs on the fastest host, once all nodes have measured themselves.

        Those that do not within `seconds` are left out. FailureError where none does.
        """
        self._look()
        patience = time.monotonic() + BUSY_SECONDS
        while not self._sites and self._busy and time.monotonic() < patience:
            time.sleep(_TICK)
            self._look()
        told = ", ".join(sorted(site.name for site in self._sites.values()))
        self._tell(f"measuring {len(self._sites)} hosts: {told}" if len(self._sites) != 1 else f"measuring {told}")
        deadline = time.monotonic() + seconds
        while any(self._waiting(site) for site in self._sites.values()) and time.monotonic() < deadline:
            time.sleep(_TICK / 10)
            self._take()
        self._connect()
        while any(self._connecting(site) for site in self._sites.values()):
            time.sleep(_TICK / 10)
            self._take()
        for site in self._sites.values():
            if self._waiting(site):
                self._leave_out(site, f"it did not measure itself in {seconds:g} s")
        found = [site.profile for site in self._sites.values() if site.profile]
        if not found:
            reasons = [f"{site.name}: {site.left_out}" for site in self._sites.values()]
            reasons += [f"others are at work on {len(self._busy)}"] if self._busy else []
            told = "; ".join(reasons) or "there is none with a CPU"
            raise FailureError(f"no host could be measured ({told}); look at `ray status`")
        self._reference = min(found, key=self._seconds)
        for host in self.hosts():
            link = f"{8e-6 * host.bandwidth:,.0f} Mbit/s, {1e3 * host.latency:.1f} ms"
            self._tell(f"host {host.name}: speed {host.speed:.2f}, {self._cpus(host.name)} threads, {link}")
        return make_model(self._program, self._reference)

    # ------------------------------------------------------------------------------------------------------- Sites

    def hosts(self) -> Sequence[Host]:
        """See Sites."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        self._take()
        self._connect()
        now = time.monotonic()
        resting = {node for node, when in self._group.failed.items() if now - when < RETRY_SECONDS}
        return [
            self._host(site, site.profile)
            for node, site in self._sites.items()
            if site.profile and not self._connecting(site) and node in self._usable - resting
        ]

    def at(self) -> Mapping[str, str]:
        """See Sites."""
        return {worker: self._sites[node].name for worker, node in self._group.nodes().items() if node in self._sites}

    def send(self, workers: Mapping[str, str]) -> None:
        """See Sites."""
        nodes = {site.name: Pin(node=node, cpus=site.cpus) for node, site in self._sites.items()}
        self._group.pin({worker: nodes[host] for worker, host in workers.items()})

    # --------------------------------------------------------------------------------------------------- measuring

    def _host(self, site: _Site, profile: HostProfile) -> Host:
        """The planner's host: named as its node, with the memory that Ray has for it."""
        host = host_of(profile)
        speed = self._seconds(self._reference or profile) / self._seconds(profile)
        spare = profile.memory - host.memory
        bandwidth, latency = site.link or (host.bandwidth, host.latency)
        return Host(
            name=site.name,
            speed=speed,
            memory=max(min(host.memory, site.memory - spare), 0),
            bandwidth=bandwidth,
            latency=latency,
        )

    def _seconds(self, profile: HostProfile) -> float:
        """A micro-batch through the whole model."""
        return max(profile.unit_seconds([block.kind for block in self._program.blocks]) + profile.loss, 1e-9)

    def _cpus(self, name: str) -> int:
        return next(site.cpus for site in self._sites.values() if site.name == name)

    @staticmethod
    def _waiting(site: _Site) -> bool:
        return site.profile is None and not site.left_out

    @staticmethod
    def _connecting(site: _Site) -> bool:
        return site.taking is not None and site.link is None and time.monotonic() - site.since < LINK_SECONDS

    def _look(self) -> None:
        """Hear which nodes there are, and have new ones measure themselves."""
        self._looked = time.monotonic()
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._usable = set(nodes).difference(draining_nodes())
        fresh = {node: about for node, about in nodes.items() if node not in self._sites}
        free = _free_cpus() if fresh else {}
        for node, about in sorted(fresh.items(), key=lambda one: (_name(one[1]), one[0])):
            cpus = int(about["Resources"].get("CPU", 0.0))
            if cpus < 1 or (node in free and free[node] < cpus):
                if cpus and node not in self._busy:
                    self._busy.add(node)
                    self._tell(f"host {_name(about)} waits: others have {cpus - free[node]:g} of its {cpus} CPUs")
                continue
            names = {site.name for site in self._sites.values()}
            name = _name(about) if _name(about) not in names else f"{_name(about)}-{node[:6]}"
            task, *samples = _on(node, measured, 1 + len(SIZES)).remote(
                self._programs, self._executor, cpus, self._folder
            )
            self._sites[node] = _Site(
                node=node, name=name, cpus=cpus, memory=_memory(about), task=task, samples=samples
            )

    def _connect(self) -> None:
        """Have nodes that have measured themselves measure their links, each to the next one."""
        able = [site for site in self._sites.values() if site.profile and site.node in self._usable]
        for giver, site in zip([*able[1:], *able[:1]], able, strict=True):
            if site.taking is None and giver is not site:
                site.taking, site.since = _on(site.node, linked).remote(giver.samples), time.monotonic()

    def _take(self) -> None:
        """Take in what nodes have found out about themselves."""
        for site in self._sites.values():
            if self._waiting(site) and ray.wait([site.task], timeout=0)[0]:
                try:
                    profile = ray.get(site.task)
                except (RayError, TrueweightError) as error:
                    self._leave_out(site, (str(error).strip().splitlines() or [type(error).__name__])[-1])
                    continue
                if profile.version == VERSION:
                    site.profile = profile
                else:
                    self._leave_out(site, f"expected Trueweight {VERSION} as here, got {profile.version}")
            if self._connecting(site) and ray.wait([site.taking], timeout=0)[0]:
                with suppress(RayError):  # the giver is gone: what the profile says will do
                    site.link = fit_link(ray.get(site.taking))
                site.since = float("-inf")

    def _leave_out(self, site: _Site, reason: str) -> None:
        site.left_out = reason
        self._tell(f"host {site.name} is left out: {reason}")


def _on(node: str, function: Callable[..., Any], returns: int = 1) -> Any:
    """A task pinned to a node, beside whatever runs there."""
    where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(function).options(num_cpus=0, num_returns=returns, scheduling_strategy=where, max_retries=0)


def measured(programs: bytes, executor: str, threads: int, folder: str) -> tuple[Any, ...]:
    """This host's profile, kept or measured now, and arrays for others to take."""
    from runtime.executors import named

    program = TrainingProgram.decode(programs)
    here = Path(folder).expanduser()
    profile = cached(program, named(executor), executor=executor, threads=threads, folder=here)
    return profile, *(np.zeros(size, np.uint8) for size in SIZES)


def linked(samples: Sequence[Any]) -> list[tuple[int, float]]:
    """(bytes, seconds) that taking references' arrays took this node, one after the other, but for the first."""
    taken = []
    for sample in samples:
        began = time.monotonic()
        size = ray.get(sample, timeout=LINK_SECONDS).nbytes
        taken.append((size, time.monotonic() - began))
    return taken[1:]


def _name(node: Mapping[str, Any]) -> str:
    """What people call the node: what `trueweight cluster up` labelled it, else its host's name."""
    return str(node["Labels"].get("trueweight.host") or node["NodeManagerHostname"])


def _memory(node: Mapping[str, Any]) -> int:
    """Bytes that Ray has for workers and values."""
    resources = node["Resources"]
    return int(resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0))


def _free_cpus() -> dict[str, float]:
    """CPUs that nobody has, by node."""
    from ray._private.state import available_resources_per_node

    with suppress(AttributeError):
        return {node: found.get("CPU", 0.0) for node, found in available_resources_per_node().items()}
    return {}
