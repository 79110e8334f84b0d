"""Read and write WIDER FACE's own files: the ground truth (.mat) and folders of predictions.

A prediction folder has one text file per image. An image's name is `<event>/<image>` without the suffix, as
`0--Parade/0_Parade_marchingband_1_465`. Boxes are `xywh` in pixels of the original image, float64.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from support.coco import Detections, require_pixels
from support.script import InputError, require, whole_file

GROUND_TRUTH = Path("data/eval_tools/ground_truth")  # where the official archive unpacks
LEVELS = ("easy", "medium", "hard")


@dataclass
class GroundTruth:
    """The M faces on the I images of WIDER FACE val. Faces are sorted by image, in file order within one."""
    names: list         # [I] str, <event>/<image>
    image: np.ndarray   # [M] int64, the index of each face's image
    xywh: np.ndarray    # [M, 4] float64
    kept: dict          # {level: [M] bool}, the faces that belong to easy, medium and hard

    def part(self, names):
        """The same without the faces of images that are not in `names`, or InputError if none is."""
        given = np.isin(self.names, list(names))  # [I]
        require(given.any(), "none of the photos is one of WIDER FACE val, <event>/<image>")
        kept = given[self.image]
        levels = {level: own[kept] for level, own in self.kept.items()}
        return replace(self, image=self.image[kept], xywh=self.xywh[kept], kept=levels)


def read_ground_truth(folder=GROUND_TRUTH):
    """Read wider_face_val.mat and the face lists of the three levels. Raises InputError for other files."""
    folder = Path(folder)
    val = _load_mat(folder / "wider_face_val.mat", "event_list", "file_list", "face_bbx_list")
    lists = {level: _load_mat(folder / f"wider_{level}_val.mat", "gt_list")["gt_list"] for level in LEVELS}
    try:
        names = [f"{event[0][0]}/{file[0][0]}"
                 for event, files in zip(val["event_list"], val["file_list"]) for file in files[0]]
        boxes = [np.asarray(box[0], np.float64).reshape(-1, 4)
                 for event in val["face_bbx_list"] for box in event[0]]
        faces = np.array([len(box) for box in boxes])
        kept = {level: _kept(gt_list, faces) for level, gt_list in lists.items()}
        if len(names) != len(boxes):
            raise ValueError(f"{len(names)} images, boxes of {len(boxes)}")
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{folder}: not the WIDER FACE val ground truth ({error})") from None
    _check_names(folder, names)
    return GroundTruth(names, np.repeat(np.arange(len(names)), faces), np.concatenate(boxes), kept)


def renumber(detections, names, ground_truth, where):
    """Move Detections from the images called `names` to those of a GroundTruth, read from `where`."""
    place = {name: index for index, name in enumerate(ground_truth.names)}
    image = np.array([place.get(name, -1) for name in names], np.int64)[detections.image]
    if (image < 0).any():
        name = names[detections.image[image < 0][0]]
        raise InputError(f"{where}: has no image {name}, but there are detections of it")
    return Detections(image, detections.xywh, detections.score)


def wider_names(path, file_names):
    """The `<event>/<image>` names of a COCO file: the last two parts, without suffix. Raises InputError."""
    names = [re.sub(r"\.(jpe?g|png)$", "", "/".join(name.split("/")[-2:]), flags=re.IGNORECASE)
             for name in file_names]
    _check_names(path, names)
    return names


def read_predictions(folder, names):
    """Read the predictions `<folder>/<event>/<image>.txt`: (Detections, names of the images without a file).

    The images of the Detections, sorted by image, best first, are indices into `names`. As in the official
    code, the first line of a file is not used. Raises InputError, with file and line."""
    image, values, missing = [], [np.zeros((0, 5))], []
    for index, name in enumerate(names):
        path = f"{folder}/{name}.txt"  # a string: 3,226 Path objects take longer than reading the files
        try:
            with open(path, "rb") as file:
                boxes = _boxes(path, file.read())
        except FileNotFoundError:
            missing.append(name)
            continue
        image += [index] * len(boxes)
        values.append(boxes[np.argsort(-boxes[:, 4], kind="stable")])  # equal scores stay in file order
    require(len(missing) < len(names),
            f"{folder}: no predictions for WIDER FACE val, such as {names and names[-1]}.txt")
    values = np.concatenate(values)
    require_pixels(folder, values[:, :4])
    return Detections(np.array(image, np.int64), values[:, :4], values[:, 4]), missing


def write_predictions(folder, names, detections):
    """Write predictions as the official evaluation expects them: `<folder>/<event>/<image>.txt`.

    The images of the Detections are indices into `names`; one without detections gets a file too. All digits
    are written. Raises InputError for names that would lead out of `folder`, before anything is written."""
    _check_names(folder, names)
    values = np.column_stack((detections.xywh, detections.score))
    order = np.lexsort((-detections.score, detections.image))
    ends = np.searchsorted(detections.image[order], np.arange(len(names)), side="right")
    for name, rows in zip(names, np.split(values[order], ends[:-1])):
        lines = [name.split("/")[1], str(len(rows)), *(" ".join(map(repr, row)) for row in rows.tolist())]
        with whole_file(Path(folder) / f"{name}.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _kept(gt_list, faces):
    """The faces of a level, bool `[M]`, by lists that count from 1 the `faces` `[I]` of each image."""
    numbers = [np.asarray(number[0], np.int64).ravel() for event in gt_list for number in event[0]]
    kept = [np.zeros(count, bool) for count in faces]
    for own, number in zip(kept, numbers, strict=True):
        if (number < 1).any():
            raise ValueError("a face's number is below 1")
        own[number - 1] = True
    return np.concatenate(kept)


def _check_names(source, names):
    """Check that every name is `<event>/<image>`, cannot lead out of a folder, and occurs once."""
    for name, times in Counter(names).items():
        parts = [part.strip(". ") for part in name.split("/")]
        safe = name.isprintable() and not set(name) & set("\\:")
        require(safe and len(parts) == 2 and all(parts),
                f"{source}: {name[-80:]!r} is not the name of a WIDER FACE image, <event>/<image>")
        require(times == 1, f"{source}: {name!r} is there twice")


def _load_mat(path, *keys):
    """Read the variables `keys` of a MATLAB file: {key: array}. Raises InputError."""
    try:
        content = loadmat(str(path), variable_names=keys)
        return {key: content[key] for key in keys}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; download eval_tools from http://shuoyang1213.me/WIDERFACE "
                         f"and unpack it under data, which gives {GROUND_TRUTH}") from None
    except Exception as error:  # scipy raises all kinds of errors for a damaged file
        raise InputError(f"{path}: not a MATLAB file with {keys} ({type(error).__name__})") from None


def _boxes(path, content):
    """The boxes `[N, 5]`, x y w h score, of a prediction file's bytes: a name, their number, the rows."""
    lines = content.decode("utf-8-sig", "replace").rstrip().splitlines()
    if not lines:
        return np.zeros((0, 5))
    try:
        count = float(lines[1])  # some tools write 5.0
    except (IndexError, ValueError):
        raise InputError(f"{path}:2: the number of boxes is expected in this line") from None
    boxes = []
    for number, line in enumerate(lines[2:], 3):
        if not line.strip():
            continue
        try:
            boxes.append(list(map(float, line.split())))
        except ValueError:
            boxes.append([])
        if len(boxes[-1]) != 5 or not sum(map(abs, boxes[-1])) < 1e15:  # the sum of NaN is none
            raise InputError(
                f"{path}:{number}: expected x y w h score, finite numbers, found {line.strip()[:60]!r}")
    require(count == len(boxes), f"{path}: {len(boxes)} boxes, but line 2 says {lines[1].strip()[:20]}")
    return np.array(boxes).reshape(-1, 5)
