"""Show photos with their faces, and what is suspect in them: the first thing to do with one's own labels.

    python -m tools.look --data train.json val.json --out sheet.png   # as they are; photos that are in both
    python -m tools.look --data data/train.json --augment   # as the training sees them
    python -m tools.look --data mine.json --split 5 train.json val.json   # every fifth photo for validation
"""

import os
from pathlib import Path

from support.script import command, Parser, parse_picture, parse_size, read_json, require, write_json

import numpy as np
from PIL import Image

from data import FaceDataset
from support.coco import Annotations, moved_images, read_annotations
from support.options import at_least
from support.pictures import IGNORED, contact_sheet, draw_faces, save_picture
from tools.suspects import report


def describe(annotations: Annotations, min_face: int) -> str:
    """Counts and face sizes in two lines."""
    kept, photos = ~annotations.ignored, len(annotations.ids)
    text = (f"{photos:,} photos, {photos - len(np.unique(annotations.image)):,} of them without faces; "
            f"{kept.sum():,} faces, {(~kept).sum():,} more to ignore: crowds, empty boxes, boxes outside")
    if kept.any():
        sides = annotations.xywh[kept, 2:].min(1)
        sizes = np.quantile(sides, (0, 0.1, 0.5, 0.9, 1))
        text += ("\nsmaller side of faces, px: least {:.0f}, 10 % {:.0f}, median {:.0f}, 90 % {:.0f}, most "
                 "{:.0f}; below {} px: {:,}".format(*sizes, min_face, (sides < min_face).sum()))
    return text


def split(annotations: Annotations, every: int, train: str, val: str) -> None:
    """Write two COCO files of the one annotated: every `every`-th photo to `val`, the others to `train`."""
    content = read_json(annotations.path)
    kept_out = np.arange(len(annotations.ids)) % every == every - 1
    for path, own in ((train, ~kept_out), (val, kept_out)):
        ids = set(annotations.ids[own].tolist())
        images = [image for image in content["images"] if image["id"] in ids]
        faces = [face for face in content["annotations"] if face.get("image_id") in ids]
        images = moved_images(images, annotations.path, path)
        write_json(path, content | {"images": images, "annotations": faces})
        print(f"{path}: {len(images):,} photos, {len(faces):,} boxes")


def show(annotations: Annotations, args) -> list:
    """Draw `args.count` of the photos with their faces (PIL). Raises InputError if none can be read."""
    size = args.size if args.augment else (None, None)
    dataset, pictures = FaceDataset(annotations, *size, args.min_face), []
    for place, index in enumerate(np.random.default_rng(0).permutation(len(dataset))):
        item = dataset[index, (0, place) if args.augment else None]
        if not item.error:  # report() names all of them
            picture = Image.fromarray(item.picture.permute(1, 2, 0).numpy())
            picture = draw_faces(picture, item.faces[~item.ignored])
            pictures.append(draw_faces(picture, item.faces[item.ignored], colour=IGNORED))
        if len(pictures) == args.count:
            break
    require(pictures, item.error)
    return pictures


@command
def main(argv=None):
    """Draw, describe, check, split."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["data/train.json"], metavar=("JSON", "VAL"),
        help="COCO json (default data/train.json); a second one is compared with it, as the validation set")
    add("--out", type=parse_picture, default="sheet.png",
        help="the picture (default %(default)s); suspects.png and suspects.csv are written beside it")
    add("--augment", action="store_true", help="show the training's view, augmented, at --size")
    add("--count", type=at_least(1), default=16, help="photos shown (default %(default)s)")
    add("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    add("--min-face", type=int, default=17, help="smaller faces are ignored (default %(default)s px)")
    add("--split", nargs=3, metavar=("N", "TRAIN", "VAL"),
        help="also write every N-th photo to the json VAL and the others to TRAIN")
    args = parser.parse_args(argv)
    if len(args.data) > 2 or Path(args.out).stem == "suspects":
        parser.error("--data takes one json, or two: training and validation; --out not suspects.png")
    if args.split:
        number, *parts = args.split
        files = {os.path.realpath(path) for path in (args.data[0], *parts)}
        if not number.isdecimal() or int(number) < 2 or len(files) < 3:
            parser.error("--split takes a number from 2 on, and two other files")
    sets = [read_annotations(path) for path in args.data]
    photos = len(sets[0].ids)
    require(photos, f"{sets[0].path}: no photos to show")
    require(not args.split or int(number) <= photos, f"{sets[0].path}: has only {photos} photos to --split")
    for each in sets:
        each.require_photos()
    pictures = show(sets[0], args)
    save_picture(contact_sheet(pictures), args.out)
    for each in sets:
        print(describe(each, args.min_face))
    print(f"{len(pictures)} photos in {args.out}: faces green, ignored ones orange")
    print("\n".join(report(sets, Path(args.out).parent)))
    if args.split:
        split(sets[0], int(number), *parts)


if __name__ == "__main__":
    main()
