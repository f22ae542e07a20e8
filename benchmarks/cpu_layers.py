"""Layers of a published shape timed on a CPU: what the benchmarks of experts and of latent attention share.

Shapes have random weights and are cut to a few layers to fit; embedding and head are left small, so that layers are
what is timed. Every figure is the best of `--repeat` (other programs only ever make a step slower). llama.cpp, where
`make peers` has installed it, gets the same weights as a GGUF file; its sequences are copies of one, which choose the
same experts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.llama_cpp_client import LlamaCppPeer

from aphrodite.cli.machine import cpu_model, read_bandwidth
from aphrodite.cores import usable_cores
from aphrodite.loading.parameters import GGUF_NAMES
from aphrodite.loading.weights import Weights
from aphrodite.models.spec import ModelSpec
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

VOCABULARY, BLOCK, PROMPT, MAX_LEN = 2048, 16, 512, 4096
CHUNK = 500  # tokens of a prompt that fills a context
PEER = "llama.cpp"
ENGINES = ("native", "torch", PEER)


class DecodeStep(NamedTuple):
    """One token of each of so many sequences, behind so many positions."""

    label: str
    sequences: int
    context: int


class Case(NamedTuple):
    """A shape to be timed.

    Attributes:
        steps: in an order in which contexts grow as long as the number of sequences stays.
        architecture: of the file for llama.cpp; `describe` adds what such a file says beyond sizes that all have.
    """

    title: str
    spec: ModelSpec
    make_weights: Callable[[], Weights]
    steps: Sequence[DecodeStep]
    architecture: gguf.MODEL_ARCH
    describe: Callable[[gguf.GGUFWriter, ModelSpec], None]


class ExecutorTimes:
    """One of our executors."""

    def __init__(self, executor: ModelExecutor, steps: Sequence[DecodeStep]) -> None:
        self._executor = executor
        self._blocks = -(-max(PROMPT, *(step.context + 1 for step in steps)) // BLOCK)  # of a sequence
        self._sequences, self._filled = 0, 0
        executor.allocate_kv_cache(max(step.sequences for step in steps) * self._blocks)

    def decode(self, step: DecodeStep, repeat: int) -> float:
        """Seconds of a step."""
        begin = self._filled if step.sequences == self._sequences else 0
        for first in range(begin, step.context, CHUNK):
            self._forward(step.sequences, min(CHUNK, step.context - first), first, first)
        self._sequences, self._filled = step.sequences, step.context
        return min(self._forward(step.sequences, 1, step.context, seed) for seed in range(repeat))

    def prefill(self, repeat: int) -> float:
        self._sequences = 0
        return min(self._forward(1, PROMPT, 0, seed) for seed in range(repeat))

    def close(self) -> None:
        """Nothing is held but memory."""

    def _forward(self, sequences: int, count: int, first: int, seed: int) -> float:
        """Seconds for the next `count` random tokens of sequences of which `first` have been computed."""
        inputs = inputs_of(sequences, count, first, self._blocks, seed)
        began = time.perf_counter()
        self._executor.forward(inputs)
        return time.perf_counter() - began


def inputs_of(sequences: int, count: int, first: int, blocks: int, seed: int) -> ForwardInputs:
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, -1)
    positions = torch.arange(first, first + count, dtype=torch.int32)
    slots = torch.stack([table[positions // BLOCK].long() * BLOCK + positions % BLOCK for table in tables])
    generator = torch.Generator().manual_seed(seed)
    return ForwardInputs(
        token_ids=torch.randint(VOCABULARY, (sequences * count,), generator=generator, dtype=torch.int32),
        positions=positions.repeat(sequences),
        slot_mapping=slots.flatten(),
        query_start=torch.arange(sequences + 1, dtype=torch.int32) * count,
        context_lens=torch.full((sequences,), first + count, dtype=torch.int32),
        block_tables=tables,
        logits_index=torch.arange(sequences, dtype=torch.int32) * count + count - 1,
    )


class PeerTimes:
    """llama.cpp on the same weights."""

    def __init__(self, case: Case, weights: Weights, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        write_gguf(path, case, weights)
        self._peer = LlamaCppPeer(str(path), threads=threads)

    def decode(self, step: DecodeStep, repeat: int) -> float:
        runs = range(max(2, repeat // 4))
        return min(self._peer.decode(streams=step.sequences, start=step.context, steps=8) for _ in runs)

    def prefill(self, repeat: int) -> float:
        return min(self._peer.prefill(length=PROMPT) for _ in range(repeat))

    def close(self) -> None:
        self._peer.close()
        self._folder.cleanup()


def write_gguf(path: Path, case: Case, weights: Weights) -> None:
    """A file of the case's architecture, without a vocabulary."""
    spec, moe = case.spec, case.spec.moe
    if moe is None:
        raise ValueError("the shape has no experts")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.architecture])
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(moe.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    case.describe(writer, spec)
    for name in weights:
        raw = weights[name]
        kind = gguf.GGMLQuantizationType(raw.qtype.gguf_id)
        writer.add_tensor(GGUF_NAMES.checkpoint_name(name), raw.data.reshape(*raw.shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def native(spec: ModelSpec, weights: Weights, threads: int) -> ModelExecutor:
    torch.set_num_threads(1)
    return NativeExecutor(spec, weights, block_size=BLOCK, max_model_len=MAX_LEN, threads=threads)


def by_torch(spec: ModelSpec, weights: Weights, threads: int) -> ModelExecutor:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    return TorchExecutor(spec, weights, block_size=BLOCK, max_model_len=MAX_LEN, dtype=torch.bfloat16, device=device)


def step_bytes(spec: ModelSpec, weights: Weights, tokens: int) -> float:
    """Stored bytes that a step of so many tokens is expected to read: all, but of experts those that they choose."""
    if spec.moe is None:
        raise ValueError("the shape has no experts")
    share = 1.0 - (1.0 - spec.moe.top_k / spec.moe.num_experts) ** tokens
    return sum(
        parameter.nbytes * (share if ".expert_" in name else 1.0) for name, parameter in weights.parameters.items()
    )


def measure(case: Case, engine: str, options: argparse.Namespace, bandwidth: float) -> None:
    weights = case.make_weights()
    stored = sum(parameter.nbytes for parameter in weights.parameters.values())
    held = ""
    if engine == PEER:
        times: PeerTimes | ExecutorTimes = PeerTimes(case, weights, options.threads)
    else:
        executor = (native if engine == "native" else by_torch)(case.spec, weights, options.threads)
        held = f", {executor.weight_bytes / stored:.2f} times in memory"
        times = ExecutorTimes(executor, case.steps)
    print(f"{case.title}, {engine}: {stored / 1e6:,.0f} MB stored{held}")
    for step in case.steps:
        seconds = times.decode(step, options.repeat)
        read = step_bytes(case.spec, weights, step.sequences) / seconds
        shares = f" ({read / 1e9:.1f} GB/s of weights, {read / bandwidth:.0%} of reading)"
        shown = shares if engine != PEER or step.sequences == 1 else ""
        print(f"  {step.label}: {seconds * 1e3:.2f} ms{shown}", flush=True)
    seconds = times.prefill(max(2, options.repeat // 4))
    rate = PROMPT * case.spec.num_layers / seconds
    print(f"  a prompt of {PROMPT}: {seconds * 1e3:,.0f} ms ({rate:,.0f} tokens x layers a second)", flush=True)
    times.close()


def parser_of(
    description: str | None, shapes: Sequence[str], chosen: Sequence[str], layers: int
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=chosen, choices=shapes)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--engines", nargs="+", default=ENGINES[:2], choices=ENGINES)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores())
    return parser


def run(cases: Iterable[Case], options: argparse.Namespace) -> None:
    if PEER in options.engines and (declined := LlamaCppPeer.declines()):
        raise SystemExit(declined)
    bandwidth = read_bandwidth(options.threads)
    print(f"{cpu_model()}, {options.threads} threads; plain read of memory {bandwidth / 1e9:.1f} GB/s")
    for case in cases:
        for engine in options.engines:
            measure(case, engine, options, bandwidth)
            gc.collect()
