"""What train.py does to be fast: bfloat16 and compiling where they pay, as decided once for a run."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3", "--lr",
         "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu"]
LONG, SHORT = 12_000, 8000  # views of 300x300 in a run


def settled(monkeypatch, flags=(), content=None, device="cpu", processes=1, photos=LONG, side=300, fast=True):
    """(precision, compile) of a run."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": fast})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    args = train.parse_args(list(flags))
    before = content and content["flags"]
    return (train.choose_precision(args, before, device),
            train.choose_compile(args, before, device, processes, photos, side * side))


@pytest.mark.parametrize("more, expected", [
    ({}, ("bf16", True)), ({"fast": False}, ("fp32", True)), ({"photos": SHORT}, ("bf16", False)),
    ({"side": 160}, ("bf16", False)), ({"processes": 2}, ("bf16", False)),
    ({"device": "cuda:0", "fast": False}, ("bf16", False)), ({"device": "mps"}, ("fp32", False)),
    ({"flags": ["--precision", "fp32", "--no-compile"]}, ("fp32", False)),
    ({"flags": ["--compile"], "photos": 10, "processes": 2}, ("bf16", True)),
])
def test_a_new_run_takes_what_is_fast_here(monkeypatch, more, expected):
    assert settled(monkeypatch, **more) == expected


@pytest.mark.parametrize("before, expected", [
    ({"precision": "fp32", "compile": False}, ("fp32", False)),
    ({"precision": "bf16", "compile": True}, ("bf16", True))])
@pytest.mark.parametrize("fast", [True, False])
def test_a_resumed_run_keeps_its_own(monkeypatch, before, expected, fast):
    assert settled(monkeypatch, content={"flags": before}, fast=fast) == expected
    asked = settled(monkeypatch, ["--precision", "bf16", "--compile"], {"flags": before}, fast=fast)
    assert asked == ("bf16", True)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(sample, tmp_path):
    (tmp_path / "cache").mkdir()
    env = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--data", sample / "train.json", "--val",
                           "none", "--out", tmp_path / "r", "--epochs", "1", "--compile"], cwd=REPOSITORY,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot compile here (") == 1 and "Traceback" not in done.stdout + done.stderr
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["flags"]["compile"] is False


@pytest.mark.slow
def test_compiled_and_bf16_parts_are_bitwise_the_whole(sample, tmp_path):
    """On a CPU that has no bfloat16 as well: slow, but the same."""
    def run(name, *flags):
        train.main([*SMALL, "--data", str(sample / "train.json"), "--val", "none", "--out",
                    str(tmp_path / name), *flags])
        return torch.load(tmp_path / name / "last.pth", weights_only=True)

    speed = "--precision", "bf16", "--compile"
    whole = run("whole", "--epochs", "2", *speed)
    run("parts", "--epochs", "1", *speed)
    parts = run("parts", "--epochs", "2", "--resume")
    assert parts["flags"]["compile"] and parts["flags"]["precision"] == "bf16"
    assert all(torch.equal(value, parts["state_dict"][key]) for key, value in whole["state_dict"].items())


@pytest.mark.slow
def test_a_signal_while_the_first_batch_is_loaded_waits_for_no_compiler(sample, tmp_path, monkeypatch):
    load, updates = train.FaceDataset.__getitem__, []

    def told(dataset, key):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(dataset, key)

    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(train.FaceDataset, "__getitem__", told)
    monkeypatch.setattr(train.Trainer, "update", lambda *_: updates.append(1))
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--data", str(sample / "train.json"), "--val", "none", "--out",
                    str(tmp_path / "r"), "--epochs", "1", "--compile"])
    assert stop.value.code == 143 and not updates
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] == 0
