"""Latent attention on one GPU in DeepSeek-V2-Lite's sizes (16 heads, latents of 512 + 64), with the card's limits.

    PYTHONPATH=. python benchmarks/gpu_latent.py            # the tables
    PYTHONPATH=. python benchmarks/gpu_latent.py --tune     # launch parameters instead
    PYTHONPATH=. python benchmarks/gpu_latent.py --profile  # single kernels

Decode steps are timed as a CUDA graph over several layers, each with a cache of its own so that none finds its latents
in L2; "layer" is everything between the projections, "kernel" the attention kernel alone. Prompts are timed both ways
of serving them, the one that the back end would take marked. A case that fails prints its error and the others go on.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.attention import latent_triton
from aphrodite.attention.backend import KVCache, StepAttention
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.latent_triton import TritonLatentAttention, expands
from aphrodite.kernels.triton.decode_attention import DecodeConfig, plan_decode
from aphrodite.kernels.triton.latent_decode import LatentDecodeConfig, latent_decode
from aphrodite.kernels.triton.ragged_attention import RaggedConfig
from aphrodite.models.spec import MlaSpec
from aphrodite.runner.inputs import DeviceInputs, HostLengths

HEADS, BLOCK = 16, 16
MLA = MlaSpec(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
READ = 3.17e12  # bytes a second that an H100 80GB HBM3 reads, measured (an 8 GB sum)
MATRIX = 750e12  # bfloat16 operations a second of a large product on it
L2_BYTES = 256 << 20  # of caches to go round, several times the L2
BF16 = torch.bfloat16

DECODES = {"1 x 1k": [1024], "1 x 8k": [8192], "8 x 4k": [4096] * 8, "32 x 1k": [1024] * 32, "32 x 4k": [4096] * 32,
           "128 x 1k": [1024] * 128}  # fmt: skip
# (query rows, context)
PROMPTS = {
    "1 x 2k": [(2048, 2048)], "4 x 2k": [(2048, 2048)] * 4, "1 x 8k": [(8192, 8192)], "64 after 8k": [(64, 8256)],
    "256 after 8k": [(256, 8448)], "2k after 8k": [(2048, 10_240)], "16 x 128": [(128, 128)] * 16,
}  # fmt: skip


# (tile, warps, stages, positions first, programs of a multiprocessor)
DECODE_CANDIDATES = ((64, 8, 3, True, 1), (64, 8, 2, True, 1), (64, 4, 3, True, 1), (32, 4, 3, False, 2),
                     (32, 4, 2, False, 2), (16, 4, 3, False, 2), (64, 8, 3, True, 2))  # fmt: skip
# (rows, tile, warps, stages)
ABSORBED_CANDIDATES = ((64, 32, 8, 3), (64, 32, 8, 2), (32, 32, 8, 3), (16, 32, 4, 3))
EXPANDED_CANDIDATES = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 32, 8, 3),
                       (64, 64, 4, 3), (64, 64, 4, 2))  # fmt: skip


class Step(NamedTuple):
    """Inputs of a step without its table, and caches of several layers."""

    inputs: DeviceInputs
    lengths: HostLengths
    cache: KVCache
    qkv: torch.Tensor
    backend: TritonLatentAttention

    @property
    def layers(self) -> int:
        return len(self.cache.keys)


def make_step(pairs: list[tuple[int, int]]) -> Step:
    device = torch.device("cuda")
    query, context = np.array(pairs, dtype=np.int32).T
    blocks = -(-context // BLOCK)
    latent_bytes = int(context.sum()) * MLA.latent_dim * 2
    layers = max(2, min(64, L2_BYTES // latent_bytes))
    table = torch.zeros((len(pairs) + 1, int(blocks.max()) + 1), dtype=torch.int32)
    free = torch.randperm(int(blocks.sum())).int()
    positions, slots, used = [], [], 0
    for row, (count, length, size) in enumerate(zip(query, context, blocks, strict=True)):
        table[row, :size] = free[used : used + size]
        used += int(size)
        where = torch.arange(int(length - count), int(length))
        positions.append(where)
        slots.append(table[row][where // BLOCK].long() * BLOCK + where % BLOCK)
    shape = LatentShape(
        num_layers=layers, num_heads=HEADS, mla=MLA, block_size=BLOCK, dtype=BF16, cache_dtype=BF16, device=device,
        scale=MLA.head_dim**-0.5,
    )  # fmt: skip
    longest = int(context.max())
    key_up = torch.randn(HEADS, MLA.kv_lora_rank, MLA.qk_nope_head_dim, device=device, dtype=BF16) / 23
    value_up = torch.randn(HEADS, MLA.v_head_dim, MLA.kv_lora_rank, device=device, dtype=BF16) / 23
    cos, sin = torch.randn(2, longest, MLA.qk_rope_head_dim // 2, device=device)
    transform = LatentTransform(
        cos,
        sin,
        norms=(torch.ones(MLA.kv_lora_rank, device=device, dtype=BF16),) * layers,
        norm_eps=1e-6,
        key_up=(key_up,) * layers,
        value_up=(value_up,) * layers,
    )
    cache = torch.randn(layers, int(blocks.sum()), BLOCK, MLA.latent_dim, device=device, dtype=BF16)
    tokens = int(query.sum())
    inputs = DeviceInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
        positions=torch.cat(positions).int().to(device),
        slot_mapping=torch.cat(slots).to(device),
        query_start=torch.from_numpy(np.concatenate(([0], np.cumsum(query))).astype(np.int32)).to(device),
        context_lens=torch.from_numpy(context).to(device),
        rows=torch.arange(len(pairs), dtype=torch.int32, device=device),
        block_tables=table.to(device),
        logits_index=torch.zeros(0, dtype=torch.int32, device=device),
        lengths=None,
        attention_table=torch.zeros(0, dtype=torch.int32, device=device),
    )
    qkv = torch.randn(tokens, HEADS * MLA.head_dim + MLA.latent_dim, device=device, dtype=BF16)
    lengths = HostLengths(query, context)
    return Step(inputs, lengths, KVCache(cache, cache), qkv, TritonLatentAttention(shape, transform))


def graph_seconds(launch: Callable[[], None], replays: int = 7) -> float:
    """Median time of a replay of what `launch` enqueues."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(2):
        graph.replay()
    return _median(graph.replay, replays)


def _median(run: Callable[[], None], repetitions: int) -> float:
    times: list[float] = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def layer_seconds(step: Step) -> float:
    """Of a decode step's layer, all kernels between the projections."""
    serve = step.backend.begin_step(step.inputs, step.cache)

    def launch() -> None:
        for layer in range(step.layers):
            serve(layer, step.qkv)

    return graph_seconds(launch) / step.layers


def kernel_seconds(step: Step, config: LatentDecodeConfig) -> float:
    """Of the attention kernel of a decode step's layer."""
    inputs = step.inputs
    plan = plan_decode(
        query_start=inputs.query_start, context_lens=inputs.context_lens, rows=inputs.rows,
        num_kv_heads=1, window=None, config=config.decode,
        target=config.target(HEADS, len(inputs.rows), step.backend.programs),
    )  # fmt: skip
    tokens = step.qkv.shape[0]
    absorbed, out = torch.randn(2, tokens, HEADS, MLA.kv_lora_rank, device="cuda", dtype=BF16)

    def launch() -> None:
        for layer in range(step.layers):
            latent_decode(
                absorbed, step.qkv, step.cache.keys[layer], out, plan=plan, block_tables=inputs.block_tables,
                head_dim=MLA.head_dim, scale=0.07, config=config,
            )  # fmt: skip

    return graph_seconds(launch) / step.layers


def decode_row(name: str, contexts: list[int]) -> None:
    step = make_step([(1, context) for context in contexts])
    kernel, layer = kernel_seconds(step, step.backend.decode_config), layer_seconds(step)
    read = sum(contexts) * MLA.latent_dim * 2
    rate = read / kernel
    speed = f"{rate / 1e9:6,.0f} GB/s ({rate / READ:4.0%})"
    print(f"{name:14} kernel {kernel * 1e6:8.1f} us  {speed}  layer {layer * 1e6:8.1f} us")


def prompt_step(step: Step, expanded: bool) -> StepAttention:
    """A step with prompts, served in one of the two ways."""
    choice = latent_triton.expands
    latent_triton.expands = lambda query, context, mla: (query > 1) & expanded
    try:
        table = step.backend.stage_step(step.lengths)
    finally:
        latent_triton.expands = choice
    inputs = step.inputs._replace(lengths=step.lengths, attention_table=torch.from_numpy(table).cuda())
    return step.backend.begin_step(inputs, step.cache)


def prompt_seconds(step: Step, expanded: bool) -> float:
    """Of a layer of a step with prompts, all kernels between the projections."""
    serve = prompt_step(step, expanded)

    def run() -> None:
        for layer in range(8):
            serve(layer % step.layers, step.qkv)

    run()
    return _median(run, 3) / 8


def prompt_row(name: str, pairs: list[tuple[int, int]]) -> None:
    step = make_step(pairs)
    query, context = (lengths.astype(np.int64) for lengths in step.lengths)
    visible = int((query * context - query * (query - 1) // 2).sum())
    takes = expands(query, context, MLA)
    shares = []
    for expanded, dims in ((False, 2 * MLA.kv_lora_rank + MLA.qk_rope_head_dim), (True, MLA.head_dim + MLA.v_head_dim)):
        seconds = prompt_seconds(step, expanded)
        rate = 2 * visible * HEADS * dims / seconds
        way = ("expanded" if expanded else "absorbed") + ("*" if (takes == expanded).all() else " ")
        shares.append(f"{way} {seconds * 1e6:9.1f} us {rate / 1e12:5.0f} TFLOP/s ({rate / MATRIX:4.0%})")
    print(f"{name:14} " + "  ".join(shares))


def profile() -> None:
    """Kernels of a step's layer, us each, for decode steps and for prompts both ways."""
    for name, contexts in DECODES.items():
        step = make_step([(1, context) for context in contexts])
        serve = step.backend.begin_step(step.inputs, step.cache)
        _print_kernels(name, step, serve)
    for name, pairs in PROMPTS.items():
        step = make_step(pairs)
        for expanded in (False, True):
            _print_kernels(f"{name} {'expanded' if expanded else 'absorbed'}", step, prompt_step(step, expanded))


def _print_kernels(name: str, step: Step, serve: StepAttention) -> None:
    serve(0, step.qkv)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for layer in range(4):
            serve(layer % step.layers, step.qkv)
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    parts = [f"{event.key[:28]} {event.device_time_total / 4:.1f}" for event in found[:7]]
    print(f"{name:24} {sum(event.device_time_total for event in found) / 4:7.1f} us: " + ", ".join(parts))


def tune() -> None:
    """Decode and prompt kernels over grids of launch parameters, best first."""
    for name in ("1 x 8k", "32 x 1k", "32 x 4k"):
        step = make_step([(1, context) for context in DECODES[name]])
        found = []
        for tile, warps, stages, first, at_once in DECODE_CANDIDATES:
            config = LatentDecodeConfig(16, DecodeConfig(tile, warps, stages), first, at_once)
            try:
                found.append((kernel_seconds(step, config), (*config.decode, first, at_once)))
            except Exception as error:
                print(f"  {name} {tuple(config)}: {str(error)[:80]}")
        print(name, *(f"{seconds * 1e6:.1f} us {tuple(config)}" for seconds, config in sorted(found)[:5]), sep="\n  ")
    for name, expanded in (("4 x 2k", True), ("1 x 2k", False)):
        step = make_step(PROMPTS[name])
        found_prompts = []
        for candidate in EXPANDED_CANDIDATES if expanded else ABSORBED_CANDIDATES:
            config_of = RaggedConfig(*candidate)
            if expanded:
                step.backend.expanded_config = config_of
            else:
                step.backend.absorbed_config = config_of
            try:
                found_prompts.append((prompt_seconds(step, expanded), config_of))
            except Exception as error:
                print(f"  {name} {tuple(config_of)}: {str(error)[:80]}")
        print(name, *(f"{s * 1e6:.1f} us {tuple(config)}" for s, config in sorted(found_prompts)[:5]), sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time launch parameters instead")
    parser.add_argument("--profile", action="store_true", help="time single kernels instead")
    options = parser.parse_args()
    if options.tune or options.profile:
        (tune if options.tune else profile)()
        return
    rows: list[Callable[[], None]] = [lambda n=n, c=c: decode_row(n, c) for n, c in DECODES.items()]  # type: ignore[misc]
    rows += [lambda n=n, p=p: prompt_row(n, p) for n, p in PROMPTS.items()]  # type: ignore[misc]
    for row in rows:
        try:
            row()
        except Exception:
            traceback.print_exc(limit=-3)


if __name__ == "__main__":
    main()
