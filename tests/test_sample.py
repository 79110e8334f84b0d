"""Tests of sample.py: the same arguments draw the same photos, photos vary, and boxes fit the faces."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tools.sample
import wider_to_coco
from support.coco import read_annotations
from tools.sample import draw_sample, main


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A folder with 40 + 10 photos."""
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder, train=40, val=10)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_sample(tmp_path / name, train=4, val=2, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["train.json"] != content(tmp_path / "c")["train.json"]


@pytest.mark.slow
def test_a_smaller_sample_begins_a_larger_one(sample, tmp_path):
    draw_sample(tmp_path, train=3, val=1)
    small, large = content(tmp_path), content(sample)
    photos = [name for name in small if name.endswith(".jpg")]
    assert len(photos) == 4 and all(small[name] == large[name] for name in photos)


def test_photos_faces_and_photos_without(sample):
    for split, count in (("train", 40), ("val", 10)):
        faces = read_annotations(sample / f"{split}.json")
        assert len(faces.names) == count and all(faces.file(n).is_file() for n in range(count))
        assert len(np.unique(faces.names)) == count
        assert count - len(np.unique(faces.image)) == count // 10  # one in ten photos has no faces
        assert not faces.ignored.any()
    assert np.bincount(read_annotations(sample / "train.json").image).max() >= 5


def test_boxes_lie_inside_and_vary_in_size(sample):
    faces = read_annotations(sample / "train.json")
    assert (faces.sizes == (320, 240)).all()
    assert (faces.xywh[:, :2] >= 0).all() and (faces.xywh[:, :2] + faces.xywh[:, 2:] <= (320, 240)).all()
    width, height = faces.xywh[:, 2:].T
    assert min(width.min(), height.min()) >= 10
    assert width.min() < 18 and height.max() > 140
    assert np.mean((width >= 20) & (width <= 150)) > .5


def test_boxes_fit_the_turned_heads(monkeypatch):
    monkeypatch.setattr(tools.sample, "background", lambda rng, tiles, *size: Image.new("RGB", size))
    monkeypatch.setattr(tools.sample, "person", lambda rng, figure: (
        0.7, bool(figure.oval(0, 0, 0.7, 1, (255, 255, 255)))))
    for seed in range(60):
        _, image, rows = tools.sample.photo(np.random.default_rng(seed), 320, 240, empty=False)
        if len(rows) == 1:
            x, y, width, height = rows[0][:4]
            drawn = Image.fromarray(np.asarray(image)[..., 0] > 60).getbbox()
            assert np.abs(np.subtract(drawn, (x, y, x + width, y + height))).max() <= 3


def test_faces_do_not_hide_each_other(sample):
    faces = read_annotations(sample / "train.json")
    low, high = faces.xywh[:, :2], faces.xywh[:, :2] + faces.xywh[:, 2:]
    overlap = np.clip(np.minimum(high[:, None], high) - np.maximum(low[:, None], low), 0, None).prod(2)
    overlap[faces.image[:, None] != faces.image] = 0
    np.fill_diagonal(overlap, 0)
    assert (overlap / np.minimum(faces.area[:, None], faces.area)).max() < .3


def test_the_text_converts_to_the_same_json(sample, tmp_path):
    for split in ("train", "val"):
        again = sample / f"again_{split}.json"
        wider_to_coco.main([str(sample / f"wider_{split}_bbx_gt.txt"), str(sample / split), str(again)])
        assert again.read_bytes() == (sample / f"{split}.json").read_bytes()
        again.unlink()
    attributes = json.loads((sample / "train.json").read_text())["annotations"]
    for key in ("blur", "illumination", "occlusion"):
        assert len({face[key] for face in attributes}) > 1, f"{key} never varies"


@pytest.mark.parametrize("size", [(160, 120), (120, 200)])
def test_other_photo_sizes(tmp_path, size):
    draw_sample(tmp_path, train=8, val=1, size=size)
    faces = read_annotations(tmp_path / "train.json")
    assert (faces.sizes == size).all() and Image.open(faces.file(0)).size == size
    assert faces.xywh[:, 2:].min() >= 10 and (faces.xywh[:, :2] + faces.xywh[:, 2:] <= size).all()


def test_a_json_of_another_kind_is_not_overwritten(tmp_path, refused):
    (tmp_path / "train.json").write_text("someone's own")
    assert "train.json: was not drawn by tools.sample and stays" in refused(main, tmp_path)
    assert content(tmp_path) == {"train.json": b"someone's own"}
