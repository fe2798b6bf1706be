// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Bonds} from "./Bonds.sol";
import {ILedger} from "./ILedger.sol";
import {Records} from "./Records.sol";
import {Runs} from "./Runs.sol";

/// @notice Segments: committed, drawn, opened, and final or rejected.
abstract contract Segments is Runs, Bonds {
    /// @inheritdoc ILedger
    function commit(Run calldata run, Commitment[] calldata batch) external nonReentrant {
        (Run memory r, bytes32 id, RunState storage state) = _find(run);
        if (state.status != Status.Active || !state.begun) revert WrongStatus(state.status);
        _onlyFor(r.operator);
        Bond storage bond = _bonds[id][Role.Operator][r.operator];
        if (bond.amount != r.operatorBond || bond.releaseAt != 0) revert Insufficient(r.operatorBond, bond.amount);
        uint32 index = state.committed;
        if (batch.length > r.segments - index) revert Full();
        bytes32 prestate = state.state;
        for (uint256 i = 0; i < batch.length; ++i) {
            Segment memory s = _read(r, batch[i], index, prestate);
            s.run = id;
            s.attempt = state.attempt;
            s.seats = state.seats;
            bytes32 name = keccak256(abi.encode(s));
            _segments[name].outcome = Outcome.Pending;
            emit Committed(id, index, name, s, batch[i].record);
            prestate = s.poststate;
            ++index;
        }
        state.state = prestate;
        state.committed = index;
    }

    /// @inheritdoc ILedger
    function draw(Run calldata run, Segment calldata segment) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        if (r.verifiers == 0) revert BadTerms("verifiers");
        if (state.drawnAt != 0) revert Already();
        uint64 from = state.rearmed == 0 ? s.blockNumber : state.rearmed;
        bytes24 beacon = bytes24(_beaconOf(r.beacon, from + DELAY));
        if (beacon == 0) {
            state.rearmed = uint48(block.number);
            emit Rearmed(name, uint64(block.number) + DELAY);
            return;
        }
        state.drawnAt = uint48(block.timestamp);
        state.beacon = beacon;
        address[] memory verifiers;
        if (uint32(uint192(beacon)) < r.rate) {
            (state.drawn, verifiers) = _drawSeats(s, beacon, r.verifiers);
        }
        emit Drawn(name, beacon, verifiers);
    }

    /// @inheritdoc ILedger
    function unseal(
        Run calldata run,
        Segment calldata segment,
        bytes32 secret,
        bytes32 witness,
        bytes32 sealedRecord,
        bytes32 sealSalt
    ) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        _onlyFor(r.operator);
        uint256 end = _checkNext(r, s, state);
        _from(end);
        _before(end + r.answer);
        RunState storage runState = _runs[s.run];
        if (keccak256(abi.encode(secret)) != runState.chain) revert BadSecret();
        if (keccak256(abi.encode(sealedRecord, sealSalt)) != s.seal) revert BadSeal();
        bool isForced = _forced(r, runState.beacon, s.index, s.attempt, secret);
        if (isForced != (sealedRecord != s.record)) revert BadSeal();
        runState.chain = secret;
        runState.opened = s.index + 1;
        state.openedAt = uint48(block.timestamp);
        state.forced = isForced;
        state.witness = witness;
        emit Unsealed(name, secret, witness, isForced, sealedRecord);
    }

    /// @inheritdoc ILedger
    function forfeit(Run calldata run, Segment calldata segment) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        _from(_checkNext(r, s, state) + r.answer);
        _reject(r, s, name, state, state.flags);
    }

    /// @inheritdoc ILedger
    function finalise(Run calldata run, Segment calldata segment) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        RunState storage runState = _runs[s.run];
        if (s.index != runState.finalised) revert StillOpen();
        _from(_start(r, s, state) + r.window);
        if (_mustBeOpened(r) && state.openedAt == 0) revert StillOpen();
        if (state.demands > 0) revert StillOpen();
        if (state.flags > 0) _finaliseFlagged(r, s, state, runState);
        state.outcome = Outcome.Final;
        runState.finalised = s.index + 1;
        runState.last = uint48(block.timestamp);
        runState.escrow -= s.payout + r.operatorFee;
        _credit(r.token, r.operator, r.operatorFee);
        emit Finalised(s.run, s.index, name);
    }

    /// @inheritdoc ILedger
    function resolve(Run calldata run, Segment calldata segment, bool upheld, address culprit) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _find(run, segment);
        if (msg.sender != r.court) revert NotAllowed();
        if (_outcome(s, state) != Outcome.Pending) revert Already();
        if (state.flags == 0 || state.forced) revert NotAllowed();
        if (_mustBeOpened(r) && state.openedAt == 0) revert TooEarly(type(uint256).max);
        if (state.dismissed) revert Already();
        uint256 from = _courtFrom(r, s, state);
        _from(from);
        _before(from + r.dispute);
        if (upheld) {
            state.byCourt = true;
            state.culprit = culprit;
            _reject(r, s, name, state, state.flags);
        } else {
            state.dismissed = true;
            emit Dismissed(name);
        }
    }

    /// @inheritdoc ILedger
    function forced(Run calldata run, uint32 index, uint32 attempt, bytes32 secret) external view returns (bool) {
        (Run memory r,, RunState storage state) = _find(run);
        return _forced(r, state.beacon, index, attempt, secret);
    }

    /// @inheritdoc ILedger
    function assignedOf(Run calldata run, Segment calldata segment) external view returns (address[] memory accounts) {
        (, Segment memory s,, SegmentState storage state) = _find(run, segment);
        accounts = new address[](s.seats);
        uint256 n = 0;
        for (uint256 seat = 0; seat < s.seats; ++seat) {
            address account = _seats[s.run][seat].account;
            if (state.drawn >> seat & 1 == 1 && _isAssigned(s, state, account)) accounts[n++] = account;
        }
        _shorten(accounts, n);
    }

    /// @dev Writes a rejection down: the operator's bond and the culprit's are divided among `reporters`, of whom each gets
    /// `share`, and the harmed; the run goes back to the state before the segment.
    function _reject(Run memory r, Segment memory s, bytes32 name, SegmentState storage state, uint256 reporters)
        internal
        returns (uint256 share)
    {
        address culprit = state.culprit;
        uint256 slashed = _slash(_bonds[s.run][Role.Operator][r.operator], r.operatorBond);
        if (culprit != address(0)) slashed += _slashWorker(s.run, culprit);
        share = reporters == 0 ? 0 : slashed * r.reporterShare / 100 / reporters;
        uint256 harm = s.payout == 0 ? 0 : slashed * r.harmedShare / 100;
        _burn(r.token, slashed - share * reporters - harm);

        state.outcome = Outcome.Rejected;
        state.share = uint128(share);
        state.harm = uint128(harm);
        RunState storage runState = _runs[s.run];
        _rejections[s.run].push(s.index);
        ++runState.attempt;
        runState.committed = s.index;
        if (runState.opened > s.index) runState.opened = s.index;
        runState.state = s.prestate;
        emit Rejected(s.run, s.index, name, culprit, slashed);
    }

    /// @dev A flagged segment that becomes final: a forced error pays its jackpots, any other waits for the court.
    function _finaliseFlagged(Run memory r, Segment memory s, SegmentState storage state, RunState storage runState)
        private
    {
        if (state.forced) {
            // Halved for each one more, so that flagging twice does not pay (Truebit, section 5.3).
            uint128 share = (r.jackpot < runState.pot ? r.jackpot : runState.pot) >> (state.flags - 1);
            state.share = share;
            runState.pot -= share * state.flags;
        } else if (!state.dismissed) {
            if (block.timestamp < _courtFrom(r, s, state) + r.dispute) revert StillOpen();
        }
    }

    /// @dev The worker's bond is its account's, or the key's own, which the key may have put up before it became one.
    function _slashWorker(bytes32 id, address culprit) private returns (uint256 slashed) {
        mapping(address => Bond) storage bonds = _bonds[id][Role.Worker];
        address account = accountOf(culprit);
        slashed = _slash(bonds[account], type(uint256).max);
        if (account != culprit) slashed += _slash(bonds[culprit], type(uint256).max);
    }

    /// @dev That the segment is the one that the operator has to open next; the end of its window.
    function _checkNext(Run memory r, Segment memory s, SegmentState storage state) private view returns (uint256) {
        if (!_mustBeOpened(r)) revert BadTerms("unseal");
        uint32 opened = _runs[s.run].opened;
        if (s.index < opened) revert Already();
        if (s.index > opened) revert StillOpen();
        return _start(r, s, state) + r.window;
    }

    /// @dev From the seat that the beacon says on, the first whose verifier was there before the segment's block and after
    /// it; no one twice.
    function _drawSeats(Segment memory s, bytes24 beacon, uint256 wanted)
        private
        view
        returns (uint64 drawn, address[] memory verifiers)
    {
        verifiers = new address[](wanted);
        uint256 seats = s.seats;
        uint256 found = 0;
        for (uint256 n = 0; n < wanted && seats > 0; ++n) {
            uint256 seat = uint256(keccak256(abi.encode(beacon, n))) % seats;
            for (uint256 tried = 0; tried < seats; ++tried) {
                if (drawn >> seat & 1 == 0 && _isActive(_seats[s.run][seat], s.blockNumber)) {
                    drawn |= uint64(1) << uint64(seat);
                    verifiers[found++] = _seats[s.run][seat].account;
                    break;
                }
                seat = seat + 1 == seats ? 0 : seat + 1;
            }
        }
        _shorten(verifiers, found);
    }

    function _isActive(Seat memory seat, uint64 blockNumber) private pure returns (bool) {
        bool left = seat.left != 0 && seat.left <= blockNumber;
        return seat.account != address(0) && seat.joined < blockNumber && !left;
    }

    function _shorten(address[] memory list, uint256 length) private pure {
        assembly ("memory-safe") {
            mstore(list, length) // never more than before
        }
    }

    function _forced(Run memory r, bytes32 beacon, uint32 index, uint32 attempt, bytes32 secret)
        private
        pure
        returns (bool)
    {
        return uint32(bytes4(keccak256(abi.encode(secret, beacon, index, attempt)))) < r.forcedRate;
    }

    /// @dev What of a segment its commitment says, checked against the terms and the segment before.
    function _read(Run memory r, Commitment calldata given, uint32 index, bytes32 prestate)
        private
        view
        returns (Segment memory s)
    {
        Records.SegmentRecord memory record = Records.segment(given.record);
        if (record.run != r.record) revert BadRecord("run");
        if (record.index != index) revert BadRecord("index");
        if (record.steps == 0) revert BadRecord("steps");
        if (record.prestate != prestate) revert BadRecord("prestate");
        if (record.previous != 0) revert BadRecord("previous");
        if (given.work > r.work) revert BadRecord("work");
        if (given.payout > uint256(given.work) * r.price) revert BadRecord("payout");
        s.index = index;
        s.steps = record.steps;
        s.record = sha256(given.record);
        s.prestate = prestate;
        s.poststate = record.poststate;
        s.stepsRoot = record.stepsRoot;
        s.payoutRoot = given.payoutRoot;
        s.payout = given.payout;
        s.work = given.work;
        s.seal = given.seal;
        s.time = uint64(block.timestamp);
        s.blockNumber = uint64(block.number);
    }
}
