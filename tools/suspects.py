"""What a person should look at before training: suspect labels and photos (tools.look).

Reasons, the likeliest faults first: leak (a photo of the validation set is in the training set too), doubled
(two boxes on one face), odd shape (a box that can hardly be a face's), near-duplicate (twice in one set).
"""

import csv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support.script import InputError, csv_cell, whole_file

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.ops import box_iou

from support.coco import Annotations, to_xywh, to_xyxy
from support.pictures import FALSE, MISSED, contact_sheet, draw_faces, drawable, load_picture, save_picture
from tools.duplicates import near_duplicates, thumbnails

RANKS = ("leak", "doubled", "odd shape", "near-duplicate")
DOUBLED_IOU = 0.5           # two labels that overlap as much are suspect
FACE_SHAPE = 0.4, 2         # width / height: faces lie between
NO_BOXES = np.zeros((0, 4))
SIDE, SHOWN = 320, 100      # px of a photo in the picture of suspects, and how many it has at most
CAPTION, LETTERS = 36, 50   # below it: px of two lines, letters of one


class Suspect(NamedTuple):
    """Something to look at. Boxes are xyxy in pixels of the photo."""
    score: float                    # 0 to 1, 1 the surest
    reason: str
    file: Path                      # of the photo
    labels: np.ndarray = NO_BOXES   # [N, 4] the labels in question
    found: np.ndarray = NO_BOXES    # [K, 4] what a model sees instead
    other: Path | None = None       # the photo it resembles
    detail: str = ""
    photo: int = -1     # where a model points at it: the index of the photo in the Annotations
    label: int = -1     # and that of the label, -1 for an unlabelled face


def check_photos(sets: list[Annotations]) -> tuple[list[Suspect], list[str]]:
    """Compare the photos of one set, or of training and validation: Suspects, a line for each unusable."""
    files = [annotations.file(index) for annotations in sets for index in range(len(annotations.ids))]
    place = np.repeat(np.arange(len(sets)), [len(annotations.ids) for annotations in sets])
    sizes, pixels = thumbnails(files)
    errors = []
    for file, size, written in zip(files, sizes, np.concatenate([annotations.sizes for annotations in sets])):
        if isinstance(size, Exception):
            errors.append(str(size))
        elif written.all() and tuple(written) != size:
            errors.append("{}: is {}x{}, but its json says {}x{}".format(file, *size, *written))
    suspects = [Suspect(score, "leak" if place[n] != place[other] else "near-duplicate", files[n],
                        other=files[other]) for n, (other, score) in near_duplicates(pixels, place).items()]
    return suspects, errors


def check_labels(annotations: Annotations) -> list[Suspect]:
    """Find doubled boxes, and boxes of odd shape; ignored ones are left alone."""
    kept = ~annotations.ignored
    image, xyxy = annotations.image[kept], to_xyxy(annotations.xywh[kept])
    suspects = [Suspect(float(iou), "doubled", annotations.file(image[one]), xyxy[[one, other]])
                for one, other, iou in doubled(image, xyxy)]
    width, height = annotations.xywh[kept, 2:].T
    shape = width / height
    sizes = np.where(annotations.sizes > 0, annotations.sizes, np.inf)[image]
    whole = ((xyxy[:, :2] > 1) & (xyxy[:, 2:] < sizes - 1)).all(1)  # not cut by the edge
    odd = np.maximum(FACE_SHAPE[0] / shape, shape / FACE_SHAPE[1]) * whole
    return suspects + [Suspect(float(1 - 0.5 / odd[n]), "odd shape", annotations.file(image[n]), xyxy[[n]],
                               detail=f"{width[n]:.0f}x{height[n]:.0f} px") for n in np.flatnonzero(odd > 1)]


def doubled(image: np.ndarray, xyxy: np.ndarray) -> list[tuple]:
    """Pairs of boxes of one photo with IoU 0.5 and more: [(index, index, IoU)]. `image` `[M]` is sorted."""
    pairs = []
    for first, count in zip(*np.unique(image, return_index=True, return_counts=True)[1:]):
        own = torch.from_numpy(xyxy[first:first + count])
        iou = box_iou(own, own).triu(1).numpy()
        pairs += [(first + a, first + b, iou[a, b]) for a, b in np.argwhere(iou >= DOUBLED_IOU)]
    return pairs


def write_csv(suspects: list[Suspect], path: Path) -> None:
    """Write one row per suspect, as ordered; a box is that of the first label in question."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                             errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["score", "reason", "photo", "x", "y", "width", "height", "other photo", "detail"])
        for suspect in suspects:
            box = to_xywh(suspect.labels[:1]).round(1).ravel().tolist() or [""] * 4
            rows.writerow([f"{suspect.score:.3f}", suspect.reason, csv_cell(suspect.file), *box,
                           csv_cell(suspect.other or ""), suspect.detail])


def draw_suspects(suspects: list[Suspect], path) -> None:
    """Draw the first SHOWN: labels in question red, a model's boxes yellow; unreadable photos are grey."""
    save_picture(contact_sheet([_tile(suspect) for suspect in suspects[:SHOWN]], 4, SIDE + CAPTION), path)


def _tile(suspect):
    """One suspect: the part of the photo that matters, enlarged, or two photos side by side; a caption."""
    files, parts = [file for file in (suspect.file, suspect.other) if file], []
    for file in files:
        try:
            parts.append(_part(load_picture(file), (suspect.labels, suspect.found)))
        except InputError:  # named elsewhere
            parts.append(Image.new("RGB", (SIDE, SIDE), "#404040"))
    tile = contact_sheet(parts, len(parts), SIDE // len(parts))
    tile = ImageOps.expand(tile, (0, 0, 0, CAPTION), "#404040")
    text = f"{suspect.score:.2f} {suspect.reason}, {suspect.detail}".rstrip(", ")
    names = drawable(" | ".join(file.name for file in files))
    caption = f"{text[-LETTERS:]}\n{names[-LETTERS:]}"
    ImageDraw.Draw(tile).text((4, tile.height - 34), caption, "white", ImageFont.load_default(12))
    return tile


def _part(image, boxes):
    """Cut the boxes with their size around them out of a photo, enlarge the part, draw them."""
    start, end = np.zeros(2), np.array(image.size, float)
    every = np.concatenate(boxes)
    if len(every):
        low, high = every[:, :2].min(0), every[:, 2:].max(0)
        centre = ((low + high) / 2).clip(0, image.size)
        half = max(1.5 * (high - low).max(), 20)
        start, end = (centre - half).clip(0), np.minimum(centre + half, image.size)
    scale = SIDE / max(*(end - start), 1)
    target = [max(1, round(side)) for side in (end - start) * scale]
    part = image.resize(target, Image.Resampling.BILINEAR, (*start, *end))
    for own, colour in zip(boxes, (MISSED, FALSE)):
        part = draw_faces(part, (own - np.tile(start, 2)) * scale, colour=colour)
    return part


def report(sets: list[Annotations], folder: Path) -> list[str]:
    """Check one set, or training and validation: what was found, as lines of text; suspects.png and .csv."""
    suspects, errors = check_photos(sets)
    suspects += [suspect for annotations in sets for suspect in check_labels(annotations)]
    suspects.sort(key=lambda suspect: (RANKS.index(suspect.reason), -suspect.score))
    counts = Counter(suspect.reason for suspect in suspects)
    lines = [f"{len(errors):,} photos that cannot be used: " + "; ".join(errors[:5])] if errors else []
    lines.append("suspects: " + (", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "none"))
    if suspects:
        drawn, listed = folder / "suspects.png", folder / "suspects.csv"
        draw_suspects(suspects, drawn)
        write_csv(suspects, listed)
        lines.append(f"the first {min(len(suspects), SHOWN)} in {drawn}, all in {listed}")
    return lines
