"""Error classes, split by who must act.

Messages say what failed, what was expected, what was found, and the remedy last.
"""


class TrueweightError(Exception):
    """Base of every error that Trueweight raises on purpose; `exit_code` is what a command leaves with."""

    exit_code = 70


class UsageError(TrueweightError):
    """The user must change something: an argument, a recipe, a path."""

    exit_code = 64


class FailureError(TrueweightError):
    """The environment failed: a disk, a network, a device, an object that is gone or damaged."""


class Conflict(FailureError):
    """A compare-and-swap found another value than the expected one: somebody else moved the reference."""


class MissingObject(FailureError):
    """The store has no object of this digest; `digest` is lower-case hex."""

    def __init__(self, message: str, *, digest: str) -> None:
        super().__init__(message)
        self.digest = digest

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), self.digest)


class IntegrityError(FailureError):
    """Bytes are not what their digest or their encoding promises; `digest` (lower-case hex) names the object."""

    def __init__(self, message: str, *, digest: str) -> None:
        super().__init__(message)
        self.digest = digest

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), self.digest)


def _rebuild(cls: type[MissingObject] | type[IntegrityError], message: str, digest: str) -> TrueweightError:
    """The error again, with its digest: keyword arguments are lost when an exception crosses processes otherwise."""
    return cls(message, digest=digest)
