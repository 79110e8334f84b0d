"""support.cache: what it gives is what the photos give, found again, and refused once a photo has changed."""
import json

import numpy as np
import pytest
from PIL import Image

from data import FaceDataset
from support.cache import PhotoCache
from support.coco import read_annotations
from support.pictures import ORIENTATION
from support.script import InputError


@pytest.fixture
def photos(tmp_path):
    """A json of two photos: a large smooth one, turned by its EXIF, and a small one."""
    y, x = np.mgrid[:400, :600]
    smooth = np.stack([x % 256, y % 256, (x + y) // 4 % 256], 2)
    smooth = (127 + 100 * np.sin(smooth / 256 * 6.28)).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(smooth).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(smooth[:50, :60]).save(tmp_path / "b.png")
    boxes = [[100, 200, 90, 100], [10, 10, 20, 25]]
    (tmp_path / "x.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": name} for n, name in enumerate(("a.png", "b.png"))],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": b} for n, b in enumerate(boxes)],
        "categories": [{"id": 1, "name": "face"}]}))
    return read_annotations(tmp_path / "x.json")


def test_views_are_those_of_the_photos(photos, tmp_path):
    cache = PhotoCache(tmp_path / "kept", (96, 64))
    plain, cached = FaceDataset(photos, 96, 64), FaceDataset(photos, 96, 64, cache=cache)
    for seed in range(30):
        for index in range(2):
            one, two = plain[index, (seed, index)], cached[index, (seed, index)]
            assert np.array_equal(one.faces, two.faces) and one.size == two.size and not two.error
            difference = (one.picture.int() - two.picture.int()).abs().float()
            assert difference.mean() < 3
    kept, size = cache.load(photos.file(0))
    assert kept.shape == (180, 120, 3) and size == (400, 600)  # 1.25 times the input at least
    files, before = list((tmp_path / "kept").iterdir()), kept.copy()
    assert len(files) == 2
    for size in (0, 5000):  # as a power cut leaves them
        for file in files:
            file.write_bytes(file.read_bytes()[:size])
        assert np.array_equal(cache.load(photos.file(0))[0], before)


def test_small_photos_keep_every_pixel(photos, tmp_path):
    cache = PhotoCache(tmp_path / "kept", (300, 300))
    plain, cached = FaceDataset(photos, 300, 300), FaceDataset(photos, 300, 300, cache=cache)
    for seed in range(10):
        apart = plain[1, (seed, 1)].picture.int() - cached[1, (seed, 1)].picture.int()
        assert apart.abs().max() <= 1  # the view is cut before it is resized: rounding


def test_a_photo_that_has_changed_is_refused(photos, tmp_path):
    cache = PhotoCache(tmp_path / "kept", (96, 64))
    files = [photos.file(0), photos.file(1)]
    cache.check(files)
    for file in files:
        cache.load(file)
    cache.check(files)                                     # the next run
    PhotoCache(tmp_path / "kept", (300, 300)).check(files)  # of another size: others are made
    Image.new("RGB", (50, 50)).save(files[1])
    with pytest.raises(InputError, match="b.png: has changed since it was put into"):
        cache.check(files)


def test_absent_and_broken_photos_are_errors_of_the_photo(photos, tmp_path):
    dataset = FaceDataset(photos, 96, 64, cache=PhotoCache(tmp_path / "kept", (96, 64)))
    photos.file(0).write_bytes(b"no picture")
    photos.file(1).unlink()
    assert "cannot be read" in dataset[0, (0, 0)].error and "no such picture" in dataset[1, (0, 1)].error
