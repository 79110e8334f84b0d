"""YOLO's folders of labels, read and written: boxes, oriented boxes, polygons, boxes with keypoints."""

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from tools.labels import Label, Labels, Photo, around, find_files, number, photos_around, read_text
from support.pictures import PICTURES
from support.script import InputError

NAME_FILES = ("data.yaml", "data.yml", "classes.txt", "obj.names", "_darknet.labels")
OTHER_TEXTS = {"classes", "predefined_classes", "labelmap", "train",
               "val", "valid", "test", "notes", "readme"}


def is_other_text(file):
    """Whether a txt that lies beside YOLO labels is none itself, such as classes.txt."""
    other = file.stem.lower().split(".")[0] in OTHER_TEXTS or "ImageSets" in file.parts
    return other and not any(file.with_suffix(suffix).exists() for suffix in PICTURES)


def read_yolo(folder):
    """Read YOLO's txt files below a folder: boxes, oriented boxes, polygons, boxes with keypoints.

    A line is `class cx cy w h`, `class x1 y1 x2 y2 x3 y3 ...`, or a box with its score or keypoints after
    it; all but the class in fractions of the photo. Names are in data.yaml, classes.txt or obj.names there,
    or a folder or two above.
    """
    places = [folder, *list(folder.resolve().parents)[:2]]
    file = next((place / name for place in places for name in NAME_FILES if (place / name).is_file()), None)
    names, keypoints = _yolo_names(file) if file else ([], None)
    rows, base = [], photos_around(folder)
    texts = [file for file in find_files(folder, {".txt"}) if not is_other_text(file)]
    for text in tqdm(texts, "labels", disable=None):
        own = [(f"{text}:{n}", line.split()) for n, line in enumerate(read_text(text).split("\n"), 1)]
        rows.append((text, [(place, tokens) for place, tokens in own if tokens]))
    lengths = {len(tokens) for _, own in rows for _, tokens in own}
    if keypoints is None and 15 in lengths <= {5, 15}:
        raise InputError(
            f"{folder}: lines have 15 numbers: a box and 5 landmarks, or a polygon of 7 points? Write "
            "kpt_shape: [5, 2] or kpt_shape: [0, 0] into data.yaml")
    photos = [Photo([Path(os.path.relpath(text, base)).as_posix()], str(text),
                    [_yolo_label(place, tokens, names, file, keypoints or 0) for place, tokens in own])
              for text, own in rows]
    return Labels("YOLO", photos, names, relative=True)


def _yolo_label(place, tokens, names, file, keypoints):
    """One line of YOLO. `keypoints` is how many numbers follow the box in each line, 0 if unknown."""
    values = [number(place, "a value", token) for token in tokens]
    category, *values = values
    if not category.is_integer() or category < 0 or names and category >= len(names):
        raise InputError(
            f"{place}: class {tokens[0]!r}; "
            + (f"{file} names {len(names)}, from 0" if names else "a whole number from 0 is expected"))
    count = len(values)
    pose = keypoints and count - 4 == keypoints or count > 5 and count % 2 and (count - 4) % 3 == 0
    if count not in (4, 5) and not pose and (count < 6 or count % 2):
        raise InputError(
            f"{place}: {count + 1} numbers; class cx cy w h, or class x1 y1 x2 y2 x3 y3 ... expected")
    shape = values[:4] if pose else values
    if max(map(abs, shape)) > 2:
        raise InputError(
            f"{place}: {max(shape, key=abs):g} is no fraction of a photo's side; "
            "YOLO's numbers are from 0 to 1")
    if count in (4, 5) or pose:
        cx, cy, w, h = shape[:4]
        box = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        box = around(zip(values[::2], values[1::2]))
    return Label(names[int(category)] if names else str(int(category)), box)


def _yolo_names(file):
    """The class names, and how many numbers the keypoints of data.yaml take: (names, number or None)."""
    text = read_text(file)
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.split("\n") if line.strip()], None
    shape = re.search(r"^kpt_shape:\s*\[\s*(\d{1,4})\s*,\s*(\d)\s*\]", text, re.MULTILINE)
    keypoints = int(shape[1]) * int(shape[2]) if shape else None
    found = re.search(r"^names[ \t]*:(.*(?:\n(?:[ \t\-\]}].*|[ \t]*(?=\n)))*)", text, re.MULTILINE)
    if not found:
        return [], keypoints
    body = re.sub(r"""("[^"]*"|'[^']*')|(?:^|(?<=\s))#[^\n]*""", lambda m: m[1] or "", found[1]).strip()
    if body[:1] in ("[", "{"):
        keyed = body[0] == "{"
        parts = re.findall(r"""(?:[^,"']|"[^"]*"|'[^']*')+""", body[1:-1]) if body[-1] in "]}" else []
    else:
        parts = [line.strip() for line in body.split("\n") if line.strip()]
        keyed = not all(part.startswith("- ") for part in parts)
        parts = parts if keyed else [part[2:] for part in parts]
    names = {}
    for n, part in enumerate(part.strip() for part in parts if part.strip()):
        key, _, name = part.partition(":") if keyed else (str(n), ":", part)
        name = name.strip()
        if name[:1] in ("'", '"') and name[-1] == name[0] and len(name) > 1:
            name = name[1:-1]
        if key.strip() != str(n) or not name or name[0] in "[{&*!|>\"'":
            raise InputError(f"{file}: names are not understood at {part[:60]!r}; write names: [face, other]")
        names[n] = name
    if not names:
        raise InputError(f"{file}: names are not understood; write names: [face, other]")
    return list(names.values()), keypoints


def write_yolo(folder, photos):
    """Write a dataset that Ultralytics reads: copies of `photos`, their labels, and data.yaml.

    `photos` are (path, name below images/, size, faces `[(x, y, w, h)]` in pixels). Raises InputError where
    two photos would share a label; nothing is left half-written.
    """
    folder, texts = Path(folder), {}
    for path, name, _, _ in photos:
        text = PurePosixPath(name).with_suffix(".txt")
        if texts.setdefault(text, path) != path:
            raise InputError(f"{path}: would share the label {text} with {texts[text]}; rename one")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for path, name, (width, height), faces in tqdm(photos, "copying", disable=None):
            picture = temporary / "images" / name
            text = (temporary / "labels" / name).with_suffix(".txt")
            picture.parent.mkdir(parents=True, exist_ok=True)
            text.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, picture)
            rows = [((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                    for x, y, w, h in faces]
            text.write_text("".join("0 {:.8f} {:.8f} {:.8f} {:.8f}\n".format(*row) for row in rows))
        (temporary / "data.yaml").write_text(
            "train: images\nval: images  # train on one folder, validate on another\nnames: [face]\n")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
