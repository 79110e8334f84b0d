"""support.threads: what affinity, control groups and torchrun leave to a process."""
import math
import os
import subprocess
import sys

import pytest

import detect
from support.threads import chosen_threads, cpu_quota, settle, usable_cores


@pytest.mark.parametrize("files, own, quota", [
    ({"cpu.max": "150000 100000"}, "0::/", 1.5),
    ({"cpu.max": "max 100000"}, "0::/", math.inf),
    ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, "0::/a/b", 2),  # the narrowest counts
    ({"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
     "3:cpu,cpuacct:/a\n2:pids:/x", 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", math.inf),
    ({}, "0::/gone", math.inf),
])
def test_quotas_of_both_versions(tmp_path, files, own, quota):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert cpu_quota(str(tmp_path / "groups"), str(tmp_path / "own")) == quota
    assert cpu_quota("/absent", str(tmp_path / "absent")) == math.inf


@pytest.mark.parametrize("affinity, quota, processes, cores", [
    (8, math.inf, 1, 8), (8, 1.5, 1, 2), (8, 0.2, 1, 1), (8, math.inf, 4, 2), (2, math.inf, 4, 1)])
def test_the_narrowest_limit_counts(monkeypatch, affinity, quota, processes, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(affinity), raising=False)
    monkeypatch.setattr("support.threads.cpu_quota", lambda: quota)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert usable_cores() == cores


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    settle()
    assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    settle()
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.slow
def test_the_flag_reaches_pytorch_and_exported_networks(tmp_path, refused):
    """Also where torch is imported after the flag is read, as evaluate.py does."""
    code = ("import evaluate; evaluate.parse_args(['--threads', '1', '--data', 'x.json'])\n"
            "from support.runtimes import open_network; import detector, torch\n"
            "path = detector.WEIGHTS / 'face_ssd300.onnx'\n"
            "options = open_network(path).session.get_session_options()\n"
            "print(torch.get_num_threads(), options.intra_op_num_threads)\n"
            "from support.threads import use_threads; use_threads('2'); print(torch.get_num_threads())")
    own = os.environ | {"OMP_NUM_THREADS": "2"}
    assert subprocess.check_output([sys.executable, "-c", code], env=own, text=True) == "1 1\n2\n"
    assert "at least 1 thread" in refused(detect.main, "x.jpg", "--threads", "0")


@pytest.mark.parametrize("words, threads", [("3", 3), ("2,1", 2), ("", 5), ("many", 5)])
def test_without_the_flag_omp_num_threads_counts(monkeypatch, words, threads):
    monkeypatch.setattr("support.threads.usable_cores", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", words)
    assert chosen_threads() == threads
