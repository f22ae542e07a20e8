"""DeepSeek-V2, V2-Lite (arXiv 2405.04434), V3 and R1 (arXiv 2412.19437), and what shares their decoder (Moonlight, Kimi
K2, GLM 4.7 Flash, Mistral 4): latent attention, and experts in groups beside shared ones. Layers that predict further
tokens are not used. GGUF files say "deepseek2" of all but the last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, Storage
from aphrodite.models.families.common import (
    MAX_LAYERS,
    MAX_WIDTH,
    Family,
    decoder_from_config,
    decoder_from_gguf,
    layer_count,
)
from aphrodite.models.families.experts import MAX_EXPERTS, moe_from_config, moe_from_gguf
from aphrodite.models.families.mistral import growing_queries
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec, Scoring
from aphrodite.quantization.types import RawTensor

_SCORINGS: dict[str, Scoring] = {"softmax": "softmax", "sigmoid": "sigmoid"}
_GGUF_SCORINGS: dict[int, Scoring] = {1: "softmax", 2: "sigmoid"}
_LATENT_EPS = 1e-6  # the models' own code does not read it from the configuration
_MSCALE = 0.1  # YaRN's factor of ln(scaling factor)


def _v2_from_config(config: ConfigReader) -> ModelSpec:
    return _from_config(config, "deepseek_v2", _v2_moe)


def _v3_from_config(config: ConfigReader) -> ModelSpec:
    return _from_config(config, "deepseek_v3", corrected_moe)


def _glm_from_config(config: ConfigReader) -> ModelSpec:
    return _from_config(config.with_defaults({"first_k_dense_replace": 1}), "glm4_moe_lite", corrected_moe)


def _from_config(
    config: ConfigReader, family: str, read_moe: Callable[[ConfigReader, tuple[int, ...]], MoeSpec]
) -> ModelSpec:
    if not config.read("rope_interleave", bool, True):
        raise config.wrong("rope_interleave", "true (turning dimensions in halves are not supported)", False)
    if config.read("attention_bias", bool, False):
        raise config.wrong("attention_bias", "false (biases of latent attention are not supported)", True)
    mla = MlaSpec(
        q_lora_rank=config.read("q_lora_rank", int, None, low=1, high=MAX_WIDTH),
        kv_lora_rank=config.read("kv_lora_rank", int, low=1, high=MAX_WIDTH),
        qk_nope_head_dim=config.read("qk_nope_head_dim", int, low=1, high=MAX_WIDTH),
        qk_rope_head_dim=config.read("qk_rope_head_dim", int, low=2, high=MAX_WIDTH),
        v_head_dim=config.read("v_head_dim", int, low=1, high=MAX_WIDTH),
        norm_eps=_LATENT_EPS,
    )
    if mla.qk_rope_head_dim % 2:
        raise config.wrong("qk_rope_head_dim", "even, for rotary embedding", mla.qk_rope_head_dim)
    scaling = config.section("rope_scaling") or config.section("rope_parameters")
    if scaling is not None and scaling.has("partial_rotary_factor"):  # Mistral 4 counts by whole heads
        rotary = rotary_from_config(config, mla.head_dim, default_fraction=1.0)
        if rotary.spec.dim != mla.qk_rope_head_dim:
            raise scaling.wrong("partial_rotary_factor", f"the share of {mla.qk_rope_head_dim} dimensions", "another")
    else:
        rotary = rotary_from_config(config, mla.qk_rope_head_dim)
    every_dim = scaling.read("mscale_all_dim", float, 0.0, low=0.0, high=1e3) if scaling is not None else 0.0
    spec = decoder_from_config(config, family=family, rotary=rotary)

    dense = dense_layers(config)
    if len(dense) < spec.num_layers and config.read("n_routed_experts", int, None) is not None:
        spec = dataclasses.replace(spec, moe=read_moe(config, dense))
    return _with_latents(spec, mla, _MSCALE * every_dim)


def dense_layers(config: ConfigReader) -> tuple[int, ...]:
    """Indices of the layers without experts."""
    num_layers = layer_count(config)
    kinds = config.strings("mlp_layer_types")
    if kinds:
        if len(kinds) != num_layers or any(kind not in ("dense", "sparse") for kind in kinds):
            raise config.wrong("mlp_layer_types", f"a list of {num_layers}, one a layer, each dense or sparse", kinds)
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "dense")
    first_sparse = config.read("first_k_dense_replace", int, 0, low=0, high=MAX_LAYERS)
    step = config.read("moe_layer_freq", int, 1, low=1, high=MAX_LAYERS)
    return tuple(layer for layer in range(num_layers) if layer < first_sparse or layer % step)


def _mistral4_from_config(config: ConfigReader) -> ModelSpec:
    spec = _from_config(config.with_defaults({"norm_topk_prob": True}), "mistral4", _mistral4_moe)
    return growing_queries(config, spec)


def _mistral4_moe(config: ConfigReader, dense: tuple[int, ...]) -> MoeSpec:
    moe = _moe(config, dense, default_scoring="softmax")
    return _in_groups(config, dataclasses.replace(moe, group_score="top2_sum"))


def _with_latents(spec: ModelSpec, mla: MlaSpec, log_factor: float) -> ModelSpec:
    """`spec` with latent attention.

    Args:
        log_factor: where the context is stretched, scores grow by (1 + log_factor * ln(scaling factor))^2.
    """
    stretched = spec.rotary.scaling != "none" and spec.rotary.factor > 1.0
    growth = 1.0 + log_factor * math.log(spec.rotary.factor) if stretched else 1.0
    return dataclasses.replace(
        spec,
        mla=mla,
        head_dim=mla.head_dim,
        num_kv_heads=spec.num_heads,
        attention_scale=growth * growth * mla.head_dim**-0.5,
    )


def _v2_moe(config: ConfigReader, dense: tuple[int, ...]) -> MoeSpec:
    """Groups are judged by their best expert, in the larger models; only scores that are not normalised are scaled."""
    moe = _moe(config, dense, default_scoring="softmax")
    if moe.normalize:
        moe = dataclasses.replace(moe, weight_scale=1.0)
    in_groups = config.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    return _in_groups(config, moe) if in_groups else moe


def corrected_moe(config: ConfigReader, dense: tuple[int, ...]) -> MoeSpec:
    """The experts of a config.json whose choice is corrected by a bias instead of a loss (arXiv 2408.15664).

    Args:
        dense: layers that have none.
    """
    config.choice("topk_method", {"noaux_tc": True}, "noaux_tc")
    moe = _moe(config, dense, default_scoring="sigmoid")
    return _in_groups(config, dataclasses.replace(moe, correction_bias=True, group_score="top2_sum"))


def _moe(config: ConfigReader, dense: tuple[int, ...], *, default_scoring: str) -> MoeSpec:
    moe = moe_from_config(
        config,
        count="n_routed_experts",
        intermediate="moe_intermediate_size",
        scoring=config.choice("scoring_func", _SCORINGS, default_scoring),
        normalize=config.read("norm_topk_prob", bool, default_scoring == "sigmoid"),
        dense_layers=dense,
    )
    shared = config.read("n_shared_experts", int, 0, low=0, high=MAX_EXPERTS)
    return dataclasses.replace(
        moe,
        shared_intermediate_size=shared * moe.intermediate_size,
        weight_scale=config.read("routed_scaling_factor", float, 1.0, low=1e-6, high=1e6),
    )


def _in_groups(config: ConfigReader, moe: MoeSpec, count: str = "n_group", best: str = "topk_group") -> MoeSpec:
    """`moe` with the groups that the keys `count` and `best` tell of."""
    groups = config.read(count, int, 1, low=1, high=moe.num_experts)
    if moe.num_experts % groups:
        raise config.wrong(count, f"a divisor of the {moe.num_experts} experts", groups)
    size = moe.num_experts // groups
    chosen = config.read(best, int, groups, low=1, high=groups)
    if chosen * size < moe.top_k:
        raise config.wrong(best, f"enough groups for the {moe.top_k} experts of a token", chosen)
    if chosen < groups and size == 1 and moe.group_score == "top2_sum":
        raise config.wrong(count, "groups of two experts at least, which their best two judge", groups)
    return dataclasses.replace(moe, num_groups=groups, top_groups=chosen)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """Newer files describe attention as if absorbed and keep the sizes of heads under keys of their own."""
    newer = config.has("attention.key_length_mla")
    suffix = "_mla" if newer else ""
    turning = config.read("rope.dimension_count", int, low=2, high=MAX_WIDTH)
    head_dim = config.read(f"attention.key_length{suffix}", int, low=turning + 1, high=MAX_WIDTH)
    mla = MlaSpec(
        q_lora_rank=config.read("attention.q_lora_rank", int, None, low=1, high=MAX_WIDTH),
        kv_lora_rank=config.read("attention.kv_lora_rank", int, low=1, high=MAX_WIDTH),
        qk_nope_head_dim=head_dim - turning,
        qk_rope_head_dim=turning,
        v_head_dim=config.read(f"attention.value_length{suffix}", int, low=1, high=MAX_WIDTH),
        norm_eps=config.read("attention.layer_norm_rms_epsilon", float, low=0.0, high=1.0),
    )
    spec = decoder_from_gguf(
        config, tensors, family="deepseek_v2", head_dim=head_dim, partial_rotary=True, experts=True
    )
    if config.read("expert_count", int, 0):
        spec = dataclasses.replace(spec, moe=grouped_moe_from_gguf(config, tensors))
    if spec.rotary.scaling == "yarn":  # llama.cpp divides its factor of cosines and sines out again
        spec = dataclasses.replace(spec, rotary=dataclasses.replace(spec.rotary, attention_factor=1.0))
    return _with_latents(spec, mla, config.read("rope.scaling.yarn_log_multiplier", float, 0.0, low=0.0, high=1e3))


def grouped_moe_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> MoeSpec:
    """The experts of GGUF metadata, whose choice a bias may correct and groups may narrow."""
    moe = moe_from_gguf(config, tensors, normalize=config.read("expert_weights_norm", bool, False))
    layer = next(layer for layer in range(MAX_LAYERS) if layer not in moe.dense_layers)
    corrected = f"blk.{layer}.exp_probs_b.bias" in tensors
    function = config.read("expert_gating_func", int, 2 if corrected else 1)
    if function not in _GGUF_SCORINGS:
        raise config.wrong("expert_gating_func", "1 (softmax) or 2 (sigmoid)", function)
    moe = dataclasses.replace(
        moe,
        scoring=_GGUF_SCORINGS[function],
        # 0 stands for none.
        weight_scale=config.read("expert_weights_scale", float, 0.0, low=0.0, high=1e6) or 1.0,
        correction_bias=corrected,
        group_score="top2_sum" if corrected else "max",
    )
    return _in_groups(config, moe, "expert_group_count", "expert_group_used_count")


_GGUF_STORAGE = Storage(names=GGUF_NAMES, interleaved=True)


def _gguf_storage(tensors: Mapping[str, RawTensor]) -> Storage:
    """Older files hold the expansions of keys and values in one matrix."""
    if "blk.0.attn_kv_b.weight" in tensors:
        return Storage(names=GGUF_NAMES.renamed(k_b="attn_kv_b", v_b="attn_kv_b"), interleaved=True)
    return _GGUF_STORAGE


_HF_STORAGE = Storage(names=HF_NAMES, interleaved=True)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    title="DeepSeek V2, V2-Lite, V2.5",
    architectures=("DeepseekV2ForCausalLM",),
    from_config=_v2_from_config,
    gguf_architecture="deepseek2",
    from_gguf=_from_gguf,
    hf=_HF_STORAGE,
    gguf=_GGUF_STORAGE,
    gguf_of=_gguf_storage,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    title="DeepSeek V3, V3.1, R1; Moonlight; Kimi K2",
    architectures=("DeepseekV3ForCausalLM",),
    from_config=_v3_from_config,
    from_gguf=_from_gguf,
    hf=_HF_STORAGE,
    predicts_further=True,
)
GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    title="GLM 4.7 Flash",
    architectures=("Glm4MoeLiteForCausalLM",),
    from_config=_glm_from_config,
    from_gguf=_from_gguf,
    hf=_HF_STORAGE,
    predicts_further=True,
)
MISTRAL4 = Family(
    name="mistral4",
    title="Mistral Small 4",
    architectures=("Mistral4ForCausalLM",),
    from_config=_mistral4_from_config,
    from_gguf=_from_gguf,
    hf=Storage(
        names=HF_NAMES.renamed(
            {
                "expert_gate.weight": "mlp.experts.gate_up_proj",
                "expert_up.weight": "mlp.experts.gate_up_proj",
                "expert_down.weight": "mlp.experts.down_proj",
            }
        ),
        interleaved=True,
    ),
)
