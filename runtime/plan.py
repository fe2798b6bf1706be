"""Where the work goes: stages as ranges of blocks, replicas of each stage, micro-batches over replicas.

A plan is placement and nothing else. No choice made here can change a bit of the result (docs/arithmetic.md).
"""

from collections.abc import Sequence

from storage.codec import U32, record
from storage.errors import UsageError


@record(kind=100)
class Plan:
    """`bounds[s] .. bounds[s + 1]` are the blocks of stage s; `units[m]` is the replica that takes micro-batch m."""

    bounds: tuple[U32, ...]
    replicas: U32
    units: tuple[U32, ...]

    @property
    def stages(self) -> tuple[range, ...]:
        """The blocks of each stage, in order."""
        return tuple(range(first, stop) for first, stop in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker's id, stage by stage."""
        return tuple(self.worker(s, r) for s in range(len(self.stages)) for r in range(self.replicas))

    @property
    def shape(self) -> str:
        """`2x3` for two stages of three replicas each: for people."""
        return f"{len(self.stages)}x{self.replicas}"

    def worker(self, stage: int, replica: int) -> str:
        """The id of one worker, `s{stage}r{replica}`."""
        return f"s{stage}r{replica}"

    def place(self, worker: str) -> tuple[int, int]:
        """The (stage, replica) of a worker's id; the inverse of `worker`."""
        stage, replica = worker[1:].split("r")
        return int(stage), int(replica)


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
        replicas=replicas,
        units=_spread(micro_batches, shares),
    )


def _spread(micro_batches: int, shares: Sequence[int]) -> tuple[int, ...]:
    """The replica of each micro-batch: always the one furthest below its share, the lowest where several are."""
    given = [0] * len(shares)
    units = []
    for done in range(1, micro_batches + 1):
        behind = [share * done - count * sum(shares) for share, count in zip(shares, given, strict=True)]
        replica = behind.index(max(behind))
        given[replica] += 1
        units.append(replica)
    return tuple(units)
