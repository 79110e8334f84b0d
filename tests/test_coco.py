"""Tests of coco.py: reading annotations, error messages, and results written and read back."""

import json
from dataclasses import replace

import numpy as np
import pytest

from support.coco import Detections, join, read_annotations, read_results, to_results
from support.script import InputError, write_json


def coco(**changes):
    """A small COCO content: image 7 with two faces, image 3 without; `changes` replace entries."""
    content = {"images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80},
                          {"id": 3, "file_name": "b.jpg"}],
               "annotations": [{"id": 5, "image_id": 7, "category_id": 2,
                                "bbox": [10, 20, 30.5, 40], "area": 900, "iscrowd": 0},
                               {"id": 6, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}],
               "categories": [{"id": 2, "name": "face"}]}
    return content | changes


def read(folder, content):
    (folder / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_annotations(folder / "x.json")


def test_reads_what_is_there(tmp_path):
    faces = read(tmp_path, coco())
    assert faces.ids.tolist() == [7, 3] and faces.image.tolist() == [0, 0] and faces.category == 2
    assert faces.xywh.tolist() == [[10, 20, 30.5, 40], [1, 2, 3, 4]] and faces.area.tolist() == [900, 12]
    assert faces.sizes.tolist() == [[100, 80], [0, 0]] and not faces.ignored.any()
    assert faces.file(1) == tmp_path / "b.jpg"
    assert replace(faces, ignored=~faces.ignored).fingerprint() != faces.fingerprint()
    assert read(tmp_path, coco(annotations=face(area=None))).area.tolist() == [12]
    with pytest.raises(InputError, match="a.jpg; python -m tools.labels_to_coco .*x.json PHOTOS"):
        faces.require_photos()
    (tmp_path / "b.jpg").touch()
    faces.require_photos()


def face(**changes):
    return [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]} | changes]


@pytest.mark.parametrize("bbox", [[1, 2, 0, 4], [1, 2, 3, -4], [100, 2, 5, 5], [-9, 2, 9, 5]])
def test_boxes_that_cannot_be_learned_are_kept_and_ignored(tmp_path, bbox):
    faces = read(tmp_path, coco(annotations=face(bbox=bbox)))
    assert faces.ignored.tolist() == [True] and faces.xywh.tolist() == [bbox]


@pytest.mark.parametrize("value", [0, 1.0, True])
def test_crowd_regions_are_marked_by_numbers(tmp_path, value):
    faces = read(tmp_path, coco(annotations=face(iscrowd=value)))
    assert faces.ignored.tolist() == [value == 1]


def test_other_categories_are_left_out(tmp_path):
    faces = read(tmp_path, coco(annotations=face() + face(id=2, category_id=9),
                                categories=[{"id": 9, "name": "person"}, {"id": 2, "name": "Face"}]))
    assert len(faces.image) == 1
    assert read(tmp_path, coco(categories=[{"id": 2, "name": "head"}])).category == 2


def test_no_faces_at_all_and_a_byte_order_mark(tmp_path):
    faces = read(tmp_path, "\ufeff" + json.dumps(coco(annotations=[])))
    assert faces.xywh.shape == (0, 4) and not faces.ignored.size


@pytest.mark.parametrize("content, message", [
    ("[" * 100_000, "not JSON"),
    ("[]", 'no list "images"'),
    (coco(images=[{"file_name": "a"}]), 'images[0] has no integer "id"'),
    (coco(images=[{"id": 1, "file_name": "a"}] * 2), "images[1] repeats id 1"),
    (coco(images=[{"id": 1}], annotations=[]), "images[0] (id 1) has no file_name"),
    (coco(images=[{"id": 1, "file_name": "\ud800"}], annotations=[]), "images[0] (id 1) has no file_name"),
    (coco(images=["a"]), 'images[0] has no integer "id"'),
    (coco(images=[{"id": 7, "file_name": "a", "width": "wide"}]), "width is 'wide'"),
    (coco(annotations=face() * 2), "annotations[1] repeats id 1"),
    (coco(annotations=face(id=None)), 'annotations[0] has no integer "id"'),
    (coco(annotations=face(image_id=[7])), "annotation 1 belongs to image [7]"),
    (coco(annotations=face(bbox=[1, 2, 3])), "bbox is [1, 2, 3], 4 finite numbers expected"),
    (coco(annotations=face(bbox=[1, 2, 3, float("nan")])), "4 finite numbers expected"),
    (coco(annotations=face(bbox=[1, 2, 3, "4"])), "4 finite numbers expected"),
    *[(coco(annotations=face(iscrowd=value)), f"annotation 1: iscrowd is {value!r}, 0 or 1 expected")
      for value in ("0", 2, None, [1], "a\nb", float("nan"))],
    (coco(annotations=face(area="big")), "area is big, a finite number expected"),
    (coco(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]), "there are: cat, dog"),
    (coco(categories=[]), "there are: none"),
    (coco(categories="face"), "must be a list")
])
def test_refused(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and "x.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_annotations(tmp_path / "x.json")


def test_faces_go_by_image_and_keep_what_is_theirs_also_without_some_photos(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in (4, 2, 9)]
    annotations = [face(id=n, image_id=image, bbox=[n, 2, 3, 4], area=10 * n, iscrowd=n % 2)[0]
                   for n, image in enumerate((9, 4, 9, 2, 4), 1)]
    faces = read(tmp_path, coco(images=images, annotations=annotations))

    def columns(part):
        own = part.ids[part.image], part.xywh[:, 0], part.area, part.ignored
        return [column.tolist() for column in own]
    assert columns(faces) == [[4, 4, 2, 9, 9], [2, 5, 4, 1, 3], [20, 50, 40, 10, 30], [0, 1, 0, 1, 1]]
    found = Detections(np.array([1, 2, 2]), np.zeros((3, 4)), np.ones(3))
    fewer, found = faces.without({0}, found)
    assert columns(fewer) == [[2, 9, 9], [4, 1, 3], [40, 10, 30], [0, 1, 1]]
    assert found.image.tolist() == [0, 1, 1]
    assert fewer.names == ["2.jpg", "9.jpg"] and fewer.sizes.shape == (2, 2)


def test_several_sets_join_as_one(tmp_path):
    (tmp_path / "other").mkdir()
    one, two = read(tmp_path, coco()), read(tmp_path / "other", coco())
    both = join([one, two])
    assert both.ids.tolist() == [1, 2, 3, 4] and both.image.tolist() == [0, 0, 2, 2] and len(both.xywh) == 4
    assert both.file(2).resolve() == two.file(0).resolve()
    assert join([one]) is one


def test_results_survive_the_round_trip(tmp_path):
    faces = read(tmp_path, coco())
    rng = np.random.default_rng(0)
    image, xywh, score = rng.integers(0, 2, 50), rng.uniform(0, 1000, (50, 4)), rng.random(50)
    write_json(tmp_path / "r.json", to_results(faces, Detections(image, xywh, score)))
    again = read_results(tmp_path / "r.json", faces)
    for got, written in zip((again.image, again.xywh, again.score), (image, xywh, score)):
        assert np.array_equal(got, written)


def test_refused_results(tmp_path):
    faces = read(tmp_path, coco())
    good = {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}
    for change, message in (({"image_id": 8}, "image 8"),
                            ({"score": float("nan")}, "score is nan"), ({"bbox": [1]}, "bbox is")):
        (tmp_path / "r.json").write_text(json.dumps([good, good | change]))
        with pytest.raises(InputError, match=message):
            read_results(tmp_path / "r.json", faces)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(InputError, match="not COCO results"):
        read_results(tmp_path / "r.json", faces)
