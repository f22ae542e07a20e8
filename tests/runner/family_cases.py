"""Families as tiny random models of transformers, and as the GGUF files that llama.cpp would make of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch_executor_cases import tiny_model

HEADS, KV_HEADS, HEAD_DIM, CONTEXT, WINDOW = 6, 2, 16, 512, 40
SIZES: dict[str, Any] = {
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TYPES = ["sliding_attention", "full_attention"] * 2
Writer = gguf.GGUFWriter


def no_keys(writer: Writer) -> None:
    """The ordinary keys say all."""


@dataclass(frozen=True)
class Case:
    """A model to make.

    Attributes:
        name: of transformers' classes.
        options: of its configuration.
        architecture: of its GGUF file, or None where llama.cpp has none.
        keys: adds those of the architecture's own.
        permutes: llama.cpp's converter reorders rows of q and k.
        norm_offset: which it adds to norms.
        splits_latents: the converter stores the expansions of keys and values apart, as it does today.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    architecture: gguf.MODEL_ARCH | None = None
    keys: Callable[[Writer], None] = no_keys
    permutes: bool = False
    norm_offset: float = 0.0
    layer_norm: bool = False
    turning: int = HEAD_DIM
    splits_latents: bool = True

    def sizes(self) -> dict[str, Any]:
        """A configuration's values, for it alone: transformers writes into dictionaries that it is given."""
        return copy.deepcopy({**SIZES, **self.options})

    def model(self) -> Any:
        config = getattr(transformers, f"{self.name}TextConfig", None) or getattr(transformers, f"{self.name}Config")
        model_class = getattr(transformers, f"{self.name}ForCausalLM")
        model = tiny_model(model_class, config, **self.sizes())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.sub_(self.norm_offset)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0.0, 0.2)
        return model


def gemma2_keys(writer: Writer) -> None:
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(15.0)
    writer.add_sliding_window(WINDOW)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)


def nemo_keys(writer: Writer) -> None:
    writer.add_key_length(32)
    writer.add_value_length(32)


def gemma3_keys(writer: Writer) -> None:
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern(2)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def granite_keys(writer: Writer) -> None:
    writer.add_attention_scale(0.2)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(0.4)
    writer.add_logit_scale(2.0)


def cohere_keys(writer: Writer) -> None:
    writer.add_logit_scale(0.7)


def cohere2_keys(writer: Writer) -> None:
    writer.add_logit_scale(0.5)
    writer.add_sliding_window(WINDOW)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def olmo3_keys(writer: Writer) -> None:
    writer.add_sliding_window(WINDOW)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_attn_factors(0.1 * math.log(4.0) + 1.0)
    writer.add_sliding_window_pattern([True, True, True, False])


def smollm3_keys(writer: Writer) -> None:
    writer.add_rope_freq_base(2e6)


def parallel_keys(writer: Writer) -> None:
    writer.add_parallel_residual(True)


def expert_keys(writer: Writer) -> None:
    writer.add_expert_count(EXPERTS["num_experts"])
    writer.add_expert_used_count(EXPERTS["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(EXPERTS["moe_intermediate_size"])


def qwen2_moe_keys(writer: Writer) -> None:
    expert_keys(writer)
    writer.add_expert_shared_feed_forward_length(160)


def granite_moe_keys(writer: Writer) -> None:
    granite_keys(writer)
    writer.add_expert_count(6)
    writer.add_expert_used_count(3)


def ministral_keys(writer: Writer) -> None:
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(MINISTRAL_ROPE["factor"])
    writer.add_rope_scaling_orig_ctx_len(MINISTRAL_ROPE["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(1.0)
    writer.add_attn_temperature_scale(MINISTRAL_ROPE["llama_4_scaling_beta"])


MINISTRAL_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": CONTEXT,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}


def gpt_oss_keys(writer: Writer) -> None:
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_sliding_window(WINDOW)
    writer.add_expert_count(5)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(128)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def olmoe_keys(writer: Writer) -> None:
    writer.add_expert_count(10)
    writer.add_expert_used_count(4)


def mixtral_keys(writer: Writer) -> None:
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)


EXPERTS = {"num_experts": 10, "num_experts_per_tok": 4, "moe_intermediate_size": 64}


def deepseek_v2_keys(writer: Writer) -> None:
    latent_keys(writer)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_yarn_log_mul(0.1 * 0.7)
    writer.add_expert_weights_scale(1.5)


def deepseek_v3_keys(writer: Writer) -> None:
    latent_keys(writer)
    writer.add_q_lora_rank(LATENTS["q_lora_rank"])
    writer.add_expert_weights_scale(2.5)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(4)
    writer.add_expert_group_used_count(2)


def glm4_moe_keys(writer: Writer) -> None:
    """The file says that a layer for further tokens follows."""
    writer.add_block_count(SIZES["num_hidden_layers"] + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(LATENTS["n_routed_experts"])
    writer.add_expert_used_count(3)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(1.7)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def latent_keys(writer: Writer) -> None:
    """As for an absorbed attention, whose keys are latents; sizes of heads under keys of their own."""
    rank, turning = LATENTS["kv_lora_rank"], LATENTS["qk_rope_head_dim"]
    writer.add_key_length(rank + turning)
    writer.add_value_length(rank)
    writer.add_key_length_mla(LATENTS["qk_nope_head_dim"] + turning)
    writer.add_value_length_mla(LATENTS["v_head_dim"])
    common_latent_keys(writer)


def older_latent_keys(writer: Writer) -> None:
    writer.add_key_length(LATENTS["qk_nope_head_dim"] + LATENTS["qk_rope_head_dim"])
    writer.add_value_length(LATENTS["v_head_dim"])
    common_latent_keys(writer)


def common_latent_keys(writer: Writer) -> None:
    writer.add_kv_lora_rank(LATENTS["kv_lora_rank"])
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(LATENTS["n_routed_experts"])
    writer.add_expert_used_count(LATENTS["num_experts_per_tok"])
    writer.add_expert_shared_count(LATENTS["n_shared_experts"])


LATENTS: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": HEAD_DIM,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
NOTHING_FURTHER = {"num_nextn_predict_layers": 0}
LATENT_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 1e4,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
GEMMA = {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW, "layer_types": TYPES}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}
ARCH = gguf.MODEL_ARCH
CASES: dict[str, Case] = {
    "gemma 2": Case(
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
        ARCH.GEMMA2,
        gemma2_keys,
        norm_offset=1.0,
    ),
    "gemma 2 without bounds": Case(
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
        norm_offset=1.0,
    ),
    "gemma 3": Case(
        "Gemma3",
        {**GEMMA, "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": GEMMA3_ROPE},
        ARCH.GEMMA3,
        gemma3_keys,
        norm_offset=1.0,
        turning=32,
    ),
    "phi 3": Case("Phi3", {"sliding_window": WINDOW}, ARCH.PHI3, lambda writer: writer.add_sliding_window(WINDOW)),
    "phi 4 mini": Case(
        "Phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}, ARCH.PHI3, turning=HEAD_DIM * 3 // 4
    ),
    "smollm 3": Case("SmolLM3", {}, ARCH.SMOLLM3, smollm3_keys, permutes=True),
    "olmo 2": Case("Olmo2", {}, ARCH.OLMO2),
    "olmo 3": Case(
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
        ARCH.OLMO2,
        olmo3_keys,
    ),
    "granite": Case("Granite", MULTIPLIERS, ARCH.GRANITE, granite_keys, permutes=True),
    "stablelm": Case("StableLm", {"use_qkv_bias": True}, ARCH.STABLELM, layer_norm=True, turning=HEAD_DIM // 4),
    "stablelm 12b": Case(
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True},
        ARCH.STABLELM,
        parallel_keys,
        layer_norm=True,
        turning=HEAD_DIM // 4,
    ),
    "command-r": Case("Cohere", {"logit_scale": 0.7}, ARCH.COMMAND_R, cohere_keys, layer_norm=True),
    "command-r+": Case(
        "Cohere", {"logit_scale": 0.7, "use_qk_norm": True}, ARCH.COMMAND_R, cohere_keys, layer_norm=True
    ),
    "command-a": Case(
        "Cohere2",
        {"logit_scale": 0.5, "sliding_window": WINDOW},
        ARCH.COHERE2,
        cohere2_keys,
        layer_norm=True,
    ),
    "glm 4 (2024)": Case("Glm", {}, ARCH.CHATGLM, turning=HEAD_DIM // 2),
    "glm 4": Case("Glm4", {}, ARCH.GLM4, turning=HEAD_DIM // 2),
    "ministral 3": Case(
        "Ministral3",
        {"rope_parameters": MINISTRAL_ROPE, "sliding_window": None},
        ARCH.MISTRAL3,
        ministral_keys,
        permutes=True,
    ),
    "mistral nemo": Case("Mistral", {"head_dim": 32, "sliding_window": None}, ARCH.LLAMA, nemo_keys, True, turning=32),
    "mixtral": Case("Mixtral", {"num_local_experts": 4}, ARCH.LLAMA, mixtral_keys, True),
    "qwen 2 moe": Case("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 160}, ARCH.QWEN2MOE, qwen2_moe_keys),
    "qwen 3 moe": Case("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}, ARCH.QWEN3MOE, expert_keys),
    "qwen 3 moe with dense layers": Case("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "olmoe": Case(
        "Olmoe",
        {"num_experts": 10, "num_experts_per_tok": 4},
        ARCH.OLMOE,
        olmoe_keys,
    ),
    "gpt-oss": Case(
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {**YARN, "truncate": False},
        },
        ARCH.GPT_OSS,
        gpt_oss_keys,
    ),
    "granite moe": Case(
        "GraniteMoeShared",
        {**MULTIPLIERS, "num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 96},
        ARCH.GRANITE_MOE,
        granite_moe_keys,
        permutes=True,
    ),
    "granite 4": Case(
        "GraniteMoeHybrid",
        {
            **MULTIPLIERS,
            "layer_types": ["full_attention"] * 4,
            "mamba_n_heads": HEADS,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "position_embedding_type": "rope",
        },
    ),
    "granite 4 with experts and without positions": Case(
        "GraniteMoeHybrid",
        {
            **MULTIPLIERS,
            "layer_types": ["full_attention"] * 4,
            "mamba_n_heads": HEADS,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 96,
        },
    ),
    "deepseek v2 lite": Case(
        "DeepseekV2",
        {**LATENTS, "q_lora_rank": None, "rope_parameters": LATENT_YARN, "routed_scaling_factor": 1.5},
        ARCH.DEEPSEEK2,
        deepseek_v2_keys,
    ),
    "deepseek v2, older gguf": Case(
        "DeepseekV2",
        {**LATENTS, "q_lora_rank": None},
        ARCH.DEEPSEEK2,
        older_latent_keys,
        splits_latents=False,
    ),
    "deepseek v2": Case(
        "DeepseekV2",
        {**LATENTS, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek v3": Case(
        "DeepseekV3",
        {**LATENTS, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
        ARCH.DEEPSEEK2,
        deepseek_v3_keys,
    ),
    "glm 4.5": Case(
        "Glm4Moe",
        {
            **{name: LATENTS[name] for name in ("first_k_dense_replace", "n_routed_experts")},
            **NOTHING_FURTHER,
            "moe_intermediate_size": 96,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        ARCH.GLM4_MOE,
        glm4_moe_keys,
        turning=HEAD_DIM // 2,
    ),
    "glm 4.7 flash": Case(
        "Glm4MoeLite",
        {**{name: size for name, size in LATENTS.items() if name != "first_k_dense_replace"}, **NOTHING_FURTHER},
    ),
    "mistral 4": Case(
        "Mistral4",
        {**LATENTS, "head_dim": 80, "rope_parameters": MINISTRAL_ROPE, "n_group": 4, "topk_group": 2},
    ),
    "seed-oss": Case("SeedOss", {"head_dim": 32}, ARCH.SEED_OSS, nemo_keys, turning=32),
    "internlm 2 (gguf)": Case("Llama", {}, ARCH.INTERNLM2, permutes=True),
}


def write_gguf(path: Path, case: Case, model: Any, **more: np.ndarray) -> Path:
    """The GGUF file of a model, under the names and in the row order of llama.cpp; `more` are further tensors."""
    if case.architecture is None:
        raise ValueError(f"llama.cpp does not know {case.name}")
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(case.turning)
    if case.layer_norm:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_theta" in config.rope_parameters and case.keys not in (smollm3_keys,):
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    case.keys(writer)
    tensors = gguf_tensors(case, case.architecture, model)
    for name, values in {**tensors, **{f"{key}.weight": values for key, values in more.items()}}.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(case: Case, architecture: gguf.MODEL_ARCH, model: Any) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    heads: dict[str, list[np.ndarray]] = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if stacked := stacked_names(name):
            tensors.update(zip(stacked, expert_parts(case, name, values, len(stacked)), strict=True))
            continue
        if ".norms." in name:  # StableLM's norms of single heads
            heads.setdefault(name.split(".norms.")[0] + ".weight", []).append(values)
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")  # as the converter does
        if name.endswith("kv_b_proj.weight") and case.splits_latents:
            layer = name.split(".")[2]
            both = values.reshape(HEADS, -1, values.shape[1])
            keys, expanded = np.split(both, [model.config.qk_nope_head_dim], axis=1)
            tensors[f"blk.{layer}.attn_k_b.weight"] = np.ascontiguousarray(keys.transpose(0, 2, 1))
            tensors[f"blk.{layer}.attn_v_b.weight"] = expanded
            continue
        if name.endswith("block_sparse_moe.router.weight"):
            name = name.replace("router", "router.layer")  # as in files
        if name.endswith(".sinks"):
            name += ".weight"
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"llama.cpp has no name for {name}")
        if case.permutes and target.split(".")[-2] in ("attn_q", "attn_k"):
            values = permuted(values, HEADS if "attn_q" in target else KV_HEADS)
        if target.endswith("norm.weight"):
            values = values + np.float32(case.norm_offset)
        tensors[target] = values
    for name, parts in heads.items():
        tensors[str(names.get_name(name, try_suffixes=(".weight",)))] = np.stack(parts)
    if architecture is ARCH.CHATGLM:  # published files have them stacked, as the model's own code does
        for name in [name for name in tensors if ".attn_q." in name]:
            parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return tensors


def stacked_names(name: str) -> list[str]:
    """llama.cpp's names of what transformers has as one tensor: gate and up, of all experts or of the shared one."""
    for module, kind in (("experts.", "exps"), ("shared_mlp.", "shexp")):
        if module in name and "shared_expert." not in name and "shared_experts." not in name:
            layer, last = name.split(".")[2], name.split(module)[1].split(".")[0]
            parts = ("down",) if last.startswith(("down_proj", "output_linear")) else ("gate", "up")
            return [f"blk.{layer}.ffn_{part}_{kind}.{'bias' if 'bias' in last else 'weight'}" for part in parts]
    return []


def expert_parts(case: Case, name: str, values: np.ndarray, count: int) -> list[np.ndarray]:
    """Gate and up, or down alone; GPT-OSS's matrices are transposed and their rows alternate."""
    if case.name != "GptOss":
        return np.split(values, count, axis=-2)
    rows = values if name.endswith("_bias") else values.swapaxes(1, 2)
    return [np.ascontiguousarray(rows[:, part::count]) for part in range(count)]


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to rows of q and k of models that it takes for Llama's relatives."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
