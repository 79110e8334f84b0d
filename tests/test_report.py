"""Tests of report.py: what is counted, drawn and written for each photo."""

import csv

import numpy as np
import pytest
from PIL import Image, ImageColor

from tools import worst as report
from support.coco import Annotations, Detections
from metrics import Curve
from support.pictures import FACE, FALSE, IGNORED, MISSED
from tools.worst import judge, plot_curves, shorten, worst_sheet, write_per_photo
from tools.threshold import Outcomes, score_curve

NAMES = ["a.png", "wide, \"quoted\".png", "b.png"]


@pytest.fixture
def world(tmp_path):
    """Three grey photos: a face found, one missed and a region to ignore; a false alarm; nothing at all."""
    for name, size in zip(NAMES, [(100, 80), (300, 60), (40, 160)]):
        Image.new("RGB", size, "#808080").save(tmp_path / name)
    xywh = np.array([[10, 10, 20, 20], [60, 40, 20, 20], [50, 5, 30, 20]], float)
    ignored = np.array([False, False, True])
    annotations = Annotations(tmp_path / "x.json", 1, np.array([7, 8, 9]), NAMES, np.zeros((3, 2), int),
                              np.zeros(3, int), xywh, xywh[:, 2] * xywh[:, 3], ignored, ignored)
    detections = Detections(np.array([0, 0, 1, 1, 0]),
                            np.array([[10, 10, 20, 20], [51, 6, 28, 18], [5, 5, 30, 30], [200, 5, 30, 30],
                                      [60, 40, 20, 20]], float), np.array([0.9, 0.8, 0.7, 0.95, 0.3]))
    return annotations, detections


def test_counts_by_photo(world):
    counts = judge(*world, 0.5).counts
    assert {name: own.tolist() for name, own in counts.items()} == {
        "faces": [2, 0, 0], "ignored": [1, 0, 0], "found": [1, 0, 0], "missed": [1, 0, 0],
        "false": [0, 2, 0]}
    assert judge(*world, 0.3).counts["missed"].tolist() == [0, 0, 0]


def test_worst_sheet_has_all_colours_and_the_worst_first(world):
    judged = judge(*world, 0.5)
    sheet = np.asarray(worst_sheet(judged, 3))

    def shows(pixels, colour):
        return (pixels == ImageColor.getrgb(colour)).all(2).sum() > 50
    tiles = [sheet[:-report.LINE, start:start + report.TILE] for start in range(4, sheet.shape[1],
                                                                               report.TILE + 8)]
    assert shows(tiles[0], FALSE) and not shows(tiles[0], MISSED)  # two mistakes come before one
    assert all(shows(tiles[1], colour) for colour in (FACE, MISSED, IGNORED, "white"))
    assert not shows(tiles[1], FALSE)
    assert sheet.shape[0] == report.TILE + report.CAPTION + report.LINE  # the tall photo fills its tile
    assert all(shows(sheet[-report.LINE:], colour) for colour in (FACE, MISSED, FALSE, IGNORED))


def test_one_photo_is_enough_for_a_sheet(world):
    sheet = worst_sheet(judge(*world, 0.5), 1)
    assert sheet.height == report.TILE * 60 // 300 + report.CAPTION + report.LINE  # small ones are enlarged


def test_per_photo(world, tmp_path):
    annotations, detections = world
    annotations.names[2] = "b\udcff.png"  # bytes that are no text
    write_per_photo(judge(annotations, detections, 0.5), detections, tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == annotations.names
    assert list(rows[0].values())[1:] == ["2", "1", "1", "1", "0", "", "0.30000"]
    assert list(rows[1].values())[1:] == ["0", "0", "0", "0", "2", "0.95000", ""]
    assert list(rows[2].values())[1:] == ["0", "0", "0", "0", "0", "", ""]


def test_names_are_drawn_in_one_line():
    assert shorten("folder/a.png") == "folder/a.png"
    assert shorten("a\nb\x1b\udcff.png") == "a\\x0ab\\x1b\\udcff.png"
    long = shorten("deep/" * 40 + "end.png")
    assert len(long) == report.LETTERS and long.startswith("...") and long.endswith("/end.png")


def test_plot_has_a_second_panel_where_scores_are_known(tmp_path):
    curves = {"IoU 0.5": Curve(0.5, np.array([0, 0.5]), np.array([1, 0.5]))}
    for name, flags in (("some", [True, False]), ("none", [])):
        hit = np.array(flags, bool)
        by_score = score_curve(Outcomes(np.zeros(len(hit), int), np.linspace(0.9, 0.5, len(hit)), hit, ~hit,
                                        np.array([1])))
        plot_curves(curves, tmp_path / f"{name}.png", by_score, 0.7)
        assert Image.open(tmp_path / f"{name}.png").width > 1000
    plot_curves(curves, tmp_path / "alone.png")
    assert Image.open(tmp_path / "alone.png").width < 800
