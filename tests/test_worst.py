"""Tests of tools.worst: what is counted, drawn and written for each photo."""

import csv

import numpy as np
import pytest
from PIL import Image, ImageColor

from support.coco import Annotations, Detections, read_annotations, to_results
from support.pictures import FACE, FALSE, IGNORED, MISSED
from support.script import write_json
from tools import worst
from tools.worst import judge, main, worst_sheet, write_per_photo

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
    sheet = np.asarray(worst_sheet(judge(*world, 0.5), 3))

    def shows(pixels, colour):
        return (pixels == ImageColor.getrgb(colour)).all(2).sum() > 50
    tiles = np.split(sheet[:-worst.LINE], 3, 1)
    assert shows(tiles[0], FALSE) and not shows(tiles[0], MISSED)  # two mistakes come before one
    assert all(shows(tiles[1], colour) for colour in (FACE, MISSED, IGNORED, "white"))
    assert not shows(tiles[1], FALSE)
    assert all(shows(sheet[-worst.LINE:], colour) for colour in (FACE, MISSED, FALSE, IGNORED))


def test_one_photo_is_enough_for_a_sheet(world):
    world[0].names[1] = "a\nb\x1b\udcff.png"  # no font can draw that
    Image.new("RGB", (300, 60)).save(world[0].file(1).as_posix().encode("utf-8", "surrogateescape"))
    assert worst_sheet(judge(*world, 0.5), 1).width > worst.TILE


def test_per_photo(world, tmp_path):
    annotations, detections = world
    annotations.names[2] = "b\udcff.png"  # bytes that are no text
    annotations.names[0] = "=1+1.png"      # what a spreadsheet would compute
    write_per_photo(judge(annotations, detections, 0.5), tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["'=1+1.png", *annotations.names[1:]]
    assert list(rows[0].values())[1:] == ["2", "1", "1", "1", "0"]
    assert list(rows[1].values())[1:] == ["0", "0", "0", "0", "2"]


def test_command(sample, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    faces = read_annotations(sample / "val.json")
    found = Detections(np.append(faces.image, 0), np.append(faces.xywh, [[1, 1, 9, 9]], 0),
                       np.append(np.full(len(faces.image), 0.9), 0.5))
    write_json("r.json", to_results(faces, found))
    main([str(sample / "val.json"), "r.json", "--count", "2", "--csv", "p.csv"])
    assert Image.open("worst.png").height > 100
    rows = list(csv.DictReader(open("p.csv")))
    assert len(rows) == 6 and sum(int(row["false"]) for row in rows) == 0  # the best F1 is at 0.9
    main([str(sample / "val.json"), "r.json", "--score", "0.4", "--out", "w.jpg", "--csv", "p.csv"])
    assert "wrote w.jpg" in capsys.readouterr().out
    assert sum(int(row["false"]) for row in csv.DictReader(open("p.csv"))) == 1
    assert "at least 1" in refused(main, sample / "val.json", "r.json", "--count", "0")
    assert "w.png would be" in refused(main, sample / "val.json", "r.json", "--out", "w.txt")
