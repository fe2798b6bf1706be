// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice An account with code. It does what it is told, and when it is paid it calls back, or refuses. For tests.
contract Receiver {
    address public target;
    bytes public call_;
    bool public refuses;
    bool public succeeded;
    bytes public answer;

    function set(address target_, bytes calldata data, bool refuses_) external {
        (target, call_, refuses) = (target_, data, refuses_);
    }

    /// Calls `to` as this account; a failure is the caller's.
    function act(address to, bytes calldata data) external payable {
        (bool done, bytes memory result) = to.call{value: msg.value}(data);
        if (!done) {
            assembly ("memory-safe") {
                revert(add(result, 32), mload(result))
            }
        }
    }

    receive() external payable {
        require(!refuses);
        if (target != address(0)) (succeeded, answer) = target.call(call_);
    }
}

/// @notice Gives its money to an account that did not ask for it.
contract Bomb {
    constructor(address payable to) payable {
        selfdestruct(to);
    }
}
