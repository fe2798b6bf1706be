"""Where the work goes: stages as ranges of blocks, replicas of each stage, micro-batches over replicas.

A plan is placement and nothing else. No choice made here can change a bit of the result (docs/arithmetic.md).
"""

import re
from collections.abc import Sequence

from storage.codec import U32, record
from storage.errors import UsageError

_WORKER = re.compile(r"s(0|[1-9][0-9]{0,6})r(0|[1-9][0-9]{0,6})")


@record(kind=100, version=2)
class Plan:
    """`bounds[s] .. bounds[s + 1]` are the blocks of stage s, `replicas[s]` its replicas.

    `units[s][m]` is the replica of stage s that takes micro-batch m. While a run trains it is where shares start from;
    what a replica took in the end is in its receipts.
    """

    bounds: tuple[U32, ...]
    replicas: tuple[U32, ...]
    units: tuple[tuple[U32, ...], ...]

    @property
    def stages(self) -> tuple[range, ...]:
        """The blocks of each stage, in order."""
        return tuple(range(first, stop) for first, stop in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def micro_batches(self) -> range:
        """The micro-batches of a step."""
        return range(len(self.units[0]))

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker's id, stage by stage."""
        return tuple(worker for stage in range(len(self.replicas)) for worker in self.team(stage))

    @property
    def shape(self) -> str:
        """`2x3` for two stages of three replicas each, `3+1` for one of three and one of one: for people."""
        if len(set(self.replicas)) == 1:
            return f"{len(self.replicas)}x{self.replicas[0]}"
        return "+".join(map(str, self.replicas))

    def team(self, stage: int) -> tuple[str, ...]:
        """The ids of a stage's replicas."""
        return tuple(self.worker(stage, replica) for replica in range(self.replicas[stage]))

    def worker(self, stage: int, replica: int) -> str:
        """The id of one worker, `s{stage}r{replica}`."""
        return f"s{stage}r{replica}"

    @staticmethod
    def place(worker: str) -> tuple[int, int]:
        """The (stage, replica) of a worker's id; the inverse of `worker`. ValueError where it is none."""
        match = _WORKER.fullmatch(worker)
        if match is None:
            raise ValueError(f"worker {worker!r}: expected an id such as s0r0")
        return int(match[1]), int(match[2])

    def taken(self, worker: str) -> list[int]:
        """The micro-batches that `units` gives a worker."""
        stage, replica = self.place(worker)
        return [m for m, other in enumerate(self.units[stage]) if other == replica]

    def resized(self, replicas: Sequence[int]) -> "Plan":
        """The same stages with other numbers of replicas and even shares."""
        micro_batches = len(self.micro_batches)
        units = tuple(_spread(micro_batches, (1,) * count) for count in replicas)
        return Plan(bounds=self.bounds, replicas=tuple(replicas), units=units)


def make_plan(
    *, blocks: int, stages: int = 1, replicas: int = 1, micro_batches: int, shares: Sequence[int] | None = None
) -> Plan:
    """A plan with stages of equal block counts (to within one) and micro-batches spread by `shares` (even without).

    Raises UsageError where there are more stages than blocks, no replica, or shares that do not fit the replicas.
    """
    if not 1 <= stages <= blocks:
        raise UsageError(
            f"plan: expected 1 to {blocks} stages for the model's {blocks} blocks, got {stages}; set --stages"
        )
    if replicas < 1:
        raise UsageError(f"plan: expected at least 1 replica, got {replicas}; set --replicas")
    shares = tuple(shares) if shares else (1,) * replicas
    if len(shares) != replicas or min(shares) < 0 or not sum(shares):
        raise UsageError(
            f"plan: expected {replicas} shares, none negative and not all zero, got {','.join(map(str, shares))}; "
            f"give one share for each replica, as in --replicas 2 --shares 3,1"
        )
    return Plan(
        bounds=tuple(blocks * stage // stages for stage in range(stages + 1)),
        replicas=(replicas,) * stages,
        units=(_spread(micro_batches, shares),) * stages,
    )


def _spread(micro_batches: int, shares: Sequence[int]) -> tuple[int, ...]:
    """The replica of each micro-batch: always the one furthest below its share, the lowest where several are."""
    if len(set(shares)) == 1:
        return (tuple(range(len(shares))) * -(-micro_batches // len(shares)))[:micro_batches]
    given = [0] * len(shares)
    units = []
    for done in range(1, micro_batches + 1):
        behind = [share * done - count * sum(shares) for share, count in zip(shares, given, strict=True)]
        replica = behind.index(max(behind))
        given[replica] += 1
        units.append(replica)
    return tuple(units)
