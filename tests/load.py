"""Measure time and memory at 25,000, 50,000 and 100,000 generated photos of 10 faces each. Run by hand:

    python tests/load.py                                   # conversion, evaluation, start of training
    python tests/load.py evaluation --counts 100000

Each figure is from a process of its own. All photos are links to a few tiny files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
FACES, SIDES = 10, (320, 240)  # of each photo


def boxes(rng, count):
    """Random faces `[count, FACES, 4]`, xywh in whole pixels, inside the photo."""
    sides = rng.integers(10, 90, (count, FACES, 2))
    return np.concatenate([(rng.random((count, FACES, 2)) * (SIDES - sides)).astype(int), sides], 2)


def photo(index):
    """The name of photo `index`."""
    return f"{index // 1000}--Event/{index}.jpg"


def generate(folder, count):
    """Write val.json, results.json (as many detections as faces), wider.txt and the photos."""
    rng, lines, annotations, detections = np.random.default_rng(0), [], [], []
    truth = boxes(rng, count)
    found = (truth + rng.integers(-4, 5, truth.shape)).tolist()
    for image, (own, seen) in enumerate(zip(truth.tolist(), found)):
        lines += [photo(image), str(FACES), *(" ".join(map(str, box)) + " 0 0 0 0 0 0" for box in own)]
        annotations += [{"id": image * FACES + n, "image_id": image, "category_id": 1, "bbox": box}
                        for n, box in enumerate(own)]
        detections += [{"image_id": image, "category_id": 1, "bbox": box, "score": round(float(score), 5)}
                       for box, score in zip(seen, rng.random(FACES))]
    images = [{"id": image, "file_name": f"images/{photo(image)}", "width": SIDES[0], "height": SIDES[1]}
              for image in range(count)]
    (folder / "val.json").write_text(json.dumps({"images": images, "annotations": annotations,
                                                 "categories": [{"id": 1, "name": "face"}]}))
    (folder / "results.json").write_text(json.dumps(detections))
    (folder / "wider.txt").write_text("\n".join(lines) + "\n")
    from PIL import Image
    for image in range(count):
        path = folder / "images" / photo(image)
        if image % 1000 == 0:
            path.parent.mkdir(parents=True)
        if image % 10000 == 0:  # file systems limit the number of links to a file
            Image.new("RGB", SIDES).save(path)
            first = path
        else:
            os.link(first, path)


def private_memory(pid):
    """The memory in MB that a process shares with no other (Linux)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in text if line.startswith("Private_")) / 1024


def start_training(data, workers):
    """Load the first batches of an epoch and print the time and memory in one line."""
    from data import FaceDataset, TrainBatches, make_loader
    from support.coco import read_annotations
    start = time.perf_counter()
    annotations = read_annotations(data)
    read = time.perf_counter() - start
    dataset = FaceDataset(annotations, 300, 300)
    del annotations
    start = time.perf_counter()
    iterator = iter(make_loader(dataset, TrainBatches(len(dataset), 65, repeat=2), workers))
    next(iterator)
    first = time.perf_counter() - start
    for _ in range(20):
        next(iterator)
    children = subprocess.run(["pgrep", "-P", str(os.getpid())],
                              capture_output=True, text=True).stdout.split()
    own = [private_memory(pid) for pid in children if Path(f"/proc/{pid}/smaps_rollup").exists()
           and "python" in Path(f"/proc/{pid}/cmdline").read_text()]
    print(f"annotations read in {read:.1f} s, first batch after {first:.1f} s; "
          f"main process {private_memory(os.getpid()):.0f} MB, "
          f"each worker {max(own, default=0):.0f} MB of its own")


def measured(*words):
    """Run Python on `words`: seconds, peak memory in MB, and the last line it printed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output.splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", default=["conversion", "evaluation", "training"])
    add("--counts", type=int, nargs="+", default=[25_000, 50_000, 100_000], help="numbers of photos")
    add("--start", type=int, metavar="WORKERS", help=argparse.SUPPRESS)  # of a process that this one starts
    args = parser.parse_args()
    if args.start is not None:
        return start_training(args.what[0], args.start)
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            generate(folder, count)
            if "conversion" in args.what:
                seconds, memory, _ = measured(REPOSITORY / "wider_to_coco.py", folder / "wider.txt",
                                              folder / "images", folder / "out.json")
                print(f"{count:>8,} photos: conversion  {seconds:6.1f} s {memory:6.0f} MB", flush=True)
            if "evaluation" in args.what:
                seconds, memory, _ = measured(REPOSITORY / "evaluate.py", "--data", folder / "val.json",
                                              "--predictions", folder / "results.json")
                print(f"{count:>8,} photos: evaluation  {seconds:6.1f} s {memory:6.0f} MB", flush=True)
            for workers in (0, 2, 4) if "training" in args.what else ():
                _, _, line = measured(__file__, folder / "val.json", "--start", workers)
                print(f"{count:>8,} photos, {workers} workers: {line}", flush=True)


if __name__ == "__main__":
    main()
