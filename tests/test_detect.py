"""From raw outputs to faces on pictures, and the command."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import detect
from anchors import encode, make_anchors
from detect import NMS_IOU, TOP, TorchDetector, find_inputs, load_detector, postprocess, to_picture
from model import Config, checkpoint


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    torch.save(checkpoint(small), path)
    return path


def outputs(config, faces, scores):
    """Raw outputs that say: `faces` `[N, 4]` with `scores`, each at an anchor of its own."""
    anchors = make_anchors(config)
    logits, offsets = torch.zeros(1, len(anchors), 2), torch.zeros(1, len(anchors), 4)
    logits[..., 0] = 20
    for n, (face, score) in enumerate(zip(faces, scores)):
        logits[0, n * 7] = torch.tensor([0.0, float(np.log(score / (1 - score)))])
        offsets[0, n * 7] = encode(face, anchors[n * 7])
    return logits, offsets, anchors


def test_postprocess_finds_what_the_outputs_say():
    faces = torch.tensor([[10.0, 10, 30, 40], [11, 10, 31, 40], [60, 60, 90, 100], [200, 200, 340, 320]])
    found, = postprocess(*outputs(Config(), faces, [0.6, 0.9, 0.019, 0.3]))
    torch.testing.assert_close(found[:, :4], faces[[1, 3]], rtol=1e-4, atol=1e-3)  # best first, one repeat and one weak left out
    assert found[:, 4].tolist() == pytest.approx([0.9, 0.3], rel=1e-4)


def test_postprocess_limits_and_separates():
    torch.manual_seed(0)
    anchors = make_anchors(Config())
    for faces in postprocess(torch.randn(3, 3249, 2), torch.randn(3, 3249, 4), anchors):
        assert len(faces) <= TOP and (faces[:-1, 4] >= faces[1:, 4]).all()
        iou = box_iou(faces[:, :4], faces[:, :4]).fill_diagonal_(0)
        assert iou.max() <= NMS_IOU
    nothing = torch.tensor([9.0, -9]).expand(1, 3249, 2)
    assert postprocess(nothing, torch.zeros(1, 3249, 4), anchors)[0].shape == (0, 5)


def test_to_picture_scales_and_clips():
    faces = np.array([[30, 30, 60, 90, 0.5], [-10, 290, 400, 310, 0.4]], np.float32)
    expected = [[60, 20, 120, 60, 0.5], [0, 290 / 1.5, 600, 200, np.float32(0.4)]]
    np.testing.assert_allclose(to_picture(faces, (300, 300), (600, 200)), expected)
    assert to_picture(faces[:0], (300, 300), (600, 200)).shape == (0, 5)


def test_a_larger_size_keeps_the_anchors_pixels(small):
    detector = TorchDetector(small, (128, 96))
    assert torch.equal(detector.anchors[:9], TorchDetector(small).anchors[:9]) and len(detector.anchors) == 8 * 6 * 9
    faces = detector(torch.randint(0, 255, (2, 3, 96, 128), dtype=torch.uint8))
    assert len(faces) == 2 and all(own.shape[1] == 5 for own in faces)


def test_find_inputs(tmp_path):
    for name in ("a/1.jpg", "a/b/2.PNG", "a/notes.txt", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda *arguments: [str(p.relative_to(tmp_path)) for p in find_inputs([str(tmp_path / a) for a in arguments])]
    assert names("a") == ["a/1.jpg", "a/b/2.PNG"] and names("c.webp", "*.webp", "a/*.jpg") == ["c.webp", "a/1.jpg"]
    with pytest.raises(detect.InputError, match="no such file"):
        names("absent*")


def test_command(sample, tmp_path, model_file, capsys):
    photos = sorted((sample / "val").rglob("*.jpg"))
    detect.main([str(sample / "val"), "--model", str(model_file), "--out", str(tmp_path / "o"), "--score", "0.1",
                 "--grid", str(tmp_path / "grid.png")])
    entries = json.loads((tmp_path / "o/detections.json").read_text())
    assert [entry["file"] for entry in entries] == [str(photo) for photo in photos]
    drawn = sorted((tmp_path / "o").rglob("*.jpg"))
    assert len(drawn) == len(photos) and Image.open(drawn[0]).size == (entries[0]["width"], entries[0]["height"])
    assert Image.open(tmp_path / "grid.png").width > 1000 and f"in {len(photos)} files" in capsys.readouterr().out


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
    assert "1 of 2 could not be read" in line and "x.jpg" in line
    assert len(json.loads((tmp_path / "o/detections.json").read_text())) == 1


def test_refused(sample, tmp_path, model_file, refused, monkeypatch):
    photo = next((sample / "val").rglob("*.jpg"))
    before = photo.read_bytes()
    assert "would overwrite it" in refused(detect.main, photo, "--model", model_file, "--out", photo.parent)
    assert photo.read_bytes() == before
    assert "no such model" in refused(detect.main, photo, "--model", tmp_path / "absent.pth")
    for device in ("xla", "meta", "nonsense"):
        assert "not available here (" in refused(detect.main, photo, "--model", model_file, "--device", device)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    import sys
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "OpenCV: pip install" in refused(detect.main, tmp_path / "clip.mp4", "--model", model_file, "--out", tmp_path / "o")
    assert not os.path.exists(tmp_path / "o/clip.mp4")


def test_the_same_faces_from_a_detector_and_from_raw_outputs(model_file):
    detector = load_detector(str(model_file), device="cpu")
    images = torch.randint(0, 255, (4, 3, 48, 64), dtype=torch.uint8)
    together = detector(images)
    for image, faces in zip(images, together):
        np.testing.assert_allclose(detector(image[None])[0], faces, rtol=1e-4, atol=1e-4)
