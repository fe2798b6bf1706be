// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "./ILedger.sol";

/// @notice Reads the records of docs/formats.md that a contract has to understand. Numbers are little-endian.
library Records {
    uint256 private constant SEGMENT_RECORD = 274; // bytes
    uint256 private constant LEAF = 4096; // bytes of a tensor in a leaf

    /// @notice What the ledger needs of a SegmentRecord, version 2.
    struct SegmentRecord {
        bytes32 run;
        uint32 index;
        uint32 steps;
        bytes32 prestate;
        bytes32 poststate;
        bytes32 stepsRoot;
        bytes32 previous;
    }

    function segment(bytes memory data) internal pure returns (SegmentRecord memory record) {
        if (data.length != SEGMENT_RECORD) revert ILedger.BadRecord("length");
        if (bytes2(_word(data, 0)) != 0x0402) revert ILedger.BadRecord("kind");
        record.run = _word(data, 2);
        record.index = _u32(bytes4(_word(data, 34)));
        record.steps = _u32(bytes4(_word(data, 46)));
        record.prestate = _word(data, 50);
        record.poststate = _word(data, 82);
        record.stepsRoot = _word(data, 114);
        record.previous = _word(data, 178);
    }

    /// @notice The tensor root in a TensorEntry, and how many leaves its tensor has.
    function tensor(bytes calldata data) internal pure returns (bytes32 root, uint64 leaves) {
        if (data.length < 2 || bytes2(data) != 0x0601) revert ILedger.BadRecord("entry");
        (, uint256 offset) = _bytes(data, 2); // the name
        bytes calldata dtype;
        (dtype, offset) = _bytes(data, offset);
        uint256 size = _itemSize(dtype);
        _need(data, offset, 4);
        uint256 axes = _u32(bytes4(data[offset:]));
        offset += 4;
        if (data.length != offset + 8 * axes + 32) revert ILedger.BadRecord("entry");
        for (uint256 i = 0; i < axes; ++i) {
            size = _times(size, _u64(data, offset));
            offset += 8;
        }
        root = bytes32(data[offset:]);
        leaves = uint64((size + LEAF - 1) / LEAF);
    }

    /// @dev Refused where it passes 2^64, also where a later axis is 0.
    function _times(uint256 size, uint256 axis) private pure returns (uint256 product) {
        product = size * axis; // both below 2^64
        if (product > type(uint64).max) revert ILedger.BadRecord("entry");
    }

    function _itemSize(bytes calldata dtype) private pure returns (uint256) {
        bytes32 name = keccak256(dtype);
        if (name == keccak256("f32") || name == keccak256("i32")) return 4;
        if (name == keccak256("i64")) return 8;
        if (name == keccak256("i8") || name == keccak256("bool")) return 1;
        revert ILedger.BadRecord("entry");
    }

    /// @dev u32 length and as many bytes, and where they end.
    function _bytes(bytes calldata data, uint256 offset) private pure returns (bytes calldata value, uint256 end) {
        _need(data, offset, 4);
        end = offset + 4 + _u32(bytes4(data[offset:]));
        _need(data, offset, end - offset);
        value = data[offset + 4:end];
    }

    function _need(bytes calldata data, uint256 offset, uint256 length) private pure {
        if (data.length < offset + length) revert ILedger.BadRecord("entry");
    }

    function _u64(bytes calldata data, uint256 offset) private pure returns (uint64) {
        return uint64(_u32(bytes4(data[offset:]))) | uint64(_u32(bytes4(data[offset + 4:]))) << 32;
    }

    function _u32(bytes4 data) private pure returns (uint32 value) {
        value = uint32(data);
        value = (value & 0xff00ff00) >> 8 | (value & 0x00ff00ff) << 8;
        value = value >> 16 | value << 16;
    }

    /// @dev The 32 bytes from `offset` on, where there are that many.
    function _word(bytes memory data, uint256 offset) private pure returns (bytes32 word) {
        assembly ("memory-safe") {
            word := mload(add(add(data, 32), offset))
        }
    }
}
