"""What a person should look at before training: suspect labels and photos (tools.look).

Reasons, the likeliest faults first: leak (a photo of the validation set is in the training set too), doubled
(two boxes on one face), odd shape and odd size (a box that can hardly be a face's), near-duplicate (a photo
is twice in one set). What varies among good photos is no suspect: their sizes, and large and small faces.
"""

import csv
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from support.script import InputError, csv_cell, whole_file

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.ops import box_iou

from support.coco import Annotations, to_xywh, to_xyxy
from support.pictures import FALSE, MISSED, contact_sheet, draw_faces, drawable, load_picture, save_picture
from tools.duplicates import near_duplicates, thumbnails

RANKS = ("leak", "doubled", "odd shape", "odd size", "near-duplicate")
DOUBLED_IOU = 0.5           # two labels that overlap as much are suspect
FACE_SHAPE = 0.4, 2         # width / height: faces lie between
LEAST_SIZE = 3              # px, square root of the area: below it nothing can be seen
NO_BOXES = np.zeros((0, 4))
SIDE, SHOWN = 320, 100      # px of a photo in the picture of suspects, and how many it has at most
CAPTION, LETTERS = 36, 50   # below it: px of two lines, letters of one


@dataclass
class Suspect:
    """Something to look at. Boxes are xyxy in pixels of the photo."""
    score: float                                          # 0 to 1, 1 the surest
    reason: str
    file: Path                                            # of the photo
    labels: np.ndarray = field(default_factory=lambda: NO_BOXES)  # [N, 4] the labels in question
    found: np.ndarray = field(default_factory=lambda: NO_BOXES)   # [K, 4] what a model sees instead
    other: Path | None = None                             # the photo it resembles
    detail: str = ""
    photo: int = -1     # where a model points at it: the index of the photo in the Annotations
    label: int = -1     # and that of the label, -1 for an unlabelled face


def check_photos(sets: list[Annotations]) -> tuple[list[Suspect], list[Annotations], list[str]]:
    """Read all photos of one set, or of training and validation, and compare them.

    Returns Suspects; the sets with the sizes of photos whose json does not say; and a line for each photo
    that cannot be read or whose size is not what its json says."""
    files = [annotations.file(index) for annotations in sets for index in range(len(annotations.ids))]
    place = np.repeat(np.arange(len(sets)), [len(annotations.ids) for annotations in sets])
    read, pixels = thumbnails(files)
    written = np.concatenate([annotations.sizes for annotations in sets])
    errors = []
    for n, size in enumerate(read):
        if isinstance(size, Exception):
            errors.append(str(size))
        elif not written[n].all():
            written[n] = size
        elif tuple(written[n]) != size:
            errors.append("{}: is {}x{}, but its json says {}x{}".format(files[n], *size, *written[n]))
    sets = [replace(annotations, sizes=written[place == n]) for n, annotations in enumerate(sets)]
    suspects = []
    for n, (other, score, mirrored) in near_duplicates(pixels, place).items():
        reason = "leak" if place[n] != place[other] else "near-duplicate"
        detail = "mirrored" if mirrored else ""
        suspects.append(Suspect(score, reason, files[n], other=files[other], detail=detail))
    return suspects, sets, errors


def check_labels(annotations: Annotations) -> list[Suspect]:
    """Find doubled boxes, and boxes of odd shape or size; ignored ones are left alone."""
    kept = ~annotations.ignored
    image, xyxy = annotations.image[kept], to_xyxy(annotations.xywh[kept])
    suspects = [Suspect(float(iou), "doubled", annotations.file(image[one]), xyxy[[one, other]])
                for one, other, iou in doubled(image, xyxy)]
    width, height = annotations.xywh[kept, 2:].T
    shape = width / height
    whole = ((xyxy[:, :2] > 1) & (xyxy[:, 2:] < annotations.sizes[image] - 1)).all(1)  # not cut by the edge
    odd_shape = np.maximum(FACE_SHAPE[0] / shape, shape / FACE_SHAPE[1]) * whole
    for reason, values in (("odd shape", odd_shape), ("odd size", LEAST_SIZE / np.sqrt(width * height))):
        for n in np.flatnonzero(values > 1):
            suspects.append(Suspect(float(1 - 0.5 / values[n]), reason, annotations.file(image[n]), xyxy[[n]],
                                    detail=f"{width[n]:.0f}x{height[n]:.0f} px"))
    return suspects


def doubled(image: np.ndarray, xyxy: np.ndarray) -> list[tuple]:
    """Pairs of boxes of one photo with IoU 0.5 and more: [(index, index, IoU)]. `image` `[M]` is sorted."""
    pairs = []
    for first, count in zip(*np.unique(image, return_index=True, return_counts=True)[1:]):
        own = torch.from_numpy(xyxy[first:first + count])
        iou = box_iou(own, own).triu(1).numpy()
        pairs += [(first + a, first + b, iou[a, b]) for a, b in np.argwhere(iou >= DOUBLED_IOU)]
    return pairs


def write_csv(suspects: list[Suspect], path: Path) -> None:
    """Write one row per suspect, as ordered; a box is that of the first label in question, or the model's."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                             errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["score", "reason", "photo", "x", "y", "width", "height", "other photo", "detail"])
        for suspect in suspects:
            boxes = to_xywh(np.concatenate([suspect.labels, suspect.found])).round(1).tolist() or [[""] * 4]
            rows.writerow([f"{suspect.score:.3f}", suspect.reason, csv_cell(suspect.file), *boxes[0],
                           csv_cell(suspect.other or ""), suspect.detail])


def draw_suspects(suspects: list[Suspect], path) -> None:
    """Draw the first 100: labels in question red, a model's boxes yellow; unreadable photos are grey."""
    tiles = [_tile(suspect) for suspect in suspects[:SHOWN]]
    save_picture(contact_sheet(tiles, 4, SIDE + CAPTION), path)


def _tile(suspect):
    """One suspect: the part of the photo that matters, enlarged, or two photos side by side; a caption."""
    files = [file for file in (suspect.file, suspect.other) if file]
    parts = []
    for file in files:
        try:
            parts.append(_part(load_picture(file), (suspect.labels, suspect.found)))
        except InputError:  # named elsewhere
            parts.append(Image.new("RGB", (SIDE, SIDE), "#404040"))
    tile = contact_sheet(parts, len(parts), SIDE // len(parts))
    tile = ImageOps.expand(tile, (0, 0, 0, CAPTION), "#404040")
    text = f"{suspect.score:.2f} {suspect.reason}, {suspect.detail}".rstrip(", ")
    names = " | ".join(file.name for file in files)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    for line, above in ((text, 34), (names, 18)):
        draw.text((4, tile.height - above), drawable(line)[-LETTERS:], "white", font)
    return tile


def _part(image, boxes):
    """Cut the boxes with their size around them out of a photo, enlarge the part, draw them."""
    view = np.array([0, 0, *image.size], float)
    every = np.concatenate(boxes)
    if len(every):
        low, high = every[:, :2].min(0), every[:, 2:].max(0)
        centre = ((low + high) / 2).clip(0, view[2:])
        half = max(1.5 * (high - low).max(), 20)
        view = np.concatenate([centre - half, centre + half]).clip(0, view[[2, 3, 2, 3]])
    sides = np.maximum(view[2:] - view[:2], 1)
    scale = SIDE / sides.max()
    target = [max(1, round(side)) for side in sides * scale]
    part = image.resize(target, Image.Resampling.BILINEAR, tuple(view))
    for own, colour in zip(boxes, (MISSED, FALSE)):
        part = draw_faces(part, (own - np.tile(view[:2], 2)) * scale, colour=colour)
    return part


def report(sets: list[Annotations], folder: Path) -> list[str]:
    """Run all checks on one set, or on training and validation; returns what was found as lines of text.

    Writes suspects.png and suspects.csv to `folder` if there are any."""
    suspects, sets, errors = check_photos(sets)
    suspects += [suspect for annotations in sets for suspect in check_labels(annotations)]
    suspects.sort(key=lambda suspect: (RANKS.index(suspect.reason), -suspect.score))
    counts = Counter(suspect.reason for suspect in suspects)
    counted = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    lines = [f"{len(errors):,} photos that cannot be used: " + "; ".join(errors[:5])] if errors else []
    lines.append(f"suspects: {counted or 'none'}")
    if suspects:
        draw_suspects(suspects, folder / "suspects.png")
        write_csv(suspects, folder / "suspects.csv")
        lines.append(f"the first {min(len(suspects), SHOWN)} in {folder / 'suspects.png'}, "
                     f"all in {folder / 'suspects.csv'}")
    return lines
