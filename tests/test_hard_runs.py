"""Tests of runs under bad conditions: unusual pictures, signals, killed processes, other runs."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import FaceDataset
from support import distributed
import evaluate
import train
from support.coco import read_annotations
from support.script import InputError
from hard_world import (ENVIRONMENT, REPOSITORY, TRAIN, UNREADABLE, UNUSUAL,
                        accepted, arguments, listing, pictured, run)
from support.pictures import load_picture

pytestmark = pytest.mark.slow

# Pictures

@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_accepted(world, tmp_path, capsys, name):
    """Every script takes them and sees them upright, also with augmentation."""
    (world / "u.json").write_text(json.dumps(pictured([name])))
    assert load_picture(f"pictures/{name}").size == UNUSUAL[name]
    accepted(capsys, "detect", f"pictures/{name}", "--model", "good.pth", "--out", tmp_path / "d")
    assert "1 photos" in accepted(capsys, "evaluate", "--data", "u.json",
                                  "--model", "good.pth", "--workers", 0)
    dataset = FaceDataset(read_annotations("u.json"), 64, 48)
    for seed in (None, *((n,) for n in range(40))):
        item = dataset[0, seed]
        assert not item.error and item.picture.shape == (3, 48, 64) and np.isfinite(item.faces).all()


@pytest.mark.parametrize("pixels, size, accepts", [(599, (30, 20), True), (299, (30, 20), False)])
def test_large_pictures_up_to_the_limit_against_bombs(tmp_path, monkeypatch, recwarn, pixels, size, accepts):
    Image.new("RGB", size).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    if accepts:
        assert load_picture(tmp_path / "x.png").size == size and not recwarn.list
    else:
        with pytest.raises(InputError, match="decompression bomb"):
            load_picture(tmp_path / "x.png")


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_pictures_are_named(world, capsys, name):
    (world / "u.json").write_text(json.dumps(pictured([name, "1x1.png"])))  # not all are missing
    out = accepted(capsys, "tools.look", "--data", "u.json", "--out", "u.png", "--augment")
    assert UNREADABLE[name] in out


def test_training_goes_on_past_all_unreadable_pictures(world, tmp_path, capsys, refused):
    flags = [*TRAIN, "--data", "train.json", "bad.json", "--epochs", 1, "--out"]
    out = accepted(capsys, "train", *flags, tmp_path / "r", "--max-unreadable", len(UNREADABLE))
    named = [line for line in out.splitlines() if line.startswith("unreadable: ")]
    assert (len(named) == len(UNREADABLE)
            and all(any(why in line for line in named) for why in UNREADABLE.values()))
    line = refused(train.main, *flags, tmp_path / "s", "--max-unreadable", len(UNREADABLE) - 1)
    assert f"{len(UNREADABLE)} photos could not be used (--max-unreadable" in line
    assert torch.load(tmp_path / "s/last.pth", weights_only=True)["epoch"] == 0


def test_evaluation_and_detection_with_unreadable_pictures(world, tmp_path, capsys, refused):
    flags = ["--data", "mixed.json", "--model", "good.pth", "--workers", 0]
    (world / "mixed.json").write_text(json.dumps(pictured([*UNREADABLE, *UNUSUAL])))
    line = refused(evaluate.main, *flags, "--out", tmp_path / "r.json")
    assert (f"{len(UNREADABLE)} photos could not be used" in line
            and "--skip-unreadable" in line and not (tmp_path / "r.json").exists())
    assert f"{len(UNUSUAL)} photos, {len(UNUSUAL)} faces" in accepted(
        capsys, "evaluate", *flags, "--skip-unreadable")
    names = sorted(p.name for p in (world / "pictures").iterdir() if not p.is_dir())
    line = refused(importlib.import_module("detect").main, "pictures",
                   "--model", "good.pth", "--out", tmp_path / "d")
    # two of them are readable; only their annotated size is wrong
    assert f"{len(names) - len(UNUSUAL) - 2} of {len(names)} failed" in line
    assert len(json.loads((tmp_path / "d/detections.json").read_text())) == len(UNUSUAL) + 2


# Runs

ONE = ["--data", "one.json", "--epochs", 1]


@pytest.mark.parametrize("flags", [
    ["--epochs", 0], ["--batch-size", 50], ["--workers", 2], ["--val", "one.json"],
    ["--val", "none"], ["--repeat", 3, "--no-augment"]], ids=str)
def test_one_photo(world, tmp_path, capsys, flags):
    assert "finished" in accepted(capsys, "train", *TRAIN, *ONE, "--out", tmp_path / "r", *flags)


def test_fewer_photos_than_processes(world, tmp_path):
    """One photo is unreadable: the first process names it, even if another one loaded it."""
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
               REPOSITORY / "train.py", *TRAIN, "--data", "pair.json",
               "--val", "one.json", "--epochs", 1, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished 1 epochs" in done.stdout and done.stdout.count("unreadable: pictures/zero.jpg") == 1
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] == 1


INTERRUPTED = {  # script: the function in which the signal arrives, arguments
    "tools.fit_anchors": ("fit", "--data good.json -k 1 --min-face 0"),
    "tools.benchmark": ("interleaved", "latency good.pth"),
    "tools.look": ("contact_sheet", "--data good.json"),
    "detect": ("search", "e/a.jpg --model good.pth --out new"),
    "evaluate": ("score_faces", "--data good.json --predictions r-good.json"),
    "export": ("build", "--model good.pth --out new"),
    "flops": ("count", ""),
    "tools.sample": ("photo", "new"),
    "train": ("prepare", "--data good.json"),
    "wider_to_coco": ("read_sizes", "wider_val_bbx_gt.txt val new.json"),
}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", INTERRUPTED)
def test_interrupted(world, monkeypatch, capsys, script, number, code):
    """A signal ends every script. For the training loop, see below and test_train.py."""
    module, (function, words) = importlib.import_module(script), INTERRUPTED[script]
    # train.py, run earlier in this process, has replaced the handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(module, function, lambda *_, **__: os.kill(os.getpid(), number))
    before = listing(world)
    with pytest.raises(SystemExit) as stop:
        module.main(arguments(script, words))
    after = listing(world)
    assert stop.value.code == code and "Traceback" not in capsys.readouterr().err
    assert {path for path in after.keys() - before.keys() if path.is_file()} == set()
    shutil.rmtree("new", ignore_errors=True)


def test_a_signal_to_the_group_of_a_run_saves(world, tmp_path):
    """As a container's end, the loading processes get it too. Nothing else would save in this long epoch."""
    words = [*TRAIN, "--workers", "2", "--data", "train.json", "--val", "none", "--epochs", "1",
             "--repeat", "2000", "--save-every", "100000", "--out", tmp_path / "r"]
    process = subprocess.Popen([sys.executable, "-u", REPOSITORY / "train.py", *words], env=ENVIRONMENT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith("no validation"):  # the last line before the loop
            break
    time.sleep(4)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in error, error
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] > 1


def deadly(self, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_in_training(world, tmp_path, capsys, refused, monkeypatch):
    flags = [*TRAIN, "--data", "train.json", "--out", tmp_path / "r", "--workers", 1]
    accepted(capsys, "train", *flags, "--epochs", 1)
    before = (tmp_path / "r/last.pth").read_bytes()
    monkeypatch.setattr(FaceDataset, "__getitem__", deadly)  # the worker is forked and inherits it
    assert "a loading process was killed" in refused(train.main, *flags, "--epochs", 2, "--resume")
    assert (tmp_path / "r/last.pth").read_bytes() == before


def test_two_runs_in_one_folder(world, tmp_path, capsys, refused):
    """A second run is refused; a killed run leaves no lock behind."""
    code = ("import sys, pathlib; from support.monitor import claim\n"
            "lock = claim(pathlib.Path(sys.argv[1])); "
            "print(flush=True); sys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "r"], env=ENVIRONMENT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    flags = [*TRAIN, *ONE, "--out", tmp_path / "r"]
    assert "another run is writing there" in refused(train.main, *flags)
    assert os.listdir(tmp_path / "r") == [".lock"]
    first.kill()
    first.wait()
    assert "finished" in accepted(capsys, "train", *flags)


def test_a_log_of_something_else_is_not_continued(world, tmp_path, capsys, refused):
    flags = [*TRAIN, *ONE, "--out", tmp_path / "r"]
    accepted(capsys, "train", *flags)
    for content in ("5\n", "{", "\xff"):
        (tmp_path / "r/log.jsonl").write_text(content, encoding="latin-1")
        assert "log.jsonl: not a training log" in refused(train.main, *flags, "--resume")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("support.distributed.choose_device", lambda name: "cuda")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="4 processes, but GPUs: 2; lower --nproc_per_node"):
        distributed.join_processes()


def test_a_port_in_use(world, refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        line = refused(train.main, *TRAIN, *ONE, "--out", "new")
    assert "the processes cannot meet" in line and port in line and not Path("new").exists()
