"""What scripts read and write where nobody looked: failing drawings, odd names, hostile exports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import detect
import evaluate
import export
from detector import load_detector
from hard_world import ENVIRONMENT, REPOSITORY, run
from support.monitor import claim
from support.script import PATIENCE, InputError

STRICT = ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"}


def photo(path, size=(64, 48)):
    Image.new("RGB", size, (90, 80, 70)).save(path)
    return path


# Names

@pytest.mark.slow
@pytest.mark.parametrize("script", ["detect", "tools.look", "wider_to_coco"])
def test_names_that_are_no_text_or_move_the_cursor_are_shown_safely(tmp_path, model_file, script):
    bad = [b"caf\xe9.jpg", b"\x1b[2Jx.jpg"]
    for name in bad:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"no picture")
    names = [os.fsdecode(name) for name in bad]
    (tmp_path / "x.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)], "annotations": [],
        "categories": [{"id": 1, "name": "face"}]}))
    (tmp_path / "x.txt").write_bytes(bad[1] + b"\n0\n")
    words = {"detect": [*names, "--model", model_file, "--out", "out"],
             "tools.look": ["--data", "x.json"], "wider_to_coco": ["x.txt", ".", "y.json"]}[script]
    done = subprocess.run([sys.executable, "-m", script, *words], cwd=tmp_path, env=STRICT,
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert (
        done.returncode == 2 and b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr)
    assert b"\x1b[2J" not in done.stdout + done.stderr


# Files that were there before

@pytest.mark.slow
def test_a_new_onnx_removes_the_ir_of_an_older_export(tmp_path, model_file):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("of an earlier export")
    export.main(["--model", str(model_file), "--out", str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == ["model.onnx"]


@pytest.mark.slow
def test_what_a_killed_save_left_is_swept_under_the_lock_alone(tmp_path):
    left = [".last.123.pth", ".best.7.pth", ".log.99.jsonl", ".curves.1.png"]
    for name in [*left, ".last.pth", "last.pth", ".mine.5.pth"]:
        (tmp_path / name).write_bytes(b"")
    lock = claim(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".last.pth", ".lock", ".mine.5.pth", "last.pth"]
    (tmp_path / left[0]).write_bytes(b"")
    code = "import sys, pathlib; from support.monitor import claim; claim(pathlib.Path(sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=ENVIRONMENT, capture_output=True, text=True)
    assert "another run is writing there" in other.stderr and (tmp_path / left[0]).exists()
    lock.close()


# Signals and processes

@pytest.mark.slow
def test_a_signal_to_the_group_of_an_evaluation(sample, tmp_path, model_file):
    """Its loading workers get it too. That is silent, and no want of memory."""
    content = json.loads((sample / "val.json").read_text())
    first = content["images"][0]
    content["images"] = [
        first | {"id": n, "file_name": str(sample / first["file_name"])} for n in range(3000)]
    content["annotations"] = []
    (tmp_path / "many.json").write_text(json.dumps(content))
    words = ["--data", "many.json", "--model", model_file, "--workers", "2", "--out", "r.json"]
    process = subprocess.Popen([sys.executable, REPOSITORY / "evaluate.py", *words], cwd=tmp_path, text=True,
                               env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    time.sleep(8)  # it loads for some seconds, and evaluates for many
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in error and "memory" not in error, error
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_predictions_are_scored_once_under_torchrun(sample, tmp_path):
    (tmp_path / "r.json").write_text("[]")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               REPOSITORY / "evaluate.py", "--data", sample / "val.json", "--predictions",
               tmp_path / "r.json", "--json", tmp_path / "n.json")
    assert done.returncode == 0 and done.stdout.count("6 photos") == 1 and done.stdout.count("wrote ") == 1


@pytest.mark.parametrize("rank, local, waits", [("0", "0", False), ("1", "0", False), ("1", "1", True)])
def test_each_machine_reports_what_is_wrong_there(monkeypatch, refused, rank, local, waits):
    """As the second machine's first process (rank 1, local rank 0) must. The others let the first report."""
    slept = []
    monkeypatch.setattr("support.script.time.sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert "absent.json: no such file" in refused(evaluate.main, "--data", "absent.json")
    assert slept == [PATIENCE] * waits


# Exported models whose metadata is not true

def exported(path, metadata, outputs, shape=(1, 3, 48, 64), kind=TensorProto.FLOAT):
    """An ONNX model with our metadata, which takes `shape` and gives zeros of the shapes `outputs`."""
    info = helper.make_tensor_value_info
    constants = [
        onnx.numpy_helper.from_array(np.zeros(own, np.float32), f"c{n}") for n, own in enumerate(outputs)]
    nodes = [helper.make_node("Identity", [f"c{n}"], [f"o{n}"]) for n in range(len(outputs))]
    results = [info(f"o{n}", TensorProto.FLOAT, list(own)) for n, own in enumerate(outputs)]
    graph = helper.make_graph(nodes, "g", [info("image", kind, shape)], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


GOOD = {"head": "generic", "colour": "RGB", "value_range": "0-1"}
FALSE = {"control characters": (GOOD | {"head": "\x1b[2J"}, [(4, 5)]),
         "no colour": ({"head": "generic"}, [(4, 5)]), "range": (GOOD | {"value_range": "0-7"}, [(4, 5)]),
         "columns": (GOOD, [(4, 6)]), "a vector": (GOOD, [(4,)]),
         "anchors": (GOOD | {"head": "raw", "anchors": "{"}, [(1, 108, 2), (1, 108, 4)]),
         "too many": (GOOD | {"head": "raw", "anchors": "[[9, 9], [8, 8]]"}, [(1, 108, 2), (1, 108, 4)]),
         "ssd": (GOOD | {"head": "detection_output"}, [(4, 5)])}


@pytest.mark.parametrize("name", FALSE)
def test_metadata_that_is_not_true_is_refused(tmp_path, refused, name):
    metadata, outputs = FALSE[name]
    path = exported(tmp_path / "x.onnx", metadata, outputs)
    line = refused(detect.main, photo(tmp_path / "a.jpg"), "--model", path, "--out", tmp_path / "out")
    assert "x.onnx: its inputs or outputs are not what its metadata says" in line and "\x1b" not in line


def test_true_metadata_is_accepted(tmp_path, capsys):
    path = exported(tmp_path / "x.onnx", GOOD, [(4, 5)])
    detect.main([str(photo(tmp_path / "a.jpg")), "--model", str(path), "--out", str(tmp_path / "out")])
    assert "0 faces on 1 picture" in capsys.readouterr().out
    with pytest.raises(InputError, match="says itself what it takes"):
        load_detector(path, colour="rgb", white=1)
