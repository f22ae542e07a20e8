"""Every CPU figure that we claim, beside this machine's bandwidth and beside llama.cpp where it is installed.

    make bench-cpu                      all of it (about ten minutes)
    make bench-cpu ARGS="--only decode --rounds 7"

Engines take turns within each round, so that a slow minute of the machine meets all of them; figures are medians
over the rounds. Close other programs first: with two cores, one busy neighbour halves everything.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import served
from peers.llama_cpp_client import LlamaCppPeer

from aphrodite.cli.bench import print_table
from aphrodite.cli.bench_offline import Run, summarize, time_once
from aphrodite.cli.console import progress_bar, stderr
from aphrodite.cli.machine import cpu_model, instruction_sets, read_bandwidth, usable_cores
from aphrodite.llm import LLM

DECODE_STEPS = 64
MODES = {"default": "int16", "fast": "int8"}  # name -> activations


@dataclass(frozen=True, slots=True)
class Workload:
    """A row of the table. `reach` is tokens a second, or a multiple of llama.cpp's; by mode."""

    kind: str  # decode or prefill
    streams: int
    context: int
    reach: dict[str, float]
    relative: bool = False

    @property
    def label(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context:,}"
        return f"decode, {self.streams} stream{'s' if self.streams > 1 else ''}, context {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens that one timing makes: of a step, of a prefill."""
        return self.streams if self.kind == "decode" else self.context


WORKLOADS = (
    Workload("decode", 1, 256, {"default": 2.2, "fast": 2.8}, relative=True),
    Workload("decode", 1, 1500, {}),
    Workload("decode", 8, 256, {"default": 950}),
    Workload("decode", 32, 256, {"default": 1200}),
    Workload("prefill", 1, 512, {"default": 2300, "fast": 3200}),
    Workload("prefill", 1, 2048, {"default": 1900, "fast": 2600}),
)
HOST_LIMITS_MS = {1: 0.4, 32: 1.5}


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
    reach: str
    reached: bool | None


def measure_workload(workload: Workload, engines: dict[str, LLM], peer: LlamaCppPeer | None, rounds: int) -> list[Row]:
    """One warm-up round and `rounds` that count, engines in turn."""
    shape = {"batch_size": workload.streams, "input_len": workload.context, "output_len": DECODE_STEPS}
    if workload.kind == "decode":
        shape["input_len"] = workload.context - DECODE_STEPS // 2
    source = random.Random(0)
    runs: dict[str, list[Run]] = {mode: [] for mode in engines}
    peer_seconds: list[float] = []
    with progress_bar(stderr(), unit="rounds") as bar:
        for _ in bar.track(range(rounds + 1), description=workload.label):
            for mode, llm in engines.items():
                runs[mode].append(time_once(llm, source, **shape))
            if peer is not None:
                peer_seconds.append(_ask_peer(peer, workload))
    peer_rate = workload.tokens / statistics.median(peer_seconds[1:]) if peer_seconds else None
    rows = []
    for mode, llm in engines.items():
        result = summarize(llm, runs[mode][1:], **shape)
        times = [run.step if workload.kind == "decode" else run.ttft for run in runs[mode][1:]]
        bandwidth = result.bytes_per_second / 1e9 if workload.kind == "decode" else None
        host = result.host * 1e3 if workload.kind == "decode" else None
        rows.append(_row(workload, mode, times, host, bandwidth, peer_rate))
    if peer_seconds:
        rows.append(_row(workload, "llama.cpp", peer_seconds[1:], None, None, None))
    return rows


def _ask_peer(peer: LlamaCppPeer, workload: Workload) -> float:
    if workload.kind == "prefill":
        return peer.prefill(length=workload.context)
    return peer.decode(streams=workload.streams, context=workload.context, steps=DECODE_STEPS)


def _row(
    workload: Workload,
    engine: str,
    times: list[float],
    host: float | None,
    bandwidth: float | None,
    peer_rate: float | None,
) -> Row:
    rate = workload.tokens / statistics.median(times)
    target = workload.reach.get(engine)
    reach, reached = "", None
    if target is not None and workload.relative:
        reach = f"{target} × llama.cpp"
        reached = rate / peer_rate >= target if peer_rate else None
    elif target is not None:
        reach, reached = f"{target:,.0f}", rate >= target
    return Row(
        workload=workload.label,
        engine=engine,
        rate=rate,
        lowest=workload.tokens / max(times),
        highest=workload.tokens / min(times),
        ms=statistics.median(times) * 1e3,
        host_ms=host,
        gb_per_second=bandwidth,
        peer_ratio=rate / peer_rate if peer_rate else None,
        reach=reach,
        reached=reached,
    )


def print_rows(rows: list[Row], bandwidth: float) -> None:
    heads = [
        "workload",
        "engine",
        "tok/s",
        "lowest–highest",
        "ms",
        "host ms",
        "GB/s",
        "of read",
        "× llama.cpp",
        "reach",
    ]
    cells = []
    for row in rows:
        share = "" if row.gb_per_second is None else f"{row.gb_per_second * 1e9 / bandwidth:.0%}"
        verdict = "" if row.reached is None else (" ✓" if row.reached else " ✗")
        cells.append(
            [
                *(row.workload, row.engine, f"{row.rate:,.0f}", f"{row.lowest:,.0f}–{row.highest:,.0f}"),
                *(f"{row.ms:,.2f}", _number(row.host_ms, 3), _number(row.gb_per_second, 1), share),
                *(_number(row.peer_ratio, 2), row.reach + verdict),
            ]
        )
    print_table(heads, cells)


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
    return f"{what}: {figure} (reach {reach}) {'✓' if good else '✗'}"


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
            engines[mode] = LLM(model, activations=activations, threads=threads, max_model_len=4096)
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
                    rows += measure_workload(workload, engines, peer, options.rounds)
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
    print(f"Plain read of memory: {bandwidth / 1e9:.1f} GB/s (kernels that prefetch may exceed it)")
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
