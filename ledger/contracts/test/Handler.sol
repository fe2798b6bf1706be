// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IBeacon, ILedger} from "../src/ILedger.sol";
import {Ledger} from "../src/Ledger.sol";
import {Records} from "../src/Records.sol";
import {MockToken} from "../src/testing/Tokens.sol";
import {SumTrees, Trees} from "./Trees.sol";
import {vm} from "./Vm.sol";
import {Writer} from "./Writer.sol";

/// @notice Forgets after 256 blocks, and one block in 16 from the start.
contract FuzzBeacon is IBeacon {
    function beaconOf(uint64 blockNumber) external view returns (bytes32 beacon) {
        beacon = keccak256(abi.encode(blockNumber));
        if (uint256(beacon) % 16 == 0 || blockNumber + 256 < block.number) return 0;
    }
}

/// @notice Everybody who ever calls the ledger, and what they know. Each action is a call that is mostly sensible; the ledger's
/// refusal is the action's. What must never happen is written to `fault`.
contract Handler {
    uint256 private constant KEYS = 2; // of the people, who are nobody's account at first
    uint32 private constant WINDOW = 20;
    uint64 private constant UNBONDING = 200;
    address private constant BURN = 0x000000000000000000000000000000000000dEaD;

    struct Entered {
        ILedger.Segment segment;
        uint256 run;
        bytes32 trueRecord;
        ILedger.Outcome outcome; // as the calls that were done say
        uint256 paid;
    }

    struct Said {
        bool sealed_;
        bool ok;
        bytes32 witness;
    }

    struct Vote {
        uint256 segment;
        address account;
    }

    struct Asked {
        uint256 segment;
        bytes32 root;
        uint64 index;
        uint64 count;
        bytes32 id;
    }

    /// @dev What may only grow, of a run; one slot.
    struct Seen {
        ILedger.Status status;
        uint8 seats;
        uint32 committed;
        uint32 finalised;
        uint32 opened;
        uint32 attempt;
        uint112 escrow;
    }

    Ledger public immutable ledger = new Ledger(1e15, UNBONDING);
    MockToken public immutable token = new MockToken();
    FuzzBeacon public immutable beacon = new FuzzBeacon();

    string public fault;
    address[] public people;
    uint256 public time = 1e9;
    uint256 public height = 1000;
    uint256 private _focus; // the run to which most calls are made, for a while

    ILedger.Run[] private _runs;
    bytes32[] private _ids;
    Entered[] private _entered;
    Asked[] private _asked;
    Vote[] private _votes;
    mapping(uint256 run => uint256) private _shown; // secrets
    mapping(uint256 run => Seen) private _before;
    mapping(uint256 segment => mapping(address account => Said)) private _said;
    mapping(uint256 segment => mapping(address account => bool)) private _settled;
    mapping(uint256 segment => mapping(uint256 leaf => bool)) private _paid;
    mapping(bytes4 error => bool) private _known;

    // The only state that anybody commits to: two tensors, the first of two leaves; and two steps.
    bytes[] private _entries;
    bytes[] private _chunks;
    bytes[] private _steps;
    bytes32[] private _secrets;
    bytes32 private immutable _state;
    bytes32 private immutable _stepsRoot;
    bytes32 private immutable _tensor;

    constructor() {
        for (uint256 i = 1; i <= 10; ++i) {
            people.push(vm.addr(i));
        }
        bytes4[18] memory errors = [
            ILedger.Unknown.selector,
            ILedger.WrongStatus.selector,
            ILedger.NotAllowed.selector,
            ILedger.TooEarly.selector,
            ILedger.TooLate.selector,
            ILedger.Insufficient.selector,
            ILedger.CapExceeded.selector,
            ILedger.NotArrived.selector,
            ILedger.TransferFailed.selector,
            ILedger.BadTerms.selector,
            ILedger.BadRecord.selector,
            ILedger.BadSignature.selector,
            ILedger.BadProof.selector,
            ILedger.BadSecret.selector,
            ILedger.BadSeal.selector,
            ILedger.Already.selector,
            ILedger.Full.selector,
            ILedger.StillOpen.selector
        ];
        for (uint256 i = 0; i < errors.length; ++i) {
            _known[errors[i]] = true;
        }
        _chunks = [new bytes(4096), bytes("the rest")];
        _entries = [
            Writer.entry("a", "i8", _shape(4104), Trees.root(_hashes(_chunks))),
            Writer.entry("b", "f32", _shape(0), sha256(""))
        ];
        _steps = [bytes("step 0"), bytes("step 1")];
        (_state, _stepsRoot) = (Trees.root(_hashes(_entries)), Trees.root(_hashes(_steps)));
        _tensor = Trees.root(_hashes(_chunks));
        bytes32 secret = keccak256("last");
        for (uint256 i = 0; i < 64; ++i) {
            _secrets.push(secret);
            secret = keccak256(abi.encode(secret));
        }
        _secrets.push(secret); // the chain's end; the n-th to be shown is _secrets[63 - n]
        for (uint256 i = 0; i < people.length; ++i) {
            address account = people[i];
            vm.deal(account, 1e18);
            token.mint(account, 1e18);
            vm.prank(account);
            token.approve(address(ledger), type(uint256).max);
            vm.prank(account);
            ledger.deposit{value: 1e9}(address(0), 1e9);
            vm.prank(account);
            ledger.deposit(address(token), 1e9);
        }
        _sleep(0);
        for (uint256 n = 0; n < 3; ++n) {
            _begun(n);
        }
    }

    /// @dev Runs that have begun, since chance takes long to get there: one of each kind.
    function _begun(uint256 n) private {
        ILedger.Run memory r = _terms(_mixed(n));
        (r.submitter, r.operator, r.token) = (people[0], people[n], n == 1 ? address(token) : address(0));
        (r.segments, r.operatorBond, r.verifierBond, r.flagBond, r.price) = (8, 1001, 61, 20, 3);
        (r.pot, r.jackpot, r.rate, r.answer, r.dispute) = (250, 77, type(uint32).max, 10, 15);
        r.verifiers = n == 0 ? 2 : n == 1 ? 0 : 1;
        r.forcedRate = n == 0 ? 1 << 31 : 0;
        _remember(r);
        _must(r.submitter, abi.encodeCall(ILedger.open, (r, "record")));
        _must(r.operator, abi.encodeCall(ILedger.accept, (r, _secrets[64])));
        for (uint32 seat = 0; seat < 3; ++seat) {
            _must(people[3 + seat], abi.encodeCall(ILedger.join, (r, ILedger.Role.Verifier, seat)));
        }
        while (!ledger.runOf(_ids[n]).begun) {
            height += ledger.DELAY() + 1;
            _sleep(0);
            _must(people[0], abi.encodeCall(ILedger.begin, (r)));
        }
    }

    /// @dev The clock is kept here, since what a cheat did may or may not outlive a call.
    modifier now_() {
        vm.warp(time);
        vm.roll(height);
        _;
        _watch();
    }

    // ------------------------------------------------------------------------------------------------------- actions

    function pass(uint256 seed) external {
        seed = _mixed(seed);
        uint256 kind = seed % 16;
        if (seed >> 64 & 7 == 0) _focus = (seed >> 68) % _runs.length;
        height += kind == 0 ? 5 : seed >> 8 & 1;
        if (kind == 1 && seed >> 72 & 3 == 0) (height, time) = (height + 300, time + UNBONDING);
        if (kind > 3) _toNext(seed >> 16);
        else time += kind == 3 ? seed >> 32 & 255 : seed >> 32 & 7;
        _sleep(0);
        _watch();
    }

    function deposit(uint256 seed, uint256 amount) external now_ {
        seed = _mixed(seed);
        address coin = _coin(seed);
        amount = seed >> 16 & 63 == 0 ? 1e15 : amount % 1e6;
        uint256 value = coin == address(0) ? amount : 0;
        if (seed >> 24 & 15 == 0) value += 1;
        _send(_person(seed >> 8), abi.encodeCall(ILedger.deposit, (coin, amount)), value);
    }

    function withdraw(uint256 seed, uint256 amount) external now_ {
        seed = _mixed(seed);
        (address coin, address account) = (_coin(seed), _person(seed >> 8));
        uint256 had = ledger.balanceOf(coin, account);
        amount = seed >> 16 & 7 == 0 ? had + 1 : amount % (had / 4 + 1);
        _send(account, abi.encodeCall(ILedger.withdraw, (coin, amount, _person(seed >> 24))), 0);
    }

    function delegate(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 key = people.length - seed % (KEYS + 1); // in one case of three no key of ours
        address account = _person(seed >> 8);
        bytes32 message =
            keccak256(abi.encode(keccak256("Delegate(address account,uint256 deadline)"), account, time + 1));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", ledger.DOMAIN_SEPARATOR(), message));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        if (seed % (KEYS + 1) == KEYS) account = _person(seed >> 16);
        _send(account, abi.encodeCall(ILedger.delegate, (vm.addr(key), time + 1, abi.encodePacked(r, s, v))), 0);
    }

    function open(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (_runs.length >= 5) revert("enough");
        ILedger.Run memory r = _terms(seed);
        _send(r.submitter, abi.encodeCall(ILedger.open, (r, "record")), _value(r, seed >> 136));
        if (r.answer == 0 || r.dispute == 0 || r.flagBond == 0) _report("terms that cannot be kept");
        _remember(r);
    }

    function accept(uint256 seed) external now_ {
        seed = _mixed(seed);
        ILedger.Run memory r = _run(seed);
        bytes memory data = abi.encodeCall(ILedger.accept, (r, _secrets[64]));
        _send(_mostly(r.operator, seed >> 8), data, _value(r, seed >> 24));
    }

    function begin(uint256 seed) external now_ {
        seed = _mixed(seed);
        _send(_person(seed >> 8), abi.encodeCall(ILedger.begin, (_run(seed))), 0);
    }

    function join(uint256 seed) external now_ {
        seed = _mixed(seed);
        ILedger.Run memory r = _run(seed);
        uint256 kind = seed >> 8 & 7;
        ILedger.Role role = kind < 2 ? ILedger.Role.Operator : kind < 4 ? ILedger.Role.Worker : ILedger.Role.Verifier;
        uint32 seat = ledger.runOf(_ids[seed % _runs.length]).seats;
        if (seed >> 16 & 3 == 0) seat = uint32(seed >> 18 & 7);
        address account = role == ILedger.Role.Operator ? _mostly(r.operator, seed >> 24) : _person(seed >> 24);
        _send(account, abi.encodeCall(ILedger.join, (r, role, seat)), _value(r, seed >> 40));
    }

    function resign(uint256 seed) external now_ {
        seed = _mixed(seed);
        ILedger.Role role = ILedger.Role((seed >> 8) % 3);
        _send(_person(seed >> 16), abi.encodeCall(ILedger.resign, (_run(seed), role)), 0);
    }

    function release(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = seed % _runs.length;
        (ILedger.Role role, address account) = (ILedger.Role((seed >> 8) % 3), _person(seed >> 24));
        for (uint256 i = 0; i < 3 * people.length && ledger.bondOf(_ids[n], role, account).releaseAt == 0; ++i) {
            (role, account) = (ILedger.Role((seed % 3 + i) % 3), people[((seed >> 32) + i / 3) % people.length]);
        }
        _send(_person(seed >> 16), abi.encodeCall(ILedger.release, (_runs[n], role, account)), 0);
    }

    function cancel(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (seed >> 8 & 15 > 0) revert("seldom");
        ILedger.Run memory r = _run(seed);
        _send(_mostly(r.submitter, seed >> 16), abi.encodeCall(ILedger.cancel, (r)), 0);
    }

    function close(uint256 seed) external now_ {
        seed = _mixed(seed);
        _send(_person(seed >> 8), abi.encodeCall(ILedger.close, (_run(seed))), 0);
    }

    function commit(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = seed % _runs.length;
        ILedger.Run memory r = _runs[n];
        ILedger.RunState memory state = ledger.runOf(_ids[n]);
        uint256 size = 1 + (seed >> 8) % 3;
        if (state.committed + size > r.segments && seed >> 16 & 7 > 0) size = r.segments - state.committed;
        ILedger.Commitment[] memory batch = new ILedger.Commitment[](size);
        bytes32[] memory true_ = new bytes32[](size);
        for (uint256 i = 0; i < size; ++i) {
            (batch[i], true_[i]) = _commitment(n, r, state, uint32(i), seed >> 24);
        }
        _send(_mostly(r.operator, seed >> 100), abi.encodeCall(ILedger.commit, (r, batch)), 0);
        for (uint256 i = 0; i < size; ++i) {
            _enter(n, state, batch[i], uint32(i), true_[i]);
        }
    }

    function draw(uint256 seed) external now_ {
        seed = _mixed(seed);
        (uint256 n, ILedger.Run memory r, ILedger.Segment memory s) = _pending(seed);
        _send(_person(seed >> 32), abi.encodeCall(ILedger.draw, (r, s)), 0);
        if (_entered[n].outcome != ILedger.Outcome.Pending) _report("drawn when it was over");
    }

    function unseal(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = _next(seed, true);
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        bytes32 secret = _secrets[63 - _shown[_entered[n].run]];
        if (seed >> 32 & 31 == 0) secret = bytes32(seed);
        bytes memory data =
            abi.encodeCall(ILedger.unseal, (r, s, secret, bytes32(uint256(2)), _entered[n].trueRecord, 0));
        _send(_mostly(r.operator, seed >> 40), data, 0);
        ++_shown[_entered[n].run];
    }

    function forfeit(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = _next(seed, true);
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        _send(_person(seed >> 32), abi.encodeCall(ILedger.forfeit, (r, s)), 0);
        _rejected(n);
    }

    function finalise(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = _next(seed, false);
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        _send(_person(seed >> 32), abi.encodeCall(ILedger.finalise, (r, s)), 0);
        _finalised(n);
    }

    function resolve(uint256 seed) external now_ {
        seed = _mixed(seed);
        (uint256 n, ILedger.Run memory r, ILedger.Segment memory s) = _pending(seed);
        bool upheld = seed >> 32 & 1 == 0;
        address culprit = seed >> 33 & 1 == 0 ? _person(seed >> 40) : address(0);
        _send(_mostly(r.court, seed >> 48), abi.encodeCall(ILedger.resolve, (r, s, upheld, culprit)), 0);
        if (upheld) _rejected(n);
        if (ledger.segmentOf(_name(s)).flags == 0) _report("resolved without a flag");
    }

    function seal(uint256 seed) external now_ {
        seed = _mixed(seed);
        (uint256 n, ILedger.Run memory r, ILedger.Segment memory s) = _pending(seed);
        address caller = _person(seed >> 32);
        address[] memory assigned = ledger.assignedOf(r, s);
        if (assigned.length > 0 && assigned[0] != address(0) && seed >> 40 & 1 == 0) caller = assigned[0];
        address account = ledger.accountOf(caller);
        Said memory said = Said(true, seed >> 48 & 1 > 0, bytes32(uint256(2 - (seed >> 56 & 1))));
        bytes32 verdict = keccak256(abi.encode(_name(s), account, said.ok, said.witness, bytes32(0)));
        _send(caller, abi.encodeCall(ILedger.seal, (r, s, verdict)), _value(r, seed >> 64));
        if (_said[n][account].sealed_) _report("sealed twice");
        _said[n][account] = said;
        _votes.push(Vote(n, account));
    }

    function reveal(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (_votes.length == 0) revert("nothing sealed");
        uint256 last = (seed >> 8 & 3 == 0 ? seed >> 10 : seed & 3) % _votes.length;
        (uint256 n, address caller) =
            (_votes[_votes.length - 1 - last].segment, _votes[_votes.length - 1 - last].account);
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        Said memory said = _said[n][ledger.accountOf(caller)];
        if (seed >> 40 & 15 == 0) said.ok = !said.ok;
        _send(caller, abi.encodeCall(ILedger.reveal, (r, s, said.ok, said.witness, 0)), 0);
        if (said.ok != _said[n][ledger.accountOf(caller)].ok) _report("another verdict than was sealed");
    }

    function settle(uint256 seed) external now_ {
        seed = _mixed(seed);
        (uint256 n, address account) = _toSettle(seed);
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        _send(_person(seed >> 40), abi.encodeCall(ILedger.settle, (r, s, account)), 0);
        if (_settled[n][account]) _report("settled twice");
        if (_entered[n].outcome == ILedger.Outcome.Pending) _report("settled before it was over");
        _settled[n][account] = true;
    }

    function demand(uint256 seed) external now_ {
        seed = _mixed(seed);
        (uint256 n, ILedger.Run memory r, ILedger.Segment memory s) = _pending(seed);
        ILedger.Tree tree = ILedger.Tree((seed >> 32) % 3);
        uint64 index = uint64(seed >> 40) % 3;
        ILedger.Leaf memory entry = _leaf(_entries, seed >> 48 & 1);
        if (seed >> 50 & 15 == 0) entry.index ^= 1;
        bytes32 root = tree == ILedger.Tree.State ? s.poststate : s.stepsRoot;
        if (tree == ILedger.Tree.Tensor) root = seed >> 48 & 1 == 0 ? _tensor : sha256("");
        bytes memory data = abi.encodeCall(ILedger.demand, (r, s, tree, index, entry));
        _send(_person(seed >> 56), data, _value(r, seed >> 64));
        _asked.push(Asked(n, root, index, 2, keccak256(abi.encode(_name(s), root, index, uint64(2)))));
        if (ledger.demandOf(_asked[_asked.length - 1].id).account == address(0)) _report("a demand that is not there");
    }

    function answer(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (_asked.length == 0) revert("nothing asked");
        Asked memory asked = _asked[seed % _asked.length];
        Entered storage entered = _entered[asked.segment];
        bytes[] memory items = asked.root == entered.segment.stepsRoot
            ? _steps
            : asked.root == entered.segment.poststate ? _entries : _chunks;
        ILedger.Leaf memory leaf = _leaf(items, asked.index);
        if (seed >> 40 & 7 == 0) leaf.data = _steps[1 - asked.index];
        ILedger.Run memory r = _runs[entered.run];
        bytes memory data = abi.encodeCall(
            ILedger.answer, (r, entered.segment, asked.root, asked.index, asked.count, leaf.data, leaf.proof)
        );
        _send(_person(seed >> 32), data, 0);
        if (keccak256(leaf.data) != keccak256(items[asked.index])) _report("a false answer");
    }

    function withheld(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (_asked.length == 0) revert("nothing asked");
        _withheld(_asked[seed % _asked.length], _person(seed >> 32), false);
    }

    function claim(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = _any(seed);
        uint256 leaf = seed >> 32 & 3;
        _send(_person(seed >> 40), _claim(n, leaf, ILedger.claim.selector), 0);
        if (_entered[n].outcome != ILedger.Outcome.Final) _report("paid before it was final");
        _pay(n, leaf, _amount(_entered[n].segment, leaf));
    }

    function compensate(uint256 seed) external now_ {
        seed = _mixed(seed);
        uint256 n = _any(seed);
        (uint256 leaf, ILedger.Segment memory s) = (seed >> 32 & 3, _entered[n].segment);
        _send(_person(seed >> 40), _claim(n, leaf, ILedger.compensate.selector), 0);
        if (_entered[n].outcome != ILedger.Outcome.Rejected) _report("compensated for what was not rejected");
        _pay(n, leaf, _harm(s, leaf));
    }

    /// @notice Adds everything up.
    function look(uint256 seed) external now_ {
        seed = _mixed(seed);
        if (seed & 3 > 0) revert("seldom");
        this.check();
    }

    // ---------------------------------------------------------------------------------------------- what must hold

    /// @notice The ledger owes what it says it holds, and every segment is what the calls have made of it.
    function check() external {
        address[2] memory coins = [address(0), address(token)];
        for (uint256 i = 0; i < 2; ++i) {
            uint256 owed = _owed(coins[i]);
            if (owed != ledger.held(coins[i])) _report("held is not the sum of its parts");
            uint256 owned = i == 0 ? address(ledger).balance : token.balanceOf(address(ledger));
            if (owned < owed) _report("insolvent");
        }
        for (uint256 n = 0; n < _entered.length; ++n) {
            ILedger.Outcome outcome = ledger.outcomeOf(_runs[_entered[n].run], _entered[n].segment);
            if (outcome != _entered[n].outcome) _report("another outcome");
        }
    }

    /// @notice Everybody goes home: runs end without their operators' help, and all balances are withdrawn.
    function windUp() external {
        this.check();
        for (uint256 n = 0; n < _runs.length; ++n) {
            _end(n);
        }
        for (uint256 n = 0; n < _runs.length; ++n) {
            _leave(n);
        }
        for (uint256 n = 0; n < _asked.length; ++n) {
            _withheld(_asked[n], people[0], true);
        }
        for (uint256 n = 0; n < _entered.length; ++n) {
            _settleAll(n);
        }
        _sleep(UNBONDING);
        _releaseAll();
        this.check();
        address[2] memory coins = [address(0), address(token)];
        for (uint256 i = 0; i < 2; ++i) {
            for (uint256 p = 0; p < people.length; ++p) {
                uint256 amount = ledger.balanceOf(coins[i], people[p]);
                _must(people[p], abi.encodeCall(ILedger.withdraw, (coins[i], amount, people[p])));
            }
            uint256 left = ledger.balanceOf(coins[i], BURN) + _harmLeft(coins[i]);
            if (ledger.held(coins[i]) != left) _report("somebody's money is still there");
        }
    }

    /// @dev After each call: what may only grow.
    function _watch() private {
        for (uint256 n = 0; n < _ids.length; ++n) {
            ILedger.RunState memory state = ledger.runOf(_ids[n]);
            Seen memory was = _before[n];
            bool again = state.attempt > was.attempt;
            if (state.finalised < was.finalised) _report("a final segment is gone");
            if (state.committed < was.committed && !again) _report("a segment is gone without a rejection");
            if (state.opened < was.opened && !again) _report("an opened segment is closed");
            if (state.attempt < was.attempt || state.seats < was.seats) _report("counted backwards");
            if (state.finalised > state.committed || state.committed > _runs[n].segments) {
                _report("more than there are");
            }
            if (state.finalised > state.opened && _opened(_runs[n])) _report("final, not opened");
            if (uint8(state.status) < uint8(was.status)) _report("a run is young again");
            if (state.escrow > was.escrow && uint8(was.status) > 0) _report("an escrow has grown");
            _before[n] = Seen(
                state.status,
                state.seats,
                state.committed,
                state.finalised,
                state.opened,
                state.attempt,
                uint112(state.escrow)
            );
        }
        if (address(ledger).balance < ledger.held(address(0))) _report("insolvent");
        if (token.balanceOf(address(ledger)) < ledger.held(address(token))) _report("insolvent");
    }

    function _owed(address coin) private view returns (uint256 owed) {
        owed = ledger.balanceOf(coin, BURN);
        for (uint256 p = 0; p < people.length; ++p) {
            owed += ledger.balanceOf(coin, people[p]);
        }
        for (uint256 n = 0; n < _runs.length; ++n) {
            if (_runs[n].token == coin) owed += _owedByRun(n);
        }
        for (uint256 n = 0; n < _entered.length; ++n) {
            if (_runs[_entered[n].run].token == coin) owed += _owedBySegment(n);
        }
        for (uint256 n = 0; n < _asked.length; ++n) {
            ILedger.Run storage r = _runs[_entered[_asked[n].segment].run];
            if (r.token == coin && _isLast(n)) owed += r.flagBond;
        }
    }

    /// @dev Whether a demand is open, and not made again later.
    function _isLast(uint256 n) private view returns (bool) {
        if (ledger.demandOf(_asked[n].id).account == address(0)) return false;
        for (uint256 later = n + 1; later < _asked.length; ++later) {
            if (_asked[later].id == _asked[n].id) return false;
        }
        return true;
    }

    function _owedByRun(uint256 n) private view returns (uint256 owed) {
        ILedger.RunState memory state = ledger.runOf(_ids[n]);
        owed = uint256(state.escrow) + state.pot;
        for (uint256 p = 0; p < people.length; ++p) {
            for (uint256 role = 0; role < 3; ++role) {
                owed += ledger.bondOf(_ids[n], ILedger.Role(role), people[p]).amount;
            }
        }
    }

    function _owedBySegment(uint256 n) private view returns (uint256 owed) {
        Entered storage entered = _entered[n];
        bytes32 name = _name(entered.segment);
        ILedger.SegmentState memory state = ledger.segmentOf(name);
        for (uint256 p = 0; p < people.length; ++p) {
            ILedger.Verdict memory verdict = ledger.verdictOf(name, people[p]);
            if (verdict.mark == 0 || verdict.settled) continue;
            if (!verdict.assigned) owed += _runs[entered.run].flagBond;
            if (verdict.revealed && !verdict.ok) owed += state.share;
        }
        if (entered.outcome == ILedger.Outcome.Final) owed += entered.segment.payout - entered.paid;
        if (entered.outcome == ILedger.Outcome.Rejected) owed += state.harm - entered.paid;
    }

    // --------------------------------------------------------------------------------------------------- winding up

    function _end(uint256 n) private {
        ILedger.Run memory r = _runs[n];
        ILedger.Status status = ledger.runOf(_ids[n]).status;
        if (status == ILedger.Status.Open || status == ILedger.Status.Active) {
            _must(r.submitter, abi.encodeCall(ILedger.cancel, (r)));
        }
        while (ledger.runOf(_ids[n]).committed > ledger.runOf(_ids[n]).finalised) {
            _endSegment(_find(n, ledger.runOf(_ids[n]).finalised));
            if (bytes(fault).length > 0) return;
        }
        if (ledger.runOf(_ids[n]).status == ILedger.Status.Closed) return;
        _sleep(r.answer + r.dispute);
        _must(people[0], abi.encodeCall(ILedger.close, (r)));
    }

    function _endSegment(uint256 n) private {
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        bytes32 name = _name(s);
        while (r.verifiers > 0 && ledger.segmentOf(name).drawnAt == 0 && bytes(fault).length == 0) {
            height += ledger.DELAY() + 1;
            _sleep(0);
            _must(people[0], abi.encodeCall(ILedger.draw, (r, s)));
        }
        _sleep(WINDOW + r.answer + r.dispute);
        for (uint256 i = 0; i < _asked.length; ++i) {
            if (_asked[i].segment == n && ledger.demandOf(_asked[i].id).account != address(0)) {
                _withheld(_asked[i], people[0], true);
                return;
            }
        }
        if (_opened(r) && ledger.segmentOf(name).openedAt == 0) {
            _must(people[0], abi.encodeCall(ILedger.forfeit, (r, s)));
            _rejected(n);
        } else {
            _must(people[0], abi.encodeCall(ILedger.finalise, (r, s)));
            _finalised(n);
        }
    }

    function _leave(uint256 n) private {
        ILedger.Run memory r = _runs[n];
        for (uint256 i = 0; i < 3 * people.length; ++i) {
            (ILedger.Role role, address account) = (ILedger.Role(i % 3), people[i / 3]);
            ILedger.Bond memory bond = ledger.bondOf(_ids[n], role, account);
            if (bond.exists && bond.releaseAt == 0) _must(account, abi.encodeCall(ILedger.resign, (r, role)));
        }
    }

    function _settleAll(uint256 n) private {
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        address[] memory assigned = ledger.assignedOf(r, s);
        for (uint256 i = 0; i < people.length + assigned.length; ++i) {
            address account = i < people.length ? people[i] : assigned[i - people.length];
            bool known = i < people.length ? _said[n][account].sealed_ : account != address(0);
            if (!known || _settled[n][account]) continue;
            _must(people[0], abi.encodeCall(ILedger.settle, (r, s, account)));
            _settled[n][account] = true;
        }
        for (uint256 leaf = 0; leaf < 4; ++leaf) {
            if (_paid[n][leaf]) continue;
            bool isFinal = _entered[n].outcome == ILedger.Outcome.Final;
            if (isFinal) {
                _must(people[0], _claim(n, leaf, ILedger.claim.selector));
                _pay(n, leaf, _amount(s, leaf));
            } else if (_entered[n].outcome == ILedger.Outcome.Rejected && !_isCulprit(s, leaf)) {
                _must(people[0], _claim(n, leaf, ILedger.compensate.selector));
                _pay(n, leaf, _harm(s, leaf));
            }
        }
    }

    function _releaseAll() private {
        for (uint256 n = 0; n < _runs.length; ++n) {
            for (uint256 i = 0; i < 3 * people.length; ++i) {
                (ILedger.Role role, address account) = (ILedger.Role(i % 3), people[i / 3]);
                if (!ledger.bondOf(_ids[n], role, account).exists) continue;
                _must(people[0], abi.encodeCall(ILedger.release, (_runs[n], role, account)));
            }
        }
    }

    function _harmLeft(address coin) private view returns (uint256 left) {
        for (uint256 n = 0; n < _entered.length; ++n) {
            if (_runs[_entered[n].run].token != coin || _entered[n].outcome != ILedger.Outcome.Rejected) continue;
            left += ledger.segmentOf(_name(_entered[n].segment)).harm - _entered[n].paid;
        }
    }

    function _isCulprit(ILedger.Segment memory s, uint256 leaf) private view returns (bool) {
        address culprit = ledger.segmentOf(_name(s)).culprit;
        return culprit != address(0) && ledger.accountOf(people[leaf + 6]) == ledger.accountOf(culprit);
    }

    /// @dev To the next time that matters to some segment that is pending.
    function _toNext(uint256 seed) private {
        if (_entered.length == 0) return;
        (, ILedger.Run memory r, ILedger.Segment memory s) = _pending(seed);
        ILedger.SegmentState memory state = ledger.segmentOf(_name(s));
        if (r.verifiers > 0 && state.drawnAt == 0) {
            height += ledger.DELAY() + 1;
            return;
        }
        uint256 start = r.verifiers == 0 ? s.time : state.drawnAt;
        uint256[4] memory edges =
            [start + WINDOW / 2, start + WINDOW, start + WINDOW + r.answer, start + WINDOW + r.answer + r.dispute];
        for (uint256 i = 0; i < 4; ++i) {
            if (edges[i] > time) {
                time = edges[i];
                return;
            }
        }
    }

    function _sleep(uint256 seconds_) private {
        time += seconds_;
        vm.warp(time);
        vm.roll(height);
    }

    // ------------------------------------------------------------------------------------------------------- calls

    /// @dev A call of the ledger. Its refusal is ours, if it is one of the ledger's own; and nobody else has less afterwards.
    /// Coins outside of the ledger are nobody's concern here, and forge has taken them from an account before.
    function _send(address sender, bytes memory data, uint256 value) private {
        address other = people[(data.length + time + height) % people.length];
        (uint256 coins, uint256 tokens) = (ledger.balanceOf(address(0), other), ledger.balanceOf(address(token), other));
        if (sender.balance < value) vm.deal(sender, 1e18);
        vm.prank(sender);
        (bool done, bytes memory result) = address(ledger).call{value: value}(data);
        if (!done) {
            if (!_known[bytes4(result)]) {
                _report("refused with no error of the ledger's");
                return;
            }
            assembly ("memory-safe") {
                revert(add(result, 32), mload(result))
            }
        }
        if (other == sender) return;
        bool less = ledger.balanceOf(address(0), other) < coins || ledger.balanceOf(address(token), other) < tokens;
        if (less) _report("another's balance is less");
    }

    function _must(address sender, bytes memory data) private {
        vm.prank(sender);
        (bool done,) = address(ledger).call(data);
        if (!done) _report("refused at the end");
    }

    function _report(string memory what) private {
        if (bytes(fault).length == 0) fault = what;
    }

    function _withheld(Asked memory asked, address sender, bool must) private {
        uint256 n = asked.segment;
        if (must && ledger.demandOf(asked.id).account == address(0)) return;
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        bytes memory data = abi.encodeCall(ILedger.withheld, (r, s, asked.root, asked.index, asked.count));
        bool pending = _entered[n].outcome == ILedger.Outcome.Pending;
        if (must) _must(sender, data);
        else _send(sender, data, 0);
        if (pending) _rejected(n);
    }

    function _finalised(uint256 n) private {
        if (_entered[n].outcome != ILedger.Outcome.Pending) _report("final, and was not pending");
        _entered[n].outcome = ILedger.Outcome.Final;
    }

    function _rejected(uint256 n) private {
        if (_entered[n].outcome != ILedger.Outcome.Pending) _report("rejected, and was not pending");
        for (uint256 i = 0; i < _entered.length; ++i) {
            bool after_ = _entered[i].run == _entered[n].run && _entered[i].segment.index > _entered[n].segment.index;
            if (after_ && _entered[i].outcome == ILedger.Outcome.Pending) {
                _entered[i].outcome = ILedger.Outcome.Dropped;
            }
        }
        _entered[n].outcome = ILedger.Outcome.Rejected;
    }

    function _pay(uint256 n, uint256 leaf, uint256 amount) private {
        if (_paid[n][leaf]) _report("paid twice");
        _paid[n][leaf] = true;
        _entered[n].paid += amount;
        ILedger.Segment storage s = _entered[n].segment;
        uint256 most = _entered[n].outcome == ILedger.Outcome.Final ? s.payout : ledger.segmentOf(_name(s)).harm;
        if (_entered[n].paid > most) _report("more than there was to pay");
    }

    // ------------------------------------------------------------------------------------------------- what is made

    function _terms(uint256 seed) private view returns (ILedger.Run memory r) {
        r.record = sha256("record");
        r.initialState = keccak256("initial");
        (r.submitter, r.operator, r.court) = (_person(seed), _person(seed >> 8), _person(seed >> 16));
        (r.token, r.beacon) = (_coin(seed >> 24), address(beacon));
        (r.segments, r.tensors, r.work) = (uint32(1 + (seed >> 28) % 6), 2, 10);
        (r.price, r.operatorFee, r.verifierFee) = (uint96(seed >> 32 & 7), 5, 7);
        (r.operatorBond, r.workerBond) = (uint96((seed >> 40) % 1003), uint96(101 * (seed >> 48 & 1)));
        (r.verifierBond, r.flagBond) = (uint96(61 * (seed >> 49 & 1)), uint96(1 + (seed >> 50) % 20));
        (r.pot, r.jackpot) = (uint96((seed >> 56) % 300), uint96((seed >> 64) % 200));
        (r.rate, r.verifiers) = (seed >> 72 & 3 == 0 ? 1 << 31 : type(uint32).max, uint8((seed >> 80) % 4));
        uint32[3] memory rates = [0, 1 << 31, type(uint32).max];
        r.forcedRate = rates[(seed >> 88) % 3];
        (r.reporterShare, r.harmedShare) = (uint8((seed >> 96) % 60), uint8((seed >> 104) % 60));
        (r.missPenalty, r.window) = (uint8((seed >> 112) % 101), WINDOW);
        (r.answer, r.dispute, r.salt) = (uint32(seed >> 120 & 15), uint32(seed >> 128 & 15), bytes32(seed));
    }

    function _remember(ILedger.Run memory r) private {
        _runs.push(r);
        _ids.push(keccak256(abi.encode(r)));
    }

    function _commitment(uint256 n, ILedger.Run memory r, ILedger.RunState memory state, uint32 place, uint256 seed)
        private
        view
        returns (ILedger.Commitment memory given, bytes32 trueRecord)
    {
        Records.SegmentRecord memory record;
        record.run = r.record;
        record.index = state.committed + place;
        record.steps = 2;
        record.poststate = _state;
        record.prestate = place == 0 ? state.state : record.poststate;
        record.stepsRoot = _stepsRoot;
        given.record = Writer.segment(record, 0, seed);
        given.work = uint64(4 + seed % 7);
        (given.payoutRoot, given.payout) = SumTrees.root(_items(given.work * r.price));
        trueRecord = sha256(given.record);
        uint256 shown = _shown[n] + record.index - state.opened;
        bool isForced = shown < 64 && ledger.forced(r, record.index, state.attempt, _secrets[63 - shown]);
        if (isForced != (seed >> 8 & 15 == 0)) trueRecord = keccak256(abi.encode(seed)); // now and then not what is due
        given.seal = keccak256(abi.encode(trueRecord, bytes32(0)));
    }

    function _enter(
        uint256 n,
        ILedger.RunState memory state,
        ILedger.Commitment memory given,
        uint32 place,
        bytes32 trueRecord
    ) private {
        ILedger.Segment memory s;
        (s.run, s.index, s.attempt, s.steps) = (_ids[n], state.committed + place, state.attempt, 2);
        s.record = sha256(given.record);
        s.poststate = _state;
        s.prestate = place == 0 ? state.state : s.poststate;
        s.stepsRoot = _stepsRoot;
        (s.payoutRoot, s.payout, s.work, s.seal) = (given.payoutRoot, given.payout, given.work, given.seal);
        (s.time, s.blockNumber, s.seats) = (uint64(time), uint64(height), state.seats);
        if (ledger.segmentOf(_name(s)).outcome != ILedger.Outcome.Pending) _report("committed under another name");
        _entered.push(Entered(s, n, trueRecord, ILedger.Outcome.Pending, 0));
    }

    function _claim(uint256 n, uint256 leaf, bytes4 selector) private view returns (bytes memory) {
        (ILedger.Run memory r, ILedger.Segment memory s) = (_runs[_entered[n].run], _entered[n].segment);
        SumTrees.Item[] memory items = _items(s.payout);
        (bytes32[] memory proof, uint128[] memory sums) = SumTrees.proof(items, leaf);
        return abi.encodeWithSelector(
            selector, r, s, uint32(leaf), uint32(4), items[leaf].key, items[leaf].amount, proof, sums
        );
    }

    /// @dev Four leaves of any total: an account, another, and two keys, one of which earns nothing.
    function _items(uint256 total) private view returns (SumTrees.Item[] memory items) {
        items = new SumTrees.Item[](4);
        for (uint256 leaf = 0; leaf < 4; ++leaf) {
            uint256 amount = leaf == 3 ? 0 : leaf == 0 ? total - 2 * (total / 3) : total / 3;
            items[leaf] = SumTrees.Item(people[6 + leaf], uint128(amount));
        }
    }

    function _amount(ILedger.Segment memory s, uint256 leaf) private view returns (uint256) {
        return _items(s.payout)[leaf].amount;
    }

    function _harm(ILedger.Segment memory s, uint256 leaf) private view returns (uint256) {
        return s.payout == 0 ? 0 : uint256(ledger.segmentOf(_name(s)).harm) * _amount(s, leaf) / s.payout;
    }

    function _leaf(bytes[] memory items, uint256 index) private pure returns (ILedger.Leaf memory) {
        bytes32[] memory hashes = _hashes(items);
        return ILedger.Leaf(items[index], uint64(index), uint64(items.length), Trees.proof(hashes, index));
    }

    function _hashes(bytes[] memory items) private pure returns (bytes32[] memory hashes) {
        hashes = new bytes32[](items.length);
        for (uint256 i = 0; i < items.length; ++i) {
            hashes[i] = Trees.leaf(items[i]);
        }
    }

    function _shape(uint64 axis) private pure returns (uint64[] memory shape) {
        shape = new uint64[](1);
        shape[0] = axis;
    }

    // ------------------------------------------------------------------------------------------------ what is chosen

    /// @dev Forge prefers small numbers; choices are made by all bits.
    function _mixed(uint256 seed) private pure returns (uint256) {
        return uint256(keccak256(abi.encode(seed)));
    }

    function _coin(uint256 seed) private view returns (address) {
        return seed & 1 == 0 ? address(0) : address(token);
    }

    function _person(uint256 seed) private view returns (address) {
        return people[uint8(seed) % people.length];
    }

    function _mostly(address account, uint256 seed) private view returns (address) {
        return seed & 15 == 0 ? _person(seed >> 4) : account;
    }

    function _value(ILedger.Run memory r, uint256 seed) private pure returns (uint256) {
        if (seed & 7 > 0) return 0;
        return r.token == address(0) || seed & 8 > 0 ? seed >> 8 & 1023 : 0;
    }

    function _run(uint256 seed) private view returns (ILedger.Run memory) {
        if (_runs.length == 0) revert("no run");
        return _runs[seed % _runs.length];
    }

    function _any(uint256 seed) private view returns (uint256) {
        if (_entered.length == 0) revert("no segment");
        return uint16(seed) % _entered.length;
    }

    /// @dev Mostly the first segment of a run that is not final, so that something comes of it; now and then any.
    function _pending(uint256 seed) private view returns (uint256 n, ILedger.Run memory r, ILedger.Segment memory s) {
        n = seed >> 24 & 3 > 0 ? _next(seed, false) : _any(seed);
        for (uint256 i = 0; i < _entered.length && _entered[n].outcome != ILedger.Outcome.Pending; ++i) {
            if (seed >> 26 & 15 == 0) break;
            n = n + 1 == _entered.length ? 0 : n + 1;
        }
        (r, s) = (_runs[_entered[n].run], _entered[n].segment);
    }

    /// @dev Mostly a verdict that waits for it, else anything.
    function _toSettle(uint256 seed) private view returns (uint256 n, address account) {
        (n, account) = (_any(seed), _person(seed >> 32));
        if (seed >> 40 & 7 == 0) return (n, account);
        for (uint256 i = 0; i < _votes.length; ++i) {
            Vote memory vote = _votes[(i + (seed >> 48)) % _votes.length];
            bool over = _entered[vote.segment].outcome != ILedger.Outcome.Pending;
            if (over && !_settled[vote.segment][vote.account]) return (vote.segment, vote.account);
        }
    }

    /// @dev The segment that its run has to open, or to make final, next; now and then any.
    function _next(uint256 seed, bool toOpen) private view returns (uint256) {
        uint256 any = _any(seed);
        if (seed >> 16 & 15 == 0) return any;
        for (uint256 tried = 0; tried < _runs.length; ++tried) {
            uint256 run = (tried + (seed >> 20 & 3 == 0 ? seed >> 22 : _focus)) % _runs.length;
            ILedger.RunState memory state = ledger.runOf(_ids[run]);
            uint32 index = toOpen ? state.opened : state.finalised;
            if (index < state.committed) return _find(run, index);
        }
        return any;
    }

    function _find(uint256 run, uint32 index) private view returns (uint256) {
        for (uint256 n = 0; n < _entered.length; ++n) {
            bool here = _entered[n].run == run && _entered[n].segment.index == index;
            if (here && _entered[n].outcome == ILedger.Outcome.Pending) return n;
        }
        revert("no such segment");
    }

    function _opened(ILedger.Run memory r) private pure returns (bool) {
        return r.verifiers > 0 || r.forcedRate > 0;
    }

    function _name(ILedger.Segment memory s) private pure returns (bytes32) {
        return keccak256(abi.encode(s));
    }
}
