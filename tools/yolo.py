"""YOLO's folders of labels, read and written: boxes, oriented boxes, polygons, boxes with keypoints."""

import os
import shutil
from pathlib import Path, PurePosixPath

from support.script import InputError

import numpy as np
import yaml
from tqdm import tqdm

from tools.labels import Label, Labels, Photo, around, find_files, number, photos_around, read_text

NAME_FILES = ("data.yaml", "data.yml", "classes.txt", "obj.names", "_darknet.labels")


def begins_with_a_box(text):
    """Whether a txt begins as YOLO's labels do, with five numbers or more, and not as a list of names."""
    try:
        tokens = read_text(text).split("\n", 1)[0].split()
        return len(tokens) > 4 and all(number(text, "a value", token) is not None for token in tokens)
    except InputError:
        return False


def read_yolo(folder, names_file=None):
    """Read YOLO's txt files below a folder: boxes, oriented boxes, polygons, boxes with keypoints.

    A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, maybe with keypoints, a score and the number
    of a track after it; all but class and track in fractions of the photo. Names are in `names_file`, or in
    data.yaml, classes.txt or obj.names there, or a folder or two above. Lists of names and other texts lie
    beside labels: what cannot be read is a problem only of a photo that is found.
    """
    places = [folder, *list(folder.resolve().parents)[:2]]
    files = [names_file] if names_file else [place / name for place in places for name in NAME_FILES]
    file = next((file for file in files if file.is_file()), None)
    names, keypoints = _yolo_names(file) if file else ([], None)
    base, photos, lines = photos_around(folder), [], []
    for text in tqdm(find_files(folder, {".txt"}), "labels", disable=None):
        photo = Photo([Path(os.path.relpath(text, base)).as_posix()], str(text), [])
        photos.append(photo)
        try:
            lines += [(photo, *line) for line in _read_lines(text, names, file)]
        except InputError as error:
            photo.problem = error
    by_length = {}
    for _, _, values, _ in lines:
        by_length.setdefault(len(values), []).append(values)
    corners = _count_corners({count: np.array(rows) for count, rows in by_length.items()}, keypoints, folder)
    for photo, category, values, place in lines:
        count = corners[len(values)]
        if count is None:
            photo.problem = InputError(f"{place}: {len(values) + 1} numbers; class cx cy w h, or "
                                       "class x1 y1 x2 y2 x3 y3 ... expected")
            continue
        shape = values[:count or 4]
        if max(map(abs, shape)) > 2:
            photo.problem = InputError(f"{place}: {max(shape, key=abs):g} is no fraction of a photo's side; "
                                       "YOLO's numbers are from 0 to 1")
        cx, cy, w, h = shape[:4]
        box = around(zip(shape[::2], shape[1::2])) if count else (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        photo.labels.append(Label(category, box))
    return Labels("YOLO", photos, names, relative=True)


def _read_lines(text, names, file):
    """The lines of a txt: [(category, numbers after the class, place)]. Raises InputError."""
    lines = []
    for n, line in enumerate(read_text(text).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{text}:{n}"
        category, *values = [number(place, "a value", token) for token in line.split()]
        if not category.is_integer() or category < 0 or names and category >= len(names):
            expected = f"{file} names {len(names)}, from 0" if names else "a whole number from 0 is expected"
            raise InputError(f"{place}: class {line.split()[0]!r}; {expected}")
        lines.append((names[int(category)] if names else str(int(category)), values, place))
    return lines


def _count_corners(rows, keypoints, folder):
    """How many numbers of a row are a polygon's corners: {row length: count}.

    The count is 0 where the first four are a box, and None where neither fits. `rows` are {length: [R, length]}
    without the class, `keypoints` what kpt_shape says, None if it does not. Keypoints, a score and the number
    of a track may follow, in this order. Raises InputError where a box with landmarks might be a polygon.
    """
    ends = [own[:, -1] for count, own in rows.items() if count >= 6 and count % 2 == 0]
    tracks = bool(ends) and all((end >= 1).all() and (end % 1 == 0).all() for end in ends)
    corners = {}
    for count, own in rows.items():
        visible = own[:, 6::3]
        if count in (4, 5) or count == 6 and tracks:
            corners[count] = 0
        elif keypoints:
            corners[count] = 0 if 0 <= count - 4 - keypoints <= 2 else None
        elif count % 3 == 1 and (count % 2 or count >= 16) and np.isin(visible, (0, 1, 2)).all():
            corners[count] = 0  # x, y and whether it is seen of each keypoint
        else:
            even = count - 1 if count % 2 else count - 2 * tracks
            corners[count] = even if even >= 6 else None
    long = [count for count in corners if count > 7 and corners[count]]
    if keypoints is None and len(long) == 1 and _holds_the_rest(rows[long[0]], corners[long[0]]):
        raise InputError(
            f"{folder}: lines have {long[0] + 1} numbers: a box and its landmarks, or a polygon? Write "
            "kpt_shape: [5, 2] for 5 landmarks, or kpt_shape: [0, 0] for polygons, into data.yaml")
    return corners


def _holds_the_rest(rows, count):
    """Whether the first four numbers of most rows are a box in the photo that holds the points after it.

    These are of two numbers each or of three. Points that are not seen are 0 or below. `count` of the numbers
    would be a polygon's corners; a parallelogram is an oriented box.
    """
    x, y = rows[:, 0:count:2], rows[:, 1:count:2]
    if count == 8 and all((np.abs(p[:, 0] + p[:, 2] - p[:, 1] - p[:, 3]) < 1e-3).all() for p in (x, y)):
        return False
    cx, cy, w, h = rows[:, :4].T[:, :, None]
    in_photo = (np.minimum(cx - w / 2, cy - h / 2) > -0.01) & (np.maximum(cx + w / 2, cy + h / 2) < 1.01)
    for numbers in (2, 3):
        end = count - (count - 4) % numbers
        x, y = rows[:, 4:end:numbers], rows[:, 5:end:numbers]
        held = (np.abs(x - cx) <= w / 2 + 0.01) & (np.abs(y - cy) <= h / 2 + 0.01)
        if ((held | (x <= 0) & (y <= 0)) & in_photo).all(1).mean() > 0.5:
            return True
    return False


def _yolo_names(file):
    """The class names, and how many numbers the keypoints of data.yaml take: (names, number or None)."""
    text = read_text(file)
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.split("\n") if line.strip()], None
    try:
        content = yaml.load(text, yaml.BaseLoader)  # safe, and a class "no" stays a word
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not understood; write names: [face, other]")
    shape = content.get("kpt_shape")
    names = content.get("names", [])
    if isinstance(names, dict) and list(names) == [str(n) for n in range(len(names))]:
        names = list(names.values())
    if not isinstance(names, list) or "names" in content and not names or not all(
            isinstance(name, str) and name for name in names):
        raise InputError(f"{file}: names are not understood, {str(names)[:60]}; write names: [face, other]")
    if shape is None:
        return names, None
    if not isinstance(shape, list) or len(shape) != 2 or not all(str(side).isdecimal() for side in shape):
        raise InputError(f"{file}: kpt_shape {str(shape)[:60]} is not understood; "
                         "write kpt_shape: [5, 2] for 5 landmarks of x and y")
    return names, int(shape[0]) * int(shape[1])


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
