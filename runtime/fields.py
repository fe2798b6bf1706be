"""How a recipe table declares its keys: type, bounds, default and meaning in one place, checked where it is built."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from storage.errors import UsageError

NOUNS = {int: "integer", float: "number", bool: "true or false", str: "string"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What one key means and which values it takes; bounds apply to each item of a list."""

    meaning: str
    low: float | None = None  # inclusive
    high: float | None = None  # inclusive
    above: float | None = None  # exclusive
    below: float | None = None  # exclusive
    choices: tuple[object, ...] = ()


def about(
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[object, ...] = (),
) -> dict[str, Rule]:
    """Metadata for `dataclasses.field`: the rule of one key."""
    return {"rule": Rule(meaning=meaning, low=low, high=high, above=above, below=below, choices=choices)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A table of a recipe: frozen; each field is checked against its rule where it is built, then all together."""

    table: ClassVar[str] = ""

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for field in dataclasses.fields(self):
            rule: Rule = field.metadata["rule"]
            value = settled(getattr(self, field.name), types[field.name], rule)
            if value is None:
                expected = expectation(types[field.name], rule)
                raise self.refusal(
                    field.name, expected, getattr(self, field.name), f"change {field.name} ({rule.meaning})"
                )
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Nothing, or UsageError where values that are fine alone do not go together."""

    def _unused(self) -> Mapping[str, str]:
        """The keys that mean nothing beside the others, each with the reason."""
        return {}

    def as_json(self) -> dict[str, Any]:
        """The table as JSON values, without the keys that mean nothing here."""
        skip = self._unused()
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in skip}

    @classmethod
    def refusal(cls, key: str, expected: str, got: object, remedy: str) -> UsageError:
        """The error for one key: table and key, expected, got, remedy last."""
        return UsageError(f"{place(cls.table, key)}: expected {expected}, got {shown(got)}; {remedy}")

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Self:
        """The table built from parsed TOML. UsageError: unknown, missing, mistyped or meaningless keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in given:
            if key not in fields:
                raise UsageError(f"unknown key {key!r} in {heading(cls.table)}: {suggestion(key, fields)}")
        for name, field in fields.items():
            if name not in given and required(field):
                rule: Rule = field.metadata["rule"]
                expected = expectation(field_types(cls)[name], rule)
                raise UsageError(
                    f"{place(cls.table, name)}: expected {expected}, got nothing; "
                    f"add {name} = ... to {heading(cls.table)} ({rule.meaning})"
                )
        made = cls(**given)
        for key, reason in made._unused().items():
            if key in given:
                raise UsageError(
                    f"{place(cls.table, key)}: expected no such key {reason}, got {shown(given[key])}; remove it"
                )
        return made


def field_types(cls: type[Section]) -> Mapping[str, Any]:
    """Field name to resolved type."""
    return get_type_hints(cls)


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether the key has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def settled(value: object, kind: Any, rule: Rule) -> object | None:
    """The value in its one form (a float where a number is wanted, a tuple for a list), or None where it is refused."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return value if isinstance(value, kind) else None
    if get_origin(kind) is tuple:
        return settled_items(value, get_args(kind), rule)
    if get_origin(kind) is not None:
        return settled_json(value) if isinstance(value, Mapping) else None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = float(value) + 0.0  # the sum makes -0.0 into 0.0: one form for one meaning
        except OverflowError:
            return None
        return value if math.isfinite(value) and within(value, rule) else None
    if type(value) is not kind:
        return None
    return value if within(value, rule) else None


def settled_items(value: object, kinds: tuple[Any, ...], rule: Rule) -> tuple[object, ...] | None:
    """The items of a list that is not empty, each settled, or None where one is refused or the count is wrong."""
    if not isinstance(value, list | tuple) or not value:
        return None
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        return None
    items = tuple(settled(item, kind, rule) for item, kind in zip(value, kinds, strict=True))
    return None if None in items else items


def settled_json(value: object) -> object | None:
    """The value with tuples for lists, or None where it holds more than strings, finite numbers, lists, tables."""
    if isinstance(value, Mapping):
        pairs = {key: settled_json(item) for key, item in value.items()}
        return None if None in pairs.values() or not all(isinstance(key, str) for key in pairs) else pairs
    if isinstance(value, list | tuple):
        items = tuple(settled_json(item) for item in value)
        return None if None in items else items
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def within(value: Any, rule: Rule) -> bool:
    """Whether the value keeps the rule's choices and bounds."""
    if rule.choices:
        return value in rule.choices
    if isinstance(value, str | bool):
        return True
    return (
        (rule.low is None or value >= rule.low)
        and (rule.high is None or value <= rule.high)
        and (rule.above is None or value > rule.above)
        and (rule.below is None or value < rule.below)
    )


def expectation(kind: Any, rule: Rule) -> str:
    """What a key takes, in words: 'an integer of 1 or more', "one of 'bytes', 'bpe'"."""
    if rule.choices:
        return "one of " + ", ".join(repr(choice) for choice in rule.choices if choice != "")
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"a {kind.__name__}"
    low = "" if rule.low is None else f"of {bound(rule.low)} or more"
    if rule.low is not None and rule.high is not None:
        low = f"of {bound(rule.low)} to {bound(rule.high)}"
    above = "" if rule.above is None else f"above {bound(rule.above)}"
    below = "" if rule.below is None else f"below {bound(rule.below)}"
    high = "" if rule.high is None or rule.low is not None else f"at most {bound(rule.high)}"
    bounds = " and ".join(text for text in (low, above, high, below) if text)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        count = "one or more" if inner[-1] is Ellipsis else str(len(inner))
        words = f"a list of {count} {NOUNS[inner[0]]}s"
    elif get_origin(kind) is not None:
        words = "a table of strings, numbers, booleans and lists"
    else:
        article = {int: "an ", bool: ""}.get(kind, "a ")
        words = article + NOUNS[kind]
    return f"{words} {bounds}".rstrip()


def bound(value: float) -> str:
    """A bound as a message gives it."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def suggestion(key: str, known: Iterable[str]) -> str:
    """'did you mean 'steps'?', or the list of what is known when nothing is near."""
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"


def heading(table: str) -> str:
    """A table's name as a message gives it."""
    return f"[{table}]" if table else "the top of the recipe"


def place(table: str, key: str) -> str:
    """Where a key stands: '[training] batch'."""
    return f"[{table}] {key}" if table else key


def shown(value: object) -> str:
    """A value as TOML readers know it, cut to 80 characters."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: object) -> Any:
    """The value as JSON knows it: sections and mappings as dicts, tuples as lists."""
    if isinstance(value, Section):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
