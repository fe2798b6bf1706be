// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {ILedger} from "./ILedger.sol";

/// @notice Hot keys: a machine that trains or verifies holds one of these, and its owner's account stays at home.
abstract contract Keys is ILedger {
    bytes32 private constant DOMAIN =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
    bytes32 private constant DELEGATE = keccak256("Delegate(address account,uint256 deadline)");

    mapping(address key => address account) private _accounts;

    /// @inheritdoc ILedger
    /// @dev The key signs, so nobody can claim the receipts of another's key; the domain ties it to this chain and contract.
    function delegate(address key, uint256 deadline, bytes calldata signature) external {
        if (block.timestamp >= deadline) revert TooLate(deadline);
        bytes32 message = keccak256(abi.encode(DELEGATE, msg.sender, deadline));
        bytes32 digest = MessageHashUtils.toTypedDataHash(DOMAIN_SEPARATOR(), message);
        (address signer, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (fault != ECDSA.RecoverError.NoError || signer != key) revert BadSignature();
        if (_accounts[key] != address(0)) revert Already();
        _accounts[key] = msg.sender;
        emit Delegated(msg.sender, key);
    }

    /// @inheritdoc ILedger
    function accountOf(address key) public view returns (address) {
        address account = _accounts[key];
        return account == address(0) ? key : account;
    }

    /// @inheritdoc ILedger
    /// @dev Made each time, so that it stays right where a chain splits.
    function DOMAIN_SEPARATOR() public view returns (bytes32) {
        return keccak256(abi.encode(DOMAIN, keccak256("Trueweight"), keccak256("1"), block.chainid, address(this)));
    }

    /// @dev An account may always act for itself, also where it is a key of another.
    function _onlyFor(address account) internal view {
        if (msg.sender != account && accountOf(msg.sender) != account) revert NotAllowed();
    }
}
