"""Latent attention as operations of the native library (DeepSeek-V2's MLA, arXiv 2405.04434, section 2.1).

A layer is: the projections of queries and of the latent, the former by way of a latent of their own in larger models;
`LATENT_KV`, which caches the latent and turns queries; a product for each head that takes its queries to the latent;
attention over the cached latents, in prompts as in decoding; a product for each head that makes values of what they
attended to.
"""

from __future__ import annotations

from aphrodite.kernels.cpu.program import MAX_QUERY_ROWS, LatentDesc, OpKind, RowSet
from aphrodite.models.spec import MlaSpec, ModelSpec
from aphrodite.runner.native_compiler import Compiler, compile_norm

_LANES = 16  # that rotation and the cache go by


def latent_names(mla: MlaSpec) -> list[str]:
    """A layer's matrices, and stacks of them, in the order in which a step reads them."""
    queries = ["q", "kv_a"] if mla.q_lora_rank is None else ["q_a", "kv_a", "q_b"]
    return [*queries, "k_b", "v_b", "o"]


def heads_beside(num_heads: int) -> int:
    """How many heads a task of attention computes at once: as many as divide all of them evenly."""
    return max(count for count in range(1, min(num_heads, MAX_QUERY_ROWS) + 1) if num_heads % count == 0)


def unknown_latents(mla: MlaSpec) -> str | None:
    """What the model's latents have and programs have not, or None."""
    if mla.kv_lora_rank % _LANES or mla.qk_rope_head_dim % _LANES:
        sizes = f"{mla.kv_lora_rank} dimensions and {mla.qk_rope_head_dim} that turn"
        return f"latents of {sizes}, which are not multiples of {_LANES}"
    return None


def compile_latent_attention(
    compiler: Compiler, spec: ModelSpec, mla: MlaSpec, layer: int, table: int, residual: int
) -> int:
    """Adds what leads to the values of all heads; returns the buffer that they are in.

    Args:
        table: rotary table of the layer.
    """
    builder, prefix, heads = compiler.builder, f"layers.{layer}.", spec.num_heads
    queries, latents, column = _compile_projections(compiler, spec, mla, prefix, residual)
    builder.latent = LatentDesc(mla.qk_rope_head_dim, mla.qk_nope_head_dim, latents, column)
    absorbed = compiler.buffer("absorbed queries", heads * mla.latent_dim)
    builder.add_op(
        OpKind.LATENT_KV,
        source=queries,
        output=absorbed,
        layer=layer,
        vector=compiler.vector(f"{prefix}kv_a_norm.weight"),
        window=table,
        value=mla.norm_eps,
    )
    _compile_heads(compiler, f"{prefix}k_b.weight", (queries, mla.head_dim), (absorbed, mla.latent_dim))
    attended = compiler.buffer("attended latents", heads * mla.kv_lora_rank)
    builder.add_op(OpKind.ATTENTION, source=absorbed, output=attended, layer=layer, value=spec.query_scale)
    values = compiler.buffer("attended", heads * mla.v_head_dim)
    _compile_heads(compiler, f"{prefix}v_b.weight", (attended, mla.kv_lora_rank), (values, mla.v_head_dim))
    return values


def _compile_projections(
    compiler: Compiler, spec: ModelSpec, mla: MlaSpec, prefix: str, residual: int
) -> tuple[int, int, int]:
    """Adds the products that make queries and latents; returns the buffers of both and the latents' first column."""
    builder, width, rank = compiler.builder, spec.num_heads * mla.head_dim, mla.q_lora_rank
    column = width if rank is None else rank
    names = [f"{prefix}{name}.weight" for name in ("q" if rank is None else "q_a", "kv_a")]
    packs = compiler.packs("normed", names, spec.hidden_size)
    compile_norm(compiler, spec, residual, packs, f"{prefix}attn_norm")
    both = compiler.buffer("projections", column + mla.latent_dim)
    weights = [compiler.weight(names[0], packs), compiler.weight(names[1], packs, column)]
    builder.add_op(OpKind.LINEAR, output=both, weights=weights)
    if rank is None:
        return both, both, column
    packs = compiler.packs("latents of queries", [f"{prefix}q_b.weight"], rank)
    vector = compiler.vector(f"{prefix}q_a_norm.weight")
    builder.add_op(
        OpKind.NORM, source=both, packs=packs.numbers, vector=vector, window=packs.orders, value=mla.norm_eps
    )
    queries = compiler.buffer("queries", width)
    builder.add_op(OpKind.LINEAR, output=queries, weights=[compiler.weight(f"{prefix}q_b.weight", packs)])
    return queries, both, column


def _compile_heads(compiler: Compiler, name: str, source: tuple[int, int], output: tuple[int, int]) -> None:
    """A product for each head; `source` and `output` are a buffer and the columns of a head in it."""
    columns = compiler.columns(name)
    packs = compiler.packs(f"heads of {columns}", [name], columns, RowSet.HEADS)
    compiler.builder.add_op(
        OpKind.HEAD_LINEAR,
        source=source[0],
        output=output[0],
        weights=[compiler.weight(name, packs)],
        window=source[1],
        flag=output[1],
    )
