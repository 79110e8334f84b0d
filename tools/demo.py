"""In a few minutes: find faces on a photo, fine-tune on synthetic ones, export, and measure after each step.

    python -m tools.demo        # after pip install -r requirements.txt; make demo does both

Results are in runs/demo, which is removed first; the synthetic photos are in data/sample.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from support.script import ROOT, command, Parser, read_json, require

RECIPE = "recipes/demo_finetune.txt"
OUT, DATA = Path("runs/demo"), Path("data/sample")  # as in the recipe
SCORE = 0.5  # of the table and the pictures


def run(*arguments):
    """Run a script of this repository, after showing the line that one would type."""
    print("\n$ " + shlex.join(["python", *map(str, arguments)]), flush=True)
    code = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    require(not code, f"stopped, as {arguments[0]} ended with exit code {code}; its message is above")


def measure(model, name):
    """The numbers of a model on the validation photos; OUT/{name}.png shows those with most mistakes."""
    detections = OUT / f"{name}_detections.json"
    run("evaluate.py", "--model", model, "--data", DATA / "val.json", "--face-sizes", 0, 19, 30, 60,
        "--json", OUT / f"{name}.json", "--out", detections)
    run("-m", "tools.worst", DATA / "val.json", detections, "--score", SCORE, "--out", OUT / f"{name}.png")
    return read_json(OUT / f"{name}.json")


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


@command
def main(argv=None):
    """Run every step, then print the table."""
    Parser(__doc__).parse_args(argv)
    print("A photo, then synthetic faces: measure, fine-tune, export. 3 to 8 minutes on two CPU cores.")
    os.chdir(ROOT)  # all paths here are the repository's
    shutil.rmtree(OUT, ignore_errors=True)  # train.py never overwrites a run
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
    print(f"\nPhotos with most mistakes: {OUT}/before.png, {OUT}/after.png\n\n{table(measured)}")


if __name__ == "__main__":
    main()
