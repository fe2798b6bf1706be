import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.foreign import DEEPEST, parse_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_json_is_read_as_json(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("part", [b"[", b'{"a":', b'["[",', b'["\\"[",'])
def test_nesting_is_bounded_whatever_the_limit_on_recursion(part: bytes) -> None:
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(200_000)
        with pytest.raises(ValueError, match=f"at most {DEEPEST} levels"):
            parse_json(part * 100_000)
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("data", [b"\xff", b"[1", b"", b'"' + b"[" * 1000])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words
        parse_json(data)


def test_brackets_in_text_do_not_nest() -> None:
    assert parse_json(b'["' + b"[" * 1000 + b'"]') == ["[" * 1000]
