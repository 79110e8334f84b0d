"""Whole folders: threads and batches, first labels, false alarms, thresholds; videos and streams."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import detect
import detector
from support import video
from support.coco import read_annotations
from tools import prelabel


class Brightness:
    """A detector whose one face on a picture has the picture's brightness, in fifths, as its score."""

    size, threshold = (50, 50), None

    def __call__(self, images):
        return [np.float32([[10, 20, 30, 40, image.mean() / 255]]) for image in images]


@pytest.fixture
def bright(tmp_path, monkeypatch):
    """A folder in/ of grey pictures of 100x200, called by their brightness in percent, and a broken one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect, "load_detector", lambda *_, **__: Brightness())
    (tmp_path / "in/deep").mkdir(parents=True)
    for percent in (10, 30, 45, 60, 90):
        name = f"in/deep/{percent}.png" if percent == 60 else f"in/{percent}.png"
        Image.new("RGB", (100, 200), (round(percent * 2.55),) * 3).save(tmp_path / name)
    (tmp_path / "in/40.png").write_bytes(b"no picture")
    return tmp_path


def test_threads_and_batches_give_what_one_by_one_gives(tmp_path, model_file, refused):
    """Order, names, failures: more pictures than are read ahead, of two sizes, some broken."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(35):
        size = (30, 40, 3) if n % 3 else (220, 100, 3)
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(tmp_path / f"in/{n:02}.png")
    for n in (0, 9, 20):
        (tmp_path / f"in/{n:02}.png").write_bytes(b"no picture")
    line = refused(detect.main, tmp_path / "in", "--model", model_file, "--out", tmp_path / "out",
                   "--score", "0.5", "--device", "cpu")
    assert "3 of 35 failed: " in line
    places = [line.index(f"{n}.png") for n in ("00", "09", "20")]
    assert places == sorted(places)
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [entry["drawn"] for entry in entries] == [f"{n:02}.png" for n in range(35) if n not in (0, 9, 20)]
    alone = detector.load_detector(model_file, device="cpu")
    for entry in entries:
        expected = detector.detect(alone, entry["file"])
        expected = expected[expected[:, 4] >= 0.5]
        found = np.array([[*face["box"], face["score"]] for face in entry["faces"]]).reshape(-1, 5)
        assert len(found) == len(expected) and os.path.basename(entry["file"]) == entry["drawn"]
        np.testing.assert_allclose(found, expected, atol=0.02)
        assert Image.open(tmp_path / "out" / entry["drawn"]).size == (entry["width"], entry["height"])


def test_ctrl_c_ends_a_folder_and_leaves_no_half_file(bright, monkeypatch):
    class Interrupted(Brightness):
        def __call__(self, images):
            raise KeyboardInterrupt
    monkeypatch.setattr(detect, "load_detector", lambda *_, **__: Interrupted())
    with pytest.raises(SystemExit) as end:
        detect.main(["in", "--out", "out"])
    assert end.value.code == 130 and not os.path.exists("out")


def test_first_labels(bright, refused):
    os.mkdir("labels")
    line = refused(prelabel.main, "in", "labels/pre.json")
    assert "1 of 6 failed: in/40.png" in line and not os.path.exists("detections")
    content = json.loads((bright / "labels/pre.json").read_text())
    names = ["10", "30", "45", "90", "deep/60"]
    assert [image["file_name"] for image in content["images"]] == [f"../in/{name}.png" for name in names]
    faces = {face["image_id"]: face for face in content["annotations"]}
    assert [faces[n]["iscrowd"] if n in faces else None for n in range(1, 6)] == [None, 1, 1, 0, 0]
    assert faces[5]["bbox"] == [20, 80, 40, 80] and faces[5]["score"] == pytest.approx(0.6, abs=0.01)
    annotations = read_annotations("labels/pre.json")
    assert annotations.crowd.tolist() == [True, True, False, False]
    assert all(annotations.file(n).is_file() for n in range(5)) and (annotations.sizes == (100, 200)).all()


def test_photos_that_fool_the_model(bright, refused, capsys):
    refused(prelabel.main, "in", "negatives.json", "--fooled", "0.5")
    content = json.loads((bright / "negatives.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["in/90.png", "in/deep/60.png"]
    assert content["annotations"] == [] and len(read_annotations("negatives.json").ids) == 2
    os.rename("in", "detections")  # a name that detect.py gives its results
    os.remove("detections/40.png")
    prelabel.main(["detections", "negatives.json", "--fooled", "0.95"])
    assert "0 of 5 pictures have a face of score 0.95" in capsys.readouterr().out
    assert len(read_annotations("negatives.json").ids) == 0
    assert "30.png: the name of a .json" in refused(prelabel.main, "detections", "detections/30.png")


@pytest.mark.parametrize("words, shown, said", [
    ([], 2, "score 0.500 is the model's, for precision=0.95\n"), (["--score", "0.2"], 4, "s\n")])
def test_the_models_own_threshold_is_used_and_named(bright, monkeypatch, capsys, words, shown, said):
    threshold = {"score": 0.5, "size": [50, 50], "tiles": None, "target": "precision=0.95"}
    monkeypatch.setattr(Brightness, "threshold", threshold)
    os.remove("in/40.png")
    detect.main(["in", *words])
    out = capsys.readouterr().out
    assert out.startswith(f"{shown} faces on 5 pictures") and out.endswith(said)


class Camera:
    """What annotate_video needs of OpenCV, on a clock that reading moves. A frame of time None is bad."""

    def __init__(self, times, total=0):
        self.times, self.written, self.now, self.number, self.total = list(times), [], 0.0, 0, total
        self.writes = True

    def __getattr__(self, name):  # CAP_PROP_... and COLOR_...
        return name

    def monotonic(self):
        return 1000 + self.now

    def get(self, what):
        return {"CAP_PROP_FPS": 10.0, "CAP_PROP_FRAME_COUNT": self.total}.get(what, 0)

    def read(self):
        if not self.times:
            if self.total:
                return False, None
            raise KeyboardInterrupt
        now, self.number = self.times.pop(0), self.number + 1
        self.now = now or self.now
        return now is not None, np.full((50, 50, 3), self.number, np.uint8)

    def cvtColor(self, frame, _):
        return frame

    def VideoWriter_fourcc(self, *_):
        return 0

    def VideoWriter(self, path, *_):
        open(path, "w").close()
        return SimpleNamespace(write=lambda frame: self.written.append(int(frame[0, 0, 0])),
                               isOpened=lambda: self.writes, release=lambda: None)

    def release(self):
        pass


def save_video(monkeypatch, camera, source, out):
    """What detect.py makes of it: the number of frames, the name of the drawing, the error."""
    monkeypatch.setattr(video, "open_video", lambda source: (camera, camera))
    monkeypatch.setattr(video.time, "monotonic", camera.monotonic)
    entry, error = detect.save_video(source, out, lambda image: np.ones((1, 5)), lambda image, faces: image)
    return len(entry["frames"]), entry.get("drawn"), error


@pytest.mark.parametrize("times, written", [
    ([0, 0.35, 0.41, 0.81], [1, 1, 1, 2, 3, 3, 3, 3, 4]),         # too slow: the last one stays
    ([0, 0.02, 0.07, 0.13, 0.18, 0.25], [1, 4, 6]),             # faster than its 10 frames a second
    ([0, 0.1001, 0.2001, 0.3001], [1, 2, 3, 4])])
def test_a_webcam_is_recorded_at_its_true_speed(tmp_path, monkeypatch, times, written):
    camera = Camera(times)
    assert save_video(monkeypatch, camera, 0, tmp_path / "out.mp4") == (len(written), "out.mp4", "")
    assert camera.written == written


@pytest.mark.parametrize("times, total, said", [
    ([1] * 9 + [None] * 2 + [1] * 9, 20, "x.mp4: 18 of 20 frames could be read"),  # a hole
    ([1] * 12, 20, "x.mp4: 12 of 20 frames could be read"),                         # broken off
    ([1] * 12, 36_000, "x.mp4: 12 of 36000 frames could be read"),
    ([1] * 18, 20, ""), ([1] * 20, 18, "")])                                 # the container only estimates
def test_bad_frames_of_a_video_are_passed_and_counted(tmp_path, monkeypatch, times, total, said):
    result = save_video(monkeypatch, Camera(times, total), Path("x.mp4"), tmp_path / "out.mp4")
    assert result == (sum(map(bool, times)), "out.mp4", said)


def test_a_damaged_header_is_not_believed(tmp_path, monkeypatch):
    assert save_video(monkeypatch, Camera([1] * 12, 2 * 10 ** 9), Path("x.mp4"), tmp_path / "out.mp4") == (
        12, "out.mp4", "")


def test_faces_of_a_video_that_cannot_be_written_are_kept(tmp_path, monkeypatch):
    camera = Camera([1] * 5, 5)
    camera.writes = False
    frames, drawn, error = save_video(monkeypatch, camera, Path("x.mp4"), tmp_path / "out.mp4")
    assert (frames, drawn) == (5, None) and "out.mp4: OpenCV cannot write 50x50 at 10 frames/s" in error


@pytest.mark.slow
def test_phones_videos_stand_upright_and_slow_motion_is_written(tmp_path, model_file):
    """Frames stored lying, with the rotation in the container; a rate that MPEG-4 has no fraction for."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: videos are not tested")
    for name, kind, rate in (("phone.mp4", "mp4v", 10), ("slow.avi", "MJPG", 105611 / 500)):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*kind), rate, (96, 64))
        for n in range(8):
            writer.write(np.full((64, 96, 3), 20 * n, np.uint8))
        writer.release()
    data = bytearray((tmp_path / "phone.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2
    data[matrix:matrix + 20] = struct.pack(">5i", 0, 1 << 16, 0, -1 << 16, 0)
    (tmp_path / "phone.mp4").write_bytes(data)
    detect.main([str(tmp_path / "phone.mp4"), str(tmp_path / "slow.avi"), "--model", str(model_file),
                 "--out", str(tmp_path / "out")])
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [len(entry["frames"]) for entry in entries] == [8, 8]
    for score, there in (("0", True), ("1", False)):
        detect.main([str(tmp_path / "slow.avi"), "--model", str(model_file), "--score", score, "--out",
                     str(tmp_path / score)])
        (entry,) = json.loads((tmp_path / score / "detections.json").read_text())
        assert any(entry["frames"]) == there
    captures = [cv2.VideoCapture(str(tmp_path / "out" / entry["drawn"])) for entry in entries]
    assert captures[0].read()[1].shape == (96, 64, 3)
    assert captures[1].get(cv2.CAP_PROP_FPS) == pytest.approx(105611 / 500, abs=0.01)


def test_outputs_of_streams_and_webcams_have_names_of_their_own(tmp_path):
    sources = ["rtsp://camera/live", "http://a/b/clip.avi?x=1", "https://camera/", 0, tmp_path / "live.mp4"]
    names = [path.name for path in detect.name_outputs(sources, tmp_path / "out").values()]
    assert names == ["live.mp4", "live-2.mp4", "live-3.mp4", "live-4.mp4", "live-5.mp4"]


def test_pictures_are_named_where_some_were_given():
    picture, clip = {"faces": [1, 2]}, {"file": "x", "frames": [[], [1], [1, 2]]}
    assert detect.describe([clip], []) == "faces in 2 of 3 frames of x"
    assert detect.describe([picture, clip], ["x.jpg"]) == "2 faces on 1 picture, faces in 2 of 3 frames of x"
    assert detect.describe([clip], ["bad.jpg"]).startswith("0 faces on 0 pictures, ")
