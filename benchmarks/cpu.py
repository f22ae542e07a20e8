"""Every CPU figure that we claim, beside this machine's bandwidth and beside llama.cpp where it is installed.

    make bench-cpu                      all of it
    make bench-cpu ARGS="--only decode --rounds 7"

Engines take turns within each round, so that a slow minute of the machine meets all of them; figures are medians
over the rounds. Decode is timed on top of prompts that are computed once, before the rounds. Close other programs
first: with two cores, one busy neighbour halves everything.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import served
from peers.llama_cpp_client import LlamaCppPeer

from aphrodite.cli.bench import print_table
from aphrodite.cli.bench_offline import random_prompts, time_generate
from aphrodite.cli.console import progress_bar, stderr
from aphrodite.cli.machine import cpu_model, instruction_sets, read_bandwidth
from aphrodite.cores import usable_cores
from aphrodite.llm import LLM

PEER = "llama.cpp"
MODES = {"default": "int16", "fast": "int8"}  # name -> activations
BLOCK = 16
# Targets in tokens a second were set on a machine where llama.cpp decodes one stream at this rate.
PEER_RATE_OF_TARGETS = 131.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A row of the table. `reach` is tokens a second, or a multiple of llama.cpp's; by mode."""

    kind: str  # decode or prefill
    streams: int
    context: int
    reach: dict[str, float]
    relative: bool = False
    steps: int = 64  # of a timing of decode
    with_peer: bool = True

    @property
    def label(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context:,}"
        return f"decode, {self.streams} stream{'s' if self.streams > 1 else ''}, context {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens that one timing makes: of a step, of a prefill."""
        return self.streams if self.kind == "decode" else self.context

    @property
    def input_len(self) -> int:
        """Prompt tokens before decode, such that the context is right on average and all but one are whole blocks."""
        return (self.context - self.steps // 2 + BLOCK // 2) // BLOCK * BLOCK + 1


WORKLOADS = (
    Workload("decode", 1, 256, {"default": 2.2, "fast": 2.8}, relative=True),
    Workload("decode", 1, 1500, {}),
    Workload("decode", 8, 256, {"default": 950}, steps=32),
    Workload("decode", 32, 256, {"default": 1200}, steps=16),
    Workload("prefill", 1, 512, {"default": 2300, "fast": 3200}),
    # llama.cpp needs ten seconds a round for this one, and no target compares with it.
    Workload("prefill", 1, 2048, {"default": 1900, "fast": 2600}, with_peer=False),
)
HOST_LIMITS_MS = {1: 0.4, 32: 1.5}


class Timing(NamedTuple):
    """Of a decode step or of a prefill. Seconds; `host` is the engine's own share of a step."""

    seconds: float
    host: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. Rates are tokens a second."""

    workload: str
    engine: str
    rate: float
    lowest: float
    highest: float
    ms: float
    host_ms: float | None
    gb_per_second: float | None
    peer_ratio: float | None
    reach: float | None
    relative: bool  # `reach` is a multiple of llama.cpp's rate

    def verdict(self, machine: float | None) -> str:
        """The target and whether it is met; one in tokens a second also scaled to this machine's speed."""
        if self.reach is None:
            return ""
        if self.relative:
            met = None if self.peer_ratio is None else self.peer_ratio >= self.reach
            return f"{self.reach} × llama.cpp{_mark(met)}"
        text = f"{self.reach:,.0f}{_mark(self.rate >= self.reach)}"
        if machine is None:
            return text
        return f"{text}, scaled {self.reach * machine:,.0f}{_mark(self.rate >= self.reach * machine)}"


def _mark(met: bool | None) -> str:
    return "" if met is None else (" ✓" if met else " ✗")


class EngineTimer:
    """One engine on one workload. The prefix cache holds the prompts of decode between timings."""

    def __init__(self, llm: LLM, workload: Workload) -> None:
        self._llm = llm
        self._workload = workload
        self._source = random.Random(0)
        if workload.kind == "decode":
            self._prompts = self._fresh_prompts(workload.streams, workload.input_len)
            time_generate(llm, self._prompts, 1)

    def time(self) -> Timing:
        llm, workload = self._llm, self._workload
        if workload.kind == "prefill":
            return Timing(time_generate(llm, self._fresh_prompts(1, workload.context), 1))
        short = time_generate(llm, self._prompts, 1)
        long = time_generate(llm, self._prompts, workload.steps + 1)
        return Timing((long - short) / workload.steps, llm.stats().host_ms / 1e3)

    def bytes_per_step(self) -> int | None:
        """Weights and KV cache that a decode step reads."""
        if self._workload.kind != "decode":
            return None
        info = self._llm.info
        positions = self._workload.streams * self._workload.context
        return info.weight_bytes + positions * info.kv_bytes_per_block // info.block_size

    def _fresh_prompts(self, count: int, length: int) -> list[list[int]]:
        return random_prompts(self._source, self._llm.info.vocab_size, [length] * count)


class PeerTimer:
    """llama.cpp on one workload; its worker keeps the prompts of decode between timings."""

    def __init__(self, peer: LlamaCppPeer, workload: Workload) -> None:
        self._peer = peer
        self._workload = workload

    def time(self) -> Timing:
        workload = self._workload
        if workload.kind == "prefill":
            return Timing(self._peer.prefill(length=workload.context))
        return Timing(self._peer.decode(streams=workload.streams, start=workload.input_len, steps=workload.steps))

    def bytes_per_step(self) -> None:
        return None


def measure_workload(workload: Workload, engines: dict[str, LLM], peer: LlamaCppPeer | None, rounds: int) -> list[Row]:
    """One warm-up round and `rounds` that count, engines in turn."""
    timers: dict[str, EngineTimer | PeerTimer] = {mode: EngineTimer(llm, workload) for mode, llm in engines.items()}
    if peer is not None and workload.with_peer:
        timers[PEER] = PeerTimer(peer, workload)
    timings: dict[str, list[Timing]] = {name: [] for name in timers}
    with progress_bar(stderr(), unit="rounds") as bar:
        for _ in bar.track(range(rounds + 1), description=workload.label):
            for name, timer in timers.items():
                timings[name].append(timer.time())
    peer_rate = workload.tokens / _median_seconds(timings[PEER][1:]) if PEER in timings else None
    return [
        _row(workload, name, timings[name][1:], timer.bytes_per_step(), peer_rate) for name, timer in timers.items()
    ]


def _median_seconds(timings: list[Timing]) -> float:
    return statistics.median(timing.seconds for timing in timings)


def _row(
    workload: Workload, engine: str, timings: list[Timing], bytes_per_step: int | None, peer_rate: float | None
) -> Row:
    seconds = _median_seconds(timings)
    host = [timing.host for timing in timings if timing.host is not None]
    rate = workload.tokens / seconds
    return Row(
        workload=workload.label,
        engine=engine,
        rate=rate,
        lowest=workload.tokens / max(timing.seconds for timing in timings),
        highest=workload.tokens / min(timing.seconds for timing in timings),
        ms=seconds * 1e3,
        host_ms=statistics.median(host) * 1e3 if host else None,
        gb_per_second=bytes_per_step / seconds / 1e9 if bytes_per_step is not None else None,
        peer_ratio=rate / peer_rate if peer_rate and engine != PEER else None,
        reach=workload.reach.get(engine),
        relative=workload.relative,
    )


def machine_factor(rows: list[Row]) -> float | None:
    """How fast this machine is beside the one of the targets, by llama.cpp's decode of one stream."""
    rates = [row.rate for row in rows if row.engine == PEER and row.workload == WORKLOADS[0].label]
    return rates[0] / PEER_RATE_OF_TARGETS if rates else None


def print_rows(rows: list[Row], bandwidth: float) -> None:
    names = ["workload", "engine", "tok/s", "lowest–highest", "ms", "host ms", "GB/s", "of read"]
    machine = machine_factor(rows)
    cells = []
    for row in rows:
        share = "" if row.gb_per_second is None else f"{row.gb_per_second * 1e9 / bandwidth:.0%}"
        cells.append(
            [
                *(row.workload, row.engine, f"{row.rate:,.0f}", f"{row.lowest:,.0f}–{row.highest:,.0f}"),
                *(f"{row.ms:,.2f}", _number(row.host_ms, 3), _number(row.gb_per_second, 1), share),
                *(_number(row.peer_ratio, 2), row.verdict(machine)),
            ]
        )
    print_table([*names, "× llama.cpp", "reach"], cells)
    if machine is not None:
        print(
            f"Scaled: targets in tok/s come from a machine where llama.cpp decodes {PEER_RATE_OF_TARGETS:.0f} tok/s;"
            f" here it is {machine:.2f} of that."
        )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def further_checks(rows: list[Row]) -> list[str]:
    """Claims that compare rows with each other."""
    by_key = {(row.workload, row.engine): row for row in rows}
    lines = []
    for mode in MODES:
        short, long = by_key.get((WORKLOADS[0].label, mode)), by_key.get((WORKLOADS[1].label, mode))
        if short and long:
            share = long.rate / short.rate
            lines.append(_verdict(f"{mode}: decode at 1,500 against 256", f"{share:.0%}", "≥ 60 %", share >= 0.6))
    for streams, limit in HOST_LIMITS_MS.items():
        label = next(w.label for w in WORKLOADS if w.kind == "decode" and w.streams == streams)
        row = by_key.get((label, "default"))
        if row and row.host_ms is not None:
            good = row.host_ms < limit
            lines.append(_verdict(f"host's share at {streams}", f"{row.host_ms:.3f} ms", f"< {limit} ms", good))
    return lines


def _verdict(what: str, figure: str, reach: str, good: bool) -> str:
    return f"{what}: {figure} (reach {reach}){_mark(good)}"


def weights_line(llm: LLM) -> str:
    """Memory of the weights against their file."""
    path = Path(str(llm.config.model))
    size = path.stat().st_size if path.is_file() else sum(part.stat().st_size for part in path.glob("*.safetensors"))
    ratio = llm.info.weight_bytes / size
    return _verdict("weights in memory against the file", f"{ratio:.2f} ×", "≤ 1.15 ×", ratio <= 1.15)


@contextmanager
def loaded(model: str | None, threads: int) -> Iterator[dict[str, LLM]]:
    """An engine for each mode. The prefix cache stays on: decode is timed on top of a cached prefill."""
    engines: dict[str, LLM] = {}
    try:
        for mode, activations in MODES.items():
            engines[mode] = LLM(model, device="cpu", activations=activations, threads=threads, max_model_len=4096)
        yield engines
    finally:
        for llm in engines.values():
            llm.close()


def measure_offline(options: argparse.Namespace, peer_wanted: bool) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    with loaded(options.model, options.threads) as engines:
        first = next(iter(engines.values()))
        print("Kernels: " + ", ".join(f"{name}: {choice}" for name, choice in first.describe().items()))
        peer = LlamaCppPeer(str(first.config.model), threads=options.threads) if peer_wanted else None
        try:
            for workload in WORKLOADS:
                if workload.kind in options.only:
                    new = measure_workload(workload, engines, peer, options.rounds)
                    rates = ", ".join(
                        f"{row.engine} {row.rate:,.0f} ({row.lowest:,.0f}–{row.highest:,.0f})" for row in new
                    )
                    print(f"{workload.label}: {rates} tok/s", flush=True)
                    rows += new
        finally:
            if peer is not None:
                peer.close()
        return rows, [*further_checks(rows), weights_line(first)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the engine on this machine's CPU.")
    parser.add_argument("--model", help="GGUF file; default is the default model")
    parser.add_argument("--rounds", type=int, default=5, help="timings of which the median counts (default 5)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    kinds = ("decode", "prefill", "start", "server")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="measure only these")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    print(f"{cpu_model()}, {options.threads} threads, {' '.join(instruction_sets())}")
    bandwidth = read_bandwidth(options.threads)
    print(f"Plain read of memory: {bandwidth / 1e9:.1f} GB/s (kernels that prefetch may exceed it)", flush=True)
    declined = LlamaCppPeer.declines()
    if declined:
        print(f"Without llama.cpp: {declined}")
    rows: list[Row] = []
    checks: list[str] = []
    results: dict[str, Any] = {}
    if {"decode", "prefill"} & set(options.only):
        rows, checks = measure_offline(options, peer_wanted=not declined)
        print_rows(rows, bandwidth)
    if "start" in options.only:
        seconds = served.time_start(options.model, threads=options.threads, rounds=options.rounds)
        results["start_seconds"] = seconds
        checks.append(_verdict("start to the first served token", f"{seconds:.2f} s", "≤ 5 s", seconds <= 5))
    if "server" in options.only:
        result = served.compare_with_offline(options.model, threads=options.threads, rounds=options.rounds)
        results["server"] = asdict(result)
        figure = f"{result.served:,.0f} of {result.offline:,.0f} tok/s, {result.loss:.1%} lost"
        checks.append(_verdict(f"server, {served.STREAMS} streams", figure, "≤ 12 %", result.loss <= 0.12))
    print("\n".join(checks))
    if options.json:
        content = {
            "bandwidth_gb_s": bandwidth / 1e9,
            "rows": [asdict(row) for row in rows],
            "checks": checks,
            **results,
        }
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
