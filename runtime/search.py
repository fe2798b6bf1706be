"""The search for the best placement (`runtime.planner`): dynamic programming, and a heuristic where it takes too long.

Hosts that are alike (speed, memory, link) make a class, and a stage is a range of blocks on so many hosts of each.
Hosts sorted by speed need not be dealt in order (of 3, 2, 2, 1 the two stages that are alike take 3 + 1 and 2 + 2), so
the search goes over counts: dynamic programming from the first block to the last over (blocks placed, hosts of each
class used), which keeps every way there that another does not beat in all of what the rest depends on, and leaves out
those that cannot beat the best plan known. That is exact for the model of `runtime.costs`. Where it would take too long
it becomes a heuristic and says so (`Search.exact`): classes that are alike are merged, large ones dealt in bundles,
only the most promising ways are followed, and the best plans are improved by single hosts and blocks while that helps.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from runtime.costs import Groups, Host, Model, Span, stage_costs

STATES = 700
"""Combinations of used hosts up to which every host is dealt by itself."""
WORK = 3e7
"""Ways from each block, times blocks to go on to, times combinations of hosts: how many are looked at, about."""
GAIN = 1e-9
"""Relative gain below which a plan is not better, only rounded otherwise."""
TRIES, TRIED = 20_000, 300
"""Changes looked at to improve a plan, and so many together, of which the best is made."""
MERGED = 4
"""Classes that are told apart where there are too many; single hosts are told apart when the plan is improved."""
HARDER = 16
"""Times more of both where nothing was found that fits."""
MOST_DEALT = 600
"""Ways to deal the blocks and hosts of two stages, up to which all are tried to improve a plan."""
FEW, MARKS = 100, 12
"""Ways that are followed at the least, with stages only between so many evenly spaced blocks where that is too much."""

Vector = tuple[int, ...]
"""Hosts of each class."""


class Way(NamedTuple):
    """Stages up to some block: the groups of hosts that take them, by the block that each stops before."""

    stops: tuple[int, ...]
    groups: tuple[Vector, ...]

    @property
    def spans(self) -> list[tuple[int, int, Vector]]:
        """(first block, the one after the last, hosts) of each stage."""
        return list(zip((0, *self.stops), self.stops, self.groups, strict=False))


class _Costs(NamedTuple):
    """What one stage adds: `gap` is B t_s - l_s, the other seconds as in `StageCosts`, then its slowest link."""

    gap: float
    unit: float
    reduce: float
    update: float
    slow_link: float
    latency: float


class Search:
    """The search over one model and hosts, sorted by kind, that can each take some block."""

    def __init__(self, model: Model, hosts: Sequence[Host], stages: int | None) -> None:
        self._model, self._stages = model, stages
        kinds = [list(same) for _, same in itertools.groupby(hosts, key=lambda host: host.kind)]
        self._members = kinds
        self._classes = tuple(same[0] for same in kinds)
        self._counts = tuple(map(len, kinds))
        self._known: dict[tuple[int, int, Vector], _Costs | None] = {}
        self.exact = True

    def best(self) -> Way | None:
        """The best way found to place all blocks; None where there is none."""
        starts = [way for way in self._starts() if self.seconds(way) < math.inf]
        best = min((self._improved(way) for way in _few(starts, self.seconds)), key=self.seconds, default=None)
        found = [best] if best else []
        for effort in (1, HARDER):  # a second time where nothing fitted and not everything was looked at
            table = self._table(int(STATES * effort), WORK * effort, self.seconds(best) if best else math.inf)
            found += [way for way in map(self._unmerged, table.best()) if self.seconds(way) < math.inf]
            self.exact = table.exact
            if found or self.exact:
                break
        if not self.exact:
            found = [self._improved(way) for way in _few(found, self.seconds)]
        return min(found, key=self.seconds, default=None)

    def _table(self, states: int, work: float, known: float) -> "_Table":
        """The dynamic programming over all classes, or over a few merged ones where there are too many."""
        self._merged = [[c] for c in range(len(self._classes))]
        if 2 ** len(self._classes) > states:
            self._merged = merged(self._classes, MERGED)
            known = math.inf  # merged hosts count as worse than they are
        classes = tuple(worst_of([self._classes[c] for c in same]) for same in self._merged)
        counts = tuple(sum(self._counts[c] for c in same) for same in self._merged)
        table = _Table(self._model, classes, counts, states=states, work=work, stages=self._stages, known=known)
        table.exact &= len(classes) == len(self._classes)
        return table

    def _unmerged(self, way: Way) -> Way:
        """The way with hosts of their own classes for those of the merged ones, the best first."""
        rest = [[c for c in same for _ in range(self._counts[c])] for same in self._merged]
        groups = []
        for group in way.groups:
            taken = [rest[m].pop(0) for m, n in enumerate(group) for _ in range(n)]
            groups.append(_vector(taken, len(self._classes)))
        return Way(way.stops, tuple(groups))

    def deal(self, way: Way) -> list[tuple[Span, tuple[Host, ...]]]:
        """The stages with real hosts for the counts."""
        rest = [iter(same) for same in self._members]
        return [
            (self._model.span(first, stop), tuple(next(rest[c]) for c, n in enumerate(group) for _ in range(n)))
            for first, stop, group in way.spans
        ]

    def seconds(self, way: Way) -> float:
        """The predicted step, infinite where a host has not the memory."""
        spans = way.spans
        self._look_up(spans)
        parts = [self._known[span] for span in spans]
        costs = [part for part in parts if part is not None]
        if len(costs) < len(parts):
            return math.inf
        crossed = sum(
            crossing(self._model.blocks[first].input_bytes, a.slow_link, b.slow_link, a.latency, b.latency)
            for (first, _, _), a, b in zip(spans[1:], costs, costs[1:], strict=False)
        )
        columns = list(zip(*costs, strict=True))
        return float(max(columns[0]) + sum(columns[1]) + crossed + max(columns[2]) + max(columns[3]))

    def _look_up(self, spans: Iterable[tuple[int, int, Vector]]) -> None:
        """Compute what is not known yet, many groups at a time."""
        wanted: dict[tuple[int, int], list[Vector]] = {}
        for first, stop, group in dict.fromkeys(spans):
            if (first, stop, group) not in self._known:
                wanted.setdefault((first, stop), []).append(group)
        for (first, stop), rows in wanted.items():
            groups = Groups(self._classes, np.array(rows), self._model.micro_batches)
            made = stage_costs(self._model, self._model.span(first, stop), groups)
            columns = (made.busy - made.unit, made.unit, made.reduce, made.update, groups.slow_link, groups.latency)
            for row, fits, *values in zip(rows, made.fits, *columns, strict=True):
                self._known[first, stop, row] = _Costs(*map(float, values)) if fits else None

    # ------------------------------------------------------------------------------------------------ first guesses

    def _starts(self) -> Iterator[Way]:
        """Ways to begin with: all on one stage, even stages on mixed hosts, and the fewest large hosts in a row."""
        blocks, most = len(self._model.blocks), min(len(self._model.blocks), sum(self._counts))
        for count in [self._stages] if self._stages else range(1, min(most, 8) + 1):
            hosts = [c for c, n in enumerate(self._counts) for _ in range(n)]
            groups = [_vector(hosts[s::count], len(self._counts)) for s in range(count)]
            yield Way(self._even(count), tuple(groups))
        if not self._stages:
            by_memory = sorted(range(len(self._counts)), key=lambda c: -self._classes[c].memory)
            for order in (by_memory, by_memory[::-1]):
                way = self._row([c for c in order for _ in range(self._counts[c])], blocks)
                if way:
                    yield way

    def _even(self, count: int) -> tuple[int, ...]:
        """Stops of so many stages of about equal work."""
        work = np.cumsum([block.work for block in self._model.blocks])
        stops: list[int] = []
        for s in range(1, count):
            stop = int(np.searchsorted(work, work[-1] * s / count)) + 1
            stops.append(min(max(stop, (stops[-1] if stops else 0) + 1), len(work) - (count - s)))
        return (*stops, len(work))

    def _row(self, order: Sequence[int], blocks: int) -> Way | None:
        """One host a stage in this order of classes, each with as many blocks as it can take."""
        stops: list[int] = []
        groups: list[Vector] = []
        first = 0
        for c in order:
            group = _vector([c], len(self._counts))
            self._look_up((first, stop, group) for stop in range(first + 1, blocks + 1))
            fitting = [stop for stop in range(first + 1, blocks + 1) if self._known[first, stop, group] is not None]
            if fitting:
                first = max(fitting)
                stops.append(first)
                groups.append(group)
            if first == blocks:
                return Way(tuple(stops), tuple(groups))
        return None

    # -------------------------------------------------------------------------------------------------- improvement

    def _improved(self, way: Way) -> Way:
        """The way, changed as little as possible at a time as long as that makes it shorter."""
        left = TRIES // max(1, len(self._classes) // 4)  # each takes longer where there are many classes
        while left > 0:
            found = [*self._near(way), *self._dealt_again(way)]
            mixed = np.random.default_rng(0).permutation(len(found))
            for start in range(0, len(found), TRIED):
                some = [found[n] for n in mixed[start : start + TRIED]]
                left -= len(some)
                self._look_up(span for other in some for span in other.spans)
                best = min(some, key=self.seconds)
                if self.seconds(best) < self.seconds(way) * (1 - GAIN):
                    way = best
                    break
            else:
                return way
        return way

    def _near(self, way: Way) -> Iterator[Way]:
        """Ways with one bound moved, one host moved, two hosts exchanged, a stage split or joined to the next.

        Idle hosts take part.
        """
        stops, groups = way
        if self._stages is None:
            yield from self._split_or_joined(way)
        for s, stop in enumerate(stops[:-1]):
            for moved in (stop - 1, stop + 1):
                if (stops[s - 1] if s else 0) < moved < stops[s + 1]:
                    yield Way((*stops[:s], moved, *stops[s + 1 :]), groups)
        used = np.sum(groups, axis=0)
        places = [*groups, tuple(int(n) for n in np.array(self._counts) - used)]
        classes = range(len(self._counts))
        for a, b in itertools.permutations(range(len(places)), 2):
            for c in classes:
                if places[a][c] and (a == len(groups) or sum(places[a]) > 1):
                    yield Way(stops, self._with(places, {a: {c: -1}, b: {c: 1}}))
                for d in classes:
                    if a < b and c != d and places[a][c] and places[b][d]:
                        yield Way(stops, self._with(places, {a: {c: -1, d: 1}, b: {c: 1, d: -1}}))

    def _dealt_again(self, way: Way) -> Iterator[Way]:
        """Ways with the blocks and the hosts of two neighbours dealt anew, with one idle host of a class or without."""
        stops, groups = way
        idle = np.array(self._counts) - np.sum(groups, axis=0)
        for s in range(len(stops) - 1):
            both = [n + m + min(int(i), 1) for n, m, i in zip(groups[s], groups[s + 1], idle, strict=True)]
            first, stop = stops[s - 1] if s else 0, stops[s + 1]
            if math.prod(n + 1 for n in both) * (stop - first - 1) > MOST_DEALT:
                continue
            for one in itertools.product(*(range(n + 1) for n in both)):
                other = tuple(n - m for n, m in zip(both, one, strict=True))
                if any(one) and any(other):
                    for middle in range(first + 1, stop):
                        yield Way((*stops[:s], middle, *stops[s + 1 :]), (*groups[:s], one, other, *groups[s + 2 :]))

    def _split_or_joined(self, way: Way) -> Iterator[Way]:
        """Ways with one stage more, its hosts dealt to the halves by work, or one less."""
        stops, groups = way
        for s, (first, stop, group) in enumerate(way.spans):
            for middle in range(first + 1, stop) if sum(group) > 1 else ():
                share = self._model.span(first, middle).work / self._model.span(first, stop).work
                one = tuple(round(n * share) for n in group)
                other = tuple(n - m for n, m in zip(group, one, strict=True))
                if any(one) and any(other):
                    yield Way((*stops[:s], middle, *stops[s:]), (*groups[:s], one, other, *groups[s + 1 :]))
            if s + 1 < len(stops):
                both = tuple(n + m for n, m in zip(group, groups[s + 1], strict=True))
                yield Way((*stops[:s], *stops[s + 1 :]), (*groups[:s], both, *groups[s + 2 :]))

    @staticmethod
    def _with(places: Sequence[Vector], changes: dict[int, dict[int, int]]) -> tuple[Vector, ...]:
        """The groups after the changes; the last of the places are the idle hosts."""
        return tuple(
            tuple(n + changes.get(p, {}).get(c, 0) for c, n in enumerate(place)) for p, place in enumerate(places[:-1])
        )


def _few(starts: Sequence[Way], seconds: Callable[[Way], float]) -> list[Way]:
    """The most promising beginnings."""
    return sorted(starts, key=seconds)[:3]


def _vector(hosts: Sequence[int], classes: int) -> Vector:
    return tuple(hosts.count(c) for c in range(classes))


def crossing(size: int, slow: float, slow_too: float, latency: float, latency_too: float) -> float:
    """c_s: an activation of so many bytes one way and its gradient the other."""
    return 2 * (size * max(slow, slow_too) + max(latency, latency_too))


def merged(classes: Sequence[Host], most: int) -> list[list[int]]:
    """Numbers of classes, sorted by speed, in at most so many runs of those that are most alike."""

    def apart(a: Host, b: Host) -> float:
        pairs = ((a.speed, b.speed), (a.memory + 1, b.memory + 1), (a.bandwidth, b.bandwidth))
        return sum(abs(math.log(x / y)) for x, y in pairs)

    runs = [[c] for c in range(len(classes))]
    while len(runs) > most:
        spread_of = [apart(classes[a[0]], classes[b[-1]]) for a, b in itertools.pairwise(runs)]
        nearest = spread_of.index(min(spread_of))
        runs[nearest : nearest + 2] = [runs[nearest] + runs[nearest + 1]]
    return runs


def worst_of(hosts: Sequence[Host]) -> Host:
    """A host that is no better than any of these."""
    return Host(
        name=hosts[0].name,
        speed=min(host.speed for host in hosts),
        memory=min(host.memory for host in hosts),
        bandwidth=min(host.bandwidth for host in hosts),
        latency=max(host.latency for host in hosts),
    )


def bundle_sizes(counts: Sequence[int], states: int) -> tuple[int, ...]:
    """How many hosts of each class are dealt together, so that there are at most about `states` combinations.

    The class with the most bundles is the first to be dealt more coarsely.
    """
    sizes = [1] * len(counts)

    def bundles(c: int) -> int:
        return counts[c] // sizes[c]

    while math.prod(bundles(c) + 1 for c in range(len(counts))) > states:
        largest = max(range(len(counts)), key=bundles)
        if bundles(largest) <= 1:
            break
        sizes[largest] += 1
    return tuple(sizes)


class _Labels(NamedTuple):
    """Ways to a block, one a row: `key` is (stages x states + hosts used), `costs` [n, 6] what the rest depends on.

    Columns of `costs`: max (B t_s - l_s), sum l_s + c_s, max reduce, max update, slowest link and latency of the last
    stage's hosts. Less is better in each. `bound`: what the whole step takes at least; `parent` and `group` lead back.
    """

    key: np.ndarray
    costs: np.ndarray
    bound: np.ndarray
    parent: np.ndarray
    group: np.ndarray

    def take(self, rows: np.ndarray) -> "_Labels":
        """Some of the rows."""
        return _Labels(*(column[rows] for column in self))


class _Table:
    """The dynamic programming: forward over blocks, with the groups of hosts dealt in bundles of `grain`."""

    def __init__(
        self,
        model: Model,
        classes: tuple[Host, ...],
        counts: Vector,
        *,
        states: int,
        work: float,
        stages: int | None,
        known: float,
    ) -> None:
        grain = bundle_sizes(counts, states)
        self.exact = set(grain) <= {1}
        self._model, self._stages, self._fastest = model, stages, max(host.speed for host in classes)
        self._best = known
        self._found: dict[int, tuple[float, int, int]] = {}
        """By number of stages: seconds, the last label and the last group of the best plan that was seen."""
        bundles = [n // size for n, size in zip(counts, grain, strict=True)]
        self._bundles = np.array(list(itertools.product(*(range(n + 1) for n in bundles))))
        self._all = np.array(bundles)
        self._groups = Groups(classes, self._bundles * np.array(grain), self._model.micro_batches)
        speeds = np.array([host.speed for host in classes])
        self._speed = self._groups.counts @ speeds
        self._total = np.array(counts) @ speeds
        self._work = np.cumsum([0.0, *(block.work for block in self._model.blocks)])
        self._work[-1] += self._model.loss
        self._most = stages or min(len(self._model.blocks), int(self._all.sum()))
        self._stops = np.arange(len(self._model.blocks) + 1)
        if len(self._bundles) * len(self._stops) ** 2 * FEW > work:
            self._stops = even_stops(self._work, MARKS)
            self.exact &= len(self._stops) == len(self._work)
        self._beam = max(FEW, int(work / (len(self._stops) ** 2 * len(self._bundles))))
        self._parents: list[np.ndarray] = []
        self._given: list[np.ndarray] = []
        self._at: list[int] = []
        self._starts: list[int] = []
        self._made = 0

    def best(self) -> list[Way]:
        """The best way for each number of stages of those looked at; the best of all is among them or known."""
        start = _Labels(np.array([0]), np.zeros((1, 6)), np.zeros(1), np.array([-1]), np.array([0]))
        waiting: dict[int, list[_Labels]] = {int(stop): [] for stop in self._stops} | {0: [start]}
        for first in map(int, self._stops[:-1]):
            if not waiting[first]:
                continue
            labels = self._kept(_joined(waiting.pop(first)))
            stops = self._stops[self._stops > first]
            costs = self._costs(first, stops)
            for row, number in enumerate(self._number(labels, first)):
                self._extend(first, stops, labels.take(np.array([row])), int(number), costs, waiting)
        return [self._back(number, group) for _, number, group in self._found.values()]

    def _kept(self, labels: _Labels) -> _Labels:
        """Those that could beat the best plan, that no other beats, and of these the most promising."""
        labels = labels.take(np.flatnonzero(labels.bound < self._best * (1 - GAIN)))
        kept = undominated(labels.key, labels.costs, labels.bound, self._beam + 1)
        if len(kept) > self._beam:
            self.exact = False
        return labels.take(kept[: self._beam])

    def _number(self, labels: _Labels, first: int) -> np.ndarray:
        """Numbers under which the labels can be found on the way back."""
        count = len(labels.key)
        self._parents.append(labels.parent)
        self._given.append(labels.group)
        self._at.append(first)
        self._starts.append(self._made)
        self._made += count
        return np.arange(self._made - count, self._made)

    @cached_property
    def _links(self) -> tuple[np.ndarray, np.ndarray]:
        return self._groups.slow_link, self._groups.latency

    def _costs(self, first: int, stops: np.ndarray) -> tuple[np.ndarray, ...]:
        """(gap, unit, reduce, update) of each span from `first` on every group, [stops, groups]; infinite gaps."""
        made = [stage_costs(self._model, self._model.span(first, int(stop)), self._groups) for stop in stops]
        fits, busy, unit, reduce, update = (np.array(column) for column in zip(*made, strict=True))
        return np.where(fits, busy - np.where(fits, unit, 0), np.inf), unit, reduce, update

    def _extend(
        self,
        first: int,
        stops: np.ndarray,
        label: _Labels,
        number: int,
        costs: tuple[np.ndarray, ...],
        waiting: dict[int, list[_Labels]],
    ) -> None:
        """Every next stage after one label: whole plans are compared with the best, others wait at their block."""
        states = len(self._bundles)
        stages, used = divmod(int(label.key[0]), states)
        gap, total, reduce, update, slow, latency = label.costs[0]
        rest = self._all - self._bundles[used]
        groups = np.flatnonzero((self._bundles <= rest).all(axis=1))[1:]  # the first is nobody
        if not len(groups):
            return
        crossing = np.zeros(len(groups))
        if first:
            size = self._model.blocks[first].input_bytes
            slowest, longest = (np.maximum(a[groups], b) for a, b in zip(self._links, (slow, latency), strict=True))
            crossing = 2 * (size * slowest + longest)
        gaps = np.maximum(costs[0][:, groups], gap)
        totals = total + costs[1][:, groups] + crossing
        reduces, updates = np.maximum(costs[2][:, groups], reduce), np.maximum(costs[3][:, groups], update)
        sums = totals + reduces + updates
        if self._stages is None or stages + 1 == self._stages:
            whole = gaps[-1] + sums[-1]
            least = int(np.argmin(whole))
            depth = len(self._chain(number))
            if whole[least] < min(self._found.get(depth, (math.inf,))[0], math.inf) * (1 - GAIN):
                self._found[depth] = float(whole[least]), number, int(groups[least])
                self._best = min(self._best, float(whole[least]))
        if stages + 1 == self._most:
            return
        bounds = self._bounds(stops[:-1], used, groups, gaps[:-1], sums[:-1])
        ahead, group = np.nonzero(bounds < self._best * (1 - GAIN))
        keys = (stages + 1) * states * (self._stages is not None) + used + groups[group]
        columns = (gaps, totals, reduces, updates)
        made = np.stack([column[ahead, group] for column in columns] + [a[groups[group]] for a in self._links], axis=1)
        new = _Labels(keys, made, bounds[ahead, group], np.full(len(keys), number), groups[group])
        for stop in np.unique(ahead):
            waiting[int(stops[stop])].append(new.take(np.flatnonzero(ahead == stop)))

    def _bounds(
        self, stops: np.ndarray, used: int, groups: np.ndarray, gaps: np.ndarray, sums: np.ndarray
    ) -> np.ndarray:
        """What a step takes at least: the rest in no time but its work on all hosts that are left."""
        left = self._total - self._speed[used] - self._speed[groups]
        work = (self._work[-1] - self._work[stops])[:, None]
        with np.errstate(divide="ignore"):
            busy = np.where(left > 1e-12 * self._total, self._model.micro_batches * work / left, np.inf)
        unit = work / self._fastest
        return np.asarray(sums + np.maximum(gaps + unit, busy))

    def _chain(self, number: int) -> list[tuple[int, int]]:
        """(block, group before it) from a label back to the beginning."""
        found = []
        while number >= 0:
            layer = bisect.bisect_right(self._starts, number) - 1
            row = number - self._starts[layer]
            found.append((self._at[layer], int(self._given[layer][row])))
            number = int(self._parents[layer][row])
        return found

    def _back(self, number: int, group: int) -> Way:
        """The way to a label and one stage further, to the last block."""
        found = [(len(self._model.blocks), group), *self._chain(number)[:-1]][::-1]
        groups = tuple(tuple(map(int, self._groups.counts[row])) for _, row in found)
        return Way(tuple(stop for stop, _ in found), groups)


def even_stops(work: np.ndarray, count: int) -> np.ndarray:
    """About so many of the places between blocks, `work` [blocks + 1] apart as evenly as they go, ends included."""
    wanted = np.linspace(0, work[-1], count + 1)
    nearest = np.abs(work[None, :] - wanted[:, None]).argmin(axis=1)
    return np.unique([0, 1, *nearest, len(work) - 2, len(work) - 1])


def _joined(parts: Sequence[_Labels]) -> _Labels:
    return _Labels(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def undominated(keys: np.ndarray, costs: np.ndarray, bounds: np.ndarray, most: int) -> np.ndarray:
    """The first `most` rows [n], by bound, that no other row of their key equals or beats in every column of `costs`.

    A row that beats another of its key must not have the larger bound.
    """
    kept: list[int] = []
    fronts: dict[int, np.ndarray] = {}
    for row in np.lexsort((*costs.T[::-1], bounds)):
        key, cost = int(keys[row]), costs[row]
        front = fronts.get(key)
        if front is None:
            fronts[key] = cost[None]
        elif (front <= cost).all(axis=1).any():
            continue
        else:
            fronts[key] = np.vstack([front, cost])
        kept.append(int(row))
        if len(kept) == most:
            break
    return np.array(kept, np.int64)
