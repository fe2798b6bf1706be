// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";
import {Records} from "./Records.sol";
import {Rfc6962} from "./Rfc6962.sol";
import {SumTree} from "./SumTree.sol";

/// @notice What the ledger has to work out and that takes no storage: terms, and proofs in trees. A contract of its own,
/// which the ledger makes for itself, only because no contract may be larger than 24,576 bytes; anybody may ask it.
contract Proofs {
    uint8 private constant MAX_VERIFIERS = 8; // of one segment

    /// @notice What a run costs without its pot. Reverts BadTerms where the terms cannot be kept.
    function escrowOf(ILedger.Run calldata run, uint64 unbonding) external pure returns (uint128) {
        if (run.segments == 0) revert ILedger.BadTerms("segments");
        if (run.work == 0) revert ILedger.BadTerms("work");
        if (run.verifiers > MAX_VERIFIERS) revert ILedger.BadTerms("verifiers");
        if (uint256(run.reporterShare) + run.harmedShare > 100) revert ILedger.BadTerms("shares");
        if (run.missPenalty > 100) revert ILedger.BadTerms("missPenalty");
        if (run.window < 2) revert ILedger.BadTerms("window");
        if (run.answer == 0) revert ILedger.BadTerms("answer"); // else anybody rejects a segment, for one flagBond
        if (run.dispute == 0) revert ILedger.BadTerms("dispute");
        if (run.flagBond == 0) revert ILedger.BadTerms("flagBond"); // else demands cost nothing
        if (run.window + 2 * uint256(run.answer) + run.dispute > unbonding) revert ILedger.BadTerms("unbonding");
        if (run.submitter == address(0)) revert ILedger.BadTerms("submitter");
        if (run.operator == address(0)) revert ILedger.BadTerms("operator");
        if (run.court == address(0)) revert ILedger.BadTerms("court");
        if (run.beacon == address(0)) revert ILedger.BadTerms("beacon");
        if (run.jackpot > run.pot) revert ILedger.BadTerms("jackpot");
        if (run.verifiers > 0 && run.rate == 0) revert ILedger.BadTerms("rate");
        uint256 each = uint256(run.work) * run.price + run.operatorFee + uint256(run.verifiers) * run.verifierFee;
        uint256 escrow = run.segments * each; // below 2^193
        if (escrow > type(uint128).max) revert ILedger.BadTerms("escrow");
        return uint128(escrow);
    }

    /// @notice Whether `data` is leaf `index` of `count` of the tree of RFC 6962 under `root`.
    function includes(bytes32 root, bytes calldata data, uint64 index, uint64 count, bytes32[] calldata proof)
        external
        pure
        returns (bool)
    {
        return Rfc6962.includes(root, Rfc6962.leafHash(data), index, count, proof);
    }

    /// @notice Root and number of leaves of a tensor of the state under `state`, which has `count` tensors. Reverts BadProof
    /// where its entry is not there, BadRecord where it is none.
    function tensor(bytes32 state, uint64 count, ILedger.Leaf calldata entry)
        external
        pure
        returns (bytes32 root, uint64 leaves)
    {
        bytes32 hash = Rfc6962.leafHash(entry.data);
        if (entry.count != count) revert ILedger.BadProof();
        if (!Rfc6962.includes(state, hash, entry.index, count, entry.proof)) revert ILedger.BadProof();
        return Records.tensor(entry.data);
    }

    /// @notice Whether (leaf, key, amount) is in the payout tree of this root and sum, which has `count` leaves.
    function pays(
        bytes32 root,
        uint128 total,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) external pure returns (bool) {
        return SumTree.includes(root, total, SumTree.leafHash(leaf, key, amount), amount, leaf, count, proof, sums);
    }
}
