"""`trueweight ledger resolve`, `demand`, `demands`, `answer`, `withheld`: disputes about a segment, and its data."""

from typing import Annotated, Any

import typer

from ledger.port import NATIVE, Outcome, Tree
from storage.errors import FailureError, UsageError
from trueweight.chains import address
from trueweight.demands import Demand, Wanted
from trueweight.ledger_options import Place, RunName, SegmentIndex, Sending, account_of, key_name, with_options
from trueweight.settlement import Committed, Settlement

COLUMNS = ("segment", "tree", "leaf", "of", "by", "until")
OneSegment = Annotated[int | None, typer.Option(help="Only this segment's; all without.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (resolve, demand, demands, answer, withheld):
        app.command(command.__name__)(with_options(command))


def resolve(
    name: RunName,
    segment: SegmentIndex,
    upheld: Annotated[bool, typer.Option("--upheld/--dismissed", help="Whether the flags are right.")],
    culprit: Annotated[str, typer.Option(metavar="KEY", help="The worker whose unit was false, if one was.")] = "",
    *,
    at: Sending,
) -> int:
    """Decide on a flagged segment, as the court that the terms name.

    Upheld: the segment is rejected, its operator's bond and the culprit's are slashed, and the segments after it are
    dropped. `trueweight pinpoint` finds the culprit, and a file of evidence shows it.

    \b
    trueweight ledger resolve quickstart --segment 3 --upheld --culprit 0x115a...c428
    """
    guilty = address(culprit, "--culprit") if culprit else NATIVE
    with at.settlement(name) as (made, _):
        found = _committed(made, segment)
        made.ledger.send(made.terms.court, "resolve", made.terms, found.segment, upheld, guilty)
    return at.answer({"segment": segment, "upheld": upheld})


def demand(
    name: RunName,
    segment: SegmentIndex,
    tree: Annotated[str, typer.Option(help="state (a leaf: a tensor's entry), steps (a step's record), or tensor.")],
    leaf: Annotated[int, typer.Option(help="The leaf's number; a tensor's leaf is 4 KiB.")] = 0,
    tensor: Annotated[str, typer.Option(metavar="NAME", help="Which tensor, for --tree tensor.")] = "",
    by: Annotated[str, typer.Option(metavar="ROLE", help="Whose key demands, and puts up a flag bond.")] = "verifier",
    *,
    at: Sending,
) -> int:
    """Demand a leaf of what a pending segment commits to, where it cannot be had otherwise.

    Anybody may, within the segment's window. The operator shows it in time and has the bond; else `trueweight ledger
    withheld` rejects the segment, and the bond comes back with the reporter's share of what is slashed.

    \b
    trueweight ledger demand quickstart --segment 3 --tree tensor --tensor weight/block001.up.weight --leaf 2
    trueweight ledger demand quickstart --segment 3 --tree steps --leaf 1 --by worker
    """
    trees = {each.name.lower(): each for each in Tree}
    if tree not in trees:
        raise UsageError(f"--tree {tree}: expected {', '.join(trees)}; correct it")
    with at.settlement(name, also=(key_name(by),)) as (made, chain):
        found = _committed(made, segment)
        wanted = Wanted.of(made.history, made.terms, found.record, trees[tree], leaf, tensor)
        made_one = made.demand(account_of(chain, by), found, wanted)
    return at.answer({**_row(made_one), "bond": made.terms.flag_bond})


def demands(name: RunName, *, at: Place) -> int:
    """List the demands for a run's data that wait for an answer.

    \b
    trueweight ledger demands quickstart
    """
    with at.settlement(name) as (made, _):
        rows = [_row(each) for each in made.demands()]
    return at.answer_rows({"run": name, "demands": rows}, "demands", COLUMNS)


def answer(name: RunName, segment: OneSegment = None, *, at: Sending) -> int:
    """Answer demands for a run's data with proofs from the store.

    The bonds of those who demanded are the operator's then, whoever answers. `trueweight settle` by the operator does
    it while it waits.

    \b
    trueweight ledger answer quickstart
    """
    with at.settlement(name) as (made, _):
        rows, missing = [], []
        for each in _pending(made, segment):
            try:
                made.answer(each)
            except FailureError as error:
                missing.append(str(error))
            else:
                rows.append(_row(each))
        if missing:
            raise FailureError(f"{len(rows)} answered, {len(missing)} not: {missing[0]}")
    return at.answer_rows({"run": name, "answered": rows}, "answered", COLUMNS)


def withheld(
    name: RunName,
    segment: OneSegment = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the time to answer is over.")] = False,
    *,
    at: Sending,
) -> int:
    """Reject segments whose operator did not show in time what was demanded.

    The bond goes back into the balance of who demanded, with the reporter's share of the operator's. Where the segment
    is rejected already only the bond goes back. Anybody may.

    \b
    trueweight ledger withheld quickstart
    trueweight ledger withheld quickstart --segment 3 --wait
    """
    with at.settlement(name) as (made, _):
        rows = []
        for each in made.demands():
            if segment not in (None, each.record.index):
                continue
            waits = Outcome(made.ledger.read("outcome_of", made.terms, each.segment)) == Outcome.PENDING
            if waits and wait:
                made.ledger.wait(each.until)
            if waits and made.ledger.now()[1] < each.until:
                at.tell(f"{each}: its operator may answer before {each.until}; --wait waits for it")
                continue
            made.withhold(each)
            rows.append(_row(each))
    return at.answer_rows({"run": name, "withheld": rows}, "withheld", COLUMNS)


def _pending(made: Settlement, segment: int | None) -> list[Demand]:
    return [
        each
        for each in made.demands()
        if segment in (None, each.record.index)
        and Outcome(made.ledger.read("outcome_of", made.terms, each.segment)) == Outcome.PENDING
    ]


def _committed(made: Settlement, index: int) -> Committed:
    found = [one for one in made.committed() if one.record.index == index]
    if not found:
        raise UsageError(
            f"--segment {index}: expected one below {made.state.committed}; see `trueweight ledger status`"
        )
    return found[0]


def _row(demand: Demand) -> dict[str, Any]:
    return {
        "segment": demand.record.index,
        "tree": demand.tree.name.lower(),
        "leaf": demand.index,
        "of": demand.count,
        "by": demand.account,
        "until": demand.until,
    }
