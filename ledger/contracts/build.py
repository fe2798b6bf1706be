"""Builds ledger/artifacts from the contracts, byte for byte.

    npm ci --prefix ledger/contracts
    python ledger/contracts/build.py            writes them
    python ledger/contracts/build.py --check    fails where a byte differs

The compiler is npm's solc 0.8.37, in Node where there is one, else in V8 from PyPI (`pip install mini-racer`): the same
program, so the same bytes.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
ARTIFACTS = HERE.parent / "artifacts"
MODULES = HERE / "node_modules"
COMPILER = "0.8.37"

SETTINGS: dict[str, Any] = {
    "evmVersion": "cancun",
    "viaIR": True,
    "optimizer": {"enabled": True, "runs": 200},
    # No hash of the sources' metadata in the code: the artifacts list the sources' own hashes.
    "metadata": {"appendCBOR": False, "bytecodeHash": "none"},
    "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "storageLayout"]}},
}

CONTRACTS = {
    "src/ILedger.sol": ["ILedger"],
    "src/Ledger.sol": ["Ledger"],
    "src/Proofs.sol": ["Proofs"],
    "src/Beacon.sol": ["Beacon"],
    "src/testing/Mocks.sol": ["MockBeacon", "MockCourt"],
    "src/testing/Receivers.sol": ["Bomb", "Receiver"],
    "src/testing/Tokens.sol": ["FalseToken", "HookedToken", "MockToken", "SilentToken"],
}

LIMIT = 24_576
"""Bytes of a deployed contract (EIP-170)."""


def sources() -> dict[str, str]:
    """All sources by name: ours as src/..., OpenZeppelin's as they are imported."""
    found: dict[str, str] = {}
    wanted = list(CONTRACTS)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = (MODULES if name.startswith("@") else HERE).joinpath(name).read_text("utf-8")
        wanted += _imports(name, found[name])
    return dict(sorted(found.items()))


def _imports(name: str, text: str) -> Iterator[str]:
    for path in re.findall(r'^import [^;"]*"([^"]+)";', text, re.MULTILINE):
        parts: list[str] = []
        for part in (PurePosixPath(name).parent / path if path.startswith(".") else PurePosixPath(path)).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        yield "/".join(parts)


def compile_all(texts: dict[str, str]) -> dict[str, Any]:
    """The compiler's answer. Exits where it has errors."""
    question = {
        "language": "Solidity",
        "sources": {name: {"content": text} for name, text in texts.items()},
        "settings": SETTINGS,
    }
    package = json.loads((MODULES / "solc" / "package.json").read_text())
    if package["version"] != COMPILER:
        sys.exit(f"solc: expected {COMPILER}, got {package['version']}; run npm ci --prefix {HERE}")
    run = _in_node if shutil.which("node") else _in_v8
    answer: dict[str, Any] = json.loads(run(json.dumps(question)))
    errors = [error["formattedMessage"] for error in answer.get("errors", []) if error["severity"] == "error"]
    if errors:
        sys.exit("\n".join(errors))
    return answer


def _in_node(question: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        asked.write_text(question, "utf-8")
        # Through files: Node may exit before a long answer has left through a pipe.
        script = (
            "const [solc, asked, answered] = process.argv.slice(1); const fs = require('fs');"
            "fs.writeFileSync(answered, require(solc).compile(fs.readFileSync(asked, 'utf8')));"
        )
        subprocess.run(["node", "-e", script, str(MODULES / "solc"), str(asked), str(answered)], check=True)
        return answered.read_text("utf-8")


def _in_v8(question: str) -> str:
    from py_mini_racer import MiniRacer

    engine = MiniRacer()
    engine.eval("var Module = {}; " + (MODULES / "solc" / "soljson.js").read_text("utf-8"))
    engine.eval("var solidity = Module.cwrap('solidity_compile', 'string', ['string', 'number', 'number']);")
    answer = engine.eval(f"solidity({json.dumps(question)}, 0, 0)")
    assert isinstance(answer, str)
    return answer


def artifacts() -> dict[str, str]:
    """Every artifact's text by file name."""
    texts = sources()
    answer = compile_all(texts)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    made: dict[str, str] = {}
    for source, names in CONTRACTS.items():
        for name in names:
            contract = answer["contracts"][source][name]
            size = len(contract["evm"]["deployedBytecode"]["object"]) // 2
            if size > LIMIT:
                sys.exit(f"{name}: {size} bytes deployed, the limit is {LIMIT}")
            made[f"{name}.json"] = _artifact(contract, {key: hashes[key] for key in _closure(source, texts)})
    return made


def _closure(source: str, texts: dict[str, str]) -> list[str]:
    found: set[str] = set()
    wanted = [source]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            wanted += _imports(name, texts[name])
    return sorted(found)


def _artifact(contract: dict[str, Any], hashes: dict[str, str]) -> str:
    layout = contract.get("storageLayout", {}).get("storage", [])
    content = {
        "abi": contract["abi"],
        "bytecode": "0x" + contract["evm"]["bytecode"]["object"],
        "deployedBytecode": "0x" + contract["evm"]["deployedBytecode"]["object"],
        "compiler": {"version": COMPILER, "settings": {k: v for k, v in SETTINGS.items() if k != "outputSelection"}},
        "links": {},
        "sources": hashes,
        # Without the types' names, which hold numbers of the compiler's own.
        "storageLayout": [{key: row[key] for key in ("label", "offset", "slot")} for row in layout],
    }
    lines = [f"{json.dumps(key)}: {json.dumps(content[key], sort_keys=True)}" for key in sorted(content)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Write the artifacts, or compare them."""
    parser = argparse.ArgumentParser(description="Build ledger/artifacts from the contracts.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a byte differs")
    check = parser.parse_args().check
    made = artifacts()
    there = {path.name: path.read_text("utf-8") for path in ARTIFACTS.glob("*.json")}
    if check:
        differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
        if differing:
            sys.exit(f"ledger/artifacts: {', '.join(differing)} differ; run python ledger/contracts/build.py")
        return
    ARTIFACTS.mkdir(exist_ok=True)
    for name in there.keys() - made.keys():
        (ARTIFACTS / name).unlink()
    for name, text in made.items():
        (ARTIFACTS / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
