"""Attention on one GPU, by kernel, with the card's limits beside it.

    PYTHONPATH=. python benchmarks/gpu_attention.py            # the table
    PYTHONPATH=. python benchmarks/gpu_attention.py --tune     # launch parameters instead: the best few of each case
    PYTHONPATH=. python benchmarks/gpu_attention.py --tune --decodes mixed

The shape is that of Llama-3.1-8B (32 heads of 128, 8 KV heads, blocks of 16) in bfloat16. Short kernels are timed as a
CUDA graph over the layers of one step, each with a cache of its own, so that none finds its keys in L2; the plan of
the step is not in it and has a row of its own. A case that fails prints its error and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, ParamSpec

import numpy as np
import torch

from aphrodite.attention.backend import AttentionShape
from aphrodite.attention.triton_paged import DenseRun, attend_dense
from aphrodite.kernels.triton.decode_attention import (
    DecodeConfig,
    DecodePlan,
    decode_attention,
    decode_config,
    plan_decode,
)
from aphrodite.kernels.triton.paged import card_of, multiprocessors
from aphrodite.kernels.triton.ragged_attention import (
    RaggedConfig,
    TileTable,
    ragged_attention,
    ragged_config,
    tile_table,
)
from aphrodite.kernels.triton.rotary import RotaryConfig, rotary_to_cache

P = ParamSpec("P")

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
READ = 3.17e12  # bytes a second that an H100 80GB HBM3 reads, measured (an 8 GB sum)
MATRIX = 750e12  # bfloat16 operations a second of a large product on it
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2  # of K and V of a layer
L2_BYTES = 256 << 20  # of caches to go round, several times the L2
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn

DECODES: dict[str, list[int]] = {
    "1 x 1k": [1024],
    "1 x 8k": [8192],
    "1 x 32k": [32_768],
    "8 x 8k": [8192] * 8,
    "32 x 256": [256] * 32,
    "32 x 2k": [2048] * 32,
    "128 x 256": [256] * 128,
    "128 x 1k": [1024] * 128,
    "256 x 256": [256] * 256,
    "256 x 1k": [1024] * 256,
    "32k beside 31 x 1k": [32_768] + [1024] * 31,
    "256, 100 to 2k": [100 + 1948 * i // 255 for i in range(256)],
}


def mixed_contexts(step: int) -> list[int]:
    """Those of the mixed workload of benchmarks/gpu.py after so many steps: 256 requests, 100 to 1,024 in and out."""
    draw = random.Random(0)
    lengths = [(draw.randint(100, 1_024), draw.randint(100, 1_024)) for _ in range(256)]
    return [prompt + step for prompt, answer in lengths if answer > step]


DECODES |= {f"{len(c)} mixed": c for c in map(mixed_contexts, (50, 300, 500, 700, 900))}
PREFILLS: dict[str, list[tuple[int, int]]] = {
    "1 x 2,048": [(2048, 2048)],
    "4 x 2,048": [(2048, 2048)] * 4,
    "1 x 8,192": [(8192, 8192)],
    "16 x 512": [(512, 512)] * 16,
    "2,048 after 6,144": [(2048, 8192)],
    "64 after 8,128": [(64, 8192)],
    "300 after 2,048": [(300, 2348)],
    "8 x 64 after 4,032": [(64, 4096)] * 8,
    "2 after 32,766": [(2, 32_768)],
}


class Step(NamedTuple):
    """A step's tensors; keys and values have a layer in front."""

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    rows: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    out: torch.Tensor


def make_step(lengths: list[tuple[int, int]], dtype: torch.dtype = BF16, layers: int | None = None) -> Step:
    """Random numbers, blocks in random order; `lengths` are (query rows, context)."""
    device = "cuda"
    counts = [-(-context // BLOCK) for _, context in lengths]
    total = sum(counts)
    if layers is None:
        layers = max(2, min(32, L2_BYTES // (total * BLOCK * TOKEN_BYTES)))
    order = torch.randperm(total, device=device).int()
    tables = torch.zeros((len(lengths) + 1, -(-max(counts) // 16) * 16), dtype=torch.int32, device=device)
    first, positions, slots = 0, [], []
    for row, ((queries, context), count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = order[first : first + count]
        where = torch.arange(context - queries, context, device=device)
        positions.append(where.int())
        slots.append(tables[row].long()[where // BLOCK] * BLOCK + where % BLOCK)
        first += count
    tokens = sum(queries for queries, _ in lengths)
    cache = torch.empty((2, layers, total, KV_HEADS, BLOCK, DIM), dtype=BF16, device=device).normal_()
    keys, values = cache.to(dtype).unbind(0)
    return Step(
        torch.randn((tokens, (HEADS + 2 * KV_HEADS) * DIM), dtype=BF16, device=device),
        keys,
        values,
        tables,
        torch.arange(len(lengths), dtype=torch.int32, device=device),
        torch.tensor(np.cumsum([0] + [queries for queries, _ in lengths]), dtype=torch.int32, device=device),
        torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
        torch.cat(positions),
        torch.cat(slots),
        torch.empty((tokens, HEADS * DIM), dtype=BF16, device=device),
    )


def graph_seconds(launch: Callable[[], None], replays: int = 7) -> float:
    """Median time of a replay of what `launch` enqueues."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def plan_of(step: Step, config: DecodeConfig, target: int | None = None) -> DecodePlan:
    return plan_decode(
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        num_kv_heads=KV_HEADS,
        window=None,
        config=config,
        target=target,
    )


def decode_layer(step: Step, layer: int, plan: DecodePlan) -> None:
    decode_attention(
        step.qkv,
        step.keys[layer],
        step.values[layer],
        step.out,
        plan=plan,
        block_tables=step.block_tables,
        num_heads=HEADS,
        scale=DIM**-0.5,
    )


def rotary_layer(
    step: Step,
    layer: int,
    table: torch.Tensor,
    norm: torch.Tensor | None = None,
    config: RotaryConfig | None = None,
) -> None:
    rotary_to_cache(
        step.qkv,
        step.keys[layer],
        step.values[layer],
        positions=step.positions,
        slot_mapping=step.slots,
        cos=table,
        sin=table,
        num_heads=HEADS,
        query_norm=norm,
        key_norm=norm,
        norm_eps=1e-6,
        config=config,
    )


def ragged_layer(step: Step, layer: int, table: TileTable, config: RaggedConfig) -> None:
    ragged_attention(
        step.qkv,
        step.keys[layer],
        step.values[layer],
        step.out,
        table=table,
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        block_tables=step.block_tables,
        num_heads=HEADS,
        scale=DIM**-0.5,
        config=config,
    )


def each_layer(step: Step, launch: Callable[[int], None]) -> float:
    """Seconds a layer, of eight or more: the gap between two replays is little beside that."""
    layers = len(step.keys)
    launches = layers * -(-8 // layers)

    def all_layers() -> None:
        for number in range(launches):
            launch(number % layers)

    return graph_seconds(all_layers) / launches


def row(name: str, measure: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> None:
    """Print a line of the table, or what went wrong."""
    try:
        print(f"{name:42s} {measure(*args, **kwargs)}", flush=True)
    except Exception:
        print(f"{name:42s} failed: {traceback.format_exc(limit=3)}", flush=True)
    torch.cuda.empty_cache()


def by_bytes(seconds: float, count: float) -> str:
    return f"{seconds * 1e6:9.1f} us {count / seconds / 1e9:8.0f} GB/s {100 * count / seconds / READ:5.1f} %"


def by_operations(seconds: float, lengths: list[tuple[int, int]]) -> str:
    pairs = sum(queries * context - queries * (queries - 1) // 2 for queries, context in lengths)
    rate = 4 * pairs * HEADS * DIM / seconds
    return f"{seconds * 1e6:9.1f} us {rate / 1e12:8.0f} TFLOP/s {100 * rate / MATRIX:5.1f} %"


def decode_row(contexts: list[int], dtype: torch.dtype) -> str:
    step = make_step([(1, context) for context in contexts], dtype)
    plan = plan_of(step, decode_config(DIM, BF16, card_of(step.qkv.device), len(contexts)))
    seconds = each_layer(step, lambda layer: decode_layer(step, layer, plan))
    return by_bytes(seconds, sum(contexts) * TOKEN_BYTES / (1 if dtype == BF16 else 2))


def step_row(contexts: list[int]) -> str:
    """Rotary and decode attention by turns, as in a step."""
    step = make_step([(1, context) for context in contexts])
    table = torch.rand((max(contexts), DIM // 2), device="cuda")
    plan = plan_of(step, decode_config(DIM, BF16, card_of(step.qkv.device), len(contexts)))

    def layer(index: int) -> None:
        rotary_layer(step, index, table)
        decode_layer(step, index, plan)

    return by_bytes(each_layer(step, layer), sum(contexts) * TOKEN_BYTES)


def plan_row(contexts: list[int]) -> str:
    step = make_step([(1, context) for context in contexts], layers=1)
    config = decode_config(DIM, BF16, card_of(step.qkv.device), len(contexts))
    kept: list[DecodePlan] = []

    def plans() -> None:
        kept.clear()
        kept.extend(plan_of(step, config) for _ in range(20))

    return f"{graph_seconds(plans) / 20 * 1e6:9.1f} us"


def rotary_step(tokens: int) -> Step:
    lengths = [(1, 16)] * tokens if tokens <= 256 else [(tokens, tokens)]
    return make_step(lengths, layers=max(2, min(32, 32_768 // tokens)))


def rotary_row(tokens: int, norm: bool) -> str:
    step = rotary_step(tokens)
    table = torch.rand((max(tokens, 16), DIM // 2), device="cuda")
    weight = torch.rand(DIM, dtype=BF16, device="cuda") if norm else None
    seconds = each_layer(step, lambda layer: rotary_layer(step, layer, table, weight))
    return by_bytes(seconds, 2 * step.qkv.nbytes)


def ragged_row(lengths: list[tuple[int, int]], config: RaggedConfig | None = None) -> str:
    step = make_step(lengths, layers=4)
    config = config or ragged_config(DIM, BF16, card_of(step.qkv.device))
    tiles = tiles_of(lengths, config)
    return by_operations(each_layer(step, lambda layer: ragged_layer(step, layer, tiles, config)), lengths)


def tiles_of(lengths: list[tuple[int, int]], config: RaggedConfig, programs: int | None = None) -> TileTable:
    query, context = np.array(lengths).T
    table = tile_table(
        query,
        context,
        config,
        group=HEADS // KV_HEADS,
        kv_heads=KV_HEADS,
        programs=programs or multiprocessors(torch.device("cuda")),
    )
    return TileTable(*(torch.from_numpy(part).cuda() for part in table))


def shape() -> AttentionShape:
    return AttentionShape(
        windows=(None,),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        block_size=BLOCK,
        dtype=BF16,
        cache_dtype=BF16,
        device=torch.device("cuda"),
    )


def dense_row(lengths: list[tuple[int, int]]) -> str:
    step = make_step(lengths, layers=1)
    queries = lengths[0][0]
    run = DenseRun(0, len(lengths), queries, queries)
    kind = shape()

    def launch() -> None:
        for _ in range(4):
            attend_dense(step.qkv, run, kind)

    return by_operations(graph_seconds(launch) / 4, lengths)


def first_calls_row() -> str:
    """Wall time of torch's attention at lengths that it has not seen, and again."""
    step = make_step([(4096, 4096)], layers=1)
    times = []
    for rows in (1280, 1536, 1792, 1280, 1536, 1792):
        torch.cuda.synchronize()
        start = time.perf_counter()
        attend_dense(step.qkv, DenseRun(0, 1, rows, rows), shape())
        torch.cuda.synchronize()
        times.append(f"{(time.perf_counter() - start) * 1e3:.1f}")
    return "ms: " + " ".join(times)


def table() -> None:
    for name, contexts in DECODES.items():
        row(f"decode {name}", decode_row, contexts, BF16)
    for name in ("1 x 8k", "32 x 2k", "256 x 1k"):
        row(f"decode {name}, fp8 cache", decode_row, DECODES[name], FP8)
    for name in ("1 x 1k", "1 x 8k", "32 x 256", "128 x 256"):
        row(f"rotary + decode {name}", step_row, DECODES[name])
    for name in ("1 x 1k", "256 x 1k"):
        row(f"plan {name}", plan_row, DECODES[name])
    for tokens in (1, 32, 256, 2048, 8192):
        row(f"rotary + KV write, {tokens:,} tokens", rotary_row, tokens, False)
    row("norm + rotary + KV write, 2,048 tokens", rotary_row, 2048, True)
    for name, lengths in PREFILLS.items():
        row(f"prefill {name}", ragged_row, lengths)
    for name in ("1 x 2,048", "4 x 2,048", "1 x 8,192", "16 x 512"):
        row(f"prefill {name}, torch", dense_row, PREFILLS[name])
    row("torch's attention, new lengths twice", first_calls_row)


DECODE_CONFIGS = [
    DecodeConfig(tile, warps, stages)
    for tile, warps, stages in (
        *((32, 2, stages) for stages in (2, 3, 4)),
        *((64, 2, stages) for stages in (2, 3, 4)),
        *((64, 4, stages) for stages in (2, 3, 4)),
        *((128, 4, stages) for stages in (2, 3)),
    )
]
TARGETS = (8, 16, 32, 64, 128, 256, 512)  # chunks over all sequences
RAGGED_CONFIGS = [
    *(RaggedConfig(128, 64, 8, stages) for stages in (2, 3, 4)),
    *(RaggedConfig(128, 32, 8, stages) for stages in (3, 4)),
    RaggedConfig(128, 128, 8, 2),
    RaggedConfig(64, 64, 4, 2),
    *(RaggedConfig(256, 64, 16, stages) for stages in (2, 3)),
]
ROTARY_CONFIGS = [
    RotaryConfig(heads, first, warps)
    for heads in (4, 8, 16, 32, 64)
    for first in (True, False)
    for warps in (1, 2, 4, 8)
    if 2 <= heads // warps <= 16
]


def compile_config(config: DecodeConfig | RaggedConfig | RotaryConfig) -> None:
    """Run a configuration on a small case, in a process of its own: the others then find it in Triton's cache."""
    try:
        if isinstance(config, DecodeConfig):
            step = make_step([(1, 64)], layers=1)
            decode_layer(step, 0, plan_of(step, config))
        elif isinstance(config, RaggedConfig):
            step = make_step([(64, 64)], layers=1)
            ragged_layer(step, 0, tiles_of([(64, 64)], config), config)
        else:
            rotary_layer(make_step([(64, 64)], layers=1), 0, torch.rand((64, DIM // 2), device="cuda"), config=config)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{config}: {error!s:.200}", flush=True)


def best(name: str, results: Iterable[tuple[float, object]], count: int = 5) -> None:
    print(name)
    for seconds, what in sorted(results, key=lambda result: result[0])[:count]:
        print(f"    {seconds * 1e6:9.1f} us  {what}", flush=True)


def tune_decode(name: str, contexts: list[int], dtype: torch.dtype = BF16) -> None:
    step = make_step([(1, context) for context in contexts], dtype)
    results: list[tuple[float, tuple[DecodeConfig, int]]] = []
    shipped = decode_config(DIM, dtype, card_of(step.qkv.device), len(contexts))
    for config, target in itertools.product(DECODE_CONFIGS, TARGETS):
        try:
            plan = plan_of(step, config, target)
            seconds = each_layer(step, functools.partial(decode_layer, step, plan=plan))
            results.append((seconds, (config, target)))
        except Exception as error:
            print(f"{config}, {target}: {error!s:.200}", flush=True)
    best(f"decode {name}, floor {sum(contexts) * TOKEN_BYTES / READ * 1e6:.1f} us", results)
    for seconds, (config, target) in results:
        if config == shipped and target in (32, 64, 128, 256):
            print(f"    {seconds * 1e6:9.1f} us  as shipped, {target} chunks", flush=True)


def tune_ragged(name: str, lengths: list[tuple[int, int]]) -> None:
    step = make_step(lengths, layers=2)
    results: list[tuple[float, object]] = []
    programs = multiprocessors(step.qkv.device)
    for config in RAGGED_CONFIGS:
        for share in (1, 2):
            try:
                tiles = tiles_of(lengths, config, share * programs)
                if share > 1 and not len(tiles.merges):
                    continue
                launch = functools.partial(ragged_layer, step, table=tiles, config=config)
                results.append((each_layer(step, launch), (config, f"{share} a multiprocessor, {len(tiles.merges)}")))
            except Exception as error:
                print(f"{config}: {error!s:.200}", flush=True)
    best(f"prefill {name}", results)


def tune_rotary(tokens: int) -> None:
    step = rotary_step(tokens)
    table = torch.rand((max(tokens, 16), DIM // 2), device="cuda")
    results: list[tuple[float, object]] = []
    for config in ROTARY_CONFIGS:
        try:
            launch = functools.partial(rotary_layer, step, table=table, config=config)
            results.append((each_layer(step, launch), config))
        except Exception as error:
            print(f"{config}: {error!s:.200}", flush=True)
    best(f"rotary {tokens:,}", results)


def tune() -> None:
    compile_configs([*RAGGED_CONFIGS, *DECODE_CONFIGS, *ROTARY_CONFIGS])
    for name in ("1 x 2,048", "1 x 8,192", "16 x 512", "2,048 after 6,144", *list(PREFILLS)[-4:]):
        tune_ragged(name, PREFILLS[name])
        torch.cuda.empty_cache()
    for tokens in (32, 256, 2048, 8192):
        tune_rotary(tokens)
        torch.cuda.empty_cache()
    tune_decodes(["1 x 1k", "1 x 8k", "1 x 32k", "32 x 256", "32 x 2k", "128 x 256", "256 x 1k", "32k beside 31 x 1k"])
    for name in ("1 x 8k", "32 x 2k", "256 x 1k"):
        tune_decode(f"{name}, fp8 cache", DECODES[name], FP8)
        torch.cuda.empty_cache()


def compile_configs(configs: Sequence[DecodeConfig | RaggedConfig | RotaryConfig]) -> None:
    started = time.perf_counter()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_config, configs))
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)


def tune_decodes(names: Iterable[str]) -> None:
    for name in names:
        tune_decode(name, DECODES[name])
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try launch parameters and print the best of each case")
    parser.add_argument("--decodes", metavar="WORD", help="only decode cases whose name has WORD in it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    started = time.perf_counter()
    names = [name for name in DECODES if arguments.decodes is not None and arguments.decodes in name]
    if arguments.tune and names:
        compile_configs(DECODE_CONFIGS)
        tune_decodes(names)
    elif arguments.tune:
        tune()
    elif names:
        for name in names:
            row(f"decode {name}", decode_row, DECODES[name], BF16)
    else:
        table()
    print(f"{time.perf_counter() - started:.1f} s in all")


if __name__ == "__main__":
    main()
