// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";
import {Keys} from "./Keys.sol";
import {Proofs} from "./Proofs.sol";
import {Vault} from "./Vault.sol";

/// @notice What the ledger remembers, how it finds it again, and what every part asks: is this known, is it time.
/// @dev Runs and segments are brought along by callers and recognised by their hashes. Inside, `r` and `s` are the terms and
/// the segment that were brought, in memory, and `state` is what is remembered of them.
abstract contract Book is Vault, Keys {
    uint64 public constant DELAY = 4;
    uint64 public immutable UNBONDING;

    Proofs internal immutable _proofs = new Proofs();

    mapping(bytes32 id => RunState) internal _runs;
    mapping(bytes32 id => uint32[]) internal _rejections; // index of the n-th segment that was rejected
    mapping(bytes32 id => mapping(Role => mapping(address account => Bond))) internal _bonds;
    mapping(bytes32 id => mapping(uint256 seat => Seat)) internal _seats;
    mapping(bytes32 name => SegmentState) internal _segments;
    mapping(bytes32 name => mapping(address account => Verdict)) internal _verdicts;
    mapping(bytes32 demand => Demand) internal _demands;
    mapping(bytes32 name => mapping(uint256 word => uint256)) internal _claimed; // one bit a leaf

    constructor(uint64 unbonding) {
        if (unbonding > type(uint32).max) revert BadTerms("unbonding"); // times are kept in 48 bits
        UNBONDING = unbonding;
    }

    // ------------------------------------------------------------------------------------------------- what is known

    // A function that returns a struct in memory makes an empty one first, so each of these makes its own and fills it.

    /// @dev Fills `r` with the terms; their id, keccak256(abi.encode(terms)): of a struct of static types the encoding, the
    /// calldata and the memory are the same words. Stray bits beside a field make another id, one that nobody can `open`.
    function _load(Run memory r, Run calldata terms) internal pure returns (bytes32 id) {
        assembly ("memory-safe") {
            calldatacopy(r, terms, 928) // 29 words
            id := keccak256(r, 928)
        }
    }

    /// @dev The same for a segment.
    function _load(Segment memory s, Segment calldata data) internal pure returns (bytes32 name) {
        assembly ("memory-safe") {
            calldatacopy(s, data, 480) // 15 words
            name := keccak256(s, 480)
        }
    }

    function _find(Run calldata terms) internal view returns (Run memory r, bytes32 id, RunState storage state) {
        id = _load(r, terms);
        state = _runs[id];
        if (state.status == Status.None) revert Unknown();
    }

    /// @dev A segment that was committed names its run, so the run need not be looked up.
    function _find(Run calldata terms, Segment calldata data)
        internal
        view
        returns (Run memory r, Segment memory s, bytes32 name, SegmentState storage state)
    {
        bytes32 id = _load(r, terms);
        name = _load(s, data);
        state = _segments[name];
        if (state.outcome == Outcome.Unknown || s.run != id) revert Unknown();
    }

    function _findPending(Run calldata terms, Segment calldata data)
        internal
        view
        returns (Run memory r, Segment memory s, bytes32 name, SegmentState storage state)
    {
        bytes32 id = _load(r, terms);
        name = _load(s, data);
        state = _segments[name];
        if (state.outcome == Outcome.Unknown || s.run != id) revert Unknown();
        if (_outcome(s, state) != Outcome.Pending) revert Already();
    }

    /// @dev Final and rejected are written down. Dropped is whatever was pending when its segment, or one before it, was
    /// rejected: rejections are counted by `attempt`, so only those since the segment was committed are looked at.
    function _outcome(Segment memory s, SegmentState storage state) internal view returns (Outcome) {
        if (state.outcome != Outcome.Pending) return state.outcome;
        uint32 attempt = _runs[s.run].attempt;
        uint32[] storage rejections = _rejections[s.run];
        for (uint256 n = s.attempt; n < attempt; ++n) {
            if (rejections[n] <= s.index) return Outcome.Dropped;
        }
        return Outcome.Pending;
    }

    /// @dev Whether an account holds a seat that was drawn, and has since before the segment.
    function _isAssigned(Segment memory s, SegmentState storage state, address account) internal view returns (bool) {
        Bond storage bond = _bonds[s.run][Role.Verifier][account];
        uint8 seat = bond.seat;
        return bond.exists && state.drawn >> seat & 1 == 1 && _seats[s.run][seat].joined < s.blockNumber;
    }

    function _mustBeOpened(Run memory r) internal pure returns (bool) {
        return r.verifiers > 0 || r.forcedRate > 0;
    }

    // -------------------------------------------------------------------------------------------------------- when

    /// @dev When a segment's windows start.
    function _start(Run memory r, Segment memory s, SegmentState storage state) internal view returns (uint256) {
        if (r.verifiers == 0) return s.time;
        if (state.drawnAt == 0) revert TooEarly(type(uint256).max);
        return state.drawnAt;
    }

    /// @dev When the court's time starts. The segment was opened, or need not be.
    function _courtFrom(Run memory r, Segment memory s, SegmentState storage state) internal view returns (uint256) {
        return _mustBeOpened(r) ? state.openedAt : s.time + r.window;
    }

    function _from(uint256 time) internal view {
        if (block.timestamp < time) revert TooEarly(time);
    }

    function _before(uint256 time) internal view {
        if (block.timestamp >= time) revert TooLate(time);
    }

    // ------------------------------------------------------------------------------------------------------- views

    /// @inheritdoc ILedger
    function runOf(bytes32 id) external view returns (RunState memory) {
        return _runs[id];
    }

    /// @inheritdoc ILedger
    function bondOf(bytes32 id, Role role, address account) external view returns (Bond memory) {
        return _bonds[id][role][account];
    }

    /// @inheritdoc ILedger
    function seatOf(bytes32 id, uint32 seat) external view returns (Seat memory) {
        return _seats[id][seat];
    }

    /// @inheritdoc ILedger
    function segmentOf(bytes32 name) external view returns (SegmentState memory) {
        return _segments[name];
    }

    /// @inheritdoc ILedger
    function verdictOf(bytes32 name, address account) external view returns (Verdict memory) {
        return _verdicts[name][account];
    }

    /// @inheritdoc ILedger
    function demandOf(bytes32 id) external view returns (Demand memory) {
        return _demands[id];
    }

    /// @inheritdoc ILedger
    function claimed(bytes32 name, uint32 leaf) external view returns (bool) {
        return _claimed[name][leaf >> 8] >> (leaf & 0xff) & 1 == 1;
    }

    /// @inheritdoc ILedger
    function outcomeOf(Run calldata run, Segment calldata segment) external view returns (Outcome) {
        Run memory r;
        Segment memory s;
        bytes32 id = _load(r, run);
        bytes32 name = _load(s, segment);
        return s.run == id ? _outcome(s, _segments[name]) : Outcome.Unknown;
    }
}
