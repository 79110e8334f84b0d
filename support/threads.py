"""How many cores this process may use, and how its threads wait: set before torch and numpy are imported."""

import argparse
import math
import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """The cores of this process: its affinity or its container's quota, rounded up, shared under torchrun."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores = math.ceil(min(cores, cpu_quota()))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cpu_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """How many CPUs' time Linux's control groups allow this process; infinity if they do not say."""
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            folder = Path(root, controllers, path.strip("/"))
            quotas += [read_quota(group) for group in (folder, *folder.parents)]
    return min(quotas)


def read_quota(group: Path) -> float:
    """The quota of one control group: version 2's cpu.max, or version 1's two files."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf


def settle() -> None:
    """Let OpenMP use these cores, and its threads wait without burning them. What the user has set stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # some 50 us: as long as one layer waits for the last


def use_threads(text: str) -> int:
    """`--threads N`, for argparse: from now on PyTorch, exported networks and loaders use N threads."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 thread expected")
    os.environ["OMP_NUM_THREADS"] = text
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(number)
    return number


def chosen_threads() -> int:
    """What OMP_NUM_THREADS says, which the user, `--threads` or settle() has set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdecimal() and int(first) else usable_cores()
