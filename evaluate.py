"""Measure a detector or existing predictions: COCO's 12 numbers, AP by face size, WIDER easy, medium, hard.

    python evaluate.py --data data/val.json                            # the shipped network
    python evaluate.py --model runs/face/best.pth --size 640 --out found.json --plot pr.png
    python evaluate.py --wider                                         # on WIDER val (see wider_to_coco.py)
    python evaluate.py --wider --predictions FOLDER_OR_RESULTS.json    # scores what any detector has written
    python evaluate.py --wider --wider-part --data part.json           # only on the photos of part.json
    torchrun --nproc_per_node 4 evaluate.py --data data/val.json       # the same digits, from 4 processes

Beside the detections FILE.json that --out writes, FILE.made.json says what made them. `python -m tools.NAME`
goes on from there: threshold, worst, doubt, compare. Scoring predictions does not import torch.
"""

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from support.script import (InputError, TilesFlag, command, file_hash, git_commit, new_parser, parse_picture,
                            parse_size, read_json, write_json)

import metrics
from support import wider
from support.coco import Annotations, Detections, arrays, read_annotations, read_results, to_results
from support.plots import plot_curves
from support.runtimes import SUFFIXES
from support.threads import use_threads

DATA = "data/val.json"
RUNNING = ("model", "size", "tiles", "colour", "range", "batch_size", "workers", "device", "threads",
           "skip_unreadable")


def score_faces(annotations, detections, sizes=metrics.FACE_SIZES):
    """Score Detections on Annotations: every number as a plain value, and the curves by name."""
    truth = annotations.ids[annotations.image], annotations.xywh, annotations.ignored
    found = annotations.ids[detections.image], detections.xywh, detections.score
    numbers, curves = metrics.coco_ap(*truth, annotations.area, *found)
    outcomes = metrics.outcomes(*arrays(annotations, detections), len(annotations.ids))
    by_size = metrics.size_ap(*truth, *found, sizes)
    scores = {"coco": numbers,
              "AP50_by_size": {f"> {size} px" if size else "all faces": ap for size, ap in by_size.items()},
              "operating_points": [asdict(point) for point in metrics.operating_points(outcomes)]}
    return scores, {f"IoU {iou}": curve for iou, curve in curves.items()}


def score_wider(truth, detections):
    """Score Detections on the photos of a wider.GroundTruth: {level: AP}, and the curves by level."""
    curves = metrics.wider_ap(truth.image, truth.xywh, truth.kept, detections.image, detections.xywh,
                              detections.score)
    return {"wider": {level: curve.ap for level, curve in curves.items()}}, curves


def table(scores):
    """Set the numbers as text that can be pasted anywhere."""
    lines = []
    if "wider" in scores:
        lines += ["WIDER FACE val AP", *(f"  {level:<10}{ap:8.4f}" for level, ap in scores["wider"].items())]
    if "coco" in scores:
        left, right = ([(name, f"{ap:.4f}" if ap >= 0 else "-") for name, ap in scores[part].items()]
                       for part in ("coco", "AP50_by_size"))
        lines += ["COCO" + " " * 22 + "VOC AP at IoU 0.5"]
        for pair in zip_longest(left, right, fillvalue=("", "")):
            lines.append("  " + "    ".join(f"{name:<12}{value:>8}" for name, value in pair).rstrip())
        lines.append("score >=   precision   recall   false per photo   with faces   without faces")
        for point in scores["operating_points"]:
            apart = [f"{point[key]:.2f}" if point[key] >= 0 else "-"
                     for key in ("false_with_faces", "false_without_faces")]
            lines.append(f"  {point['score']:.3f}{point['precision']:12.3f}{point['recall']:11.3f}"
                         f"{point['false_per_picture']:10.2f}{apart[0]:>18}{apart[1]:>13}   ")
        lines[-1] += f"   best F1 {point['f1']:.3f}"
    return "\n".join(lines)


def hashes(model, **more):
    """SHA-256 of the files there are: {"model", "weights" (they lie beside an IR), the names in `more`}."""
    files = {"model": model, **more}
    if str(model).endswith(".xml"):
        files["weights"] = f"{model[:-4]}.bin"
    return {name: file_hash(path) for name, path in files.items() if path and os.path.isfile(path)}


def settings(args):
    """What produced the numbers: model and data with their hashes, flags, versions, git commit."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "pillow", "torch", "torchvision", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {"flags": {key: value for key, value in vars(args).items() if value is not None and key != "json"},
            "sha256": hashes(args.model, data=args.data, predictions=args.predictions),
            "versions": versions, "commit": git_commit()}


def parse_args(argv):
    """Parse the flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", help=f"COCO json (default {DATA})")
    add("--predictions", metavar="PATH", help="score these instead of running a model: COCO results json, or "
        "with --wider a folder in WIDER's format")
    add("--wider", nargs="?", const=str(wider.GROUND_TRUTH), metavar="FOLDER",
        help="easy / medium / hard AP by the ground truth in FOLDER (default %(const)s)")
    add("--wider-part", action="store_true",
        help="on the photos of --data alone; without it WIDER's other photos count as without detections")
    add("--face-sizes", type=int, nargs="+", metavar="PX",
        help="AP50 of faces larger than these (default 0 30 60 100)")
    add = parser.add_argument_group("running the model").add_argument
    add("--model", help="a checkpoint, .onnx or .xml (default: the shipped network)")
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--tiles", action=TilesFlag)
    add("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    add("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    add("--batch-size", type=int, help="photos at once (default 16)")
    add("--workers", type=int, help="processes that load (default: one for each core, at most 8)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--threads", type=use_threads, help="of the CPU (default: the cores this process may use)")
    add("--skip-unreadable", action="store_true", default=None,
        help="leave photos out that cannot be read, with their faces")
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="FILE.json", help="detections as COCO results; FILE.made.json says what made them")
    add("--wider-out", metavar="FOLDER", help="detections as WIDER's prediction folder")
    add("--json", metavar="FILE", help="every number in full precision, and what produced them")
    add("--plot", type=parse_picture, metavar="PNG",
        help="precision-recall curves; precision, recall and false per photo against the score")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuse what does not go together or would do nothing; settle the defaults."""
    folder = args.predictions and os.path.isdir(args.predictions)
    unused = [f"--{name.replace('_', '-')}" for name in RUNNING if getattr(args, name) is not None]
    if args.predictions and unused:
        parser.error(f"--predictions runs no model: {', '.join(unused)} would do nothing")
    if args.wider and args.face_sizes:
        parser.error("--face-sizes would do nothing with --wider, whose levels are easy, medium and hard")
    if args.wider_part and not args.wider:
        parser.error("--wider-part is for --wider")
    if folder and not args.wider:
        parser.error(f"{args.predictions} is a folder: WIDER predictions need --wider")
    if folder and not args.data and (args.out or args.wider_part):
        parser.error("--out and --wider-part need the photos: give their --data as well")
    args.data = args.data or (None if folder else DATA)
    args.face_sizes = args.face_sizes or metrics.FACE_SIZES
    if args.batch_size == 0 or min(args.batch_size or 1, args.workers or 0) < 0:
        parser.error("--batch-size must be at least 1, --workers at least 0")


def run_model(args, annotations):
    """Run --model: (Annotations of the photos it could read, Detections, what the .made.json holds)."""
    import torch

    from detector import MODEL, TiledDetector, detect_all, load_detector
    from support.distributed import join_processes, leave_processes
    annotations.require_photos()
    torch.backends.cudnn.allow_tf32 = False  # a GPU's default: its 10 bits move AP in the third digit
    args.model = args.model or MODEL
    rank, processes, device = join_processes(args.device)
    detector = load_detector(args.model, args.size, device, args.colour, args.range)
    made = {"model": os.path.basename(args.model), "sha256": hashes(args.model), "size": detector.size,
            "tiles": args.tiles}
    if not args.model.endswith(SUFFIXES):
        from model import read_checkpoint
        made["trained_on"] = read_checkpoint(args.model).get("photos")
    if args.tiles:
        detector = TiledDetector(detector, *args.tiles)
    workers = min(8, os.cpu_count() or 1) if args.workers is None else args.workers
    detections, errors = detect_all(detector, annotations, args.batch_size, workers, rank, processes)
    leave_processes()  # each now has everything, and goes its own way
    if errors:
        lines = "; ".join(list(errors.values())[:5])
        if not args.skip_unreadable:
            raise InputError(f"{args.data}: {len(errors)} photos could not be used: {lines}; "
                             "mend them or leave them out with --skip-unreadable")
        if rank == 0:
            print(f"left out, with their faces: {len(errors)} photos that could not be used: {lines}")
        annotations, detections = annotations.without(errors, detections)
    return annotations, detections, made


def load_detections(args, truth):
    """Read the detections of --predictions, or run the model: (Annotations, Detections, made).

    truth is the wider.GroundTruth or None. `made` says what made the detections of a model, else it is None.
    """
    annotations = read_annotations(args.data) if args.data else wider.only_photos(truth, args.wider)
    if not args.predictions:
        return run_model(args, annotations)
    if not os.path.isdir(args.predictions):
        return annotations, read_results(args.predictions, annotations), None
    names = wider.wider_names(annotations.path, annotations.names)
    detections, missing = wider.read_predictions(args.predictions, names)
    if missing:
        print(f"{args.predictions}: {len(missing)} images have no file and count as without detections, "
              f"the first is {missing[0]}")
    return annotations, detections, None


def score(args, truth, annotations, detections):
    """Score Detections on Annotations or on WIDER's ground truth: the numbers, and the curves by name."""
    if truth is None:
        print(f"{args.data}: {len(annotations.ids):,} photos, {len(annotations.image):,} faces "
              f"({annotations.ignored.sum():,} ignored), {len(detections.score):,} detections")
        return score_faces(annotations, detections, args.face_sizes)
    names, all_names = wider.wider_names(annotations.path, annotations.names), truth.names
    if args.wider_part:
        truth = truth.part(names)
    absent = len(all_names) - len(set(names) & set(all_names))
    if absent and args.wider_part:
        print(f"{len(truth.names):,} of {len(all_names):,} photos, not comparable with published figures")
    elif absent:
        print(f"{absent:,} images of the ground truth are not in {args.data} and count as without "
              "detections; --wider-part leaves them out")
    return score_wider(truth, wider.renumber(detections, names, truth.names, args.wider))


def write_outputs(args, scores, curves, annotations, detections, made):
    """Write the files that were asked for."""
    if args.out:
        write_json(args.out, to_results(annotations, detections))
        if made:
            write_json(made_path(args.out), made | {"detections": file_hash(args.out),
                                                    "photos": photo_list(annotations)})
    if args.wider_out:
        names = wider.wider_names(annotations.path, annotations.names)
        wider.write_predictions(args.wider_out, names, detections)
    if args.json:
        write_json(args.json, scores | settings(args))
    if args.plot:
        by_score = None
        if not args.wider:
            outcomes = metrics.outcomes(*arrays(annotations, detections), len(annotations.ids))
            by_score = metrics.score_curve(outcomes)
        plot_curves(curves, args.plot, by_score)
    for path in (args.out, args.wider_out, args.json, args.plot):
        if path:
            print(f"wrote {path}")


def made_path(path):
    """The file beside the detections `path` that says what made them."""
    return Path(path).with_suffix(".made.json")


def photo_list(annotations):
    """What tells the photos of Annotations from others: ids, and names without their folders."""
    return [(number, PurePosixPath(name).name)
            for number, name in zip(annotations.ids.tolist(), annotations.names)]


def read_detections(data: str, path: str) -> tuple[Annotations, Detections, dict | None]:
    """Read the COCO json `data` and detections on its photos, for tools: (Annotations, Detections, made).

    `made` is what the .made.json beside `path` holds, None without such a file. Photos that the model did not
    look at (--skip-unreadable) are left out. Raises InputError if the photos are others.
    """
    annotations = read_annotations(data)
    detections = read_results(path, annotations)
    if not made_path(path).exists():
        return annotations, detections, None
    made = read_json(made_path(path))
    if not isinstance(made, dict) or made.get("detections") != file_hash(path):
        raise InputError(f"{made_path(path)}: is not of {path} as it is now; "
                         "write both again with evaluate.py --out")
    own, seen = photo_list(annotations), {tuple(photo) for photo in made["photos"]}
    if not seen <= set(own):
        raise InputError(f"{path}: is of other photos than {data}")
    unseen = [index for index, photo in enumerate(own) if photo not in seen]
    return *annotations.without(unseen, detections), made


@command
def main(argv=None):
    """Read or detect, score, print, write."""
    args = parse_args(argv)
    other = int(os.environ.get("RANK", 0)) > 0  # under torchrun one process scores
    if other and args.predictions:
        return
    truth = wider.read_ground_truth(args.wider) if args.wider else None
    annotations, detections, made = load_detections(args, truth)
    if other:
        return
    scores, curves = score(args, truth, annotations, detections)
    print(table(scores))
    write_outputs(args, scores, curves, annotations, detections, made)


if __name__ == "__main__":
    main()
