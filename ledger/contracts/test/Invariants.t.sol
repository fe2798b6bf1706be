// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Handler} from "./Handler.sol";

/// @notice Any calls, in any order, by anybody: no money is made or lost, nobody is paid before or twice, nothing goes back
/// but by a rejection, and in the end everybody has out what is theirs.
contract InvariantsTest {
    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    Handler public handler;

    function setUp() external {
        handler = new Handler();
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    /// @dev Nobody of the handler's people, one of whom was twice found without the coins that it was dealt.
    function targetSenders() external pure returns (address[] memory senders) {
        senders = new address[](1);
        senders[0] = address(0xcafe);
    }

    /// @dev The often needed stand there more than once.
    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[54] memory often = [
            handler.pass.selector,
            handler.pass.selector,
            handler.pass.selector,
            handler.pass.selector,
            handler.deposit.selector,
            handler.withdraw.selector,
            handler.delegate.selector,
            handler.open.selector,
            handler.accept.selector,
            handler.begin.selector,
            handler.join.selector,
            handler.join.selector,
            handler.join.selector,
            handler.resign.selector,
            handler.release.selector,
            handler.cancel.selector,
            handler.close.selector,
            handler.commit.selector,
            handler.commit.selector,
            handler.draw.selector,
            handler.draw.selector,
            handler.draw.selector,
            handler.unseal.selector,
            handler.unseal.selector,
            handler.unseal.selector,
            handler.unseal.selector,
            handler.forfeit.selector,
            handler.finalise.selector,
            handler.finalise.selector,
            handler.finalise.selector,
            handler.resolve.selector,
            handler.resolve.selector,
            handler.resolve.selector,
            handler.seal.selector,
            handler.seal.selector,
            handler.seal.selector,
            handler.seal.selector,
            handler.reveal.selector,
            handler.reveal.selector,
            handler.reveal.selector,
            handler.reveal.selector,
            handler.reveal.selector,
            handler.settle.selector,
            handler.settle.selector,
            handler.demand.selector,
            handler.demand.selector,
            handler.answer.selector,
            handler.answer.selector,
            handler.withheld.selector,
            handler.claim.selector,
            handler.claim.selector,
            handler.compensate.selector,
            handler.compensate.selector,
            handler.look.selector
        ];
        targets = new FuzzSelector[](1);
        targets[0].addr = address(handler);
        targets[0].selectors = new bytes4[](often.length);
        for (uint256 i = 0; i < often.length; ++i) {
            targets[0].selectors[i] = often[i];
        }
    }

    function invariant_nothing_that_must_not_happen() external view {
        require(bytes(handler.fault()).length == 0, handler.fault());
    }

    function afterInvariant() external {
        handler.windUp();
        require(bytes(handler.fault()).length == 0, handler.fault());
    }
}
