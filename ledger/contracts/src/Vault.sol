// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {ILedger} from "./ILedger.sol";

/// @notice The table of balances and its two doors, `deposit` and `withdraw`. Only these two call a token or a receiver.
/// @dev Invariant for every token: the contract owns at least `held`, and `held` is the sum of all that is owed. So money
/// inside only moves between entries: whatever `_take` takes out of a balance is written down elsewhere by its caller, and
/// comes back by `_credit`.
abstract contract Vault is ILedger, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    /// The token that is the chain's own currency.
    address internal constant NATIVE = address(0);

    /// Whose balance is what was burnt. Nobody has its key.
    address internal constant BURN = 0x000000000000000000000000000000000000dEaD;

    uint256 public immutable cap;

    mapping(address token => uint256) public held;
    mapping(address token => mapping(address account => uint256)) public balanceOf;

    constructor(uint256 cap_) {
        cap = cap_;
    }

    /// @inheritdoc ILedger
    function deposit(address token, uint256 amount) external payable nonReentrant {
        if (token == NATIVE) {
            if (amount != msg.value) revert NotArrived(amount, msg.value);
        } else {
            if (msg.value != 0) revert NotArrived(0, msg.value);
            _pull(IERC20(token), amount);
        }
        _hold(token, amount);
        _credit(token, msg.sender, amount);
        emit Deposited(token, msg.sender, amount);
    }

    /// @inheritdoc ILedger
    function withdraw(address token, uint256 amount, address to) external nonReentrant {
        uint256 had = balanceOf[token][msg.sender];
        if (had < amount) revert Insufficient(amount, had);
        unchecked {
            balanceOf[token][msg.sender] = had - amount; // just compared
        }
        held[token] -= amount;
        emit Withdrawn(token, msg.sender, to, amount);
        if (!_push(token, amount, to)) revert TransferFailed();
    }

    /// @dev First step of every payable function: takes note of native currency sent along. The caller's balance gets it in
    /// `_take`, the last step, so that paying out of what was just sent writes no balance.
    function _arrive(address token) internal {
        if (msg.value == 0) return;
        if (token != NATIVE) revert NotArrived(0, msg.value);
        _hold(NATIVE, msg.value);
        emit Deposited(NATIVE, msg.sender, msg.value);
    }

    /// @dev Last step of every payable function, once: what was sent along goes in, `amount` comes out.
    function _take(address token, uint256 amount) internal {
        if (amount == msg.value) return;
        uint256 had = balanceOf[token][msg.sender] + msg.value;
        if (had < amount) revert Insufficient(amount, had);
        unchecked {
            balanceOf[token][msg.sender] = had - amount; // just compared
        }
    }

    function _credit(address token, address account, uint256 amount) internal {
        if (amount > 0) balanceOf[token][account] += amount;
    }

    function _burn(address token, uint256 amount) internal {
        _credit(token, BURN, amount);
    }

    function _hold(address token, uint256 amount) private {
        uint256 before = held[token];
        if (amount > cap - before) revert CapExceeded(cap);
        unchecked {
            held[token] = before + amount; // at most cap
        }
    }

    function _pull(IERC20 token, uint256 amount) private {
        if (address(token).code.length == 0) revert TransferFailed();
        uint256 before = token.balanceOf(address(this));
        if (!token.trySafeTransferFrom(msg.sender, address(this), amount)) revert TransferFailed();
        uint256 got = token.balanceOf(address(this)) - before;
        if (got != amount) revert NotArrived(amount, got);
    }

    function _push(address token, uint256 amount, address to) private returns (bool done) {
        if (token != NATIVE) return IERC20(token).trySafeTransfer(to, amount);
        (done,) = to.call{value: amount}("");
    }
}
