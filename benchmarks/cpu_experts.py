"""Speed of mixtures of experts on a CPU: the native library beside torch operations and the machine's bandwidth.

    python benchmarks/cpu_experts.py [--models olmoe-1b-7b …] [--type Q4_K_M] [--layers 4] [--engines native torch]

Published shapes with random weights, cut to a few layers to fit; embedding and head are left small, so that layers are
what is timed. Every figure is the best of `--repeat` (other programs only ever make a step slower). A step's bytes are
those of everything but the experts, and of as many experts as random choices of its tokens are expected to name.
llama.cpp, where `make peers` has installed it, gets the same weights as a GGUF file of Mixtral's architecture; its
sequences are copies of one, which choose the same experts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.llama_cpp_client import LlamaCppPeer

from aphrodite.cli.machine import cpu_model, read_bandwidth
from aphrodite.cores import usable_cores
from aphrodite.loading.dummy import BlockPacking, dummy_weights
from aphrodite.loading.parameters import GGUF_NAMES
from aphrodite.loading.weights import Weights
from aphrodite.models.spec import ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.types import QuantType
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

VOCABULARY, BLOCK, CONTEXT, PROMPT = 2048, 16, 256, 512
PEER = "llama.cpp"
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
        max_position=4096,
        rotary=RotarySpec(dim=head_dim),
        windows=(None,) * layers,
        tied_head=True,
        moe=moe,
        activation="swiglu_oai" if name == "gpt-oss-20b" else "silu",
    )


def step_bytes(spec: ModelSpec, weights: Weights, tokens: int) -> float:
    """Stored bytes that a step of so many tokens is expected to read."""
    moe = spec.moe
    if moe is None:
        raise ValueError("the shape has no experts")
    share = 1.0 - (1.0 - moe.top_k / moe.num_experts) ** tokens
    return sum(
        parameter.nbytes * (share if ".expert_" in name else 1.0) for name, parameter in weights.parameters.items()
    )


def inputs_of(sequences: int, count: int, first: int, seed: int) -> ForwardInputs:
    """The next `count` random tokens of sequences of which `first` have been computed."""
    tables = torch.arange(sequences * (CONTEXT * 4 // BLOCK), dtype=torch.int32).view(sequences, -1)
    positions = torch.arange(first, first + count, dtype=torch.int32)
    slots = torch.stack([table[positions // BLOCK].long() * BLOCK + positions % BLOCK for table in tables])
    tokens = torch.randint(
        VOCABULARY, (sequences * count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    return ForwardInputs(
        token_ids=tokens,
        positions=positions.repeat(sequences),
        slot_mapping=slots.flatten(),
        query_start=torch.arange(sequences + 1, dtype=torch.int32) * count,
        context_lens=torch.full((sequences,), first + count, dtype=torch.int32),
        block_tables=tables,
        logits_index=torch.arange(sequences, dtype=torch.int32) * count + count - 1,
    )


def seconds(executor: ModelExecutor, sequences: int, count: int, first: int, repeat: int) -> float:
    """Of a step, the best of `repeat`, each with other tokens."""
    best = float("inf")
    for seed in range(repeat):
        inputs = inputs_of(sequences, count, first, seed)
        began = time.perf_counter()
        executor.forward(inputs)
        best = min(best, time.perf_counter() - began)
    return best


def builders(threads: int) -> dict[str, Callable[[ModelSpec, Weights], ModelExecutor]]:
    def native(spec: ModelSpec, weights: Weights) -> NativeExecutor:
        torch.set_num_threads(1)
        return NativeExecutor(spec, weights, block_size=BLOCK, max_model_len=4096, threads=threads)

    def by_torch(spec: ModelSpec, weights: Weights) -> TorchExecutor:
        torch.set_num_threads(threads)
        device = torch.device("cpu")
        return TorchExecutor(spec, weights, block_size=BLOCK, max_model_len=4096, dtype=torch.bfloat16, device=device)

    return {"native": native, "torch": by_torch}


def write_gguf(path: Path, spec: ModelSpec, weights: Weights) -> None:
    """A file that llama.cpp takes for a Mixtral, without a vocabulary."""
    if spec.moe is None:
        raise ValueError("the shape has no experts")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.moe.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_expert_count(spec.moe.num_experts)
    writer.add_expert_used_count(spec.moe.top_k)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name in weights:
        raw = weights[name]
        data = raw.data.reshape(*raw.shape[:-1], -1)
        writer.add_tensor(
            GGUF_NAMES.checkpoint_name(name), data, raw_dtype=gguf.GGMLQuantizationType(raw.qtype.gguf_id)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class PeerTimes:
    """llama.cpp on the same weights."""

    def __init__(self, spec: ModelSpec, weights: Weights, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        write_gguf(path, spec, weights)
        self._peer = LlamaCppPeer(str(path), threads=threads)

    def decode(self, sequences: int, repeat: int) -> float:
        return min(self._peer.decode(streams=sequences, start=CONTEXT, steps=8) for _ in range(max(2, repeat // 4)))

    def prefill(self, repeat: int) -> float:
        return min(self._peer.prefill(length=PROMPT) for _ in range(repeat))

    def close(self) -> None:
        self._peer.close()
        self._folder.cleanup()


class ExecutorTimes:
    """One of our executors."""

    def __init__(self, executor: ModelExecutor) -> None:
        self._executor = executor
        executor.allocate_kv_cache(8 * CONTEXT * 4 // BLOCK)

    def decode(self, sequences: int, repeat: int) -> float:
        seconds(self._executor, sequences, CONTEXT, 0, 1)
        return seconds(self._executor, sequences, 1, CONTEXT, repeat)

    def prefill(self, repeat: int) -> float:
        return seconds(self._executor, 1, PROMPT, 0, repeat)

    def close(self) -> None:
        """Nothing is held but memory."""


def measure(name: str, options: argparse.Namespace, bandwidth: float) -> None:
    spec = spec_of(name, options.layers)
    most, more = (QuantType.Q4_K, QuantType.Q6_K) if options.type == "Q4_K_M" else (QuantType[options.type],) * 2
    for engine in options.engines:
        weights = dummy_weights(spec, QuantType.F16, packing=BlockPacking(most, more))
        stored = sum(parameter.nbytes for parameter in weights.parameters.values())
        held = ""
        if engine == PEER:
            times: PeerTimes | ExecutorTimes = PeerTimes(spec, weights, options.threads)
        else:
            executor = builders(options.threads)[engine](spec, weights)
            held = f", {executor.weight_bytes / stored:.2f} times in memory"
            times = ExecutorTimes(executor)
            del executor
        print(f"{name}, {options.layers} layers, {options.type}, {engine}: {stored / 1e6:,.0f} MB stored{held}")
        for sequences in (1, 8):
            step = times.decode(sequences, options.repeat)
            read = step_bytes(spec, weights, sequences) / step
            shares = f" ({read / 1e9:.1f} GB/s, {read / bandwidth:.0%} of reading)"
            shown = shares if engine != PEER or sequences == 1 else ""
            print(f"  decode, {sequences} sequences: {step * 1e3:.2f} ms a step{shown}", flush=True)
        step = times.prefill(max(2, options.repeat // 4))
        rate = PROMPT * options.layers / step
        print(f"  prefill of {PROMPT} tokens: {step * 1e3:,.0f} ms ({rate:,.0f} tokens x layers a second)", flush=True)
        times.close()
        del times, weights
        gc.collect()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["olmoe-1b-7b", "qwen3-30b-a3b"], choices=SHAPES)
    parser.add_argument("--type", default="Q4_K_M", help="Q4_K_M or a type of GGUF's with kernels (default Q4_K_M)")
    parser.add_argument("--layers", type=int, default=4)
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
