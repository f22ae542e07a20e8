"""Compile the kernels that a model will launch in parallel processes, before it launches them.

Triton compiles where it launches, one kernel after the other, a second each with the stub in C that its launcher is; a
model's first start needs some sixty. So the usual steps are gone through once with `launch.recording`, which makes no
launches, and what they would have launched is compiled by worker processes that fill the cache in Triton's directory.
A file there says of each that it has been compiled, so that later starts go without the workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import psutil
import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from aphrodite.cores import usable_cores
from aphrodite.kernels.triton.launch import DirectKernel

logger = logging.getLogger(__name__)

MOST_WORKERS = 16
WORKER_BYTES = 1 << 30  # of host memory, generously
FEWEST_JOBS = 4  # that are worth the three seconds in which workers import torch
SECONDS = 300  # after which what is left is compiled where it is launched
Progress = Callable[[int, int], None]


class Jobs:
    """Different launches, each as what a worker has to know of it; a `Recorder`."""

    def __init__(self) -> None:
        self.kernels: dict[str, DirectKernel] = {}

    def __call__(self, kernel: DirectKernel, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        job = encode(kernel, arguments, options)
        if job is not None:
            self.kernels[job] = kernel


def compile_ahead(jobs: Jobs, progress: Progress) -> None:
    """Compile all that was recorded, unless that has been done on this machine before.

    What goes wrong here goes wrong again at the launch, where it is reported, so nothing is raised.

    Args:
        progress: told of kernels done and of all.
    """
    markers = _markers(jobs)
    missing = [job for job, marker in markers.items() if not marker.exists()]
    workers = min(len(missing), MOST_WORKERS, usable_cores(), psutil.virtual_memory().available // WORKER_BYTES)
    if len(missing) < FEWEST_JOBS or workers < 2:
        return
    began = time.perf_counter()
    longest_first = sorted(missing, key=len, reverse=True)  # as far as many arguments are a sign of much code
    failures = _Pool(longest_first, workers).run(progress)
    for failure in failures:
        logger.info("compiled where it is launched: %s", failure)
    logger.info("compiled %d kernels by %d processes in %.1f s", len(missing), workers, time.perf_counter() - began)
    for job in missing:  # after failures, too: they would fail again
        markers[job].parent.mkdir(parents=True, exist_ok=True)
        markers[job].touch()


def encode(kernel: DirectKernel, arguments: Sequence[Any], options: Mapping[str, Any]) -> str | None:
    """What the worker has to know of a launch, as JSON on one line; None where that cannot be said."""
    function = kernel.jitted.fn
    try:
        encoded = [
            _encode_argument(argument, parameter)
            for argument, parameter in zip(arguments, kernel.jitted.params, strict=False)
        ]
        return json.dumps([function.__module__, function.__name__, encoded, dict(options)], sort_keys=True)
    except TypeError as error:
        logger.debug("%s is compiled where it is launched: %s", function.__name__, error)
        return None


def _encode_argument(argument: Any, parameter: Any) -> list[Any]:
    """Types and what variants differ in: integers are 1, multiples of 16 or neither, pointers aligned or not."""
    if parameter.is_constexpr:
        return ["value", argument]
    if isinstance(argument, torch.Tensor):
        return ["pointer", _name(argument.dtype), argument.data_ptr() % 16]
    if isinstance(argument, TensorDescriptor):
        return ["tiles", _name(argument.base.dtype), list(argument.block_shape)]
    if hasattr(argument, "block_shape"):  # Gluon's, in the layout that it takes by itself
        return ["gluon tiles", _name(argument.base.dtype), list(argument.block_shape)]
    if type(argument) is int and -(1 << 31) <= argument < 1 << 31:
        alike = parameter.do_not_specialize or (argument != 1 and argument % 16)
        return ["value", 3 if alike else 1 if argument == 1 else 16]
    if type(argument) is float:
        return ["value", 0.5]
    if argument is None or type(argument) is bool:
        return ["value", argument]
    raise TypeError(f"an argument is {type(argument).__name__}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _markers(jobs: Jobs) -> dict[str, Path]:
    """The file that says of each job that it is in the cache, for its source, this card and these versions."""
    place = f"{triton.__version__} {platform.python_version()} {driver.active.get_current_target()}"
    folder = Path(triton.knobs.cache.dir) / "aphrodite"
    markers = {}
    for job, kernel in jobs.kernels.items():
        digest = hashlib.sha256("\n".join((place, kernel.jitted.cache_key, job)).encode()).hexdigest()
        markers[job] = folder / f"{digest[:32]}.compiled"
    return markers


class _Pool:
    """Worker processes, each served by a thread that hands it one job after the other."""

    def __init__(self, jobs: list[str], workers: int) -> None:
        self._jobs: SimpleQueue[str] = SimpleQueue()
        for job in jobs:
            self._jobs.put(job)
        self._num_jobs = len(jobs)
        self._results: SimpleQueue[str | None] = SimpleQueue()  # why a job failed, None where it did not
        target = driver.active.get_current_target()
        self._target = json.dumps([target.backend, target.arch, target.warp_size])
        self._processes = [_start_worker() for _ in range(workers)]

    def run(self, progress: Progress) -> list[str]:
        """Why jobs failed; jobs that took too long count as failed."""
        threads = [
            threading.Thread(target=self._serve, args=(process,), name="compile-ahead", daemon=True)
            for process in self._processes
        ]
        for thread in threads:
            thread.start()
        failures: list[str] = []
        deadline = time.monotonic() + SECONDS
        try:
            for done in range(self._num_jobs):
                progress(done, self._num_jobs)
                result = self._results.get(timeout=max(deadline - time.monotonic(), 0.01))
                if result is not None:
                    failures.append(result)
        except Empty:
            failures.append(f"kernels were not compiled within {SECONDS} s")
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        return failures

    def _serve(self, process: subprocess.Popen[str]) -> None:
        job = ""
        try:
            to_worker, from_worker = _pipes(process)
            to_worker.write(self._target + "\n")
            while True:
                job = self._jobs.get_nowait()
                to_worker.write(job + "\n")
                to_worker.flush()
                answer = from_worker.readline()
                if not answer:
                    raise OSError("the worker ended")
                self._results.put(json.loads(answer))
                job = ""
        except Empty:
            return
        except (OSError, ValueError) as error:  # the others go on with what is left
            if job:
                self._results.put(f"{job[:200]}: {error}")


def _start_worker() -> subprocess.Popen[str]:
    """A Python process that sees no GPU and imports what this one does."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", "aphrodite.kernels.triton.compile_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **hidden, "PYTHONPATH": paths},
        text=True,
    )


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise OSError("the worker has no pipes")
    return process.stdin, process.stdout
