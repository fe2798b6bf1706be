// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @notice A token of which anybody may mint. For tests.
contract MockToken is ERC20("Mock", "MOCK") {
    uint256 public fee; // burnt of each transferFrom

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function setFee(uint256 fee_) external {
        fee = fee_;
    }

    function transferFrom(address from, address to, uint256 amount) public virtual override returns (bool) {
        super.transferFrom(from, to, amount);
        if (fee > 0) _burn(to, fee);
        return true;
    }
}

/// @notice Moves nothing and says so with false.
contract FalseToken is MockToken {
    bool public honest = true;

    function setHonest(bool honest_) external {
        honest = honest_;
    }

    function transfer(address to, uint256 amount) public override returns (bool) {
        return honest && super.transfer(to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) public override returns (bool) {
        return honest && super.transferFrom(from, to, amount);
    }
}

/// @notice Moves, and returns nothing, as some old tokens do.
contract SilentToken {
    mapping(address account => uint256) public balanceOf;

    function mint(address to, uint256 amount) external {
        balanceOf[to] += amount;
    }

    function approve(address, uint256) external {}

    function transfer(address to, uint256 amount) external {
        balanceOf[msg.sender] -= amount;
        balanceOf[to] += amount;
    }

    function transferFrom(address from, address to, uint256 amount) external {
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
    }
}

/// @notice Calls somebody in the middle of each transfer, as a token with hooks would, and keeps the answer.
contract HookedToken is MockToken {
    address public target;
    bytes public call_;
    bool public succeeded;
    bytes public answer;

    function setHook(address target_, bytes calldata data) external {
        (target, call_) = (target_, data);
    }

    function _update(address from, address to, uint256 amount) internal override {
        super._update(from, to, amount);
        if (target != address(0)) (succeeded, answer) = target.call(call_);
    }
}
