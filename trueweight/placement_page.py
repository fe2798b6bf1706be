"""A plan as one HTML file with a drawing: hosts down, blocks across, dark for work and light for waiting."""

from collections.abc import Mapping
from html import escape
from typing import Any

COLOURS = ("#2a6f97", "#c1666b", "#588157", "#b08968", "#7b5ea7", "#d4a017")
LEFT, ROW, BLOCKS = 220, 26, 560


def page(told: Mapping[str, Any]) -> str:
    """The page for a placement report (`placement_cli.placement_report`); it loads nothing from elsewhere."""
    rows = [(host, stage) for stage in told["stages"] for host in stage["hosts"]]
    lines = [_bar(number, host, stage, told) for number, (host, stage) in enumerate(rows)]
    for number, one in enumerate(told["excluded"], len(rows)):
        lines.append(_text(8, number, f"{one['host']}"))
        lines.append(_text(LEFT, number, f"{one['role']}: {one['reason']}"))
    height = ROW * (len(rows) + len(told["excluded"])) + 12
    heading = escape(f"Plan for {told['recipe']}: {told['step_seconds']:.3g} s a step, {told['idle']:.0%} idle")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{heading}</title>'
        f'<body style="font:14px sans-serif"><h1 style="font-size:18px">{heading}</h1>'
        f"<p>Tightest: {escape(told['tightest'])}. Blocks 0 to {told['blocks'] - 1} from left to right.</p>"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + BLOCKS + 260}" height="{height}" role="img">'
        f"{''.join(lines)}</svg></body></html>\n"
    )


def _bar(number: int, host: Mapping[str, Any], stage: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    each = BLOCKS / told["blocks"]
    x, width = LEFT + each * stage["first_block"], each * (stage["last_block"] - stage["first_block"] + 1)
    busy = width * (1 - host["idle"])
    colour = COLOURS[stage["stage"] % len(COLOURS)]
    y = ROW * number + 6
    share = f"s{stage['stage']}: {host['units']} micro-batches, {host['idle']:.0%} idle"
    return (
        _text(8, number, host["host"])
        + f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}" fill-opacity=".25"/>'
        + f'<rect x="{x:.1f}" y="{y}" width="{busy:.1f}" height="{ROW - 6}" fill="{colour}"/>'
        + _text(LEFT + BLOCKS + 10, number, share)
    )


def _text(x: float, row: int, text: str) -> str:
    return f'<text x="{x:.1f}" y="{ROW * row + 20}">{escape(text)}</text>'
