"""Time of sampling a batch on a GPU, as a decode step's graph holds it, beside one read of the logits.

    python benchmarks/gpu_sampling.py [--vocab 128256 151936] [--rows 1 32 128 256] [--settings greedy ...] [--kernels]

Every setting is captured in a CUDA graph and replayed over logits of several buffers, so that the L2 cache does not
hold them. "model" logits have a bulk of unlikely tokens and a few dozen likely ones; "flat" ones are normal with
deviation 1, so that nearly every token survives a truncation by mass. "read" is the time of the logits' bytes at the
card's bandwidth (3.17 TB/s measured on an H100). bfloat16 logits, history of 1,000 tokens.
"logprobs 20" is the report alone, of every row. With --kernels each case is followed by its kernels: what each adds to
the time at which the one before it ends.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from typing import Any

import numpy as np
import torch

from aphrodite.kernels.triton.logprobs import top_logprobs
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.pipeline import Sampler

BANDWIDTH = 3.17e12  # bytes a second
PROMPT = 1000
BUFFERS = 4
REPEATS = 12
LOGPROBS = "logprobs 20"
SETTINGS: dict[str, tuple[dict[str, Any], float | None]] = {
    "greedy": ({"temperature": 0}, None),
    "temperature 0.8": ({"temperature": 0.8}, None),
    "temperature, min_p 0.05": ({"temperature": 0.8, "min_p": 0.05}, 50),
    "top_k 40, top_p 0.95": ({"top_k": 40, "top_p": 0.95}, 150),
    "top_p 0.95": ({"top_p": 0.95}, None),
    "role-play": (
        {
            "repetition_penalty": 1.1,
            "dry_multiplier": 0.8,
            "dry_sequence_breakers": [],
            "min_p": 0.05,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.1,
            "temperature": 1.1,
            "temperature_last": True,
        },
        300,
    ),
    "all": (
        {
            "temperature": 0.9,
            "top_p": 0.95,
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.15,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.1,
        },
        250,
    ),
    "dynatemp, min_p": ({"dynatemp_low": 0.5, "dynatemp_high": 1.5, "min_p": 0.05}, None),
}


def logits_of(kind: str, rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    """[rows, vocab] bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, device=device, generator=generator)
    if kind == "model":
        logits = logits * 1.8 - 2
        chosen = torch.randint(0, vocab, (rows, 60), device=device, generator=generator)
        heights = torch.empty(rows, 60, device=device).exponential_(1 / 3.0, generator=generator)
        logits.scatter_(1, chosen, 6 + heights)
    return logits.to(torch.bfloat16)


def started(fields: dict[str, Any], rows: int, vocab: int, device: torch.device) -> Sampler:
    """A sampler whose rows all have one setting."""
    prompts = np.random.default_rng(0).integers(0, 200, (rows, PROMPT))
    history = torch.zeros(rows + 1, PROMPT + 64, dtype=torch.int32, device=device)
    history[:rows, :PROMPT] = torch.from_numpy(prompts).to(device)
    num_prompt = torch.full((rows,), PROMPT, dtype=torch.int32)
    sampler = Sampler(rows, vocab, frozenset({2}), history, num_prompt, device)
    for row, prompt in enumerate(prompts.tolist()):
        sampler.start(row, from_mapping(fields), row, prompt)
    return sampler


def captured(sampler: Sampler, buffers: list[torch.Tensor], rows: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph with one sampling step a buffer, and where it says which rows were sampled."""
    device = buffers[0].device
    numbers = torch.arange(rows, dtype=torch.int32, device=device)
    positions = torch.full((rows,), PROMPT + 1, dtype=torch.int32, device=device)
    token_ids = torch.zeros(rows, dtype=torch.int32, device=device)
    ok, exhausted = torch.zeros(2, rows, dtype=torch.bool, device=device)
    launches = sampler.stage(list(range(rows)), [PROMPT + 1] * rows)
    arguments = numbers, positions, token_ids, ok, exhausted, launches
    sampler.run(buffers[0], *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in buffers:
            sampler.run(logits, *arguments)
    return graph, ok


def captured_logprobs(buffers: list[torch.Tensor], rows: int) -> torch.cuda.CUDAGraph:
    """A graph that reports 20 tokens of each row, once a buffer."""
    entries = torch.arange(rows, device=buffers[0].device)
    top_logprobs(buffers[0], entries, entries, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in buffers:
            top_logprobs(logits, entries, entries, 20)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Median time of one of a graph's steps, by events around replays."""
    graph.replay()
    times = list[float]()
    for _ in range(REPEATS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000 / BUFFERS)
    return statistics.median(times)


def kernel_times(graph: torch.cuda.CUDAGraph) -> str:
    """What each kernel of a step adds, in us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if str(event.device_type).endswith("CUDA")]
    added = dict[str, float]()
    last = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        begin = max(last, event.time_range.start)
        added[event.name] = added.get(event.name, 0.0) + (event.time_range.end - begin) / BUFFERS
        last = event.time_range.end
    return "  ".join(f"{name.removesuffix('_kernel')} {time:.1f}" for name, time in added.items())


def measure(name: str, rows: int, vocab: int, logits: torch.Tensor, kernels: bool) -> float:
    """Time of a case, us; prints its kernels if that is wanted."""
    buffers = [logits.clone() for _ in range(BUFFERS)]
    if name == LOGPROBS:
        graph = captured_logprobs(buffers, rows)
        time = microseconds(graph)
    else:
        sampler = started(SETTINGS[name][0], rows, vocab, logits.device)
        graph, ok = captured(sampler, buffers, rows)
        time = microseconds(graph)
        if not bool(ok.all()):
            raise RuntimeError("rows were not sampled")
    if kernels:
        print(f"    {name}, {rows} rows: {kernel_times(graph)}")
    return time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS, LOGPROBS])
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}; us a step; target in brackets is for 128 x 128,256")
    for vocab in options.vocab:
        for kind in ("model", "flat"):
            print(f"\n{kind} logits, vocabulary {vocab:,}")
            print(f"{'rows':26}" + "".join(f"{rows:>10}" for rows in options.rows))
            reads = [2 * rows * vocab / BANDWIDTH * 1e6 for rows in options.rows]
            print(f"{'read':26}" + "".join(f"{read:>10.1f}" for read in reads))
            logits = {rows: logits_of(kind, rows, vocab, device) for rows in options.rows}
            for name in options.settings:
                target = None if name == LOGPROBS else SETTINGS[name][1]
                cells = []
                for rows in options.rows:
                    try:
                        cells.append(f"{measure(name, rows, vocab, logits[rows], options.kernels):>10.1f}")
                    except Exception:  # the other cases still say something
                        traceback.print_exc(limit=3)
                        cells.append(f"{'failed':>10}")
                print(f"{name:26}" + "".join(cells) + (f"   [{target:.0f}]" if target else ""), flush=True)


if __name__ == "__main__":
    main()
