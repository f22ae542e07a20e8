"""Speed of latent attention (DeepSeek's) on a CPU: the native library beside torch operations and llama.cpp.

    python benchmarks/cpu_latents.py [--models glm-4.7-flash …] [--layers 3] [--experts 64] [--engines native torch]

Published shapes with random weights in the types of a Q4_K_M file, cut to a few layers (and experts) to fit; embedding
and head are left small, so that layers are what is timed. A step decodes one token behind 256 and behind 4,000
positions; a prompt has 512. Every figure is the best of `--repeat`. llama.cpp, where `make peers` has installed it,
gets the same weights as a GGUF file; it takes a model without a latent of queries for one only with 26 or 27 layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
from pathlib import Path

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_experts import BLOCK, PEER, PROMPT, VOCABULARY, builders
from peers.llama_cpp_client import LlamaCppPeer

from aphrodite.cli.machine import cpu_model, read_bandwidth
from aphrodite.cores import usable_cores
from aphrodite.loading.dummy import BlockPacking, dummy_weights
from aphrodite.loading.parameters import GGUF_NAMES
from aphrodite.loading.weights import Parameter, Weights
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.types import QuantType
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.inputs import ForwardInputs

CONTEXTS = (256, 4000)
CHUNK = 500  # tokens of a prompt that fills a context
MAX_LEN = 4096


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


def inputs_of(count: int, first: int, seed: int) -> ForwardInputs:
    """The next `count` random tokens of a sequence of which `first` have been computed."""
    positions = torch.arange(first, first + count, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return ForwardInputs(
        token_ids=torch.randint(VOCABULARY, (count,), generator=generator, dtype=torch.int32),
        positions=positions,
        slot_mapping=positions.long(),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([first + count], dtype=torch.int32),
        block_tables=torch.arange(MAX_LEN // BLOCK, dtype=torch.int32)[None],
        logits_index=torch.tensor([count - 1], dtype=torch.int32),
    )


class ExecutorTimes:
    """One of our executors."""

    def __init__(self, executor: ModelExecutor) -> None:
        self._executor = executor
        executor.allocate_kv_cache(MAX_LEN // BLOCK)
        self._filled = 0

    def decode(self, context: int, repeat: int) -> float:
        """Seconds of a step behind `context` positions; contexts have to grow."""
        for first in range(self._filled, context, CHUNK):
            self._executor.forward(inputs_of(min(CHUNK, context - first), first, first))
        self._filled = context
        return min(self._step(1, context, seed) for seed in range(repeat))

    def prefill(self, repeat: int) -> float:
        self._filled = 0
        return min(self._step(PROMPT, 0, seed) for seed in range(repeat))

    def close(self) -> None:
        """Nothing is held but memory."""

    def _step(self, count: int, first: int, seed: int) -> float:
        inputs = inputs_of(count, first, seed)
        began = time.perf_counter()
        self._executor.forward(inputs)
        return time.perf_counter() - began


class PeerTimes:
    """llama.cpp on the same weights."""

    def __init__(self, spec: ModelSpec, weights: Weights, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        write_gguf(path, spec, weights)
        self._peer = LlamaCppPeer(str(path), threads=threads)

    def decode(self, context: int, repeat: int) -> float:
        return min(self._peer.decode(streams=1, start=context, steps=8) for _ in range(max(2, repeat // 4)))

    def prefill(self, repeat: int) -> float:
        return min(self._peer.prefill(length=PROMPT) for _ in range(repeat))

    def close(self) -> None:
        self._peer.close()
        self._folder.cleanup()


def write_gguf(path: Path, spec: ModelSpec, weights: Weights) -> None:
    """A file of deepseek2's architecture as newer converters make it, without a vocabulary."""
    mla, moe = spec.mla, spec.moe
    if mla is None or moe is None:
        raise ValueError("the shape has no latents or no experts")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(mla.latent_dim)
    writer.add_value_length(mla.kv_lora_rank)
    writer.add_key_length_mla(mla.head_dim)
    writer.add_value_length_mla(mla.v_head_dim)
    writer.add_kv_lora_rank(mla.kv_lora_rank)
    if mla.q_lora_rank is not None:
        writer.add_q_lora_rank(mla.q_lora_rank)
    writer.add_rope_dimension_count(mla.qk_rope_head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_shared_count(moe.shared_intermediate_size // moe.intermediate_size)
    writer.add_expert_feed_forward_length(moe.intermediate_size)
    writer.add_expert_weights_scale(1.0)
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if moe.scoring == "sigmoid" else gating.SOFTMAX)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name in weights:
        raw = weights[name]
        kind = gguf.GGMLQuantizationType(raw.qtype.gguf_id)
        writer.add_tensor(GGUF_NAMES.checkpoint_name(name), raw.data.reshape(*raw.shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def step_bytes(spec: ModelSpec, weights: Weights) -> float:
    """Stored bytes of weights that a token reads."""
    moe = spec.moe
    if moe is None:
        raise ValueError("the shape has no experts")
    share = moe.top_k / moe.num_experts
    return sum(p.nbytes * (share if ".expert_" in name else 1.0) for name, p in weights.parameters.items())


def measure(name: str, options: argparse.Namespace, bandwidth: float) -> None:
    shape = SHAPES[name]
    moe = dataclasses.replace(shape.moe, num_experts=options.experts)  # type: ignore[type-var]
    layers = options.layers
    spec = dataclasses.replace(shape, num_layers=layers, windows=(None,) * layers, moe=moe)
    for engine in options.engines:
        weights = weights_of(spec)
        stored = sum(parameter.nbytes for parameter in weights.parameters.values())
        held = ""
        if engine == PEER:
            times: PeerTimes | ExecutorTimes = PeerTimes(spec, weights, options.threads)
        else:
            executor = builders(options.threads)[engine](spec, weights)
            held = f", {executor.weight_bytes / stored:.2f} times in memory"
            times = ExecutorTimes(executor)
            del executor
        print(f"{name}, {layers} layers of {options.experts} experts, {engine}: {stored / 1e6:,.0f} MB stored{held}")
        for context in CONTEXTS:
            step = times.decode(context, options.repeat)
            read = step_bytes(spec, weights) / step
            shares = f"{read / 1e9:.1f} GB/s of weights, {read / bandwidth:.0%} of reading"
            print(f"  a token behind {context:,} positions: {step * 1e3:.2f} ms ({shares})", flush=True)
        step = times.prefill(max(2, options.repeat // 4))
        print(f"  a prompt of {PROMPT}: {step * 1e3:,.0f} ms ({PROMPT / step:,.0f} tok/s)", flush=True)
        times.close()
        del times, weights
        gc.collect()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=64, help="of a layer (default 64, as published)")
    engines = ["native", "torch", PEER]
    parser.add_argument("--engines", nargs="+", default=engines[:2], choices=engines)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores())
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if PEER in options.engines and (declined := LlamaCppPeer.declines()):
        raise SystemExit(declined)
    bandwidth = read_bandwidth(options.threads)
    print(f"{cpu_model()}, {options.threads} threads; plain read of memory {bandwidth / 1e9:.1f} GB/s")
    for name in options.models:
        measure(name, options, bandwidth)


if __name__ == "__main__":
    main()
