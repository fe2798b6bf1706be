"""Audit, replay and pinpoint: verdicts over committed runs, from Programs and data alone.

A verdict is a value, `match | diverged(path, expected, actual) | inconclusive(reason)`, and no failure of the
infrastructure ever becomes "diverged". The package sees the ledger's port and what of runtime needs no cluster;
model code is never imported here.
"""
