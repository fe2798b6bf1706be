// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice The trees as RFC 6962, section 2.1, defines them: by recursion, and slow. What is tested walks up instead.
library Trees {
    function leaf(bytes memory data) internal pure returns (bytes32) {
        return sha256(abi.encodePacked(uint8(0), data));
    }

    function root(bytes32[] memory leaves) internal pure returns (bytes32) {
        return leaves.length == 0 ? sha256("") : _root(leaves, 0, leaves.length);
    }

    /// @notice Siblings of leaf `index`, from the leaf upwards.
    function proof(bytes32[] memory leaves, uint256 index) internal pure returns (bytes32[] memory) {
        return _proof(leaves, index, 0, leaves.length);
    }

    /// @notice Whether the siblings of leaf `index` of `count` are on the same sides as those of `other` of `size`: a proof
    /// does not tell the two apart.
    function sameWay(uint256 index, uint256 count, uint256 other, uint256 size) internal pure returns (bool) {
        if (index >= count || other >= size) return false;
        if (count == 1 || size == 1) return count == size;
        (uint256 half, uint256 otherHalf) = (split(count), split(size));
        if ((index < half) != (other < otherHalf)) return false;
        return index < half
            ? sameWay(index, half, other, otherHalf)
            : sameWay(index - half, count - half, other - otherHalf, size - otherHalf);
    }

    function _root(bytes32[] memory leaves, uint256 from, uint256 until) private pure returns (bytes32) {
        if (until - from == 1) return leaves[from];
        uint256 middle = from + split(until - from);
        return sha256(abi.encodePacked(uint8(1), _root(leaves, from, middle), _root(leaves, middle, until)));
    }

    function _proof(bytes32[] memory leaves, uint256 index, uint256 from, uint256 until)
        private
        pure
        returns (bytes32[] memory)
    {
        if (until - from == 1) return new bytes32[](0);
        uint256 middle = from + split(until - from);
        return index < middle
            ? _append(_proof(leaves, index, from, middle), _root(leaves, middle, until))
            : _append(_proof(leaves, index, middle, until), _root(leaves, from, middle));
    }

    function _append(bytes32[] memory list, bytes32 last) private pure returns (bytes32[] memory longer) {
        longer = new bytes32[](list.length + 1);
        for (uint256 i = 0; i < list.length; ++i) {
            longer[i] = list[i];
        }
        longer[list.length] = last;
    }

    /// @dev The largest power of two below `size`, which is 2 or more.
    function split(uint256 size) internal pure returns (uint256 half) {
        half = 1;
        while (2 * half < size) half *= 2;
    }
}

/// @notice The same for sums: leaf H(0x00 | leaf | key | amount), node H(0x01 | left | its sum | right | its sum).
library SumTrees {
    struct Item {
        address key;
        uint128 amount;
    }

    function root(Item[] memory items) internal pure returns (bytes32 hash, uint128 sum) {
        return _root(items, 0, items.length);
    }

    function proof(Item[] memory items, uint256 index)
        internal
        pure
        returns (bytes32[] memory hashes, uint128[] memory sums)
    {
        return _proof(items, index, 0, items.length);
    }

    function _root(Item[] memory items, uint256 from, uint256 until) private pure returns (bytes32, uint128) {
        if (until - from == 1) {
            Item memory item = items[from];
            return (sha256(abi.encodePacked(uint8(0), uint32(from), item.key, item.amount)), item.amount);
        }
        uint256 middle = from + Trees.split(until - from);
        (bytes32 left, uint128 leftSum) = _root(items, from, middle);
        (bytes32 right, uint128 rightSum) = _root(items, middle, until);
        return (sha256(abi.encodePacked(uint8(1), left, leftSum, right, rightSum)), leftSum + rightSum);
    }

    function _proof(Item[] memory items, uint256 index, uint256 from, uint256 until)
        private
        pure
        returns (bytes32[] memory hashes, uint128[] memory sums)
    {
        if (until - from == 1) return (new bytes32[](0), new uint128[](0));
        uint256 middle = from + Trees.split(until - from);
        bool left = index < middle;
        (bytes32[] memory lower, uint128[] memory lowerSums) =
            left ? _proof(items, index, from, middle) : _proof(items, index, middle, until);
        (bytes32 hash, uint128 sum) = left ? _root(items, middle, until) : _root(items, from, middle);
        hashes = new bytes32[](lower.length + 1);
        sums = new uint128[](lower.length + 1);
        for (uint256 i = 0; i < lower.length; ++i) {
            (hashes[i], sums[i]) = (lower[i], lowerSums[i]);
        }
        (hashes[lower.length], sums[lower.length]) = (hash, sum);
    }
}
