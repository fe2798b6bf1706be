// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Proofs} from "../src/Proofs.sol";
import {SumTrees, Trees} from "./Trees.sol";
import {vm} from "./Vm.sol";

/// @notice Inclusion proofs against trees made by recursion.
contract ProofsTest {
    Proofs private immutable _proofs = new Proofs();

    function testFuzz_rfc6962_as_defined(uint256 seed, uint8 size, uint8 place) external view {
        (bytes32[] memory leaves, uint64 count, uint64 index) = _leaves(seed, size, place);
        bytes32 root = Trees.root(leaves);
        bytes32[] memory proof = Trees.proof(leaves, index);
        require(_proofs.includes(root, _data(seed, index), index, count, proof), "a true proof");
        require(!_proofs.includes(root, _data(seed, index + 1), index, count, proof), "another leaf");
        require(!_proofs.includes(~root, _data(seed, index), index, count, proof), "another root");
    }

    function testFuzz_rfc6962_another_place(uint256 seed, uint8 size, uint8 place, uint64 other, uint64 count)
        external
        view
    {
        (bytes32[] memory leaves, uint64 n, uint64 index) = _leaves(seed, size, place);
        (other, count) = (other % 80, count % 80);
        bool found = _proofs.includes(Trees.root(leaves), _data(seed, index), other, count, Trees.proof(leaves, index));
        require(found == Trees.sameWay(index, n, other, count), "found where it is, and nowhere else");
    }

    function testFuzz_rfc6962_another_proof(uint256 seed, uint8 size, uint8 place, uint8 level, uint256 flip)
        external
        view
    {
        (bytes32[] memory leaves, uint64 count, uint64 index) = _leaves(seed, size, place);
        bytes32 root = Trees.root(leaves);
        bytes memory data = _data(seed, index);
        bytes32[] memory proof = Trees.proof(leaves, index);
        require(!_proofs.includes(root, data, index, count, _resized(proof, proof.length + 1)), "too long");
        if (proof.length == 0) return;
        require(!_proofs.includes(root, data, index, count, _resized(proof, proof.length - 1)), "too short");
        proof[level % proof.length] ^= bytes32(flip == 0 ? 1 : flip);
        require(!_proofs.includes(root, data, index, count, proof), "another sibling");
    }

    function testFuzz_rfc6962_any_input(
        bytes32 root,
        bytes calldata data,
        uint64 index,
        uint64 count,
        bytes32[] calldata p
    ) external view {
        bool found = _proofs.includes(root, data, index, count, p); // whatever it is, it is answered
        require(!found || p.length == 0, "nothing is found by chance");
    }

    function testFuzz_sums_as_defined(uint256 seed, uint8 size, uint8 place) external view {
        (SumTrees.Item[] memory items, uint32 count, uint32 leaf) = _items(seed, size, place);
        (bytes32 root, uint128 total) = SumTrees.root(items);
        (bytes32[] memory proof, uint128[] memory sums) = SumTrees.proof(items, leaf);
        SumTrees.Item memory item = items[leaf];
        require(_proofs.pays(root, total, leaf, count, item.key, item.amount, proof, sums), "a true proof");
        require(!_proofs.pays(root, total, leaf + 1, count, item.key, item.amount, proof, sums), "another leaf");
        address key = address(uint160(item.key) ^ 1);
        require(!_proofs.pays(root, total, leaf, count, key, item.amount, proof, sums), "another key");
        require(!_proofs.pays(root, total, leaf, count, item.key, item.amount + 1, proof, sums), "another amount");
        require(!_proofs.pays(root, total + 1, leaf, count, item.key, item.amount, proof, sums), "another sum");
        require(!_proofs.pays(~root, total, leaf, count, item.key, item.amount, proof, sums), "another root");
    }

    function testFuzz_sums_another_proof(uint256 seed, uint8 size, uint8 place, uint8 level, uint128 change)
        external
        view
    {
        (SumTrees.Item[] memory items, uint32 count, uint32 leaf) = _items(seed, size, place);
        (bytes32 root, uint128 total) = SumTrees.root(items);
        (bytes32[] memory proof, uint128[] memory sums) = SumTrees.proof(items, leaf);
        SumTrees.Item memory item = items[leaf];
        vm.assume(proof.length > 0 && change > 0);
        uint256 i = level % proof.length;
        bytes32 hash = proof[i];
        proof[i] ^= bytes32(uint256(change));
        require(!_proofs.pays(root, total, leaf, count, item.key, item.amount, proof, sums), "another sibling");
        proof[i] = hash;
        unchecked {
            sums[i] += change; // also where the sum passes 2^128
        }
        require(!_proofs.pays(root, total, leaf, count, item.key, item.amount, proof, sums), "another sum beside it");
        uint128[] memory fewer = new uint128[](proof.length - 1);
        require(
            !_proofs.pays(root, total, leaf, count, item.key, item.amount, proof, fewer), "fewer sums than siblings"
        );
    }

    /// @dev What can be proved of any one root adds up to no more than its sum: here of a tree whose maker lies.
    function testFuzz_sums_of_a_lying_tree(uint64 left, uint64 right, uint128 total, uint8 lie) external view {
        (bytes32 a, bytes32 b) = (_sumLeaf(0, address(1), left), _sumLeaf(1, address(2), right));
        if (lie & 2 == 0) total = uint128(left) + right;
        uint128 said = lie & 1 == 0 ? left : right; // the sums that the maker writes into the root
        bytes32 root = sha256(abi.encodePacked(uint8(1), a, said, b, right));
        bool first = _proofs.pays(root, total, 0, 2, address(1), left, _one(b), _one(right));
        bool second = _proofs.pays(root, total, 1, 2, address(2), right, _one(a), _one(said));
        uint256 paid = (first ? uint256(left) : 0) + (second ? uint256(right) : 0);
        require(paid <= total, "no more than the sum");
        require(!first || (left == said && uint256(left) + right == total), "only where the sums are true");
    }

    function _sumLeaf(uint32 leaf, address key, uint128 amount) private pure returns (bytes32) {
        return sha256(abi.encodePacked(uint8(0), leaf, key, amount));
    }

    function _one(bytes32 item) private pure returns (bytes32[] memory list) {
        list = new bytes32[](1);
        list[0] = item;
    }

    function _one(uint128 item) private pure returns (uint128[] memory list) {
        list = new uint128[](1);
        list[0] = item;
    }

    function _leaves(uint256 seed, uint8 size, uint8 place)
        private
        pure
        returns (bytes32[] memory leaves, uint64 count, uint64 index)
    {
        count = size % 40 + 1;
        index = uint64(place) % count;
        leaves = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            leaves[i] = Trees.leaf(_data(seed, i));
        }
    }

    function _data(uint256 seed, uint256 index) private pure returns (bytes memory) {
        return abi.encodePacked(seed, index);
    }

    function _items(uint256 seed, uint8 size, uint8 place)
        private
        pure
        returns (SumTrees.Item[] memory items, uint32 count, uint32 leaf)
    {
        count = size % 40 + 1;
        leaf = uint32(place) % count;
        items = new SumTrees.Item[](count);
        for (uint256 i = 0; i < count; ++i) {
            uint256 dice = uint256(keccak256(abi.encode(seed, i)));
            items[i] = SumTrees.Item(address(uint160(dice)), uint128(dice >> 160)); // 40 x 2^96 fit
        }
    }

    function _resized(bytes32[] memory list, uint256 length) private pure returns (bytes32[] memory other) {
        other = new bytes32[](length);
        for (uint256 i = 0; i < length && i < list.length; ++i) {
            other[i] = list[i];
        }
    }
}
