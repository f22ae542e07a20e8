"""Digests that name the content of a full KV block: its tokens and everything before them.

KV of a block depends on all tokens up to its end, so a digest is chained: BLAKE2b-128 (RFC 7693), keyed, over
the parent block's digest and the block's own token ids. The key is random per process, hence nobody outside
can search for two prompts with equal digests, and at 128 bits an accidental match stays below 2^-64 for 2^32
blocks: the digest is the comparison. The chain's root takes a salt, so that adapters or tenants never see
each other's blocks, not even through timing.
"""

from __future__ import annotations

import secrets
from array import array
from hashlib import blake2b

DIGEST_BYTES = 16


class BlockHasher:
    """Extends a sequence's list of block digests as its tokens become known."""

    __slots__ = ("_keyed", "block_size")

    def __init__(self, block_size: int, key: bytes | None = None) -> None:
        """`key`: up to 64 bytes, random if not given."""
        self.block_size = block_size
        self._keyed = blake2b(digest_size=DIGEST_BYTES, key=secrets.token_bytes(32) if key is None else key)

    def extend(self, digests: list[bytes], tokens: array[int], num_blocks: int, salt: bytes | None) -> None:
        """Append digests until there are `num_blocks`; tokens of earlier digests are not read again.

        Args:
            digests: digests of the sequence's first blocks, extended in place.
            tokens: the sequence's token ids as int32, at least `num_blocks * block_size` of them.
            salt: what the sequence may share blocks with; None and b"" are different salts.
        """
        if len(digests) >= num_blocks:
            return
        size = self.block_size
        parent = digests[-1] if digests else self._root(salt)
        for start in range(len(digests) * size, num_blocks * size, size):
            state = self._keyed.copy()
            state.update(parent)
            state.update(tokens[start : start + size].tobytes())
            parent = state.digest()
            digests.append(parent)

    def _root(self, salt: bytes | None) -> bytes:
        # A leading byte keeps "no salt" and every salt apart. A root can be taken for no block's digest: the
        # digests of blocks cover 16 + 4 * block_size bytes of which the first 16 are a keyed digest.
        state = self._keyed.copy()
        state.update(b"\x00" if salt is None else b"\x01" + salt)
        return state.digest()
