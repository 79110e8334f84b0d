"""Tests of tools.compare: a case computed by hand, standard errors, groups of faces, the command."""

import json

import numpy as np
import pytest
import torch

from evaluate import score_faces
from model import checkpoint
from support.coco import Annotations, Detections, read_annotations, to_results
from support.script import file_hash, write_json
from tools.compare import Matched, compare, face_groups, main


def annotated(image, xywh, photos, crowd=None):
    """Annotations of faces on `photos` photos of 300x300."""
    crowd = np.zeros(len(image), bool) if crowd is None else np.array(crowd)
    xywh, sizes = np.array(xywh, float), np.full((photos, 2), 300)
    names = [f"{n}.jpg" for n in range(photos)]
    return Annotations("x.json", 1, np.arange(photos), names, sizes, np.array(image), xywh,
                       xywh[:, 2:].prod(1), crowd, crowd)


def test_by_hand():
    """Of the false ones at 0.8 and 0.6 half a false detection a photo allows the first alone."""
    boxes = [[0, 0, 20, 20], [50, 0, 40, 40], [0, 0, 20, 20], [100, 100, 100, 100]]
    faces = annotated([0, 0, 1, 1], boxes, 2, [False, False, False, True])
    one = Detections(np.array([0, 0, 0, 1, 1, 1]),
                     np.array([[0, 0, 20, 20], [200, 0, 20, 20], [50, 0, 40, 40], [200, 0, 20, 20],
                               [0, 0, 20, 20], [120, 120, 30, 30]], float),  # the last fits the crowd
                     np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.95]))
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    groups = {"20": np.array([1, 0, 1, 1], bool), "40": np.array([0, 1, 0, 0], bool)}
    rows = compare(Matched(faces, one), Matched(faces, nothing), groups, 0.5, 2)
    ap50 = (34 + 33 * 2 / 3 + 34 * 3 / 5) / 101  # of the 101 recalls 34 are up to 1/3, 67 up to 2/3
    np.testing.assert_allclose(rows[:, 0], [ap50, ap50, 1 / 2, 1])
    assert not rows[:, 1].any() and (rows[:, 2] == -rows[:, 0]).all()
    assert compare(Matched(faces, one), Matched(faces, one), groups, 1, 2)[2, 0] == 1  # two false ones


def test_recall_leaves_out_what_scores_as_the_first_false_one_too_many():
    faces = annotated([0], [[0, 0, 20, 20]], 1)
    found = Detections(np.zeros(2, np.int64), np.array([[0, 0, 20, 20], [99, 99, 20, 20]], float), np.ones(2))
    model = Matched(faces, found)
    assert compare(model, model, {"all": np.ones(1, bool)}, 0.5, 1)[2, 0] == 0
    assert compare(model, model, {"all": np.ones(1, bool)}, 1, 1)[2, 0] == 1


def test_the_standard_error_is_that_of_the_difference():
    """A face on each of 400 photos: one model finds all, others miss some at random."""
    faces = annotated(np.arange(400), [[10, 10, 20, 20]] * 400, 400)
    rng = np.random.default_rng(1)

    def finds(kept):
        return Matched(faces, Detections(np.flatnonzero(kept), faces.xywh[kept], np.full(kept.sum(), 0.5)))
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.7
    groups = {"all": np.ones(400, bool)}
    for one, other in ((np.ones(400, bool), first), (first, second), (first, first)):
        row = compare(finds(one), finds(other), groups, 0.3, 400)[2]
        difference = other.astype(float) - one
        assert row[2] == pytest.approx(difference.mean())
        assert row[3] == pytest.approx(difference.std() / 20, rel=0.15)


def test_groups(tmp_path):
    """Sizes are those at 300x300; flags and events come from the json, whose faces are in another order."""
    sides = [8] * 10 + [16] * 10 + [40] * 12 + [100] * 11  # the last on one photo
    images = [{"id": 9 - n, "file_name": f"x/{'aabbc'[n]}/{n}.jpg", "width": 600, "height": 300}
              for n in range(5)]
    blur = {40: {"blur": 2}, 100: {"blur": "heavy"}}
    entries = [{"id": n + 1, "image_id": 5 if n > 31 else 6 + n % 4, "category_id": 1,
                "bbox": [0, 0, 2 * side, side], "occlusion": 0} | blur.get(side, {})
               for n, side in enumerate(sides)]
    write_json(tmp_path / "x.json", {"images": images, "annotations": entries,
                                     "categories": [{"id": 1, "name": "face"}]})
    faces = read_annotations(tmp_path / "x.json")
    groups = face_groups(faces)
    counts = {name: int(own.sum()) for name, own in groups.items()}
    assert counts == {"all faces": 43, "8-10 px": 10, "15-20 px": 10, "30-60 px": 12, "blur 0": 31,
                      "blur 2": 12, "a": 16, "b": 16}
    assert (groups["blur 2"] == groups["30-60 px"]).all() and (faces.image[groups["a"]] < 2).all()
    faces.names = [f"x/{n}.jpg" for n in range(5)]
    assert "x" not in face_groups(faces)  # of one event there is nothing to compare


def test_command(sample, tmp_path, small, capsys, refused):
    data = sample / "val.json"
    faces = read_annotations(data)
    rng = np.random.default_rng(0)
    count = len(faces.image)
    found = Detections(faces.image, faces.xywh * rng.normal(1, 0.05, (count, 4)), rng.random(count))
    write_json(tmp_path / "a.json", to_results(faces, found))
    torch.save(checkpoint(small), tmp_path / "b.pth")
    main([str(data), str(tmp_path / "a.json"), str(tmp_path / "b.pth")])
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    numbers = score_faces(faces, found)["coco"]
    assert rows["AP"][0] == f"{numbers['AP']:.4f}" and rows["AP50"][0] == f"{numbers['AP50']:.4f}"
    assert int(rows["all faces"][0]) == (~faces.ignored).sum()
    same = [tmp_path / "a.json"] * 2
    assert "above 0" in refused(main, data, *same, "--false", "0")
    write_json(tmp_path / "a.made.json", {"detections": file_hash(tmp_path / "a.json"), "photos": [
        [n, name.split("/")[-1]] for n, name in zip(faces.ids[1:].tolist(), faces.names[1:])]})
    assert "a.json: is of only 5 photos of" in refused(main, data, *same)
    (tmp_path / "a.made.json").unlink()
    content = json.loads(data.read_text())
    for image in content["images"]:
        del image["width"]
    write_json(tmp_path / "x.json", content)
    assert "need width and height" in refused(main, tmp_path / "x.json", *same)
