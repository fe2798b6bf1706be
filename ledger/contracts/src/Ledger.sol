// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Book} from "./Book.sol";
import {Demands} from "./Demands.sol";
import {Payouts} from "./Payouts.sol";
import {Vault} from "./Vault.sol";
import {Verdicts} from "./Verdicts.sol";

/// @notice The ledger as it is deployed. Read ILedger.sol first; every part of it is a small contract:
///
///     Vault      balances, the cap, the two doors
///     Keys       hot keys
///     Book       what is remembered, and how it is found again
///     Runs       open, accept, begin, cancel, close
///     Bonds      join, resign, release
///     Segments   commit, draw, unseal, forfeit, finalise, resolve
///     Verdicts   seal, reveal, settle
///     Demands    demand, answer, withheld
///     Payouts    claim, compensate
contract Ledger is Verdicts, Demands, Payouts {
    /// @param cap_ The most that the ledger holds of any one token.
    /// @param unbonding Seconds between leaving and having the bond back; terms must fit into it.
    constructor(uint256 cap_, uint64 unbonding) Vault(cap_) Book(unbonding) {}
}
