"""Tests of bad input to every script: one table of cases and messages.

Every refused case must exit with code 2 and one line, without a traceback, and leave the folder unchanged.
"""

import importlib
import sys

import pytest

from tools import look
from support.script import InputError
from hard_world import REPOSITORY, UNREADABLE, accepted, arguments, listing, run

pytestmark = pytest.mark.slow

CASES = [  # script, arguments, part of the message; all exit with 2
    # annotations
    ("evaluate", "--data absent.json", "absent.json: no such file"),
    ("evaluate", "--data cut.json", "cut.json: not JSON"),
    ("evaluate", "--data binary.json", "binary.json: not UTF-8 text"),
    ("evaluate", "--data list.json", 'no list "images"'),
    ("tools.look", "--data keys.json", 'no list "annotations"'),
    ("tools.look", "--data no-id.json", 'images[0] has no integer "id"'),
    ("tools.look", "--data unnamed.json", "images[0] (id 7) has no file_name"),
    ("train", "--data train.json nan.json",
     "nan.json: entry 1: bbox is [1, 2, 3, nan], 4 finite numbers expected"),
    ("tools.fit_anchors", "--data inf.json", "4 finite numbers expected"),
    ("export", "--model good.pth --data object.json", "4 finite numbers expected"),
    ("evaluate", "--data size.json", "width is nan, pixels expected"),
    ("evaluate", "--data stranger.json", 'annotation 1 is of category 3, which is not in "categories"'),
    ("evaluate", "--data cat-dog.json", "there are: cat, dog"),
    ("evaluate", "--data category.json", '"categories" must be a list of {id, name} with integer ids'),
    ("train", "--data no-photos.json", "no photos to train on"),
    ("tools.fit_anchors", "--data flat.json", "has no width and height"),
    ("wider_to_coco", "wider_val_bbx_gt.txt e x.json", "are missing, such as ["),
    ("wider_to_coco", "wider_val_bbx_gt.txt absent x.json", "absent: no such folder of pictures"),
    ("wider_to_coco", "good.json e x.json", "good.json:1: the file ends after the name"),
    # pictures (more are in test_hard_runs.py)
    ("evaluate", "--data bad.json --model good.pth --workers 0",
     f"{len(UNREADABLE)} photos could not be used"),
    ("tools.worst", "good.json r-good.json --count 0", "--count: 0 is not at least 1"),
    ("detect", "run --model good.pth", "run: no such file, nor a folder or pattern with pictures"),
    ("detect", "e/a.jpg --model good.pth --out e", "would overwrite it"),
    ("tools.look", "--data good.json --out suspects.png", "--out not suspects.png"),
    ("tools.doubt", "good.json r-good.json --out doubt.png", "doubt.png: the name of a .json is expected"),
    ("tools.doubt", "good.json r-good.json --count -1", "--count: -1 is not at least 1"),
    ("evaluate", "--data good.json --predictions r-good.json --out .", ".: is a folder"),
    # models
    ("detect", "e/a.jpg --model good.pth --colour bgr", "good.pth: a checkpoint takes RGB in 0-1"),
    ("train", "--data good.json --no-augment --cache c", "--cache is for augmented photos"),
    ("detect", "e/a.jpg --model absent.pth", "absent.pth: no such model"),
    ("detect", "e/a.jpg --model cut.pth", "cut.pth: not a checkpoint, or truncated"),
    ("detect", "e/a.jpg --model hostile.pth", "hostile.pth: not a checkpoint, or"),
    ("evaluate", "--data good.json --model hostile.pth", "hostile.pth: not a checkpoint, or"),
    ("train", "--data good.json --load-from hostile.pth", "hostile.pth: not a checkpoint, or"),
    ("train", "--data good.json --pretrained hostile.pth",
     "hostile.pth: not torchvision's MobileNetV2 weights"),
    ("train", "--data good.json --pretrained tensor.pth",
     "tensor.pth: not torchvision's MobileNetV2 weights"),
    ("train", "--data good.json --pretrained absent.pth", "absent.pth"),
    ("train", "--data good.json --resume good.pth", "nothing to resume; start from it with --load-from"),
    ("train", "--data good.json --load-from other.pth", "other.pth: not a checkpoint of this detector"),
    ("export", "--model tensor.pth", 'tensor.pth: a checkpoint without "state_dict"'),
    ("export", "--model keys.pth", "keys.pth: not a checkpoint of this detector"),
    ("flops", "--model shape.pth", "shape.pth: not a checkpoint of this detector ("),
    ("flops", "--model wide.pth", "between 0.0625 and 8 expected"),
    ("flops", "--model anchors.pth", "with sides of at least a pixel"),
    ("evaluate", "--data good.json --model nan.pth", "nan.pth: holds weights that are not finite"),
    ("detect", "e/a.jpg --model text.onnx", "text.onnx: ONNX Runtime cannot read it"),
    ("detect", "e/a.jpg --model text.xml", "text.xml: OpenVINO cannot read it"),
    ("detect", "e/a.jpg --model alone.xml", "alone.xml: its weights alone.bin are not beside it"),
    ("detect", "e/a.jpg --model relu.onnx", "relu.onnx: was not written by export.py"),
    ("detect", "e/a.jpg --model relu.onnx --colour bgr --range 1", "relu.onnx: its inputs or outputs are"),
    # predictions and results
    ("evaluate", "--data good.json --predictions absent.json", "absent.json: no such file"),
    ("evaluate", "--data good.json --predictions predictions", "WIDER predictions need --wider"),
    ("evaluate", "--data good.json --predictions r-list.json", "not COCO results"),
    ("evaluate", "--data good.json --predictions r-image.json", "is of image 8, which is not in good.json"),
    ("evaluate", "--data good.json --predictions r-nan.json", "score is nan, a finite number expected"),
    ("evaluate", "--data good.json --predictions r-score.json", "score is True"),
    ("evaluate", "--wider hostile --predictions predictions",
     "'../.._1' is not the name of a WIDER FACE image"),
    ("evaluate", "--wider broken --predictions predictions", "wider_hard_val.mat: not a MATLAB file"),
    ("evaluate", "--wider absent --predictions predictions", "wider_face_val.mat: no such file; download"),
    ("evaluate", "--data flat.json --predictions r-good.json --wider-out x",
     "'a' is not the name of a WIDER FACE image"),
    # outputs
    ("evaluate", "--data good.json --predictions r-good.json --out good.json/x.json",
     "File exists; not written"),
    ("evaluate", "--data good.json --predictions r-good.json --json e",
     "e: is a folder, a file is to be written there"),
    ("evaluate", "--data good.json --predictions r-good.json --wider-out good.json", "good.json/e"),
    ("tools.look", "--data good.json --out good.json/x.png", "good.json"),
    ("detect", "e/a.jpg --model good.pth --out good.json", "good.json"),
    ("export", "--model good.pth --out good.json", "good.json: File exists"),
    ("tools.sample", "good.json --train 1 --val 1", "good.json"),
    ("wider_to_coco", "wider_val_bbx_gt.txt val good.json/x", "good.json"),
    ("train", "--data good.json --out good.json/x", "good.json"),
    ("train", "--data good.json --out run", "run/last.pth exists: continue that run with --resume"),
    ("train", "--data good.json --out run --resume", "run/last.pth: "),
    ("train", "--data good.json --out new --resume", "new/last.pth: no checkpoint to resume"),
    # flags
    ("train", "--data good.json --batch-size 0", "--batch-size: 0 is not at least 1"),
    ("train", "--data good.json --workers -1", "--workers: -1 is not at least 0"),
    ("train", "--data good.json --lr nan", "--lr: nan is not above 0"),
    ("train", "--data good.json --momentum -1", "--momentum: -1 is not in [0, 1)"),
    ("train", f"--data good.json --seed {2**70}", "is not from 0 to below 2 to the 32"),
    ("train", "--data good.json --anchors nanx3",
     "anchors: 1 to 100 expected, with sides of at least a pixel"),
    ("train", "--data good.json --width 0.01", "width 0.01: between 0.0625 and 8 expected"),
    ("train", "--data good.json --learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("train", "@absent.txt", "absent.txt"),
    ("train", "@open.txt", "a file of flags cannot be read: No closing quotation"),
    ("train", "@e", "Is a directory"),
    ("tools.sample", "new --train 0", "--train: 0 is not at least 1"),
    ("flops", "--size 5000000", "sides between 16 and 8192 pixels expected"),
]


@pytest.mark.parametrize("script, words, message", CASES, ids=[" ".join(case[:2])[:60] for case in CASES])
def test_refused(world, refused, monkeypatch, script, words, message):
    name = script.split(".")[-1] + ".py"
    monkeypatch.setattr(sys, "argv", [name])
    before = listing(world)
    line = refused(importlib.import_module(script).main, *arguments(script, words))
    assert message in line and line.startswith(f"{name}: ")
    assert listing(world) == before  # nothing was written, and the hostile pickle did not run


LIGHT = {"evaluate", "tools.sample", "wider_to_coco"}  # these start without torch


@pytest.mark.parametrize("script, words, message", [case for case in CASES if case[0] in LIGHT][::19]
                         + [case for case in CASES if case[0] not in LIGHT][::60])
def test_refused_as_a_process(world, script, words, message):
    done = run("-m", script, *arguments(script, words))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_many_processes_report_what_all_of_them_met_once(world):
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               REPOSITORY / "evaluate.py", "--data", "cut.json")
    assert done.returncode and done.stderr.count("evaluate.py: cut.json: not JSON") == 1


@pytest.mark.parametrize("error, line", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a loading process was killed"),
    (RuntimeError("CUDA out of memory. Tried to allocate 1 GiB"), "out of memory: lower --batch-size"),
    (MemoryError(), "out of memory: lower --batch-size"),
    (MemoryError("Unable to allocate 7 PiB"), "out of memory: lower"),
    (InputError("a\nb\x1b[2J: bad"), r"a\x0ab\x1b[2J: bad"),
    (PermissionError(13, "Permission denied", "x.json"), "x.json: Permission denied")
])
def test_a_machine_that_gives_up_is_one_line(refused, monkeypatch, error, line):
    monkeypatch.setattr(look, "read_annotations", lambda path: exec("raise error", {"error": error}))
    assert line in refused(look.main)


ACCEPTED = [  # arguments of evaluate.py, part of what it prints; all exit with 0
    ("--data odd.json --predictions r-none.json", "2 photos, 5 faces (4 ignored), 0 detections"),
    ("--data no-faces.json --predictions r-good.json", "2 photos, 0 faces (0 ignored), 1 detections"),
    ("--data no-photos.json --predictions r-none.json", "0 photos, 0 faces"),
    ("--data no-categories.json --predictions r-good.json", "1 faces (0 ignored), 1 detections"),
    ("--data persons.json --predictions r-good.json", "1 faces (0 ignored), 1 detections"),
    ("--data bom.json --predictions r-good.json", "1 faces (0 ignored), 1 detections"),
    ("--data odd.json --model good.pth --workers 0", "5 faces (4 ignored)"),
    ("--data no-photos.json --model good.pth --workers 1", "0 photos, 0 faces"),
    ("--data good.json --model good.pth --batch-size 1000 --size 8192x16", "2 photos")]


@pytest.mark.parametrize("words, line", ACCEPTED)
def test_accepted_and_counted(world, capsys, words, line):
    assert line in accepted(capsys, "evaluate", *words.split())
