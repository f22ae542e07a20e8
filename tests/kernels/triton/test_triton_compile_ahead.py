"""What a launch needs is in Triton's cache after it was compiled ahead from its record, without a GPU."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from pretended_device import LAUNCHES, PretendedDriver
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITCallable

from aphrodite.kernels.triton import compile_ahead, compile_worker, gated_gemm, step_inputs
from aphrodite.kernels.triton.compile_ahead import Jobs
from aphrodite.kernels.triton.launch import DirectKernel, recording
from aphrodite.kernels.triton.linear import gemv
from aphrodite.kernels.triton.norm import rms_norm

X, NORM, WEIGHT = torch.zeros(3, 64), torch.zeros(64), torch.zeros(128, 64)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_worker, "LAUNCHERS", {"cuda": ("pretended_device", "Launcher")})
    LAUNCHES.clear()


def compiled(folder: Path) -> int:
    return len(list(folder.rglob("*.cubin")))


def steps() -> None:
    """Kernels with descriptors, constants, numbers that are and are not specialised, strided rows."""
    rms_norm(X, NORM, 1e-5)
    rms_norm(torch.zeros(6, 65)[::2, :64], NORM, 1e-6)
    gemv(X[:1], WEIGHT, norm=(NORM, 1e-5))
    gated_gemm.gated_gemm(X.half(), WEIGHT.half(), "silu")
    indices = torch.zeros(5, dtype=torch.int32)
    for count in (1, 5):
        step_inputs.gather_tokens(indices[:count], indices[None], indices[:count], indices[:count])


def forget() -> None:
    """What this process has compiled, so that it looks into the cache again."""
    for kernel in recorded().kernels.values():
        kernel.jitted.device_caches.clear()
        kernel._variants.clear()


def recorded() -> Jobs:
    jobs = Jobs()
    with recording(jobs):
        steps()
    return jobs


@pytest.mark.parametrize("block", [[16, 128], [64, 64], [32, 32]])
def test_descriptors_of_gluon_have_the_layout_that_launches_take(block: list[int]) -> None:
    """Of activations by a whole chunk of 4-bit codes, and by groups of 64 and 32."""
    gl = pytest.importorskip("triton.experimental.gluon.language")
    made: Any = compile_worker._gluon_tiles(torch.bfloat16, block)
    assert made.layout == gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)


def test_launches_find_what_was_compiled_from_their_records(tmp_path: Path) -> None:
    jobs = list(recorded().kernels)
    assert len(jobs) == 5  # the last two differ in a number that nothing depends on
    forget()
    for job in jobs:
        compile_worker.compile_job(job, GPUTarget("cuda", 90, 32))
    assert compiled(tmp_path) == 5
    forget()
    steps()
    assert len(LAUNCHES) == 6
    assert compiled(tmp_path) == 5


def test_keys_do_not_depend_on_what_was_asked_for_before() -> None:
    """Workers come to kernels in another order than launches do."""
    pytest.importorskip("triton.experimental.gluon")
    from aphrodite.kernels.triton import int4_mma, int4_wgmma, sampling_choose, sampling_listed, sampling_wide

    kernels = [
        *(int4_mma._int4_row_kernel, int4_mma._int4_rows_kernel, int4_wgmma._int4_wgmma_kernel),
        *(sampling_choose.choose_kernel, sampling_listed.listed_kernel),
        *(sampling_wide.widen_kernel, sampling_wide.draw_kernel),
    ]

    def keys(order: Sequence[DirectKernel]) -> dict[str, str]:
        for function in gc.get_objects():
            if issubclass(type(function), JITCallable):  # instances of others may warn when asked
                function.hash, function.used_global_vals = None, {}
        return {kernel.__name__: kernel.jitted.cache_key for kernel in order}

    assert keys(kernels) == keys(kernels[::-1])
    assert keys(kernels[:1]).items() <= keys(kernels[1:] + kernels[:1]).items()


def test_workers_share_the_jobs_and_report_failures(tmp_path: Path) -> None:
    good = list(recorded().kernels)[:3]
    bad = json.dumps(["aphrodite.kernels.triton.norm", "no_such_kernel", [], {}])
    told: list[tuple[int, int]] = []
    failures = compile_ahead._Pool([*good, bad], workers=2).run(lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(4)]
    assert any("no_such_kernel" in failure for failure in failures)
    assert compiled(tmp_path) == 3


def test_workers_compile_what_no_earlier_start_has_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    class Pool:
        def __init__(self, jobs: list[str], workers: int) -> None:
            runs.append(len(jobs))

        def run(self, progress: compile_ahead.Progress) -> list[str]:
            return ["one failed"]

    monkeypatch.setattr(compile_ahead, "_Pool", Pool)
    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 8)
    with caplog.at_level(logging.DEBUG, "aphrodite"):
        for _ in range(3):
            compile_ahead.compile_ahead(recorded(), lambda done, total: None)
        more = recorded()
        with recording(more):
            for hidden in (16, 32, 128, 256):
                rms_norm(torch.zeros(3, hidden), torch.zeros(hidden), 1e-5)
        compile_ahead.compile_ahead(more, lambda done, total: None)
    assert runs == [5, 4]
    assert "one failed" in caplog.text


def test_few_kernels_are_not_worth_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "_Pool", None)
    jobs = Jobs()
    with recording(jobs):
        rms_norm(X, NORM, 1e-5)
    compile_ahead.compile_ahead(jobs, lambda done, total: None)


def test_recorded_launches_keep_no_memory() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def record(kernel: DirectKernel, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        kept.extend(weakref.ref(argument) for argument in arguments if isinstance(argument, torch.Tensor))
        jobs(kernel, arguments, options)

    jobs = Jobs()
    with recording(record):
        rms_norm(torch.zeros(3, 64), torch.zeros(64), 1e-5)
    assert len(kept) > 2
    assert all(reference() is None for reference in kept)


def test_what_cannot_be_said_is_left_to_the_launch() -> None:
    jobs = Jobs()
    kernel = step_inputs._gather_tokens_kernel
    for stride in (1 << 40, triton.language.float32):
        jobs(kernel, (X, X, X, X, 3, stride), {"BLOCK": 256})
    jobs(kernel, (X, X, X, X, 3, 5), {"BLOCK": triton.language.float32})
    assert not jobs.kernels
