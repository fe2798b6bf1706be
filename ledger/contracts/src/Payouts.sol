// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";
import {Segments} from "./Segments.sol";

/// @notice What workers get: their part of a final segment's payout, or of what a rejected one's culprits lost.
abstract contract Payouts is Segments {
    /// @inheritdoc ILedger
    function claim(
        Run calldata run,
        Segment calldata segment,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _find(run, segment);
        _only(Outcome.Final, s, state);
        _spend(s, name, leaf, count, key, amount, proof, sums);
        address account = accountOf(key);
        _credit(r.token, account, amount);
        emit Claimed(name, leaf, key, account, amount);
    }

    /// @inheritdoc ILedger
    function compensate(
        Run calldata run,
        Segment calldata segment,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _find(run, segment);
        _only(Outcome.Rejected, s, state);
        address account = accountOf(key);
        if (state.culprit != address(0) && account == accountOf(state.culprit)) revert NotAllowed();
        _spend(s, name, leaf, count, key, amount, proof, sums);
        uint256 part = s.payout == 0 ? 0 : uint256(state.harm) * amount / s.payout;
        _credit(r.token, account, part);
        emit Compensated(name, leaf, key, account, part);
    }

    function _only(Outcome wanted, Segment memory s, SegmentState storage state) private view {
        Outcome outcome = _outcome(s, state);
        if (outcome == Outcome.Pending) revert StillOpen();
        if (outcome != wanted) revert NotAllowed();
    }

    /// @dev Marks a leaf as spent, once, if it is in the segment's payout tree.
    function _spend(
        Segment memory s,
        bytes32 name,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) private {
        uint256 word = _claimed[name][leaf >> 8];
        uint256 bit = 1 << (leaf & 0xff);
        if (word & bit != 0) revert Already();
        if (!_proofs.pays(s.payoutRoot, s.payout, leaf, count, key, amount, proof, sums)) revert BadProof();
        _claimed[name][leaf >> 8] = word | bit;
    }
}
