// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Book} from "./Book.sol";
import {IBeacon, ILedger} from "./ILedger.sol";

/// @notice A run from the money on the table to the money back.
abstract contract Runs is Book {
    /// @inheritdoc ILedger
    function open(Run calldata run, bytes calldata record) external payable nonReentrant returns (bytes32 id) {
        _arrive(run.token);
        if (msg.sender != run.submitter) revert NotAllowed();
        Run memory r;
        id = _load(r, run);
        uint128 escrow = _proofs.escrowOf(run, UNBONDING);
        if (sha256(record) != r.record) revert BadRecord("record");
        RunState storage state = _runs[id];
        if (state.status != Status.None) revert Already();
        state.status = Status.Open;
        state.escrow = escrow;
        state.pot = r.pot;
        emit Opened(id, run, record);
        _take(r.token, uint256(escrow) + r.pot);
    }

    /// @inheritdoc ILedger
    function accept(Run calldata run, bytes32 chain) external payable nonReentrant {
        _arrive(run.token);
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        if (state.status != Status.Open) revert WrongStatus(state.status);
        if (msg.sender != r.operator) revert NotAllowed();
        state.status = Status.Active;
        state.beaconBlock = uint48(block.number + DELAY);
        state.state = r.initialState;
        state.chain = chain;
        Bond storage bond = _bonds[id][Role.Operator][msg.sender];
        bond.exists = true;
        bond.amount = r.operatorBond;
        emit Accepted(id, chain, state.beaconBlock);
        _take(r.token, r.operatorBond);
    }

    /// @inheritdoc ILedger
    function begin(Run calldata run) external nonReentrant {
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        if (state.status != Status.Active) revert WrongStatus(state.status);
        if (state.begun) revert Already();
        bytes32 beacon = _beaconOf(r.beacon, state.beaconBlock);
        if (beacon == 0) {
            state.beaconBlock = uint48(block.number + DELAY);
            emit Rearmed(id, state.beaconBlock);
        } else {
            state.begun = true;
            state.beacon = beacon;
            emit Begun(id, beacon);
        }
    }

    /// @inheritdoc ILedger
    function cancel(Run calldata run) external nonReentrant {
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        Status status = state.status;
        if (status != Status.Open && status != Status.Active) revert WrongStatus(status);
        if (msg.sender != r.submitter) revert NotAllowed();
        emit Cancelled(id);
        if (status == Status.Open) {
            _close(r, id, state);
        } else {
            state.status = Status.Cancelled;
            state.last = uint48(block.timestamp);
        }
    }

    /// @inheritdoc ILedger
    /// @dev Fees of verifiers come out of the escrow, so there is a time to settle before the rest goes back.
    function close(Run calldata run) external nonReentrant {
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        Status status = state.status;
        bool done = status == Status.Active && state.finalised == r.segments;
        if (!done && status != Status.Cancelled) revert WrongStatus(status);
        if (state.committed > state.finalised) revert StillOpen();
        _from(uint256(state.last) + r.answer + r.dispute);
        _close(r, id, state);
    }

    /// @dev The beacon of a block, or 0 where it has been forgotten. Asked only once the block is past.
    function _beaconOf(address beacon, uint64 blockNumber) internal view returns (bytes32) {
        if (block.number <= blockNumber) revert TooEarly(blockNumber + 1);
        return IBeacon(beacon).beaconOf(blockNumber);
    }

    function _close(Run memory r, bytes32 id, RunState storage state) private {
        uint256 refund = uint256(state.escrow) + state.pot;
        state.status = Status.Closed;
        state.escrow = 0;
        state.pot = 0;
        _credit(r.token, r.submitter, refund);
        emit Closed(id, refund);
    }
}
