"""In a few minutes: find faces on a photo, fine-tune on drawn faces, export, and measure after each step.

    python -m tools.demo        # after pip install -r requirements.txt; make demo does both

Results are in runs/demo, which is removed first; the drawn photos are in data/sample.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from support.script import InputError, command, new_parser

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.coco import read_annotations, read_results
from support.pictures import save_picture
from tools.worst import LINE, draw_judged, draw_legend, judge

RECIPE = "recipes/demo_finetune.txt"
OUT, DATA = Path("runs/demo"), Path("data/sample")  # as in the recipe
SCORE = 0.5                 # detections of this score or more are drawn
WIDTH = 640                 # of a photo in the comparison, pixels


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


def draw_column(judged, index):
    """Photo `index`, WIDTH pixels wide, with what was found, and the counts."""
    photo, counts = draw_judged(judged, index, WIDTH), judged.counts
    draw, font = ImageDraw.Draw(photo), ImageFont.load_default(18)
    text = f"found {counts['found'][index]} of {counts['faces'][index]} faces, {counts['false'][index]} false"
    draw.rectangle((0, photo.height - 28, draw.textlength(text, font) + 16, photo.height), "black")
    draw.text((8, photo.height - 14), text, "white", font, "lm")
    return photo


def comparison(annotations, results, titles, rows=3):
    """One picture of a few photos, with a column for each file of `results`.

    The photos are those with most mistakes in the first results, and the one with most false detections
    in the last, so that each kind of mistake is seen.
    """
    judged = [judge(annotations, read_results(path, annotations), SCORE) for path in results]
    first, last = judged[0].counts, judged[-1].counts
    worst = np.argsort(-first["missed"] - first["false"], kind="stable")
    chosen = list(dict.fromkeys([*worst[:rows - 1], np.argmax(last["false"]), *worst]))[:rows]
    drawn = [[draw_column(side, index) for side in judged] for index in chosen]

    sheet = Image.new("RGB", (WIDTH * len(titles), sum(row[0].height for row in drawn) + 2 * LINE), "black")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(22), LINE
    for column, title in enumerate(titles):
        draw.text((WIDTH * (column + 0.5), LINE / 2), title, "white", font, "mm")
    for row in drawn:
        for column, photo in enumerate(row):
            sheet.paste(photo, (column * WIDTH, y))
        y += row[0].height
    draw_legend(sheet, f"detections of score {SCORE} or more")
    return sheet


@command
def main(argv=None):
    """Run every step, then draw the comparison and print the table."""
    new_parser(__doc__).parse_args(argv)
    print("A photo first, in seconds. Then drawn faces: measure, fine-tune, measure, export, measure.\n"
          "In all 3 to 8 minutes on two CPU cores.")
    os.chdir(Path(__file__).resolve().parents[1])  # all paths here are the repository's
    if OUT.is_dir():
        print(f"\n$ rm -r {OUT}")    # train.py never overwrites a run
        shutil.rmtree(OUT)
    run("detect.py", "docs/photo.jpg", "--out", OUT / "photo")
    print(f"\nWhat the shipped network finds on a photo: {OUT}/photo/photo.jpg", flush=True)

    run("-m", "tools.sample", DATA, "--train", 400, "--val", 60)
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
