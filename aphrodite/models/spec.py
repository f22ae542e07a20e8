"""What a model is, in the decoder's own terms: typed, frozen, derived once from config.json or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RotaryScaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]
NormKind = Literal["rms", "layer"]
BlockKind = Literal["pre_norm", "post_norm", "sandwich", "parallel"]
HeadNorm = Literal["head", "each_head", "width"]
Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen"]
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary position embedding (arXiv 2104.09864), rotate-half pairing, with its long-context scaling.

    The first `dim` dimensions of a head turn. Fields that a scaling does not use keep their defaults.
    """

    dim: int
    theta: float = 10_000.0
    scaling: RotaryScaling = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the range of frequencies that are blended ends at whole numbers
    attention_factor: float | None = None  # yarn, longrope; None: yarn's 0.1 * ln(factor) + 1, longrope's 1
    freq_divisors: tuple[float, ...] = ()  # per frequency, [dim / 2]; GGUF's rope_freqs tensor; longrope's long factors
    short_divisors: tuple[float, ...] = ()  # longrope: instead of those where the original context is enough


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """A mixture of experts (arXiv 1701.06538) in place of the feed-forward block.

    Of each token the router makes a score for every expert, in float32; the `top_k` best (of equal ones, the first)
    compute, and their results are added by their scores.

    Attributes:
        intermediate_size: of each expert.
        dense_layers: indices of layers that have an ordinary feed-forward block of `ModelSpec.intermediate_size`.
        shared_intermediate_size: of the experts that see every token, all of them as one block; 0 for none.
        shared_gate: their result is weighed by the sigmoid of another product with the token.
        scoring: the router's product becomes scores over all experts ("softmax", "sigmoid"), or the best of it are
            chosen first and the softmax is over those.
        normalize: the scores of the chosen are divided by their sum.
        weight_scale: factor of these scores, after that.
        correction_bias: added to scores for the choice only (arXiv 2408.15664).
        num_groups, top_groups: experts are in `num_groups` groups of consecutive ones, and only those of the best
            `top_groups` can be chosen (arXiv 2405.04434); `group_score` tells how a group is judged, by its best expert
            or by the sum of its best two.
        router_bias, expert_bias: the router, or the experts' projections, have biases.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    dense_layers: tuple[int, ...] = ()
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    scoring: Scoring = "softmax"
    normalize: bool = False
    weight_scale: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    router_bias: bool = False
    expert_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A position is cached as one vector, of which every head's key and value are linear functions: a normalised latent
    and a key that turns, which all heads share. A head's query and key are `qk_nope_head_dim` dimensions that do not
    turn, then `qk_rope_head_dim` that do.

    Attributes:
        q_lora_rank: width of the queries' own latent; None where queries come straight from the hidden state.
        kv_lora_rank: width of the latent of keys and values.
        v_head_dim: of a head's value.
        norm_eps: of the latents' RMSNorms.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Of a query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached for a position and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and kinds of a decoder-only transformer.

    Attributes:
        windows: an entry a layer: how many latest positions (the current one included) a query sees, None for all.
        rotary: of every layer, or of most.
        layer_rotaries: an entry a layer where they differ, None for a layer without positions; empty where all have
            `rotary`.
        block: where norms and residual additions stand. "pre_norm": x + f(norm(x)), attention then feed-forward;
            "post_norm": x + norm(f(x)); "sandwich": x + norm(f(norm(x))); "parallel": both of one norm(x), x + f + g.
        norm: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450), the latter with `norm_bias` or without.
        float32_norms: norms' weights stay float32 whatever the compute type, which would round them too much.
        qk_norm: queries and keys are normalised before rotation, by a norm of the kind that `head_norm` says: RMS of
            each head by one weight for all heads ("head"); LayerNorm of each head by weights of its own ("each_head");
            RMS of all heads together ("width").
        attention_scale: of the scores; None means 1 / sqrt(head_dim).
        temperature_scale, temperature_length: a query at position p is multiplied by
            1 + temperature_scale * ln(1 + floor(p / temperature_length)), as Llama 4 does; 0 for none.
        attention_sinks: every head has a score of its own that takes part in the softmax and adds no value.
        attention_softcap, logit_softcap: c where scores, or logits, become c * tanh(x / c); 0 for none.
        embedding_scale: of embeddings before the first layer.
        logit_scale: of logits before the cap. `match_weights` makes it part of the last norm's weight.
        moe: the experts of all layers that are not dense, None where every layer is.
        mla: latent attention instead of grouped queries; `head_dim` is that of its queries and keys then,
            `num_kv_heads` is `num_heads`, and `rotary` is of the dimensions that turn.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rotary: RotarySpec
    windows: tuple[int | None, ...]
    layer_rotaries: tuple[RotarySpec | None, ...] = ()
    activation: Activation = "silu"
    block: BlockKind = "pre_norm"
    norm: NormKind = "rms"
    norm_bias: bool = False
    float32_norms: bool = False
    tied_head: bool = False
    qk_norm: bool = False
    head_norm: HeadNorm = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    temperature_scale: float = 0.0
    temperature_length: int = 0
    attention_sinks: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None

    @property
    def kv_dim(self) -> int:
        """Values that a layer's KV cache holds for a position."""
        return 2 * self.num_kv_heads * self.head_dim if self.mla is None else self.mla.latent_dim

    @property
    def query_scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5) if self.attention_scale is None else self.attention_scale

    def rotary_of(self, layer: int) -> RotarySpec | None:
        """The rotary embedding of a layer, None where it has none."""
        return self.layer_rotaries[layer] if self.layer_rotaries else self.rotary

    def moe_of(self, layer: int) -> MoeSpec | None:
        """The experts of a layer, None where its feed-forward block is dense."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe
