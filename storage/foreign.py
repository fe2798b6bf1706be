"""JSON that may be anybody's."""

import json
import re
from typing import Any

DEEPEST = 100
"""Levels of nesting. Python's reader goes as deep as its limit on recursion, which libraries raise beyond the stack."""

_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(data: bytes | str) -> Any:
    """What the text says; ValueError where it is no JSON in UTF-8, or nested deeper than DEEPEST."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    depth = 0
    for part in _PARTS.finditer(text):
        first = part[0][0]
        if first != '"':
            depth += 1 if first in "[{" else -1
            if depth > DEEPEST:
                raise ValueError(f"JSON: expected at most {DEEPEST} levels, got more")
    return json.loads(text)
