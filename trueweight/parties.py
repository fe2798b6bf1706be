"""Who plays which part in a settlement here, with which keys, and the secrets that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from ledger.port import Account


@dataclass(frozen=True, kw_only=True)
class Parties:
    """Who plays which part here.

    `secrets` are of the keys that are here, by their address; `keys` are those of them that are a hot key, by account.
    """

    submitter: Account
    operator: Account
    court: Account
    verifiers: tuple[Account, ...]
    workers: tuple[Account, ...]
    secrets: Mapping[Account, bytes]
    keys: Mapping[Account, Account] = field(default_factory=dict)

    def secret(self, account: Account, *about: bytes) -> bytes:
        """32 bytes that only the holder of the account's key, or of its hot key, can make, the same every time."""
        return sha256(b"trueweight-secret-v1\0" + self.secrets[self.key(account)] + b"".join(about)).digest()

    def has(self, account: Account) -> bool:
        """Whether the account's own key is here."""
        return account in self.secrets

    def acts(self, account: Account) -> bool:
        """Whether the account's key or a hot key of its is here."""
        return self.has(account) or account in self.keys

    def key(self, account: Account) -> Account:
        """With which key here to act for an account: its own, else its hot key."""
        return account if self.has(account) else self.keys.get(account, account)
