"""How a run ends: early by --patience, by a signal, in torchrun's summary."""

import itertools
import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from support import monitor
import train
from hard_world import REPOSITORY

SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3", "--lr",
         "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu"]


def run(sample, out, *flags):
    train.main([*SMALL, "--data", str(sample / "train.json"), "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pth", weights_only=True)


@pytest.fixture
def scored(sample, monkeypatch):
    """Let the epochs of runs have these AP50, in turn; returns the flags to validate on photos."""
    def make(*scores):
        scores = iter(scores)
        monkeypatch.setattr(train, "score_faces", lambda *_: {
            "coco": {"AP": 0.1, "AP50": next(scores)}, "AP50_by_size": {}})
        return ["--val", sample / "val.json"]
    return make


@pytest.mark.slow
def test_patience_ends_a_run_however_often_it_is_resumed(sample, tmp_path, scored, capsys, monkeypatch):
    """The best AP50 comes in epoch 2, and again, which is no better, in epoch 3."""
    monkeypatch.setattr(monitor, "REDRAWN", 1e9)  # curves are drawn at the end only
    flags = [*scored(0.1, 0.3, 0.3, 0.2), "--patience", 2]
    whole = run(sample, tmp_path / "whole", "--epochs", 9, *flags)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("finished 4 epochs: ")
    assert line.endswith("best.pth AP50 0.3000; stopped early: 2 epochs without a better AP50 (--patience 2)")
    assert torch.load(tmp_path / "whole/best.pth", weights_only=True)["epoch"] == 2
    assert (tmp_path / "whole/curves.png").exists()
    flags = [*scored(0.1, 0.3, 0.3, 0.2), "--patience", 2]
    run(sample, tmp_path / "r", "--epochs", 3, *flags)
    assert "stopped early" not in capsys.readouterr().out
    parts = run(sample, tmp_path / "r", "--epochs", 9, *flags, "--resume")
    assert parts["epoch"] == whole["epoch"] == 4 and parts["waited"] == 2
    assert run(sample, tmp_path / "r", "--epochs", 9, *flags, "--resume")["epoch"] == 4
    assert capsys.readouterr().out.count("stopped early") == 2
    flags = [*scored(0.1, 0.4, 0.2, 0.2, 0.2), "--patience", 3]
    assert run(sample, tmp_path / "r", "--epochs", 9, *flags, "--resume")["epoch"] == 5  # one more was due
    assert run(sample, tmp_path / "r", "--epochs", 6, *flags[:2], "--resume")["waited"] == 0


def test_patience_needs_photos_to_validate_on(sample, tmp_path, refused):
    line = refused(train.main, *SMALL, "--data", sample / "train.json", "--out", tmp_path / "r", "--val",
                   "none", "--patience", 3)
    assert "--patience waits for a better AP50: name a set to validate on with --val" in line
    assert not (tmp_path / "r").exists()


def test_the_default_warm_up_is_four_epochs_of_a_small_set(sample, tmp_path):
    words = [word for word in SMALL if word not in ("--warmup", "3")]
    train.main([*words, "--data", str(sample / "train.json"), "--out", str(tmp_path / "r"), "--epochs", "0"])
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["flags"]["warmup"] == 4 * 3


@pytest.mark.slow
def test_without_a_terminal_there_are_lines_within_an_epoch(sample, tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 60).__next__  # each look at it is a minute later
    monkeypatch.setattr(monitor, "time", Namespace(perf_counter=clock))
    run(sample, tmp_path / "r", "--epochs", 1, "--val", "none")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1: ")]
    assert lines[0].startswith("epoch 1/1: 5 photos, 33%, loss ")
    assert [line[-10:] for line in lines] == ["2 min left", "1 min left", "0 min left", "0 min left"]


def test_curves_that_cannot_be_drawn_are_said_once_and_end_nothing(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "REDRAWN", 0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as without matplotlib
    assert run(sample, tmp_path / "r", "--epochs", 3, "--val", "none")["epoch"] == 3
    assert capsys.readouterr().out.count("is not drawn, the training goes on") == 1


def test_threads(sample, tmp_path):
    before = torch.get_num_threads()
    run(sample, tmp_path / "r", "--epochs", 0, "--threads", 2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_last_batch_of_one_photo_and_one_cell_is_refused(sample, tmp_path, refused):
    words = ["--size", 16, "--batch-size", 11, "--repeat", 1, "--load-from", "--val", "none", "--workers", 0,
             "--device", "cpu", "--data", sample / "train.json", "--out", tmp_path / "r"]
    line = refused(train.main, *words)
    assert "one photo, whose feature map is one cell" in line and not (tmp_path / "r/last.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_and_resume_go_on(sample, tmp_path, number, code):
    out = tmp_path / "a run"
    slow = [sys.executable, "train.py", *SMALL, "--data", sample / "train.json", "--out", out, "--val",
            "none", "--no-compile", "--epochs", "100000"]
    process = subprocess.Popen(slow, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].splitlines()
    saved = torch.load(out / "last.pth", weights_only=True)
    assert process.returncode == code and saved["step"] > 3
    assert error[-2] == f"stopped; the run is saved in {out}/last.pth; to go on, the same with --resume:"
    done = subprocess.run(f"{error[-1]} --epochs {saved['epoch'] + 1}", shell=True, text=True,
                          capture_output=True)
    assert f"iteration {saved['step'] + 1}" in done.stdout
    assert done.returncode == 0 and f"finished {saved['epoch'] + 1} epochs" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_reader_that_a_signal_ends_too_changes_no_exit_code(sample, tmp_path):
    """As Ctrl-C does it to `train.py 2>&1 | tee`."""
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--data", sample / "train.json", "--out",
                                tmp_path / "r", "--val", "none", "--epochs", "1", "--repeat", "100000"],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("no validation"):  # the last line before the loop
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and (tmp_path / "r/last.pth").exists()


@pytest.mark.slow
def test_a_run_that_begins_from_a_checkpoint_elsewhere_goes_on_in_its_own_folder(sample, tmp_path,
                                                                                 monkeypatch):
    """A signal during the first step with --compile ends it at once. There is a checkpoint already."""
    before = run(sample, tmp_path / "old", "--epochs", 1, "--val", "none")
    monkeypatch.setattr(train.Trainer, "update", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run(sample, tmp_path / "new", "--epochs", 2, "--val", "none", "--resume", tmp_path / "old/last.pth",
            "--compile")
    assert stop.value.code == 143
    after = torch.load(tmp_path / "new/last.pth", weights_only=True)
    assert after["step"] == before["step"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_torchruns_summary_says_what_went_wrong(tmp_path, script):
    (tmp_path / "cut.json").write_text("{")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           "2", REPOSITORY / script, "--data", "cut.json"], cwd=tmp_path, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    line = done.stderr[done.stderr.index("Root Cause"):].split("traceback : ")[1].splitlines()[0]
    assert done.returncode and line.startswith("cut.json: not JSON"), done.stderr
    assert "To enable traceback" not in done.stderr
    assert done.stderr.count(f"{script}: cut.json: not JSON") == 1
