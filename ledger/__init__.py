"""Escrow, stakes, segment commitments, verdicts and payouts on a chain: the contracts and their Python side.

It sees storage and nothing else of the project. `port` is the seam: terms, segments, and the `Ledger` that back ends
implement; `model` is one in memory and the executable form of docs/ledger.md, `web3_ledger` the one behind a node, with
`embedded` for a chain in a file. Operators and verifiers find their part in `secrets` and `payouts`, whoever sets
terms in `economics`. web3 is imported in `web3_ledger` only.
"""
