"""How much memory a model may take, asked before anything is loaded, in a process that has no torch."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import psutil

from aphrodite.config import EngineConfig
from aphrodite.loading.repository import Room

logger = logging.getLogger(__name__)

_HOST_SHARE = 0.85  # of what is free: the rest is for the KV cache and everything else on the machine
# Device files of NVIDIA's and AMD's drivers; under Windows (WSL 2) there is NVIDIA's library instead.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/usr/lib/wsl/lib/libcuda.so.1")
_ASK = """\
import torch
from aphrodite import platforms
if platforms.unusable_reason() is None:
    print(platforms.memory(torch.device("cuda", torch.cuda.current_device())).free)
"""
_SECONDS = 60.0


def model_room(config: EngineConfig) -> Room:
    """Memory for weights where the model will run: free memory of the GPU, else of the host."""
    if config.device != "cpu" and config.executor in ("auto", "triton"):
        free = _free_on_gpu()
        if free is not None:
            return Room(int(free * config.gpu_memory_utilization + config.cpu_offload_gb * (1 << 30)), "GPU memory")
    return Room(int(psutil.virtual_memory().available * _HOST_SHARE), "memory")


def has_driver() -> bool:
    """Whether this machine has the driver of a GPU; not told elsewhere than on Linux."""
    return any(Path(driver).exists() for driver in _DRIVERS)


def _free_on_gpu() -> int | None:
    """Bytes, None without a GPU that can be used. Asked in a process of its own, for torch would stay in this one with
    a context on the GPU."""
    if sys.platform == "linux" and not has_driver():
        return None
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the GPU's free memory could not be asked for (%s): choosing by the host's", error)
        return None
    return int(asked.stdout) if asked.stdout.strip() else None
