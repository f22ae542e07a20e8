"""What families of decoders share: reading the ordinary shape out of config.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, NameTable
from aphrodite.models.families.rotary import rotary_from_config, rotary_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

MAX_LAYERS = 1 << 10
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model: which checkpoints it recognises and how they become a `ModelSpec`.

    Attributes:
        architectures: names in config.json's `architectures`; `name` also matches `model_type`.
        gguf_architecture: value of GGUF's `general.architecture`, or None when GGUF files of this
            family carry another family's.
        from_config: config.json → spec.
        from_gguf: reader of the architecture's own keys, and the tensors → spec.
        gguf_interleaves: GGUF rows of q and k pair neighbouring dimensions for rotary embedding
            instead of the two halves of a head.
    """

    name: str
    architectures: tuple[str, ...]
    from_config: Callable[[ConfigReader], ModelSpec]
    gguf_architecture: str | None = None
    from_gguf: Callable[[ConfigReader, Mapping[str, RawTensor]], ModelSpec]
    hf_names: NameTable = HF_NAMES
    gguf_names: NameTable = GGUF_NAMES
    gguf_interleaves: bool = False


def decoder_from_config(
    config: ConfigReader,
    *,
    family: str,
    windows: tuple[int | None, ...] | None = None,
    default_head_dim: int | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
) -> ModelSpec:
    """The spec that config.json's common keys describe; `windows` None means full attention.

    Args:
        default_head_dim: where the key is absent; None divides the hidden size by the heads.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    num_layers = layer_count(config)
    hidden_size = config.read("hidden_size", int, low=2, high=MAX_WIDTH)
    num_heads = config.read("num_attention_heads", int, low=1, high=MAX_WIDTH)
    num_kv_heads = config.read("num_key_value_heads", int, num_heads, low=1, high=num_heads)
    head_dim = config.read("head_dim", int, default_head_dim or hidden_size // num_heads, low=2, high=MAX_WIDTH)
    _check_heads(config, "num_key_value_heads", num_heads, num_kv_heads, "head_dim", head_dim)
    rotary = rotary_from_config(config, head_dim)
    return ModelSpec(
        family=family,
        vocab_size=config.read("vocab_size", int, low=1, high=MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=config.read("intermediate_size", int, low=1, high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.read("rms_norm_eps", float, 1e-6, low=0.0, high=1.0),
        max_position=rotary.max_position,
        rotary=rotary.spec,
        windows=windows or (None,) * num_layers,
        activation=config.choice("hidden_act", _ACTIVATIONS, "silu"),
        tied_head=config.read("tie_word_embeddings", bool, False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )


def decoder_from_gguf(
    config: ConfigReader, tensors: Mapping[str, RawTensor], *, family: str, qk_norm: bool = False
) -> ModelSpec:
    """The spec that GGUF's common keys describe; biases and a tied head show in the tensors' names.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    experts = config.read("expert_count", int, 0)
    if experts:
        raise config.wrong("expert_count", "0 (mixtures of experts are not supported yet)", experts)
    num_layers = config.read("block_count", int, low=1, high=MAX_LAYERS)
    hidden_size = config.read("embedding_length", int, low=2, high=MAX_WIDTH)
    num_heads = config.read("attention.head_count", int, low=1, high=MAX_WIDTH)
    num_kv_heads = config.read("attention.head_count_kv", int, num_heads, low=1, high=num_heads)
    head_dim = config.read("attention.key_length", int, hidden_size // num_heads, low=2, high=MAX_WIDTH)
    value_dim = config.read("attention.value_length", int, head_dim)
    if value_dim != head_dim:
        raise config.wrong("attention.value_length", f"{head_dim}, like the keys'", value_dim)
    _check_heads(config, "attention.head_count_kv", num_heads, num_kv_heads, "attention.key_length", head_dim)
    rotary = rotary_from_gguf(config, tensors, head_dim)
    window = config.read("attention.sliding_window", int, 0, low=0, high=1 << 31)
    return ModelSpec(
        family=family,
        vocab_size=_gguf_vocab_size(config, tensors),
        hidden_size=hidden_size,
        intermediate_size=config.read("feed_forward_length", int, low=1, high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.read("attention.layer_norm_rms_epsilon", float, low=0.0, high=1.0),
        max_position=rotary.max_position,
        rotary=rotary.spec,
        windows=(window or None,) * num_layers,
        tied_head="output.weight" not in tensors,
        qk_norm=qk_norm,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


def layer_count(config: ConfigReader) -> int:
    """`num_hidden_layers` of a config.json."""
    return config.read("num_hidden_layers", int, low=1, high=MAX_LAYERS)


def _gguf_vocab_size(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> int:
    """The embedding's rows: metadata may leave the vocabulary's size out or count without padding."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise config.wrong("tensor token_embd.weight", "present (the embedding)", None)
    return embedding.shape[0]


def _check_heads(
    config: ConfigReader, kv_key: str, num_heads: int, num_kv_heads: int, dim_key: str, head_dim: int
) -> None:
    if num_heads % num_kv_heads:
        raise config.wrong(kv_key, f"a divisor of the {num_heads} query heads", num_kv_heads)
    if head_dim % 2:
        raise config.wrong(dim_key, "even, for rotary embedding", head_dim)
