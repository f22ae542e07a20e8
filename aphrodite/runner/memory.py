"""How much KV cache fits beside the weights, and how to say so to a person."""

from __future__ import annotations

from dataclasses import dataclass

from aphrodite.attention.latent import EXPANDED_BYTES, GROUP_POSITIONS
from aphrodite.errors import ConfigError
from aphrodite.models.shape import ModelShape
from aphrodite.models.spec import ModelSpec

# The share of a host's free memory (after loading) which the KV cache may take when nobody named a size.
# Pages are touched only as the cache fills, so this is a ceiling and not what an idle server occupies.
HOST_SHARE = 0.5
# On a GPU, beside what activations need: graphs, libraries' workspaces and what the allocator cannot use.
DEVICE_RESERVE = 256 << 20
DEVICE_RESERVE_SHARE = 0.01
CHAT_TOKENS = 8192  # the chat in which a GPU's cache is counted

GIB = 1 << 30
MIB = 1 << 20


def format_bytes(count: int) -> str:
    """`1536 MiB` style for a person: three significant digits."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.0f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What lies where. `max_model_len` is what was asked for, or less where the cache is smaller.

    `workspace_bytes` is what a GPU keeps free for activations and graphs; 0 on a CPU, where nothing is set aside.
    """

    weight_bytes: int
    kv_bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int
    wanted_model_len: int
    workspace_bytes: int = 0

    @property
    def knob(self) -> str:
        """The flag with which a user gives the cache more."""
        return "--gpu-memory-utilization" if self.workspace_bytes else "--kv-cache-memory"

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_bytes_per_block

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def lines(self) -> list[str]:
        """The plan in words."""
        chat = min(self.max_model_len, CHAT_TOKENS) if self.workspace_bytes else self.max_model_len
        lines = [
            f"weights   {format_bytes(self.weight_bytes)}",
            (
                f"KV cache  up to {format_bytes(self.kv_bytes)} = {self.kv_tokens:,} tokens"
                f" = {self.kv_tokens / chat:,.1f} chats of {chat:,} tokens"
            ),
            f"context   {self.max_model_len:,} tokens a chat",
        ]
        if self.workspace_bytes:
            lines.insert(1, f"workspace {format_bytes(self.workspace_bytes)} for activations and graphs")
        if self.max_model_len < self.wanted_model_len:
            lines[-1] += (
                f" (the model could take {self.wanted_model_len:,}; the KV cache holds no more:"
                f" give it more with {self.knob})"
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
    budget: int,
    workspace_bytes: int = 0,
) -> MemoryPlan:
    """Make the most of a KV cache of `budget` bytes.

    The cache is never larger than `max_num_seqs` full contexts. A context that does not fit shrinks to
    what does, unless the user fixed it (`fixed_model_len`).

    Raises:
        ConfigError: the cache asked for cannot hold the fixed context, or one block where two would be used.
    """
    useful = max_num_seqs * -(-wanted_model_len // block_size)
    num_blocks = min(budget // kv_bytes_per_block, useful)
    if num_blocks < min(2, useful):
        raise ConfigError(
            f"the KV cache would hold {'1 block' if num_blocks == 1 else 'no block'} of {block_size} tokens:"
            f" {format_bytes(max(budget, 0))} at {format_bytes(kv_bytes_per_block)} a block; give it more with"
            f" {_roomier(weight_bytes, workspace_bytes) if workspace_bytes else '--kv-cache-memory'}"
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
        workspace_bytes=workspace_bytes,
    )


def _roomier(weight_bytes: int, workspace_bytes: int) -> str:
    return (
        f"--gpu-memory-utilization or --kv-cache-memory, or take less than {format_bytes(weight_bytes)} for weights"
        f" (--quantization, --cpu-offload-gb) and {format_bytes(workspace_bytes)} for steps (--max-num-batched-tokens,"
        " --max-num-seqs)"
    )


def device_budget(*, usable: int, taken: int, free: int, workspace_bytes: int) -> int:
    """Bytes that a KV cache on a GPU may have, negative where there is no room.

    Args:
        usable: what the engine may take of the card.
        taken: by the loaded model, as its own allocator counts: of the driver's count, other programs come and go.
        free: now, by the driver's count.
        workspace_bytes: of `device_workspace`.
    """
    return min(usable - taken, free) - workspace_bytes


def device_workspace(
    spec: ModelShape, *, total: int, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, itemsize: int
) -> int:
    """Bytes to leave free on a GPU of `total` bytes: the rows, what the largest step holds at once, and a reserve.

    Args:
        itemsize: bytes of an activation.
    """
    heads, expansion = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, 0
    mla = spec.mla if isinstance(spec, ModelSpec) else None
    if mla is not None:  # queries, absorbed ones and what they attend to, values; what prompts are expanded to
        heads = spec.num_heads * (mla.head_dim + 2 * mla.kv_lora_rank + mla.v_head_dim) + mla.latent_dim
        positions = max(GROUP_POSITIONS, max_model_len)
        each = mla.qk_nope_head_dim + mla.v_head_dim  # of a head and position
        expansion = positions * mla.latent_dim * itemsize + max(EXPANDED_BYTES, positions * each * itemsize)
    per_token = (4 * spec.hidden_size + heads + _feed_forward_values(spec)) * itemsize
    # Of each sequence: logits, those that graphs leave behind, the sampler's float32 copy and its counts.
    per_sequence = spec.vocab_size * (2 * itemsize + 12) + 8 * max_model_len
    reserve = DEVICE_RESERVE + int(total * DEVICE_RESERVE_SHARE)
    return max_num_batched_tokens * per_token + max_num_seqs * per_sequence + expansion + reserve


def _feed_forward_values(spec: ModelShape) -> int:
    """Values of a token that a feed-forward block holds at once; float32 scores of experts count twice."""
    dense, moe = 3 * spec.intermediate_size, spec.moe if isinstance(spec, ModelSpec) else None
    if moe is None:
        return dense
    routed = moe.top_k * (moe.intermediate_size + spec.hidden_size) + 2 * moe.num_experts
    shared = 3 * moe.shared_intermediate_size
    return max(routed + shared, dense if moe.dense_layers else 0)
