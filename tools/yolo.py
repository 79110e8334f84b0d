"""YOLO's folders of labels, read and written: boxes, oriented boxes, polygons, boxes with keypoints."""

import os
import shutil
from collections import defaultdict
from pathlib import Path, PurePosixPath

from support.script import InputError, read_text, require

import numpy as np
import yaml
from tqdm import tqdm

from tools.labels import Label, Labels, Photo, around, find_files, number, photos_around

NAME_FILES = ("data.yaml", "data.yml", "classes.txt", "obj.names", "_darknet.labels")


def begins_with_a_box(text):
    """Whether a txt begins as YOLO's labels do, with five numbers or more, and not as a list of names."""
    try:
        tokens = read_text(text).split("\n", 1)[0].split()
        return len([number(text, "a value", token) for token in tokens]) > 4
    except InputError:
        return False


def read_yolo(path):
    """Read YOLO's txt files below a folder, or beside its yaml: boxes, oriented boxes, polygons, keypoints.

    A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, maybe with keypoints, a score and the number
    of a track after it; all but class and track in fractions of the photo. Names are in that yaml, or in one
    of NAME_FILES there, or a folder or two above. What cannot be read is kept as the `problem` of a photo."""
    folder = path if path.is_dir() else path.parent
    places = (folder, *folder.resolve().parents[:2])
    files = [path, *(place / name for place in places for name in NAME_FILES)]
    file = next((file for file in files if file.is_file()), None)
    names, keypoints = read_names(file) if file else ([], None)
    base, photos, lines, by_length = photos_around(folder), [], [], defaultdict(list)
    for text in tqdm(find_files(folder, {".txt"}), "labels", disable=None):
        photo = Photo([Path(os.path.relpath(text, base)).as_posix()], str(text), [])
        photos.append(photo)
        try:
            lines += [(photo, *line) for line in _read_lines(text, names, file)]
        except InputError as error:
            photo.problem = error
    for _, _, _, values in lines:
        by_length[len(values)].append(values)
    corners = _count_corners({count: np.array(rows) for count, rows in by_length.items()}, keypoints, folder)
    for photo, place, category, values in lines:
        try:
            photo.labels.append(Label(category, _box(place, values, corners)))
        except InputError as error:
            photo.problem = photo.problem or error
    return Labels("YOLO", photos, names, relative=True)


def _read_lines(text, names, file):
    """Yield the lines of a txt: (place, category, numbers after the class). Raises InputError."""
    expected = f"{file} names {len(names)}, from 0" if names else "a whole number from 0 is expected"
    for n, line in enumerate(read_text(text).split("\n"), 1):
        if line.strip():
            category, *values = [number(f"{text}:{n}", "a value", token) for token in line.split()]
            require(category.is_integer() and 0 <= category < (len(names) or np.inf),
                    f"{text}:{n}: class {line.split()[0]!r}; {expected}")
            yield f"{text}:{n}", names[int(category)] if names else str(int(category)), values


def _count_corners(rows, keypoints, folder):
    """How many numbers of a line are a polygon's corners: {length: count}, 0 for a box, nothing for neither.

    `rows` are {length: [R, length]} without the class, `keypoints` what kpt_shape says, if it does."""
    ends = [own[:, -1] for length, own in rows.items() if length >= 6 and length % 2 == 0]
    tracks = bool(ends) and all((end >= 1).all() and (end % 1 == 0).all() for end in ends)
    corners = {}
    for length, own in rows.items():
        extra = length - 4 - (keypoints or 0)  # a score, the number of a track
        seen = length % 3 == 1 and (length % 2 or length >= 16) and np.isin(own[:, 6::3], (0, 1, 2)).all()
        if length in (4, 5) or length == 6 and tracks or keypoints and extra in (0, 1, 2) or seen:
            corners[length] = 0
        elif not keypoints and length > 5:
            corners[length] = length - 1 if length % 2 else length - 2 * (tracks and length > 7)
    long = [length for length, count in corners.items() if count > 7]
    alike = keypoints is None and long and max(long) - min(long) <= 2  # polygons are of any length
    require(not alike or not all(_holds_the_rest(rows[length], corners[length]) for length in long),
            f"{folder}: lines have {max(long, default=0) + 1} numbers: "
            "a box and its landmarks, or a polygon? Write kpt_shape: [5, 2] for 5 landmarks, "
            "or kpt_shape: [0, 0] for polygons, into data.yaml")
    return corners


def _holds_the_rest(rows, count):
    """Whether the first four numbers of most rows are a box in the photo that holds the points after it.

    These have two numbers or three, 0 or below if not seen. A parallelogram is an oriented box."""
    points = rows[:, :count].reshape(len(rows), -1, 2)
    if count == 8 and np.allclose(points[:, 0] + points[:, 2], points[:, 1] + points[:, 3], atol=1e-3):
        return False
    centre, half = points[:, :1], points[:, 1:2] / 2 + 0.01
    in_photo = ((centre - half > -0.02) & (centre + half < 1.02)).all(2)
    for numbers in (2, 3):
        own = rows[:, 4:count - (count - 4) % numbers].reshape(len(rows), -1, numbers)[:, :, :2]
        held = (np.abs(own - centre) <= half).all(2) | (own <= 0).all(2)
        if (held & in_photo).all(1).mean() > 0.5:
            return True
    return False


def _box(place, values, corners):
    """The xyxy box of one line. `corners` says how many of its numbers are a polygon's."""
    count = corners.get(len(values))
    require(count is not None,
            f"{place}: {len(values) + 1} numbers; class cx cy w h, or class x1 y1 x2 y2 x3 y3 ... expected")
    shape = values[:count or 4]
    largest = max(shape, key=abs)
    require(abs(largest) <= 2, f"{place}: {largest:g} is no fraction of a photo's side, from 0 to 1")
    if count:
        return around(place, [*zip(shape[::2], shape[1::2])])
    cx, cy, w, h = shape
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def read_names(file):
    """The class names, and how many numbers the keypoints of data.yaml take: (names, number or None)."""
    text = read_text(file)
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.split("\n") if line.strip()], None
    try:
        content = yaml.load(text, yaml.BaseLoader)  # safe, and all are words: a class may be called no
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())[:200]})") from None
    content = content if isinstance(content, dict) else {"names": content}
    names, shape = content.get("names", ["0"]), content.get("kpt_shape", ["0", "0"])
    if isinstance(names, dict) and list(names) == [str(n) for n in range(len(names))]:
        names = list(names.values())
    require(names and isinstance(names, list) and all(isinstance(name, str) and name for name in names),
            f"{file}: names are not understood, {str(names)[:60]!r}; write names: [face, other]")
    require(isinstance(shape, list) and len(shape) == 2 and all(str(side).isdecimal() for side in shape),
            f"{file}: kpt_shape is not understood, {str(shape)[:60]!r}; write kpt_shape: [5, 2]")
    keypoints = int(shape[0]) * int(shape[1]) if "kpt_shape" in content else None
    return names if "names" in content else [], keypoints


def write_yolo(folder, files, names, images, annotations):
    """Write a dataset for Ultralytics: `files` as `names` below images/, labels of COCO's `annotations`."""
    texts, rows = {}, defaultdict(list)
    for path, name in zip(files, names):
        text = PurePosixPath(name).with_suffix(".txt")
        require(texts.setdefault(text, path) == path,
                f"{path}: would share the label {text} with {texts[text]}; rename one")
    for face in annotations:
        rows[face["image_id"]].append(face["bbox"])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for path, name, text, image in zip(tqdm(files, "copying", disable=None), names, texts, images):
            picture, label = temporary / "images" / name, temporary / "labels" / text
            for file in (picture, label):
                file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, picture)
            width, height = image["width"], image["height"]
            boxes = [((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                     for x, y, w, h in rows[image["id"]]]
            label.write_text("".join("0 {:.8f} {:.8f} {:.8f} {:.8f}\n".format(*box) for box in boxes))
        (temporary / "data.yaml").write_text(
            "train: images\nval: images  # train on one folder, validate on another\nnames: [face]\n")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
