"""Measure speed, what is compared side by side: models, the training step, a whole recipe.

    python -m tools.benchmark latency weights/face_ssd300.pth export/model.xml            # models alone
    python -m tools.benchmark training --batch-sizes 65 260    # the step: precision, graphs, compiling
    python -m tools.benchmark recipe --data data/train.json    # minutes of the reference recipe, here
    python -m tools.benchmark peer yunet.onnx --data val.json --out yunet.json    # another detector's faces

What is compared takes turns, round by round: other load on the machine slows all of it alike. Latency is the
time for one input, through everything in the model's file, in float32 on the CPU unless it is quantised.
"""

import functools
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

from support.script import ROOT, command, Parser, require, write_json

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms
from tqdm import tqdm

import train
from data import FaceDataset
from detector import NMS_IOU, SCORE, TOP, load_detector, to_picture
from model import SSD
from support.coco import Detections, read_annotations, to_results, to_xywh
from support.distributed import choose_device
from support.options import at_least
from support.pictures import load_picture
from support.runtimes import SUFFIXES, open_network
from support.threads import usable_cores
from tools import sample

VIEWS = 12_880 * 2 * 70  # of the reference recipe on WIDER FACE: photos, passes, epochs


def interleaved(jobs, rounds, seconds=0.2):
    """Time all jobs in turn, round by round, about `seconds` in each: median seconds of a call `[J, R]`."""
    calls = [max(3, round(seconds / timeit.repeat(job, number=1, repeat=2)[1])) for job in jobs]
    measured = np.zeros((len(jobs), rounds))
    for turn in tqdm(range(rounds), "rounds", leave=False, disable=None):
        for n, job in enumerate(jobs):
            job()  # warm up again: caches and threads were busy with another job
            measured[n, turn] = np.median(timeit.repeat(job, number=1, repeat=calls[n]))
    return measured


def report(jobs, measured, unit):
    """Print a row for each job {name: job}, of `measured` `[J, R]`: median, range, ratio to the first."""
    width = max(map(len, jobs))
    for name, values, ratio in zip(jobs, measured, np.median(measured / measured[0], 1)):
        print(f"{name:{width}}  {np.median(values):8.2f} {unit} ({values.min():.2f} - {values.max():.2f})  "
              f"ratio {ratio:.3f}")


def latency(args):
    """Time the models alone, on random input of the shape that each takes."""
    jobs = {}
    rng = np.random.default_rng(0)
    for path in args.models:
        if Path(path).suffix in SUFFIXES:
            call = open_network(path, args.threads)
            shape = [side or 1 for side in call.shape]
            noise = rng.random(shape, np.float32)
            note = f"{call.runtime}, {call.metadata.get('precision', 'as released')}"
        else:
            call = load_detector(path, device="cpu")
            shape = [1, 3, *call.size[::-1]]
            noise = rng.integers(0, 256, shape, np.uint8)
            note = "PyTorch FP32"
        jobs[f"{path} ({note}, {'x'.join(map(str, shape))})"] = functools.partial(call, noise)
    print(f"latency of one input, {args.threads} threads, f32, {args.rounds} interleaved rounds")
    report(jobs, interleaved(jobs.values(), args.rounds) * 1000, "ms")


def training(args):
    """Time the training step, with the seconds to its first: precision, CUDA graph, compiling."""
    device = choose_device(args.device)
    ways = ["fp32", "bf16", "bf16 compiled"]
    if device.startswith("cuda"):
        ways = ["bf16", "bf16 graph", "bf16 compiled graph"]
    with tempfile.TemporaryDirectory() as folder:
        file = photos(args, folder)
        for size in args.batch_sizes:
            jobs = {}
            for way in ways:
                step = make_step(device, file, size, way.split()[0], "compiled" in way, "graph" in way)
                jobs[f"{way}, first step {timeit.timeit(step, number=1):.1f} s"] = step
            print(f"training step on {device}, batch {size}, {args.threads} threads")
            report(jobs, size / interleaved(jobs.values(), args.rounds, 1), "photos/s")


def make_trainer(device, file, size, precision=None, compiled=False, workers=0):
    """A Trainer of a new network on the photos of `file`, each `size` times an epoch."""
    words = ["--data", file, "--batch-size", size, "--repeat", size, "--workers", workers]
    args = train.parse_args([str(word) for word in words])
    args.precision = precision or train.choose_precision(args, None, device)
    args.compile = compiled
    trainer = train.Trainer(args, SSD(), FaceDataset(read_annotations(file), 300, 300), device=device)
    trainer.connect()
    return trainer


def make_step(device, file, size, precision=None, compiled=False, graph=True):
    """One step of train.py, on a batch of augmented photos, as a function."""
    trainer = make_trainer(device, file, size, precision, compiled)
    trainer.graphs = trainer.graphs if graph else None
    trainer.start_epoch()
    batch = next(iter(trainer.loader))
    return lambda: trainer.update(batch, 0.01).tolist()


def recipe(args):
    """Time the loader, the step and real epochs of train.py: the minutes of the reference recipe here."""
    device = choose_device(args.device)
    size = args.batch_sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        file = photos(args, folder)
        batches = iter(make_trainer(device, file, size, workers=args.workers).loader)
        next(batches)  # the workers start
        started = time.perf_counter()
        loaded = sum(len(batch.index) for batch in batches)
        loader = loaded / (time.perf_counter() - started)
        step = size / np.median(interleaved([make_step(device, file, size)], args.rounds, 1))
        words = ["--data", file, "--val", "none", "--min-face", 0, "--epochs", 2, "--lr", 0.001,
                 "--batch-size", size, "--workers", args.workers, "--device", device, "--out", folder + "/r"]
        run = [sys.executable, ROOT / "train.py", *map(str, words)]
        done = subprocess.run(run, text=True, capture_output=True)
    require(not done.returncode, done.stderr.strip()[-300:])
    whole = float(done.stdout.rsplit(" photos/s", 1)[0].rsplit(None, 1)[1])
    print(f"{device}, batch {size}, {args.workers} workers, photos a second: loader alone {loader:.0f}, "
          f"step alone {step:.0f}, the last epoch of train.py {whole:.0f}; "
          f"the {'loader' if loader < step else 'step'} limits it\n"
          f"the reference recipe, {VIEWS:,} views, takes {VIEWS / whole / 60:.0f} minutes at that speed")


def peer(args):
    """Find faces with another light detector (YuNet or UltraFace, ONNX): COCO results for evaluate.py."""
    annotations = read_annotations(args.data)
    network = open_network(args.models[0], 1)
    find = {2: ultraface, 12: yunet}.get(len(network.session.get_outputs()))
    require(find and annotations.names, f"{args.models[0]}: not YuNet or UltraFace, or {args.data} is empty")
    found = []
    for index in tqdm(range(len(annotations.ids)), leave=False, disable=None):
        picture = load_picture(annotations.file(index))
        faces, size = find(network, picture)
        faces = torch.from_numpy(faces[faces[:, 4] > SCORE])
        faces = faces[nms(faces[:, :4], faces[:, 4], NMS_IOU)[:TOP]]
        found.append(to_picture(faces, size, picture.size))
    image = np.repeat(np.arange(len(found)), [len(faces) for faces in found])
    faces = np.concatenate(found)
    write_json(args.out, to_results(annotations, Detections(image, to_xywh(faces[:, :4]), faces[:, 4])))
    print(f"wrote {args.out}: {len(faces):,} faces on {len(found):,} photos")


def ultraface(network, picture):
    """Faces `[K, 5]` by Linzaer's UltraFace, and the size of the picture in their pixels."""
    height, width = network.shape[2:]
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    scores, boxes = network(((pixels - 127) / 128).transpose(2, 0, 1)[None])
    boxes = boxes[0] * np.float32([width, height, width, height])
    return np.concatenate([boxes, scores[0, :, 1:]], 1), (width, height)


def yunet(network, picture):
    """As `ultraface`, of YuNet (Wu et al. 2023): the picture keeps its shape in the input's corner."""
    height, width = network.shape[2:]
    scale = min(width / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    canvas = np.zeros((height, width, 3), np.float32)
    canvas[:size[1], :size[0]] = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))[..., ::-1]
    outputs = network(np.ascontiguousarray(canvas.transpose(2, 0, 1)[None]))
    faces = []
    for level, stride in enumerate((8, 16, 32)):
        classes, objects, offsets = (outputs[3 * part + level][0] for part in range(3))
        y, x = np.divmod(np.arange(len(offsets)), width // stride)
        centres = (np.stack([x, y], 1) + offsets[:, :2]) * stride
        sides = np.exp(offsets[:, 2:]) * stride
        scores = np.sqrt(classes.clip(0, 1) * objects.clip(0, 1))
        faces.append(np.concatenate([centres - sides / 2, centres + sides / 2, scores], 1))
    return np.concatenate(faces).astype(np.float32), size


def photos(args, folder):
    """The path of --data, or else of a synthetic dataset, 1024x768, which is drawn into `folder`."""
    if not args.data:
        sample.draw_sample(folder, train=64, val=1, size=(1024, 768))
    return args.data or Path(folder) / "train.json"


@command
def main(argv=None):
    """Measure what the first argument names."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", choices=("latency", "training", "recipe", "peer"))
    add("models", nargs="*", help="latency: .pth, .onnx or .xml; ratios are to the first; peer: its .onnx")
    add("--threads", type=at_least(1), default=1, help="of the model or step (default 1)")
    add("--rounds", type=at_least(1), default=5, help="of measurement (default 5)")
    add("--data", help="COCO json (default: 64 synthetic photos)")
    add("--out", help="peer: COCO results json to write")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--batch-sizes", type=at_least(1), nargs="+", default=[65], help="default 65; recipe uses the first")
    add("--workers", type=at_least(0), default=usable_cores(), help="recipe: loading processes")
    args = parser.parse_args(argv)
    given = {"latency": args.models, "peer": args.models and args.data and args.out}
    if not given.get(args.command, True):
        parser.error("latency needs models; peer needs a model, --data and --out")
    torch.set_num_threads(args.threads)
    {"latency": latency, "training": training, "recipe": recipe, "peer": peer}[args.command](args)


if __name__ == "__main__":
    main()
