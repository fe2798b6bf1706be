// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice Inclusion proofs in the trees of RFC 6962, section 2.1, with SHA-256.
library Rfc6962 {
    /// @notice H(0x00 | data).
    function leafHash(bytes calldata data) internal pure returns (bytes32) {
        return sha256(abi.encodePacked(uint8(0), data));
    }

    /// @notice Whether `hash` is leaf `index` of `count` under `root`. `proof` is the siblings from the leaf upwards; its
    /// length must be the one that index and count fix.
    /// @dev RFC 9162, section 2.1.3.2. `last` is the index of the level's last tree node; where ours is that one and has no
    /// sibling, it goes up unchanged.
    function includes(bytes32 root, bytes32 hash, uint64 index, uint64 count, bytes32[] calldata proof)
        internal
        pure
        returns (bool)
    {
        if (index >= count) return false;
        uint64 last = count - 1;
        for (uint256 i = 0; i < proof.length; ++i) {
            if (last == 0) return false; // too long
            if (index & 1 == 1 || index == last) {
                hash = sha256(abi.encodePacked(uint8(1), proof[i], hash));
                while (index & 1 == 0 && index != 0) {
                    index >>= 1;
                    last >>= 1;
                }
            } else {
                hash = sha256(abi.encodePacked(uint8(1), hash, proof[i]));
            }
            index >>= 1;
            last >>= 1;
        }
        return last == 0 && hash == root; // else too short, or another
    }
}
