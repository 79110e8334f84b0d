"""WIDER FACE's own files: the evaluator's ground truth (.mat) and folders of predictions, one text file per image.

An image is named `<event>/<image>` without its suffix, as in `0--Parade/0_Parade_marchingband_1_465`. Boxes are `xywh`
in pixels of the original image, float64, as in the files. Nothing here imports torch.
"""
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from formats import InputError, whole_file

GROUND_TRUTH = Path("data/eval_tools/ground_truth")  # where the official archive unpacks
LEVELS = ("easy", "medium", "hard")


@dataclass
class GroundTruth:
    """The faces of WIDER FACE val; sorted by image, in file order within one."""
    names: list         # [I] str, <event>/<image>
    image: np.ndarray   # [M] int64, the index of each face's image
    xywh: np.ndarray    # [M, 4] float64
    kept: dict          # {level: [M] bool}, the faces that easy, medium and hard ask for


def read_ground_truth(folder=GROUND_TRUTH):
    """Read wider_face_val.mat and the lists of the three levels beside it into `GroundTruth`.

    Raises InputError if a file is missing, saying where to get it, or if it is not what WIDER FACE distributes.
    """
    folder = Path(folder)
    val = _load_mat(folder / "wider_face_val.mat", "event_list", "file_list", "face_bbx_list")
    lists = {level: _load_mat(folder / f"wider_{level}_val.mat", "gt_list")["gt_list"] for level in LEVELS}
    try:
        names = [f"{event[0][0]}/{file[0][0]}"
                 for event, files in zip(val["event_list"], val["file_list"]) for file in files[0]]
        boxes = [np.asarray(box[0], np.float64).reshape(-1, 4) for event in val["face_bbx_list"] for box in event[0]]
        faces = np.array([len(box) for box in boxes])
        kept = {level: _kept(gt_list, faces) for level, gt_list in lists.items()}
        if len(names) != len(boxes):
            raise ValueError(f"{len(names)} images, boxes of {len(boxes)}")
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{folder}: not the WIDER FACE val ground truth ({error})") from None
    _check_names(folder, names)
    return GroundTruth(names, np.repeat(np.arange(len(names)), faces), np.concatenate(boxes), kept)


def wider_names(path, file_names):
    """The `<event>/<image>` names [J] of a COCO file's `file_name`s [J]: their last two parts without the suffix.

    `path` is the COCO file, for messages. Raises InputError if a name has no two such parts, or two are the same.
    """
    names = [re.sub(r"\.(jpe?g|png)$", "", "/".join(name.split("/")[-2:]), flags=re.IGNORECASE) for name in file_names]
    _check_names(path, names)
    return names


def read_predictions(folder, ground_truth):
    """Read `<folder>/<event>/<image>.txt` of each image: image indices [D], xywh [D, 4], scores [D], missing [names].

    Detections are sorted by image, best first. Where a file lies says which image it is of, as in the official code;
    its first line is not looked at. Raises InputError, with file and line, for what is not five finite numbers per row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths, counts, rows, missing = [], [], [], []
    for name in ground_truth.names:
        paths.append(f"{folder}/{name}.txt")  # 3,226 Path objects would cost more than reading the files
        try:
            lines = _rows(paths[-1], _read(paths[-1]))
        except FileNotFoundError:
            missing.append(name)
            lines = []
        counts.append(len(lines))
        rows += lines
    if len(missing) == len(paths):
        raise InputError(f"{folder}: no predictions for WIDER FACE val, files such as {paths[0]} are expected")

    values = _numbers(rows)  # all at once is fast; row by row only to find the one to name
    if values is None:
        raise InputError(next(f"{path}:{number}: expected x y w h score, finite numbers, found {line.strip()[:60]!r}"
                              for path, count in zip(paths, counts) if count
                              for number, line in enumerate(_lines(_read(path)), 1)
                              if number > 2 and line.strip() and _numbers([line]) is None))
    image = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-values[:, 4], image))  # stable: equal scores stay in file order
    return image, values[order, :4], values[order, 4], missing


def write_predictions(folder, names, image, xywh, score):
    """Write the official folder, `<folder>/<event>/<image>.txt` for each of `names` [I], also those without detections.

    `image` [D] are indices into `names`, `xywh` [D, 4] pixels, `score` [D]. Digits are kept whole: read back, the
    predictions score the same. Raises InputError for names that would lead elsewhere, before anything is written.
    """
    _check_names(folder, names)
    image, score = np.asarray(image, np.int64), np.asarray(score, np.float64)
    values = np.column_stack((np.asarray(xywh, np.float64).reshape(-1, 4), score))
    if not np.isfinite(values).all():
        raise InputError(f"{folder}: not written, a box or score to go there is not finite")
    order = np.lexsort((-score, image))
    ends = np.searchsorted(image[order], np.arange(len(names)), side="right")
    for name, rows in zip(names, np.split(values[order], ends[:-1])):
        lines = [name.split("/")[1], str(len(rows)), *(" ".join(map(repr, row)) for row in rows.tolist())]
        with whole_file(Path(folder) / f"{name}.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _kept(gt_list, faces):
    """A level's list of face numbers, from 1 in each image, as flags over all faces [M]; `faces` [I] counts them."""
    numbers = [np.asarray(number[0], np.int64).ravel() for event in gt_list for number in event[0]]
    image = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
    index = np.concatenate(numbers) - 1
    if len(numbers) != len(faces) or (index < 0).any() or (index >= faces[image]).any():
        raise ValueError("the lists are of other images or faces")
    kept = np.zeros(faces.sum(), bool)
    kept[(np.cumsum(faces) - faces)[image] + index] = True
    return kept


def _check_names(source, names):
    """Every name is `<event>/<image>`, stays inside whatever folder it is put in, and is there once."""
    seen = set()
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or not all(map(_plain, parts)):
            raise InputError(f"{source}: {name[-80:]!r} is not the name of a WIDER FACE image, <event>/<image>")
        if name in seen:
            raise InputError(f"{source}: {name!r} is there twice")
        seen.add(name)


def _plain(part):
    """Is it a name without meaning to any file system, and short enough for all?"""
    return part.isprintable() and not set(part) & set("\\:") and bool(part.strip(". ")) and len(part.encode()) < 200


def _load_mat(path, *keys):
    """The variables `keys` of a MATLAB file."""
    try:
        file = io.BytesIO(_read(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; download the archive eval_tools from http://shuoyang1213.me/WIDERFACE "
                         f"and unpack it under data, which gives {GROUND_TRUTH}") from None
    try:
        content = loadmat(file, variable_names=keys)
        return {key: content[key] for key in keys}
    except Exception as error:  # of a damaged file, scipy raises whatever it stumbles over
        raise InputError(f"{path}: not a MATLAB file with {', '.join(keys)} ({type(error).__name__})") from None


def _read(path):
    """The bytes of a file. Raises InputError for a folder, or a pipe, which would be waited for for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path}: is no ordinary file, which is expected there")
    with open(path, "rb") as file:
        return file.read()


def _lines(content):
    return content.decode("utf-8-sig", "replace").rstrip().splitlines()


def _rows(path, content):
    """The lines of one prediction file after the image's name and the number of boxes; an empty file has none."""
    lines = _lines(content)
    if not lines:
        return []
    rows = [line for line in lines[2:] if line.strip()]
    try:
        count = float(lines[1])  # some write 5.0
    except (IndexError, ValueError):
        raise InputError(f"{path}:2: the number of boxes is expected in this line") from None
    if count != len(rows):
        raise InputError(f"{path}: {len(rows)} boxes, but line 2 says {lines[1].strip()[:20]}")
    return rows


def _numbers(rows):
    """Lines of five finite numbers as [len(rows), 5], or None if some are not."""
    try:
        values = np.loadtxt(rows, comments=None, ndmin=2) if rows else np.zeros((0, 5))
    except ValueError:
        return None
    return values if values.shape == (len(rows), 5) and (np.abs(values) < 1e15).all() else None  # NaN < x is False
