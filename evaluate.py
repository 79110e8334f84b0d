"""Measure a detector or existing predictions: COCO's 12 numbers, AP by face size, WIDER easy, medium, hard.

    python evaluate.py --data data/val.json                            # the shipped network
    python evaluate.py --model runs/face/best.pth --size 640 --out found.json
    python evaluate.py --wider                                         # on WIDER val (see wider_to_coco.py)
    python evaluate.py --wider --predictions FOLDER_OR_RESULTS.json    # scores what any detector has written
    python evaluate.py --wider --wider-part --data part.json           # only on the photos of part.json
    torchrun --nproc_per_node 4 evaluate.py --data data/val.json       # the same digits, from 4 processes

Beside the detections FILE.json that --out writes, FILE.made.json says what made them; tools.threshold, worst,
doubt and compare read both. Scoring predictions does not import torch.
"""

import os
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from support.script import command, file_hash, git_commit, Parser, read_json, require, write_json

import metrics
from support import wider
from support.coco import Annotations, Detections, arrays, read_annotations, read_results, to_results
from support.options import add_model_flags, at_least
from support.runtimes import SUFFIXES

DATA = "data/val.json"
RUNNING = ("model", "size", "tiles", "colour", "range", "batch_size", "workers", "device", "threads",
           "skip_unreadable")


def score_faces(annotations, detections, sizes=metrics.FACE_SIZES):
    """Score Detections on Annotations: every number as a plain value."""
    truth = annotations.ids[annotations.image], annotations.xywh, annotations.ignored
    found = annotations.ids[detections.image], detections.xywh, detections.score
    outcomes = metrics.outcomes(*arrays(annotations, detections), len(annotations.ids))
    by_size = metrics.size_ap(*truth, *found, sizes)
    return {"coco": metrics.coco_ap(*truth, annotations.area, *found),
            "AP50_by_size": {f"> {size} px" if size else "all faces": ap for size, ap in by_size.items()},
            "operating_points": metrics.operating_points(outcomes)}


def table(scores):
    """Set the numbers as text that can be pasted anywhere."""
    if "wider" in scores:
        lines = [f"  {level:<10}{ap:8.4f}" for level, ap in scores["wider"].items()]
        return "\n".join(["WIDER FACE val AP", *lines])
    columns = [[f"{name:<12}{f'{ap:.4f}' if ap >= 0 else '-':>8}" for name, ap in scores[part].items()]
               for part in ("coco", "AP50_by_size")]
    lines = ["COCO" + " " * 22 + "VOC AP at IoU 0.5"]
    lines += [f"  {left:<20}    {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]
    lines.append("score >=   precision   recall   false per photo")
    for point in scores["operating_points"]:
        lines.append(f"  {point['score']:.3f}{point['precision']:12.3f}{point['recall']:11.3f}"
                     f"{point['false_per_picture']:10.2f}")
    return "\n".join(lines) + f"           best F1 {point['f1']:.3f}"


def hashes(model, **more):
    """SHA-256 of the files there are: {"model", "weights" (they lie beside an IR), the names in `more`}."""
    files = {"model": model, **more}
    if str(model).endswith(".xml"):
        files["weights"] = f"{model[:-4]}.bin"
    return {name: file_hash(path) for name, path in files.items() if path and os.path.isfile(path)}


def parse_args(argv):
    """Parse the flags, and refuse what does not go together."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help=f"COCO json (default {DATA})")
    add("--predictions", metavar="PATH",
        help="run no model: score this COCO results json or, with --wider, folder in WIDER's format")
    add("--wider", nargs="?", const=str(wider.GROUND_TRUTH), metavar="FOLDER",
        help="easy / medium / hard AP by the ground truth in FOLDER (default %(const)s)")
    add("--wider-part", action="store_true",
        help="on the photos of --data alone; without it WIDER's other photos count as without detections")
    add("--face-sizes", type=int, nargs="+", metavar="PX", default=metrics.FACE_SIZES,
        help="AP50 of faces larger than these (default 0 30 60 100)")
    add_model_flags(parser)
    add("--batch-size", type=at_least(1), help="photos at once (default 16)")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1),
        help="processes that load (default: one for each core, at most 8)")
    add("--skip-unreadable", action="store_true", help="leave out unreadable photos, with their faces")
    add("--out", metavar="FILE.json", help="detections as COCO results; FILE.made.json says what made them")
    add("--wider-out", metavar="FOLDER", help="detections as WIDER's prediction folder")
    add("--json", metavar="FILE", help="every number in full precision, and what produced them")
    args = parser.parse_args(argv)
    folder = args.predictions and os.path.isdir(args.predictions)
    idle = [name for name in RUNNING if getattr(args, name) != parser.get_default(name)]
    if args.predictions and idle:
        parser.error(f"--predictions runs no model: --{idle[0].replace('_', '-')} would do nothing")
    if args.wider_part and not args.wider:
        parser.error("--wider-part is for --wider")
    if folder and not args.wider:
        parser.error(f"{args.predictions} is a folder: WIDER predictions need --wider")
    if folder and not args.data and (args.out or args.wider_part):
        parser.error("--out and --wider-part need the photos: give their --data as well")
    args.data = args.data or (None if folder else DATA)
    return args


def run_model(args, annotations):
    """Run --model: (Annotations of the photos it could read, Detections, what the .made.json holds)."""
    import torch

    from detector import MODEL, detect_all, load_detector
    from model import read_checkpoint
    from support.distributed import all_or_none, join_processes, leave_processes
    annotations.require_photos()
    torch.backends.cudnn.allow_tf32 = False  # a GPU's default: its 10 bits move AP in the third digit
    args.model = args.model or MODEL
    rank, processes, device = join_processes(args.device)
    detector = all_or_none(lambda: load_detector(args.model, args.size, device, args.colour, args.range,
                                                 args.tiles))
    made = {"model": os.path.basename(args.model), "sha256": hashes(args.model), "tiles": args.tiles,
            "size": (detector.detector if args.tiles else detector).size}
    if not args.model.endswith(SUFFIXES):
        made["trained_on"] = read_checkpoint(args.model).get("photos")
    detections, errors = detect_all(detector, annotations, args.batch_size, args.workers, rank, processes)
    leave_processes()  # each now has everything, and goes its own way
    if errors:
        lines = f"{len(errors)} photos could not be used: {'; '.join(list(errors.values())[:5])}"
        require(args.skip_unreadable,
                f"{args.data}: {lines}; mend them or leave them out with --skip-unreadable")
        if rank == 0:
            print(f"left out, with their faces: {lines}")
        annotations, detections = annotations.without(errors, detections)
    return annotations, detections, made


def load_detections(args, truth):
    """Read the detections of --predictions, or run the model: (Annotations, names, Detections, made).

    `names` are the photos' for the wider.GroundTruth `truth`, if any. Without --data the photos are its own,
    and there are no Annotations. `made` says what made the detections of a model."""
    annotations = read_annotations(args.data) if args.data else None
    made = None
    if not args.predictions:
        if truth:  # what are no photos of WIDER's fails now, not after the model has run
            truth.part(wider.wider_names(args.data, annotations.names))
        annotations, detections, made = run_model(args, annotations)
    names = truth.names if truth else None
    if args.data and (truth or args.wider_out):
        names = wider.wider_names(args.data, annotations.names)
    if args.predictions and os.path.isdir(args.predictions):
        detections, missing = wider.read_predictions(args.predictions, names)
        if missing:
            print(f"{args.predictions}: {len(missing)} images have no file and count as without detections, "
                  f"the first is {missing[0]}")
    elif args.predictions:
        detections = read_results(args.predictions, annotations)
    return annotations, names, detections, made


def score(args, truth, annotations, names, detections):
    """Score Detections on Annotations or on WIDER's ground truth, and say what they are scored on."""
    if truth is None:
        print(f"{args.data}: {len(annotations.ids):,} photos, {len(annotations.image):,} faces "
              f"({annotations.ignored.sum():,} ignored), {len(detections.score):,} detections")
        return score_faces(annotations, detections, args.face_sizes)
    there, every = len(set(names) & set(truth.names)), len(truth.names)
    if args.wider_part:
        truth = truth.part(names)
        if there < every:
            print(f"{there:,} of {every:,} photos, not comparable with published figures")
    elif there < every:
        print(f"{every - there:,} images of the ground truth are not in {args.data} and count as without "
              "detections; --wider-part leaves them out")
    found = wider.renumber(detections, names, truth, args.wider)
    faces = truth.image, truth.xywh, truth.kept
    return {"wider": metrics.wider_ap(*faces, found.image, found.xywh, found.score)}


def write_outputs(args, scores, annotations, names, detections, made):
    """Write the files that were asked for."""
    if args.out:
        write_json(args.out, to_results(annotations, detections))
        made_path(args.out).unlink(missing_ok=True)  # of what was there before
    if args.out and made:
        made |= {"detections": file_hash(args.out), "photos": photo_list(annotations)}
        write_json(made_path(args.out), made)
    if args.wider_out:
        wider.write_predictions(args.wider_out, names, detections)
    if args.json:
        flags = {key: value for key, value in vars(args).items() if value is not None and key != "json"}
        sha256 = hashes(args.model, data=args.data, predictions=args.predictions)
        write_json(args.json, scores | {"flags": flags, "sha256": sha256, "commit": git_commit()})
    for path in filter(None, (args.out, args.wider_out, args.json)):
        print(f"wrote {path}")


def made_path(path):
    """The file beside the detections `path` that says what made them."""
    return Path(path).with_suffix(".made.json")


def photo_list(annotations):
    """What tells the photos of Annotations from others: ids, and names without their folders."""
    names = [PurePosixPath(name).name for name in annotations.names]
    return list(zip(annotations.ids.tolist(), names))


def read_detections(data: str, path: str) -> tuple[Annotations, Detections, dict | None]:
    """Read the COCO json `data` and detections on its photos, for tools: (Annotations, Detections, made).

    `made` is what the .made.json beside `path` holds, if there is one. Photos that the model did not look at
    are left out. Raises InputError if the photos are others."""
    annotations = read_annotations(data)
    detections = read_results(path, annotations)
    if not made_path(path).exists():
        return annotations, detections, None
    made = read_json(made_path(path))
    require(isinstance(made, dict) and made.get("detections") == file_hash(path),
            f"{made_path(path)}: is not of {path} as it is now; write both again, with --out")
    own, seen = photo_list(annotations), set(map(tuple, made["photos"]))
    require(seen <= set(own), f"{path}: is of other photos than {data}")
    unseen = [index for index, photo in enumerate(own) if photo not in seen]
    return *annotations.without(unseen, detections), made


@command
def main(argv=None):
    """Read or detect, score, print, write."""
    args = parse_args(argv)
    truth = wider.read_ground_truth(args.wider) if args.wider else None
    annotations, names, detections, made = load_detections(args, truth)
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun one process scores
        return
    scores = score(args, truth, annotations, names, detections)
    print(table(scores))
    write_outputs(args, scores, annotations, names, detections, made)


if __name__ == "__main__":
    main()
