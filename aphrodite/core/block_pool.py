"""The KV cache's blocks: who holds them, which are free, and which free ones still hold a known prefix.

A block is in one of three states: *used* (referenced by at least one block table), *cached* (referenced by
none, but findable by the digest of its content) or *free* (its content means nothing). Cached and free blocks
sit together in one doubly linked list, the next one to be taken at its front, so eviction is simply taking.
The list is intrusive (two preallocated arrays), hence every operation costs O(1) a block, whatever the pool's
size. Reference counting of blocks follows PagedAttention (Kwon et al., 2023, arXiv:2309.06180).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks `0 .. num_blocks - 1` with a map from content digest to block."""

    __slots__ = ("_by_digest", "_digests", "_next", "_num_cached", "_num_free", "_prev", "_refs", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        # A ring through the sentinel `num_blocks`: its successor is taken first, its predecessor last.
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self._num_free = num_blocks
        self._num_cached = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free ones and cached ones."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody references and that still hold a findable prefix."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        """Blocks referenced by at least one block table."""
        return self.num_blocks - self._num_free

    def lookup(self, digest: bytes) -> int | None:
        """The block that holds the content with this digest, if any."""
        return self._by_digest.get(digest)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each referenced once; cached ones among them are forgotten, least recent first.

        Raises:
            RuntimeError: fewer than `count` are available; nothing was taken.
        """
        if count > self._num_free:
            raise RuntimeError(f"{count} blocks wanted, {self._num_free} available")
        successors, digests, refs = self._next, self._digests, self._refs
        sentinel = self.num_blocks
        taken: list[int] = []
        block = successors[sentinel]
        for _ in range(count):
            digest = digests[block]
            if digest is not None:
                del self._by_digest[digest]
                digests[block] = None
                self._num_cached -= 1
            refs[block] = 1
            taken.append(block)
            block = successors[block]
        successors[sentinel] = block
        self._prev[block] = sentinel
        self._num_free -= count
        return taken

    def reference(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, reviving those that were cached."""
        refs = self._refs
        for block in blocks:
            if refs[block] == 0:
                before, after = self._prev[block], self._next[block]
                self._next[before] = after
                self._prev[after] = before
                self._num_free -= 1
                if self._digests[block] is not None:
                    self._num_cached -= 1
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in the sequence's order.

        Walking backwards puts a sequence's tail before its head in the order of eviction: a head without its
        tail is still a useful prefix, a tail without its head can never be found. Blocks without a digest are
        taken before any cached one.
        """
        refs, digests, sentinel = self._refs, self._digests, self.num_blocks
        for block in reversed(blocks):
            count = refs[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} released more often than referenced")
            refs[block] = count
            if count:
                continue
            self._num_free += 1
            if digests[block] is None:
                self._link(block, sentinel, self._next[sentinel])
            else:
                self._num_cached += 1
                self._link(block, self._prev[sentinel], sentinel)

    def register(self, block: int, digest: bytes) -> None:
        """Make a used block findable by its content.

        A digest that another block already answers for stays with that block: tables are append-only, so equal
        blocks are not merged afterwards.
        """
        if self._digests[block] is None and digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def forget_all(self) -> None:
        """Forget every digest; references and the order of the list stay."""
        for block in self._by_digest.values():
            self._digests[block] = None
        self._by_digest.clear()
        self._num_cached = 0

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Verify the pool against all block tables that exist. O(blocks); for tests and idle moments.

        Raises:
            RuntimeError: a count, a link or the digest map contradicts another.
        """
        held = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._refs):
            if count != held[block]:
                raise RuntimeError(f"block {block}: {count} references, in {held[block]} block tables")
        listed: set[int] = set()
        before, block = self.num_blocks, self._next[self.num_blocks]
        while block != self.num_blocks:
            if self._refs[block] or block in listed or self._prev[block] != before:
                raise RuntimeError(f"free list is damaged at block {block}")
            listed.add(block)
            before, block = block, self._next[block]
        if self._prev[self.num_blocks] != before:
            raise RuntimeError("free list is damaged at its end")
        cached = sum(self._digests[block] is not None for block in listed)
        used = sum(count > 0 for count in self._refs)
        if len(listed) != self._num_free or cached != self._num_cached or used + len(listed) != self.num_blocks:
            raise RuntimeError(f"{used} used + {len(listed)} unused (of them {cached} cached) != {self.num_blocks}")
        known = {block: digest for block, digest in enumerate(self._digests) if digest is not None}
        if known != {block: digest for digest, block in self._by_digest.items()}:
            raise RuntimeError("digest map and blocks disagree")

    def _link(self, block: int, before: int, after: int) -> None:
        self._prev[block] = before
        self._next[block] = after
        self._next[before] = block
        self._prev[after] = block
