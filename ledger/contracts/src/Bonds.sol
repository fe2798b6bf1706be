// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Book} from "./Book.sol";
import {ILedger} from "./ILedger.sol";

/// @notice Bonds of operators, workers and verifiers: put up, taken back after UNBONDING, lost.
abstract contract Bonds is Book {
    uint256 private constant MAX_SEATS = 64; // bits of SegmentState.drawn

    /// @inheritdoc ILedger
    function join(Run calldata run, Role role, uint32 seat) external payable nonReentrant {
        _arrive(run.token);
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        Status status = state.status;
        bool mayBe = status == Status.Active || (status == Status.Open && role != Role.Operator);
        if (!mayBe) revert WrongStatus(status);
        Bond storage bond = _bonds[id][role][msg.sender];
        uint96 amount = role == Role.Worker ? r.workerBond : r.verifierBond;
        if (role == Role.Operator) {
            if (msg.sender != r.operator) revert NotAllowed();
            if (bond.releaseAt != 0 || bond.amount == r.operatorBond) revert Already();
            amount = r.operatorBond - bond.amount;
        } else if (bond.exists) {
            revert Already();
        }
        if (role == Role.Verifier) _sit(id, state, seat);
        else seat = 0;
        bond.exists = true;
        bond.seat = uint8(seat);
        bond.amount += amount;
        emit Joined(id, role, msg.sender, seat);
        _take(r.token, amount);
    }

    /// @inheritdoc ILedger
    function resign(Run calldata run, Role role) external nonReentrant {
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        if (role == Role.Operator) {
            Status status = state.status;
            bool unfinished = status == Status.Active && state.finalised < r.segments;
            if (status == Status.Open || unfinished) revert WrongStatus(status);
            if (state.committed > state.finalised) revert StillOpen();
        }
        Bond storage bond = _bonds[id][role][msg.sender];
        if (!bond.exists) revert Unknown();
        if (bond.releaseAt != 0) revert Already();
        _leave(id, role, msg.sender, bond);
    }

    /// @inheritdoc ILedger
    function release(Run calldata run, Role role, address account) external nonReentrant {
        (Run memory r, bytes32 id,) = _find(run);
        Bond storage bond = _bonds[id][role][account];
        if (!bond.exists) revert Unknown();
        _from(bond.releaseAt == 0 ? type(uint256).max : bond.releaseAt);
        uint256 amount = bond.amount;
        if (role == Role.Verifier) delete _seats[id][bond.seat];
        delete _bonds[id][role][account];
        _credit(r.token, account, amount);
        emit Released(id, role, account, amount);
    }

    /// @dev Takes up to `most` of a bond; the caller says where it goes.
    function _slash(Bond storage bond, uint256 most) internal returns (uint256 amount) {
        amount = most < bond.amount ? most : bond.amount;
        bond.amount -= uint96(amount);
    }

    /// @dev Starts the time to release.
    function _leave(bytes32 id, Role role, address account, Bond storage bond) internal {
        uint64 releaseAt = uint64(block.timestamp) + UNBONDING;
        bond.releaseAt = uint48(releaseAt);
        if (role == Role.Verifier) _seats[id][bond.seat].left = uint48(block.number);
        emit Left(id, role, account, releaseAt);
    }

    function _sit(bytes32 id, RunState storage run, uint32 number) private {
        if (number >= MAX_SEATS) revert Full();
        if (number > run.seats) revert Unknown();
        Seat storage seat = _seats[id][number];
        if (seat.account != address(0)) revert Already();
        if (number == run.seats) run.seats = uint8(number + 1);
        seat.account = msg.sender;
        seat.joined = uint48(block.number);
    }
}
