// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice Inclusion proofs in a Merkle sum tree of RFC 6962's shape: every tree node binds the sums of both its halves, so
/// no set of leaves that can be proved adds up to more than the root's sum. SHA-256, big-endian.
library SumTree {
    /// @notice H(0x00 | leaf u32 | key 20 bytes | amount u128).
    function leafHash(uint32 leaf, address key, uint128 amount) internal pure returns (bytes32) {
        return sha256(abi.encodePacked(uint8(0), leaf, key, amount));
    }

    /// @notice Whether `hash`, of `amount`, is leaf `index` of `count` in the tree of this root and sum. Walks as
    /// Rfc6962.includes does. A sum beyond 2^128 is refused.
    function includes(
        bytes32 root,
        uint128 total,
        bytes32 hash,
        uint128 amount,
        uint32 index,
        uint32 count,
        bytes32[] calldata proof,
        uint128[] calldata sums
    ) internal pure returns (bool) {
        if (index >= count || proof.length != sums.length) return false;
        uint32 last = count - 1;
        for (uint256 i = 0; i < proof.length; ++i) {
            if (last == 0) return false; // too long
            if (amount > type(uint128).max - sums[i]) return false;
            if (index & 1 == 1 || index == last) {
                hash = sha256(abi.encodePacked(uint8(1), proof[i], sums[i], hash, amount));
                while (index & 1 == 0 && index != 0) {
                    index >>= 1;
                    last >>= 1;
                }
            } else {
                hash = sha256(abi.encodePacked(uint8(1), hash, amount, proof[i], sums[i]));
            }
            amount += sums[i];
            index >>= 1;
            last >>= 1;
        }
        return last == 0 && hash == root && amount == total; // else too short, or another
    }
}
