"""Bytes and nothing else: digests, Merkle trees, records, objects, checkpoints, worker identities.

Reads no clock and no configuration, and knows neither torch nor Ray. Start with `records` (what a run consists of),
then `merkle` and `codec` (how it is hashed and encoded), `objects` (where it lies) and `checkpoints` (how a state is
kept). The byte tables are in docs/formats.md.
"""

import os
from importlib.util import find_spec

if find_spec("sha3"):  # keccak in C: a ninth of the time of eth-hash's first choice
    os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")
