"""Convert WIDER FACE's annotation text to a COCO json.

    text=data/wider_face_split
    python wider_to_coco.py $text/wider_face_train_bbx_gt.txt data/WIDER_train/images data/train.json
    python wider_to_coco.py $text/wider_face_val_bbx_gt.txt data/WIDER_val/images data/val.json

Every annotation is kept. Those that are flagged invalid, or whose box is empty or outside the picture, get
`"iscrowd": 1`: training skips them and evaluation ignores them. File names in the output are relative to its
folder, so the json and its photos can be moved as one. Of a partial download --skip-missing converts the
pictures that are there.
"""

import os
import re
from pathlib import Path, PurePosixPath

from support.script import command, Parser, read_text, require, write_json

from support.coco import clip
from support.pictures import read_sizes

ATTRIBUTES = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
NUMBER = r"-?\d{1,7}(?:\.\d+)?"  # float() would accept "1_000" and "nan"
ROW = re.compile(rf"{NUMBER}(?:\s+{NUMBER}){{3}}(?:\s+-?\d{{1,7}}){{6}}", re.ASCII)  # x y w h ATTRIBUTES


def read_wider(path):
    """Read a WIDER FACE annotation file: `{name: rows}` in file order, a row x, y, w, h and ATTRIBUTES.

    Blank lines are accepted. A picture without faces has the count 0; the row of zeros that follows it in the
    official files may be missing. Raises InputError with `file:line` for any other format."""
    # Not str.splitlines(): it also splits at characters that may be part of a name.
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1)]
    lines = [(place, line) for place, line in lines if line]
    pictures, at = {}, 0
    while at < len(lines):
        place, line = lines[at]
        name = _name(place, line)
        require(name not in pictures, f"{place}: picture {name!r} is listed twice")
        require(at + 1 < len(lines), f"{place}: the file ends after the name {name!r}, is it truncated?")
        place, count = lines[at + 1]
        require(re.fullmatch(r"\d{1,9}", count, re.ASCII),
                f"{place}: the number of faces of {name!r} is expected, found {count[:60]!r}")
        said = f"{name!r} has {count} faces by {place}"
        rows = lines[at + 2:at + 2 + int(count)]
        at += 2 + len(rows)
        pictures[name] = [_row(own, row, said) for own, row in rows]
        require(len(rows) == int(count), f"{place}: the file ends after {len(rows)} faces, but {said}")
        if at < len(lines) and ROW.fullmatch(lines[at][1]):
            place, row = lines[at]  # the official train file has one of zeros after a picture without faces
            require(not rows and set(row.split()) == {"0"}, f"{place}: a row too many, {said}")
            at += 1
    require(pictures, f"{path}: lists no pictures")
    return pictures


def _name(place, text):
    """Check a picture's name: a relative path that stays inside the images folder. Raises InputError."""
    name = PurePosixPath(text)
    require(not ROW.fullmatch(text),
            f"{place}: a picture's name is expected, found {text[:60]!r}; does the count above agree?")
    require(not name.is_absolute() and text[1:2] != ":" and ".." not in name.parts and "\\" not in text,
            f"{place}: {text[:200]!r} is not plainly inside the images folder, write 'event/name.jpg'")
    return str(name)


def _row(place, text, said):
    """Parse the ten numbers of a face, whole ones to int. Raises InputError, with what is `said` of it."""
    require(ROW.fullmatch(text), f"{place}: x y w h and six whole numbers ({', '.join(ATTRIBUTES)}) are "
            f"expected, found {text[:60]!r}; {said}")
    values = map(float, text.split())
    return [int(value) if value.is_integer() else value for value in values]


def to_coco(pictures, sizes, prefix):
    """Make the COCO content of `pictures` in the folder `prefix` and their `sizes`: (content, counts)."""
    images, annotations = [], []
    met = dict.fromkeys(("invalid", "empty", "rows of zeros", "clipped", "outside"), 0)
    for image_id, ((name, rows), (width, height)) in enumerate(zip(pictures.items(), sizes), 1):
        images.append({"id": image_id, "file_name": str(prefix / name), "width": width, "height": height})
        for row in rows:
            attributes = dict(zip(ATTRIBUTES, row[4:]))
            box, kind = clip(row[:4], width, height)
            invalid = attributes["invalid"] != 0
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                                "bbox": box, "area": max(box[2], 0) * max(box[3], 0),
                                "iscrowd": int(invalid or kind in ("empty", "outside")), **attributes})
            met["invalid"] += invalid
            met["rows of zeros"] += not any(row)
            if kind != "inside":
                met[kind] += 1
    counts = {"pictures": len(images), "without annotation": sum(not rows for rows in pictures.values()),
              "annotations": len(annotations), **met,
              "marked iscrowd": sum(a["iscrowd"] for a in annotations)}
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}, counts


def convert(annotation, images, out, skip_missing=False):
    """Convert the text `annotation` and the folder `images` to the COCO file `out`: counts. Or InputError."""
    annotation, images, out = Path(annotation), Path(images), Path(out)
    require(images.is_dir(), f"{images}: no such folder of pictures")
    require(not out.is_dir() and os.path.realpath(out) != os.path.realpath(annotation),
            f"{out}: is a folder or the annotation text itself, name another file for the output")
    pictures = read_wider(annotation)
    missing = [name for name in pictures if not os.path.isfile(images / name)]
    require(not missing or skip_missing and len(missing) < len(pictures),
            f"{images}: of {len(pictures):,} pictures {len(missing):,} are missing, such as {missing[:3]}; "
            "of a partial download --skip-missing converts those that are there")
    for name in missing:
        del pictures[name]
    sizes = read_sizes(list(pictures), images)
    prefix = os.path.relpath(images, out.parent)
    if prefix.startswith(".."):  # the system resolves ".." after symbolic links, so resolve them first
        prefix = os.path.relpath(os.path.realpath(images), os.path.realpath(out.parent))
    content, counts = to_coco(pictures, sizes, PurePosixPath(Path(prefix).as_posix()))
    write_json(out, content)
    return counts | {"missing": len(missing)}


@command
def main(argv=None):
    """Convert one annotation text, and print what was found in it."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("annotation", help="WIDER FACE text, such as wider_face_train_bbx_gt.txt")
    add("images", help="folder of the pictures named in the text, such as data/WIDER_train/images")
    add("out", help="COCO json to write, such as data/train.json")
    add("--skip-missing", action="store_true", help="leave pictures out that are not in the folder")
    args = parser.parse_args(argv)
    for kind, number in convert(args.annotation, args.images, args.out, args.skip_missing).items():
        print(f"{kind:20}{number:>9,}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
