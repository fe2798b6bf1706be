// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";
import {Segments} from "./Segments.sol";

/// @notice Demands for data: whoever commits to a state has to be able to show any leaf of it.
abstract contract Demands is Segments {
    uint256 private constant MAX_DEMANDS = 16; // open at once on one segment

    /// @inheritdoc ILedger
    function demand(Run calldata run, Segment calldata segment, Tree tree, uint64 index, Leaf calldata entry)
        external
        payable
        nonReentrant
    {
        _arrive(run.token);
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        (bytes32 root, uint64 count) = _treeOf(r, s, tree, entry);
        bytes32 id = _demandId(name, root, index, count);
        Demand storage entered = _demands[id];
        if (entered.account != address(0)) revert Already();
        _before(_start(r, s, state) + r.window);
        if (index >= count) revert BadProof();
        if (state.demands >= MAX_DEMANDS) revert Full();
        ++state.demands;
        entered.account = msg.sender;
        entered.until = uint48(block.timestamp + r.answer);
        emit Demanded(name, id, msg.sender, tree, root, index, count);
        _take(r.token, r.flagBond);
    }

    /// @inheritdoc ILedger
    function answer(
        Run calldata run,
        Segment calldata segment,
        bytes32 root,
        uint64 index,
        uint64 count,
        bytes calldata data,
        bytes32[] calldata proof
    ) external nonReentrant {
        (Run memory r,, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        bytes32 id = _demandId(name, root, index, count);
        if (_demands[id].account == address(0)) revert Unknown();
        _before(_demands[id].until);
        if (!_proofs.includes(root, data, index, count, proof)) revert BadProof();
        delete _demands[id];
        --state.demands;
        _credit(r.token, r.operator, r.flagBond);
        emit Answered(name, id, data);
    }

    /// @inheritdoc ILedger
    function withheld(Run calldata run, Segment calldata segment, bytes32 root, uint64 index, uint64 count)
        external
        nonReentrant
    {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _find(run, segment);
        bytes32 id = _demandId(name, root, index, count);
        Demand memory entered = _demands[id];
        if (entered.account == address(0)) revert Unknown();
        uint256 amount = r.flagBond;
        if (_outcome(s, state) == Outcome.Pending) {
            _from(entered.until);
            amount += _reject(r, s, name, state, uint256(state.flags) + 1);
        }
        delete _demands[id];
        --state.demands;
        _credit(r.token, entered.account, amount);
        emit Refunded(name, id, entered.account, amount);
    }

    /// @dev Root and number of leaves of the tree that is asked for.
    function _treeOf(Run memory r, Segment memory s, Tree tree, Leaf calldata entry)
        private
        view
        returns (bytes32 root, uint64 count)
    {
        if (tree == Tree.State) return (s.poststate, r.tensors);
        if (tree == Tree.Steps) return (s.stepsRoot, s.steps);
        return _proofs.tensor(s.poststate, r.tensors, entry);
    }

    function _demandId(bytes32 segment, bytes32 root, uint64 index, uint64 count) private pure returns (bytes32) {
        return keccak256(abi.encode(segment, root, index, count));
    }
}
