"""Error classes: exit codes, and digests that survive the way between processes."""

import pickle

import pytest

from storage.errors import Conflict, FailureError, IntegrityError, MissingObject, TrueweightError, UsageError


def test_exit_codes_say_who_must_act() -> None:
    assert UsageError("x").exit_code == 64
    for failure in (
        FailureError("x"),
        Conflict("x"),
        IntegrityError("x", digest="ab"),
        MissingObject("x", digest="ab"),
    ):
        assert failure.exit_code == 70
        assert isinstance(failure, FailureError)
        assert isinstance(failure, TrueweightError)


@pytest.mark.parametrize("kind", [IntegrityError, MissingObject])
def test_digest_survives_pickling(kind: type[IntegrityError] | type[MissingObject]) -> None:
    copy = pickle.loads(pickle.dumps(kind("object ab is gone", digest="ab")))
    assert (type(copy), str(copy), copy.digest) == (kind, "object ab is gone", "ab")
