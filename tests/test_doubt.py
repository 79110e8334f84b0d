"""Tests of doubt.py: planted label errors are found first, and the corrections mend them."""

import json

import numpy as np
import pytest
from PIL import Image

from tools import doubt
import evaluate
from support.coco import Detections, read_annotations
from support.script import write_json

PHOTOS = 30


@pytest.fixture
def planted(tmp_path):
    """Annotations with one error of each kind, and what a good model finds: all true boxes, 1 px off."""
    true = [[(20, 20, 30, 40), (120, 60, 28, 36)] for _ in range(PHOTOS)]
    labels = [list(boxes) for boxes in true]
    labels[3][0] = (32, 32, 30, 40)         # off
    del labels[4][0]                        # unlabelled
    labels[5].append((121, 62, 28, 36))     # doubled
    labels[6].append((220, 100, 30, 40))    # not found
    labels[7].append((200, 20, 4, 5))       # too small to be found: no suspect, as the next ones say
    labels[8:28] = [[*own, (200 + n, 20, 4, 5)] for n, own in enumerate(labels[8:28])]
    crowd = {"bbox": [200, 100, 80, 60], "image_id": 9, "iscrowd": 1}
    faces = [{"bbox": list(box), "image_id": n} for n, own in enumerate(labels) for box in own] + [crowd]
    faces = [face | {"id": n, "category_id": 1, "blur": 2} for n, face in enumerate(faces, 1)]
    content = {"images": [{"id": n, "file_name": f"p/{n}.jpg", "width": 300, "height": 200}
                          for n in range(PHOTOS)], "annotations": faces,
               "categories": [{"id": 1, "name": "face"}]}
    write_json(tmp_path / "x.json", content)
    (tmp_path / "p").mkdir()
    for n in range(PHOTOS):
        Image.new("RGB", (300, 200), (n, 90, 90)).save(tmp_path / f"p/{n}.jpg")
    found = np.array([box for own in true for box in own] + [(220, 120, 20, 20)], float)
    found[:-1, :2] += 1
    image = np.append(np.repeat(np.arange(PHOTOS), 2), 9)  # the last one is in the crowd
    return read_annotations(tmp_path / "x.json"), Detections(image, found, np.full(len(image), 0.9))


def test_planted_errors_come_first(planted):
    found = doubt.find_doubts(*planted, 100)
    assert {(one.reason, one.photo) for one in found[:4]} == {
        ("off", 3), ("unlabelled", 4), ("doubled", 5), ("not found", 6)}
    assert min(one.score for one in found[:4]) > 0.4
    assert not {7, 9} & {one.photo for one in found if one.score > 0.15}  # too small; in a crowd
    assert [one.score for one in found] == sorted([one.score for one in found], reverse=True)
    assert all(0 < one.score <= 1 for one in found)
    assert len(doubt.find_doubts(*planted, 2)) == 2


def test_the_order_of_detections_does_not_matter(planted):
    annotations, detections = planted
    order = np.random.default_rng(0).permutation(len(detections.score))
    shuffled = Detections(detections.image[order], detections.xywh[order], detections.score[order])
    one, other = (doubt.find_doubts(annotations, each, 4) for each in planted[1:] + (shuffled,))
    assert {(a.reason, a.photo, a.score) for a in one} == {(a.reason, a.photo, a.score) for a in other}


def test_corrections_mend_the_set(planted, tmp_path):
    annotations, detections = planted
    doubts = doubt.find_doubts(annotations, detections, 4)
    content = doubt.corrected(annotations, doubts, tmp_path / "sub/d.json")
    assert {image["id"] for image in content["images"][:4]} == {3, 4, 5, 6}
    assert content["images"][0]["file_name"].startswith("../p/")
    mended = {face["image_id"]: face for face in content["annotations"] if "doubt" in face}
    assert (mended[3]["bbox"], mended[3]["bbox_before"]) == ([21, 21, 30, 40], [32, 32, 30, 40])
    assert mended[4]["bbox"] == [21, 21, 30, 40] and "bbox_before" not in mended[4]
    assert mended[5]["bbox"] == [120, 60, 28, 36]  # the worse of the two
    assert mended[5]["iscrowd"] == mended[6]["iscrowd"] == 1 and mended[6]["bbox"] == [220, 100, 30, 40]
    assert all(face["blur"] == 2 for face in content["annotations"] if face is not mended[4])
    (tmp_path / "sub").mkdir()
    write_json(tmp_path / "sub/d.json", content)
    again = read_annotations(tmp_path / "sub/d.json")
    assert len(again.image) == len(annotations.image) + 1 and again.file(0).is_file()
    by_id = {number: n for n, number in enumerate(again.ids.tolist())}
    moved = Detections(np.array([by_id[n] for n in detections.image]), detections.xywh, detections.score)
    doubtful = {again.ids[one.photo] for one in doubt.find_doubts(again, moved, 100) if one.score > 0.15}
    assert not {3, 4, 5, 6} & doubtful


@pytest.mark.parametrize("labels, found", [(False, False), (False, True), (True, False)])
def test_nothing_on_one_side(planted, labels, found):
    annotations, detections = planted
    if not labels:
        annotations.image, annotations.xywh = annotations.image[:0], annotations.xywh[:0]
        annotations.ignored, annotations.crowd = annotations.ignored[:0], annotations.crowd[:0]
    if not found:
        detections = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    got = doubt.find_doubts(annotations, detections, 1000)
    assert len([one for one in got if one.reason == "unlabelled"]) == found * (2 * PHOTOS + 1)


def test_command(planted, tmp_path, monkeypatch, capsys, refused):
    annotations, detections = planted
    monkeypatch.chdir(tmp_path)
    write_json("r.json", [{"image_id": int(i), "category_id": 1, "bbox": b.tolist(), "score": 0.9}
                          for i, b in zip(detections.image, detections.xywh)])
    evaluate.main(["--data", "x.json", "--predictions", "r.json", "--doubt", "4"])
    assert "4 doubts in doubt.json" in capsys.readouterr().out and Image.open("doubt.png").width > 1000
    content = json.loads((tmp_path / "doubt.json").read_text())
    assert len(content["images"]) == PHOTOS and sum("doubt" in face for face in content["annotations"]) == 4
    assert "at least 1" in refused(evaluate.main, "--data", "x.json", "--doubt", 0)
