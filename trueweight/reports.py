"""What commands say about runs and audits: JSON values for programs, tables for people."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from runtime.segments import History, run_names
from storage.codec import decode
from storage.errors import FailureError
from storage.records import Receipt, SegmentRecord, StepRecord
from storage.store import Store
from trueweight.auditing import Audited, Selection, forged_of
from trueweight.journal import mean_loss, validation_accuracy, validation_loss
from verification.audit import AuditReport, Diverged, Inconclusive, Match, Verdict
from verification.sampling import miss_probability
from verification.units import UnitAudit

VERDICTS: dict[type, tuple[str, int]] = {
    Match: ("match", 0),
    Diverged: ("diverged", 1),
    Inconclusive: ("inconclusive", 2),
}
"""Each verdict's name and exit code."""


def run_summary(store: Store, name: str) -> dict[str, Any]:
    """One line of `trueweight runs`; a run whose objects are damaged is listed as such."""
    try:
        history = History.open(store, name)
        position = history.position()
    except FailureError as error:
        return {"run": name, "status": "damaged", "steps": None, "segments": None, "state": None, "error": str(error)}
    return {
        "run": name,
        "status": history.head.status,
        "steps": position.next_step,
        "segments": position.index,
        "state": position.poststate.hex(),
    }


def all_runs(store: Store) -> list[dict[str, Any]]:
    """The summaries of every run of the store."""
    return [run_summary(store, name) for name in run_names(store)]


def run_report(history: History) -> dict[str, Any]:
    """All that `trueweight show` knows: roots, segments, losses, and what each worker signed for."""
    run, position = history.run, history.position()
    segments = history.segments()
    return {
        "run": history.name,
        "status": history.head.status,
        "run_digest": history.run_digest.hex(),
        "version": run.version,
        "engine": run.engine,
        "recipe": run.recipe.hex(),
        "data": run.data.hex(),
        "program": run.program_root.hex(),
        "initial_state": run.initial_state.hex(),
        "state": position.poststate.hex(),
        "steps": position.next_step,
        "segments": [_segment_report(history, segment) for segment in segments],
        "workers": _work(history, segments, position.receipts),
        "losses": [_losses(record) for record in history.steps()],
    }


def _segment_report(history: History, segment: SegmentRecord) -> dict[str, Any]:
    steps = [decode(StepRecord, item) for item in history.items(segment.steps_object)]
    return {
        "index": segment.index,
        "first_step": segment.first_step,
        "steps": segment.steps,
        "prestate": segment.prestate.hex(),
        "poststate": segment.poststate.hex(),
        "steps_root": segment.steps_root.hex(),
        "receipts_root": segment.receipts_root.hex(),
        "first_loss": mean_loss(steps[0]),
        "last_loss": mean_loss(steps[-1]),
        "events": [event for record in steps for event in record.events],
    }


def _losses(record: StepRecord) -> dict[str, Any]:
    loss, accuracy = validation_loss(record), validation_accuracy(record)
    known = {} if loss is None else {"validation_loss": loss, "validation_accuracy": accuracy}
    return {"step": record.step, "loss": mean_loss(record), **known}


def _work(history: History, segments: list[SegmentRecord], open_receipts: tuple[bytes, ...]) -> list[dict[str, Any]]:
    """Steps and units by worker and address, from the receipts."""
    items = [item for segment in segments for item in history.items(segment.receipts_object)]
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for item in (*items, *open_receipts):
        receipt = decode(Receipt, item)
        units[receipt.worker, receipt.address.hex()].append(len(receipt.units))
    return [
        {"worker": worker, "address": f"0x{address}", "steps": len(counts), "units": sum(counts)}
        for (worker, address), counts in sorted(units.items())
    ]


def verdict_name(verdict: Verdict) -> str:
    """`match`, `diverged` or `inconclusive`."""
    return VERDICTS[type(verdict)][0]


def verdict_report(verdict: Verdict) -> dict[str, str]:
    """The verdict as JSON values: its name and what it carries."""
    match verdict:
        case Diverged(path=path, expected=expected, actual=actual):
            return {"verdict": "diverged", "path": path, "expected": expected, "actual": actual}
        case Inconclusive(reason=reason):
            return {"verdict": "inconclusive", "reason": reason}
    return {"verdict": "match"}


SHARES = (0.01, 0.05, 0.1, 0.2)
"""Of forged work, for which the probability of a miss is told."""


def audited_report(audited: Audited) -> dict[str, Any]:
    """An audit that was made as JSON values: verdicts, the sample, what it cost, and what it may have missed."""
    selection = audited.selection
    told = audit_report(audited.report, seed=selection.seed if selection else None)
    if not audited.whole or audited.units:
        told["missed"] = []  # what was drawn and not replayed leaves it open
    told["segments"] += [_unit_row(unit) for unit in audited.units]
    return {
        **told,
        "units_replayed": sum(unit.units for unit in audited.units),
        "steps_replayed": audited.replayed,
        "steps": audited.steps,
        "seconds": audited.seconds,
        "fetched_bytes": audited.fetched,
        "peak_bytes": audited.peak,
        "sample": _sample_report(audited, selection) if selection else None,
    }


def _unit_row(unit: UnitAudit) -> dict[str, Any]:
    return {
        "index": unit.index,
        "first_step": unit.first_step,
        "worker": unit.worker,
        "address": unit.address,
        "units_replayed": unit.units,
        "seconds": unit.seconds,
        "prestate": unit.prestate,
        "poststate": unit.poststate,
        **verdict_report(unit.verdict),
    }


def _sample_report(audited: Audited, selection: Selection) -> dict[str, Any]:
    known = selection.candidates if audited.whole else 0
    return {
        "of": "units" if selection.of_units else "segments",
        "strategy": selection.strategy or None,
        "beacon": selection.beacon.hex() or None,
        "beacon_from": selection.source or None,
        "rate": selection.rate,
        "count": len(selection.pieces),
        "candidates": selection.candidates,
        "pieces": [
            f"{piece.segment}:{piece.worker}" if piece.worker else str(piece.segment) for piece in selection.pieces
        ],
        "cost": audited.replayed / audited.steps if audited.steps else None,
        "missed": [
            {"share": share, "forged": forged_of(share, known), "probability": selection.miss(share)}
            for share in (SHARES if known else ())
        ],
    }


def audit_report(report: AuditReport, *, seed: int | None) -> dict[str, Any]:
    """The verdicts as JSON values, with the chance that as many segments, drawn evenly, miss forged ones."""
    replayed = len(report.segments)
    forged = sorted({1, max(report.total // 10, 1)}) if report.total else []
    return {
        "run": report.run,
        "run_digest": report.run_digest,
        **verdict_report(report.verdict),
        "replayed": replayed,
        "total": report.total,
        "planned": report.planned,
        "seed": seed,
        "missed": [
            {"forged_segments": count, "probability": miss_probability(report.total, replayed, count)}
            for count in forged
        ],
        "segments": [
            {
                "index": segment.index,
                "first_step": segment.first_step,
                "steps_replayed": segment.steps,
                "prestate": segment.prestate,
                "poststate": segment.poststate,
                "receipts": segment.receipts,
                **verdict_report(segment.verdict),
            }
            for segment in report.segments
        ],
    }


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Lines of aligned columns (key to heading), never cut; roots are shown by their first 16 digits."""
    cells = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    numeric = [bool(rows) and isinstance(rows[0].get(key), int | float) for key in columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def curve(values: Sequence[float], width: int = 60) -> str:
    """The values as a line of blocks, lowest to highest, between the first and the last; means where they are many."""
    if not values:
        return "-"
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if part]
    low, high = min(means), max(means)
    blocks = "".join("▁▂▃▄▅▆▇█"[int(7.999 * (mean - low) / (high - low))] if high > low else "▄" for mean in means)
    return f"{values[0]:.4f} {blocks} {values[-1]:.4f}"


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    text = str(value)
    return text[:16] if len(text) == 64 else text
