"""What a new store is tested with: `conformance` has the suites, `faulty` the failing medium, both for anybody's use.

from storage.testing import OBJECT_CHECKS, STORE_CHECKS
for check in OBJECT_CHECKS: check(an_empty_object_store)
for check in STORE_CHECKS: check(Store(an_empty_object_store))
"""

from storage.testing.conformance import OBJECT_CHECKS, STORE_CHECKS
from storage.testing.faulty import Fault, FaultyObjects

__all__ = ["OBJECT_CHECKS", "STORE_CHECKS", "Fault", "FaultyObjects"]
