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
from typing import NamedTuple

from aphrodite.core.block_pool import BlockPool
from aphrodite.core.request import Request, RequestStatus
from aphrodite.core.scheduler_config import SchedulerConfig

DIGEST_BYTES = 16


class BlockHasher:
    """Extends a sequence's list of block digests as its tokens become known."""

    __slots__ = ("_keyed", "block_size")

    def __init__(self, block_size: int, key: bytes | None = None) -> None:
        """`key`: up to 64 bytes, random if not given."""
        self.block_size = block_size
        self._keyed = blake2b(digest_size=DIGEST_BYTES, key=secrets.token_bytes(32) if key is None else key)

    def extend(
        self,
        digests: list[bytes],
        tokens: array[int],
        num_blocks: int,
        salt: bytes | None,
        adapter: int | None = None,
    ) -> None:
        """Append digests until there are `num_blocks`; tokens of earlier digests are not read again.

        Args:
            digests: digests of the sequence's first blocks, extended in place.
            tokens: the sequence's token ids as int32, at least `num_blocks * block_size` of them.
            salt: what the sequence may share blocks with; None and b"" are different salts.
            adapter: number of the adapter that computes it, which never shares blocks with another.
        """
        if len(digests) >= num_blocks:
            return
        size = self.block_size
        parent = digests[-1] if digests else self._root(salt, adapter)
        for start in range(len(digests) * size, num_blocks * size, size):
            state = self._keyed.copy()
            state.update(parent)
            state.update(tokens[start : start + size].tobytes())
            parent = state.digest()
            digests.append(parent)

    def _root(self, salt: bytes | None, adapter: int | None) -> bytes:
        # A leading byte keeps "no salt" and every salt apart, and those of adapters. A root can be taken for no block's
        # digest: the digests of blocks cover 16 + 4 * block_size bytes of which the first 16 are a keyed digest.
        state = self._keyed.copy()
        if adapter is not None:
            state.update(b"\x02" + adapter.to_bytes(8, "little"))
        state.update(b"\x00" if salt is None else b"\x01" + salt)
        return state.digest()


class FoundPrefix(NamedTuple):
    """Blocks that hold a request's first tokens already, and the request they are borrowed from, if so."""

    blocks: list[int]
    source: Request | None


class PrefixCache:
    """Finds blocks of `pool` by the tokens that they hold, and makes them findable.

    Attributes:
        num_queries: prompt tokens looked up so far.
        num_hits: of these, tokens found.
    """

    __slots__ = ("_config", "_hasher", "_pool", "num_hits", "num_queries")

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self._hasher = BlockHasher(config.block_size)
        self.num_queries = 0
        self.num_hits = 0

    def find(self, request: Request) -> FoundPrefix | None:
        """What is there of a request's tokens, be the cache enabled or not.

        At least one token is left to compute: a step has to bring logits. None: better to wait, another member
        of its group is computing the prompt.
        """
        if request.needs_every_position:
            return FoundPrefix([], None)
        size = self._config.block_size
        limit = (len(request.tokens) + request.num_pending - 1) // size
        if request.awaits_prompt_logprobs:
            limit = min(limit, request.num_prompt_logprobs // size)
        found: list[int] = []
        if self._config.enable_prefix_caching:
            limit = min(limit, len(request.tokens) // size)
            self._hasher.extend(request.digests, request.tokens, limit, request.cache_salt, request.adapter)
            for digest in request.digests[:limit]:
                block = self._pool.lookup(digest)
                if block is None:
                    break
                found.append(block)
        group = request.group
        if group is None or len(found) >= group.num_shared_blocks or request.awaits_prompt_logprobs:
            return FoundPrefix(found, None)
        source = group.source(size)
        if source is not None:
            return FoundPrefix(source.blocks[: group.num_shared_blocks], source)
        if request.status is RequestStatus.WAITING:
            if any(member.status is RequestStatus.RUNNING for member in group.members):
                return None
            group.leader = request
        return FoundPrefix(found, None)

    def register(self, request: Request) -> None:
        """Make a request's full blocks findable, now that their content is known and written."""
        if not self._config.enable_prefix_caching or not request.registers:
            return
        full = request.num_committed // self._config.block_size
        self._hasher.extend(request.digests, request.tokens, full, request.cache_salt, request.adapter)
        for index in range(request.num_registered, full):
            self._pool.register(request.blocks[index], request.digests[index])
        request.num_registered = full

    def count_hits(self, request: Request, source: Request | None) -> None:
        """Count what the cache, and not `source`, another of its group, had of a request that starts."""
        counts = self._config.enable_prefix_caching and not request.needs_every_position
        if counts and source is None and request.row is None:
            self.num_queries += request.num_prompt_tokens
            self.num_hits += request.num_computed
