"""`trueweight payout`: what work is paid, computed from receipts."""

import dataclasses
from typing import Annotated, Any

import typer

from ledger.payouts import Work, explain
from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage.codec import decode
from storage.records import Receipt
from trueweight import reports
from trueweight.console import print_json, say
from trueweight.ledger_options import Place, RunName, with_options

app = typer.Typer(help="What work is paid.", no_args_is_help=True, rich_markup_mode=None)


@app.command("explain")
@with_options
def explain_command(
    name: RunName,
    worker: Annotated[str, typer.Option(metavar="KEY", help="The worker's address.")],
    segment: Annotated[int | None, typer.Option(help="One segment; all without.")] = None,
    price: Annotated[int, typer.Option(help="Of a unit of work, where no ledger is asked.")] = 0,
    *,
    at: Place,
) -> int:
    """Compute a worker's amounts from its receipts.

    With --price nothing but the store is read; else the price is the one of the terms on the ledger.

    \b
    trueweight payout explain quickstart --worker 0x115a...c428
    trueweight payout explain quickstart --worker 0x115a...c428 --segment 0 --price 1000000000000
    """
    objects = at.open_store()
    history = History.open(objects, name)
    if not price:
        with at.settlement(name) as (made, _):
            price = made.terms.price
    program = TrainingProgram.decode(objects.get(history.run.programs))
    rows: list[dict[str, Any]] = []
    for record in history.segments():
        if segment not in (None, record.index):
            continue
        receipts = [decode(Receipt, item) for item in history.items(record.receipts_object)]
        work = Work(
            run=history.run_digest,
            first_step=record.first_step,
            steps=record.steps,
            micro_batches=program.micro_batches,
            blocks=len(program.blocks),
        )
        found = explain(receipts, work, price, worker.lower())
        rows += [{"segment": record.index, **dataclasses.asdict(row)} for row in found.rows]
    total = sum(row["amount"] for row in rows)
    if at.as_json:
        return print_json({"run": name, "worker": worker.lower(), "price": price, "amount": total, "rows": rows})
    columns = ("segment", "step", "worker", "stage", "units", "blocks", "work", "amount")
    say(at.console, reports.table(rows, {name: name for name in columns}))
    say(at.console, f"{sum(row['work'] for row in rows)} units of work x {price} = {total}")
    return 0
