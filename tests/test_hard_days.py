"""What the scripts do when the world is not as expected: one table of case, message and exit code, and the runs behind it.

Every refused case must exit with 2 and one line, without a traceback, and leave the folder as it was.
"""
import importlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import data
import evaluate
import train
from formats import InputError, read_annotations
from model import SSD, Config, checkpoint
from pictures import ORIENTATION, load_picture
from sample import draw_sample
from test_wider import write_ground_truth

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
TRAIN = "--size 64 --width 0.25 --batch-size 3 --repeat 1 --warmup 3 --lr 0.01 --min-face 0 --workers 0 --device cpu".split()
NAN, INF = float("nan"), float("inf")


class Hostile:
    """Unpickled, it would make the file `ran`."""

    def __reduce__(self):
        return open, ("ran", "w")


def png(width, height):
    """A small file whose header promises a large picture."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


UNREADABLE = {  # file: why not
    "truncated.jpg": "truncated", "zero.jpg": "cannot identify", "text.jpg": "cannot identify", "folder.jpg": "no such picture",
    "absent.jpg": "no such picture", "pipe.jpg": "no such picture", "bomb.png": "decompression bomb", "half.png": "cannot be read",
    "size.png": "is 30x20, but", "exif.jpg": "is 20x30, but", "long" * 99 + ".jpg": "no such picture", "\x1b[2J\n.jpg": "no such picture"}
UNUSUAL = {"1x1.png": (1, 1), "1x10000.png": (1, 10000), "10000x1.jpg": (10000, 1), "wide.jpg": (20000, 30), "animated.gif": (30, 20),
           "cmyk.jpg": (30, 20), "16bit.png": (30, 20), "upright.jpg": (20, 30), "alpha.webp": (30, 20), "bits.png": (30, 20)}


def draw_pictures(folder):
    """The files of UNREADABLE and UNUSUAL."""
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name, size in UNUSUAL.items():
        if "x1" in name or name == "wide.jpg":
            noise.resize(size).save(folder / name)
    noise.save(folder / "animated.gif", save_all=True, append_images=[noise.rotate(180)])
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(folder / "16bit.png")
    noise.convert("RGBA").save(folder / "alpha.webp")
    noise.convert("1").save(folder / "bits.png")
    noise.save(folder / "size.png")
    for name in ("upright.jpg", "exif.jpg"):  # the second is annotated with its size before it is turned
        noise.save(folder / name, exif=exif)
    noise.resize((300, 200)).save(folder / "truncated.jpg")
    os.truncate(folder / "truncated.jpg", 9000)
    for name, content in (("zero.jpg", b""), ("text.jpg", b"no picture"), ("bomb.png", png(50000, 50000)), ("half.png", png(30, 20))):
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


def coco(**changes):
    """Image 7 with one face, image 3 without, of category 2."""
    return {"images": [{"id": 7, "file_name": "e/a.jpg", "width": 30, "height": 20}, {"id": 3, "file_name": "e/b.jpg"}],
            "annotations": [{"id": 5, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 4]}],
            "categories": [{"id": 2, "name": "face"}]} | changes


def face(**changes):
    return [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]} | changes]


def pictured(names):
    """A face on each of the pictures `names`; those in the folder's list of wrong sizes get one."""
    wrong = {"size.png": (20, 30), "exif.jpg": (30, 20)}
    images = [{"id": n, "file_name": f"pictures/{name}"} | (dict(zip(("width", "height"), wrong[name])) if name in wrong else {})
              for n, name in enumerate(names)]
    return {"images": images, "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 1, 1]} for n in range(len(images))],
            "categories": [{"id": 1, "name": "face"}]}


JSONS = {
    "cut": '{"images": [', "list": "[]", "digits": '{"images": ' + "9" * 5000 + "}", "deep": '{"a":' * 50_000, "keys": {"images": []},
    "no-id": coco(images=[{"file_name": "a"}]), "twice": coco(images=[{"id": 7, "file_name": "a"}] * 2),
    "unnamed": coco(images=[{"id": 7}]), "surrogate": coco(images=[{"id": 7, "file_name": "\ud800.jpg"}]),
    "nul": coco(images=[{"id": 7, "file_name": "a\0.jpg"}]), "endless": coco(images=[{"id": 7, "file_name": "a" * 10 ** 6}]),
    "unknown": coco(annotations=face(image_id=99)), "nan": coco(annotations=face(bbox=[1, 2, 3, NAN])),
    "inf": coco(annotations=face(bbox=[1, INF, 3, 4])), "string": coco(annotations=face(bbox=[1, 2, "3", 4])),
    "short": coco(annotations=face(bbox=[1, 2, 3])), "huge": coco(annotations=face(bbox=[1, 2, 10 ** 400, 4])),
    "object": coco(annotations=face(bbox={"x": 1})), "area": coco(annotations=face(area=NAN)),
    "size": coco(images=[{"id": 7, "file_name": "a", "width": NAN}]), "cat-dog": coco(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]),
    "two-faces": coco(categories=[{"id": 1, "name": "face"}, {"id": 2, "name": "face"}]), "no-photos": coco(images=[], annotations=[]),
    "category": coco(annotations=face(category_id=[2]), categories=None), "stranger": coco(annotations=face(category_id=3)),
    "good": coco(), "one": None, "bad": None,
    "flat": coco(images=[{"id": 7, "file_name": "a.jpg"}], annotations=face()),
    "odd": coco(annotations=[dict(*face(), id=n, bbox=box) for n, box in enumerate([
        [1, 2, 0, 4], [1, 2, -3, 4], [-9, 2, 5, 5], [100, 2, 5, 5], [-5, -5, 20, 20]])]),  # the last reaches outside only partly
    "no-faces": coco(annotations=[]), "no-categories": {key: value for key, value in coco().items() if key != "categories"},
    "persons": coco(annotations=face(category_id=4) + face(id=2), categories=[{"id": 4, "name": "person"}, {"id": 2, "name": "Face"}]),
    "bom": "\ufeff" + json.dumps(coco()).replace(",", ",\r\n"), "pair": None, "r-none": [],
    # results of evaluate.py, to be scored on good.json
    "r-list": {}, "r-number": [1], "r-image": [{"image_id": 8, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}],
    "r-nan": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": NAN}],
    "r-box": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, INF, 4], "score": 0.5}],
    "r-score": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": True}],
    "r-good": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, -3, 4], "score": 2}]}


def draw_models(folder):
    """Files that are no models of ours, each in its own way."""
    good = checkpoint(SSD(Config.new(64, 48, width=0.25)))
    state, config = good["state_dict"], good["config"]
    contents = {
        "good": good, "hostile": {"state_dict": Hostile()}, "other": {"state_dict": {"fc.weight": torch.ones(2, 2)}},
        "tensor": torch.ones(3), "shape": {"config": config | {"width": 0.5}, "state_dict": state},
        "wide": {"config": config | {"width": 90.0}, "state_dict": state}, "tall": {"config": config | {"input_height": 10 ** 9}, "state_dict": state},
        "anchors": {"config": config | {"anchors": [[NAN, 3.0]]}, "state_dict": state}, "keys": {"config": {"layers": 3}, "state_dict": state},
        "nan": {"config": config, "state_dict": state | {"backbone.bn_first.bias": torch.full([3], NAN)}},
        "foreign-run": {"config": config, "state_dict": state, "optimizer": {}, "meta": {"epoch": 3}}}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    whole = (folder / "good.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "noise.pth").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "text.onnx").write_text("no model")
    (folder / "text.xml").write_text("<no/>")
    (folder / "text.bin").write_bytes(b"")
    (folder / "alone.xml").write_text("<net/>")
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    for name, shape in (("relu", [1, 3, 48, 64]), ("vector", [5])):
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", shape)], [value("y", shape)])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / f"{name}.onnx")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with all the files that the table names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hard")
    draw_sample(folder, train=6, val=3, size=(160, 120))
    (folder / "e").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 20)).save(folder / f"e/{name}.jpg")
    draw_pictures(folder / "pictures")
    draw_models(folder)
    for name, content in JSONS.items():
        content = {"one": coco(images=coco()["images"][:1]), "bad": pictured(UNREADABLE), "pair": pictured(["zero.jpg", "1x1.png"])
                   }.get(name, content)
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "binary.json").write_bytes(b"\xff\xfe\0")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\0")
    (folder / "open.txt").write_text("--out 'a\n")
    (folder / "itself.txt").write_text("@itself.txt\n")
    for name in ("run", "predictions", "hostile", "broken"):
        (folder / name).mkdir()
    write_ground_truth(folder / "hostile", events=("..", "b"))
    write_ground_truth(folder / "broken")
    os.truncate(folder / "broken/wider_hard_val.mat", 99)
    (folder / "run/last.pth").write_bytes(b"of another run")
    return folder


@pytest.fixture
def world(built, monkeypatch):
    monkeypatch.chdir(built)
    return built


CASES = [  # script, arguments, part of the message; all exit with 2
    # annotations
    ("evaluate", "--data absent.json", "absent.json: no such file"),
    ("evaluate", "--data cut.json", "cut.json: not JSON"),
    ("evaluate", "--data deep.json", "deep.json: not JSON"),
    ("evaluate", "--data digits.json", "digits.json: not JSON"),
    ("evaluate", "--data binary.json", "binary.json: not UTF-8 text"),
    ("evaluate", "--data list.json", 'no list "images"'),
    ("data", "--data keys.json", 'no list "annotations"'),
    ("data", "--data no-id.json", 'images[0] has no integer "id"'),
    ("data", "--data twice.json", "images[1] repeats id 7"),
    ("data", "--data unnamed.json", "images[0] (id 7) has no file_name"),
    ("train", "--data surrogate.json", "images[0] (id 7) has no file_name that could be a file's"),
    ("train", "--data nul.json", "has no file_name that could be a file's"),
    ("train", "--data endless.json", "has no file_name that could be a file's"),
    ("train", "--data train.json --val unknown.json", "unknown.json: annotation 1 belongs to image 99"),
    ("train", "--data train.json nan.json", "nan.json: entry 1: bbox is [1, 2, 3, nan], 4 finite numbers expected"),
    ("anchors", "--data inf.json", "4 finite numbers expected"),
    ("anchors", "--data string.json", "bbox is [1, 2, '3', 4]"),
    ("anchors", "--data short.json", "4 finite numbers expected"),
    ("anchors", "--data huge.json", "4 finite numbers expected"),
    ("export", "--model good.pth --data object.json", "4 finite numbers expected"),
    ("evaluate", "--data area.json", "area is nan"),
    ("evaluate", "--data size.json", "width is nan, pixels expected"),
    ("evaluate", "--data cat-dog.json", "there are: cat, dog"),
    ("evaluate", "--data two-faces.json", "which category is the face"),
    ("evaluate", "--data category.json", "\"categories\" must be a list of {id, name} with integer ids"),
    ("evaluate", "--data stranger.json", "annotation 1 is of category 3, which is not in \"categories\""),
    ("train", "--data no-photos.json", "no photos to train on"),
    ("data", "--data no-photos.json", "no photos to show"),
    ("anchors", "--data no-photos.json", "cannot be fitted to 0 different face sizes"),
    ("anchors", "--data flat.json", "has no width and height"),
    ("export", "--model good.pth --data no-photos.json", "no-photos.json: no photos"),
    ("wider_to_coco", "wider_val_bbx_gt.txt e x.json", "missing ("),
    ("wider_to_coco", "wider_val_bbx_gt.txt absent x.json", "absent: no such folder of pictures"),
    ("wider_to_coco", "good.json e x.json", "good.json:1: the file ends after the name"),
    # pictures (the others are below)
    ("evaluate", "--data bad.json --model good.pth --workers 0", f"{len(UNREADABLE)} photos could not be used"),
    ("evaluate", "--data good.json --model good.pth --workers 0 --worst 0", "--worst must be at least 1"),
    ("detect", "nowhere.jpg --model good.pth", "nowhere.jpg: no such file"),
    ("detect", "run --model good.pth", "run: no such file, nor a folder or pattern with pictures"),
    ("detect", "² --model good.pth", "²: no such file"),
    ("detect", "e/a.jpg --model good.pth --out e", "would overwrite it"),
    # models
    ("detect", "e/a.jpg --model absent.pth", "absent.pth: no such model"),
    ("detect", "e/a.jpg --model e", "e: no such model"),
    ("detect", "e/a.jpg --model cut.pth", "cut.pth: not a checkpoint, or a truncated one"),
    ("detect", "e/a.jpg --model empty.pth", "empty.pth: not a checkpoint, or a truncated one"),
    ("detect", "e/a.jpg --model noise.pth", "noise.pth: "),
    ("detect", "e/a.jpg --model hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("export", "--model hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("flops", "--model hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("evaluate", "--data good.json --model hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("train", "--data good.json --load-from hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("train", "--data good.json --resume hostile.pth", "hostile.pth: refused, it holds more than tensors"),
    ("train", "--data good.json --pretrained hostile.pth", "hostile.pth: not torchvision's MobileNetV2 weights"),
    ("train", "--data good.json --pretrained tensor.pth", "tensor.pth: not torchvision's MobileNetV2 weights"),
    ("train", "--data good.json --pretrained absent.pth", "absent.pth"),
    ("train", "--data good.json --resume foreign-run.pth", "nothing to resume; start from it with --load-from"),
    ("train", "--data good.json --resume good.pth", "nothing to resume; start from it with --load-from"),
    ("train", "--data good.json --load-from other.pth", "other.pth: not a checkpoint of this detector"),
    ("export", "--model other.pth", "other.pth: not a checkpoint of this detector"),
    ("export", "--model tensor.pth", 'tensor.pth: a checkpoint without "state_dict"'),
    ("export", "--model keys.pth", "keys.pth: not a checkpoint of this detector"),
    ("flops", "--model shape.pth", "shape.pth: not a checkpoint of this detector (size mismatch"),
    ("flops", "--model wide.pth", "between 0.0625 and 8 expected"),
    ("flops", "--model tall.pth", "sides of 16 to 8192 pixels expected"),
    ("flops", "--model anchors.pth", "with positive sides"),
    ("evaluate", "--data good.json --model nan.pth", "nan.pth: holds weights that are not finite"),
    ("detect", "e/a.jpg --model text.onnx", "text.onnx: not an ONNX file"),
    ("detect", "e/a.jpg --model text.xml", "text.xml: OpenVINO cannot read it"),
    ("detect", "e/a.jpg --model alone.xml", "alone.xml: its weights alone.bin are not beside it"),
    ("detect", "e/a.jpg --model relu.onnx", "relu.onnx: was not written by export.py"),
    ("detect", "e/a.jpg --model relu.onnx --colour bgr --range 1", "relu.onnx: its outputs are"),
    ("detect", "e/a.jpg --model vector.onnx --colour bgr --range 1", "vector.onnx: its input is [5]"),
    ("detect", "e/a.jpg --model good.pth --colour bgr", "a checkpoint's input is known"),
    # predictions and results
    ("evaluate", "--data good.json --predictions absent.json", "absent.json: no such file"),
    ("evaluate", "--data good.json --predictions predictions", "WIDER predictions need --wider"),
    ("evaluate", "--data good.json --predictions r-list.json", "not COCO results"),
    ("evaluate", "--data good.json --predictions r-number.json", "not COCO results"),
    ("evaluate", "--data good.json --predictions r-image.json", "is of image 8, which is not in good.json"),
    ("evaluate", "--data good.json --predictions r-nan.json", "score is nan, a finite number expected"),
    ("evaluate", "--data good.json --predictions r-box.json", "4 finite numbers expected"),
    ("evaluate", "--data good.json --predictions r-score.json", "score is True"),
    ("evaluate", "--wider hostile --predictions predictions", "'../.._1' is not the name of a WIDER FACE image"),
    ("evaluate", "--wider broken --predictions predictions", "wider_hard_val.mat: not a MATLAB file"),
    ("evaluate", "--wider absent --predictions predictions", "wider_face_val.mat: no such file; download"),
    ("evaluate", "--data flat.json --predictions r-good.json --wider-out x", "'a' is not the name of a WIDER FACE image"),
    # outputs
    ("evaluate", "--data good.json --predictions r-good.json --out good.json/x.json", "good.json: File exists"),
    ("evaluate", "--data good.json --predictions r-good.json --json e", "e: is a folder, a file is to be written there"),
    ("evaluate", "--data good.json --predictions r-good.json --out /proc/x.json", "/proc/x.json: "),
    ("evaluate", "--data good.json --predictions r-good.json --wider-out good.json", "good.json/e"),
    ("evaluate", "--data good.json --predictions r-good.json --plot x.what", "'x.what' is no name for a picture"),
    ("data", "--data good.json --out x.what", "'x.what' is no name for a picture"),
    ("data", "--data good.json --out good.json/x.png", "good.json: "),
    ("anchors", "--data good.json -k 1 --out good.json/x.png", "good.json: "),
    ("detect", "e/a.jpg --model good.pth --out good.json", "good.json"),
    ("detect", "e/a.jpg --model good.pth --out /proc/x", "/proc/x"),
    ("export", "--model good.pth --out good.json", "good.json: File exists"),
    ("sample", "good.json --train 1 --val 1", "good.json"),
    ("wider_to_coco", "wider_val_bbx_gt.txt val good.json/x", "good.json"),
    ("train", "--data good.json --out good.json/x", "good.json"),
    ("train", "--data good.json --out run", "run/last.pth exists: continue that run with --resume"),
    ("train", "--data good.json --out run --resume", "run/last.pth: "),
    ("train", "--data good.json --out new --resume", "new/last.pth: no checkpoint to resume"),
    # flags
    ("train", "--data good.json --device xla", "--device xla: not available here"),
    ("train", "--data good.json --batch-size 0", "--batch-size must be at least 1"),
    ("train", "--data good.json --workers -1", "--workers must be at least 0"),
    ("train", "--data good.json --epochs -1", "--epochs must be at least 0"),
    ("train", "--data good.json --lr nan", "--lr and --clip must be above 0"),
    ("train", "--data good.json --momentum -1", "--momentum must be in [0, 1)"),
    ("train", "--data good.json --weight-decay nan", "--weight-decay 0 or more"),
    ("train", f"--data good.json --seed {2 ** 70}", "--seed below 2 to the 32"),
    ("train", "--data good.json --anchors nanx3", "anchors: 1 to 100 expected, with positive sides"),
    ("train", "--data good.json --width 0.01", "width 0.01: between 0.0625 and 8 expected"),
    ("train", "--data good.json --learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("train", "@absent.txt", "absent.txt"),
    ("train", "@open.txt", "a file of flags cannot be read: No closing quotation"),
    ("train", "@binary.txt", "a file of flags cannot be read"),
    ("train", "@itself.txt", "a file of flags cannot be read"),
    ("train", "@e", "Is a directory"),
    ("data", "--data good.json --seed -1", "--seed must be at least 0"),
    ("sample", "new --train 0", "--train and --val take 1 photo or more"),
    ("flops", "--size 5000000", "sides between 16 and 8192 pixels expected"),
    ("flops", "--width nan", "between 0.0625 and 8 expected"),
]


def listing(folder):
    return {path: None if path.is_dir() else path.stat().st_mtime_ns for path in folder.rglob("*")}


def arguments(script, words):
    """The words of a case; train needs its small flags, and another folder than the default one."""
    words = words.split()
    defaults = (["--out", "new"] if "--out" not in words else []) if script == "train" else []
    return [*(TRAIN[4:] if script == "train" else []), *defaults, *words]


@pytest.mark.parametrize("script, words, message", CASES, ids=[" ".join(case[:2])[:60] for case in CASES])
def test_refused(world, refused, monkeypatch, script, words, message):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    before = listing(world)
    line = refused(importlib.import_module(script).main, *arguments(script, words))
    assert message in line and line.startswith(f"{script}.py: ")
    assert listing(world) == before  # nothing written, whole or half; above all not the file `ran`


def run(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, **more)


LIGHT = {"evaluate", "sample", "wider_to_coco"}  # these start without torch


@pytest.mark.parametrize("script, words, message", [case for case in CASES if case[0] in LIGHT][::5]
                         + [case for case in CASES if case[0] not in LIGHT][::23])
def test_refused_as_a_process(world, script, words, message):
    done = run(REPOSITORY / f"{script}.py", *arguments(script, words))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_many_processes_report_what_all_of_them_met_once(world):
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", REPOSITORY / "evaluate.py", "--data", "cut.json")
    assert done.returncode and done.stderr.count("cut.json: not JSON") == 1


@pytest.mark.parametrize("error, line", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a loading process was killed"),
    (RuntimeError("CUDA out of memory. Tried to allocate 1 GiB"), "out of memory: lower --batch-size"),
    (MemoryError(), "out of memory: lower --batch-size"), (MemoryError("Unable to allocate 7 PiB"), "out of memory: lower"),
    (InputError("a\nb\x1b[2J: bad"), r"a\x0ab\x1b[2J: bad"), (PermissionError(13, "Permission denied", "x.json"), "x.json: Permission denied")])
def test_a_machine_that_gives_up_is_one_line(refused, monkeypatch, error, line):
    monkeypatch.setattr(data, "read_annotations", lambda path: exec("raise error", {"error": error}))
    assert line in refused(data.main)


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


# Pictures

def accepted(capsys, script, *words):
    importlib.import_module(script).main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_accepted(world, tmp_path, capsys, name):
    """In every script, with the augmentation too, and upright."""
    (world / "u.json").write_text(json.dumps(pictured([name])))
    assert load_picture(f"pictures/{name}").size == UNUSUAL[name]
    accepted(capsys, "detect", f"pictures/{name}", "--model", "good.pth", "--out", tmp_path / "d")
    assert "1 photos" in accepted(capsys, "evaluate", "--data", "u.json", "--model", "good.pth", "--workers", 0)
    dataset = data.FaceDataset(read_annotations("u.json"), 64, 48)
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
def test_unreadable_pictures_are_named(world, refused, name):
    (world / "u.json").write_text(json.dumps(pictured([name])))
    line = refused(data.main, "--data", "u.json", "--out", "u.png", "--augment")
    assert UNREADABLE[name] in line and name[:4] in line.encode().decode("unicode_escape")


def test_training_goes_on_past_all_unreadable_pictures(world, tmp_path, capsys, refused):
    flags = [*TRAIN, "--data", "train.json", "bad.json", "--epochs", 1, "--out"]
    out = accepted(capsys, "train", *flags, tmp_path / "r", "--max-unreadable", len(UNREADABLE))
    named = [line for line in out.splitlines() if line.startswith("unreadable: ")]
    assert len(named) == len(UNREADABLE) and all(any(why in line for line in named) for why in UNREADABLE.values())
    line = refused(train.main, *flags, tmp_path / "s", "--max-unreadable", len(UNREADABLE) - 1)
    assert f"{len(UNREADABLE)} photos could not be used (--max-unreadable" in line
    assert torch.load(tmp_path / "s/last.pth", weights_only=True)["epoch"] == 0


def test_evaluation_and_detection_with_unreadable_pictures(world, tmp_path, capsys, refused):
    flags = ["--data", "mixed.json", "--model", "good.pth", "--workers", 0]
    (world / "mixed.json").write_text(json.dumps(pictured([*UNREADABLE, *UNUSUAL])))
    line = refused(evaluate.main, *flags, "--out", tmp_path / "r.json")
    assert f"{len(UNREADABLE)} photos could not be used" in line and "--skip-unreadable" in line and not (tmp_path / "r.json").exists()
    assert f"{len(UNUSUAL)} photos, {len(UNUSUAL)} faces" in accepted(capsys, "evaluate", *flags, "--skip-unreadable")
    names = sorted(p.name for p in (world / "pictures").iterdir())
    line = refused(importlib.import_module("detect").main, "pictures", "--model", "good.pth", "--out", tmp_path / "d")
    assert f"{len(names) - len(UNUSUAL) - 2} of {len(names)} could not be read" in line  # two are wrong only in size.json
    assert len(json.loads((tmp_path / "d/detections.json").read_text())) == len(UNUSUAL) + 2


def test_a_picture_without_a_picture_name_is_drawn(world, tmp_path, capsys):
    shutil.copy("e/a.jpg", tmp_path / "a.what")
    accepted(capsys, "detect", tmp_path / "a.what", "--model", "good.pth", "--out", tmp_path / "d")
    assert Image.open(tmp_path / "d/a.what.png").size == (30, 20)


# Runs

ONE = ["--data", "one.json", "--epochs", 1]


@pytest.mark.parametrize("flags", [["--epochs", 0], ["--batch-size", 50], ["--workers", 2], ["--val", "one.json"],
                                   ["--val", "no-photos.json"], ["--repeat", 3, "--no-augment"]], ids=str)
def test_one_photo(world, tmp_path, capsys, flags):
    assert "finished" in accepted(capsys, "train", *TRAIN, *ONE, "--out", tmp_path / "r", *flags)


def test_fewer_photos_than_processes(world, tmp_path):
    """One of the two is unreadable: the first process names it, whichever met it."""
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", REPOSITORY / "train.py", *TRAIN,
               "--data", "pair.json", "--val", "one.json", "--epochs", 1, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished 1 epochs" in done.stdout and done.stdout.count("unreadable: pictures/zero.jpg") == 1
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] == 1


INTERRUPTED = {  # script: the function in which the signal arrives, arguments
    "anchors": ("fit", "--data good.json -k 1"), "benchmark": ("interleaved", "latency good.pth"), "data": ("load_picture", "--data good.json"),
    "detect": ("detect", "e/a.jpg --model good.pth --out new"), "evaluate": ("score_faces", "--data good.json --predictions r-good.json"),
    "export": ("build", "--model good.pth --out new"), "flops": ("count", ""), "sample": ("photo", "new"),
    "train": ("prepare", "--data good.json"), "wider_to_coco": ("read_sizes", "wider_val_bbx_gt.txt val new.json")}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", INTERRUPTED)
def test_interrupted(world, monkeypatch, capsys, script, number, code):
    """In training also while it runs, see test_train.py and below."""
    module, (function, words) = importlib.import_module(script), INTERRUPTED[script]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # train.py, in this process before, has changed it
    monkeypatch.setattr(module, function, lambda *_, **__: os.kill(os.getpid(), number))
    before = listing(world)
    with pytest.raises(SystemExit) as stop:
        module.main(arguments(script, words))
    after = listing(world)
    assert stop.value.code == code and "Traceback" not in capsys.readouterr().err
    assert {path for path in after.keys() - before.keys() if path.is_file()} == set()
    shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_signal_reaches_all_processes_of_a_run(world, tmp_path, number, code):
    """As Ctrl-C in a terminal does: workers too. That is saved; SIGTERM to all may leave the checkpoint before."""
    words = [*map(str, (*TRAIN, "--workers", 2, "--data", "train.json", "--epochs", 500, "--out", tmp_path / "r"))]
    process = subprocess.Popen([sys.executable, REPOSITORY / "train.py", *words], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    for line in process.stdout:
        if line.startswith("epoch 2/"):  # the first is saved by then
            break
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in error, error
    assert torch.load(tmp_path / "r/last.pth", weights_only=True)["step"] >= 2


def deadly(self, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_in_training(world, tmp_path, capsys, refused, monkeypatch):
    flags = [*TRAIN, "--data", "train.json", "--out", tmp_path / "r", "--workers", 1]
    accepted(capsys, "train", *flags, "--epochs", 1)
    before = (tmp_path / "r/last.pth").read_bytes()
    monkeypatch.setattr(data.FaceDataset, "_read", deadly)  # the worker, forked, has it
    assert "a loading process was killed" in refused(train.main, *flags, "--epochs", 2, "--resume")
    assert (tmp_path / "r/last.pth").read_bytes() == before


def test_a_killed_worker_in_evaluation(world, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(data.FaceDataset, "_read", deadly)
    line = refused(evaluate.main, "--data", "good.json", "--model", "good.pth", "--workers", 1, "--out", tmp_path / "r.json")
    assert "a loading process was killed" in line and not (tmp_path / "r.json").exists()


def test_two_runs_in_one_folder(world, tmp_path, capsys, refused):
    """The second is refused; one that was killed leaves no lock behind."""
    code = "import sys, checkpoints, pathlib; lock = checkpoints.claim(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "r"], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(world, refused):
    for script, words in (("train", "--data one.json --out new"), ("detect", "e/a.jpg --model good.pth"), ("evaluate", "--data one.json --model good.pth")):
        assert "--device cuda: not available here" in refused(importlib.import_module(script).main, *words.split(), "--device", "cuda")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("detect.choose_device", lambda name: "cuda")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="4 processes, but GPUs: 2; lower --nproc_per_node"):
        evaluate.join_processes()


def test_a_port_in_use(world, refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        line = refused(train.main, *TRAIN, *ONE, "--out", "new")
    assert "the processes cannot meet" in line and port in line and not Path("new").exists()


def test_a_million_detections_on_one_photo(world, tmp_path, capsys):
    rng = np.random.default_rng(0)
    some = json.dumps([{"image_id": 7, "category_id": 2, "bbox": box, "score": score} for box, score in
                       zip(rng.uniform(0, 30, (1000, 4)).round(1).tolist(), rng.random(1000).round(4).tolist())])[1:-1]
    (tmp_path / "r.json").write_text(f"[{','.join([some] * 1000)}]")
    assert "1,000,000 detections" in accepted(capsys, "evaluate", "--data", "good.json", "--predictions", tmp_path / "r.json")
