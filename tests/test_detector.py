"""Tests of detector.py: postprocessing, scaling to the picture, all kinds of input."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, nms

from anchors import decode, encode, make_anchors
from detector import NMS_IOU, TOP, TorchDetector, detect, load_detector, postprocess, to_picture
from model import Config, checkpoint
from support.script import InputError


def outputs(config, faces, scores):
    """Make raw outputs that encode `faces` `[N, 4]` with `scores`, each at an anchor of its own."""
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
    # best first, without the duplicate and the one with a low score
    torch.testing.assert_close(found[:, :4], faces[[1, 3]], rtol=1e-4, atol=1e-3)
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
    assert len(detector.anchors) == 432
    assert torch.equal(detector.anchors[:9], TorchDetector(small).anchors[:9])
    faces = detector(torch.randint(0, 255, (2, 3, 96, 128), dtype=torch.uint8))
    assert len(faces) == 2 and all(own.shape[1] == 5 for own in faces)


def test_a_path_a_picture_and_an_array_give_the_same_faces(model_file, sample):
    path, detector = next((sample / "val").rglob("*.jpg")), load_detector(model_file, device="cpu")
    expected, image = detect(detector, path), Image.open(path)
    assert len(expected) and (expected[:, 2:4] <= image.size).all()
    for picture in (str(path), image, np.array(image)):
        np.testing.assert_array_equal(detect(detector, picture), expected)


def test_a_list_gives_what_its_pictures_give_alone(model_file, sample):
    paths, detector = sorted((sample / "val").rglob("*.jpg"))[:3], load_detector(model_file, device="cpu")
    found = detect(detector, [paths[0], Image.open(paths[1]), np.array(Image.open(paths[2]))])
    for path, faces in zip(paths, found, strict=True):
        np.testing.assert_allclose(faces, detect(detector, path), rtol=1e-4, atol=1e-3)
    assert detect(detector, []) == []


@pytest.mark.parametrize("bad", [
    None, np.zeros((0, 0, 3), np.uint8), np.zeros((9, 9, 3)), np.zeros((3, 9, 9), np.uint8),
    torch.zeros(3, 9, 9), Image.new("RGB", (0, 5)), ["no.jpg"], [None]])
def test_what_is_no_picture_is_refused_in_one_line(model_file, bad):
    with pytest.raises(InputError, match="RGB array uint8|no such picture") as error:
        detect(load_detector(model_file, device="cpu"), bad)
    assert "\n" not in str(error.value)


def test_a_threshold_is_handed_out_only_where_it_was_measured(tmp_path, small):
    def thresholds(tiles):
        entry = {"score": 0.5, "size": [64, 48], "tiles": tiles, "target": "precision=0.95"}
        torch.save(checkpoint(small) | {"threshold": entry}, tmp_path / "x.pth")
        made = [load_detector(tmp_path / "x.pth", size, "cpu", tiles=own)
                for size in (None, (96, 96)) for own in (None, [200, 50], [200, 40])]
        return [detector.threshold is not None for detector in made]
    assert thresholds(None) == [True, False, False, False, False, False]
    assert thresholds([200, 50]) == [False, True, False, False, False, False]


def test_postprocess_of_a_batch_is_that_of_each_picture():
    """Also where scores are equal, or the best anchors all see one face: to the last digit, in order."""
    torch.manual_seed(0)
    anchors, logits = make_anchors(Config()), torch.randn(4, 3249, 2).round(decimals=1)
    offsets, logits[3, :900, 1] = torch.randn(4, 3249, 4), 9
    offsets[3, :900] = encode(torch.tensor([9.0, 9, 99, 99]).expand(900, 4), anchors[:900])
    for n, faces in enumerate(postprocess(logits, offsets, anchors)):
        scores, boxes = logits[n].softmax(-1)[:, 1], decode(offsets[n], anchors)
        scores, boxes = scores[scores > 0.02], boxes[scores > 0.02]
        kept = nms(boxes, scores, NMS_IOU)[:TOP]
        assert torch.equal(faces, torch.cat([boxes[kept], scores[kept, None]], 1))
