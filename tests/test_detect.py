"""Tests of detect.py: which pictures it finds, what it writes, and what it does about errors."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image, features

import detect
from detect import find_inputs
from support.pictures import HEIC


@pytest.fixture
def run(model_file, tmp_path):
    """Run detect.py with the small network: returns the entries of its json."""
    def call(*words, out="out"):
        detect.main([*map(str, words), "--model", str(model_file), "--out", str(tmp_path / out)])
        return json.loads((tmp_path / out / "detections.json").read_text())
    return call


def photo(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_find_inputs(tmp_path):
    for name in ("a/1.jpg", "a/b/2.PNG", "a/notes.txt", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    def names(*arguments):
        found, _ = find_inputs([str(tmp_path / a) for a in arguments], tmp_path / "out")
        return [str(path.relative_to(tmp_path)) for path in found]

    assert names("a") == ["a/1.jpg", "a/b/2.PNG"]
    assert names("c.webp", "*.webp", "a/*.jpg") == ["c.webp", "a/1.jpg"]
    with pytest.raises(detect.InputError, match="no such file"):
        names("absent*")


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path):
    kinds = "jfif jpe mpo ppm tga jp2 avif wmv mpg ts 3gp flv mts ogv MOV".split()
    if not features.check("avif"):
        kinds.remove("avif")
    for name in [*(f"x.{kind}" for kind in kinds), "a.txt", "b.txt", "y.HEIC", "._x.jpg", "__MACOSX/x.jpg"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    found, left_out = find_inputs([str(tmp_path / "in")], tmp_path / "out")
    if HEIC:  # else pillow-heif is installed, and reads it
        assert left_out == "; left out: 2 .txt, 1 .heic (pip install pillow-heif reads HEIC)"
        found.append(tmp_path / "in/y.HEIC")
        with pytest.raises(detect.InputError, match="pillow-heif reads HEIC"):
            detect.load_picture(tmp_path / "in/y.HEIC")
    assert sorted(path.name for path in found) == sorted([*(f"x.{kind}" for kind in kinds), "y.HEIC"])


def test_command(sample, tmp_path, run, capsys):
    photos = sorted((sample / "val").rglob("*.jpg"))
    entries = run(sample / "val", "--score", "0.1")
    assert [entry["file"] for entry in entries] == [str(photo) for photo in photos]
    drawn = sorted((tmp_path / "out").rglob("*.jpg"))
    assert len(drawn) == len(photos)
    assert Image.open(drawn[0]).size == (entries[0]["width"], entries[0]["height"])
    assert f"on {len(photos)} pictures; see " in capsys.readouterr().out
    run(photos[0], "--score", "1")
    assert "0 faces on 1 picture; see " in capsys.readouterr().out


def test_blurred_faces_are_not_there_and_boxes_may_have_no_scores(tmp_path, run):
    path = photo(tmp_path / "a.png", (300, 200))
    drawn = {}
    for flag in ("--blur", "--no-scores", ""):
        entry, = run(path, "--score", "0.4", *flag.split(), out=f"out{flag}")
        drawn[flag] = np.asarray(Image.open(tmp_path / f"out{flag}/a.png")).astype(int)
    assert len(entry["faces"]) > 1
    before = np.asarray(Image.open(path)).astype(int)
    for face in entry["faces"]:
        x1, y1, x2, y2 = map(round, face["box"])
        own = drawn["--blur"][y1:y2, x1:x2]
        assert (own != before[y1:y2, x1:x2]).mean() > 0.9
        assert own.std() < before[y1:y2, x1:x2].std() / 2  # noise is averaged
    assert (drawn["--no-scores"] != before).sum() < (drawn[""] != before).sum()


def test_a_long_name_loses_nothing(tmp_path, run):
    photo(tmp_path / "in/a.jpg")
    photo(tmp_path / f"in/{'n' * 246}.jpg")
    assert [entry["drawn"] for entry in run(tmp_path / "in")] == ["a.jpg", f"{'n' * 246}.jpg"]
    os.rename(tmp_path / "in/a.jpg", tmp_path / f"in/{'n' * 250}.jpe")  # its drawing has no room for .png
    with pytest.raises(SystemExit):
        run(tmp_path / "in")
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert ["drawn" in entry for entry in entries] == [True, False]


def test_refused(sample, tmp_path, model_file, refused, monkeypatch):
    photo = next((sample / "val").rglob("*.jpg"))
    before = photo.read_bytes()
    assert "would overwrite it" in refused(detect.main, photo, "--model", model_file, "--out", photo.parent)
    assert photo.read_bytes() == before
    assert "no such model" in refused(detect.main, photo, "--model", tmp_path / "absent.pth")
    for device in ("xla", "meta", "nonsense"):
        assert "not available here (" in refused(detect.main, photo, "--model", model_file,
                                                 "--device", device)
    for score in ("40", "-0.1", "nan", "high"):
        assert "--score" in refused(detect.main, photo, f"--score={score}")
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    monkeypatch.setitem(sys.modules, "cv2", None)
    for source in (tmp_path / "clip.mp4", "http://127.0.0.1/x.avi"):
        assert f"{source}: videos and webcams need OpenCV: pip install" in refused(
            detect.main, source, "--model", model_file, "--out", tmp_path / "o")
    assert not os.path.exists(tmp_path / "o/clip.mp4")


def test_a_drawing_that_cannot_be_written_ends_nothing(tmp_path, model_file, refused):
    (tmp_path / "out/a.jpg").mkdir(parents=True)  # a folder where the first drawing would go
    photos = [photo(tmp_path / f"in/{name}.jpg") for name in "abc"]
    line = refused(detect.main, tmp_path / "in", "--model", model_file, "--out", tmp_path / "out")
    assert "1 of 3 failed" in line and "a.jpg: is a folder" in line
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [entry["file"] for entry in entries] == list(map(str, photos))
    assert [entry.get("drawn") for entry in entries] == [None, "b.jpg", "c.jpg"]


def test_a_good_runs_results_are_not_replaced_by_nothing(tmp_path, run):
    run(photo(tmp_path / "a.jpg"))
    before = (tmp_path / "out/detections.json").read_bytes()
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run(tmp_path / "b.jpg")
    assert (tmp_path / "out/detections.json").read_bytes() == before


def test_drawings_lie_flat_under_names_of_their_own(tmp_path, run):
    for name in ("a/x.jpg", "b/x.jpg", "c/X.JPG", "d/x-2.jpg"):
        photo(tmp_path / "in" / name)
    names = [entry["drawn"] for entry in run(tmp_path / "in")]
    assert len({name.lower() for name in names}) == 4 and names[0] == "x.jpg"
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "detections.json"])


def test_results_inside_the_searched_folder_are_not_searched(tmp_path, run):
    photo(tmp_path / "in/a.jpg")
    for _ in range(2):
        assert len(run(tmp_path / "in", out="in/found")) == 1
