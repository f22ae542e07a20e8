"""What families of decoders share: reading the ordinary shape out of config.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_STORAGE, HF_STORAGE, Storage
from aphrodite.models.families.rotary import Rotary, rotary_from_config, rotary_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

MAX_LAYERS = 1 << 10
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model: which checkpoints it recognises and how they become a `ModelSpec`.

    Attributes:
        title: the models that people know, for the documentation.
        architectures: names in config.json's `architectures`; `name` also matches `model_type`.
        gguf_architecture: value of GGUF's `general.architecture`, or None when GGUF files of this
            family carry another family's.
        wrapped_by: names in `architectures` of models that see images, whose text part is of this family unless the
            `model_type` of their `text_config` names another.
        text_defaults: of keys that the `text_config` of such models leaves out, where transformers assumes other values
            than are assumed for the family elsewhere, or none are.
        gguf_wrapped_by: values of `general.architecture` of the text parts of such models.
        from_config: config.json → spec.
        from_gguf: reader of the architecture's own keys, and the tensors → spec.
        hf, gguf: how safetensors and GGUF files of the family name and keep their tensors.
        hf_of, gguf_of: the same, where it has changed over time and shows in the tensors that there are.
        predicts_further: files may have more layers than the decoder, which are left out.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    wrapped_by: tuple[str, ...] = ()
    text_defaults: Mapping[str, object] = field(default_factory=dict)
    from_config: Callable[[ConfigReader], ModelSpec]
    gguf_architecture: str | None = None
    gguf_wrapped_by: tuple[str, ...] = ()
    from_gguf: Callable[[ConfigReader, Mapping[str, RawTensor]], ModelSpec]
    hf: Storage = HF_STORAGE
    gguf: Storage = GGUF_STORAGE
    hf_of: Callable[[Mapping[str, RawTensor]], Storage] | None = None
    gguf_of: Callable[[Mapping[str, RawTensor]], Storage] | None = None
    predicts_further: bool = False


def decoder_from_config(
    config: ConfigReader,
    *,
    family: str,
    windows: tuple[int | None, ...] | None = None,
    rotary: Rotary | None = None,
    default_head_dim: int | None = None,
    epsilon: str = "rms_norm_eps",
    default_activation: str = "silu",
    default_tied: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
) -> ModelSpec:
    """The spec that config.json's common keys describe; `windows` None means full attention.

    Args:
        rotary: where the family reads it otherwise than `rotary_from_config`.
        default_head_dim: where the key is absent; None divides the hidden size by the heads.
        epsilon: key of the norms' epsilon.
        default_activation, default_tied: where the keys are absent.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    num_layers = layer_count(config)
    hidden_size = config.read("hidden_size", int, low=2, high=MAX_WIDTH)
    num_heads = config.read("num_attention_heads", int, low=1, high=MAX_WIDTH)
    num_kv_heads = config.read("num_key_value_heads", int, num_heads, low=1, high=num_heads)
    dim = head_dim(config, default_head_dim)
    _check_heads(config, "num_key_value_heads", num_heads, num_kv_heads, "head_dim", dim)
    rotary = rotary or rotary_from_config(config, dim)
    activation = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    return ModelSpec(
        family=family,
        vocab_size=config.read("vocab_size", int, low=1, high=MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=config.read("intermediate_size", int, low=1, high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        norm_eps=config.read(epsilon, float, 1e-6, low=0.0, high=1.0),
        max_position=rotary.max_position,
        rotary=rotary.spec,
        windows=windows or (None,) * num_layers,
        activation=config.choice(activation, _ACTIVATIONS, default_activation),
        tied_head=config.read("tie_word_embeddings", bool, default_tied),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )


def decoder_from_gguf(
    config: ConfigReader,
    tensors: Mapping[str, RawTensor],
    *,
    family: str,
    windows: tuple[int | None, ...] | None = None,
    epsilon: str = "attention.layer_norm_rms_epsilon",
    activation: Activation = "silu",
    partial_rotary: bool = False,
    qk_norm: bool = False,
    experts: bool = False,
    head_dim: int | None = None,
) -> ModelSpec:
    """The spec that GGUF's common keys describe; biases and a tied head show in the tensors' names.

    Args:
        windows: where they are not the same for every layer.
        epsilon: key of the norms' epsilon.
        partial_rotary: the family may turn a part of each head only.
        experts: the file may describe a mixture of experts, which the caller reads.
        head_dim: of queries and keys, where it is not under the ordinary keys; None reads them.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    count = config.read("expert_count", int, 0)
    if count and not experts:
        raise config.wrong("expert_count", f"0 ({family} is known without experts)", count)
    num_layers = config.read("block_count", int, low=1, high=MAX_LAYERS)
    hidden_size = config.read("embedding_length", int, low=2, high=MAX_WIDTH)
    num_heads = same_everywhere(config, "attention.head_count", high=MAX_WIDTH)
    num_kv_heads = same_everywhere(config, "attention.head_count_kv", num_heads, high=num_heads)
    dim = head_dim or config.read("attention.key_length", int, hidden_size // num_heads, low=2, high=MAX_WIDTH)
    value_dim = config.read("attention.value_length", int, dim)
    if value_dim != dim and head_dim is None:
        raise config.wrong("attention.value_length", f"{dim}, like the keys'", value_dim)
    _check_heads(config, "attention.head_count_kv", num_heads, num_kv_heads, "attention.key_length", dim)
    rotary = rotary_from_gguf(config, tensors, dim, partial=partial_rotary)
    return ModelSpec(
        family=family,
        vocab_size=_gguf_vocab_size(config, tensors),
        hidden_size=hidden_size,
        intermediate_size=same_everywhere(config, "feed_forward_length", high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        norm_eps=config.read(epsilon, float, low=0.0, high=1.0),
        max_position=rotary.max_position,
        rotary=rotary.spec,
        windows=windows or (gguf_window(config),) * num_layers,
        activation=activation,
        tied_head="output.weight" not in tensors,
        qk_norm=qk_norm,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


def same_everywhere(config: ConfigReader, key: str, default: int | None = None, *, high: int) -> int:
    """A size that GGUF may hold once or for every layer, and that has to be the same in all of them.

    Raises:
        ModelFormatError: layers differ, as those of pruned models may, or a size is missing or out of bounds.
    """
    found = set(config.integers(key, low=1, high=high))
    if len(found) > 1:
        raise config.wrong(key, "the same in all layers", sorted(found))
    return found.pop() if found else config.read(key, int, default) or config.read(key, int)


def head_dim(config: ConfigReader, default: int | None = None) -> int:
    """`head_dim` of a config.json; where it is absent, `default` or the hidden size divided by the heads."""
    if default is None:
        hidden_size = config.read("hidden_size", int, low=2, high=MAX_WIDTH)
        default = hidden_size // config.read("num_attention_heads", int, low=1, high=MAX_WIDTH)
    return config.read("head_dim", int, default, low=2, high=MAX_WIDTH)


def windows_by_type(config: ConfigReader, window: int | None, pattern: int) -> tuple[int | None, ...]:
    """Windows of a config.json with `layer_types`; where they are absent, every `pattern`-th layer sees all.

    Args:
        window: of the layers that have one.
        pattern: default of `sliding_window_pattern`.
    """
    num_layers = layer_count(config)
    kinds = config.strings("layer_types")
    if not kinds:
        return every_other(num_layers, window, config.read("sliding_window_pattern", int, pattern, low=1))
    known = ("sliding_attention", "full_attention")
    if len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise config.wrong("layer_types", f"a list of {num_layers}, one a layer, each of {' or '.join(known)}", kinds)
    return tuple(window if kind == known[0] else None for kind in kinds)


def every_other(num_layers: int, window: int | None, pattern: int) -> tuple[int | None, ...]:
    """Windows where every `pattern`-th layer sees all positions."""
    return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))


def gguf_window(config: ConfigReader) -> int | None:
    """GGUF's sliding window; 0 stands for none."""
    return config.read("attention.sliding_window", int, 0, low=0, high=1 << 31) or None


def gguf_windows(config: ConfigReader, pattern: int) -> tuple[int | None, ...]:
    """GGUF's sliding window in all but every `pattern`-th layer, which llama.cpp knows by the family; files may say
    it of each layer."""
    num_layers = config.read("block_count", int, low=1, high=MAX_LAYERS)
    windowed = config.flags("attention.sliding_window_pattern")
    if windowed:
        if len(windowed) != num_layers:
            raise config.wrong("attention.sliding_window_pattern", f"a list of {num_layers}, one a layer", windowed)
        window = gguf_window(config)
        return tuple(window if has_one else None for has_one in windowed)
    pattern = config.read("attention.sliding_window_pattern", int, pattern, low=1)
    return every_other(num_layers, gguf_window(config), pattern)


def bound_or_none(config: ConfigReader, key: str, default: float) -> float:
    """A bound of scores or logits: null stands for none, which is 0."""
    if config.has(key):
        default = 0.0
    return config.read(key, float, default, low=1e-3, high=1e6)


# What transformers assumes of Llama, Mistral and Qwen 2 alike.
COMMON_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}


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
