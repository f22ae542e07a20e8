"""Speed of latent attention (DeepSeek's) on a CPU: the native library beside torch operations and llama.cpp.

    python benchmarks/cpu_latents.py [--models glm-4.7-flash …] [--layers 3] [--experts 64] [--engines native torch]

What is timed, and how, is said in `cpu_layers.py`; weights are in the types of a Q4_K_M file. A step decodes one token
behind 256 and behind 4,000 positions. llama.cpp takes a model without a latent of queries for one only with 26 or 27
layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import gguf

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_layers import MAX_LEN, VOCABULARY, Case, DecodeStep, parser_of, run

from aphrodite.loading.dummy import BlockPacking, dummy_weights
from aphrodite.loading.weights import Parameter, Weights
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.types import QuantType

STEPS = [DecodeStep(f"a token behind {context:,} positions", 1, context) for context in (256, 4000)]


def spec_of(hidden: int, heads: int, mla: MlaSpec, moe: MoeSpec) -> ModelSpec:
    """A layer's shape; `options` say how many there are."""
    return ModelSpec(
        family="deepseek_v2",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=moe.intermediate_size,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=mla.head_dim,
        norm_eps=1e-6,
        max_position=MAX_LEN,
        rotary=RotarySpec(dim=mla.qk_rope_head_dim),
        windows=(None,),
        tied_head=True,
        attention_scale=mla.head_dim**-0.5,
        moe=moe,
        mla=mla,
    )


SHAPES = {
    "deepseek-v2-lite": spec_of(
        2048,
        16,
        MlaSpec(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        MoeSpec(num_experts=64, top_k=6, intermediate_size=1408, shared_intermediate_size=2816),
    ),
    "glm-4.7-flash": spec_of(
        2048,
        20,
        MlaSpec(q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256),
        MoeSpec(num_experts=64, top_k=4, intermediate_size=1536, shared_intermediate_size=1536, scoring="sigmoid"),
    ),
}


def weights_of(spec: ModelSpec) -> Weights:
    """Random ones in the types of Q4_K_M; blocks of 32 values where those of 256 do not divide the inputs."""
    coarse = dummy_weights(spec, QuantType.F16, packing=BlockPacking(QuantType.Q4_K, QuantType.Q6_K)).parameters
    fine = dummy_weights(spec, QuantType.F16, packing=BlockPacking(QuantType.Q5_0, QuantType.Q8_0)).parameters

    def better(name: str) -> Parameter:
        return fine[name] if coarse[name].qtype.block_size == 1 else coarse[name]

    return Weights({name: better(name) for name in coarse})


def describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """deepseek2's keys, as newer converters write them."""
    mla, moe = spec.mla, spec.moe
    if mla is None or moe is None:
        raise ValueError("the shape has no latents or no experts")
    writer.add_head_count_kv(1)
    writer.add_key_length(mla.latent_dim)
    writer.add_value_length(mla.kv_lora_rank)
    writer.add_key_length_mla(mla.head_dim)
    writer.add_value_length_mla(mla.v_head_dim)
    writer.add_kv_lora_rank(mla.kv_lora_rank)
    if mla.q_lora_rank is not None:
        writer.add_q_lora_rank(mla.q_lora_rank)
    writer.add_rope_dimension_count(mla.qk_rope_head_dim)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_shared_count(moe.shared_intermediate_size // moe.intermediate_size)
    writer.add_expert_feed_forward_length(moe.intermediate_size)
    writer.add_expert_weights_scale(1.0)
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if moe.scoring == "sigmoid" else gating.SOFTMAX)


def case_of(name: str, options: argparse.Namespace) -> Case:
    shape, layers = SHAPES[name], options.layers
    moe = None if shape.moe is None else dataclasses.replace(shape.moe, num_experts=options.experts)
    spec = dataclasses.replace(shape, num_layers=layers, windows=(None,) * layers, moe=moe)
    title = f"{name}, {layers} layers of {options.experts} experts"
    return Case(title, spec, partial(weights_of, spec), STEPS, gguf.MODEL_ARCH.DEEPSEEK2, describe)


def main() -> None:
    parser = parser_of(__doc__, list(SHAPES), list(SHAPES), layers=3)
    parser.add_argument("--experts", type=int, default=64, help="of a layer (default 64, as published)")
    options = parser.parse_args()
    run((case_of(name, options) for name in options.models), options)


if __name__ == "__main__":
    main()
