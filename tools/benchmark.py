"""Measure speed: models side by side, data loading, the training step, a whole epoch.

    python -m tools.benchmark latency weights/face_ssd300.pth export/model.onnx export/model.xml  # the models alone
    python -m tools.benchmark pictures export/model.xml embedded/model.xml --data data/val.json   # picture to boxes
    python -m tools.benchmark loading   # data.py against torchvision's transforms
    python -m tools.benchmark training --batch-sizes 32 --threads 2   # the step: precision, compiling, memory
    python -m tools.benchmark epoch --data data/train.json   # loader, step, and both together

What is compared takes turns, round by round, so that other load on the machine slows all of it alike. Latency
is the time for one input of the model's own size, through everything in its file (for a checkpoint, the
network and NMS). Models compute in float32 on the CPU, except quantised ones.
"""

import argparse
import functools
import multiprocessing
import os
import platform
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from support.script import InputError, command, keep_memory, new_parser

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.transforms import v2
from tqdm import tqdm

from tools import sample
import train
from support.coco import read_annotations
from data import FaceDataset, collate
from detector import detect, load_detector
from support.distributed import choose_device
from model import SSD
from support.pictures import load_picture
from support.runtimes import SUFFIXES, open_network


def interleaved(jobs, rounds, seconds=0.2):
    """Time each job in turn, round by round: seconds per call `[len(jobs), rounds]`, the median of a round.

    In a round each job runs for about `seconds`. Two calls before the first round warm up; the second of them
    determines how many calls a round has.
    """
    calls = []
    for job in jobs:
        job()
        start = time.perf_counter()
        job()
        calls.append(max(3, round(seconds / (time.perf_counter() - start))))
    measured = np.zeros((len(jobs), rounds))
    for turn in tqdm(range(rounds), "rounds", leave=False, disable=None):
        for n, job in enumerate(jobs):
            times = []
            job()  # warm up again: caches and threads were busy with another job
            for _ in range(calls[n]):
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
            measured[n, turn] = np.median(times)
    return measured


def report(names, notes, measured):
    """Print a table of times, measured `[jobs, rounds]` in seconds: median, range in ms, and a ratio.

    The ratio is to the first job, taken in each round; the table has the median over the rounds.
    """
    width = max(map(len, names))
    print(f"{'':{width}}  median ms    least -     most   ratio")
    for name, note, times, ratio in zip(names, notes, measured * 1000, np.median(measured / measured[0], 1)):
        spread = f"{times.min():8.2f} - {times.max():8.2f}"
        print(f"{name:{width}}  {np.median(times):9.2f} {spread} {ratio:7.3f}   {note}")


def setting(args, what):
    """Print one line that says what was measured, and how."""
    print(f"{what}; {args.threads} thread{'s' * (args.threads > 1)}, f32, {args.rounds} interleaved rounds, "
          f"{platform.machine()} CPU, torch {torch.__version__.split('+')[0]}")


def latency(args):
    """Time the models alone, on random input of the shape that each takes."""
    jobs, notes, rng = [], [], np.random.default_rng(0)
    for path in args.models:
        if Path(path).suffix in SUFFIXES:
            call = open_network(path, args.threads)
            # A model that takes any size, [1, h, w, 3], gets a 640x360 frame.
            shape = [1, *(side or frame for side, frame in zip(call.shape[1:], (360, 640, 3)))]
            noise = rng.integers(0, 256, shape, np.uint8)
            noise = noise if call.uint8 else np.divide(noise, 255, dtype=np.float32)
            note = f"{call.runtime}, {call.metadata.get('precision', 'as released')}"
        else:
            call = load_detector(path, device="cpu")
            shape = [1, 3, *call.size[::-1]]
            noise, note = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)), "PyTorch, FP32"
        jobs.append(functools.partial(call, noise))
        notes.append(f"{note}, {'x'.join(map(str, shape))}")
    setting(args, "latency of one input")
    report(args.models, notes, interleaved(jobs, args.rounds))


def pictures(args):
    """Time the way from decoded pictures to faces in their pixels."""
    if args.data:
        annotations = read_annotations(args.data)
        chosen = np.linspace(0, len(annotations.ids) - 1, min(8, len(annotations.ids))).round().astype(int)
        images = [load_picture(annotations.file(index)) for index in chosen]
    else:
        images = [sample.photo(np.random.default_rng(n), 640, 480, False)[1] for n in range(8)]
    if not images:
        raise InputError(f"{args.data}: no photos")

    detectors = [load_detector(path, device="cpu", threads=args.threads) for path in args.models]
    jobs = [lambda detector=detector: [detect(detector, image) for image in images] for detector in detectors]
    notes = ["resized in Python to {}x{}".format(*one.size) if one.size else "resized inside"
             for one in detectors]
    sides = np.array([image.size for image in images]).mean(0)
    setting(args, "picture to boxes, mean of {} pictures of {:.0f}x{:.0f} on average".format(
        len(images), *sides))
    report(args.models, notes, interleaved(jobs, args.rounds) / len(images))


def loading(args):
    """Compare data.py with torchvision's transforms for the same steps: augmented 300x300 photos a second."""
    with photos_for(args) as file:
        annotations = read_annotations(file)
        ours = FaceDataset(annotations, 300, 300)
        corners, transform = torch.from_numpy(ours.faces), v2.Compose([
            v2.RandomPhotometricDistort(), v2.RandomZoomOut(0, (1, 2), 0.5), v2.RandomIoUCrop(0.1, 1, 0.5, 2),
            v2.SanitizeBoundingBoxes(labels_getter=None), v2.Resize((300, 300)), v2.RandomHorizontalFlip()])

        def theirs(index):
            picture = tv_tensors.Image(decode_image(str(annotations.file(index)), ImageReadMode.RGB))
            own = corners[ours.starts[index]:ours.starts[index + 1]]
            return transform(picture, tv_tensors.BoundingBoxes(own, format="XYXY",
                                                               canvas_size=picture.shape[1:]))

        chosen = range(min(len(ours), args.photos))
        jobs = [lambda: [theirs(index) for index in chosen],
                lambda: [ours[index, (0, index)] for index in chosen]]
        measured = interleaved(jobs, args.rounds, 0)
    sizes = np.unique(annotations.sizes, axis=0)
    print(f"loading on one core, {len(chosen)} photos of "
          f"{np.median(sizes[:, 0]):.0f}x{np.median(sizes[:, 1]):.0f} (median)")
    speeds(["torchvision", "data.py"], len(chosen) / measured)


def training(args):
    """Time the training step: precision, compiling, freed memory kept or not; torchvision's beside it."""
    compiled = [] if (trouble := train.cannot_compile(choose_device(args.device))) else [True]
    if trouble:
        print(f"not compiled: {trouble}")
    rows = [("train.py", precision, compiles) for compiles in (False, *compiled)
            for precision in ("fp32", "bf16")] + [("torchvision ssdlite320", "fp32", False)]
    context = multiprocessing.get_context("spawn")
    with photos_for(args) as file:
        for size in args.batch_sizes:
            jobs, names, first, helpers = [], [], [], []
            for keeps in (False, True):
                mine, its = context.Pipe()
                how = {"device": args.device, "threads": args.threads}
                helpers.append((mine, context.Process(
                    target=step_on_request, args=(its, how, str(file), size, keeps), daemon=True)))
                helpers[-1][1].start()
                its.close()  # else, should that process fail, this one would wait for its answer for ever
                for row in rows:
                    jobs.append(lambda pipe=mine, row=row: (pipe.send(row), pipe.recv()))
                    names.append(f"{row[0]} {row[1]}{', compiled' if row[2] else ''}, "
                                 f"memory {'kept' if keeps else 'given back'}")
                    started = time.perf_counter()
                    jobs[-1]()
                    first.append(time.perf_counter() - started)
            print(f"training step, batch {size}, {args.threads} threads; the seconds are of the first call")
            measured = interleaved(jobs, args.rounds, 1)
            speeds([f"{name:54}{once:4.0f} s" for name, once in zip(names, first)], size / measured)
            for pipe, process in helpers:
                pipe.close()
                process.join()


def step_on_request(pipe, how, file, size, keeps):
    """Do one training step for each row (whose, precision, compiled) that comes through `pipe`; answer then.

    A process of its own: whether freed memory is kept holds for a whole process.
    """
    if keeps:
        keep_memory()
    torch.set_num_threads(how["threads"])
    args, steps = argparse.Namespace(**how), {}
    with suppress(EOFError):  # the end: nothing more is asked
        while True:
            row = pipe.recv()
            if row not in steps:
                make = our_step if row[0] == "train.py" else torchvision_step
                steps[row] = make(args, file, size, *row[1:])
            pipe.send(steps[row]())


def our_step(args, file, size, precision, compiles):
    """One step of train.py on a batch of augmented photos, as a function."""
    trainer = make_trainer(args, file, size, precision, 0, compiles)
    trainer.raw_model.train()
    photos = trainer.loader.dataset
    batch = collate([photos[index % len(photos), (0, index)] for index in range(size)])
    return lambda: trainer.update(batch, 0.05).tolist()


def torchvision_step(args, file, size, *_):
    """One step of torchvision's light SSD on a batch of noise with five faces each, as a function."""
    device = choose_device(args.device)
    model = ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=2).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    images = list(torch.rand(size, 3, 320, 320, device=device))
    corners = 200 * torch.rand(size, 5, 2, device=device)
    targets = [{"boxes": torch.cat([own, own + 60], 1), "labels": torch.ones(5, dtype=int, device=device)}
               for own in corners]

    def step():
        optimizer.zero_grad()
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def epoch(args):
    """Time a whole epoch, and its two parts alone (loading in --workers processes, step): photos a second."""
    with photos_for(args) as file:
        size = args.batch_sizes[0]
        trainer, stop = make_trainer(args, file, size, args.precision, args.workers), NoStop()
        train.train_one_epoch(trainer, stop)  # warm up: workers start, kernels are chosen
        started = time.perf_counter()
        loaded = sum(len(batch.index) for batch in trainer.loader)
        loader_speed = loaded / (time.perf_counter() - started)
        train.train_one_epoch(trainer, stop)
        batch = next(iter(trainer.loader))
        steps = interleaved([lambda: trainer.update(batch, 0.05).tolist()], args.rounds, 1)
    whole = trainer.record["photos_per_second"]
    print(f"an epoch on {trainer.device}, batch {size}, {args.precision}, {args.workers} workers, "
          f"photos a second: loader alone {loader_speed:.0f}, step alone {size / np.median(steps):.0f}, "
          f"together {whole:.0f}\n"
          "the whole recipe (12,880 photos x 2 x 70 epochs) at that speed: "
          f"{12_880 * 2 * 70 / whole / 60:.0f} minutes")


class NoStop:
    """In the place of distributed.StopFlag: Ctrl-C ends the measurement, nothing is saved."""

    def at_once(self, ends):
        """Ctrl-C ends it as it ends any script."""

    def agreed(self):
        """Nobody asks the run to stop."""
        return False


def speeds(names, measured):
    """Print a table of photos a second, measured `[jobs, rounds]`, and the median ratio to the first job."""
    for name, values, ratio in zip(names, measured, np.median(measured / measured[0], 1)):
        print(f"{name:34} {np.median(values):8.1f} photos/s "
              f"({values.min():.1f} - {values.max():.1f})  ratio {ratio:.2f}")


@contextmanager
def photos_for(args):
    """Yield the path of --data, or else of a dataset drawn for the purpose, 1024x768."""
    if args.data:
        yield args.data
    else:
        with tempfile.TemporaryDirectory() as folder:
            sample.draw_sample(Path(folder), train=args.photos, val=1, size=(1024, 768))
            yield Path(folder) / "train.json"


def make_trainer(args, file, batch_size, precision, workers, compiles=False):
    """Make a Trainer of a new network on the photos of `file`, which does not save."""
    device = choose_device(args.device)
    flags = train.parse_args(["--data", str(file), "--batch-size", str(batch_size), "--precision", precision,
                              "--workers", str(workers), "--min-face", "0", "--save-every", "1000000000",
                              "--compile" if compiles else "--no-compile"])
    trainer = train.Trainer(flags, SSD(), FaceDataset(read_annotations(file), 300, 300), device=device)
    trainer.connect()
    return trainer


@command
def main(argv=None):
    """Measure what the first argument names."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in (("latency", latency), ("pictures", pictures)):
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        add = one.add_argument
        add("models", nargs="+", help=".pth, .onnx or .xml; ratios are to the first")
        add("--threads", type=int, default=1, help="threads of each model (default %(default)s)")
        add("--rounds", type=int, default=7, help="rounds of measurement (default %(default)s)")
        one.set_defaults(run=run)
        if name == "pictures":
            add("--data", help="COCO json whose photos are used (default: drawn ones, 640x480)")
    for run, rounds in ((loading, 3), (training, 5), (epoch, 5)):
        one = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        add = one.add_argument
        add("--data", help="COCO json whose photos are used (default: drawn ones, 1024x768)")
        add("--photos", type=int, default=64, help="photos to draw, or to load at most (default %(default)s)")
        add("--threads", type=int, default=1, help="threads of the step or the loader (default %(default)s)")
        add("--rounds", type=int, default=rounds, help="rounds of measurement (default %(default)s)")
        if run is not loading:
            add("--device", help="cuda, mps or cpu (default: the first there is)")
            add("--batch-sizes", type=int, nargs="+", default=[65], help="default 65; epoch uses the first")
        if run is epoch:
            add("--workers", type=int, default=os.cpu_count(), help="loading processes (default %(default)s)")
            add("--precision", choices=("fp32", "bf16"), default="fp32", help="default %(default)s")
        one.set_defaults(run=run)
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
