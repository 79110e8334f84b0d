"""COCO files: annotations and detection results, read with checks.

Boxes stay `xywh`, in pixels, float64, as in the files: the evaluation protocols are defined on it.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from support.script import InputError, read_json, require

import numpy as np

MADE, COMPLETE, UNLABELLED = 0, 1, 2  # how far the labels of a photo can be trusted, see Annotations
OF_FACES = ("xywh", "area", "ignored", "crowd")  # arrays of Annotations with a row for each face
FOREIGN = (".txt", ".xml", ".csv", ".yaml", ".yml", ".zip")
CONVERT = "python -m tools.labels_to_coco makes it of YOLO, Pascal VOC, CVAT, Label Studio, COCO and CSV"


def to_xyxy(xywh: np.ndarray) -> np.ndarray:
    """Corners `[N, 4]` (left, top, right, bottom) of boxes `[N, 4]` given as x, y, width, height."""
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def to_xywh(xyxy: np.ndarray) -> np.ndarray:
    """Boxes `[N, 4]` as x, y, width, height: the inverse of `to_xyxy`."""
    return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], 1)


def clip(box, width, height):
    """Clip an xywh box to the picture: (box, "inside" or "clipped"), or (the same, "empty" or "outside")."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return box, "empty"
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return box, "inside"
    left, top = max(x, 0), max(y, 0)
    cut = [left, top, min(x + w, width) - left, min(y + h, height) - top]
    return (cut, "clipped") if cut[2] > 0 and cut[3] > 0 else (box, "outside")


@dataclass
class Detections:
    """What a detector found on I photos: D faces, in any order."""
    image: np.ndarray   # [D] int64, the index of each face's photo
    xywh: np.ndarray    # [D, 4] float64, pixels of the photo
    score: np.ndarray   # [D] float64


@dataclass
class Annotations:
    """The M faces on the I photos of a COCO file. Faces are sorted by photo, in file order within one."""
    path: Path                # the file; names are relative to its folder
    category: int             # id of the face category
    ids: np.ndarray           # [I] int64, image ids
    names: list               # [I] str, file_name as written
    sizes: np.ndarray         # [I, 2] int64, width and height as written, 0 if the file does not say
    image: np.ndarray         # [M] int64, the index (not the id) of each face's photo
    xywh: np.ndarray          # [M, 4] float64
    area: np.ndarray          # [M] float64, width x height where the file gives none
    ignored: np.ndarray       # [M] bool: crowds, and what cannot be learned (empty, or outside its photo)
    crowd: np.ndarray         # [M] bool: iscrowd, a region to ignore: unclear faces, or a crowd
    # [I] uint8: MADE somehow, COMPLETE (every face is labelled, by hand), or UNLABELLED (nobody looked)
    labels: np.ndarray | None = None

    def file(self, index: int) -> Path:
        """The path of photo `index`."""
        return self.path.parent / self.names[index]

    def require_photos(self) -> None:
        """Raise InputError if none of 20 photos, spread over the set, is where the json says."""
        files = [self.file(n) for n in range(0, len(self.names), max(1, len(self.names) // 20))]
        require(not files or any(os.path.isfile(file) for file in files),
                f"{self.path}: its photos are not there, such as {files and files[0]}; python -m "
                f"tools.labels_to_coco {self.path} PHOTOS mine.json finds them below PHOTOS")

    def fingerprint(self) -> str:
        """A hash of the boxes and the photos they are on. The same set has the same hash wherever it lies."""
        arrays = self.ids, self.sizes, self.image, self.xywh, self.ignored, self.crowd, self.labels
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def unlabelled(self) -> "Annotations":
        """The same photos without their boxes: no anchor on them is face or background."""
        none = {name: getattr(self, name)[:0] for name in ("image", *OF_FACES)}
        return replace(self, labels=np.full(len(self.ids), UNLABELLED, np.uint8), **none)

    def complete(self) -> "Annotations":
        """The same, whose labels are said to be complete: what is not labelled is no face."""
        return replace(self, labels=np.full(len(self.ids), COMPLETE, np.uint8))

    def without(self, dropped, detections: Detections):
        """Leave out the photos at the indices `dropped`: (Annotations, Detections), indices renumbered."""
        kept = np.setdiff1d(np.arange(len(self.ids)), list(dropped))
        faces, found = np.isin(self.image, kept), np.isin(detections.image, kept)
        rows = {name: getattr(self, name)[faces] for name in OF_FACES}
        fewer = replace(self, ids=self.ids[kept], names=[self.names[n] for n in kept], sizes=self.sizes[kept],
                        image=np.searchsorted(kept, self.image[faces]), labels=self.labels[kept], **rows)
        return fewer, Detections(np.searchsorted(kept, detections.image[found]), detections.xywh[found],
                                 detections.score[found])


def moved_images(images: list[dict], source: str | Path, target: str | Path) -> list[dict]:
    """The entries of "images" of the json `source` with file names as the json `target` needs them."""
    to_photos = os.path.relpath(os.path.realpath(Path(source).parent), Path(target).resolve().parent)
    return [image | {"file_name": Path(to_photos, image["file_name"]).as_posix()} for image in images]


def read_annotations(path: str | Path) -> Annotations:
    """Read a COCO file into `Annotations`.

    Faces are the category `face`, or the only one. Photos without faces are kept. Boxes that are empty,
    reversed or outside their photo are marked ignored. Raises InputError for what cannot be read safely."""
    path = Path(path)
    images, annotations, categories = _read_lists(path)
    for index, entry in enumerate(images):
        try:
            os.fsencode(entry.get("file_name"))
        except (TypeError, UnicodeEncodeError):
            raise InputError(f"{path}: images[{index}] (id {entry['id']}) has no file_name of text") from None
    category = _face_category(path, categories, annotations)
    faces = [a for a in annotations if a.get("category_id") == category]
    index_of = {entry["id"]: index for index, entry in enumerate(images)}
    for face in faces:
        number, crowd = face.get("image_id"), face.get("iscrowd", 0)
        if not isinstance(number, int) or number not in index_of:
            raise InputError(f"{path}: annotation {face['id']} belongs to image {number!r}, which is not in "
                             "\"images\"; python -m tools.labels_to_coco matches \"1\" and 1")
        if crowd not in (0, 1):  # as text, "0" would count as yes
            raise InputError(f"{path}: annotation {face['id']}: iscrowd is {crowd!r:.60}, 0 or 1 expected")
    image = np.array([index_of[face["image_id"]] for face in faces], np.int64)
    xywh = _numbers(path, "bbox", {face["id"]: face.get("bbox") for face in faces}, 4)
    areas = {face["id"]: w * h if face.get("area") is None else face["area"]
             for face, (_, _, w, h) in zip(faces, xywh.tolist())}
    area = _numbers(path, "area", areas, 1)[:, 0]
    sizes = [_size(path, entry, key) for entry in images for key in ("width", "height")]
    sizes = np.array(sizes, np.int64).reshape(-1, 2)
    crowd = np.array([face.get("iscrowd", 0) for face in faces], bool)
    empty = (xywh[:, 2:] <= 0).any(1)
    size = sizes[image]
    outside = (size > 0).all(1) & ((xywh[:, :2] >= size) | (xywh[:, :2] + xywh[:, 2:] <= 0)).any(1)
    order = np.argsort(image, kind="stable")
    return Annotations(path, category, np.array([e["id"] for e in images], np.int64),
                       [e["file_name"] for e in images], sizes, image[order], xywh[order], area[order],
                       (crowd | empty | outside)[order], crowd[order],
                       np.full(len(images), MADE, np.uint8))


def _read_lists(path):
    """The lists of images and annotations in a COCO file, with ids that differ, and its categories."""
    require(path.exists(), f"{path}: no such file; wider_to_coco.py makes one of WIDER, "
            "python -m tools.labels_to_coco of your labels, python -m tools.sample a sample")
    require(not path.is_dir() and path.suffix.lower() not in FOREIGN,
            f"{path}: a COCO json is expected; {CONVERT}")
    content = read_json(path)
    for kind in ("images", "annotations"):
        require(isinstance(content, dict) and isinstance(content.get(kind), list),
                f"{path}: not COCO annotations, no list \"{kind}\"; {CONVERT}")
        seen = set()
        for index, entry in enumerate(content[kind]):
            number = entry.get("id") if isinstance(entry, dict) else None
            if type(number) is not int or abs(number) >= 2 ** 63:
                raise InputError(f"{path}: {kind}[{index}] has no integer \"id\"; python -m "
                                 "tools.labels_to_coco gives it one")
            if number in seen:
                raise InputError(f"{path}: {kind}[{index}] repeats id {number}; ids must differ")
            seen.add(number)
    return content["images"], content["annotations"], content.get("categories")


def join(parts: list[Annotations]) -> Annotations:
    """Make several Annotations one: the photos of one set after another, ids from 1, absolute names."""
    first = parts[0]
    if len(parts) == 1:
        return first
    names = [os.path.abspath(part.file(n)) for part in parts for n in range(len(part.ids))]
    start = np.cumsum([0] + [len(part.ids) for part in parts])
    arrays = {name: np.concatenate([getattr(part, name) for part in parts])
              for name in ("sizes", "labels", *OF_FACES)}
    image = np.concatenate([part.image + before for part, before in zip(parts, start)])
    return replace(first, ids=np.arange(1, start[-1] + 1), names=names, image=image, **arrays)


def arrays(annotations: Annotations, detections: Detections) -> tuple:
    """What the functions of metrics.py take first: faces and detections, with indices as the images' ids."""
    return (annotations.image, annotations.xywh, annotations.ignored,
            detections.image, detections.xywh, detections.score)


def read_results(path: str | Path, annotations: Annotations) -> Detections:
    """Read detections in COCO results form, `[{image_id, category_id, bbox, score}]`, in file order.

    Those of other categories of the annotations are left out. Raises InputError for unknown images and
    categories, for numbers that are not finite, and for boxes in fractions of the photo."""
    entries = read_json(path)
    require(isinstance(entries, list) and all(isinstance(e, dict) for e in entries),
            f"{path}: not COCO results, a list of {{image_id, category_id, bbox, score}} is expected")
    face = annotations.category
    found = {n: entry for n, entry in enumerate(entries) if entry.get("category_id") == face}
    known = [face]
    if len(found) < len(entries):
        known += [category["id"] for category in read_json(annotations.path).get("categories") or []]
    for n, entry in enumerate(entries):
        category = entry.get("category_id")
        require(type(category) in (int, float) and category in known, f"{path}: entry {n} is of category_id "
                f"{repr(category)[:60]}, which is not in {annotations.path}; its face is {face}")
    require(found or not entries,
            f"{path}: none of its {len(entries)} entries is of category_id {face}, the face")
    index_of = {number: index for index, number in enumerate(annotations.ids.tolist())}
    for n, entry in found.items():
        image = entry.get("image_id")
        if type(image) not in (int, float) or image not in index_of:
            raise InputError(f"{path}: entry {n} is of image {image!r}, which is not in {annotations.path}")
    image = np.array([index_of[entry["image_id"]] for entry in found.values()], np.int64)
    xywh = _numbers(path, "bbox", {n: entry.get("bbox") for n, entry in found.items()}, 4)
    score = _numbers(path, "score", {n: entry.get("score") for n, entry in found.items()}, 1)[:, 0]
    if not 0 < annotations.sizes.max(initial=0) <= 100:
        require_pixels(path, xywh)
    return Detections(image, xywh, score)


def require_pixels(path, xywh):
    """Raise InputError if all boxes `[D, 4]` on photos of hundreds of pixels lie within about 0 to 1."""
    require(not 0 < np.abs(xywh).max(initial=0) <= 1.5, f"{path}: all boxes lie within 0-1, as fractions of "
            "the photo do; pixels are expected, so multiply by the photo's width and height")


def face_entries(annotations: Annotations) -> tuple[dict, list[dict]]:
    """The whole content of the file behind Annotations, and its entry of each face, in their order."""
    content = read_json(annotations.path)
    place = {number: index for index, number in enumerate(annotations.ids.tolist())}
    entries = [entry for entry in content["annotations"]
               if entry["category_id"] == annotations.category and entry["image_id"] in place]
    entries.sort(key=lambda entry: place[entry["image_id"]])  # stable: in file order on one photo
    return content, entries


def to_results(annotations: Annotations, detections: Detections) -> list[dict]:
    """Make Detections a COCO results list: the inverse of `read_results`."""
    ids = annotations.ids[detections.image].tolist()
    return [{"image_id": i, "category_id": annotations.category, "bbox": box, "score": s}
            for i, box, s in zip(ids, detections.xywh.tolist(), detections.score.tolist())]


def _face_category(path, categories, annotations):
    """Choose the id of the category `face`, or of the only one. Without `categories` those in use count."""
    if categories is None:
        categories = [{"id": a.get("category_id")} for a in annotations] or [{"id": 1}]
    require(isinstance(categories, list) and all(
        isinstance(c, dict) and isinstance(c.get("id"), int) for c in categories),
        f"{path}: \"categories\" must be a list of {{id, name}} with integer ids; "
        "python -m tools.labels_to_coco gives them")
    names = {c["id"]: str(c.get("name")) for c in categories}
    faces = [number for number, name in names.items() if name.strip().lower() == "face"]
    require(len(faces) == 1 or len(names) == 1, f"{path}: which category is the face? One must be named "
            f"\"face\", there are: {', '.join(names.values()) or 'none'}; "
            "python -m tools.labels_to_coco --category chooses")
    for entry in annotations:  # left out silently, faces of a category that is misnumbered would be missed
        number = entry.get("category_id")
        if not isinstance(number, int) or number not in names:
            raise InputError(f"{path}: annotation {entry['id']} is of category {str(number)[:60]}, "
                             "which is not in \"categories\"")
    return (faces or list(names))[0]


def _numbers(path, key, values, count):
    """What each entry has, `values` {entry: `count` numbers}, as float64 `[len(values), count]`."""
    rows = []
    for entry, value in values.items():
        row = value if isinstance(value, list) else [value]
        if len(row) != count or not all(type(n) in (int, float) and abs(n) < 1e15 for n in row):
            expected = "a finite number" if count == 1 else f"{count} finite numbers"
            raise InputError(f"{path}: entry {entry}: {key} is {str(value)[:60]}, {expected} expected")
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, count)


def _size(path, entry, key):
    """A side of the photo `entry`, 0 where the file does not say."""
    value = entry.get(key) or 0
    require(isinstance(value, (int, float)) and 0 <= value < 1e9,
            f"{path}: image {entry['id']}: {key} is {value!r}, pixels expected")
    return int(value)
