// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Trueweight's ledger: escrow, bonds, committed segments, verdicts, payouts.
/// @notice docs/ledger.md has the state machines; this file has who may call what, and when.
///
/// Everything that anybody is owed is an entry of one table, `balanceOf(token, account)`, and leaves it by `withdraw`
/// alone. Escrow and bonds come out of that table (native currency sent along is put into it first) and go back into
/// it. Nobody has power over another's funds: there is no owner, no upgrade, no pause.
///
/// A run is named by the hash of its terms and a segment by the hash of what was committed, so neither is stored:
/// callers bring them along, and events have them.
interface ILedger {
    // -------------------------------------------------------------------------------------------------- what is what

    /// The terms of a run. Its id is keccak256(abi.encode(run)). Amounts are in the token's smallest unit, times in
    /// seconds. Rates are in units of 2^-32. Percentages are of 100.
    struct Run {
        bytes32 record; // SHA-256 of the RunRecord, which holds the roots of recipe, programs and data
        bytes32 initialState; // state root before segment 0
        address submitter;
        address operator; // of the pool: commits segments
        address token; // an ERC-20, or 0 for the native currency
        address court; // who resolves disputes (IDisputes)
        address beacon; // IBeacon
        uint32 segments; // how many there will be, 1 or more
        uint32 tensors; // of a state: the number of leaves of a state root
        uint64 work; // of a full segment, in units of work
        uint96 price; // of a unit of work
        uint96 operatorFee; // for a segment
        uint96 verifierFee; // for an assigned verifier's right verdict
        uint96 operatorBond;
        uint96 workerBond;
        uint96 verifierBond;
        uint96 flagBond; // of a whistleblower for one verdict, and of a demand; 1 or more
        uint96 pot; // for all jackpots together
        uint96 jackpot; // for one forced error
        uint32 rate; // with which a segment is assigned to verifiers
        uint32 forcedRate; // with which the operator has to publish a forced error
        uint8 verifiers; // assigned to a segment that is drawn, 0 to 8
        uint8 reporterShare; // percent of a slashed bond for those who flagged
        uint8 harmedShare; // percent for the other workers of a rejected segment; the rest is burnt
        uint8 missPenalty; // percent of a verifier's bond for no verdict; a wrong one costs all of it
        uint32 window; // seconds for verdicts: the first half for sealed ones, the second to reveal them
        uint32 answer; // seconds for the operator to open a segment, and to answer a demand; 1 or more
        uint32 dispute; // seconds for the court; 1 or more
        bytes32 salt; // for two runs on the same terms
    }

    /// What the operator gives for a segment.
    struct Commitment {
        bytes record; // the SegmentRecord, version 2, with `previous` zero: 274 bytes (docs/formats.md)
        uint64 work; // done in it, at most run.work
        bytes32 payoutRoot; // of the Merkle sum tree of (key, amount)
        uint128 payout; // its sum, at most work x price
        bytes32 seal; // keccak256(abi.encode(sha256 of the true SegmentRecord with `previous` zero, salt))
    }

    /// A committed segment. Its hash, keccak256(abi.encode(segment)), is its name.
    struct Segment {
        bytes32 run;
        uint32 index;
        uint32 attempt; // how many segments of the run had been rejected before
        uint32 steps;
        bytes32 record; // SHA-256 of Commitment.record
        bytes32 prestate;
        bytes32 poststate;
        bytes32 stepsRoot;
        bytes32 payoutRoot;
        uint128 payout;
        uint64 work;
        bytes32 seal;
        uint64 time; // when it was committed
        uint64 blockNumber;
        uint32 seats; // how many seats of verifiers there were
    }

    enum Status {
        None,
        Open, // paid for, no operator yet
        Active, // the operator has put up its bond
        Cancelled, // the submitter wants no more segments
        Closed // what was left has gone back
    }

    enum Role {
        Operator,
        Worker,
        Verifier
    }

    enum Outcome {
        Unknown, // never committed
        Pending,
        Final,
        Rejected, // forged, withheld or not opened
        Dropped // committed after a segment that was rejected
    }

    /// One of the trees whose leaves an operator has to show.
    enum Tree {
        State, // leaf i: the i-th TensorEntry of the poststate
        Steps, // leaf i: the i-th StepRecord
        Tensor // leaf j, 4,096 bytes, of a tensor whose TensorEntry is shown
    }

    /// A leaf of a tree of RFC 6962 with SHA-256, and its inclusion proof from the leaf upwards.
    struct Leaf {
        bytes data;
        uint64 index;
        uint64 count;
        bytes32[] proof;
    }

    // ------------------------------------------------------------------------------------------------------ as stored

    struct RunState {
        Status status;
        bool begun;
        uint8 seats; // of verifiers, ever taken
        uint32 committed; // segments that are final or pending
        uint32 finalised;
        uint32 opened; // index of the first segment that has not been opened
        uint32 attempt; // how many segments have been rejected
        uint48 last; // when a segment was last final or the run was cancelled
        uint48 beaconBlock; // whose beacon `begin` takes, or took
        uint128 escrow; // what is left of it
        uint128 pot;
        bytes32 state; // root at which the next segment starts
        bytes32 chain; // the last secret that the operator has shown
        bytes32 beacon;
    }

    struct SegmentState {
        Outcome outcome; // of a dropped segment still Pending: ask `outcomeOf`
        bool byCourt; // rejected by the court
        bool forced;
        bool dismissed; // the court found the flags wrong
        uint8 flags;
        uint8 demands; // open ones
        uint48 rearmed; // the block from which DELAY counts, where it is not the segment's
        uint48 drawnAt; // 0: not yet
        uint48 openedAt; // 0: not yet
        bytes24 beacon;
        uint64 drawn; // bit s: the verifier in seat s is assigned
        bytes32 witness; // the operator's
        uint128 share; // of each who flagged: of the jackpot, or of what was slashed
        uint128 harm; // what `compensate` gives out
        address culprit;
    }

    struct Bond {
        uint96 amount;
        uint48 releaseAt; // 0: has not left
        uint8 seat;
        bool exists; // until it is released
    }

    struct Seat {
        address account; // 0: released
        uint48 joined; // block
        uint48 left; // block; 0: has not
    }

    struct Verdict {
        bytes28 mark; // start of the sealed verdict, and once revealed of keccak256(witness)
        bool assigned;
        bool revealed;
        bool ok;
        bool settled;
    }

    struct Demand {
        address account; // 0: none open
        uint48 until; // the operator's time
    }

    // --------------------------------------------------------------------------------------------------------- errors

    error Unknown(); // no such run, segment, bond, demand or verdict
    error WrongStatus(Status status);
    error NotAllowed(); // the caller, or not with this outcome
    error TooEarly(uint256 from);
    error TooLate(uint256 until);
    error Insufficient(uint256 needed, uint256 got);
    error CapExceeded(uint256 cap);
    error NotArrived(uint256 expected, uint256 got); // a token that takes a fee
    error TransferFailed();
    error BadTerms(string term);
    error BadRecord(string field);
    error BadSignature();
    error BadProof();
    error BadSecret();
    error BadSeal();
    error Already(); // joined, left, taken, claimed, settled, sealed, revealed, demanded, drawn, decided
    error Full(); // seats, flags, demands
    error StillOpen(); // a demand, a dispute, a pending segment

    // ------------------------------------------------------------------------------------------------------- balances

    event Deposited(address indexed token, address indexed account, uint256 amount);
    event Withdrawn(address indexed token, address indexed account, address to, uint256 amount);
    event Delegated(address indexed account, address indexed key);

    function balanceOf(address token, address account) external view returns (uint256);

    /// All of a token that the ledger owes: balances, escrows, pots, bonds, and what waits to be claimed.
    function held(address token) external view returns (uint256);

    /// The most of one token that deposits may bring `held` to.
    function cap() external view returns (uint256);

    /// Seconds between leaving and having the bond back.
    function UNBONDING() external view returns (uint64);

    /// Blocks between what must not know a beacon and the block that gives it.
    function DELAY() external view returns (uint64);

    /// EIP-712 domain: name "Trueweight", version "1", chain and contract.
    function DOMAIN_SEPARATOR() external view returns (bytes32);

    /// Puts `amount` of an ERC-20 (which must arrive whole), or the native currency sent along, into the caller's
    /// balance. Reverts CapExceeded where the ledger would hold more of the token than `cap()`.
    function deposit(address token, uint256 amount) external payable;

    /// Takes from the caller's balance.
    function withdraw(address token, uint256 amount, address to) external;

    /// Makes `key` a hot key of the caller: it may act for it (commit, seal, reveal, open, answer), what its receipts
    /// earn is the caller's, and it never moves the caller's money: what a key puts up to flag is its own, and goes back
    /// to the account. `signature` is the key's over the EIP-712 message Delegate(address account,uint256 deadline). A key
    /// has one account for ever.
    function delegate(address key, uint256 deadline, bytes calldata signature) external;

    /// Whose hot key this is; the key itself where it is nobody's.
    function accountOf(address key) external view returns (address);

    // ----------------------------------------------------------------------------------------------------------- runs

    event Opened(bytes32 indexed id, Run run, bytes record);
    event Accepted(bytes32 indexed id, bytes32 chain, uint64 beaconBlock);
    event Begun(bytes32 indexed id, bytes32 beacon);
    event Cancelled(bytes32 indexed id);
    event Closed(bytes32 indexed id, uint256 refund);
    event Joined(bytes32 indexed id, Role role, address indexed account, uint32 seat);
    event Left(bytes32 indexed id, Role role, address indexed account, uint64 releaseAt);
    event Released(bytes32 indexed id, Role role, address indexed account, uint256 amount);

    /// The submitter opens a run and pays for it: segments x (work x price + operatorFee + verifiers x verifierFee) +
    /// pot, out of its balance. `record` is the RunRecord, whose SHA-256 is run.record.
    function open(Run calldata run, bytes calldata record) external payable returns (bytes32 id);

    function runOf(bytes32 id) external view returns (RunState memory);

    /// The operator puts up its bond. `chain` is the end of its chain of secrets, s_0 = keccak256(s_1), and so on, one
    /// for each segment opened. A block after this one gives the run's beacon.
    function accept(Run calldata run, bytes32 chain) external payable;

    /// Fixes the run's beacon, that of the block DELAY after `accept`, which with the chain of secrets says where forced
    /// errors are due. Anybody may call it, and should: where the block has been forgotten, another is chosen. Segments
    /// can be committed from then on.
    function begin(Run calldata run) external;

    /// A worker's or verifier's bond, or an operator's again after it was slashed. A verifier gets the seat `seat`: the
    /// next one, or one that was released. At most 64 seats.
    function join(Run calldata run, Role role, uint32 seat) external payable;

    function bondOf(bytes32 id, Role role, address account) external view returns (Bond memory);

    function seatOf(bytes32 id, uint32 seat) external view returns (Seat memory);

    /// The caller will take part no more; its bond can be had after UNBONDING. An operator may resign only a run that is
    /// Cancelled or all of whose segments are final, with none pending. A verifier who loses any of its bond has left.
    function resign(Run calldata run, Role role) external;

    /// Gives the bond of one who left long enough ago back, into its balance. Anybody may call it.
    function release(Run calldata run, Role role, address account) external;

    /// The submitter wants no more segments. Open: closed at once with all money back. Active: what is pending goes on.
    function cancel(Run calldata run) external;

    /// What is left goes back to the submitter: all segments are final, or the run is cancelled and none is pending, and
    /// `answer + dispute` seconds have passed since the last was final. Anybody may call it.
    function close(Run calldata run) external;

    // ------------------------------------------------------------------------------------------------------- segments

    event Committed(bytes32 indexed id, uint32 indexed index, bytes32 segment, Segment data, bytes record);
    event Drawn(bytes32 indexed segment, bytes32 beacon, address[] verifiers);
    event Rearmed(bytes32 indexed name, uint64 blockNumber); // a run's or a segment's
    event Unsealed(bytes32 indexed segment, bytes32 secret, bytes32 witness, bool forced, bytes32 record);
    event Finalised(bytes32 indexed id, uint32 indexed index, bytes32 segment);
    event Dismissed(bytes32 indexed segment);
    event Rejected(bytes32 indexed id, uint32 indexed index, bytes32 segment, address culprit, uint256 slashed);

    /// The operator, whose bond must be whole, commits the next segments. Each record must be of this run, the next
    /// index, and start from the state at which the one before ended.
    function commit(Run calldata run, Commitment[] calldata batch) external;

    /// Fixes a segment's beacon, that of the block DELAY after the segment's, and starts its windows. Anybody may call
    /// it. Where that block has been forgotten, another is chosen, DELAY from now. Needed only where run.verifiers > 0;
    /// else the windows start at the commitment.
    function draw(Run calldata run, Segment calldata segment) external;

    /// Opens a segment between the end of its window and `answer` seconds later: the operator shows the next secret of
    /// its chain, its own `witness` (what a replay yields), and what it had sealed: the digest of the true record. Where
    /// the secret says so (see `forced`) the committed record had to be false, else true: sealed == segment.record.
    /// In order of index. Needed where verifiers > 0 or forcedRate > 0.
    function unseal(
        Run calldata run,
        Segment calldata segment,
        bytes32 secret,
        bytes32 witness,
        bytes32 sealedRecord,
        bytes32 sealSalt
    ) external;

    /// Rejects a segment that was not opened in time. Anybody may call it.
    function forfeit(Run calldata run, Segment calldata segment) external;

    /// The next segment is final: opened where it must be, no demand open, and nobody flagged it, or it was a forced
    /// error, or the court dismissed the flags or did not say anything in time. Anybody may call it.
    function finalise(Run calldata run, Segment calldata segment) external;

    /// The court's answer on a segment that was flagged and was no forced error, within `dispute` seconds of its opening.
    /// `culprit` is the key of the worker whose unit was false, or 0.
    function resolve(Run calldata run, Segment calldata segment, bool upheld, address culprit) external;

    function outcomeOf(Run calldata run, Segment calldata segment) external view returns (Outcome);

    function segmentOf(bytes32 segment) external view returns (SegmentState memory);

    /// The verifiers whom the draw assigned to a segment, in the order of their seats.
    function assignedOf(Run calldata run, Segment calldata segment) external view returns (address[] memory);

    /// Whether `secret` makes segment `index` of a run that has begun a forced error.
    function forced(Run calldata run, uint32 index, uint32 attempt, bytes32 secret) external view returns (bool);

    // ------------------------------------------------------------------------------------------------------- verdicts

    event Sealed(bytes32 indexed segment, address indexed account, bytes32 verdict);
    event Revealed(bytes32 indexed segment, address indexed account, bool ok, bytes32 witness);
    event Settled(bytes32 indexed segment, address indexed account, int256 amount);

    /// A sealed verdict of the caller (or the account that it is a key of): keccak256(abi.encode(segment hash, account,
    /// ok, witness, salt)). First half of the window. Where the account was not assigned the caller puts up flagBond.
    function seal(Run calldata run, Segment calldata segment, bytes32 verdict) external payable;

    function verdictOf(bytes32 segment, address account) external view returns (Verdict memory);

    /// The verdict itself. Second half of the window. One that is not ok is a flag; at most 32 flags a segment, of which
    /// as many as run.verifiers are kept for the assigned.
    function reveal(Run calldata run, Segment calldata segment, bool ok, bytes32 witness, bytes32 salt) external;

    /// Pays or penalises one account for its verdict on a segment whose outcome is known. Anybody may call it, once.
    ///
    /// segment               ok, witness as opened   ok, another   not ok               assigned, nothing revealed
    /// Final                 fee if assigned         -             loses its bond       loses missPenalty
    /// Final, court silent   fee if assigned         -             -                    loses missPenalty
    /// Final, forced         loses its bond          same          share of jackpot     loses missPenalty
    /// Rejected by the court loses its bond          same          share of the slash   loses missPenalty
    /// Rejected otherwise    -                       -             share of the slash   -
    /// Dropped               -                       -             -                    -
    ///
    /// "Its bond" is verifierBond (as far as it is still there, and not of a bond put up later) of an assigned verifier and
    /// flagBond of another; what is not lost is given back. What is lost is burnt.
    function settle(Run calldata run, Segment calldata segment, address account) external;

    // -------------------------------------------------------------------------------------------------------- demands

    event Demanded(
        bytes32 indexed segment,
        bytes32 indexed demand,
        address account,
        Tree tree,
        bytes32 root,
        uint64 index,
        uint64 count
    );
    event Answered(bytes32 indexed segment, bytes32 indexed demand, bytes data);
    event Refunded(bytes32 indexed segment, bytes32 indexed demand, address account, uint256 amount); // with its share

    /// Demands leaf `index` of a tree of a pending segment, within its window; flagBond is put up. For Tree.Tensor
    /// `entry` is the tensor's entry, whose place in the poststate it proves; else it is not looked at. At most 16 open at
    /// once. The demand's name is keccak256(abi.encode(segment hash, root, index, count)).
    function demand(Run calldata run, Segment calldata segment, Tree tree, uint64 index, Leaf calldata entry)
        external
        payable;

    /// The operator shows the leaf; the bond is its. Anybody else may, too; the bond is the operator's all the same.
    function answer(
        Run calldata run,
        Segment calldata segment,
        bytes32 root,
        uint64 index,
        uint64 count,
        bytes calldata data,
        bytes32[] calldata proof
    ) external;

    /// Rejects a segment with a demand that was not answered within `answer` seconds; the bond goes back and its owner has
    /// the reporter's share. Where the segment is rejected or dropped already the bond just goes back. Anybody may call it.
    function withheld(Run calldata run, Segment calldata segment, bytes32 root, uint64 index, uint64 count) external;

    function demandOf(bytes32 id) external view returns (Demand memory);

    // -------------------------------------------------------------------------------------------------------- payouts

    event Claimed(bytes32 indexed segment, uint32 indexed leaf, address key, address account, uint256 amount);
    event Compensated(bytes32 indexed segment, uint32 indexed leaf, address key, address account, uint256 amount);

    /// Pays leaf `leaf` of a final segment's payout tree into the balance of the key's account. Anybody may call it, once.
    /// The tree is a Merkle sum tree of RFC 6962's shape with `count` leaves:
    /// leaf H(0x00 | leaf u32 | key 20 bytes | amount u128), node H(0x01 | left | sum of left u128 | right | sum of right
    /// u128), big-endian; `proof` and `sums` are the siblings from the leaf upwards.
    function claim(
        Run calldata run,
        Segment calldata segment,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) external;

    /// Whether a leaf was claimed, or compensated.
    function claimed(bytes32 segment, uint32 leaf) external view returns (bool);

    /// The same for a rejected segment: the leaf's part, amount / payout, of the harmed workers' share of what was
    /// slashed. Not for the culprit.
    function compensate(
        Run calldata run,
        Segment calldata segment,
        uint32 leaf,
        uint32 count,
        address key,
        uint128 amount,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) external;
}

/// Randomness that nobody knew when the segment was committed.
interface IBeacon {
    /// The beacon of a block; 0 where it is not there yet or is forgotten.
    function beaconOf(uint64 blockNumber) external view returns (bytes32);
}
