// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IBeacon, ILedger} from "../ILedger.sol";

/// @notice A beacon that says what it is told. For tests.
contract MockBeacon is IBeacon {
    mapping(uint64 blockNumber => bytes32) public beaconOf;

    function set(uint64 blockNumber, bytes32 beacon) external {
        beaconOf[blockNumber] = beacon;
    }
}

/// @notice A court that anybody may speak for. For tests.
contract MockCourt {
    function resolve(
        ILedger ledger,
        ILedger.Run calldata run,
        ILedger.Segment calldata segment,
        bool upheld,
        address culprit
    ) external {
        ledger.resolve(run, segment, upheld, culprit);
    }
}
