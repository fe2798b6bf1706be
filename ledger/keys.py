"""Keys of the parties: from the environment, an encrypted keystore, or a key file; never from the command line."""

import getpass
import json
import os
import sys
from pathlib import Path

from eth_account import Account as Accounts

from ledger.port import Account
from storage.errors import UsageError
from storage.files import file_failure, make_folder, write_whole
from storage.identity import load_or_create, new_secret

PASSWORD = "TRUEWEIGHT_PASSWORD"  # noqa: S105 - the variable's name


def variable(role: str) -> str:
    """The environment variable that may hold a role's key: 64 hexadecimal digits."""
    return f"TRUEWEIGHT_{role.upper().replace('-', '_')}_KEY"


def find_key(role: str, folder: Path, *, create: bool = False) -> bytes | None:
    """The secret of a role, 32 bytes: from its variable, else FOLDER/ROLE.json (a keystore), else FOLDER/ROLE.key.

    None where there is none and none is to be made. UsageError where what is there is no key.
    """
    given = os.environ.get(variable(role))
    if given is not None:
        try:
            secret = bytes.fromhex(given.removeprefix("0x"))
            Accounts.from_key(secret)
        except ValueError:
            raise UsageError(f"{variable(role)}: expected a key of 64 hexadecimal digits; correct it") from None
        return secret
    keystore, plain = folder / f"{role}.json", folder / f"{role}.key"
    if keystore.exists():
        return _decrypted(keystore)
    if not plain.exists() and not create:
        return None
    load_or_create(plain)  # checks its mode, and that it holds a key
    return bytes.fromhex(plain.read_text(encoding="ascii").strip())


def make_keystore(role: str, folder: Path) -> Account:
    """The address of a new key in FOLDER/ROLE.json, encrypted with a password from TRUEWEIGHT_PASSWORD or a prompt."""
    path = folder / f"{role}.json"
    if path.exists():
        raise UsageError(f"{path}: expected no such file yet; choose another role or folder")
    secret = new_secret()
    data = Accounts.encrypt(secret, _password(path, new=True))
    make_folder(folder)
    write_whole(path, json.dumps(data).encode() + b"\n", mode=0o600, exclusive=True)
    return str(Accounts.from_key(secret).address).lower()


def _decrypted(path: Path) -> bytes:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_failure("reading", path, error) from error
    except ValueError as error:
        raise UsageError(f"{path}: expected a keystore in JSON, got {error}; restore it from a copy") from error
    try:
        return bytes(Accounts.decrypt(data, _password(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: it does not open ({error}); set {PASSWORD} to its password") from error


def _password(path: Path, *, new: bool = False) -> str:
    given = os.environ.get(PASSWORD)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError(f"{path}: expected its password in {PASSWORD}, for there is no terminal to ask on; set it")
    typed = getpass.getpass(f"password for {path}: ")
    if new and getpass.getpass("once more: ") != typed:
        raise UsageError(f"{path}: expected the same password twice; nothing was written, try again")
    return typed
