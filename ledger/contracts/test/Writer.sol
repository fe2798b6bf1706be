// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Records} from "../src/Records.sol";

/// @notice Writes the records of docs/formats.md, whose numbers are little-endian.
library Writer {
    /// @dev `rest` is what fills the fields that the ledger does not read.
    function segment(Records.SegmentRecord memory record, uint64 firstStep, uint256 rest)
        internal
        pure
        returns (bytes memory)
    {
        bytes memory head =
            abi.encodePacked(hex"0402", record.run, u32(record.index), u64(firstStep), u32(record.steps));
        bytes memory roots =
            abi.encodePacked(record.prestate, record.poststate, record.stepsRoot, rest, record.previous);
        return bytes.concat(head, roots, bytes32(rest), bytes32(~rest));
    }

    function entry(bytes memory name, string memory dtype, uint64[] memory shape, bytes32 root)
        internal
        pure
        returns (bytes memory data)
    {
        data = abi.encodePacked(hex"0601", u32(uint32(name.length)), name, u32(uint32(bytes(dtype).length)), dtype);
        data = bytes.concat(data, u32(uint32(shape.length)));
        for (uint256 i = 0; i < shape.length; ++i) {
            data = bytes.concat(data, u64(shape[i]));
        }
        data = bytes.concat(data, root);
    }

    function u32(uint32 value) internal pure returns (bytes4) {
        return bytes4(uint32(uint64(u64(value)) >> 32));
    }

    function u64(uint64 value) internal pure returns (bytes8 little) {
        for (uint256 i = 0; i < 8; ++i) {
            little |= bytes8(uint64(uint8(value >> 8 * i)) << uint64(56 - 8 * i));
        }
    }
}
