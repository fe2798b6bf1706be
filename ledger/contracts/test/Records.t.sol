// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ILedger} from "../src/ILedger.sol";
import {Records} from "../src/Records.sol";
import {Writer} from "./Writer.sol";
import {vm} from "./Vm.sol";

/// @notice Records.sol as others see it.
contract Reader {
    function segment(bytes calldata data) external pure returns (Records.SegmentRecord memory) {
        return Records.segment(data);
    }

    function tensor(bytes calldata data) external pure returns (bytes32 root, uint64 leaves) {
        return Records.tensor(data);
    }
}

/// @notice What is written by docs/formats.md is read, and nothing else.
contract RecordsTest {
    Reader private immutable _reader = new Reader();

    function testFuzz_a_segment_is_read(Records.SegmentRecord calldata given, uint64 firstStep, uint256 rest)
        external
        view
    {
        bytes memory data = Writer.segment(given, firstStep, rest);
        require(keccak256(abi.encode(_reader.segment(data))) == keccak256(abi.encode(given)), "as it was written");
    }

    function testFuzz_another_kind_or_length(Records.SegmentRecord calldata given, uint16 kind, uint16 length)
        external
        view
    {
        bytes memory data = Writer.segment(given, 0, 0);
        if (kind != 0x0402) {
            (data[0], data[1]) = (bytes1(uint8(kind >> 8)), bytes1(uint8(kind)));
            require(_refuses(abi.encodeCall(Reader.segment, (data)), "kind"), "another kind");
        }
        length %= 600;
        if (length != 274) require(_refuses(abi.encodeCall(Reader.segment, (new bytes(length))), "length"), "length");
    }

    function testFuzz_an_entry_is_read(bytes calldata name, uint8 kind, uint64[] calldata shape, bytes32 root)
        external
        view
    {
        (string memory dtype, uint256 width) = _dtype(kind);
        if (shape.length > 20) shape = shape[:20];
        bytes memory call_ = abi.encodeCall(Reader.tensor, (Writer.entry(name, dtype, shape, root)));
        (uint256 size, bool fits) = _size(width, shape);
        if (!fits) {
            require(_refuses(call_, "entry"), "too large");
            return;
        }
        (bytes32 found, uint64 leaves) = _read(call_);
        require(found == root && leaves == size / 4096 + (size % 4096 == 0 ? 0 : 1), "as it was written");
    }

    /// @dev Shapes that fit, which chance seldom gives.
    function testFuzz_small_shapes(bytes calldata name, uint8 kind, uint16[3] calldata axes, bytes32 root)
        external
        view
    {
        (string memory dtype, uint256 width) = _dtype(kind);
        uint64[] memory shape = new uint64[](3);
        for (uint256 i = 0; i < 3; ++i) {
            shape[i] = axes[i];
        }
        (, uint64 leaves) = _read(abi.encodeCall(Reader.tensor, (Writer.entry(name, dtype, shape, root))));
        require(leaves == (width * shape[0] * shape[1] * shape[2] + 4095) / 4096, "as many leaves as the bytes need");
    }

    function testFuzz_a_cut_or_longer_entry(bytes calldata name, uint8 kind, uint64[] calldata shape, uint256 cut)
        external
        view
    {
        if (shape.length > 20) shape = shape[:20];
        (string memory dtype,) = _dtype(kind);
        bytes memory data = Writer.entry(name, dtype, shape, bytes32(cut));
        require(_refuses(abi.encodeCall(Reader.tensor, (bytes.concat(data, hex"00"))), "entry"), "longer");
        bytes memory shorter = new bytes(cut % data.length);
        for (uint256 i = 0; i < shorter.length; ++i) {
            shorter[i] = data[i];
        }
        require(_refuses(abi.encodeCall(Reader.tensor, (shorter)), "entry"), "cut");
    }

    function testFuzz_any_bytes(bytes calldata data, bool begun) external view {
        bytes memory given = begun ? bytes.concat(hex"0601", data) : data;
        (bool done, bytes memory answer) = address(_reader).staticcall(abi.encodeCall(Reader.tensor, (given)));
        require(done || _says(answer, "entry"), "read, or refused as no entry");
    }

    function testFuzz_another_dtype(bytes calldata name, string calldata dtype) external view {
        for (uint8 kind = 0; kind < 5; ++kind) {
            (string memory known,) = _dtype(kind);
            vm.assume(keccak256(bytes(dtype)) != keccak256(bytes(known)));
        }
        bytes memory data = Writer.entry(name, dtype, new uint64[](0), 0);
        require(_refuses(abi.encodeCall(Reader.tensor, (data)), "entry"), "no such dtype");
    }

    function _dtype(uint8 kind) private pure returns (string memory, uint256) {
        if (kind % 5 == 0) return ("f32", 4);
        if (kind % 5 == 1) return ("i8", 1);
        if (kind % 5 == 2) return ("i32", 4);
        if (kind % 5 == 3) return ("i64", 8);
        return ("bool", 1);
    }

    function _size(uint256 width, uint64[] calldata shape) private pure returns (uint256 size, bool fits) {
        size = width;
        for (uint256 i = 0; i < shape.length; ++i) {
            size *= shape[i];
            if (size >= 2 ** 64) return (0, false);
        }
        return (size, true);
    }

    function _read(bytes memory call_) private view returns (bytes32 root, uint64 leaves) {
        (bool done, bytes memory answer) = address(_reader).staticcall(call_);
        require(done, "refused");
        return abi.decode(answer, (bytes32, uint64));
    }

    function _refuses(bytes memory call_, string memory field) private view returns (bool) {
        (bool done, bytes memory answer) = address(_reader).staticcall(call_);
        return !done && _says(answer, field);
    }

    function _says(bytes memory answer, string memory field) private pure returns (bool) {
        return keccak256(answer) == keccak256(abi.encodeWithSelector(ILedger.BadRecord.selector, field));
    }
}
