"""How many of the machine's cores this process may use. A container sees all of its host's."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# Microseconds of processor time in each period: Linux' control groups, version 2 and version 1.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OLD_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_OLD_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def usable_cores() -> int:
    """Logical cores that the process may run on, and no more than its container's share of time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, quota))


def computing_threads() -> int:
    """Threads that compute best: one a physical core, where so many may be used."""
    return min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores())


def _quota() -> int | None:
    """Cores whose time the process may take, rounded up; None for all."""
    try:
        if _QUOTA.exists():
            quota, period = _QUOTA.read_text().split()
        else:
            quota, period = _OLD_QUOTA.read_text(), _OLD_PERIOD.read_text()
        return None if quota == "max" or int(quota) <= 0 else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None  # another system, or none of ours to read
