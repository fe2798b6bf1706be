"""A chain in a file: py-evm in this process, and a log of what was done to it from which every command makes it again.

One line of JSON an entry: a raw transaction, which is a block of its own, blocks that were mined, or the clock put
forward. A lock on the file lets one process at a time go on with it. Nothing here is secret or worth anything.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from eth.vm.spoof import SpoofTransaction
from eth_tester import EthereumTester, PyEVMBackend
from eth_utils.address import to_canonical_address

from storage.errors import FailureError
from storage.files import file_failure, make_folder

GENESIS_TIME = 1_700_000_000
CHAIN_ID = 131277322940537
"""eth-tester's own."""
FAUCET_KEY = (1).to_bytes(32, "big")
FAUCET = "0x7e5f4552091a69125d5dfcb7b8c2659029395bdf"
"""Whom all coins belong to at first, eth-tester's own first account; the coins are worthless."""
COINS = 10**30
GAS_LIMIT = 30_000_000
NOBODY = "0x" + "00" * 20


class Reverted(Exception):
    """A call that a contract refused; `data` is what it said."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data.hex())
        self.data = data


class _Blocks(PyEVMBackend):  # type: ignore[misc]
    """py-evm whose blocks follow from their transactions: a second between two unless the clock is put forward, and
    randomness that is a hash of the parent's."""

    def mine_blocks(self, num_blocks: int = 1, coinbase: bytes = bytes(20)) -> tuple[bytes, ...]:
        made = []
        for _ in range(num_blocks):
            seed = sha256(self.chain.header.parent_hash).digest()
            block = self.chain.mine_block(coinbase=coinbase, mix_hash=seed, blob_gas_used=0)
            self.time_travel(block.header.timestamp + 1)
            made.append(block.hash)
        return tuple(made)

    def call(self, transaction: dict[str, Any], block_number: Any = "latest") -> bytes:  # noqa: ARG002
        return bytes(self._tried(transaction)[0].output)

    def estimate_gas(self, transaction: dict[str, Any], block_number: Any = "latest") -> int:  # noqa: ARG002
        computation, gas = self._tried(transaction)
        return int(gas - computation.get_gas_remaining())

    def _tried(self, transaction: dict[str, Any]) -> tuple[Any, int]:
        """What a transaction would do in the next block, and the gas it was tried with."""
        full = {"gas": GAS_LIMIT, **transaction}
        unsigned = self._get_normalized_and_unsigned_evm_transaction(full, "latest")
        state = self.chain.get_vm().state
        before = state.snapshot()
        computation = state.apply_transaction(SpoofTransaction(unsigned, from_=full["from"]))
        state.revert(before)
        if computation.is_error:
            raise Reverted(bytes(computation.output))
        return computation, full["gas"]

    def time_travel(self, to_timestamp: int) -> int:
        self.chain.header = self.chain.header.copy(timestamp=to_timestamp)
        return to_timestamp


class EmbeddedChain(EthereumTester):  # type: ignore[misc]
    """An eth-tester chain that writes down what changes it; `path` is its log, made where there is none."""

    def __init__(self, path: Path | str) -> None:
        parameters = PyEVMBackend.generate_genesis_params(overrides={"timestamp": GENESIS_TIME, "gas_limit": GAS_LIMIT})
        state = {to_canonical_address(FAUCET): {"balance": COINS, "nonce": 0, "code": b"", "storage": {}}}
        super().__init__(_Blocks(parameters, state), auto_mine_transactions=True)
        self.backend.time_travel(GENESIS_TIME + 1)
        self._log: IO[str] | None = None
        self._sending = False
        self._path = Path(path)
        make_folder(self._path.parent)
        try:
            log = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise file_failure("opening", self._path, error) from error
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.close()
            raise FailureError(f"{path}: another command works with this chain; wait for it to end") from None
        log.seek(0)
        self._replay(log.read().splitlines())
        self._log = log

    def _replay(self, lines: Sequence[str]) -> None:
        """Do again what the log says. A last line that was cut off never happened; any other damage is a failure."""
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if "raw" in entry:
                    super().send_raw_transaction(entry["raw"])
                elif "mine" in entry:
                    super().mine_blocks(entry["mine"])
                else:
                    super().time_travel(entry["travel"])
            except Exception as error:
                if number == len(lines) - 1 and isinstance(error, ValueError):
                    return
                raise FailureError(
                    f"{self._path}: line {number + 1} cannot be done again ({error}); the chain is lost: move that "
                    f"file away, and `trueweight ledger up` makes another"
                ) from error

    def _note(self, entry: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(json.dumps(entry, sort_keys=True) + "\n")
            self._log.flush()
            os.fsync(self._log.fileno())

    def send_raw_transaction(self, raw_transaction_hex: str) -> Any:
        """See EthereumTester; noted once it was taken."""
        self._sending = True
        try:
            sent = super().send_raw_transaction(raw_transaction_hex)
        finally:
            self._sending = False
        self._note({"raw": raw_transaction_hex})
        return sent

    def mine_blocks(self, num_blocks: int = 1, coinbase: str = NOBODY) -> Any:
        """See EthereumTester; noted."""
        mined = super().mine_blocks(num_blocks, coinbase)
        if not self._sending:  # a transaction's own block comes with it
            self._note({"mine": num_blocks})
        return mined

    def time_travel(self, to_timestamp: int) -> None:
        """See EthereumTester; noted."""
        super().time_travel(to_timestamp)
        self._note({"travel": to_timestamp})

    def close(self) -> None:
        """Let others have the chain."""
        if self._log is not None:
            self._log.close()
            self._log = None
