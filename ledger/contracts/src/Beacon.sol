// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Blockhash} from "@openzeppelin/contracts/utils/Blockhash.sol";
import {IBeacon} from "./ILedger.sol";

/// @notice The hash of a block as its beacon: of the last 256 blocks from the EVM, of the last 8,191 from EIP-2935's history
/// contract; 0 for the present block, later ones and forgotten ones. Whoever proposes a block can withhold it, once for
/// every slot that it owns, and so choose between two beacons at the price of a block.
contract Beacon is IBeacon {
    /// @inheritdoc IBeacon
    function beaconOf(uint64 blockNumber) external view returns (bytes32) {
        return Blockhash.blockHash(blockNumber);
    }
}
