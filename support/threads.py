"""How many cores this process may use, and how its threads wait: set before torch and numpy are imported."""

import argparse
import math
import os
import sys
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """The cores of this process: its affinity or its container's quota, rounded up, shared under torchrun."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cores = math.ceil(min(cores, cpu_quota()))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cpu_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """How many CPUs' time Linux's control groups allow this process; infinity if they do not say."""
    groups = []
    with suppress(OSError):  # not on Linux
        for line in Path(own).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
                folder = Path(root, controllers, path.strip("/"))
                groups += [folder, *folder.parents]
    return min(map(read_quota, groups), default=math.inf)


def read_quota(group: Path) -> float:
    """The quota of one control group: version 2's cpu.max, or version 1's two files."""
    files = [group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    with suppress(OSError, ValueError):  # no such group, or "max"
        quota, period = " ".join(file.read_text() for file in files if file.exists()).split()
        if float(quota) > 0:
            return float(quota) / float(period)
    return math.inf


def settle() -> None:
    """Let OpenMP use these cores, and its threads wait without burning them. What the user has set stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
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
