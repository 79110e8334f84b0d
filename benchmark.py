"""How fast models are beside each other: rounds of all of them in turn, so that a busy machine disturbs all alike.

    python benchmark.py latency weights/face_ssd300.pth export/model.onnx export/model.xml      # the models alone
    python benchmark.py pictures export/model.xml embedded/model.xml --data data/val.json       # picture to boxes

Latency is of one input of each model's own size through everything in its file; of a checkpoint, through the network and
the NMS. Every model computes in float32 on the CPU, except where its file is quantised.
"""
import argparse
import os
import platform
import sys
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
    """A table: median, least and most of the rounds in ms, and the median of the ratios to the first, round by round."""
    width = max(map(len, names))
    print(f"{'':{width}}   median      least -     most ms   ratio   ")
    for name, note, times, ratio in zip(names, notes, measured * 1000, np.median(measured / measured[0], 1)):
        print(f"{name:{width}} {np.median(times):8.2f}   {times.min():8.2f} - {times.max():8.2f}   {ratio:6.3f}   {note}")


def setting(args, what):
    """One line on how the figures came about."""
    print(f"{what}; {args.threads} thread{'s' * (args.threads > 1)}, f32, {args.rounds} interleaved rounds, "
          f"{platform.machine()} CPU, torch {torch.__version__.split('+')[0]}")


def latency(args):
    """The models alone, on noise of the shape that each takes."""
    jobs, notes, rng = [], [], np.random.default_rng(0)
    for path in args.models:
        if Path(path).suffix in SUFFIXES:
            network = open_network(path, args.threads)
            shape = [1, *(side or fallback for side, fallback in zip(network.shape[1:], (360, 640, 3)))]
            noise = rng.integers(0, 256, shape, np.uint8)
            job = lambda network=network, noise=noise if network.uint8 else noise.astype(np.float32) / 255: network(noise)
            note = f"{network.runtime}, {network.metadata.get('precision', 'as released')}"
        else:
            detector = load_detector(path, device="cpu")
            shape = [1, 3, *detector.size[::-1]]
            noise = torch.from_numpy(rng.integers(0, 256, shape, np.uint8))
            job, note = (lambda detector=detector, noise=noise: detector(noise)), "PyTorch, FP32"
        jobs.append(job)
        notes.append(f"{note}, {'x'.join(map(str, shape))}")
    setting(args, "latency of one input")
    report(args.models, notes, interleaved(jobs, args.rounds))


def pictures(args):
    """From a decoded picture to faces in its pixels, over several pictures: all that an application does but the decoding."""
    if args.data:
        annotations = read_annotations(args.data)
        chosen = np.linspace(0, len(annotations.ids) - 1, min(8, len(annotations.ids))).round().astype(int)
        images = [load_picture(annotations.file(index)) for index in chosen]
    else:
        images = [sample.photo(np.random.default_rng(n), 640, 480, False)[1] for n in range(8)]
    if not images:
        raise InputError(f"{args.data}: no photos")
    detectors = [load_exported(path, threads=args.threads) if Path(path).suffix in SUFFIXES else load_detector(path, device="cpu")
                 for path in args.models]
    jobs = [lambda detector=detector: [detect(detector, image) for image in images] for detector in detectors]
    notes = ["takes whole pictures" if one.size is None else "resized in Python to {}x{}".format(*one.size) for one in detectors]
    sizes = sorted({f"{image.width}x{image.height}" for image in images})
    setting(args, f"picture to boxes, mean of {len(images)} pictures ({', '.join(sizes[:3])}{', ...' * (len(sizes) > 3)})")
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
    if getattr(args, "threads", 1) < 1 or getattr(args, "rounds", 1) < 1:
        parser.error("--threads and --rounds must be at least 1")
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
