"""How much KV cache fits beside the weights, and how to say so to a person."""

from __future__ import annotations

from dataclasses import dataclass

from aphrodite.errors import ConfigError

# The share of memory that is free after loading which the KV cache may take when nobody named a size.
# Pages are touched only as the cache fills, so this is a ceiling and not what an idle server occupies.
AUTOMATIC_SHARE = 0.5

GIB = 1 << 30
MIB = 1 << 20


def format_bytes(count: int) -> str:
    """`1536 MiB` style for a person: three significant digits."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What lies where. `max_model_len` is what was asked for, or less where the cache is smaller."""

    weight_bytes: int
    kv_bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int
    wanted_model_len: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_bytes_per_block

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def lines(self) -> list[str]:
        """The plan in words."""
        chats = self.kv_tokens / self.max_model_len
        lines = [
            f"weights   {format_bytes(self.weight_bytes)}",
            (
                f"KV cache  up to {format_bytes(self.kv_bytes)} = {self.kv_tokens:,} tokens"
                f" = {chats:,.1f} chats of {self.max_model_len:,} tokens"
            ),
            f"context   {self.max_model_len:,} tokens a chat",
        ]
        if self.max_model_len < self.wanted_model_len:
            lines[-1] += (
                f" (the model could take {self.wanted_model_len:,}; the KV cache holds no more:"
                " give it more with --kv-cache-memory)"
            )
        return lines


def plan_memory(
    *,
    weight_bytes: int,
    kv_bytes_per_block: int,
    block_size: int,
    wanted_model_len: int,
    fixed_model_len: bool,
    max_num_seqs: int,
    available: int,
    kv_cache_memory: int | None,
) -> MemoryPlan:
    """Divide `available` bytes (free after loading the weights).

    The cache is never larger than `max_num_seqs` full contexts. A context that does not fit shrinks to
    what does, unless the user fixed it (`fixed_model_len`).

    Raises:
        ConfigError: the cache asked for cannot hold the fixed context, or not even one block.
    """
    budget = int(available * AUTOMATIC_SHARE) if kv_cache_memory is None else kv_cache_memory
    useful = max_num_seqs * -(-wanted_model_len // block_size)
    num_blocks = min(budget // kv_bytes_per_block, useful)
    if num_blocks < 2:
        raise ConfigError(
            f"the KV cache would hold {num_blocks} blocks of {block_size} tokens:"
            f" {format_bytes(budget)} at {kv_bytes_per_block:,} bytes a block; give it more with --kv-cache-memory"
        )
    fits = min(wanted_model_len, num_blocks * block_size)
    if fixed_model_len and fits < wanted_model_len:
        needed = -(-wanted_model_len // block_size) * kv_bytes_per_block
        raise ConfigError(
            f"--max-model-len {wanted_model_len:,} needs {format_bytes(needed)} of KV cache, but"
            f" {format_bytes(budget)} are there: use --kv-cache-memory {needed // MIB + 1}MiB or"
            f" --max-model-len {fits}"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        kv_bytes_per_block=kv_bytes_per_block,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=fits,
        wanted_model_len=wanted_model_len,
    )
