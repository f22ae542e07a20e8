"""`bench latency|throughput|serve`: how fast this machine serves a model, and how far that is from its limit."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aphrodite.cli.console import progress_bar, stderr
from aphrodite.cli.help import Commands
from aphrodite.cli.options import SamplingFlags, with_options
from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.sampling.fields import to_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.settings import Settings

if TYPE_CHECKING:
    from aphrodite.cli.bench_client import Client, Load
    from aphrodite.cli.bench_offline import Latency
    from aphrodite.llm import LLM

app = Commands(name="bench", help="Measure speed: of steps, of many prompts, of a server.", no_args_is_help=True)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to a file.", metavar="FILE")]
WORKLOAD = "Workload"


def _count(name: str, help: str, *, least: int = 1) -> Any:
    return typer.Option(name, help=help, min=least, metavar="N", rich_help_panel=WORKLOAD)


@app.command("latency")
@with_options(EngineConfig)
def latency(
    *,
    batch_size: Annotated[list[int], _count("--batch-size", "Sequences at a time. May be repeated.")] = [1],  # noqa: B006
    input_len: Annotated[int, _count("--input-len", "Tokens of each prompt.")] = 256,
    output_len: Annotated[int, _count("--output-len", "Tokens of each answer.")] = 64,
    repeats: Annotated[int, _count("--repeats", "Runs of which the median counts.")] = 5,
    json_file: JsonOption = None,
    settings: Settings,
) -> None:
    """Time to the first token, time of a step, and the memory bandwidth that it uses."""
    from aphrodite.cli.bench_offline import measure_latency
    from aphrodite.cli.machine import read_bandwidth
    from aphrodite.cores import usable_cores

    with stderr().status("Measuring memory bandwidth"):
        bandwidth = read_bandwidth(settings.engine.threads or usable_cores())
    llm = _load(_room_for(settings.engine, max(batch_size)))
    results = []
    try:
        with progress_bar(stderr(), unit="runs") as bar:
            task = bar.add_task("Measuring", total=len(batch_size) * (repeats + 1))
            for size in batch_size:
                results.append(
                    measure_latency(
                        llm, batch_size=size, input_len=input_len, output_len=output_len, repeats=repeats,
                        advance=lambda: bar.advance(task),
                    )
                )  # fmt: skip
    finally:
        llm.close()
    _print_latency(results, bandwidth)
    rows = [_latency_row(result, bandwidth) for result in results]
    _write_json(json_file, {"memory_bandwidth_gb_s": bandwidth / 1e9, "results": rows})


def _latency_row(result: Latency, bandwidth: float) -> dict[str, Any]:
    return {
        "batch_size": result.batch_size,
        "input_len": result.input_len,
        "output_len": result.output_len,
        "ttft_ms": result.ttft * 1e3,
        "prefill_tok_s": result.prefill_rate,
        "step_ms": result.step * 1e3,
        "host_ms": result.host * 1e3,
        "decode_tok_s": result.decode_rate,
        "read_gb_s": result.bytes_per_second / 1e9,
        "bandwidth_share": result.bytes_per_second / bandwidth,
    }


def _print_latency(results: Sequence[Latency], bandwidth: float) -> None:
    heads = ["batch", "input", "TTFT ms", "prefill tok/s", "step ms", "host ms", "decode tok/s", "GB/s", "of memory"]
    rows = [
        [
            *(str(result.batch_size), str(result.input_len), f"{result.ttft * 1e3:.1f}", f"{result.prefill_rate:,.0f}"),
            *(f"{result.step * 1e3:.2f}", f"{result.host * 1e3:.2f}", f"{result.decode_rate:,.0f}"),
            *(f"{result.bytes_per_second / 1e9:.1f}", f"{result.bytes_per_second / bandwidth:.0%}"),
        ]
        for result in results
    ]
    print_table(heads, rows)
    print(
        f"A plain read of memory reaches {bandwidth / 1e9:.1f} GB/s; GB/s counts weights and KV cache, once a step, "
        "and of experts those that its tokens are expected to choose."
    )


@app.command("throughput")
@with_options(EngineConfig)
def throughput(
    *,
    num_prompts: Annotated[int, _count("--num-prompts", "Prompts to answer.")] = 64,
    min_input_len: Annotated[int, _count("--min-input-len", "Fewest tokens of a prompt.")] = 32,
    max_input_len: Annotated[int, _count("--max-input-len", "Most tokens of a prompt.")] = 256,
    min_output_len: Annotated[int, _count("--min-output-len", "Fewest tokens of an answer.")] = 32,
    max_output_len: Annotated[int, _count("--max-output-len", "Most tokens of an answer.")] = 128,
    workload_seed: Annotated[int, _count("--workload-seed", "Draws the lengths and prompts.", least=0)] = 0,
    json_file: JsonOption = None,
    settings: Settings,
) -> None:
    """Answer many prompts of random lengths at once, without a server."""
    from aphrodite.cli.bench_offline import measure_throughput

    if min_input_len > max_input_len or min_output_len > max_output_len:
        raise ConfigError("the fewest tokens are more than the most tokens; lower --min-… or raise --max-….")
    llm = _load(settings.engine)
    try:
        result = measure_throughput(
            llm, num_prompts=num_prompts, input_range=(min_input_len, max_input_len),
            output_range=(min_output_len, max_output_len), seed=workload_seed, progress=True,
        )  # fmt: skip
    finally:
        llm.close()
    summary = {
        "num_prompts": result.num_prompts,
        "elapsed_time": result.elapsed,
        "total_input_tokens": result.input_tokens,
        "total_output_tokens": result.output_tokens,
        "requests_per_second": result.num_prompts / result.elapsed,
        "output_tokens_per_second": result.output_tokens / result.elapsed,
        "tokens_per_second": (result.input_tokens + result.output_tokens) / result.elapsed,
    }
    print_table(["", ""], [[name.replace("_", " "), f"{value:,.2f}"] for name, value in summary.items()])
    _write_json(json_file, summary)


@app.command("serve")
@with_options(sampling=True, skip=("n", "max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids"))
def serve(
    *,
    url: Annotated[str, typer.Option("--url", help="Server to load.", metavar="URL")] = "http://127.0.0.1:2242",
    api_key: Annotated[str | None, typer.Option("--api-key", help="Its key.", metavar="KEY")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to ask for; default is its first.", metavar="NAME")
    ] = None,
    num_prompts: Annotated[int, _count("--num-prompts", "Requests to send.")] = 64,
    input_len: Annotated[int, _count("--input-len", "Tokens of each prompt.")] = 128,
    output_len: Annotated[int, _count("--output-len", "Tokens of each answer.")] = 128,
    concurrency: Annotated[int | None, _count("--concurrency", "Requests under way at a time.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", help="Requests a second, at random moments.", min=1e-6, metavar="X", rich_help_panel=WORKLOAD
        ),
    ] = None,
    vocab_size: Annotated[int, _count("--vocab-size", "Prompts are random token ids below this.")] = 30000,
    workload_seed: Annotated[int, _count("--workload-seed", "Draws prompts and arrivals.", least=0)] = 0,
    json_file: JsonOption = None,
    sampling: SamplingFlags,
) -> None:
    """Load a running server and report what its clients would see.

    Sends 16 requests at a time unless --concurrency or --rate says otherwise.
    """
    import asyncio

    from aphrodite.cli.bench_client import Client, Load
    from aphrodite.cli.bench_offline import random_prompts

    if concurrency is None and rate is None:
        concurrency = 16
    prompts = random_prompts(random.Random(workload_seed), vocab_size, [input_len] * num_prompts)
    load = Load(
        prompts=prompts, output_len=output_len, concurrency=concurrency, rate=rate, seed=workload_seed,
        extra=to_mapping(sampling.over(SamplingParams())),
    )  # fmt: skip
    summary = asyncio.run(_load_server(Client(url, api_key=api_key), model, load))
    _print_serve(summary)
    _write_json(json_file, summary)
    if summary["failed"]:
        raise AphroditeError(f"{summary['failed']} of {num_prompts} requests failed: {'; '.join(summary['errors'])}")


async def _load_server(client: Client, model: str | None, load: Load) -> dict[str, Any]:
    from aphrodite.cli.bench_client import run_load, summarize

    try:
        if model is None:
            model = (await client.get("/v1/models"))["data"][0]["id"]
        with progress_bar(stderr(), unit="requests") as bar:
            task = bar.add_task("Requests", total=len(load.prompts))
            samples, elapsed = await run_load(client, model, load, lambda: bar.advance(task))
    finally:
        await client.close()
    return summarize(samples, elapsed, load, model)


def _print_serve(summary: Mapping[str, Any]) -> None:
    totals = {
        "requests": f"{summary['completed']} of {summary['num_prompts']} in {summary['duration']:.2f} s",
        "requests a second": f"{summary['request_throughput']:.2f}",
        "output tok/s": f"{summary['output_throughput']:,.1f}",
        "input + output tok/s": f"{summary['total_token_throughput']:,.1f}",
    }
    print_table(["", ""], [[name, value] for name, value in totals.items()])
    labels = {"ttft": "first token", "tpot": "each further token", "itl": "between pieces", "e2el": "whole answer"}
    columns = ("mean", "median", "p90", "p95", "p99")
    rows = [[label, *(f"{summary[f'{column}_{name}_ms']:.2f}" for column in columns)] for name, label in labels.items()]
    print_table(["ms", *columns], rows)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: the first column to the left, numbers to the right. Never cut, so that it can be searched."""
    lines = [list(map(str, row)) for row in ([heads] if any(heads) else []) + list(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def _load(config: EngineConfig) -> LLM:
    from aphrodite.cli.sources import load_llm

    with stderr().status("Loading the model"):
        return load_llm(config)


def _room_for(config: EngineConfig, sequences: int) -> EngineConfig:
    """The whole batch must run together, or its steps would not be the ones that are timed."""
    if config.max_num_seqs is not None and config.max_num_seqs >= sequences:
        return config
    return dataclasses.replace(config, max_num_seqs=sequences)


def _write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None
