"""A minute of load by guidellm, and whether the server is as it was before.

    aphrodite run --kv-cache-memory 256MiB &
    python tests/clients/drive_guidellm.py http://127.0.0.1:2242 TOKENIZER --streams 16 --pid $!

TOKENIZER is a folder with the model's tokenizer, so that guidellm need not fetch it. No request may fail; afterwards
none may run or wait, no block of the KV cache may be held, and with the server's process id its memory, the engine
process's with it, may not have grown by more than 2 % since a first, shorter load. The KV cache has to be so small that
the first load fills it: what is touched for the first time later looks like growth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checks import Checks, require

WARM_UP = 25  # seconds
MAX_GROWTH = 0.02


def load(options: argparse.Namespace, model: str, seconds: int) -> dict[str, Any]:
    """guidellm's report of one benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console",
            "--backend", f"kind=openai_http,target={options.url},model={model},api_key={options.key}",
            "--tokenizer", f"kind=huggingface_auto,model={options.tokenizer}",
            "--profile", f"kind=concurrent,streams={options.streams}",
            "--constraint", f"kind=max_duration,seconds={seconds}",
            "--data", f"kind=synthetic_text,prompt_tokens={options.input},output_tokens={options.output}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return dict(benchmark["metrics"])


def gauges(options: argparse.Namespace) -> dict[str, float]:
    """The last value of each metric that has one series."""
    request = urllib.request.Request(f"{options.url}/metrics", headers={"authorization": f"Bearer {options.key}"})
    with urllib.request.urlopen(request) as page:
        rows = re.findall(r"^(\S+?)\{[^}]*\} (\S+)$", page.read().decode(), re.M)
    return {name: float(value) for name, value in rows}


def memory(pid: int) -> int:
    """Resident bytes of a process and its children, all of them."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(re.findall(r"^VmRSS:\s+(\d+) kB", status, re.M)[0])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return kilobytes * 1024 + sum(memory(int(child)) for child in children)


def told(metrics: dict[str, Any]) -> None:
    def figures(name: str) -> str:
        values = metrics[name]["successful"]
        return f"{values['median']:.1f} ms (p99 {values['percentiles']['p99']:.0f})"

    rate = metrics["output_tokens_per_second"]["successful"]["mean"]
    print(
        f"    {metrics['request_totals']['successful']} requests; output {rate:.0f} tok/s; first token "
        f"{figures('time_to_first_token_ms')}; between tokens {figures('inter_token_latency_ms')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url", type=lambda url: url.rstrip("/"))
    parser.add_argument("tokenizer")
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int)
    for name, default in (("streams", 16), ("seconds", 60), ("input", 128), ("output", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    check = Checks(f"guidellm {version('guidellm')}")
    request = urllib.request.Request(f"{options.url}/v1/models", headers={"authorization": f"Bearer {options.key}"})
    with urllib.request.urlopen(request) as answer:
        model = json.load(answer)["data"][0]["id"]
    load(options, model, WARM_UP)
    before = options.pid and memory(options.pid)
    with check(f"{options.streams} streams, {options.seconds} s: no errors"):
        metrics = load(options, model, options.seconds)
        told(metrics)
        require(metrics["request_totals"]["errored"] == 0, metrics["request_totals"])
    with check("nothing runs, waits or holds blocks"):
        after = gauges(options)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        left = {name: after[f"aphrodite:{name}"] for name in names}
        require(not any(left.values()), left)
    if options.pid:
        with check("no more memory than before"):
            now = memory(options.pid)
            print(f"    {before / 2**20:.0f} MiB, then {now / 2**20:.0f} MiB")
            require(now < before * (1 + MAX_GROWTH), before, now)
    check.end()


if __name__ == "__main__":
    main()
