"""Build a folder of files that are wrong in many ways: pictures, annotations, predictions, models, flags."""

import importlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image

from model import SSD, Config, checkpoint
from support.pictures import ORIENTATION
from tools.sample import draw_sample
from test_wider import write_ground_truth

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
TRAIN = ("--size 64 --width 0.25 --batch-size 3 --repeat 1 --warmup 3 --lr 0.01 --min-face 0 --workers 0 "
         "--device cpu").split()
NAN, INF = float("nan"), float("inf")


class Hostile:
    """An object that creates the file `ran` when it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


def png(width, height):
    """Make a small PNG file whose header promises a picture of `width` x `height`."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


UNREADABLE = {  # file: part of the message
    "truncated.jpg": "truncated",
    "zero.jpg": "cannot identify",
    "text.jpg": "cannot identify",
    "folder.jpg": "no such picture",
    "absent.jpg": "no such picture",
    "pipe.jpg": "no such picture",
    "bomb.png": "decompression bomb",
    "half.png": "cannot be read",
    "size.png": "is 30x20, but",
    "exif.jpg": "is 20x30, but",
    "long" * 99 + ".jpg": "no such picture",
    "\x1b[2J\n.jpg": "no such picture",
}
UNUSUAL = {  # file: (width, height) once it is loaded
    "1x1.png": (1, 1),
    "1x10000.png": (1, 10000),
    "10000x1.jpg": (10000, 1),
    "wide.jpg": (20000, 30),
    "animated.gif": (30, 20),
    "cmyk.jpg": (30, 20),
    "16bit.png": (30, 20),
    "upright.jpg": (20, 30),
    "alpha.webp": (30, 20),
    "bits.png": (30, 20),
}


def draw_pictures(folder):
    """Write the files of UNREADABLE and UNUSUAL."""
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
    for name in ("upright.jpg", "exif.jpg"):  # exif.jpg is annotated with its size before turning
        noise.save(folder / name, exif=exif)
    noise.resize((300, 200)).save(folder / "truncated.jpg")
    os.truncate(folder / "truncated.jpg", 9000)
    for name, content in (("zero.jpg", b""), ("text.jpg", b"no picture"),
                          ("bomb.png", png(50000, 50000)), ("half.png", png(30, 20))):
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


def coco(**changes):
    """A COCO content: image 7 with one face, image 3 without, category 2; `changes` replace entries."""
    return {"images": [{"id": 7, "file_name": "e/a.jpg", "width": 30, "height": 20},
                       {"id": 3, "file_name": "e/b.jpg"}],
            "annotations": [{"id": 5, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 4]}],
            "categories": [{"id": 2, "name": "face"}]} | changes


def face(**changes):
    """A list of one annotation of `coco`; `changes` replace its entries."""
    return [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]} | changes]


def pictured(names):
    """A COCO content with one face on each of the pictures `names`; some are listed with a wrong size."""
    wrong = {"size.png": (20, 30), "exif.jpg": (30, 20)}
    images = [{"id": n, "file_name": f"pictures/{name}"}
              | (dict(zip(("width", "height"), wrong[name])) if name in wrong else {})
              for n, name in enumerate(names)]
    return {"images": images,
            "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 1, 1]}
                            for n in range(len(images))],
            "categories": [{"id": 1, "name": "face"}]}


JSONS = {
    "cut": '{"images": [',
    "list": "[]",
    "keys": {"images": []},
    "no-id": coco(images=[{"file_name": "a"}]),
    "unnamed": coco(images=[{"id": 7}]),
    "nan": coco(annotations=face(bbox=[1, 2, 3, NAN])),
    "inf": coco(annotations=face(bbox=[1, INF, 3, 4])),
    "object": coco(annotations=face(bbox={"x": 1})),
    "size": coco(images=[{"id": 7, "file_name": "a", "width": NAN}]),
    "cat-dog": coco(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]),
    "no-photos": coco(images=[], annotations=[]),
    "category": coco(annotations=face(category_id=[2]), categories=None),
    "stranger": coco(annotations=face(category_id=3)),
    "good": coco(),
    "one": None,
    "bad": None,
    "flat": coco(images=[{"id": 7, "file_name": "a.jpg"}], annotations=face()),
    "odd": coco(annotations=[  # the last box is only partly outside
        dict(*face(), id=n, bbox=box) for n, box in enumerate(
            [[1, 2, 0, 4], [1, 2, -3, 4], [-9, 2, 5, 5], [100, 2, 5, 5], [-5, -5, 20, 20]])]),
    "no-faces": coco(annotations=[]),
    "no-categories": {key: value for key, value in coco().items() if key != "categories"},
    "persons": coco(annotations=face(category_id=4) + face(id=2),
                    categories=[{"id": 4, "name": "person"}, {"id": 2, "name": "Face"}]),
    "bom": "\ufeff" + json.dumps(coco()).replace(",", ",\r\n"),
    "pair": None,
    "r-none": [],
    # detections in COCO form, to be scored on good.json
    "r-list": {},
    "r-image": [{"image_id": 8, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}],
    "r-nan": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": NAN}],
    "r-score": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": True}],
    "r-good": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, -3, 4], "score": 2}],
}


def draw_models(folder):
    """Write model files: one good, the others wrong, each in its own way."""
    good = checkpoint(SSD(Config.scaled_from_300(64, 48, width=0.25)))
    state, config = good["state_dict"], good["config"]
    contents = {
        "good": good,
        "hostile": {"state_dict": Hostile()},
        "other": {"state_dict": {"fc.weight": torch.ones(2, 2)}},
        "tensor": torch.ones(3),
        "shape": {"config": config | {"width": 0.5}, "state_dict": state},
        "wide": {"config": config | {"width": 90.0}, "state_dict": state},
        "anchors": {"config": config | {"anchors": [[NAN, 3.0]]}, "state_dict": state},
        "keys": {"config": {"layers": 3}, "state_dict": state},
        "nan": {"config": config, "state_dict": state | {"backbone.bn_first.bias": torch.full([3], NAN)}},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    whole = (folder / "good.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "text.onnx").write_text("no model")
    (folder / "text.xml").write_text("<no/>")
    (folder / "text.bin").write_bytes(b"")
    (folder / "alone.xml").write_text("<net/>")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 48, 64]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
              folder / "relu.onnx")


def build(folder):
    """Write all files that the tests of test_hard_days.py and test_hard_runs.py use."""
    torch.manual_seed(0)
    draw_sample(folder, train=6, val=3, size=(160, 120))
    (folder / "e").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 20)).save(folder / f"e/{name}.jpg")
    draw_pictures(folder / "pictures")
    draw_models(folder)
    for name, content in JSONS.items():
        content = {"one": coco(images=coco()["images"][:1]), "bad": pictured(UNREADABLE),
                   "pair": pictured(["zero.jpg", "1x1.png"])}.get(name, content)
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "binary.json").write_bytes(b"\xff\xfe\0")
    (folder / "open.txt").write_text("--out 'a\n")
    for name in ("run", "predictions", "hostile", "broken"):
        (folder / name).mkdir()
    write_ground_truth(folder / "hostile", events=("..", "b"))
    write_ground_truth(folder / "broken")
    os.truncate(folder / "broken/wider_hard_val.mat", 99)
    (folder / "run/last.pth").write_bytes(b"of another run")


def listing(folder):
    """Everything in a folder, with the times of change of its files."""
    return {path: None if path.is_dir() else path.stat().st_mtime_ns for path in folder.rglob("*")}


def arguments(script, words):
    """Split the words of a case; for train.py, add small settings and --out."""
    words = words.split()
    defaults = (["--out", "new"] if "--out" not in words else []) if script == "train" else []
    return [*(TRAIN[4:] if script == "train" else []), *defaults, *words]


def run(*words, **more):
    """Run Python on `words` in a process of its own."""
    return subprocess.run([sys.executable, *map(str, words)], env=ENVIRONMENT,
                          capture_output=True, text=True, **more)


def accepted(capsys, script, *words):
    """Run a script's main, which must succeed; returns what it printed."""
    importlib.import_module(script).main([str(word) for word in words])
    return capsys.readouterr().out
