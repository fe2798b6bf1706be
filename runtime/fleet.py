"""Hosts that are not there: they come and go on a virtual clock, with a speed, a link and an end that is drawn."""

import math
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import heappop, heappush

from storage.errors import FailureError

NEVER = math.inf


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What the machines are like. Ranges are drawn from log-uniformly; a host that leaves is replaced by another.

    `leave_per_hour` is the share of hosts that leave within an hour, `noticed` the share of those that say so `notice`
    seconds before; the next one comes `away` seconds after on average. `spells_per_hour` times an hour, on average, a
    host computes `slowness` times slower for `spell` seconds.
    """

    hosts: int
    seed: int = 1
    leave_per_hour: float = 0.3
    noticed: float = 0.5
    notice: float = 120.0
    away: float = 30.0
    speeds: tuple[float, float] = (0.5, 2.0)
    mbit: tuple[float, float] = (100.0, 1000.0)
    latency: tuple[float, float] = (0.005, 0.05)
    start: tuple[float, float] = (20.0, 60.0)
    controller_mbit: float = 10_000.0
    spells_per_hour: float = 0.0
    spell: float = 120.0
    slowness: float = 20.0


class VirtualClock:
    """Time that passes when somebody lets it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """See Clock."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        self.time += seconds

    def beside(self, act: Callable[[], None]) -> "Future[None]":
        """See Clock: the time that `act` lets pass is not everybody's."""
        began = self.time
        made = _Later(self)
        try:
            act()
        except FailureError as error:
            made.set_exception(error)
        else:
            made.set_result(None)
        made.at, self.time = self.time, began
        return made


class _Later(Future[None]):
    """A future that is done at a moment."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock, self.at = clock, NEVER

    def done(self) -> bool:
        return self.clock.time >= self.at


class Spells:
    """When a host is slower than it should be: moments that are drawn as they are needed, whatever else is."""

    def __init__(self, fleet: Fleet, number: int, born: float) -> None:
        self._rate = fleet.spells_per_hour / 3600
        self._length, self._slowness = fleet.spell, fleet.slowness
        self._draw = random.Random(f"{fleet.seed} {number}")  # noqa: S311 - a simulation
        self._next = born
        if self._rate:
            self._later(born)

    def _later(self, moment: float) -> None:
        self._next = moment + self._draw.expovariate(self._rate)

    def stretched(self, began: float, seconds: float) -> float:
        """Seconds that computing of so many takes; asked in the order in which it begins."""
        end = began
        while self._rate and self._next < end + seconds:
            quick = max(self._next - end, 0.0)
            stop = self._next + self._length
            slow = max(min((seconds - quick) * self._slowness, stop - (end + quick)), 0.0)
            seconds -= quick + slow / self._slowness
            end += quick + slow
            if end < stop and seconds <= 0:
                break
            self._later(stop)
        return end + seconds - began


@dataclass(kw_only=True, eq=False)
class Host:
    """A machine. `dies` is when it will go, `noticed` when it says so, `gone` when it was let go before."""

    number: int
    speed: float
    bandwidth: float
    latency: float
    start: float
    born: float
    dies: float
    noticed: float
    gone: float = NEVER
    spells: "Spells"
    incoming: float = 0.0
    """When the link has brought what it has been asked to so far."""

    def alive(self, first: float, last: float) -> float:
        """Seconds between two moments in which it was there."""
        return max(min(self.gone, self.dies, last) - max(self.born, first), 0.0)


class Machines:
    """The hosts of a fleet as time passes."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.hosts: list[Host] = []
        self.free: dict[int, Host] = {}
        self._draw = random.Random(fleet.seed)  # noqa: S311 - a simulation
        self._next: list[tuple[float, int, bool]] = []
        """(when, host, whether it comes) of what is to happen."""
        for _ in range(fleet.hosts):
            self._expect(0.0)
        self.until(0.0)

    def until(self, now: float) -> None:
        """Have happen what happens by then."""
        while self._next and self._next[0][0] <= now:
            when, number, comes = heappop(self._next)
            host = self.hosts[number]
            if comes:
                self.free[number] = host
                self.expect_end(host)
            elif host.gone == NEVER:
                self.leave(host, when)

    def leave(self, host: Host, when: float) -> None:
        """A host is gone from then on, and another will come for it."""
        host.gone = when
        self.free.pop(host.number, None)
        self._expect(when + self._draw.expovariate(1 / self.fleet.away))

    def expect_end(self, host: Host) -> None:
        """Have a host that has come leave when it is to die."""
        if host.dies < NEVER:
            heappush(self._next, (host.dies, host.number, False))

    def _expect(self, born: float) -> None:
        fleet, draw = self.fleet, self._draw

        def between(low: float, high: float) -> float:
            return float(low * (high / low) ** draw.random())

        rate = -math.log1p(-fleet.leave_per_hour) / 3600
        dies = born + draw.expovariate(rate) if rate else NEVER
        told = draw.random() < fleet.noticed
        host = Host(
            number=len(self.hosts),
            speed=between(*fleet.speeds),
            bandwidth=between(*fleet.mbit) * 1e6 / 8,
            latency=between(*fleet.latency),
            start=between(*fleet.start),
            born=born,
            dies=dies,
            noticed=max(dies - fleet.notice, born) if told else NEVER,
            spells=Spells(fleet, len(self.hosts), born),
        )
        self.hosts.append(host)
        heappush(self._next, (born, host.number, True))
