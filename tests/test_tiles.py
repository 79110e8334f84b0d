"""Tests of the tiles of detector.py: they cover the picture, and a face on a border counts once."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

import evaluate
from detector import TiledDetector, cut, detect, load_detector, merge
from model import checkpoint
from support.coco import read_annotations


class Finder:
    """A detector that finds one white rectangle, also a part of it, if it is `least` pixels wide or more."""

    def __init__(self, least):
        self.least, self.size, self.batches = least, (100, 100), []

    def __call__(self, images):
        self.batches.append(len(images))
        return [self.find(pixels[0] > 127) for pixels in images]

    def find(self, white):
        columns, rows = np.flatnonzero(white.any(0)), np.flatnonzero(white.any(1))
        if len(columns) < self.least or not len(rows):
            return np.zeros((0, 5), np.float32)
        score = 0.5 + len(columns) / 1000  # of a part less than of the whole
        return np.float32([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, score]])


def picture(box, size=(400, 200)):
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return image


def iou(face, box):
    return box_iou(torch.tensor(face[None, :4]), torch.tensor([box], dtype=torch.float64)).item()


@pytest.mark.parametrize("size, side, overlap", [
    ((400, 200), 100, 25), ((401, 333), 100, 25), ((101, 100), 100, 0), ((1000, 90), 100, 50)])
def test_tiles_cover_the_picture_and_share_the_overlap(size, side, overlap):
    views = cut(size, side, overlap)
    seen = np.zeros(size[::-1], int)
    assert views[0].tolist() == [0, 0, *size]
    for x1, y1, x2, y2 in views[1:]:
        assert (x2 - x1, y2 - y1) == (min(side, size[0]), min(side, size[1])) and min(x1, y1) >= 0
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1
    for axis in (0, 1):
        starts = np.unique(views[1:, axis])
        assert (np.diff(starts) <= side - overlap).all() and len(starts) == len(set(starts))


@pytest.mark.parametrize("size", [(100, 100), (64, 30)])
def test_a_picture_no_larger_than_a_tile_is_seen_once(size):
    finder = Finder(3)
    assert cut(size, 100, 25).tolist() == [[0, 0, *size]]
    assert len(detect(TiledDetector(finder, 100, 25), picture((5, 5, 25, 20), size))) == 1
    assert finder.batches == [1]


@pytest.mark.parametrize("side", [14, 24, 40, 60, 90])  # below and above the overlap, 25
@pytest.mark.parametrize("y", [10, 70])
def test_a_face_on_a_border_counts_once(side, y):
    """Wherever it lies: each place has its own cuts by tiles of 100 pixels."""
    detector = TiledDetector(Finder(6), 100, 25)
    for x in range(0, 400 - side, 7):
        box = (x, y, x + side, y + side)
        faces = detect(detector, picture(box))
        assert len(faces) == 1, box
        assert iou(faces[0], box) > 0.75, box


def test_a_face_that_no_view_sees_whole_still_counts_once():
    detector = TiledDetector(Finder(12), 100, 25)  # the whole picture shows 40 pixels as 10
    for x in range(0, 360, 7):
        faces = detect(detector, picture((x, 60, x + 40, 100)))
        assert len(faces) == 1 and iou(faces[0], (x, 60, x + 40, 100)) > 0.4, x


@pytest.mark.parametrize("faces, part, merged", [
    ([[0, 0, 20, 20, 0.9], [18, 0, 38, 20, 0.8], [16, 0, 20, 20, 0.7]], [0, 0, 1],  # two side by side stay
     [[0, 0, 20, 20, 0.9], [18, 0, 38, 20, 0.8]]),
    ([[0, 0, 20, 20, 0.9], [18, 0, 38, 20, 0.8]], [1, 1], [[0, 0, 20, 20, 0.9], [18, 0, 38, 20, 0.8]]),
    ([[0, 0, 40, 40, 0.1], [0, 0, 25, 40, 0.8]], [0, 1], [[0, 0, 40, 40, 0.8]]),  # the better of both scores
    ([[5, 5, 10, 10, 0.1], [0, 0, 40, 40, 0.8]], [0, 1],  # a small face inside a cut one does not replace it
     [[0, 0, 40, 40, 0.8], [5, 5, 10, 10, 0.1]]),
    ([[0, 0, 10, 10, 0.9], [0, 0, 30, 30, 0.8]], [1, 1], [[0, 0, 10, 10, 0.9]])])  # of two parts the better
def test_each_face_counts_once(faces, part, merged):
    np.testing.assert_array_equal(merge(np.float64(faces), np.bool_(part)), merged)


def test_evaluate_and_detect_see_the_same(sample, tmp_path, small, refused, capsys):
    torch.save(checkpoint(small), tmp_path / "small.pth")
    words = ["--data", str(sample / "val.json"), "--model", str(tmp_path / "small.pth"), "--workers", "0",
             "--device", "cpu"]
    annotations = read_annotations(sample / "val.json")
    args = evaluate.parse_args([*words, "--tiles", "160"])
    assert args.tiles == [160, 40] and evaluate.parse_args([*words, "--tiles", "160", "0"]).tiles == [160, 0]
    _, found, _ = evaluate.run_model(args, annotations)
    detector = TiledDetector(load_detector(tmp_path / "small.pth", device="cpu"), 160, 40)
    for index in range(len(annotations.ids)):
        own = detect(detector, annotations.file(index))
        np.testing.assert_array_equal(own[:, 4], found.score[found.image == index])
    for bad in (["8"], ["160", "160"], ["160", "-1"], ["160", "40", "3"]):
        assert "--tiles" in refused(evaluate.main, *words, "--tiles", *bad)
