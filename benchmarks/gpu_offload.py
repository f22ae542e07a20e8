"""A model larger than the card: weights that stay in host memory, inside a part of a card that is as large as another.

    PYTHONPATH=. python benchmarks/gpu_offload.py                          70B in 4 bits inside 24 GiB
    PYTHONPATH=. python benchmarks/gpu_offload.py --compare                the same tokens as with all on the card?
    PYTHONPATH=. python benchmarks/gpu_offload.py llama-3.1-8b --card 12 --offload 8

torch may take as much of the card as one of `--card` GiB has, less what the driver takes for itself, and the engine is
given 0.9 of that card, the default of --gpu-memory-utilization. What is printed as taken is the driver's count, of its
context and kernels too. Random weights; greedy answers to one prompt alone and to three together.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_machine import write_tokenizer

from aphrodite import platforms
from aphrodite.llm import LLM
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.sampling.params import SamplingParams

CONFIGS = Path(__file__).resolve().parent / "configs"
GIB = 1 << 30
DEFAULT_SHARE = 0.9  # of a card's memory that the engine takes
DRIVER_GIB = 1.0  # context and kernels, which torch does not count
PROMPTS = [random.Random(length).choices(range(1000), k=length) for length in (20, 300, 45)]


def load(options: argparse.Namespace, config: Path, folder: Path, **settings: Any) -> LLM:
    vocab_size = open_checkpoint(config, load_format="dummy").spec.vocab_size
    tokenizer = str(write_tokenizer(folder, vocab_size))
    began = time.perf_counter()
    llm = LLM(config, device="cuda", load_format="dummy", tokenizer=tokenizer, enable_prefix_caching=False, **settings)
    print(f"\nLoaded in {time.perf_counter() - began:.1f} s: " + "; ".join(llm.info.memory_plan))
    print("Kernels: " + "; ".join(f"{name}: {choice}" for name, choice in llm.describe().items()), flush=True)
    return llm


def answers(llm: LLM, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens; prints the time of a step.

    Raises:
        RuntimeError: an answer ended early.
    """
    seconds = []
    for count in (1, 1, tokens):  # the first warms up
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        began = time.perf_counter()
        outputs = [output.outputs[0] for output in llm.generate(list(prompts), params, progress=False)]
        seconds.append(time.perf_counter() - began)
    for output in outputs:
        if output.num_tokens != tokens:
            raise RuntimeError(f"{output.num_tokens} of {tokens} tokens came: {output.error}")
    step = (seconds[2] - seconds[1]) / (tokens - 1)
    print(f"{len(prompts)} at once: first token {seconds[1]:.2f} s, then {step * 1e3:.0f} ms a step", flush=True)
    return [list(output.token_ids) for output in outputs]


def print_memory(card: float, total: int) -> None:
    """What was taken at most, by torch and of the card; what lies beside torch's share does not shrink."""
    reserved = torch.cuda.max_memory_reserved()
    beside = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    taken = (beside + reserved) / GIB
    verdict = "✓" if taken <= card else "✗ (or other programs' share)"
    print(f"taken at most: {reserved / GIB:.2f} GiB by torch, {taken:.2f} of {card:g} with the driver's {verdict}")


def offloaded(options: argparse.Namespace, config: Path, folder: Path, total: int) -> list[list[int]]:
    torch.cuda.set_per_process_memory_fraction((options.card - DRIVER_GIB) * GIB / total)
    share = DEFAULT_SHARE * options.card * GIB / total
    llm = load(options, config, folder, cpu_offload_gb=options.offload, gpu_memory_utilization=share)
    try:
        tokens = [*answers(llm, PROMPTS[:1], options.tokens), *answers(llm, PROMPTS, options.tokens)]
        print_memory(options.card, total)
        return tokens
    finally:
        llm.close()
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def resident(options: argparse.Namespace, config: Path, folder: Path) -> list[list[int]]:
    llm = load(options, config, folder, enable_graphs=False, max_model_len=4096)
    try:
        return [*answers(llm, PROMPTS[:1], options.tokens), *answers(llm, PROMPTS, options.tokens)]
    finally:
        llm.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model that is larger than the card.")
    parser.add_argument("model", nargs="?", default="llama-3.1-70b-awq", help="a shape or a directory")
    parser.add_argument("--card", type=float, default=24.0, metavar="GIB", help="of the card to be (default: 24)")
    parser.add_argument("--offload", type=float, default=24.0, metavar="GIB", help="kept in host memory (default: 24)")
    parser.add_argument("--tokens", type=int, default=6, help="of each answer (default: 6)")
    parser.add_argument("--compare", action="store_true", help="with the tokens of the model on the whole card")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    config = CONFIGS / options.model if (CONFIGS / options.model).is_dir() else Path(options.model)
    print(platforms.current().describe())
    total = torch.cuda.mem_get_info()[1]
    with tempfile.TemporaryDirectory() as folder:
        tokens = offloaded(options, config, Path(folder), total)
        if options.compare:
            same = resident(options, config, Path(folder)) == tokens
            print(f"the same tokens as with all weights on the card: {'✓' if same else '✗'}")


if __name__ == "__main__":
    main()
