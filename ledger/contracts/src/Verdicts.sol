// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";
import {Segments} from "./Segments.sol";

/// @notice Verdicts on segments: sealed so that nobody copies another's, revealed, and settled once the outcome is known.
abstract contract Verdicts is Segments {
    uint256 private constant MAX_FLAGS = 32;

    /// @inheritdoc ILedger
    function seal(Run calldata run, Segment calldata segment, bytes32 verdict) external payable nonReentrant {
        _arrive(run.token);
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        address account = accountOf(msg.sender);
        Verdict storage mine = _verdicts[name][account];
        if (mine.mark != 0) revert Already();
        uint256 start = _start(r, s, state);
        _before(start + r.window / 2);
        bytes28 mark = bytes28(verdict);
        if (mark == 0) revert BadSeal();
        bool assigned = _isAssigned(s, state, account);
        mine.mark = mark;
        mine.assigned = assigned;
        emit Sealed(name, account, verdict);
        _take(r.token, assigned ? 0 : r.flagBond);
    }

    /// @inheritdoc ILedger
    function reveal(Run calldata run, Segment calldata segment, bool ok, bytes32 witness, bytes32 salt)
        external
        nonReentrant
    {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _findPending(run, segment);
        address account = accountOf(msg.sender);
        Verdict storage mine = _verdicts[name][account];
        if (mine.mark == 0) revert Unknown();
        if (mine.revealed) revert Already();
        uint256 start = _start(r, s, state);
        _from(start + r.window / 2);
        _before(start + r.window);
        if (bytes28(keccak256(abi.encode(name, account, ok, witness, salt))) != mine.mark) revert BadSeal();
        if (!ok) {
            uint256 most = mine.assigned ? MAX_FLAGS : MAX_FLAGS - r.verifiers;
            if (state.flags >= most) revert Full();
            ++state.flags;
        }
        mine.mark = _mark(witness);
        mine.revealed = true;
        mine.ok = ok;
        emit Revealed(name, account, ok, witness);
    }

    /// @inheritdoc ILedger
    function settle(Run calldata run, Segment calldata segment, address account) external nonReentrant {
        (Run memory r, Segment memory s, bytes32 name, SegmentState storage state) = _find(run, segment);
        Outcome outcome = _outcome(s, state);
        if (outcome == Outcome.Pending) revert StillOpen();
        Verdict storage verdict = _verdicts[name][account];
        if (verdict.settled) revert Already();
        if (verdict.mark == 0) {
            if (!_isAssigned(s, state, account)) revert Unknown();
            verdict.assigned = true;
        }
        verdict.settled = true;

        (uint256 won, uint256 lost) = _weigh(r, s.run, state, outcome, verdict);
        if (verdict.assigned) {
            // Not out of a bond that was put up later.
            lost = _isAssigned(s, state, account) ? _slashVerifier(s.run, account, lost) : 0;
        } else {
            _credit(r.token, account, r.flagBond - lost);
        }
        _burn(r.token, lost);
        _credit(r.token, account, won);
        emit Settled(name, account, int256(won) - int256(lost));
    }

    /// @dev The table of `settle` in ILedger. Fees leave the escrow here; shares were set aside when the outcome was known.
    function _weigh(Run memory r, bytes32 id, SegmentState storage state, Outcome outcome, Verdict storage verdict)
        private
        returns (uint256 won, uint256 lost)
    {
        uint256 bond = verdict.assigned ? r.verifierBond : r.flagBond;
        bool isFinal = outcome == Outcome.Final;
        if (!verdict.revealed) {
            bool due = isFinal || outcome == Outcome.Rejected && state.byCourt;
            if (due && verdict.assigned) lost = bond * r.missPenalty / 100;
        } else if (verdict.ok) {
            if (isFinal ? state.forced : outcome == Outcome.Rejected && state.byCourt) lost = bond;
            else if (isFinal && verdict.assigned && verdict.mark == _mark(state.witness)) won = _fee(r, id);
        } else if (isFinal && state.dismissed) {
            lost = bond;
        } else if (outcome != Outcome.Dropped) {
            won = state.share; // 0 where the court was silent
        }
    }

    /// @dev A verifier is out with a loss: whoever is drawn has all of its bond when the segment is committed.
    function _slashVerifier(bytes32 id, address account, uint256 most) private returns (uint256 lost) {
        Bond storage bond = _bonds[id][Role.Verifier][account];
        lost = _slash(bond, most);
        if (lost > 0 && bond.releaseAt == 0) _leave(id, Role.Verifier, account, bond);
    }

    /// @dev Escrow holds a fee for every assigned verifier of every segment, until the run is closed.
    function _fee(Run memory r, bytes32 id) private returns (uint256) {
        RunState storage runState = _runs[id];
        if (runState.status == Status.Closed) return 0;
        runState.escrow -= r.verifierFee;
        return r.verifierFee;
    }

    function _mark(bytes32 witness) private pure returns (bytes28) {
        return bytes28(keccak256(abi.encode(witness)));
    }
}
