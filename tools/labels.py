"""Labels of other tools: Pascal VOC, CVAT, Label Studio, COCO of any categories, CSV, RetinaFace's text.

Nothing is opened but the labels: labels_to_coco.py finds the photos. What cannot be read raises InputError.
"""

import csv
import math
import os
import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support.script import InputError, read_text, require

import numpy as np
from tqdm import tqdm

from support.pictures import PICTURES

FLAGS = ("difficult", "ignore", "truncated", "occluded", "iscrowd")
LARGEST = 10**12  # coordinates must be smaller, and their areas then are fit for read_annotations
LABEL_FOLDERS = {"labels", "annotations"}  # photos may be beside these
UNNAMED = "(no label)"
COLUMNS = {"file": "file filename file_name image image_path path image_name", "x1": "x1 xmin x_min left",
           "y1": "y1 ymin y_min top", "x2": "x2 xmax x_max right", "y2": "y2 ymax y_max bottom",
           "label": "label class class_name category name"}


@dataclass
class Label:
    """One labelled object."""
    category: str
    box: tuple | list  # xyxy, in pixels, or in fractions of the photo
    flags: dict = field(default_factory=dict)  # those of FLAGS that the file has: 0 or 1


@dataclass
class Photo:
    """One labelled photo."""
    names: list  # what it may be called, best first
    place: str  # where the labels name it, for messages
    labels: list
    size: list = ()  # [width, height] by the labels, zeros or nothing if they do not say
    updated: str = ""  # when it was labelled, if they say
    problem: InputError | None = None  # why its labels cannot be read, if they are labels at all


@dataclass
class Labels:
    """What a file or a folder of labels holds."""
    format: str
    photos: list
    categories: list = field(default_factory=list)  # all that are declared, used or not
    relative: bool = False  # boxes are fractions of the photo's sides
    left_out: Counter = field(default_factory=Counter)  # what is no box, or on no photo that was labelled


def find_files(folder, suffixes):
    """All files below a folder with these endings, sorted, but hidden ones (a Mac's zip is full of them)."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(path for path in files if not any(
        part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts))


def photos_around(folder):
    """The folder to search photos in: that of the labels, or the one around their `labels` folder."""
    whole = Path(os.path.abspath(folder))
    around = [part.parent for part in (whole, *whole.parents[:2]) if part.name.lower() in LABEL_FOLDERS]
    return around[0] if around else folder


def number(place, what, value):
    """Check and convert one finite number, given as a number or as text."""
    try:
        found = float(value) if not isinstance(value, bool) and "_" not in str(value) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    require(abs(found) < LARGEST, f"{place}: {what} is {str(value)[:60]!r}, a number is expected")  # no NaN
    return found


def numbers(place, entry, keys, absent=None):
    """The numbers that `entry` has under `keys`, words of a text, or `absent` for what it does not say."""
    found = {key: entry.get(key) for key in keys.split()}
    return [number(place, key, absent if value in (None, "") else value) for key, value in found.items()]


def read_flags(entry):
    """Those of FLAGS that `entry` has: 1 for 1, true and yes in any form, 0 for all else ("Unspecified")."""
    return {key: int(str(entry[key]).strip().lower() in ("1", "1.0", "true", "yes"))
            for key in FLAGS if key in entry}


def around(place, points):
    """The xyxy box around points `[(x, y)]`, whose numbers are checked."""
    require(all(len(point) == 2 for point in points), f"{place}: points are not all pairs, x and y")
    points = np.array([[number(place, "points", value) for value in point] for point in points])
    return *points.min(0).tolist(), *points.max(0).tolist()


def turned(place, box, entry, pivot=None, unit=(1, 1)):
    """The box around an xyxy box that is turned clockwise by the `rotation` of `entry`, in degrees, about
    `pivot`, by default its middle. `unit` is the (width, height) in pixels of a unit."""
    angle = math.radians(*numbers(place, entry, "rotation", 0))
    if not angle:
        return box
    corners = np.array([(x, y) for x in box[::2] for y in box[1::2]])
    pivot = (corners[0] + corners[-1]) / 2 if pivot is None else pivot
    turn = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return around(place, (corners - pivot) * unit @ turn / unit + pivot)


def _parse_xml(path):
    """Parse an XML file; the root element. Entities are refused, since they could make it explode."""
    text = read_text(path)
    require("<!DOCTYPE" not in text and "<!ENTITY" not in text,
            f"{path}: declares a document type or entities; labels need none, take them out")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"{path}: not XML ({error})") from None
    require(root.tag in ("annotation", "annotations"),
            f"{path}: <{root.tag[:40]}> is neither Pascal VOC's <annotation> nor CVAT's <annotations>")
    return root


def read_xml(files, folder):
    """Read CVAT's xml, or Pascal VOC's, one for each photo. Corners are taken as they are, from 0."""
    root = _parse_xml(files[0])
    if root.tag == "annotations" and len(files) == 1:
        return _read_cvat(files[0], root)
    photos, base = [], photos_around(folder)
    for file in tqdm(files, "labels", disable=None):
        root = _parse_xml(file)
        require(root.tag == "annotation", f"{file}: is CVAT's among {len(files)} xml files; name it alone")
        own = Path(os.path.relpath(file, base))
        name = re.split(r"[\\/]", (root.findtext("filename") or "").strip())[-1]
        labels = []
        for n, entry in enumerate(root.findall("object"), 1):
            box = numbers(f"{file}: object {n}", _texts(entry, "bndbox/*"), "xmin ymin xmax ymax")
            category = (entry.findtext("name") or "").strip() or UNNAMED
            labels.append(Label(category, box, read_flags(_texts(entry, "*"))))
        names = [(own.parent / (name or own.name)).as_posix(), own.as_posix()]
        size = numbers(file, _texts(root, "size/*"), "width height", 0)
        photos.append(Photo(names, str(file), labels, size))
    return Labels("Pascal VOC", photos)


def _texts(element, path):
    """The texts of the elements at `path` in another, by their tags."""
    return {child.tag: child.text for child in element.iterfind(path)}


def _read_cvat(path, root):
    """Read CVAT's xml for images 1.1: boxes, also turned ones, polygons, masks."""
    require(root.find("track") is None, f'{path}: holds tracks of a video; export "CVAT for images 1.1"')
    result = Labels("CVAT", [], [name.text or UNNAMED for name in root.iterfind("meta//labels/label/name")])
    for n, image in enumerate(root.findall("image")):
        place = f"{path}: image {image.get('id', n)}"
        labels = []
        for shape in image:
            box = _cvat_box(f"{place}: <{shape.tag}>", shape)
            if box is None:
                result.left_out[f"shapes: {shape.tag}"] += 1
                continue
            flags = read_flags({a.get("name"): a.text for a in shape.findall("attribute")} | shape.attrib)
            labels.append(Label(shape.get("label") or UNNAMED, box, flags))
        require(image.get("name"), f"{place}: has no name")
        size = numbers(place, image, "width height", 0)
        result.photos.append(Photo([image.get("name")], place, labels, size))
    return result


def _cvat_box(place, shape):
    """The box of a CVAT shape, None for an ellipse and for what has no area."""
    if shape.tag == "box":
        return turned(place, numbers(place, shape, "xtl ytl xbr ybr"), shape)
    if shape.tag == "polygon":
        return around(place, [point.split(",") for point in (shape.get("points") or "").split(";")])
    if shape.tag == "mask":
        left, top, width, height = numbers(place, shape, "left top width height")
        return left, top, left + width, top + height
    return None


def read_label_studio(path, tasks):
    """Read Label Studio's tasks, also JSON-MIN: of annotations the newest counts, unfinished tasks do not."""
    result = Labels("Label Studio", [], relative=True)
    for n, task in enumerate(tasks):
        place = f"{path}: task {task.get('id', n)}"
        if "annotation_id" in task:  # JSON-MIN: one annotation, its regions beside the data
            lists = [value for value in task.values() if isinstance(value, list)]
            regions = [region | {"value": region} for region in sum(lists, []) if isinstance(region, dict)]
            done = [task | {"result": regions}] if task["annotation_id"] else []
            task = task | {"data": task, "annotations": done}
        require(isinstance(task.get("data"), dict),
                f'{place}: neither "data" nor "annotation_id", so no task of Label Studio')
        texts = [_file_name(value) for value in task["data"].values() if isinstance(value, str)]
        names = [text for text in texts if Path(text).suffix.lower() in PICTURES]
        require(names, f"{place}: names no picture")
        done = [one for one in task.get("annotations") or [] if not one.get("was_cancelled")]
        if not done:
            result.left_out["tasks not annotated"] += 1
            continue
        result.left_out["older annotations"] += len(done) - 1
        newest = max(reversed(done), key=_last_change)
        photo = Photo(names[:1], place, [], updated=task.get("updated_at") or _last_change(newest))
        result.photos.append(photo)
        for region in newest.get("result") or []:
            box = _region_box(place, region)
            if box is None:
                result.left_out["regions without a box"] += 1
                continue
            photo.size = numbers(place, region, "original_width original_height", 0)
            lists = [own for key, own in region["value"].items() if key.endswith("labels")]
            photo.labels += [Label(str(category), box) for category in sum(lists, []) or [UNNAMED]]
    return result


def _last_change(annotation):
    """When a Label Studio annotation was last changed; its dates sort as text."""
    return annotation.get("updated_at") or annotation.get("created_at") or ""


def _file_name(text):
    """The file that a task names: as a path, a URL, or Label Studio's /data/local-files/?d=path."""
    if not re.match(r"/data/|\w{2,}://", text):
        return text
    parts = urllib.parse.urlsplit(text)
    return dict(urllib.parse.parse_qsl(parts.query)).get("d", urllib.parse.unquote(parts.path))


def _region_box(place, region):
    """The box of a Label Studio region in fractions of the photo, None for an ellipse and for no shape."""
    value = region.get("value", {})
    if {"x", "y", "width", "height"} <= value.keys():
        size = numbers(place, region, "original_width original_height") if value.get("rotation") else (1, 1)
        x, y, width, height = numbers(place, value, "x y width height")
        percent = turned(place, (x, y, x + width, y + height), value, (x, y), size)
    elif value.get("points"):
        percent = around(place, value["points"])
    else:
        return None
    return tuple(side / 100 for side in percent)


def read_coco(path, content):
    """Read a COCO file of any categories. Where an annotation has no bbox, its polygons are taken."""
    for key, needed in (("images", "id"), ("annotations", "image_id"), ("categories", "id")):
        entries = content.setdefault(key, [])
        require(isinstance(entries, list) and all(_id(entry, needed) is not None for entry in entries),
                f'{path}: "{key}" must be a list of objects with an {needed} each')
    above = {category.get("supercategory") for category in content["categories"]}
    names = {_id(category): str(category.get("name")) for category in content["categories"]}
    photos = {}
    for image in content["images"]:
        place = f"{path}: image {_id(image)}"
        name = image.get("file_name")
        require(isinstance(name, str) and name and _id(image) not in photos,
                f"{place}: has no file_name, or is there twice")
        photos[_id(image)] = Photo([name], place, [], numbers(place, image, "width height", 0))
    for n, entry in enumerate(content["annotations"]):
        place = f"{path}: annotation {_id(entry) or f'number {n}'}"
        image, category = _id(entry, "image_id"), _id(entry, "category_id")
        require(image in photos and (not names or category in names),
                f"{place}: belongs to image {image} and category {category}, not both there")
        more = entry.get("attributes") if isinstance(entry.get("attributes"), dict) else {}  # CVAT's
        box = turned(place, _coco_box(place, entry), more)
        photos[image].labels.append(Label(names.get(category, UNNAMED), box, read_flags(more | entry)))
    used = {label.category for photo in photos.values() for label in photo.labels}
    declared = [name for name in names.values() if name in used or name not in above]  # Roboflow's
    return Labels("COCO", list(photos.values()), declared)


def _id(entry, key="id"):
    """An id of a COCO entry as text, the same for "1", 1 and 1.0; None if it has none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return None if value is None else str(value).strip().removesuffix(".0")


def _coco_box(place, entry):
    """The xyxy box of a COCO annotation, by its bbox or else its polygons."""
    box, polygons = entry.get("bbox"), entry.get("segmentation")
    require(len(box) == 4 if box else polygons and isinstance(polygons, list),
            f"{place}: has neither a bbox of four numbers nor polygons; export boxes")
    if box:
        x, y, w, h = (number(place, "bbox", value) for value in box)
        return x, y, x + w, y + h
    return around(place, [point for own in polygons for point in zip(own[::2], own[1::2])])


def read_csv(path):
    """Read `file,x1,y1,x2,y2` and maybe a label, in pixels, in this order or as a first line names them."""
    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    rows = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count))
    rows = [(n, [cell.strip() for cell in row]) for n, row in enumerate(rows, 1) if any(map(str.strip, row))]
    head = list(COLUMNS)
    if rows and re.match("[A-Za-z]", "".join(rows[0][1][1:2])):
        names = {alias: column for column, aliases in COLUMNS.items() for alias in aliases.split()}
        head = [names.get(cell.lower(), cell.lower()) for cell in rows.pop(0)[1]]
    require(rows and {"file", "x1", "y1", "x2", "y2"} <= {*head}, f"{path}: rows of file,x1,y1,x2,y2 and "
            "maybe a label are expected, or a first line that names these columns")
    photos, largest = {}, 0
    for n, row in rows:
        place = f"{path}:{n}"
        own = dict(reversed(list(zip(head, row))))  # of two columns for one thing the first counts
        require(own.get("file") and len(row) <= len(head),
                f"{place}: {','.join(row)[:60]!r} is no row of file,x1,y1,x2,y2 and maybe a label")
        size = numbers(place, own, "width height", 0)
        photo = photos.setdefault(own["file"], Photo([own["file"]], place, [], size))
        if any(own.get(key) for key in ("x1", "y1", "x2", "y2")):
            box = numbers(place, own, "x1 y1 x2 y2")
            category = own.get("label") or (UNNAMED if "label" in own else "face")
            photo.labels.append(Label(category, box, read_flags(own)))
            largest = max(largest, *map(abs, box))
    require(not 0 < largest <= 1, f"{path}: all boxes are within 0 to 1, pixels are expected")
    return Labels("CSV", list(photos.values()))


def read_retinaface(path):
    """Read RetinaFace's text, `# photo` and lines x y w h, or SCRFD's, `# photo w h` and x1 y1 x2 y2."""
    photos, text = [], read_text(path)
    require(text.startswith("#"), f"{path}: of YOLO, name the folder; WIDER's text is for wider_to_coco.py")
    for n, line in enumerate(text.split("\n"), 1):
        place = f"{path}:{n}"
        if line.startswith("#"):
            name, *size = re.fullmatch(r"#\s*(.*?)(?:\s+(\d+)\s+(\d+))?\s*", line).groups()
            photos.append(Photo([name], place, [], [int(side) for side in size if side]))
        elif line.strip():
            tokens = line.split()
            require(len(tokens) > 3, f"{place}: {line[:60]!r} is neither '# photo' nor x y w h of a face")
            x, y, right, bottom = (number(place, "a value", token) for token in tokens[:4])
            if not photos[-1].size:
                right, bottom = x + right, y + bottom
            photos[-1].labels.append(Label("face", (x, y, right, bottom)))
    return Labels("RetinaFace", photos)
