"""Whatever stands in a config.json, it is read or refused in one line; nothing is allocated for it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphrodite.errors import AphroditeError
from aphrodite.loading.inspect import Inspection, inspect

ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
COMMON: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "sliding_window": 40, "rope_parameters": ROPE, "eos_token_id": [1, 2],
    "torch_dtype": "float32",
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "quantization_config": GPTQ, "attention_bias": True},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    },
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
}  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, 1.5, 1e-308, 1e308, math.nan, math.inf, -math.inf, "",
    "x\ny", [], [1], [None], {}, {"a": 1},
]  # fmt: skip
Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> list[Place]:
    """Of everything in a configuration, lists by their first entry."""
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in [(*at, key), *places(inner, (*at, key))]]
    return [(*at, 0)] if isinstance(value, list) and value else []


def config_of(family: str) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **CONFIGS[family]}


CASES = [(family, place) for family in CONFIGS for place in places(config_of(family))]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_configurations_are_good(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family)))
    assert isinstance(inspect(tmp_path, load_format="dummy"), Inspection)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(CASES), st.sampled_from(VALUES)), min_size=1, max_size=2))
def test_any_value_is_read_or_refused_in_one_line(changes: list[tuple[tuple[str, Place], Any]], tmp_path: Path) -> None:
    family = changes[0][0][0]
    config = copy.deepcopy(config_of(family))
    for (_, place), value in changes:
        inside: Any = config
        for key in place[:-1]:
            inside = inside.get(key) if isinstance(inside, dict) else None
        if isinstance(inside, dict) or (isinstance(inside, list) and inside):
            inside[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    problem = problem_of(tmp_path)
    assert problem is None or str(tmp_path) in problem or "rotary embedding" in problem
    assert "\n" not in (problem or "")


def problem_of(model: Path) -> str | None:
    try:
        inspect(model, load_format="dummy")
    except AphroditeError as error:
        return str(error)
    return None
