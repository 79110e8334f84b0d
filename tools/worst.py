"""Look at a model's mistakes: the photos with most of them as one picture, a row for each photo as CSV.

    python -m tools.worst val.json detections.json --count 12 --score 0.4 --out worst.png --csv photos.csv
"""

import csv
from dataclasses import dataclass

from support.script import command, csv_cell, Parser, parse_picture, whole_file

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evaluate import read_detections
from metrics import operating_points, outcomes
from support.coco import Annotations, Detections, arrays, to_xyxy
from support.options import at_least
from support.pictures import (FACE, FALSE, IGNORED, MISSED, contact_sheet, draw_faces, drawable,
                              load_picture, save_picture)

TRUTH = "#ffffff"                    # the colour of annotated faces
LINE = 40                            # the height of the legend, pixels
LEGEND = {TRUTH: "annotated face", FACE: "found, with score", MISSED: "missed face",
          FALSE: "false detection", IGNORED: "to ignore"}
TILE, CAPTION = 640, 56              # pixels of a photo with its caption on the sheet, and of that alone
LETTERS = 66                         # of a line of the caption


@dataclass
class Judged:
    """The D detections on M annotated faces, and what is to be seen of them from `score` on."""
    annotations: Annotations
    detections: Detections
    score: float
    hit: np.ndarray         # [D] bool: is shown and finds a face
    false: np.ndarray       # [D] bool: is shown and false; those on regions to ignore are neither
    missed: np.ndarray      # [M] bool
    counts: dict            # {"faces", "ignored", "found", "missed", "false"}: [I] int64 each, by photo


def judge(annotations: Annotations, detections: Detections, score: float | None = None) -> Judged:
    """Compare the detections of at least `score` (default: that of the best F1) with the annotated faces."""
    every = outcomes(*arrays(annotations, detections), len(annotations.ids))
    score = operating_points(every)[-1]["score"] if score is None else score
    hit, false = every.hit & (every.score >= score), every.false & (every.score >= score)
    missed = every.asked & ~np.isin(np.arange(len(every.asked)), every.face[hit])
    images = {"faces": annotations.image[every.asked], "ignored": annotations.image[~every.asked],
              "found": every.image[hit], "missed": annotations.image[missed], "false": every.image[false]}
    counts = {name: np.bincount(image, minlength=len(annotations.ids)) for name, image in images.items()}
    return Judged(annotations, detections, score, hit, false, missed, counts)


def draw_judged(judged: Judged, index: int) -> Image.Image:
    """Photo `index`, fitted into a tile above its caption, faces and detections in the legend's colours."""
    annotations, found = judged.annotations, judged.detections
    photo = load_picture(annotations.file(index))
    scale = min(TILE / photo.width, (TILE - CAPTION) / photo.height)
    photo = photo.resize([max(1, round(side * scale)) for side in photo.size], Image.Resampling.BICUBIC)
    faces, own = annotations.image == index, found.image == index
    right, false = own & judged.hit, own & judged.false
    for boxes, scores, colour in (
            (annotations.xywh[faces & annotations.ignored], None, IGNORED),
            (annotations.xywh[faces & ~annotations.ignored & ~judged.missed], None, TRUTH),
            (found.xywh[right], found.score[right], FACE),
            (found.xywh[false], found.score[false], FALSE),
            (annotations.xywh[faces & judged.missed], None, MISSED)):
        photo = draw_faces(photo, to_xyxy(boxes) * scale, scores, colour, text_size=15)
    return photo


def worst_sheet(judged: Judged, count: int) -> Image.Image:
    """Lay the `count` photos with most mistakes side by side, worst first, with names, counts, a legend."""
    counts, tiles, font = judged.counts, [], ImageFont.load_default(18)
    for index in np.argsort(-counts["missed"] - counts["false"], kind="stable")[:count]:
        photo = draw_judged(judged, index)
        text = (f"{drawable(judged.annotations.names[index])[-LETTERS:]}\n{counts['missed'][index]} missed, "
                f"{counts['false'][index]} false, {counts['found'][index]} of {counts['faces'][index]} found")
        tiles.append(Image.new("RGB", (TILE, TILE)))
        tiles[-1].paste(photo)
        ImageDraw.Draw(tiles[-1]).text((0, photo.height + 6), text, "white", font)
    sheet = ImageOps.expand(contact_sheet(tiles, 3, TILE), (0, 0, 0, LINE))
    draw, x = ImageDraw.Draw(sheet), 12
    for colour, text in [*LEGEND.items(), ("white", f"detections of score {judged.score:.3g} or more")]:
        draw.text((x, sheet.height - LINE / 2), text, colour, font, "lm")
        x += 40 + round(draw.textlength(text, font))
    return sheet


def write_per_photo(judged: Judged, path):
    """Write a CSV with the counts of each photo."""
    with whole_file(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            columns = {"file": map(csv_cell, judged.annotations.names)} | judged.counts
            csv.writer(file).writerows(zip(*([name, *own] for name, own in columns.items())))


@command
def main(argv=None):
    """Read, compare at the score, draw, write."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="COCO json")
    add("detections", help="detections on its photos, as evaluate.py --out writes them")
    add("--count", type=at_least(1), default=12, help="photos on the picture (default %(default)s)")
    add("--score", type=float, help="show detections of at least this score (default: that of the best F1)")
    add("--out", type=parse_picture, default="worst.png", metavar="PNG", help="default %(default)s")
    add("--csv", metavar="CSV", help="a row for each photo: faces, ignored, found, missed, false")
    args = parser.parse_args(argv)
    annotations, detections, _ = read_detections(args.data, args.detections)
    judged = judge(annotations, detections, args.score)
    save_picture(worst_sheet(judged, args.count), args.out)
    print(f"wrote {args.out}")
    if args.csv:
        write_per_photo(judged, args.csv)
        print(f"wrote {args.csv}")


if __name__ == "__main__":
    main()
