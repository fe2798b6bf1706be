"""Escrow, stakes, segment commitments, disputes and payouts on a chain: the contracts and their Python side.

Nothing lives here yet. The package will hold the `Ledger` seam with its back ends (an in-memory model, an embedded
chain, any RPC URL), the Solidity sources and their compiled artifacts. It sees storage and nothing else of the project;
web3 is imported in `ledger.web3_ledger` only.
"""
