"""Chains that a command starts: clocks that are put forward, and chains that are taken up again."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.foreign import ANVIL
from ledger.web3_ledger import Node, Wallet, embedded_node, http_node
from trueweight.chains import anvil

pytestmark = pytest.mark.chain

HOUR = 3600


def passes(node: Node) -> int:
    """The clock's time, after it was put forward by steps of which many fall into one second of the host's."""
    for step in [*([1] * 30), HOUR, 1, 1, 2, HOUR, 1]:
        before = node.now()[1]
        node.wait(before + step)
        assert node.now()[1] == before + step
    return node.now()[1]


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
def test_anvils_clock_is_put_forward_to_the_second_and_never_goes_back(tmp_path: Path) -> None:
    """A chain that was stopped is hours before the host's clock, and goes on from there."""
    last = 0
    for _ in range(2):
        with anvil(tmp_path / "anvil.json") as url:
            node = http_node(url, Wallet.of([]), fast=True)
            assert node.now()[1] >= last
            node.wait(node.now()[1])  # a block, and no later
            assert node.now()[1] >= last
            last = passes(node)


@pytest.mark.skipif(ANVIL is None or sys.platform != "linux", reason="no anvil, or no Linux")
def test_an_anvil_does_not_outlive_a_command_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trueweight.chains import anvil\n"
        "with anvil(Path(sys.argv[1])) as url: print(url, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "anvil.json")], stdout=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        url = command.stdout.readline().decode().strip()
        assert http_node(url, Wallet.of([]), fast=True).now()[1] > 0
        command.kill()
    where = urlsplit(url)
    until = time.monotonic() + 30
    while listens(where.hostname or "", where.port or 0):
        assert time.monotonic() < until
        time.sleep(0.1)


def listens(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_embedded_clock_is_put_forward_to_the_second(tmp_path: Path) -> None:
    last = 0
    for _ in range(2):
        node, chain = embedded_node(str(tmp_path / "chain.jsonl"), Wallet.of([]))
        assert node.now()[1] >= last
        last = passes(node)
        chain.close()
