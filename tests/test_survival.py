"""Tests of training runs that are killed, restarted, or run out of disk space.

    python -m pytest tests/test_survival.py                 # a few kills
    KILLS=30 python -m pytest tests/test_survival.py -s     # as many as you like
"""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch

import train
from model import load_model

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 2))
FLAGS = ["--size", "64", "--width", "0.25", "--batch-size", "3", "--repeat", "1", "--warmup", "3", "--lr",
         "0.01", "--min-face", "0", "--workers", "1", "--device", "cpu", "--save-every", "2", "--ema", "0.9"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def flags(sample, out, *more):
    return [*FLAGS, "--data", str(sample / "train.json"), "--out", str(out), *map(str, more)]


def command(sample, out, *more):
    return [sys.executable, "train.py", *flags(sample, out, *more)]


def test_killed_at_random_moments(sample, tmp_path):
    """After SIGKILL at any moment, a run resumes and ends with the same bits as an undisturbed run."""
    epochs, kills, rng = max(6, 2 * KILLS), 0, random.Random(0)
    train.main(flags(sample, tmp_path / "whole", "--epochs", epochs))
    out = tmp_path / "killed"
    while kills < KILLS:
        resume = ["--resume"] if (out / "last.pth").exists() else []
        process = subprocess.Popen(command(sample, out, "--epochs", epochs, *resume),
                                   env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        before = (out / "last.pth").stat().st_mtime_ns if resume else 0
        while process.poll() is None and not ((out / "last.pth").exists()
                                              and (out / "last.pth").stat().st_mtime_ns > before):
            time.sleep(0.01)  # each attempt must get a little further, or this never ends
        time.sleep(rng.random() * 0.3)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        load_model(out / "last.pth")
        assert process.returncode in (0, -9)
        if process.returncode == 0:
            break
    train.main(flags(sample, out, "--epochs", epochs, "--resume"))
    print(f"{kills} kills survived")
    whole, killed = (torch.load(tmp_path / name / "last.pth", weights_only=True)
                     for name in ("whole", "killed"))
    assert kills > 0 and killed["step"] == whole["step"]
    for part in ("state_dict", "ema"):
        assert all(torch.equal(whole[part][key], killed[part][key]) for key in whole[part])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == list(range(1, epochs + 1))


def test_torchrun_restarts_a_killed_worker(sample, tmp_path):
    """A worker kills itself once. torchrun restarts all, and the run continues from its checkpoint."""
    script = tmp_path / "once.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {os.getcwd()!r})
import train
update = train.Trainer.update
def deadly(self, batch, rate):
    if self.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch, rate)
train.Trainer.update = deadly
train.main(sys.argv[1:])
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", "--max-restarts", "3", script,
                           *flags(sample, tmp_path / "r", "--epochs", 4)],
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from epoch" in done.stdout and "finished 4 epochs" in done.stdout
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] == 8


def test_a_full_disk_keeps_the_old_checkpoint(sample, tmp_path):
    """A limit on the file size makes the write fail as on a full disk, and needs no root."""
    out = tmp_path / "r"
    train.main(flags(sample, out, "--epochs", 1))
    before = (out / "last.pth").read_bytes()
    # in blocks of 1 KiB: half the size of the checkpoint
    limited = ["bash", "-c", f"ulimit -f {len(before) // 2048}; trap '' XFSZ; exec \"$@\"", "limited"]
    done = subprocess.run([*limited, *command(sample, out, "--epochs", 2, "--resume")],
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "last.pth: File too large; not written, what was there is kept" in done.stderr.splitlines()[-1]
    assert ((out / "last.pth").read_bytes() == before
            and [name for name in os.listdir(out) if name.startswith(".")] == [".lock"])
