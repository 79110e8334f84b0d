"""How fast models are beside each other: rounds of all of them in turn, so that a busy machine disturbs all alike.

    python benchmark.py latency weights/face_ssd300.pth export/model.onnx export/model.xml      # the models alone
    python benchmark.py pictures export/model.xml embedded/model.xml --data data/val.json       # picture to boxes

Latency is that of one input of the model's own size, through all that its file holds; for a checkpoint, through the
network and the NMS. All compute in float32 on the CPU, except where a file is quantised.
"""
import argparse
import functools
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sample
from detect import detect, load_detector
from formats import InputError, command, read_annotations
from pictures import load_picture
from runtimes import SUFFIXES, load_exported, open_network


def interleaved(jobs, rounds, seconds=0.2):
    """Seconds per call `[len(jobs), rounds]`: in every round each job in turn is called for about `seconds`.

    A round's figure is the median of its calls; the first, which warms up, also says how many calls those are.
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
            job()  # brings its weights and threads back
            for _ in range(calls[n]):
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
            measured[n, turn] = np.median(times)
    return measured


def report(names, notes, measured):
    """A table of seconds `[jobs, rounds]`: median, least and most in ms, and the rounds' median ratio to the first."""
    width = max(map(len, names))
    print(f"{'':{width}}  median ms    least -     most   ratio")
    for name, note, times, ratio in zip(names, notes, measured * 1000, np.median(measured / measured[0], 1)):
        spread = f"{times.min():8.2f} - {times.max():8.2f}"
        print(f"{name:{width}}  {np.median(times):9.2f} {spread} {ratio:7.3f}   {note}")


def setting(args, what):
    """One line on how the figures came about."""
    print(f"{what}; {args.threads} thread{'s' * (args.threads > 1)}, f32, {args.rounds} interleaved rounds, "
          f"{platform.machine()} CPU, torch {torch.__version__.split('+')[0]}")


def latency(args):
    """The models alone, on noise of the shape that each takes."""
    jobs, notes, rng = [], [], np.random.default_rng(0)
    for path in args.models:
        if Path(path).suffix in SUFFIXES:
            call = open_network(path, args.threads)
            # Where a model leaves sides free they are those of a 640x360 frame, [1, h, w, 3].
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
    """From a decoded picture to faces in its pixels, over several pictures."""
    if args.data:
        annotations = read_annotations(args.data)
        chosen = np.linspace(0, len(annotations.ids) - 1, min(8, len(annotations.ids))).round().astype(int)
        images = [load_picture(annotations.file(index)) for index in chosen]
    else:
        images = [sample.photo(np.random.default_rng(n), 640, 480, False)[1] for n in range(8)]
    if not images:
        raise InputError(f"{args.data}: no photos")

    def load(path):
        exported = Path(path).suffix in SUFFIXES
        return load_exported(path, threads=args.threads) if exported else load_detector(path, device="cpu")

    detectors = [load(path) for path in args.models]
    jobs = [lambda detector=detector: [detect(detector, image) for image in images] for detector in detectors]
    notes = ["resized in Python to {}x{}".format(*one.size) if one.size else "resized inside" for one in detectors]
    sides = np.array([image.size for image in images]).mean(0)
    setting(args, "picture to boxes, mean of {} pictures of {:.0f}x{:.0f} on average".format(len(images), *sides))
    report(args.models, notes, interleaved(jobs, args.rounds) / len(images))


@command
def main(argv=None):
    """Measure what the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in (("latency", latency), ("pictures", pictures)):
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        one.add_argument("models", nargs="+", help=".pth, .onnx or .xml; ratios are to the first")
        one.add_argument("--threads", type=int, default=1, help="of every model (default %(default)s)")
        one.add_argument("--rounds", type=int, default=7, help="(default %(default)s)")
        one.set_defaults(run=run)
        if name == "pictures":
            one.add_argument("--data", help="COCO json whose photos are used (default: drawn ones, 640x480)")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
