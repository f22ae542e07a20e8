"""Every GPU figure that we claim, on random weights of a public shape, beside the card's limits and vLLM's figures.

    PYTHONPATH=. python benchmarks/gpu.py llama-3.1-8b                    all rows (about three minutes on an H100)
    PYTHONPATH=. python benchmarks/gpu.py qwen3-0.6b --only decode-1 ttft
    PYTHONPATH=. python benchmarks/gpu.py llama-3.1-8b --profile 1 140@890  what a decode step's time goes to
    PYTHONPATH=. python benchmarks/gpu.py qwen3-0.6b --host ttft          what the host does meanwhile
    PYTHONPATH=. python benchmarks/gpu.py llama-3.1-8b --set quantization=fp8 --set enable_graphs=false

Decode: (time of 257 output tokens - time of 1) / 256 with prompts of 128 tokens, end-of-sequence ignored. Prompts are
random token ids and the prefix cache is off. GB/s counts the weights, of experts those that are chosen, and the KV
cache once a step. vLLM 0.24 was measured on one H100 80GB HBM3 with the same workloads.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import pstats
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_machine import Ceilings, idle_times, limit_seconds, measure_ceilings, profile_table, recorded, write_tokenizer

from aphrodite import platforms
from aphrodite.cli.bench import print_table
from aphrodite.config import settings_table
from aphrodite.config_values import parse_value
from aphrodite.llm import LLM
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.parameters import parameter_shapes
from aphrodite.models.spec import ModelSpec
from aphrodite.sampling.params import SamplingParams

CONFIGS = Path(__file__).resolve().parent / "configs"
PROMPT = 128
STEPS = 256
LONG_CONTEXT = 32_768
HOST_LINES = 40  # functions of a host profile
STEP_GAP = 20  # microseconds: longer ones are between steps
CASE_SECONDS = 90  # a case that takes longer is given up
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.9},
    "top_p+top_k": {"temperature": 0.9, "top_p": 0.95, "top_k": 40},
    "min_p+repetition": {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.15},
    "all": {
        "temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.15,
        "frequency_penalty": 0.1, "presence_penalty": 0.1,
    },
}  # fmt: skip
# (to reach, vLLM 0.24); start in seconds, ttft in milliseconds, the rest in tokens a second
FIGURES: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "llama-3.1-8b": {
        "start": (12, 53.8),
        "decode-1": (190, 153),
        "decode-8": (1_390, 1_196),
        "decode-32": (5_000, 4_399),
        "decode-128": (14_500, 13_586),
        "decode-256": (21_500, 20_069),
        "prefill": (44_000, 43_064),
        "ttft": (50, 53.8),
        "sampler greedy": (None, 14_118),
        "sampler temperature": (None, 14_238),
        "sampler top_p+top_k": (None, 13_529),
        "sampler min_p+repetition": (None, 13_039),
        "sampler all": (None, 12_076),
        "mixed": (9_500, 8_448),
        "long": (130, None),
    },
    "llama-3.1-8b-awq": {
        "start": (12, 45.6),
        "decode-1": (410, 238),
        "decode-8": (2_850, 1_827),
        "decode-32": (8_200, 6_669),
        "decode-128": (16_300, 16_115),
        "decode-256": (22_000, 21_843),
        "prefill": (47_000, 46_939),
        "ttft": (None, 47.9),
        "sampler greedy": (None, 17_271),
        "sampler temperature": (None, 16_803),
        "sampler top_p+top_k": (None, 15_569),
        "sampler min_p+repetition": (None, 16_100),
        "sampler all": (None, 13_554),
        "mixed": (None, 8_872),
    },
    "llama-3.1-70b-awq": {"decode-1": (45, None)},
    "qwen3-0.6b": {
        "start": (None, 67.8),
        "decode-1": (800, 599),
        "decode-256": (55_000, 45_788),
        "prefill": (350_000, 320_485),
        "ttft": (15, 21.9),
        "mixed": (24_000, 18_466),
    },
}
LOWER_IS_BETTER = ("start", "ttft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: `value` in `unit`. `tera_flops` and `gb_per_second` where they are what limits."""

    case: str
    value: float | None = None
    unit: str = "tok/s"
    milliseconds: float | None = None  # of a step, or of the whole
    gb_per_second: float | None = None
    tera_flops: float | None = None
    share: float | None = None  # of the card's measured bandwidth or product rate
    error: str | None = None


class Bench:
    """A loaded model and the workloads that are timed on it."""

    def __init__(self, llm: LLM, spec: ModelSpec, ceilings: Ceilings | None) -> None:
        self.llm = llm
        self._spec = spec
        self._ceilings = ceilings
        self._random = random.Random(0)

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Random token ids."""
        return [self._random.choices(range(self._spec.vocab_size), k=length) for length in lengths]

    def seconds(self, prompts: list[list[int]], tokens: int, **sampling: Any) -> float:
        """Time to answer `prompts` together with `tokens` tokens each; greedy unless told otherwise."""
        params = SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=tokens, ignore_eos=True)
        return self.seconds_of(prompts, [params] * len(prompts))

    def seconds_of(self, prompts: list[list[int]], params: list[SamplingParams]) -> float:
        """Time to answer all prompts, each its own way; every token that was asked for must come."""
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, progress=False)
        elapsed = time.perf_counter() - began
        answers = [answer for output in outputs for answer in output.outputs]
        came, wanted = sum(answer.num_tokens for answer in answers), sum(one.max_tokens or 0 for one in params)
        if came != wanted:
            reason = next((answer.error for answer in answers if answer.error), "an answer ended early")
            raise RuntimeError(f"{came} of {wanted} tokens came: {reason}")
        return elapsed

    def step(self, batch: int, *, repeats: int = 3, prompt: int = PROMPT, steps: int = STEPS, **sampling: Any) -> float:
        """Seconds of a decode step: the best of `repeats` differences, after a run that warms everything up."""
        self.seconds(self.prompts([prompt] * batch), 9, **sampling)
        differences = []
        for _ in range(repeats):
            prompts = self.prompts([prompt] * batch)
            short = self.seconds(prompts, 1, **sampling)
            differences.append((self.seconds(prompts, steps + 1, **sampling) - short) / steps)
        return min(differences)

    def decode(self, case: str, batch: int, **sampling: Any) -> Row:
        step = self.step(batch, **sampling)
        return self.decode_row(case, batch, step, context=PROMPT + STEPS / 2)

    def long(self) -> Row:
        """Decode at a long context, timed from the first token to the last, so that one prefill will do."""
        params = SamplingParams(temperature=0.0, max_tokens=STEPS // 2, ignore_eos=True)
        arrivals: list[tuple[float, int]] = []
        for piece in self.llm.stream(self.prompts([LONG_CONTEXT])[0], params):
            arrivals.append((time.perf_counter(), sum(len(answer.token_ids) for answer in piece.outputs)))
        tokens = sum(count for _, count in arrivals[1:])
        step = (arrivals[-1][0] - arrivals[0][0]) / tokens
        return self.decode_row("long", 1, step, context=LONG_CONTEXT + STEPS / 4)

    def prefill(self) -> Row:
        count, length = 16, 2_048
        seconds = self._best_first_token([length] * count, repeats=3)
        return self._prefill_row("prefill", [length] * count, seconds, count * length / seconds, "tok/s")

    def first_token(self) -> Row:
        length = 2_048
        seconds = self._best_first_token([length], repeats=7)
        return self._prefill_row("ttft", [length], seconds, seconds * 1e3, "ms")

    def mixed(self) -> Row:
        draw = random.Random(0)  # the same lengths whatever was measured before: they decide the rate, too
        lengths = [draw.randint(100, 1_024) for _ in range(256)]
        params = [
            SamplingParams(temperature=0.6, max_tokens=draw.randint(100, 1_024), ignore_eos=True, seed=number)
            for number in range(256)
        ]
        self.seconds(self.prompts([PROMPT] * 256), 9, temperature=0.6)
        elapsed = self.seconds_of(self.prompts(lengths), params)
        return Row(case="mixed", value=sum(one.max_tokens or 0 for one in params) / elapsed, milliseconds=elapsed * 1e3)

    def _best_first_token(self, lengths: list[int], *, repeats: int) -> float:
        self.seconds(self.prompts(lengths), 1)
        return statistics.median(self.seconds(self.prompts(lengths), 1) for _ in range(repeats))

    def decode_row(self, case: str, batch: int, step: float, *, context: float) -> Row:
        info = self.llm.info
        embedding = 0 if self._spec.tied_head else self._spec.vocab_size * self._spec.hidden_size * 2
        weights = (info.weight_bytes - embedding) * (1.0 - unread_share(self._spec, batch))
        read = weights + batch * context * info.kv_bytes_per_block / info.block_size
        share = read / step / self._ceilings.read if self._ceilings else None
        return Row(case=case, value=batch / step, milliseconds=step * 1e3, gb_per_second=read / step / 1e9, share=share)

    def _prefill_row(self, case: str, lengths: list[int], seconds: float, value: float, unit: str) -> Row:
        rate = sum(prefill_flops(self._spec, length) for length in lengths) / seconds
        return Row(
            case=case,
            value=value,
            unit=unit,
            milliseconds=seconds * 1e3,
            tera_flops=rate / 1e12,
            share=rate / self._ceilings.flops if self._ceilings else None,
        )


def unread_share(spec: ModelSpec, batch: int) -> float:
    """Which part of the weights a step with `batch` tokens leaves alone: experts that nobody chose, all being equally
    likely."""
    if spec.moe is None:
        return 0.0
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(spec).items() if name != "embed.weight"}
    experts = sum(count for name, count in counts.items() if ".expert_" in name)
    return experts / sum(counts.values()) * (1.0 - spec.moe.top_k / spec.moe.num_experts) ** batch


def prefill_flops(spec: ModelSpec, length: int) -> float:
    """Operations of one prompt: the layers' products for every token, causal attention, the head for the last."""
    heads, moe = spec.num_heads * spec.head_dim, spec.moe
    inner = spec.intermediate_size if moe is None else moe.top_k * moe.intermediate_size + moe.shared_intermediate_size
    per_layer = spec.hidden_size * (2 * heads + 2 * spec.num_kv_heads * spec.head_dim + 3 * inner)
    attention = 2 * length * length * heads  # half of the two products' 4
    return spec.num_layers * (2.0 * per_layer * length + attention) + 2.0 * spec.hidden_size * spec.vocab_size


def cases(bench: Bench) -> dict[str, Callable[[], Row]]:
    """Every row by name, in the order of the table."""
    table: dict[str, Callable[[], Row]] = {}
    for batch in (1, 8, 32, 128, 256):
        table[f"decode-{batch}"] = lambda batch=batch: bench.decode(f"decode-{batch}", batch)  # type: ignore[misc]
    table["prefill"] = bench.prefill
    table["ttft"] = bench.first_token
    for name, sampling in SAMPLERS.items():
        table[f"sampler {name}"] = lambda name=name, sampling=sampling: bench.decode(  # type: ignore[misc]
            f"sampler {name}", 128, **sampling
        )
    table["mixed"] = bench.mixed
    table["long"] = bench.long
    return table


def case_names() -> list[str]:
    return ["start", *(name for name in FIGURES["llama-3.1-8b"] if name != "start")]


def chosen(name: str, only: list[str] | None) -> bool:
    """Whether a case is asked for, by its name or the beginning of it."""
    return only is None or any(name == word or name.startswith((f"{word} ", f"{word}-")) for word in only)


def run_case(name: str, case: Callable[[], Row]) -> Row:
    """A row, or why there is none; the next case goes on either way."""
    try:
        with limit_seconds(CASE_SECONDS):
            return case()
    except Exception as error:  # whatever a case runs into is its result
        traceback.print_exc()
        return Row(case=name, error=f"{type(error).__name__}: {error}"[:300])


@contextmanager
def loaded(options: argparse.Namespace, config: Path) -> Iterator[tuple[LLM, float]]:
    """The model, and the seconds from nothing to its first token."""
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = open_checkpoint(config, load_format="dummy").spec.vocab_size
        tokenizer = write_tokenizer(Path(folder), vocab_size)
        settings: dict[str, Any] = {
            "device": options.device,
            "load_format": "dummy",
            "tokenizer": str(tokenizer),
            "enable_prefix_caching": False,
            "max_num_seqs": 256,
            "max_model_len": options.max_model_len,
        }
        began = time.perf_counter()
        llm = LLM(config, **{**settings, **dict(options.set)})
        try:
            llm.generate([[1] * 16], SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
            yield llm, time.perf_counter() - began
        finally:
            llm.close()


def measure(options: argparse.Namespace, config: Path, ceilings: Ceilings | None) -> list[Row]:
    """All chosen rows, each printed as it comes, so that a run that is cut short has told what it knew."""
    spec = open_checkpoint(config, load_format="dummy").spec
    rows: list[Row] = []
    with loaded(options, config) as (llm, start):
        print("Kernels: " + "; ".join(f"{name}: {choice}" for name, choice in llm.describe().items()))
        print("Memory: " + "; ".join(llm.info.memory_plan), flush=True)
        if chosen("start", options.only):
            rows.append(Row(case="start", value=start, unit="s", milliseconds=start * 1e3))
        bench = Bench(llm, spec, ceilings)
        for name, case in cases(bench).items():
            if chosen(name, options.only) and not ((options.profile or options.host) and options.only is None):
                rows.append(run_case(name, case))
                print(f"{name}: {_value(rows[-1])}", flush=True)
        for batch, context in options.profile:
            run_case(f"profile {batch}", partial(profile, bench, batch, context))
        for name in options.host:
            run_case(f"host {name}", lambda name=name: host_profile(name, cases(bench)[name]))  # type: ignore[misc]
    return rows


def profile(bench: Bench, batch: int, context: int) -> Row:
    """Print a decode step's kernels: a long run's minus those of a shorter one; of 0 sequences, the prompts'."""
    if batch == 0:
        return profile_prompts(bench)
    # Prompts of a large batch end some steps after one another, in both runs alike: they differ in full steps.
    steps = 32
    prompts = bench.prompts([context] * batch)
    for _ in range(3):  # a length that comes for the third time is planned anew by cuDNN
        bench.seconds(prompts, 1)
    timed = [(bench.seconds(prompts, steps), bench.seconds(prompts, 2 * steps)) for _ in range(2)]
    step = (min(many for _, many in timed) - min(few for few, _ in timed)) / steps
    short, long = (recorded(lambda n=n: bench.seconds(prompts, n)) for n in (steps, 2 * steps))  # type: ignore[misc]
    row = bench.decode_row(f"profile {batch}", batch, step, context=context + 1.5 * steps)
    share = "" if row.share is None else f", {row.share:.0%} of what the card reads"
    print(f"\nA decode step of {batch} behind {context} takes {step * 1e3:.3f} ms{share}; kernels (which may overlap):")
    print_table(["kernel", "calls", "us a step", "share"], profile_table(short, long, steps))
    idle = [(sum(gaps), sum(gap for gap in gaps if gap < STEP_GAP)) for gaps in map(idle_times, (short, long))]
    every, within = ((after - before) / steps for before, after in zip(*idle, strict=True))
    print(f"Nothing runs for {every:.0f} us a step, {within:.0f} of them in gaps of less than {STEP_GAP} us")
    return row


def profile_prompts(bench: Bench) -> Row:
    row, prompts = bench.prefill(), bench.prompts([2_048] * 16)
    spans = recorded(lambda: bench.seconds(prompts, 1))
    idle = idle_times(spans)
    print(f"\n16 prompts of 2,048 take {row.milliseconds:.1f} ms; their kernels (which may overlap):")
    print_table(["kernel", "calls", "us", "share"], profile_table([], spans, 1))
    longest = ", ".join(f"{gap / 1e3:.2f}" for gap in idle[:8])
    print(f"Nothing ran for {sum(idle) / 1e3:.2f} ms in between, in {len(idle)} gaps; the longest, ms: {longest}")
    return row


def host_profile(name: str, case: Callable[[], Row]) -> Row:
    """Print where the host's time goes during a case, by function; the profiler itself makes it slower."""
    profiler = cProfile.Profile()
    row = profiler.runcall(case)
    print(f"\nThe host during {name}, {_value(row)} under the profiler:")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(HOST_LINES)
    return row


def _value(row: Row) -> str:
    return row.error or f"{row.value:,.{1 if row.unit != 'tok/s' else 0}f} {row.unit}"


def print_rows(rows: list[Row], figures: dict[str, tuple[float | None, float | None]]) -> None:
    heads = ["case", "value", "ms", "GB/s", "TFLOP/s", "of the card", "reach", "vLLM", "x vLLM"]
    cells = []
    for row in rows:
        reach, peer = figures.get(row.case, (None, None))
        if row.value is None:
            cells.append([row.case, row.error or "", *[""] * 7])
            continue
        lower = row.case in LOWER_IS_BETTER
        reached = reach is not None and (row.value <= reach if lower else row.value >= reach)
        ratio = None if peer is None else (peer / row.value if lower else row.value / peer)
        cells.append(
            [
                *(row.case, _value(row), _number(row.milliseconds, 3), _number(row.gb_per_second, 0)),
                *(_number(row.tera_flops, 0), "" if row.share is None else f"{row.share:.1%}"),
                "" if reach is None else f"{reach:,g} {'✓' if reached else '✗'}",
                *("" if peer is None else f"{peer:,g}", _number(ratio, 2)),
            ]
        )
    print_table(heads, cells)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _profiled(text: str) -> tuple[int, int]:
    """`BATCH` or `BATCH@CONTEXT`."""
    batch, _, context = text.partition("@")
    return int(batch), int(context or PROMPT)


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` of `EngineConfig`."""
    name, _, value = text.partition("=")
    setting = settings_table().get(name.replace("-", "_"))
    if setting is None:
        raise argparse.ArgumentTypeError(f"there is no setting {name!r}")
    return setting.name, parse_value(setting, value, name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the engine on a GPU with random weights.")
    shapes = sorted(path.parent.name for path in CONFIGS.glob("*/config.json"))
    parser.add_argument("model", help=f"a shape ({', '.join(shapes)}) or a directory with a config.json")
    names = ", ".join(case_names())
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"cases or their beginnings: {names}")
    parser.add_argument(
        "--profile",
        nargs="+",
        type=_profiled,
        default=[],
        metavar="BATCH[@CONTEXT]",
        help=f"kernels of a decode step (default: contexts of {PROMPT}), 0: of prompts",
    )
    parser.add_argument("--host", nargs="+", default=[], metavar="NAME", help="functions of the host during cases")
    parser.add_argument("--set", action="append", type=_setting, default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument("--max-model-len", type=int, default=LONG_CONTEXT + STEPS, help="default: what `long` needs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write the results to a file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    config = CONFIGS / options.model if (CONFIGS / options.model).is_dir() else Path(options.model)
    ceilings = None
    if options.device == "cuda":
        print(platforms.current().describe())
        ceilings = measure_ceilings()
        print(f"Ceilings: read {ceilings.read / 1e9:,.0f} GB/s, bf16 products {ceilings.flops / 1e12:,.0f} TFLOP/s")
    rows = measure(options, config, ceilings)
    print_rows(rows, FIGURES.get(options.model, {}))
    if options.json:
        content = {
            "device": platforms.current().describe(),
            "model": options.model,
            "settings": dict(options.set),
            "ceilings": asdict(ceilings) if ceilings else None,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
