"""Tests of detect.py: which pictures it finds, what it writes, and what it does about errors."""

import json
import os
import sys

import pytest
import torch
from PIL import Image

import detect
from detect import find_inputs
from model import checkpoint


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    torch.save(checkpoint(small), path)
    return path


def test_find_inputs(tmp_path):
    for name in ("a/1.jpg", "a/b/2.PNG", "a/notes.txt", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    def names(*arguments):
        found = find_inputs([str(tmp_path / a) for a in arguments], tmp_path / "out")
        return [str(path.relative_to(tmp_path)) for path in found]

    assert (names("a") == ["a/1.jpg", "a/b/2.PNG"]
            and names("c.webp", "*.webp", "a/*.jpg") == ["c.webp", "a/1.jpg"])
    with pytest.raises(detect.InputError, match="no such file"):
        names("absent*")


def test_command(sample, tmp_path, model_file, capsys):
    photos = sorted((sample / "val").rglob("*.jpg"))
    detect.main([str(sample / "val"), "--model", str(model_file), "--out", str(tmp_path / "o"),
                 "--score", "0.1", "--sheet", str(tmp_path / "sheet.png")])
    entries = json.loads((tmp_path / "o/detections.json").read_text())
    assert [entry["file"] for entry in entries] == [str(photo) for photo in photos]
    drawn = sorted((tmp_path / "o").rglob("*.jpg"))
    assert (len(drawn) == len(photos)
            and Image.open(drawn[0]).size == (entries[0]["width"], entries[0]["height"]))
    assert (Image.open(tmp_path / "sheet.png").width > 1000
            and f"in {len(photos)} files" in capsys.readouterr().out)


def test_links_to_one_photo_are_drawn_each_under_its_own_name(sample, tmp_path, model_file):
    photo = next((sample / "val").rglob("*.jpg"))
    (tmp_path / "in").mkdir()
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / "in" / name).symlink_to(photo)
    detect.main([str(tmp_path / "in"), "--model", str(model_file), "--out", str(tmp_path / "o")])
    assert sorted(os.listdir(tmp_path / "o")) == ["detections.json", "one.jpg", "two.jpg"]


def test_command_goes_on_past_unreadable_pictures_and_says_so(sample, tmp_path, model_file, refused):
    (tmp_path / "x.jpg").write_bytes(b"hello")
    photo = next((sample / "val").rglob("*.jpg"))
    line = refused(detect.main, tmp_path / "x.jpg", photo, "--model", model_file, "--out", tmp_path / "o")
    assert "1 of 2 failed" in line and "x.jpg" in line
    assert len(json.loads((tmp_path / "o/detections.json").read_text())) == 1


def test_refused(sample, tmp_path, model_file, refused, monkeypatch):
    photo = next((sample / "val").rglob("*.jpg"))
    before = photo.read_bytes()
    assert "would overwrite it" in refused(detect.main, photo, "--model", model_file, "--out", photo.parent)
    assert photo.read_bytes() == before
    assert "no such model" in refused(detect.main, photo, "--model", tmp_path / "absent.pth")
    for device in ("xla", "meta", "nonsense"):
        assert "not available here (" in refused(detect.main, photo, "--model", model_file,
                                                 "--device", device)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "OpenCV: pip install" in refused(detect.main, tmp_path / "clip.mp4",
                                            "--model", model_file, "--out", tmp_path / "o")
    assert not os.path.exists(tmp_path / "o/clip.mp4")
