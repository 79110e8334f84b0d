"""Labels of other tools: Pascal VOC, CVAT, Label Studio, COCO of several categories, CSV; yolo.py has YOLO.

Nothing is opened but the labels: labels_to_coco.py recognises the format and finds the photos.
"""

import csv
import json
import math
import os
import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from support.pictures import PICTURES
from support.script import InputError

FLAGS = ("difficult", "ignore", "truncated", "occluded", "iscrowd")
LARGEST = 10**12  # coordinates must be smaller, and their areas then are fit for read_annotations
LABEL_FOLDERS = {"labels", "annotations"}  # photos may be beside these
UNNAMED = "(no label)"


@dataclass
class Label:
    """One labelled object."""

    category: str
    box: tuple  # xyxy, in pixels, or in fractions of the photo
    flags: dict = field(default_factory=dict)  # those of FLAGS that the file has: 0 or 1


@dataclass
class Photo:
    """One labelled photo."""

    names: list  # what it may be called, best first
    place: str  # where the labels name it, for messages
    labels: list
    size: tuple | None = None  # (width, height) by the labels, if they say


@dataclass
class Labels:
    """What a file or a folder of labels holds."""

    format: str
    photos: list
    categories: list = field(default_factory=list)  # all that are declared, used or not
    relative: bool = False  # boxes are fractions of the photo's sides
    left_out: Counter = field(default_factory=Counter)  # what is no box, or on no photo that was labelled


def find_files(folder, suffixes, own=None):
    """All files below a folder with these endings, sorted, but hidden ones (a Mac's zip is full of them)."""
    own = own and Path(own).resolve()
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in suffixes
        and p.is_file()
        and not any(part.startswith((".", "__MACOSX")) for part in p.relative_to(folder).parts)
        and (own is None or p.resolve() != own))


def photos_around(folder):
    """The folder to search photos in: that of the labels, or the one around their `labels` folder."""
    for above in list(Path(os.path.abspath(folder)).parents)[:3]:
        inside = os.path.relpath(folder, above).split(os.sep)[0]
        if inside.lower() in LABEL_FOLDERS:
            return Path(os.path.normpath(folder / os.path.relpath(above, folder)))
    return folder


def read_text(path):
    """Read a text file as UTF-8. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def number(place, what, value):
    """Check and convert one finite number, given as a number or as text. Raises InputError."""
    try:
        found = float(value) if not isinstance(value, bool) and "_" not in str(value) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) < LARGEST:  # NaN too
        raise InputError(f"{place}: {what} is {str(value)[:60]!r}, a number is expected")
    return found


def flag(value):
    """1 if a flag is set: 1, true and yes in any form. Anything else is 0, such as VOC's "Unspecified"."""
    return int(value in (1, True) or str(value).strip().lower() in ("1", "1.0", "true", "yes"))


def around(points):
    """The box around points `[(x, y)]`."""
    xs, ys = zip(*points)
    return min(xs), min(ys), max(xs), max(ys)


def turned(box, degrees, pivot, stretch=(1, 1)):
    """The box around an xyxy box that is turned clockwise about `pivot`.

    `stretch` (width, height) are the pixels of a unit, where these differ.
    """
    if not degrees:
        return box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    (x0, y0), (width, height) = pivot, stretch
    corners = [((x - x0) * width, (y - y0) * height) for x in box[::2] for y in box[1::2]]
    return around([(x0 + (x * cos - y * sin) / width, y0 + (x * sin + y * cos) / height) for x, y in corners])


def around_ellipse(cx, cy, rx, ry, degrees=0, stretch=(1, 1)):
    """The box around an ellipse of half axes rx, ry that is turned clockwise; `stretch` as in `turned`."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    (width, height), (rx, ry) = stretch, (rx * stretch[0], ry * stretch[1])
    dx, dy = math.hypot(rx * cos, ry * sin) / width, math.hypot(rx * sin, ry * cos) / height
    return cx - dx, cy - dy, cx + dx, cy + dy


def middle(box):
    """The centre of an xyxy box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


# Pascal VOC and CVAT


def read_xml(path):
    """Parse an XML file; the root element. Raises InputError, also where entities could make it explode."""
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(f"{path}: declares a document type or entities; labels need none, take them out")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"{path}: not XML ({error})") from None
    if root.tag not in ("annotation", "annotations"):
        raise InputError(
                f"{path}: <{root.tag[:40]}> is neither Pascal VOC's <annotation> nor CVAT's <annotations>")
    return root


def read_voc(files, folder):
    """Read Pascal VOC's xml files, one for each photo. Corners are taken as they are, from 0."""
    photos, base, corners = [], photos_around(folder), ("xmin", "ymin", "xmax", "ymax")
    for file in tqdm(files, "labels", disable=None):
        root = read_xml(file)
        if root.tag != "annotation":
            raise InputError(f"{file}: is CVAT's among {len(files)} xml files; name it alone")
        own = Path(os.path.relpath(file, base))
        name = re.split(r"[\\/]", (root.findtext("filename") or "").strip())[-1]
        names = [(own.parent / name).as_posix()] if name else []
        labels = []
        for n, entry in enumerate(root.findall("object"), 1):
            place = f"{file}: object {n}"
            box = [number(place, key, entry.findtext(f"bndbox/{key}")) for key in corners]
            flags = {key: flag(entry.findtext(key)) for key in FLAGS if entry.find(key) is not None}
            labels.append(Label((entry.findtext("name") or "").strip() or UNNAMED, tuple(box), flags))
        size = tuple(number(file, key, root.findtext(f"size/{key}") or 0) for key in ("width", "height"))
        photos.append(Photo([*names, own.as_posix()], str(file), labels, size))
    return Labels("Pascal VOC", photos)


def read_cvat(path, root):
    """Read CVAT's xml for images 1.1: boxes, also turned ones, polygons, ellipses, masks."""
    if root.find("track") is not None:
        raise InputError(f'{path}: holds tracks of a video; export "CVAT for images 1.1"')
    result = Labels("CVAT", [], [name.text or UNNAMED for name in root.iterfind("meta//labels/label/name")])
    for n, image in enumerate(root.findall("image")):
        place = f"{path}: image {image.get('id', n)}"
        if not image.get("name"):
            raise InputError(f"{place}: has no name")
        labels = []
        for shape in image:
            box = _cvat_box(f"{place}: <{shape.tag}>", shape)
            if box is None:
                result.left_out[f"shapes: {shape.tag}"] += 1
                continue
            named = {a.get("name"): a.text for a in shape.findall("attribute")} | shape.attrib
            flags = {key: flag(named[key]) for key in FLAGS if key in named}
            labels.append(Label(shape.get("label") or UNNAMED, box, flags))
        size = tuple(number(place, key, image.get(key) or 0) for key in ("width", "height"))
        result.photos.append(Photo([image.get("name")], place, labels, size))
    return result


def _cvat_box(place, shape):
    """The box of a CVAT shape, or None if it has none."""

    def numbers(*keys):
        return [number(place, key, shape.get(key)) for key in keys]

    degrees = number(place, "rotation", shape.get("rotation") or 0)
    if shape.tag == "box":
        box = tuple(numbers("xtl", "ytl", "xbr", "ybr"))
        return turned(box, degrees, middle(box))
    if shape.tag == "polygon":
        points = [_pair(place, point.split(",")) for point in (shape.get("points") or "").split(";")]
        return around([[number(place, "points", value) for value in point] for point in points])
    if shape.tag == "ellipse":
        return around_ellipse(*numbers("cx", "cy", "rx", "ry"), degrees)
    if shape.tag == "mask":
        left, top, width, height = numbers("left", "top", "width", "height")
        return left, top, left + width, top + height
    return None


def _pair(place, point):
    """Check that a point has two coordinates."""
    if not isinstance(point, (list, tuple)) or len(point) != 2:
        raise InputError(f"{place}: {str(point)[:60]!r} is no point x, y")
    return point


# Label Studio and COCO


def read_label_studio(path, tasks):
    """Read Label Studio's tasks, of the full json or of JSON-MIN. Boxes are given in percent.

    A task that nobody has finished is no photo without faces: it is left out.
    """
    result = Labels("Label Studio", [], relative=True)
    for n, task in enumerate(tasks):
        place = f"{path}: task {task.get('id', n)}"
        full = isinstance(task.get("data"), dict)
        if not full and "annotation_id" not in task:
            raise InputError(f'{place}: neither "data" nor "annotation_id", so no task of Label Studio')
        texts = [_file_name(v) for v in (task["data"] if full else task).values() if isinstance(v, str)]
        name = next((text for text in texts if Path(text).suffix.lower() in PICTURES), None)
        if name is None:
            raise InputError(f"{place}: names no picture")
        if full:
            done = [a for a in _dicts(task.get("annotations", task.get("completions")))
                    if not a.get("was_cancelled") and not a.get("skipped")]
            newest = max(done, key=lambda a: str(a.get("created_at") or ""), default={})
            result.left_out["older annotations"] += max(len(done) - 1, 0)
            regions = _dicts(newest.get("result"))
        else:
            done = task["annotation_id"] is not None
            regions = [{"value": region} for value in task.values() for region in _dicts(value)]
        if not done:
            result.left_out["tasks not annotated"] += 1
            continue
        labels, size = [], None
        for region in regions:
            own = _label_studio_region(place, region)
            result.left_out["regions without a box"] += own is None
            if own:
                size = own[1] or size
                labels += own[0]
        without_prefix = re.sub(r"(^|/)[0-9a-f]{8}-(?=[^/]+$)", r"\1", name)  # of an upload
        result.photos.append(Photo([name, without_prefix], place, labels, size))
    return result


def _dicts(value):
    """The objects in a JSON list, or nothing if it is none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _file_name(text):
    """The file that a task names: as a path, a URL, or Label Studio's /data/local-files/?d=path."""
    parts = urllib.parse.urlsplit(text) if re.match(r"/data/|\w{2,}://", text) else None
    if parts is None:
        return text
    query = urllib.parse.parse_qs(parts.query)
    return query["d"][0] if "d" in query else urllib.parse.unquote(parts.path)


def _label_studio_region(place, region):
    """The labels of a region, one for each name, and the size of its photo if it says; None without a box."""
    value = region.get("value")
    value = value if isinstance(value, dict) else {}
    size = [number(place, key, region.get(key, value.get(key)) or 0)
            for key in ("original_width", "original_height")]
    stretch = size if all(size) else None

    def numbers(*keys):
        return [number(place, key, value[key]) / 100 for key in keys]

    degrees = number(place, "rotation", value.get("rotation") or 0)
    if degrees and stretch is None:
        raise InputError(f"{place}: a turned region without original_width and original_height")
    if {"x", "y", "width", "height"} <= value.keys():
        x, y, width, height = numbers("x", "y", "width", "height")
        box = turned((x, y, x + width, y + height), degrees, (x, y), stretch)
    elif {"x", "y", "radiusX", "radiusY"} <= value.keys():
        box = around_ellipse(*numbers("x", "y", "radiusX", "radiusY"), degrees, stretch or (1, 1))
    elif isinstance(value.get("points"), list) and value["points"]:
        box = around([[number(place, "points", v) / 100 for v in _pair(place, p)] for p in value["points"]])
    else:
        return None
    lists = [own for key, own in value.items() if key.endswith("labels") and isinstance(own, list)]
    return [Label(str(name), box) for name in sum(lists, []) or [UNNAMED]], tuple(size)


def read_coco(path, content):
    """Read a COCO file of any categories. Where an annotation has no bbox, its polygons are taken."""
    for key in ("images", "annotations", "categories"):
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
            raise InputError(f'{path}: "{key}" must be a list of objects with an id each')
    above = {c.get("supercategory") for c in content.get("categories", [])}
    names = {json.dumps(c["id"]): str(c.get("name")) for c in content.get("categories", [])}
    photos = {}
    for image in content["images"]:
        place, key = f"{path}: image {str(image['id'])[:60]}", json.dumps(image["id"])
        if not isinstance(image.get("file_name"), str) or not image["file_name"] or key in photos:
            raise InputError(f"{place}: has no file_name, or is there twice")
        size = tuple(number(place, side, image.get(side) or 0) for side in ("width", "height"))
        photos[key] = Photo([image["file_name"]], place, [], size)
    for entry in content.get("annotations", []):
        place = f"{path}: annotation {str(entry['id'])[:60]}"
        photo, category = (json.dumps(entry.get(key)) for key in ("image_id", "category_id"))
        if photo not in photos or names and category not in names:
            raise InputError(
                f"{place}: belongs to image {photo[:60]} and category {category[:60]}, not both there")
        more = entry.get("attributes") if isinstance(entry.get("attributes"), dict) else {}
        box = _coco_box(place, entry)
        box = turned(box, number(place, "rotation", more.get("rotation") or 0), middle(box))
        flags = {key: flag(own[key]) for own in (more, entry) for key in FLAGS if key in own}
        photos[photo].labels.append(Label(names.get(category, UNNAMED), box, flags))
    used = {label.category for photo in photos.values() for label in photo.labels}
    declared = [name for name in names.values() if name in used or name not in above]  # Roboflow's
    return Labels("COCO", list(photos.values()), declared)


def _coco_box(place, entry):
    """The xyxy box of a COCO annotation, by its bbox or else its polygons."""
    if isinstance(entry.get("bbox"), list) and len(entry["bbox"]) == 4:
        x, y, w, h = (number(place, "bbox", value) for value in entry["bbox"])
        return x, y, x + w, y + h
    polygons = entry.get("segmentation")
    if entry.get("bbox") or not isinstance(polygons, list) or not polygons or not all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
        raise InputError(f"{place}: has neither a bbox of four numbers nor polygons; export boxes")
    flat = [[number(place, "segmentation", value) for value in polygon] for polygon in polygons]
    return around([point for polygon in flat for point in zip(polygon[::2], polygon[1::2])])


# CSV

COLUMNS = {"file": "file filename file_name image image_path path image_name", "x1": "x1 xmin x_min left",
           "y1": "y1 ymin y_min top", "x2": "x2 xmax x_max right", "y2": "y2 ymax y_max bottom",
           "label": "label class class_name category name"}


def read_csv(path):
    """Read `file,x1,y1,x2,y2` and maybe a label, in pixels: in this order, or by the names in a first line.

    A row with a file alone is a photo without faces. Without a label the category is face.
    """
    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    try:
        rows = list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count)))
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from None
    rows = [(n, [cell.strip() for cell in row]) for n, row in enumerate(rows, 1) if any(map(str.strip, row))]
    names = {alias: column for column, aliases in COLUMNS.items() for alias in aliases.split()}
    columns = dict(zip(("file", "x1", "y1", "x2", "y2", "label"), range(6)))
    if rows and re.match("[A-Za-z]", (rows[0][1] + ["", ""])[1]):
        head = [cell.lower() for cell in rows.pop(0)[1]]
        columns = {names.get(cell, cell): n for n, cell in reversed(list(enumerate(head)))}
    if not rows or not {"file", "x1", "y1", "x2", "y2"} <= columns.keys():
        raise InputError(
                f"{path}: rows of file,x1,y1,x2,y2 and maybe a label are expected, or a first line that "
            "names these columns")
    photos, largest = {}, 0
    for n, row in rows:
        place = f"{path}:{n}"
        own = {key: row[at] for key, at in columns.items() if at < len(row)}
        if not own.get("file") or len(row) > max(columns.values()) + 1:
            raise InputError(
                f"{place}: {','.join(row)[:60]!r} is no row of file,x1,y1,x2,y2 and maybe a label")
        size = tuple(number(place, key, own.get(key) or 0) for key in ("width", "height"))
        photo = photos.setdefault(own["file"], Photo([own["file"]], place, [], size))
        if any(own.get(key) for key in ("x1", "y1", "x2", "y2")):
            box = tuple(number(place, key, own.get(key)) for key in ("x1", "y1", "x2", "y2"))
            flags = {key: flag(own[key]) for key in FLAGS if key in own}
            category = own.get("label") or (UNNAMED if "label" in own else "face")
            photo.labels.append(Label(category, box, flags))
            largest = max(largest, *map(abs, box))
    if 0 < largest <= 1:
        raise InputError(f"{path}: all boxes are within 0 to 1, pixels are expected")
    return Labels("CSV", list(photos.values()))
