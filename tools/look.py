"""Show photos with their faces, and what is suspect in them: the first thing to do with one's own labels.

    python -m tools.look --data data/train.json --out sheet.png   # as they are
    python -m tools.look --data data/train.json --out sheet.png --augment   # as the training sees them
    python -m tools.look --data train.json val.json   # photos that are in both, too
    python -m tools.look --data mine.json --split 5 train.json val.json   # every fifth photo for validation
"""

import os
from pathlib import Path

from support.script import (InputError, command, new_parser, parse_picture, parse_size, read_json, require,
                            write_json)

import numpy as np

from data import FaceDataset, to_image
from support.coco import Annotations, moved_images, read_annotations
from support.pictures import IGNORED, contact_sheet, draw_faces, load_picture, save_picture
from tools.suspects import report


def describe(annotations: Annotations, min_face: int) -> list[str]:
    """Counts and face sizes as lines of text."""
    kept, photos = ~annotations.ignored, len(annotations.ids)
    lines = [f"{photos:,} photos, {photos - len(np.unique(annotations.image)):,} of them without faces; "
             f"{kept.sum():,} faces, {(~kept).sum():,} more to ignore: crowds, empty boxes, boxes outside"]
    sides = annotations.xywh[kept, 2:].min(1, initial=np.inf)
    if len(sides):
        text = "smaller side of faces, px: least {:.0f}, 10 % {:.0f}, median {:.0f}, 90 % {:.0f}, most {:.0f}"
        lines.append(text.format(*np.quantile(sides, (0, 0.1, 0.5, 0.9, 1)))
                     + f"; below {min_face} px: {(sides < min_face).sum():,}")
    return lines


def split(annotations: Annotations, every: int, train: str, val: str) -> None:
    """Write two COCO files of the one annotated: every `every`-th photo to `val`, the others to `train`."""
    content = read_json(annotations.path)
    kept_out = np.arange(len(annotations.ids)) % every == every - 1
    for path, own in ((train, ~kept_out), (val, kept_out)):
        images = [image for n, image in enumerate(content["images"]) if own[n]]
        ids = set(annotations.ids[own].tolist())
        faces = [face for face in content["annotations"] if face.get("image_id") in ids]
        images = moved_images(images, annotations.path, path)
        write_json(path, content | {"images": images, "annotations": faces})
        print(f"{path}: {len(images):,} photos, {len(faces):,} boxes")


def show(annotations: Annotations, args) -> list:
    """Draw `args.count` photos with their faces, of those that can be read; returns pictures (PIL).

    Raises InputError if none can."""
    dataset = FaceDataset(annotations, *args.size, args.min_face)
    pictures, errors = [], []
    for place, index in enumerate(np.random.default_rng(args.seed).permutation(len(dataset))):
        own = slice(dataset.starts[index], dataset.starts[index + 1])
        faces, ignored = dataset.faces[own], dataset.ignored[own]
        try:
            if args.augment:
                item = dataset[index, (args.seed, place)]
                require(not item.error, item.error)
                image, faces, ignored = to_image(item.picture), item.faces, item.ignored
            else:
                image = load_picture(annotations.file(index))
        except InputError as error:  # report() names all of them
            errors.append(error)
            continue
        pictures.append(draw_faces(draw_faces(image, faces[~ignored]), faces[ignored], colour=IGNORED))
        if len(pictures) == args.count:
            break
    if not pictures:
        raise errors[0]
    return pictures


@command
def main(argv=None):
    """Show photos of a dataset with their faces."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["data/train.json"], metavar=("JSON", "VAL"),
        help="COCO json (default data/train.json); a second one is compared with it, as the validation set")
    add("--out", type=parse_picture, default="sheet.png",
        help="the picture (default %(default)s); suspects.png and suspects.csv are written beside it")
    add("--augment", action="store_true", help="show the training's view, augmented, at --size")
    add("--count", type=int, default=16, help="photos shown (default %(default)s)")
    add("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    add("--min-face", type=int, default=17, help="smaller faces are ignored (default %(default)s px)")
    add("--seed", type=int, default=0, help="another seed shows other photos (default %(default)s)")
    add("--split", nargs=3, metavar=("N", "TRAIN", "VAL"),
        help="also write every N-th photo to the json VAL and the others to TRAIN")
    args = parser.parse_args(argv)
    if len(args.data) > 2:
        parser.error("--data takes one json, or two: training and validation")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    sets = [read_annotations(path) for path in args.data]
    annotations, photos = sets[0], len(sets[0].ids)
    require(photos and args.count > 0, f"{annotations.path}: no photos to show")
    if args.split and not (args.split[0].isdecimal() and 2 <= int(args.split[0]) <= photos):
        parser.error(f"--split {args.split[0]}: a number from 2 to that of the photos ({photos}) expected")
    if args.split and len({os.path.realpath(path) for path in (args.data[0], *args.split[1:])}) < 3:
        parser.error("--split: TRAIN and VAL must be two other files")
    for each in sets:
        each.require_photos()
    pictures = show(annotations, args)
    save_picture(contact_sheet(pictures), args.out)
    for each in sets:
        print("\n".join(describe(each, args.min_face)))
    print(f"{len(pictures)} photos in {args.out}: faces green, ignored ones orange")
    print("\n".join(report(sets, Path(args.out).parent)))
    if args.split:
        split(annotations, int(args.split[0]), *args.split[1:])


if __name__ == "__main__":
    main()
