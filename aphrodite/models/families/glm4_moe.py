"""GLM 4.5, 4.5-Air, 4.6 and 4.7 (arXiv 2508.06471): half of each head turns, in halves, and experts are chosen as
DeepSeek-V3 does. Layers that predict further tokens are not used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, Storage
from aphrodite.models.families.common import MAX_LAYERS, Family, decoder_from_config, decoder_from_gguf, head_dim
from aphrodite.models.families.deepseek import corrected_moe, dense_layers, grouped_moe_from_gguf
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_TURNING = 0.5  # what transformers assumes


def _from_config(config: ConfigReader) -> ModelSpec:
    spec = decoder_from_config(
        config,
        family="glm4_moe",
        rotary=rotary_from_config(config, head_dim(config), default_fraction=_TURNING),
        qk_norm=config.read("use_qk_norm", bool, False),
        qkv_bias=config.read("attention_bias", bool, False),
    )
    dense = dense_layers(config.with_defaults({"first_k_dense_replace": 1}))
    return dataclasses.replace(spec, moe=corrected_moe(config, dense)) if len(dense) < spec.num_layers else spec


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """The number of layers there includes those that predict further tokens."""
    spec = decoder_from_gguf(
        config,
        tensors,
        family="glm4_moe",
        partial_rotary=True,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        experts=True,
    )
    further = config.read("nextn_predict_layers", int, 0, low=0, high=min(MAX_LAYERS, spec.num_layers - 1))
    count = spec.num_layers - further
    moe = grouped_moe_from_gguf(config, tensors)
    dense = tuple(layer for layer in moe.dense_layers if layer < count)
    moe = dataclasses.replace(moe, dense_layers=dense)
    return dataclasses.replace(spec, num_layers=count, windows=spec.windows[:count], moe=moe)


GLM4_MOE = Family(
    name="glm4_moe",
    title="GLM 4.5, 4.5-Air, 4.6, 4.7",
    architectures=("Glm4MoeForCausalLM",),
    wrapped_by=("Glm4vMoeForConditionalGeneration",),
    from_config=_from_config,
    gguf_architecture="glm4moe",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES.renamed(mlp_norm="post_attention_norm")),
    predicts_further=True,
)
