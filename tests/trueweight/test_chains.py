"""Chains that a command starts: clocks that are put forward, and chains that are taken up again."""

from pathlib import Path

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


def test_the_embedded_clock_is_put_forward_to_the_second(tmp_path: Path) -> None:
    last = 0
    for _ in range(2):
        node, chain = embedded_node(str(tmp_path / "chain.jsonl"), Wallet.of([]))
        assert node.now()[1] >= last
        last = passes(node)
        chain.close()
