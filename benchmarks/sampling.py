"""Time of sampling per row for common settings, beside the time that reading the logits once would take.

    python benchmarks/sampling.py [--vocab 49152] [--rows 1 8 32] [--torch]

"limit" is the time in which one core reads a row of float32 logits at the bandwidth it reaches on a
buffer of the batch's size. Logits are shaped like a model's: a normal bulk with a long upper tail.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampler

PROMPT = 200
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "top_k 40": SamplingParams(top_k=40),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "penalties, greedy": SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.2),
    "temperature, top_p, min_p, penalties": SamplingParams(
        temperature=0.8, top_p=0.95, min_p=0.02, repetition_penalty=1.1, frequency_penalty=0.1
    ),
    "temperature 5, top_p 0.99 (flat)": SamplingParams(temperature=5.0, top_p=0.99),
    "temperature 1, 5 logprobs": SamplingParams(logprobs=5),
}


def model_like(rows: int, vocab: int) -> torch.Tensor:
    """[rows, vocab] float32: most tokens near 0, a few hundred candidates up to about 20."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0.0, 2.5, (rows, vocab))
    for row in logits:
        row[generator.integers(0, vocab, 300)] += generator.exponential(4.0, 300)
    return torch.from_numpy(logits.astype(np.float32))


def median_us(sampler: Sampler, logits: torch.Tensor, rows: list[int], repeats: int) -> float:
    """Median microseconds of one call; the copy that restores the logits is not counted."""
    times = []
    for step in range(repeats):
        fresh = logits.clone()
        began = time.perf_counter()
        sampler.sample(fresh, rows, [PROMPT + step] * len(rows))
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def read_limit_us(logits: torch.Tensor) -> float:
    """Microseconds to read one row, from the best of repeated maxima over the whole batch."""
    array, times = logits.numpy(), []
    for _ in range(50):
        began = time.perf_counter()
        array.max()
        times.append(time.perf_counter() - began)
    return min(times) * 1e6 / len(logits)


def measure(count: int, vocab: int, *, native: bool, repeats: int) -> None:
    logits = model_like(count, vocab)
    limit = read_limit_us(logits)
    print(f"\n{count} rows x {vocab} logits, reading a row once: {limit:.1f} us (one core)")
    print(f"{'settings':40}{'us/call':>10}{'us/row':>10}{'x read':>8}")
    prompt = np.random.default_rng(1).integers(0, vocab, PROMPT).tolist()
    history = torch.zeros(count, PROMPT + repeats + 1, dtype=torch.int32)
    lengths = torch.full((count,), PROMPT)
    for name, params in SETTINGS.items():
        sampler = Sampler(count, vocab, frozenset({0}), history, lengths, torch.device("cpu"), native=native)
        for row in range(count):
            sampler.start(row, params, row, prompt)
        call = median_us(sampler, logits, list(range(count)), repeats)
        print(f"{name:40}{call:10.1f}{call / count:10.1f}{call / count / limit:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--torch", action="store_true", help="measure the torch stages instead of the native path")
    arguments = parser.parse_args()
    for count in arguments.rows:
        measure(count, arguments.vocab, native=not arguments.torch, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
