"""What a block holds, as a name: a chained hash over the tokens from the sequence's start.

The hash of a full block covers its tokens and the hash of the block before it, so that equal names
mean equal KV. The chain starts from a keyed hash of the request's salt: who does not know this
process's key can neither guess names nor craft two contents with one name, and requests with
different salts never meet.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

import numpy as np
import numpy.typing as npt

BlockHash = bytes
"""HASH_BYTES bytes."""

HASH_BYTES: Final = 16
MAX_SALT_BYTES: Final = 64
_KEY: Final = secrets.token_bytes(32)
_SHARED: Final = b"salt"
_PRIVATE: Final = b"request"


def root_hash(salt: bytes) -> BlockHash:
    """Where the chains of all requests with this salt start."""
    return hashlib.blake2b(salt, digest_size=HASH_BYTES, key=_KEY, person=_SHARED).digest()


def private_root_hash(request_key: int) -> BlockHash:
    """Where the chains of one request start that shares with no other."""
    salt = request_key.to_bytes(8, "little")
    return hashlib.blake2b(salt, digest_size=HASH_BYTES, key=_KEY, person=_PRIVATE).digest()


def extend_hashes(
    hashes: list[BlockHash],
    root: BlockHash,
    token_ids: npt.NDArray[np.int32],
    num_tokens: int,
    block_size: int,
) -> None:
    """Append the hashes of the full blocks of token_ids[:num_tokens] that `hashes` lacks."""
    begin, end = len(hashes) * block_size, num_tokens // block_size * block_size
    data = token_ids[begin:end].tobytes()
    parent = hashes[-1] if hashes else root
    stride = block_size * token_ids.itemsize
    blake2b = hashlib.blake2b
    for offset in range(0, len(data), stride):
        parent = blake2b(parent + data[offset : offset + stride], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
