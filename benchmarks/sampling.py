"""Time of sampling per row for each stage and common settings, beside the time that reading the logits once would take.

    python benchmarks/sampling.py [--vocab 49152 128256] [--rows 1 32 128] [--history 1000 32000] [--torch]
    python benchmarks/sampling.py --engine [MODEL] [--rounds 15]     what samplers cost 32 streams of a real model

"x read" is in multiples of the time in which one core reads a row of float32 logits at the bandwidth it reaches on
a buffer of the batch's size. Logits are shaped like a model's: a normal bulk with a long upper tail. The real model's
settings take turns, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from aphrodite.llm import LLM
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampler
from aphrodite.sampling.vocabulary import Vocabulary

PROMPT = 1000
ROLE_PLAY = SamplingParams(
    repetition_penalty=1.1,
    dry_multiplier=0.8,
    min_p=0.05,
    xtc_probability=0.5,
    xtc_threshold=0.1,
    temperature=1.1,
    temperature_last=True,
)
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "dynatemp 0.5 to 1.5": SamplingParams(dynatemp_min=0.5, dynatemp_max=1.5),
    "logit_bias of 5": SamplingParams(logit_bias=dict.fromkeys(range(5), 1.0)),
    "penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1),
    "penalties, range 512": SamplingParams(repetition_penalty=1.1, repetition_penalty_range=512),
    "no_repeat_ngram_size 4": SamplingParams(no_repeat_ngram_size=4),
    "dry 0.8": SamplingParams(dry_multiplier=0.8),
    "top_nsigma 1.5": SamplingParams(top_nsigma=1.5),
    "top_k 40": SamplingParams(top_k=40),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_a 0.2": SamplingParams(top_a=0.2),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "tfs 0.95": SamplingParams(tfs=0.95),
    "eta_cutoff 0.0003": SamplingParams(eta_cutoff=0.0003),
    "epsilon_cutoff 0.0003": SamplingParams(epsilon_cutoff=0.0003),
    "typical_p 0.9": SamplingParams(typical_p=0.9),
    "quadratic 0.3": SamplingParams(smoothing_factor=0.3),
    "xtc 1.0, 0.1": SamplingParams(xtc_probability=1.0, xtc_threshold=0.1),
    "skew 0.5": SamplingParams(skew=0.5),
    "temperature 5, skew 0.5 (flat)": SamplingParams(temperature=5.0, skew=0.5),
    "temperature 5 (flat)": SamplingParams(temperature=5.0),
    "mirostat 2": SamplingParams(mirostat_mode=2, mirostat_tau=5.0, mirostat_eta=0.1),
    "adaptive_p 0.5, min_p 0.05": SamplingParams(adaptive_target=0.5, min_p=0.05),
    "temperature, top_p, min_p, penalties": SamplingParams(
        temperature=0.8, top_p=0.95, min_p=0.02, repetition_penalty=1.1, frequency_penalty=0.1
    ),
    "role-play preset": ROLE_PLAY,
    "temperature 5, top_p 0.99 (flat)": SamplingParams(temperature=5.0, top_p=0.99),
    "temperature 1, 5 logprobs": SamplingParams(logprobs=5),
    "temperature, min_p, 5 logprobs": SamplingParams(temperature=0.8, min_p=0.05, logprobs=5),
}


def model_like(rows: int, vocab: int) -> torch.Tensor:
    """[rows, vocab] float32: most tokens near 0, a few hundred candidates up to about 20."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0.0, 2.5, (rows, vocab))
    for row in logits:
        row[generator.integers(0, vocab, 300)] += generator.exponential(4.0, 300)
    return torch.from_numpy(logits.astype(np.float32))


def median_us(sampler: Sampler, logits: torch.Tensor, rows: list[int], repeats: int, first: int = PROMPT) -> float:
    """Median microseconds of one call from position `first` on; the copy that restores the logits is not counted."""
    times = []
    for step in range(repeats):
        fresh = logits.clone()
        began = time.perf_counter()
        sampler.sample(fresh, rows, [first + step] * len(rows))
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
    tokens = histories(PROMPT + repeats + 1, vocab)["text"].astype(np.int32)
    prompt = tokens[:PROMPT].tolist()
    history = torch.from_numpy(np.tile(tokens, (count, 1)))
    lengths = torch.full((count,), PROMPT)
    vocabulary = Vocabulary(vocab, Words())
    for name, params in SETTINGS.items():
        device = torch.device("cpu")
        sampler = Sampler(count, vocab, frozenset({0}), history, lengths, device, native=native, vocabulary=vocabulary)
        for row in range(count):
            sampler.start(row, params, row, prompt)
        call = median_us(sampler, logits, list(range(count)), repeats)
        print(f"{name:40}{call:10.1f}{call / count:10.1f}{call / count / limit:8.1f}")


HISTORY_SETTINGS = {
    "DRY": SamplingParams(temperature=0.0, dry_multiplier=0.8),
    "DRY, no breakers": SamplingParams(temperature=0.0, dry_multiplier=0.8, dry_sequence_breakers=()),
    "no_repeat_ngram_size 4": SamplingParams(temperature=0.0, no_repeat_ngram_size=4),
    "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.1),
    "repetition_penalty_range 1024": SamplingParams(
        temperature=0.0, repetition_penalty=1.1, repetition_penalty_range=1024
    ),
}


class Words:
    """A tokenizer whose every 16th token ends a line."""

    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return []

    def token_bytes(self, token_id: int) -> bytes:
        return b"\n" if token_id % 16 == 0 else b" word"


def histories(length: int, vocab: int) -> dict[str, np.ndarray]:
    """Token ids like a text's (Zipf's law, and phrases that come back), and one phrase over and over."""
    generator = np.random.default_rng(2)
    text = np.minimum(generator.zipf(1.3, length), vocab) - 1
    for _ in range(length // 64):
        source, target = generator.integers(0, length - 12, 2)
        text[target : target + 12] = text[source : source + 12]
    return {"text": text, "loop": np.resize(np.arange(1, 8), length)}


def measure_history(count: int, vocab: int, lengths: list[int], *, native: bool, repeats: int) -> None:
    """What stages that look at the history add to a greedy call."""
    logits = model_like(count, vocab)
    vocabulary = Vocabulary(vocab, Words())
    print(f"\n{count} rows x {vocab} logits: microseconds a row beyond greedy, by the history's length and kind")
    kinds = [(length, kind) for length in lengths for kind in histories(64, vocab)]
    print(f"{'settings':40}" + "".join(f"{f'{length} {kind}':>14}" for length, kind in kinds))
    cells: dict[str, list[float]] = {}
    for length, kind in kinds:
        tokens = histories(length, vocab)[kind]
        history = torch.from_numpy(np.tile(np.resize(tokens, length + repeats + 1).astype(np.int32), (count, 1)))
        prompts = torch.full((count,), length)
        base = None
        for name, params in {"greedy": SamplingParams(temperature=0.0), **HISTORY_SETTINGS}.items():
            device = torch.device("cpu")
            sampler = Sampler(
                count, vocab, frozenset({0}), history, prompts, device, native=native, vocabulary=vocabulary
            )
            for row in range(count):
                sampler.start(row, params, row, tokens.tolist())
            call = median_us(sampler, logits, list(range(count)), repeats, first=length)
            base = call if base is None else base
            cells.setdefault(name, []).append((call - base) / count)
    for name in HISTORY_SETTINGS:
        print(f"{name:40}" + "".join(f"{cell:14.1f}" for cell in cells[name]))


STREAMS, CONTEXT, STEPS = 32, 257, 16
GREEDY = SamplingParams(temperature=0.0)
STORY = from_mapping({"guided_regex": r"[A-Z][A-Za-z ,.\n]*", "temperature": 0.0})  # it may go on for ever
ENGINE_SETTINGS = {
    "greedy": [GREEDY] * STREAMS,
    "role-play preset on all": [ROLE_PLAY] * STREAMS,
    "DRY on one, greedy on 31": [SamplingParams(temperature=0.0, dry_multiplier=0.8), *[GREEDY] * (STREAMS - 1)],
    "preset on one, greedy on 31": [ROLE_PLAY, *[GREEDY] * (STREAMS - 1)],
    "regex on one, greedy on 31": [STORY, *[GREEDY] * (STREAMS - 1)],
    "regex on all": [STORY] * STREAMS,
}


class SamplingClock:
    """Adds up the time inside `Sampler.sample` of this process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        sample = Sampler.sample

        def timed(sampler: Sampler, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = sample(sampler, *arguments, **named)
            self.seconds += time.perf_counter() - began
            return result

        Sampler.sample = timed  # type: ignore[method-assign, assignment]


def decode_seconds(llm: LLM, prompts: list[list[int]], settings: list[SamplingParams], steps: int) -> float:
    """Seconds to answer with `steps` tokens each; prompts are in the prefix cache."""
    params = [replace(one, max_tokens=steps, ignore_eos=True, seed=row) for row, one in enumerate(settings)]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    elapsed = time.perf_counter() - began
    if any(output.outputs[0].num_tokens != steps for output in outputs):
        raise RuntimeError("an answer ended early: the measurement is void")
    return elapsed


def measure_engine(model: str | None, rounds: int) -> None:
    """Decode rates of each setting, relative to greedy in the same round."""
    clock = SamplingClock()
    steps: dict[str, list[float]] = {name: [] for name in ENGINE_SETTINGS}
    sampling: dict[str, list[float]] = {name: [] for name in ENGINE_SETTINGS}
    with LLM(model, device="cpu", max_num_seqs=STREAMS, max_model_len=512) as llm:
        prompts = np.split(histories(STREAMS * CONTEXT, llm.info.vocab_size)["text"], STREAMS)
        prompt_ids = [prompt.tolist() for prompt in prompts]
        for number in range(rounds + 1):  # the first one warms up
            for name, settings in ENGINE_SETTINGS.items():
                short = decode_seconds(llm, prompt_ids, settings, 1)
                before = clock.seconds
                step = (decode_seconds(llm, prompt_ids, settings, STEPS + 1) - short) / STEPS
                if number:
                    steps[name].append(step)
                    sampling[name].append((clock.seconds - before) / (STEPS + 1))
    print(
        f"\n{STREAMS} streams, context {CONTEXT}, {rounds} rounds; medians, lost rate as median of the rounds' ratios"
    )
    print(f"{'settings':30}{'tok/s':>9}{'lost':>8}{'sampling, ms/step':>20}{'more than greedy, of a step':>30}")
    for name, times in steps.items():
        lost = 1 - statistics.median(g / t for g, t in zip(steps["greedy"], times, strict=True))
        inside = statistics.median(sampling[name])
        more = (inside - statistics.median(sampling["greedy"])) / statistics.median(steps["greedy"])
        print(f"{name:30}{STREAMS / statistics.median(times):9.0f}{lost:8.1%}{inside * 1e3:20.3f}{more:30.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--torch", action="store_true", help="measure the torch stages instead of the native path")
    parser.add_argument("--history", type=int, nargs="*", default=[1000, 32000], help="lengths of histories")
    parser.add_argument("--engine", nargs="?", const="", metavar="MODEL", help="measure a model; without one, SmolLM2")
    parser.add_argument("--rounds", type=int, default=15, help="of --engine")
    arguments = parser.parse_args()
    if arguments.engine is not None:
        measure_engine(arguments.engine or None, arguments.rounds)
        return
    # Torch's own threads keep a core busy for milliseconds after each copy, which the sampler's would wait for.
    torch.set_num_threads(1)
    native, repeats = not arguments.torch, arguments.repeats
    for vocab in arguments.vocab:
        for count in arguments.rows:
            measure(count, vocab, native=native, repeats=repeats)
            if arguments.history:
                measure_history(count, vocab, arguments.history, native=native, repeats=repeats)


if __name__ == "__main__":
    main()
