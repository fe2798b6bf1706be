"""A run on the compiled contracts that has begun."""

import pytest

from ledger.testing import World


@pytest.fixture
def begun() -> World:
    return World().begin()
