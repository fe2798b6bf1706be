"""Whether cheating pays under a run's terms, and what the terms cost whom. Exact fractions; docs/ledger-economics.md.

A cheat is worth its saving to the operator. It is found where a segment is drawn and one honest verifier replays what
is false; whistleblowers would come on top and are left out. The bond is lost once, and all segments after the rejected
one are dropped, so to cheat in many segments at once is no better than in one.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb

from ledger import rules
from ledger.port import Run
from storage.errors import UsageError

RATE = 1 << 32
"""A rate of this would be always."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is believed of those who take part; the defaults are the worst for the submitter, but for `honest`.

    `honest`: share of the verifiers' seats whose holders do their work. `coverage`: share of a segment's units that
    each replays. `colludes`: the operator is also the harmed workers and the whistleblower, so of its bond it loses
    only what is burnt. `recommits`: it does a rejected segment again, honestly, and is paid for it after all.
    """

    honest: Fraction = Fraction(1)
    coverage: Fraction = Fraction(1)
    colludes: bool = True
    recommits: bool = True

    def __post_init__(self) -> None:
        for name in ("honest", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}; change it")


WORST = Assumptions()


def detection(run: Run, units: int, false: int, assumptions: Assumptions = WORST) -> Fraction:
    """The probability that `false` of a segment's `units` are found: drawn, and one of the verifiers honest and lucky.

    Each verifier replays a random `coverage` of the units, rounded up, and misses all false ones with
    C(units - false, replayed) / C(units, replayed).
    """
    if not 0 <= false <= units or units < 1:
        raise UsageError(f"false units: expected 0 to {units}, got {false}; give a part of the segment")
    replayed = -(-assumptions.coverage * units // 1)
    found = 1 - Fraction(comb(units - false, int(replayed)), comb(units, int(replayed)))
    missed = (1 - assumptions.honest * found) ** run.verifiers
    return Fraction(run.rate, RATE) * (1 - missed)


def detection_in_run(run: Run, units: int, share: Fraction, assumptions: Assumptions = WORST) -> Fraction:
    """The probability that something is found where this share, rounded up, of every segment's units is false."""
    false = int(-(-share * units // 1))
    return 1 - (1 - detection(run, units, false, assumptions)) ** run.segments


def segment_detection(run: Run, assumptions: Assumptions = WORST) -> Fraction:
    """The probability that a segment of which nothing is true is found out.

    That is the case to judge: the saving grows in proportion to what is false, the chance to be found more slowly.
    """
    return detection(run, 1, 1, assumptions)


def bond_lost(run: Run, assumptions: Assumptions = WORST) -> Fraction:
    """S: of the operator's bond, what a rejected segment costs the operator."""
    burnt = 100 - run.reporter_share - run.harmed_share
    return run.operator_bond * Fraction(burnt if assumptions.colludes else 100, 100)


def pay_withheld(run: Run, assumptions: Assumptions = WORST) -> int:
    """R: the pay for a segment, which its workers and the operator never get where it is not committed again."""
    return 0 if assumptions.recommits else run.work * run.price + run.operator_fee


def break_even(run: Run, assumptions: Assumptions = WORST) -> Fraction:
    """p (S + R): a cheat in one segment that saves more than this pays."""
    return segment_detection(run, assumptions) * (bond_lost(run, assumptions) + pay_withheld(run, assumptions))


def judge(run: Run, gain: int, assumptions: Assumptions = WORST) -> Fraction:
    """How many times over a cheat that saves `gain` in a segment is paid for; UsageError where it pays.

    The error names the smallest bond and the smallest rate, each with everything else as it is, that would do.
    """
    limit = break_even(run, assumptions)
    if limit >= gain:
        return limit / gain if gain else Fraction(0)
    told = f"operator_bond {run.operator_bond}, rate {run.rate}: expected a cheat that saves {gain} to cost that"
    remedy = _remedy(run, gain, assumptions)
    raise UsageError(f"{told}, got {float(limit):.6g} (found with {_percent(run, assumptions)}); {remedy}")


def _percent(run: Run, assumptions: Assumptions) -> str:
    return f"{float(segment_detection(run, assumptions)):.4%}"


def _remedy(run: Run, gain: int, assumptions: Assumptions) -> str:
    ways = []
    bond = smallest_bond(run, gain, assumptions)
    rate = smallest_rate(run, gain, assumptions)
    if bond is not None:
        ways.append(f"operator_bond {bond}")
    if rate is not None:
        ways.append(f"rate {rate}")
    if ways:
        return f"take at least {' or '.join(ways)}"
    return "take verifiers and a rate above 0, and shares that leave something to burn"


def smallest_bond(run: Run, gain: int, assumptions: Assumptions = WORST) -> int | None:
    """The smallest operator's bond with which a cheat that saves `gain` does not pay; None where no bond would do."""
    found = segment_detection(run, assumptions)
    kept = Fraction(100 - run.reporter_share - run.harmed_share if assumptions.colludes else 100, 100)
    if not found or not kept:
        return None
    bond = max(-(-(gain / found - pay_withheld(run, assumptions)) / kept // 1), 0)
    return int(bond) if bond < 1 << 96 else None


def smallest_rate(run: Run, gain: int, assumptions: Assumptions = WORST) -> int | None:
    """The smallest rate with which a cheat that saves `gain` does not pay; None where none below always would do."""
    per_rate = break_even(replace(run, rate=1), assumptions)
    rate = -(-gain // per_rate) if per_rate else RATE
    return int(rate) if rate < RATE else None


# --------------------------------------------------------------------------------------------------- what it costs whom


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a submitter pays for a run at most, and the verifiers' fees that are to be expected of it."""

    workers: int
    operator: int
    verifiers: int
    pot: int
    expected_verifiers: Fraction

    @property
    def total(self) -> int:
        """What `open` takes."""
        return self.workers + self.operator + self.verifiers + self.pot


def cost(run: Run) -> Cost:
    """What `open` takes, by receiver; what is not spent comes back with `close`."""
    fees = run.segments * run.verifiers * run.verifier_fee
    found = Cost(
        workers=run.segments * run.work * run.price,
        operator=run.segments * run.operator_fee,
        verifiers=fees,
        pot=run.pot,
        expected_verifiers=fees * Fraction(run.rate, RATE),
    )
    if found.total != rules.escrow(run) + run.pot:
        raise AssertionError("the parts of the escrow do not add up to it")
    return found


@dataclass(frozen=True, kw_only=True)
class Verifying:
    """What an assigned verifier gets for one segment, on average, for each thing that it can do."""

    honest: Fraction
    silent: Fraction
    blind: Fraction


def verifying(run: Run, replay: int) -> Verifying:
    """Pay of one that replays for `replay`, of one that says nothing, and of one that says ok without looking.

    The blind one cannot know the witness and has no fee, and loses its bond where the segment is a forced error. The
    honest one has the fee, or its share of a jackpot with the other assigned ones, all honest, and the operator.
    """
    due = Fraction(run.forced_rate, RATE)
    shared = run.jackpot >> run.verifiers
    return Verifying(
        honest=(1 - due) * run.verifier_fee + due * shared - replay,
        silent=-Fraction(run.verifier_bond * run.miss_penalty // 100),
        blind=-due * run.verifier_bond,
    )


def whistleblowing(run: Run, replay: int, others: int = 1) -> Fraction:
    """What a whistleblower gets on average for replaying one segment, where `others` not assigned flag it too.

    One other is the operator: it knows its forced errors and can flag them under another name. The segment may be a
    forced error; where it is also drawn the assigned ones flag it too, and each flag halves all shares. No cheat is
    expected, the pot is taken to last, and a right flag's bond comes back.
    """
    drawn, due = Fraction(run.rate if run.verifiers else 0, RATE), Fraction(run.forced_rate, RATE)
    alone, together = run.jackpot >> others, run.jackpot >> (others + run.verifiers)
    return due * ((1 - drawn) * alone + drawn * together) - replay


def whistleblowers_rate(run: Run, replay: int) -> int | None:
    """The smallest forced rate with which whistleblowers beside the operator do not lose; None where none would do."""
    per_rate = whistleblowing(replace(run, forced_rate=1), 0)
    rate = -(-replay // per_rate) if per_rate else RATE
    return int(rate) if rate < RATE else None
