"""Who got what from a run and why, from the events of its ledger."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any

from ledger.port import Account, Event, Run

Told = tuple[Account, str, str, int]
"""(account, part, why, amount), below zero where it was lost."""


def earned(terms: Run, segments: Set[bytes], events: Iterable[Event]) -> list[dict[str, Any]]:
    """Rows of account, part, why, times and amount; `segments` are the names of all that the run ever had."""
    rows: dict[tuple[Account, str, str], list[int]] = defaultdict(list)
    for event in events:
        args = event.args
        if event.name in _WHY and (args["id"] == terms.id if "id" in args else args["segment"] in segments):
            account, part, why, amount = _WHY[event.name](terms, args)
            if amount:
                rows[account, part, why].append(amount)
    return [
        {"account": account, "part": part, "why": why, "times": len(amounts), "amount": sum(amounts)}
        for (account, part, why), amounts in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _settled(_: Run, args: Any) -> Told:
    return args["account"], "verifier", "verdicts" if args["amount"] > 0 else "bond lost", args["amount"]


_WHY: dict[str, Callable[[Run, Any], Told]] = {
    "Claimed": lambda _, args: (args["account"], "worker", "units of work", args["amount"]),
    "Compensated": lambda _, args: (args["account"], "worker", "work in rejected segments", args["amount"]),
    "Rejected": lambda terms, args: (terms.operator, "operator", "bonds slashed", -args["slashed"]),
    "Finalised": lambda terms, _: (terms.operator, "operator", "fees for final segments", terms.operator_fee),
    "Settled": _settled,
    "Answered": lambda terms, _: (terms.operator, "operator", "demands answered", terms.flag_bond),
    "Refunded": lambda terms, args: (args["account"], "demander", "data withheld", args["amount"] - terms.flag_bond),
    "Closed": lambda terms, args: (terms.submitter, "submitter", "escrow not used", args["refund"]),
}
