"""In a few minutes: find faces on a photo, fine-tune on drawn faces, export, and measure after each step.

    python demo.py              # after pip install -r requirements.txt; make demo does both

Results are in runs/demo, which is removed first; the drawn photos are in data/sample.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# First, so that Ctrl-C during the slow imports below ends in one line.
from script import InputError, command, new_parser

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coco import Detections, read_annotations, read_results, to_xyxy
from metrics import mistakes
from pictures import FACE, FALSE, MISSED, draw_faces, load_picture, save_picture

RECIPE = "recipes/demo_finetune.txt"
OUT, DATA = Path("runs/demo"), Path("data/sample")  # as in the recipe
SCORE = 0.5                 # detections of this score or more are drawn
TRUTH = "#ffffff"           # the colour of annotated faces
WIDTH, LINE = 640, 40       # of a photo, and of a line of text, in the comparison: pixels


@dataclass
class Judged:
    """The detections of SCORE or more in a results file, and what is wrong with them."""
    found: Detections
    false: np.ndarray       # [D] bool
    missed: np.ndarray      # [M] bool: annotated faces that no detection finds


def run(*arguments):
    """Run a script of this repository, after showing the line that one would type."""
    print("\n$ " + shlex.join(["python", *map(str, arguments)]), flush=True)
    code = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if code:
        raise InputError(f"stopped, as {arguments[0]} ended with exit code {code}; its message is above")


def measure(model, name):
    """The numbers of a model on the validation photos; OUT/{name}_detections.json gets its detections."""
    run("evaluate.py", "--model", model, "--data", DATA / "val.json", "--face-sizes", 0, 19, 30, 60,
        "--json", OUT / f"{name}.json", "--out", OUT / f"{name}_detections.json")
    return json.loads((OUT / f"{name}.json").read_text(encoding="utf-8"))


def table(measured):
    """The numbers of evaluate.py, `{row title: numbers}`, as text."""
    lines = [f"{'':<24}   AP      AP50     AP50, faces   recall   false per photo",
             f"{'':<24}        all faces     >= 20 px         at score {SCORE}"]
    for title, numbers in measured.items():
        size = numbers["AP50_by_size"]
        point = next(point for point in numbers["operating_points"] if point["score"] == SCORE)
        lines.append(f"{title:<24}{numbers['coco']['AP']:>7.3f}{size['all faces']:>9.3f}"
                     f"{size['> 19 px']:>12.3f}{point['recall']:>12.3f}{point['false_per_picture']:>12.2f}")
    return "\n".join(lines)


def judge(annotations, path):
    """Compare a results file with its Annotations."""
    every = read_results(path, annotations)
    shown = every.score >= SCORE
    found = Detections(every.image[shown], every.xywh[shown], every.score[shown])
    missed, false = mistakes(annotations.image, annotations.xywh, annotations.ignored,
                             found.image, found.xywh, found.score)
    return Judged(found, false, missed)


def draw_judged(annotations, index, judged):
    """Photo `index`, WIDTH pixels wide, with its faces and detections in the legend's colours, and counts."""
    photo = load_picture(annotations.file(index))
    scale = WIDTH / photo.width
    photo = photo.resize((WIDTH, round(photo.height * scale)), Image.Resampling.BICUBIC)
    faces, own = (annotations.image == index) & ~annotations.ignored, judged.found.image == index
    found, missed = faces & ~judged.missed, faces & judged.missed
    right, false = own & ~judged.false, own & judged.false
    for boxes, scores, colour in ((annotations.xywh[found], None, TRUTH),
                                  (judged.found.xywh[right], judged.found.score[right], FACE),
                                  (judged.found.xywh[false], judged.found.score[false], FALSE),
                                  (annotations.xywh[missed], None, MISSED)):
        photo = draw_faces(photo, to_xyxy(boxes) * scale, scores, colour, text_size=15)
    draw, font = ImageDraw.Draw(photo), ImageFont.load_default(18)
    counts = f"found {found.sum()} of {faces.sum()} faces, {false.sum()} false"
    draw.rectangle((0, photo.height - 28, draw.textlength(counts, font) + 16, photo.height), "black")
    draw.text((8, photo.height - 14), counts, "white", font, "lm")
    return photo


def comparison(annotations, results, titles, rows=3):
    """One picture of a few photos, with a column for each file of `results`.

    The photos are those with most mistakes in the first results, and the one with most false detections
    in the last, so that each kind of mistake is seen.
    """
    judged = [judge(annotations, path) for path in results]
    first, last, photos = judged[0], judged[-1], len(annotations.ids)
    mistaken = np.append(annotations.image[first.missed], first.found.image[first.false])
    wrong = np.bincount(mistaken, minlength=photos)
    false = np.bincount(last.found.image[last.false], minlength=photos)
    worst = np.argsort(-wrong, kind="stable")
    chosen = list(dict.fromkeys([*worst[:rows - 1], np.argmax(false), *worst]))[:rows]
    drawn = [[draw_judged(annotations, index, side) for side in judged] for index in chosen]

    sheet = Image.new("RGB", (WIDTH * len(titles), sum(row[0].height for row in drawn) + 2 * LINE), "black")
    draw, font, x, y = ImageDraw.Draw(sheet), ImageFont.load_default(22), 12, LINE
    for column, title in enumerate(titles):
        draw.text((WIDTH * (column + 0.5), LINE / 2), title, "white", font, "mm")
    for row in drawn:
        for column, photo in enumerate(row):
            sheet.paste(photo, (column * WIDTH, y))
        y += row[0].height
    for colour, text in ((TRUTH, "annotated face"), (FACE, "found, with score"), (MISSED, "missed face"),
                         (FALSE, "false detection"), (None, f"detections of score {SCORE} or more")):
        if colour:
            draw.rectangle((x, y + 12, x + 22, y + 28), outline=colour, width=3)
        draw.text((x + 30, y + LINE / 2), text, "white", font, "lm")
        x += 62 + round(draw.textlength(text, font))
    return sheet


@command
def main(argv=None):
    """Run every step, then draw the comparison and print the table."""
    new_parser(__doc__).parse_args(argv)
    print("A photo first, in seconds. Then drawn faces: measure, fine-tune, measure, export, measure.\n"
          "In all 3 to 8 minutes on two CPU cores.")
    os.chdir(Path(__file__).parent)  # all paths here are the repository's
    if OUT.is_dir():
        print(f"\n$ rm -r {OUT}")    # train.py never overwrites a run
        shutil.rmtree(OUT)
    run("detect.py", "docs/photo.jpg", "--out", OUT / "photo")
    print(f"\nWhat the shipped network finds on a photo: {OUT}/photo/photo.jpg", flush=True)

    run("sample.py", DATA, "--train", 400, "--val", 60)
    measured = {"shipped network": measure("weights/face_ssd300.pth", "before")}
    started = time.perf_counter()
    run("train.py", f"@{RECIPE}")
    tuned = f"fine-tuned for {time.perf_counter() - started:.0f} s"
    measured[tuned] = measure(OUT / "best.pth", "after")
    run("export.py", "--ir", "--model", OUT / "best.pth", "--out", OUT / "export")
    measured["exported to OpenVINO IR"] = measure(OUT / "export/model.xml", "exported")

    results = [OUT / "before_detections.json", OUT / "after_detections.json"]
    titles = ["before: the shipped network", f"after: {tuned}"]
    save_picture(comparison(read_annotations(DATA / "val.json"), results, titles), OUT / "comparison.jpg")
    print(f"\nFound, missed and false, before and after: {OUT}/comparison.jpg\n\n{table(measured)}")


if __name__ == "__main__":
    main()
