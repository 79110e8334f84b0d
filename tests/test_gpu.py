"""Tests that need a GPU (python -m pytest -m gpu): training, evaluation and export agree with the CPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detector
import evaluate
import train
from data import collate
from detector import TorchDetector, load_detector
from model import load_model
from support.coco import read_annotations

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3",
         "--lr", "0.01", "--min-face", "0", "--workers", "1", "--clip", "10"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")]


def run(out, sample, *flags):
    words = [*FLAGS, "--data", sample / "train.json", "--val", sample / "val.json", "--out", out, *flags]
    train.main([str(word) for word in words])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "epoch" in line]


def torchrun(processes, out, sample, *flags):
    words = [*FLAGS, "--data", sample / "train.json", "--val", sample / "val.json", "--out", out, *flags]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
         "train.py", *map(str, words)], cwd=ROOT, env=os.environ, capture_output=True, text=True)


# Frozen, for batch normalisation over 5 photos of 2 x 2 cells turns rounding into percents in a few steps.
STEADY = ["--precision", "fp32", "--freeze-bn"]


@pytest.fixture
def whole_floats(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_training_follows_the_cpu(sample, tmp_path, whole_floats):
    losses = {device: run(tmp_path / device, sample, "--device", device, *STEADY, "--epochs", 2)
              for device in ("cpu", "cuda")}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.005)


@pytest.mark.parametrize("words", [["--matching", "aligned"], ["--class-loss", "quality-focal"],
                                   ["--box-loss", "eiou"]])
def test_newer_losses_follow_the_cpu(sample, tmp_path, whole_floats, words):
    losses = {device: run(tmp_path / device, sample, "--device", device, *STEADY, "--epochs", 1, *words)
              for device in ("cpu", "cuda")}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.005)


NEWER = ["--matching", "aligned", "--class-loss", "quality-focal", "--box-loss", "eiou", "--distill", "0.3",
         "0.4", "--load-from"]


@pytest.mark.parametrize("words", [[], NEWER])
def test_the_graph_computes_the_eager_gradients(sample, whole_floats, words):
    """Also for a second batch, and batch norm's statistics are those of one step each."""
    dataset = train.FaceDataset(read_annotations(sample / "train.json"), 300, 300)
    batches = [collate([dataset[n, (0, n)] for n in range(first, first + 5)]).pin_memory()
               for first in (0, 5)]
    found = {}
    for graph in (False, True):
        torch.manual_seed(0)
        args = train.parse_args(["--batch-size", "5", "--precision", "fp32", "--workers", "0", *words])
        trainer = train.Trainer(args, load_model(detector.MODEL), dataset, device="cuda")
        assert trainer.graphs is not None
        trainer.graphs = trainer.graphs if graph else None
        trainer.start_epoch()
        losses = [trainer.update(batch, 0).clone() for batch in batches]
        gradients = [parameter.grad for parameter in trainer.raw_model.parameters()]
        found[graph] = [*losses, *gradients, *trainer.raw_model.buffers()]
    for one, two in zip(found[False], found[True]):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_bf16_is_the_default_and_near_fp32(sample, tmp_path):
    half = run(tmp_path / "half", sample, "--epochs", 1)
    whole = run(tmp_path / "whole", sample, "--epochs", 1, "--precision", "fp32")
    assert torch.load(tmp_path / "half/last.pth", weights_only=True)["flags"]["precision"] == "bf16"
    assert half == pytest.approx(whole, rel=0.1)


@pytest.mark.slow
def test_compiled_training_follows_the_eager_one(sample, tmp_path):
    eager = run(tmp_path / "eager", sample, "--epochs", 1, "--precision", "fp32")
    compiled = run(tmp_path / "compiled", sample, "--epochs", 1, "--precision", "fp32", "--compile")
    assert compiled == pytest.approx(eager, rel=0.02)


def test_a_run_is_resumed(sample, tmp_path):
    whole = run(tmp_path / "whole", sample, "--epochs", 2, *STEADY, "--ema", 0.9)
    run(tmp_path / "parts", sample, "--epochs", 1, *STEADY, "--ema", 0.9)
    parts = run(tmp_path / "parts", sample, "--epochs", 2, *STEADY, "--ema", 0.9, "--resume")
    assert parts == pytest.approx(whole, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_and_batch_norm_over_all_of_them(sample, tmp_path, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    done = torchrun(processes, tmp_path / "r", sample, "--epochs", 1, "--sync-bn")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished 1 epochs" in done.stdout and load_model(tmp_path / "r/best.pth")


@pytest.mark.slow
def test_more_processes_than_gpus_are_refused(sample, tmp_path):
    done = torchrun(torch.cuda.device_count() + 1, tmp_path / "r", sample, "--epochs", 1)
    assert done.returncode and "lower --nproc_per_node" in done.stderr


def test_evaluation_finds_the_same_faces(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch has it; evaluate.py has not
    scores = {}
    for device in ("cpu", "cuda"):
        evaluate.main(["--data", str(sample / "val.json"), "--device", device, "--workers", "0", "--json",
                       str(tmp_path / "scores.json")])
        scores[device] = json.loads((tmp_path / "scores.json").read_text())["coco"]
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=5e-3)


@pytest.mark.slow
def test_what_was_trained_there_is_exported(sample, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the packages of export.py")
    import export
    run(tmp_path / "r", sample, "--epochs", 1)
    export.main(["--model", str(tmp_path / "r/last.pth"), "--out", str(tmp_path / "e")])
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    (ours,) = TorchDetector(load_model(tmp_path / "r/last.pth"), device="cuda")(images)
    (theirs,) = load_detector(tmp_path / "e/model.onnx")(images)
    assert len(ours) == pytest.approx(len(theirs), abs=2)
