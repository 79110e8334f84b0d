"""Measure a detector, or existing predictions: COCO's 12 numbers, AP by face size, WIDER FACE easy / medium / hard.

    python evaluate.py --data data/val.json                                 # the shipped model; --out saves detections
    python evaluate.py --data data/val.json --model runs/face/best.pth --size 640 --plot pr.png --worst 12
    python evaluate.py --wider                                              # runs over WIDER val, made by wider_to_coco.py
    python evaluate.py --wider --predictions FOLDER_OR_RESULTS.json         # scores what any detector has written
    torchrun --nproc_per_node 4 evaluate.py --data data/val.json            # the same digits from several processes
"""
import argparse
import hashlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest

import numpy as np

import metrics
import wider
from formats import (InputError, command, parse_picture, parse_size, read_annotations, read_results, results,
                     whole_file, write_json)

DATA, MODEL = "data/val.json", "weights/face_ssd300.pth"
# torch is imported only where a model runs: scoring predictions does without it.


@dataclass
class Detections:
    """What was found on the photos of some Annotations, in any order."""
    image: np.ndarray   # [D] int64, indices of photos
    xywh: np.ndarray    # [D, 4] float64, pixels of the photo
    score: np.ndarray   # [D] float64


def join_processes(device=None):
    """(rank, processes, device) of this process; under torchrun it joins the others, and a GPU is its own."""
    import torch
    import torch.distributed as dist

    from detect import choose_device
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, choose_device(device)
    local = int(os.environ["LOCAL_RANK"])
    if (device or "cuda") == "cuda" and torch.cuda.is_available():
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
        if wanted > there:
            raise InputError(f"{wanted} processes, but GPUs: {there}; lower --nproc_per_node or give --device cpu")
        torch.cuda.set_device(local)  # before the first tensor, which else takes memory on GPU 0 for every process
        device = f"cuda:{local}"
    device = choose_device(device)
    if not dist.is_initialized():
        try:
            store, rank, processes = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps one store through its restarts, in which the addresses of processes that died are still to be
                # read (pytorch/pytorch#135712). On several nodes the counts of restarts can differ: see the README.
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the processes cannot meet ({str(error).splitlines()[0][:160]}); start them with torchrun, "
                             "with --standalone or a free --master_port") from None
    return dist.get_rank(), dist.get_world_size(), device


def leave_processes():
    """End the group that join_processes has joined, once its last exchange is over everywhere."""
    import torch.distributed as dist
    dist.barrier()
    dist.destroy_process_group()


def run_detector(detector, annotations, batch_size=16, workers=2, rank=0, processes=1):
    """Run `detector` over all photos: their Detections, sorted by photo, and {index: line} of the unreadable ones.

    Several processes share the photos, and each gets the whole result, the same as one process would.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    from data import FaceDataset, eval_batches, make_loader
    from detect import to_picture
    # A detector without a size takes whole pictures, one at a time.
    batches = eval_batches(len(annotations.ids), batch_size if detector.size else 1, rank, processes)
    loader = make_loader(FaceDataset(annotations, *(detector.size or ())), batches, workers)
    found, errors = {}, {}
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=True if rank else None):
        for index, size, faces in zip(batch.index, batch.sizes, detector(batch.images)):
            found[index] = to_picture(faces, detector.size or size, size)
        errors |= batch.errors
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, (found, errors))
        found, errors = ({key: value for part in parts for key, value in part[n].items()} for n in (0, 1))
    faces = {index: found[index] for index in sorted(found) if index not in errors}
    stacked = np.concatenate([np.zeros((0, 5)), *faces.values()])
    image = np.repeat(np.array(list(faces), np.int64), [len(own) for own in faces.values()])
    return Detections(image, np.concatenate([stacked[:, :2], stacked[:, 2:4] - stacked[:, :2]], 1), stacked[:, 4]), errors


def score_faces(annotations, detections, sizes=metrics.FACE_SIZES):
    """All numbers of Detections on Annotations, as plain values, and the precision-recall curves by name."""
    truth = annotations.ids[annotations.image], annotations.xywh, annotations.ignored
    found = annotations.ids[detections.image], detections.xywh, detections.score
    numbers, curves = metrics.coco_ap(*truth, annotations.area, *found)
    points = metrics.operating_points(*truth, *found, len(annotations.ids))
    scores = {"coco": numbers, "AP50_by_size": {f"> {size} px" if size else "all faces": ap
                                                for size, ap in metrics.size_ap(*truth, *found, sizes).items()},
              "operating_points": [asdict(point) for point in points]}
    return scores, {f"IoU {iou}": curve for iou, curve in curves.items()}


def score_wider(truth, detections):
    """{level: AP} of Detections whose photos are those of a wider.GroundTruth, and the curves by level."""
    curves = metrics.wider_ap(truth.image, truth.xywh, truth.kept, detections.image, detections.xywh, detections.score)
    return {"wider": {level: curve.ap for level, curve in curves.items()}}, curves


def table(scores):
    """The numbers as text that can be pasted anywhere."""
    lines = []
    if "wider" in scores:
        lines += ["WIDER FACE val AP", *(f"  {level:<10}{ap:8.4f}" for level, ap in scores["wider"].items())]
    if "coco" in scores:
        left, right = ([(name, f"{ap:.4f}" if ap >= 0 else "-") for name, ap in scores[part].items()]
                       for part in ("coco", "AP50_by_size"))
        lines += ["COCO" + " " * 22 + "VOC AP at IoU 0.5"]
        for pair in zip_longest(left, right, fillvalue=("", "")):
            lines.append("  " + "    ".join(f"{name:<12}{value:>8}" for name, value in pair).rstrip())
        lines.append("score >=   precision   recall   false per photo")
        for point, note in zip(scores["operating_points"], ("", "", "", f"   best F1 {scores['operating_points'][-1]['f1']:.3f}")):
            lines.append(f"  {point['score']:.3f}       {point['precision']:.3f}      {point['recall']:.3f}      "
                         f"{point['false_per_picture']:.2f}{note}")
    return "\n".join(lines)


def plot_curves(curves, path):
    """Precision-recall curves {name: metrics.Curve} to a PNG, the APs in the legend."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(6, 5), layout="constrained").subplots()
    for name, curve in curves.items():
        shown = curve.recall <= curve.recall.max()
        axes.plot(curve.recall[shown], curve.precision[shown], label=f"{name}: AP {curve.ap:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with whole_file(path) as temporary:
        axes.figure.savefig(temporary, dpi=110)


def draw_worst(annotations, detections, count, score, path):
    """The `count` photos with most misses and false detections at `score`: found green, missed red, false yellow."""
    from pictures import FALSE, MISSED, draw_faces, grid, load_picture, save_picture
    shown = detections.score >= score
    image, xywh = detections.image[shown], detections.xywh[shown]
    missed, false = metrics.mistakes(annotations.image, annotations.xywh, annotations.ignored, image, xywh,
                                     detections.score[shown])
    wrong = np.bincount(np.concatenate([annotations.image[missed], image[false]]), minlength=len(annotations.ids))
    corners = lambda boxes: np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    pictures = []
    for index in np.argsort(-wrong, kind="stable")[:count]:
        picture, own = load_picture(annotations.file(index)), image == index
        picture = draw_faces(picture, corners(xywh[own & ~false]))
        picture = draw_faces(picture, corners(xywh[own & false]), colour=FALSE)
        pictures.append(draw_faces(picture, corners(annotations.xywh[missed & (annotations.image == index)]), colour=MISSED))
    save_picture(grid(pictures), path)


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def settings(args, **more):
    """What produced the numbers: model and data with their hashes, flags, versions."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "pillow", "torch", "torchvision", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    if str(more.get("model")).endswith(".xml"):  # an IR's weights lie beside it
        more["weights"] = f"{more['model'][:-4]}.bin"
    hashes = {name: file_hash(path) for name, path in more.items() if path and os.path.isfile(path)}
    return {"flags": {key: value for key, value in vars(args).items() if value is not None and key != "json"},
            "sha256": hashes, "versions": versions}


def parse_args(argv):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"COCO json (default {DATA})")
    parser.add_argument("--model", default=MODEL, help="a checkpoint, .onnx or .xml (default %(default)s)")
    parser.add_argument("--predictions", metavar="PATH", help="score these instead of running a model: "
                        "COCO results json, or with --wider a folder in WIDER's format")
    parser.add_argument("--wider", nargs="?", const=str(wider.GROUND_TRUTH), metavar="FOLDER",
                        help="easy / medium / hard AP by the ground truth in FOLDER (default %(const)s)")
    parser.add_argument("--face-sizes", type=int, nargs="+", default=metrics.FACE_SIZES, metavar="PX",
                        help="AP50 of faces larger than these (default 0 30 60 100)")
    run = parser.add_argument_group("running the model")
    run.add_argument("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    run.add_argument("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    run.add_argument("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    run.add_argument("--batch-size", type=int, default=16, help="photos at once (default %(default)s)")
    run.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load (default %(default)s)")
    run.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    run.add_argument("--skip-unreadable", action="store_true", help="leave photos out that cannot be read, with their faces")
    out = parser.add_argument_group("results")
    out.add_argument("--out", help="detections as COCO results json")
    out.add_argument("--wider-out", metavar="FOLDER", help="detections as WIDER's prediction folder")
    out.add_argument("--json", metavar="FILE", help="every number in full precision, and what produced them")
    out.add_argument("--plot", type=parse_picture, metavar="PNG", help="precision-recall curves")
    out.add_argument("--worst", type=int, metavar="N", help="draw the N photos with most mistakes to worst.png")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0 or (args.worst is not None and args.worst < 1):
        parser.error("--batch-size and --worst must be at least 1, --workers at least 0")
    if args.predictions and os.path.isdir(args.predictions) and not args.wider:
        parser.error(f"{args.predictions} is a folder: WIDER predictions need --wider")
    return args


def obtain(args, annotations):
    """The Detections that are to be scored, by running the model or reading COCO results; the rank; annotations read."""
    if args.predictions:
        return Detections(*read_results(args.predictions, annotations)), 0, annotations
    from detect import load_detector
    rank, processes, device = join_processes(args.device)
    detector = load_detector(args.model, args.size, device, args.colour, args.range)
    detections, errors = run_detector(detector, annotations, args.batch_size, args.workers, rank, processes)
    if processes > 1:  # each now has everything, and goes its own way
        leave_processes()
    if errors:
        lines = "; ".join(list(errors.values())[:5])
        if not args.skip_unreadable:
            raise InputError(f"{args.data}: {len(errors)} photos could not be used: {lines}; "
                             "mend them or leave them out with --skip-unreadable")
        if rank == 0:
            print(f"left out, with their faces: {len(errors)} photos that could not be used: {lines}")
        annotations, detections.image = annotations.without(errors, detections.image)
    return detections, rank, annotations


def renumber(detections, names, target, where):
    """Detections on images called `names` as Detections on the images called `target`, which are those of `where`."""
    place = {name: index for index, name in enumerate(target)}
    image = np.array([place.get(name, -1) for name in names], np.int64)[detections.image]
    if (image < 0).any():
        raise InputError(f"{where}: has no image {names[detections.image[image < 0][0]]}, but there are detections of it")
    return Detections(image, detections.xywh, detections.score)


@command
def main(argv=None):
    """Detect or read, score, print, write."""
    args = parse_args(argv)
    truth = wider.read_ground_truth(args.wider) if args.wider else None
    folder = truth is not None and args.predictions and os.path.isdir(args.predictions)
    if folder and not args.data and (args.out or args.worst):
        raise InputError("--out and --worst need the photos: give their --data as well")
    args.data = args.data or (None if folder else DATA)
    annotations = read_annotations(args.data) if args.data else None
    names = wider.wider_names(annotations.path, annotations.names) if annotations and (truth or args.wider_out) else None
    rank = 0
    if folder:
        *found, missing = wider.read_predictions(args.predictions, truth)
        detections = Detections(*found)
        if missing:
            print(f"{args.predictions}: {len(missing)} images have no file and count as without detections, "
                  f"the first is {missing[0]}")
        if annotations:
            detections = renumber(detections, truth.names, names, args.data)
    else:
        detections, rank, annotations = obtain(args, annotations)
        names = names and wider.wider_names(annotations.path, annotations.names)  # some photos may have been left out
    if rank:
        return
    if truth:
        absent = set(truth.names) - set(names) if names else ()
        if absent:
            print(f"{len(absent)} images of the ground truth are not in {args.data} and count as without detections")
        scores, curves = score_wider(truth, renumber(detections, names, truth.names, args.wider) if names else detections)
    else:
        scores, curves = score_faces(annotations, detections, args.face_sizes)
        print(f"{args.data}: {len(annotations.ids):,} photos, {len(annotations.image):,} faces "
              f"({annotations.ignored.sum():,} ignored), {len(detections.score):,} detections")
    print(table(scores))
    write_outputs(args, scores, curves, annotations, detections, names if annotations else truth.names)


def write_outputs(args, scores, curves, annotations, detections, names):
    """Whatever files were asked for."""
    if args.out:
        write_json(args.out, results(annotations, detections.image, detections.xywh, detections.score))
    if args.wider_out:
        wider.write_predictions(args.wider_out, names, detections.image, detections.xywh, detections.score)
    if args.json:
        write_json(args.json, scores | settings(args, model=None if args.predictions else args.model, data=args.data,
                                                predictions=args.predictions))
    if args.plot:
        plot_curves(curves, args.plot)
    if args.worst:
        score = scores["operating_points"][-1]["score"] if "operating_points" in scores else 0.5
        draw_worst(annotations, detections, args.worst, score, "worst.png")
    for path in (args.out, args.wider_out, args.json, args.plot, args.worst and "worst.png"):
        if path:
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
