"""What the GPU benchmark needs beside the engine: the card's ceilings, a kernel profile, a tokenizer, a time limit."""

from __future__ import annotations

import itertools
import json
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

READ_BYTES = 8 * 10**9
PRODUCT_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card reached just now: bytes a second read from its memory, operations a second in bf16."""

    read: float
    flops: float


def measure_ceilings() -> Ceilings:
    """Medians on random values. Frees what it took."""
    ceilings = Ceilings(_read_rate(), _product_rate())
    torch.cuda.empty_cache()
    return ceilings


def _read_rate() -> float:
    """A sum over 8 GB."""
    values = torch.empty(READ_BYTES // 4, device="cuda").normal_()
    return READ_BYTES / _median_seconds(values.sum, repeats=9)


def _product_rate() -> float:
    """An 8,192 cubed product in bfloat16."""
    left, right = torch.empty((2, PRODUCT_SIZE, PRODUCT_SIZE), device="cuda", dtype=torch.bfloat16).normal_()
    return 2.0 * PRODUCT_SIZE**3 / _median_seconds(lambda: left @ right, repeats=15)


def _median_seconds(function: Callable[[], object], *, repeats: int) -> float:
    for _ in range(3):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median([float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]) / 1e3


class Span(NamedTuple):
    """A kernel or copy that ran, times in microseconds."""

    name: str
    start: float
    end: float


def recorded(function: Callable[[], object]) -> list[Span]:
    """What runs on the device while `function` does, in the order of its beginning."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    return sorted((Span(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda span: span.start)


def profile_table(short: list[Span], long: list[Span], steps: int) -> list[list[str]]:
    """Kernels of one of the `steps` steps by which `long` exceeds `short`: name, calls, microseconds, share.

    What a run costs only once (the prefill) is in both and so drops out. Rows under 0.2 % are summed up.
    """
    before, after = _kernel_times(short), _kernel_times(long)
    each = {
        name: ((calls - before[name][0]) / steps, (microseconds - before[name][1]) / steps)
        for name, (calls, microseconds) in after.items()
    }
    total = sum(microseconds for _, microseconds in each.values())
    rows, rest = [], 0.0
    for name, (calls, microseconds) in sorted(each.items(), key=lambda item: -item[1][1]):
        if microseconds < 0.002 * total:
            rest += microseconds
            continue
        rows.append([name[:100], f"{calls:.1f}", f"{microseconds:.1f}", f"{microseconds / total:.1%}"])
    rows.append(["all others", "", f"{rest:.1f}", f"{rest / total:.1%}" if total else ""])
    return [*rows, ["sum", "", f"{total:.1f}", ""]]


def idle_times(spans: list[Span]) -> list[float]:
    """Microseconds in which nothing ran between the first and the last of `spans`; the longest first."""
    gaps, ended = [], spans[0].start if spans else 0.0
    for span in spans:
        gaps.append(span.start - ended)
        ended = max(ended, span.end)
    return sorted((gap for gap in gaps if gap > 0), reverse=True)


def _kernel_times(spans: list[Span]) -> dict[str, tuple[int, float]]:
    """Calls and microseconds of every kernel and copy."""
    times: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, start, end in spans:
        calls, microseconds = times[name]
        times[name] = (calls + 1, microseconds + end - start)
    return times


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A byte-level tokenizer.json of `vocab_size` made-up words; the model's own is not needed for random tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = itertools.chain.from_iterable(itertools.product(letters, repeat=length) for length in itertools.count(1))
    vocabulary = {"".join(word): number for number, word in zip(range(vocab_size), words, strict=False)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@contextmanager
def limit_seconds(seconds: int) -> Iterator[None]:
    """Interrupt the body after `seconds`, between two Python instructions.

    Raises:
        TimeoutError: it took longer.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
