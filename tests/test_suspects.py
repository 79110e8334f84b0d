"""Tests of duplicates.py and suspects.py: photos that are there twice, labels and photos unlike the rest."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.coco import read_annotations
from tools import look, suspects
from tools.duplicates import near_duplicates, thumbnail


@pytest.fixture
def faces(tmp_path):
    """Write a json of photos of 400x300 without files; boxes is a list of xywh for each of them."""
    def make(boxes, sizes=None, name="x.json"):
        sizes = sizes or [(400, 300)] * len(boxes)
        content = {"images": [{"id": n, "file_name": f"{n}.jpg", "width": w, "height": h}
                              for n, (w, h) in enumerate(sizes)],
                   "annotations": [{"image_id": n, "category_id": 1, "bbox": list(box)}
                                   for n, own in enumerate(boxes) for box in own],
                   "categories": [{"id": 1, "name": "face"}]}
        for number, face in enumerate(content["annotations"], 1):
            face["id"] = number
        (tmp_path / name).write_text(json.dumps(content))
        return read_annotations(tmp_path / name)
    return make


def pictures(count, seed=0):
    """Smooth random pictures, each unlike the others."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (count, 6, 8, 3), np.uint8)
    return [Image.fromarray(own).resize((400, 300), Image.Resampling.BICUBIC) for own in cells]


def test_copies_are_found_in_another_size_quality_and_mirrored(tmp_path):
    first, *others = pictures(60)
    mirror = first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    copies = [first, first.resize((200, 150)), mirror, first.convert("L")]
    for n, image in enumerate([*copies, *others]):
        image.save(tmp_path / f"{n}.jpg", quality=40 if n else 95)
    pixels = np.stack([thumbnail(tmp_path / f"{n}.jpg")[1] for n in range(63)])
    found = near_duplicates(pixels, np.zeros(63, int))
    assert found.keys() == {1, 2, 3} and found[1][0] == found[2][0] == 0
    assert min(correlation for _, correlation in found.values()) > 0.98


def test_no_pair_where_there_is_none():
    for count in (1, 2):  # of one colour: they say nothing
        assert not near_duplicates(np.zeros((count, 32, 32), np.uint8), np.zeros(count, int))


def test_doubled_boxes_and_odd_shapes_are_found(faces):
    rng = np.random.default_rng(0)
    boxes = [[(50 + n, 50, side, 1.3 * side)] for n, side in enumerate(rng.uniform(20, 40, 60))]
    boxes[7].append(np.array(boxes[7][0]) + (boxes[7][0][2] / 5, 0, 0, 0))     # IoU 2 / 3
    boxes[8].append(np.array(boxes[8][0]) + (30, 0, 0, 0))     # a neighbour
    boxes[9].append((200, 100, 100, 20))
    boxes[12] += [(200, 100, 0, 5), (200, 100, 1, 1.3)]        # ignored; small, but of a face's shape
    boxes[11].append((0, 100, 8, 40))                          # cut by the edge of the photo
    found = suspects.check_labels(faces(boxes))
    assert [(one.reason, one.file.name) for one in found] == [("doubled", "7.jpg"), ("odd shape", "9.jpg")]
    assert all(0.5 <= one.score <= 1 for one in found) and len(found[0].labels) == 2
    boxes[11] = boxes[0]
    unsized = suspects.check_labels(faces(boxes, [(0, 0)] * len(boxes)))
    assert [one.file.name for one in unsized] == ["7.jpg", "9.jpg"]


@pytest.mark.parametrize("mirrored", [False, True])
def test_each_leak_is_found_among_many_that_are_alike(mirrored):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32), np.uint8).repeat(130, 0)
    if mirrored:
        pixels[60:] = pixels[60:, :, ::-1]
    found = near_duplicates(pixels, np.arange(130) >= 1)
    assert [found[n][0] for n in range(1, 130)] == [0] * 129


def test_a_leak_comes_before_a_likeness_within_a_set():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32)).repeat(3, 0)
    pixels[0, :, 16:] = np.minimum(pixels[0, :, 16:] + 20, 255)
    other, correlation = near_duplicates(pixels.astype(np.uint8), np.array([0, 1, 1]))[2]
    assert other == 0 and correlation < 0.9999


@pytest.mark.parametrize("sign, noise, step, found", [
    (1, 0, 0, True), (1, 7, 0, True),   # 22 bits differ, correlation 0.987
    (-1, 0, 0, False),                  # 49 bits, 0.996
    (1, 0, 50, False)])                 # 5 bits, 0.86
def test_how_alike_near_duplicates_are(sign, noise, step, found):
    """Both the hashes and the thumbnails must agree: cells on a slope, with noise, or one half brighter."""
    rng = np.random.default_rng(0)
    slope, cells = np.linspace(-70, 70, 32)[None], rng.uniform(-3, 3, (8, 8))
    other = slope + np.kron(sign * cells + rng.normal(0, noise, (8, 8)), np.ones((4, 4)))
    other[16:] += step
    pixels = np.stack([slope + np.kron(cells, np.ones((4, 4))), other]) + 100
    assert len(near_duplicates(pixels.astype(np.uint8), np.zeros(2, int))) == found


def test_names_are_no_formulas(tmp_path):
    leak = suspects.Suspect(1, "leak", Path("=1.jpg"), other=Path("@2.jpg"))
    suspects.write_csv([leak], tmp_path / "x.csv")
    with open(tmp_path / "x.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["photo"], row["other photo"]) == ("'=1.jpg", "'@2.jpg")


def test_good_photos_of_all_sizes_are_no_suspects_and_the_worst_come_first(tmp_path, faces):
    images = pictures(30)
    images += [images[0], images[0].resize((40, 160))]
    sizes = [(64, 72), (1200, 200), (300, 300), *[image.size for image in images[3:]]]
    for n, (image, size) in enumerate(zip(images, sizes)):
        image.resize(size).save(tmp_path / f"{n}.jpg")
    boxes = [[(5, 5, 2 * w // 3, 2 * h // 3)] if w == h else [(9, 9, 12, 15)] for w, h in sizes]
    boxes[5] += [(200, 50, 60, 22), (200, 90, 90, 20), (50, 50, 20, 20), (50, 51, 20, 20)]
    sizes[7:9] = [(500, 300), (300, 300)]  # wrong in the json
    lines = suspects.report([faces(boxes, sizes)], tmp_path)
    with open(tmp_path / "suspects.csv", newline="") as file:
        rows = [(row["reason"], float(row["score"])) for row in csv.DictReader(file)]
    reasons = ["doubled", "odd shape", "odd shape", "near-duplicate", "near-duplicate"]
    assert [reason for reason, _ in rows] == reasons and rows[1][1] > rows[2][1] > 0.5
    assert lines[1] == "suspects: 1 doubled, 2 odd shape, 2 near-duplicate"
    assert "7.jpg: is 400x300, but its json says 500x300" in lines[0]
    assert "8.jpg: is 400x300, but its json says 300x300" in lines[0]


def test_command_finds_leaks_and_goes_on_past_unreadable_photos(sample, tmp_path, capsys, refused):
    shutil.copytree(sample, tmp_path / "s")
    train, val = (read_annotations(tmp_path / f"s/{part}.json") for part in ("train", "val"))
    Image.open(train.file(3)).save(val.file(1), quality=50)
    for index in range(6):
        train.file(6 + index).write_bytes(b"no picture")
    look.main(["--data", str(train.path), str(val.path), "--out", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out
    assert "1 leak" in out and "6 photos that cannot be used" in out and "6 photos in" in out
    with open(tmp_path / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["reason"] == "leak"
    assert (rows[0]["photo"], rows[0]["other photo"]) == (str(val.file(1)), str(train.file(3)))
    assert Image.open(tmp_path / "suspects.png").width > 1000
    assert "or two" in refused(look.main, "--data", *[train.path] * 3)
    assert "0.jpg" in refused(look.main, "--data", train.path, tmp_path / "0.jpg")


@pytest.mark.slow
def test_leaks_in_real_photos(shared):
    sets = [read_annotations(shared / f"data/masks_{part}.json") for part in ("train", "val")]
    found, errors = suspects.check_photos(sets)
    assert not errors
    assert {(one.file.stem, one.other.stem) for one in found if one.reason == "leak"} == {
        ("maksssksksss775", "maksssksksss653"), ("maksssksksss656", "maksssksksss690"),
        ("maksssksksss369", "maksssksksss491")}
