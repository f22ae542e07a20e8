"""Speed of mixtures of experts on a CPU: the native library beside torch operations and the machine's bandwidth.

    python benchmarks/cpu_experts.py [--models olmoe-1b-7b …] [--type Q4_K_M] [--layers 4] [--engines native torch]

What is timed, and how, is said in `cpu_layers.py`. A step's bytes are those of everything but the experts, and of as
many experts as random choices of its tokens are expected to name; llama.cpp takes the file for a Mixtral.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_layers import MAX_LEN, VOCABULARY, Case, DecodeStep, parser_of, run

from aphrodite.loading.dummy import BlockPacking, dummy_weights
from aphrodite.loading.weights import Weights
from aphrodite.models.spec import ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.types import QuantType

CONTEXT = 256
STEPS = [DecodeStep(f"decode, {sequences} sequences", sequences, CONTEXT) for sequences in (1, 8)]
SHAPES = {  # hidden size, query and key heads, head size, experts
    "olmoe-1b-7b": (2048, 16, 16, 128, MoeSpec(num_experts=64, top_k=8, intermediate_size=1024, normalize=True)),
    "qwen3-30b-a3b": (2048, 32, 4, 128, MoeSpec(num_experts=128, top_k=8, intermediate_size=768, normalize=True)),
    "gpt-oss-20b": (
        *(2880, 64, 8, 64),
        MoeSpec(num_experts=32, top_k=4, intermediate_size=2880, scoring="softmax_of_chosen"),
    ),
    "mixtral-8x7b": (4096, 32, 8, 128, MoeSpec(num_experts=8, top_k=2, intermediate_size=14336, normalize=True)),
}


def spec_of(name: str, layers: int) -> ModelSpec:
    hidden, heads, kv_heads, head_dim, moe = SHAPES[name]
    return ModelSpec(
        family="mixtral",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=moe.intermediate_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-6,
        max_position=MAX_LEN,
        rotary=RotarySpec(dim=head_dim),
        windows=(None,) * layers,
        tied_head=True,
        moe=moe,
        activation="swiglu_oai" if name == "gpt-oss-20b" else "silu",
    )


def describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)


def case_of(name: str, options: argparse.Namespace) -> Case:
    spec = spec_of(name, options.layers)
    most, more = (QuantType.Q4_K, QuantType.Q6_K) if options.type == "Q4_K_M" else (QuantType[options.type],) * 2

    def weights() -> Weights:
        return dummy_weights(spec, QuantType.F16, packing=BlockPacking(most, more))

    title = f"{name}, {options.layers} layers, {options.type}"
    return Case(title, spec, weights, STEPS, gguf.MODEL_ARCH.LLAMA, describe)


def main() -> None:
    parser = parser_of(__doc__, list(SHAPES), ["olmoe-1b-7b", "qwen3-30b-a3b"], layers=4)
    parser.add_argument("--type", default="Q4_K_M", help="Q4_K_M or a type of GGUF's with kernels (default Q4_K_M)")
    options = parser.parse_args()
    run((case_of(name, options) for name in options.models), options)


if __name__ == "__main__":
    main()
