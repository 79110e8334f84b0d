"""Tests of tools.doubt: planted label errors are found first, and the corrections mend them."""

import json

import numpy as np
import pytest
from PIL import Image

from support.coco import Detections, read_annotations, to_results
from support.script import write_json
from tools import doubt

PHOTOS = 30


@pytest.fixture
def planted(tmp_path):
    """Annotations with one error of each kind, and what a good model finds: all true boxes, 1 px off.

    Neither photos nor faces stand in the order of their ids, nor the faces in that of their photos."""
    true = [[(20, 20, 30, 40), (120, 60, 28, 36)] for _ in range(PHOTOS)]
    labels = [list(boxes) for boxes in true]
    labels[3][0] = (32, 32, 30, 40)         # off
    del labels[4][0]                        # unlabelled
    labels[5].append((121, 62, 28, 36))     # doubled
    labels[6].append((220, 100, 30, 40))    # not found
    labels[7].append((200, 20, 4, 5))       # too small to be found: no suspect, as the next ones say
    labels[8:28] = [[*own, (200 + n, 20, 4, 5)] for n, own in enumerate(labels[8:28])]
    crowds = [{"bbox": [200, 100, 80, 60], "image_id": 9, "iscrowd": 1},
              {"bbox": [21, 21, 30, 40], "image_id": 10, "iscrowd": 1}]  # takes no label's detection
    faces = [{"bbox": list(box), "image_id": n} for n, own in enumerate(labels) for box in own] + crowds
    faces = [{"id": n, "category_id": 1, "blur": 2, "segmentation": [[0, 0, 9, 0, 9, 9]], **face}
             for n, face in enumerate(faces, 1)]
    faces = [faces[n] for n in np.random.default_rng(0).permutation(len(faces))]
    faces.insert(0, faces[0] | {"id": 999, "category_id": 2})
    ids = list(range(PHOTOS))[::-1]
    write_json(tmp_path / "x.json", {
        "images": [{"id": n, "file_name": f"p/{n}.jpg", "width": 300, "height": 200} for n in ids],
        "annotations": faces, "categories": [{"id": 1, "name": "face"}, {"id": 2, "name": "dog"}]})
    (tmp_path / "p").mkdir()
    for n in ids:
        Image.new("RGB", (300, 200), (n, 90, 90)).save(tmp_path / f"p/{n}.jpg")
    found = np.array([box for own in true for box in own] + [(220, 120, 20, 20)], float)
    found[:-1, :2] += 1
    image = np.append(np.repeat(ids, 2), ids[9])  # the last one is in the crowd
    return read_annotations(tmp_path / "x.json"), Detections(image, found, np.full(len(image), 0.9))


def reasons(annotations, doubts):
    return {(one.reason, int(annotations.ids[one.photo])) for one in doubts}


FOUR = {("off", 3), ("unlabelled", 4), ("doubled", 5), ("not found", 6)}


def test_planted_errors_are_found_and_nothing_else(planted):
    """Not what is too small, nor what lies in a crowd; what is no better than chance is left out."""
    found = doubt.find_doubts(*planted, 100)
    assert reasons(planted[0], found) == FOUR and len(found) == 4
    assert [one.score for one in found] == sorted([one.score for one in found], reverse=True)
    assert all(doubt.LEAST <= one.score <= 1 for one in found)
    assert len(doubt.find_doubts(*planted, 2)) == 2


def test_half_sure_detections_and_those_near_labels_are_no_doubts(planted):
    annotations, detections = planted
    for x, y, score, count in ((150, 120, 0.49, 0), (150, 120, 0.51, 1),
                               (33, 20, 0.9, 0), (40, 20, 0.9, 1)):  # IoU 0.40 and 0.20 with a label
        more = Detections(np.append(detections.image, 0), np.append(detections.xywh, [[x, y, 30, 40]], 0),
                          np.append(detections.score, score))
        assert len(doubt.find_doubts(annotations, more, 100)) == 4 + count


def test_corrections_mend_the_set(planted, tmp_path):
    annotations, detections = planted
    doubts = doubt.find_doubts(annotations, detections, 4)
    content = doubt.corrected(annotations, doubts, tmp_path / "sub/d.json")
    assert {image["id"] for image in content["images"][:4]} == {3, 4, 5, 6}
    assert content["images"][0]["file_name"].startswith("../p/")
    mended = {face["image_id"]: face for face in content["annotations"] if "doubt" in face}
    assert (mended[3]["bbox"], mended[3]["bbox_before"]) == ([21, 21, 30, 40], [32, 32, 30, 40])
    assert mended[4]["bbox"] == [21, 21, 30, 40] and "bbox_before" not in mended[4]
    assert mended[4]["id"] == 1000 and mended[4]["category_id"] == 1
    assert mended[5]["bbox"] == [120, 60, 28, 36]  # the worse of the two
    assert mended[5]["iscrowd"] == mended[6]["iscrowd"] == 1 and mended[6]["bbox"] == [220, 100, 30, 40]
    before = {face["id"]: face for face in json.loads((tmp_path / "x.json").read_text())["annotations"]}
    others = [face for face in content["annotations"] if "doubt" not in face]
    assert len(others) == len(before) - 3 and all(face == before[face["id"]] for face in others)
    (tmp_path / "sub").mkdir()
    write_json(tmp_path / "sub/d.json", content)
    again = read_annotations(tmp_path / "sub/d.json")
    assert len(again.image) == len(annotations.image) + 1 and again.file(0).is_file()
    by_id = {number: n for n, number in enumerate(again.ids.tolist())}
    moved = Detections(np.array([by_id[n] for n in annotations.ids[detections.image]]), detections.xywh,
                       detections.score)
    assert not doubt.find_doubts(again, moved, 100)


def test_outlines_are_those_of_the_boxes(planted, tmp_path):
    """pycocotools makes a mask of each box that is new, not of the old outline."""
    coco = pytest.importorskip("pycocotools.coco").COCO()
    annotations, detections = planted
    doubts = doubt.find_doubts(annotations, detections, 4)
    coco.dataset = doubt.corrected(annotations, doubts, tmp_path / "d.json")
    coco.createIndex()
    new = [face for face in coco.dataset["annotations"] if face.get("reason") in ("off", "unlabelled")]
    assert len(new) == 2
    for face in new:
        x, y, w, h = map(int, face["bbox"])
        mask = coco.annToMask(face)
        assert mask[y:y + h, x:x + w].all() and mask.sum() == w * h == face["area"]


def test_what_is_usual_is_the_mean_of_twenty_alike():
    size = np.random.default_rng(0).permutation(100)
    expected = size.clip(10, 90) - 0.5  # the mean from 10 below to 9 above
    np.testing.assert_allclose(doubt.mean_of_alike(size, size.astype(float)), expected)


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


def test_command(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json("r.json", to_results(*planted))
    doubt.main(["x.json", "r.json", "--count", "50", "--out", "new/d.json"])
    out = capsys.readouterr().out
    assert "wrote new/d.json, with 4 corrections suggested" in out and "not 50: doubts below 0.5" in out
    assert "2 of them are labels to delete or keep by hand: they have iscrowd 1" in out
    assert Image.open("new/d.png").width > 1000
    content = json.loads((tmp_path / "new/d.json").read_text())
    assert len(content["images"]) == PHOTOS and sum("doubt" in face for face in content["annotations"]) == 4
