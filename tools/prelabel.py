"""Write the detector's own labels of photos as COCO: first labels to correct, or photos that fool it.

    python -m tools.prelabel folder pre.json                       # first labels, to correct or train on
    python -m tools.prelabel no-faces negatives.json --fooled 0.3  # of photos without faces: those with one
"""

import os
from pathlib import Path

from support.script import command, Parser, write_json

from tqdm import tqdm

from detect import chosen_detector, count, find_inputs, parse_score, refuse_failed, search
from support.coco import to_xywh
from support.options import add_model_flags

SURE, DOUBTFUL = 0.5, 0.2  # least score of a face, and of what may be one


def to_coco(photos, out):
    """COCO content, for the file `out`, of photos (path, (width, height), faces `[K, 5]`)."""
    folder = os.path.realpath(Path(out).parent)
    images, annotations = [], []
    for image_id, (path, (width, height), faces) in enumerate(photos, 1):
        name = Path(os.path.relpath(path.parent.resolve() / path.name, folder)).as_posix()
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for box, score in zip(to_xywh(faces[:, :4]).round(2).tolist(), faces[:, 4].tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                                "bbox": box, "area": round(box[2] * box[3], 2),
                                "iscrowd": int(score < SURE), "score": round(score, 5)})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}


@command
def main(argv=None):
    """Search all pictures, and write the json."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="pictures, folders, patterns")
    add("json", help=f"COCO file to write: a face from score {SURE} on, iscrowd from {DOUBTFUL} on")
    add("--fooled", type=parse_score, metavar="SCORE",
        help="of photos without faces: write only those with a face of that score, unlabelled")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if Path(args.json).suffix != ".json":
        parser.error(f"{args.json}: the name of a .json is expected")
    files, left_out = find_inputs(args.inputs, args.json)
    score = DOUBTFUL if args.fooled is None else args.fooled
    found = search(chosen_detector(args), files, score,
                   lambda path, image, faces: (path, getattr(image, "size", image), faces))
    found = list(tqdm(found, total=len(files), unit="picture", disable=None))
    failed = [error for _, error, faces in found if faces is None]
    photos = [photo for photo in found if photo[2] is not None]
    text = count(len(photos), "picture")
    if args.fooled is None:
        content = to_coco(photos, args.json)
        doubtful = sum(face["iscrowd"] for face in content["annotations"])
        sure = len(content["annotations"]) - doubtful
        text = f"{count(sure, 'face')} and {doubtful} doubtful (iscrowd) on {text}"
    else:
        content = to_coco([(path, size, faces[:0]) for path, size, faces in photos if len(faces)], args.json)
        text = f"{len(content['images'])} of {text} have a face of score {score:g} or more"
    if photos:
        write_json(args.json, content)
        text += f"; see {args.json}"
    print(f"{text}{left_out}")
    refuse_failed(failed, len(files))


if __name__ == "__main__":
    main()
