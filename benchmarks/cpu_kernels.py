"""Speed of the native CPU executor on one model, beside what the machine can do.

    python benchmarks/cpu_kernels.py [MODEL.gguf] [--activations int16 int8] [--repeat 9] [--profile]

Each row is the best of `--repeat` steps (other programs only ever make a step slower). GB/s counts the weights and
the KV cache that a step reads once, GOP/s its multiply-adds in products and attention (two operations each); their
shares are of the limits printed at the top, which are measured with the same instructions and threads.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from dataclasses import dataclass

import numpy as np
import torch

from aphrodite.kernels.cpu.library import load
from aphrodite.kernels.cpu.program import NativeMemory
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.default_model import find_default_model
from aphrodite.models.spec import ModelSpec
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native import NativeExecutor

BLOCK = 16
MAX_LEN = 2304
READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Workload:
    """`streams` sequences that each compute `count` tokens after `context - count` cached ones."""

    name: str
    streams: int
    count: int
    context: int


WORKLOADS = (
    *(Workload(f"decode {s:>2} x {c}", s, 1, c) for s, c in ((1, 256), (1, 1500), (8, 256), (8, 1500), (32, 256))),
    *(Workload(f"prefill {n}", 1, n, n) for n in (128, 512, 2048)),
)


@dataclass(frozen=True)
class Limits:
    """Bytes and operations per second."""

    read: float
    ops: dict[str, float]


def measure_limits(executor: NativeExecutor, repeat: int) -> Limits:
    """Best of `repeat` runs of the library's own loops."""
    library = load()
    if library is None:
        raise SystemExit("the native library is not built: `pip install -e .` builds it")
    isa, threads = executor.isa.encode(), executor.threads
    dots, read = library.cdll.aph_measure_dots, library.cdll.aph_measure_read
    dots.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    read.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
    dots.restype = read.restype = ctypes.c_double
    memory = NativeMemory(library, READ_BYTES + 8192)
    ctypes.memset(memory.address, 1, memory.size)
    rates = {bits: max(dots(isa, threads, bits, 2_000_000) for _ in range(repeat)) for bits in (16, 8)}
    bandwidth = max(read(isa, threads, memory.address, READ_BYTES) for _ in range(repeat))
    return Limits(bandwidth, {"int16": 2 * rates[16], "int8": 2 * rates[8], "float32": rates[16]})


def allocate_kv_cache(executor: NativeExecutor) -> None:
    """A cache for the largest workload, all of it written: memory never written is one page of zeros, which is read
    from the processor's caches."""
    executor.allocate_kv_cache(max(work.streams * -(-work.context // BLOCK) for work in WORKLOADS))
    cache = executor._cache
    if cache is not None:
        ctypes.memset(cache.address, 0, cache.size)


def step_inputs(spec: ModelSpec, work: Workload) -> ForwardInputs:
    """Random tokens in blocks scattered over the cache."""
    generator = np.random.default_rng(0)
    blocks = -(-work.context // BLOCK)
    tables = generator.permutation(work.streams * blocks).reshape(work.streams, blocks).astype(np.int32)
    positions = np.tile(np.arange(work.context - work.count, work.context, dtype=np.int32), work.streams)
    rows = np.repeat(np.arange(work.streams), work.count)
    slots = tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    ends = np.arange(1, work.streams + 1, dtype=np.int32) * work.count
    return ForwardInputs(
        token_ids=torch.from_numpy(generator.integers(0, spec.vocab_size, len(rows)).astype(np.int32)),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        query_start=torch.from_numpy(np.concatenate([np.zeros(1, np.int32), ends])),
        context_lens=torch.full((work.streams,), work.context, dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        logits_index=torch.from_numpy(ends - 1),
    )


def read_bytes(executor: NativeExecutor, checkpoint: Checkpoint, work: Workload) -> int:
    """Bytes that a step has to read: every weight once (of an untied embedding next to nothing), the cache once."""
    embedding = 0 if checkpoint.spec.tied_head else checkpoint.weights["embed.weight"].nbytes
    return executor.weight_bytes - embedding + work.streams * work.context * executor.kv_bytes_per_block // BLOCK


def operations(spec: ModelSpec, work: Workload) -> int:
    """Two for every multiply-add of products and attention; the head runs once a stream."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    layer = spec.hidden_size * (2 * heads + 2 * kv_heads) * dim + 3 * spec.hidden_size * spec.intermediate_size
    seen = work.count * (work.context - work.count) + work.count * (work.count + 1) // 2
    per_stream = work.count * spec.num_layers * layer + 2 * seen * heads * dim * spec.num_layers
    return 2 * work.streams * (per_stream + spec.vocab_size * spec.hidden_size)


def measure(executor: NativeExecutor, work: Workload, repeat: int) -> float:
    """Seconds of the fastest of `repeat` steps, after one that warms up."""
    inputs = step_inputs(executor.spec, work)
    executor.forward(inputs)
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        executor.forward(inputs)
        times.append(time.perf_counter() - began)
    return min(times)


def report(executor: NativeExecutor, checkpoint: Checkpoint, work: Workload, limits: Limits, seconds: float) -> str:
    """One line of the table."""
    tokens = work.streams * work.count
    read = read_bytes(executor, checkpoint, work) / seconds
    ops = operations(executor.spec, work) / seconds
    peak = limits.ops[executor.activations]
    return (
        f"{executor.activations:8} {work.name:16} {tokens / seconds:8.0f} tok/s {seconds * 1e3:9.3f} ms "
        f"{read / 1e9:7.1f} GB/s ({read / limits.read:4.0%}) {ops / 1e9:7.0f} GOP/s ({ops / peak:4.0%})"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--activations", nargs="+", default=["int16", "int8"], choices=["float32", "int16", "int8"])
    parser.add_argument("--workload", default="", help="only those whose name contains this")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--profile", action="store_true", help="time of each kind of operation")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    checkpoint = open_checkpoint(options.model or find_default_model())
    torch.set_num_threads(1)
    limits = None
    for activations in options.activations:
        executor = NativeExecutor(
            checkpoint.spec,
            checkpoint.weights,
            block_size=BLOCK,
            max_model_len=MAX_LEN,
            activations=activations,
            threads=options.threads,
            isa=options.isa,
        )
        allocate_kv_cache(executor)
        if limits is None:
            limits = measure_limits(executor, options.repeat)
            rates = ", ".join(f"{name} {rate / 1e9:.0f} GOP/s" for name, rate in limits.ops.items())
            print(", ".join(f"{key}: {value}" for key, value in executor.describe().items()))
            print(f"limits of {executor.threads} threads: read {limits.read / 1e9:.1f} GB/s, {rates}")
            print(f"weights {executor.weight_bytes / 1e6:.1f} MB, file {checkpoint.weight_bytes / 1e6:.1f} MB")
        for work in (work for work in WORKLOADS if options.workload in work.name):
            seconds = measure(executor, work, options.repeat)
            print(report(executor, checkpoint, work, limits, seconds), flush=True)
            if options.profile:
                spent = executor.profile(step_inputs(checkpoint.spec, work))
                print("         " + "  ".join(f"{kind} {ns / 1e6:.3f}" for kind, ns in spent.items() if ns))


if __name__ == "__main__":
    main()
