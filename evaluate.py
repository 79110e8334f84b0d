"""Measure a detector or existing predictions: COCO's 12 numbers, AP by face size, WIDER easy, medium, hard.

    python evaluate.py --data data/val.json                            # the shipped network
    python evaluate.py --data data/val.json --model runs/face/best.pth --size 640 --plot pr.png --worst 12
    python evaluate.py --data data/val.json --threshold-at precision=0.95 --save-threshold runs/face/sure.pth
    python evaluate.py --wider                                         # on WIDER val (see wider_to_coco.py)
    python evaluate.py --wider --predictions FOLDER_OR_RESULTS.json    # scores what any detector has written
    torchrun --nproc_per_node 4 evaluate.py --data data/val.json       # the same digits, from 4 processes

Scoring predictions needs no torch, which takes seconds to import: it is imported only where a model runs.
"""

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest

# First, so that Ctrl-C during the slow imports below ends in one line.
from support.script import (InputError, TilesFlag, bad_values, command, file_hash, git_commit, new_parser, parse_picture,
                    parse_size, write_json)

import numpy as np

import metrics
from tools import threshold as thresholds
from support import wider
from support.coco import Detections, read_annotations, read_results, to_results
from support.pictures import save_picture
from tools.worst import judge, plot_curves, worst_sheet, write_per_photo
from support.runtimes import SUFFIXES

DATA = "data/val.json"


def score_faces(annotations, detections, sizes=metrics.FACE_SIZES):
    """Score Detections on Annotations: every number as a plain value, and the curves by name."""
    truth = annotations.ids[annotations.image], annotations.xywh, annotations.ignored
    found = annotations.ids[detections.image], detections.xywh, detections.score
    numbers, curves = metrics.coco_ap(*truth, annotations.area, *found)
    points = metrics.operating_points(*truth, *found, len(annotations.ids))
    by_size = metrics.size_ap(*truth, *found, sizes)
    scores = {"coco": numbers,
              "AP50_by_size": {f"> {size} px" if size else "all faces": ap for size, ap in by_size.items()},
              "operating_points": [asdict(point) for point in points]}
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


def settings(args, **more):
    """Say what produced the numbers: model and data with their hashes, flags, versions, git commit."""
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
            "sha256": hashes, "versions": versions, "commit": git_commit()}


def parse_args(argv):
    """Parse and check the flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", help=f"COCO json (default {DATA})")
    add("--model", help="a checkpoint, .onnx or .xml (default: the shipped network)")
    add("--predictions", metavar="PATH", help="score these instead of running a model: COCO results json, or "
        "with --wider a folder in WIDER's format")
    add("--wider", nargs="?", const=str(wider.GROUND_TRUTH), metavar="FOLDER",
        help="easy / medium / hard AP by the ground truth in FOLDER (default %(const)s)")
    add("--face-sizes", type=int, nargs="+", default=metrics.FACE_SIZES, metavar="PX",
        help="AP50 of faces larger than these (default 0 30 60 100)")
    add = parser.add_argument_group("running the model").add_argument
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--tiles", action=TilesFlag)
    add("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    add("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    add("--batch-size", type=int, default=16, help="photos at once (default %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that load (default %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--skip-unreadable", action="store_true",
        help="leave photos out that cannot be read, with their faces")
    add = parser.add_argument_group("results").add_argument
    add("--out", help="detections as COCO results json")
    add("--wider-out", metavar="FOLDER", help="detections as WIDER's prediction folder")
    add("--json", metavar="FILE", help="every number in full precision, and what produced them")
    add("--plot", type=parse_picture, metavar="PNG",
        help="precision-recall curves; precision, recall and false per photo against the score")
    add("--worst", type=int, metavar="N", help="draw the N photos with most mistakes to --worst-out")
    add("--worst-out", type=parse_picture, default="worst.png", metavar="PNG", help="default %(default)s")
    add("--doubt", type=int, metavar="N",
        help="write the N most probable label errors to doubt.png and doubt.json")
    add("--per-photo", metavar="CSV", help="a row for each photo: faces, found, missed, false, scores")
    add = parser.add_argument_group("threshold").add_argument
    add("--threshold-at", type=thresholds.parse_promise, metavar="PROMISE",
        help="choose the score for precision=0.95, recall=0.9 or false=0.1 (a photo), for other photos too")
    add("--save-threshold", metavar="NEW.pth", help="write it into a copy of the checkpoint")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuse what does not go together, before minutes are spent."""
    if args.doubt is not None and args.doubt < 1:
        parser.error("--doubt must be at least 1")
    if args.batch_size < 1 or args.workers < 0 or (args.worst is not None and args.worst < 1):
        parser.error("--batch-size and --worst must be at least 1, --workers at least 0")
    if args.predictions and os.path.isdir(args.predictions) and not args.wider:
        parser.error(f"{args.predictions} is a folder: WIDER predictions need --wider")
    if args.wider and (args.threshold_at or args.per_photo):
        parser.error("--threshold-at and --per-photo need --data alone: WIDER's score has no such table")
    new = args.save_threshold
    if new and not args.threshold_at:
        parser.error("--save-threshold needs the promise: --threshold-at precision=0.95")
    if new and (args.predictions or str(args.model).endswith(SUFFIXES)):
        parser.error("--save-threshold needs a checkpoint as --model; "
                     "save it there, then export.py puts it into .onnx and .xml")
    if new and new.endswith(SUFFIXES):
        parser.error(f"--save-threshold {new}: a checkpoint is written, something like new.pth expected")
    if new:
        from detector import MODEL
        if os.path.realpath(new) == os.path.realpath(args.model or MODEL):
            parser.error(f"--save-threshold {new}: is the model itself, name a new file")


def choose_threshold(promise, annotations, outcomes):
    """The score that keeps a thresholds.Promise, and what it costs. Raises InputError if none does."""
    here, score = thresholds.choose(outcomes, promise)
    if score is None:
        raise InputError(f"{annotations.path}: {thresholds.refusal(outcomes, promise, here)}")
    costs = thresholds.intervals(outcomes, score)
    return {"score": score, "promise": str(promise), "only_here": here, **costs}


def threshold_text(chosen):
    """Set a threshold as text, with the 95 % interval of each number over resamples of the photos."""
    costs = ", ".join("{} {:.3f} ({:.3f} to {:.3f})".format(curve.replace("_", " "), *chosen[name])
                      for name, curve in thresholds.CURVES.items())
    return (f"{chosen['promise']}: score {chosen['score']:g} keeps it, also with one mistake more, in "
            f"{thresholds.SURE:.0%} of {thresholds.RESAMPLES:,} resamples of these photos\n"
            f"  here: {costs}\n  on these photos alone {chosen['only_here']:g} would do")


def save_threshold(args, annotations, chosen):
    """Write a copy of the checkpoint --model with the threshold in it."""
    from checkpoints import write_content
    from model import config_of, read_checkpoint
    with bad_values():
        content = read_checkpoint(args.model)
        size, tiles = args.size or config_of(content, args.model).input_size, getattr(args, "tiles", None)
    data = {"file": os.path.basename(args.data), "photos": len(annotations.ids),
            "faces": int((~annotations.ignored).sum()), "fingerprint": annotations.fingerprint()}
    entry = {"score": chosen["score"], "size": list(size), "tiles": list(tiles) if tiles else None,
             "promise": chosen["promise"], "data": data,
             "measured": {name: chosen[name][0] for name in thresholds.CURVES}}
    write_content(args.save_threshold, content | {"threshold": entry})


def run_model(args, annotations):
    """Run --model on Annotations: its Detections, this process's rank, and the Annotations it could read."""
    import torch

    from detector import MODEL, detect_all, load_detector
    from support.distributed import join_processes, leave_processes
    annotations.require_photos()
    torch.backends.cudnn.allow_tf32 = False  # a GPU's default: its 10 bits move AP in the third digit
    args.model = args.model or MODEL
    rank, processes, device = join_processes(args.device)
    detector = load_detector(args.model, args.size, device, args.colour, args.range)
    if args.tiles:
        from detector import TiledDetector
        detector = TiledDetector(detector, *args.tiles)
    detections, errors = detect_all(detector, annotations, args.batch_size, args.workers, rank, processes)
    leave_processes()  # each now has everything, and goes its own way
    if errors:
        lines = "; ".join(list(errors.values())[:5])
        if not args.skip_unreadable:
            raise InputError(f"{args.data}: {len(errors)} photos could not be used: {lines}; "
                             "mend them or leave them out with --skip-unreadable")
        if rank == 0:
            print(f"left out, with their faces: {len(errors)} photos that could not be used: {lines}")
        annotations, detections = annotations.without(errors, detections)
    return detections, rank, annotations


def renumber(detections, names, target, where):
    """Move Detections from the images called `names` to those called `target`, which `where` has."""
    place = {name: index for index, name in enumerate(target)}
    image = np.array([place.get(name, -1) for name in names], np.int64)[detections.image]
    if (image < 0).any():
        name = names[detections.image[image < 0][0]]
        raise InputError(f"{where}: has no image {name}, but there are detections of it")
    return Detections(image, detections.xywh, detections.score)


@command
def main(argv=None):
    """Detect or read, score, print, write."""
    args = parse_args(argv)
    rank = int(os.environ.get("RANK", 0))
    if args.predictions and rank:  # under torchrun one process is enough to read and score
        return
    truth = wider.read_ground_truth(args.wider) if args.wider else None
    folder = truth is not None and args.predictions and os.path.isdir(args.predictions)
    if folder and not args.data and (args.out or args.worst or args.doubt):
        raise InputError("--out, --worst and --doubt need the photos: give their --data as well")
    args.data = args.data or (None if folder else DATA)
    annotations = read_annotations(args.data) if args.data else None
    names = None
    if annotations and (truth or args.wider_out):
        names = wider.wider_names(annotations.path, annotations.names)
    if folder:
        detections, missing = wider.read_predictions(args.predictions, truth)
        if missing:
            print(f"{args.predictions}: {len(missing)} images have no file and count as without detections, "
                  f"the first is {missing[0]}")
        if annotations:
            detections = renumber(detections, truth.names, names, args.data)
    elif args.predictions:
        detections = read_results(args.predictions, annotations)
    else:
        detections, rank, annotations = run_model(args, annotations)
        if names:  # some photos may have been left out
            names = wider.wider_names(annotations.path, annotations.names)
    if rank:
        return
    if truth:
        absent = set(truth.names) - set(names) if names else ()
        if absent:
            print(f"{len(absent)} images of the ground truth are not in {args.data} "
                  "and count as without detections")
        own = renumber(detections, names, truth.names, args.wider) if names else detections
        scores, curves = score_wider(truth, own)
    else:
        scores, curves = score_faces(annotations, detections, args.face_sizes)
        print(f"{args.data}: {len(annotations.ids):,} photos, {len(annotations.image):,} faces "
              f"({annotations.ignored.sum():,} ignored), {len(detections.score):,} detections")
    print(table(scores))
    outcomes = None
    if not truth:
        every = judge(annotations, detections, -np.inf)
        outcomes = thresholds.Outcomes(detections.image, detections.score, every.hit, every.false,
                                       every.counts["faces"])
    if args.threshold_at:
        scores["threshold"] = choose_threshold(args.threshold_at, annotations, outcomes)
        print(threshold_text(scores["threshold"]))
    names = names if annotations else truth.names
    write_outputs(args, scores, curves, annotations, detections, names, outcomes)


def write_outputs(args, scores, curves, annotations, detections, names, outcomes):
    """Write the files that were asked for."""
    by_score = outcomes and thresholds.score_curve(outcomes)
    score = scores.get("threshold", scores.get("operating_points", [{"score": 0.5}])[-1])["score"]
    if args.out:
        write_json(args.out, to_results(annotations, detections))
    if args.wider_out:
        wider.write_predictions(args.wider_out, names, detections)
    if args.json:
        if by_score:
            thinned = vars(thresholds.thin(by_score))
            scores["curve"] = {name: values.tolist() for name, values in thinned.items()}
        write_json(args.json, scores | settings(args, model=args.model, data=args.data,
                                                predictions=args.predictions))
    if args.plot:
        plot_curves(curves, args.plot, by_score, args.threshold_at and score)
    if args.save_threshold:
        save_threshold(args, annotations, scores["threshold"])
    if args.worst or args.per_photo:
        judged = judge(annotations, detections, score)
    if args.per_photo:
        write_per_photo(judged, detections, args.per_photo)
    if args.worst:
        save_picture(worst_sheet(judged, args.worst), args.worst_out)
    if args.doubt:
        from tools.doubt import write_doubts  # it needs torch
        print("\n".join(write_doubts(annotations, detections, args.doubt)))
    for path in (args.out, args.wider_out, args.json, args.plot, args.save_threshold, args.per_photo,
                 args.worst and args.worst_out):
        if path:
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
