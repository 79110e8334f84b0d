"""Write the detector's own labels of photos as COCO: first labels to correct, or photos that fool it.

    python -m tools.prelabel folder pre.json                            # first labels, to correct or train on
    python -m tools.prelabel no-faces negatives.json --fooled 0.3       # of photos without faces, those that
                                                                        # have one of score 0.3: to train on
"""

import os
import warnings
from pathlib import Path

from support.script import command, new_parser, write_json

from tqdm import tqdm

from detect import (Work, add_model_flags, chosen_detector, count, find_inputs, parse_score,
                    refuse_failed, search)
from support.coco import to_xywh

SURE, DOUBTFUL = 0.5, 0.2  # least score of a face, and of what may be one


def to_coco(works, out, labelled):
    """COCO content of pictures, with their faces if `labelled`; names are relative to the file `out`.

    A face has its score. What may be a face (below SURE) is marked iscrowd: neither face nor background.
    """
    folder = os.path.realpath(Path(out).parent)
    images, annotations = [], []
    for image_id, work in enumerate(works, 1):
        file = os.path.join(os.path.realpath(work.source.parent), work.source.name)
        images.append({"id": image_id, "file_name": Path(os.path.relpath(file, folder)).as_posix(),
                       "width": work.size[0], "height": work.size[1]})
        boxes = to_xywh(work.faces[:, :4]).round(2).tolist()
        for box, score in zip(boxes, work.faces[:, 4].tolist()) if labelled else ():
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                                "bbox": box, "area": round(box[2] * box[3], 2),
                                "iscrowd": int(score < SURE), "score": round(score, 5)})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}


@command
def main(argv=None):
    """Search all pictures, and write the json."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="pictures, folders, patterns")
    add("json", help="COCO file to write: a face from score "
        f"{SURE} on, iscrowd (neither face nor background) from {DOUBTFUL} on")
    add("--fooled", type=parse_score, metavar="SCORE",
        help="of photos without faces: write only those with a face of that score, unlabelled")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if Path(args.json).suffix != ".json":
        parser.error(f"{args.json}: the name of a .json is expected")
    files, left_out = find_inputs(args.inputs, args.json)
    works = [Work(file) for file in files]
    detector, score = chosen_detector(args), DOUBTFUL if args.fooled is None else args.fooled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures; threads cannot each set that
        for work in tqdm(search(detector, works, score), total=len(works), unit="picture", disable=None):
            work.image = None
    done = [work for work in works if work.faces is not None]
    if args.fooled is None:
        content = to_coco(done, args.json, labelled=True)
        doubtful = sum(face["iscrowd"] for face in content["annotations"])
        sure = len(content["annotations"]) - doubtful
        said = f"{count(sure, 'face')} and {doubtful} doubtful (iscrowd) on {count(len(done), 'picture')}"
    else:
        fooled = [work for work in done if len(work.faces)]
        content = to_coco(fooled, args.json, labelled=False)
        said = f"{len(fooled)} of {count(len(done), 'picture')} have a face of score {score:g} or more"
    if done:
        write_json(args.json, content)
        said += f"; see {args.json}"
    print(f"{said}{left_out}")
    refuse_failed(works)


if __name__ == "__main__":
    main()
