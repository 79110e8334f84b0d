"""Fuzz tests: generated input for every reader, and for boxes from matching to metrics.

    python -m pytest tests/test_fuzz.py              # a few seconds per test, always the same input
    FUZZ=5000 python -m pytest tests/test_fuzz.py    # 5,000 new inputs per test

Nothing may end in a traceback, and finite input must never give NaN.
"""

import copy
import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from anchors import decode, encode, make_anchors, match
from data import FaceDataset, random_view
from detector import TOP, postprocess, to_picture
from evaluate import score_faces, table
from support.coco import Detections, read_annotations, read_results, to_results
from support.script import InputError, write_json
from loss import batch_divisor, multibox_loss
from model import Config
from support.pictures import decode_picture, open_picture

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("FUZZ", 100))
fuzz = settings(max_examples=COUNT, deadline=None, derandomize="FUZZ" not in os.environ, database=None,
                suppress_health_check=list(HealthCheck))

JUNK = st.sampled_from([None, True, False, "", "face", "7", "\ud800", "../../x", -1, 0, 1,
                        2**63, -(2**70), 10**400, 0.5, 1e15, -1e300, float("nan"), float("inf"),
                        [], [1], [[1]], [1, 2, 3], [1, 2, 3, float("nan")], {}, {"id": 1}])
NUMBER = st.one_of(st.integers(-50, 150), st.floats(-60, 200),
                   st.sampled_from([0, 1e-300, 1e-9, -1e14, 9.9e14]))
BOX = st.lists(NUMBER, min_size=4, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def documents(draw, valid):
    """Texts of valid JSON content with up to four values replaced by junk or removed; some are cut off."""
    content = {"root": copy.deepcopy(draw(valid))}
    for _ in range(draw(st.integers(0, 4))):
        place, key = content, "root"
        while isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if draw(st.booleans()) or place is content:
            place[key] = copy.deepcopy(draw(JUNK))
        else:
            del place[key]
    text = json.dumps(content["root"])
    return text[:draw(st.integers(0, len(text)))] if draw(st.integers(0, 19)) == 0 else text


@st.composite
def cocos(draw):
    """Valid COCO contents."""
    ids = draw(st.lists(st.integers(-3, 9), max_size=4, unique=True))
    images = [{"id": i, "file_name": draw(st.sampled_from(["e/a.jpg", "b.png", "é/ü.jpg"])),
               "width": draw(st.integers(0, 120)), "height": draw(st.integers(0, 120))} for i in ids]
    annotations = [{"id": n, "image_id": draw(st.sampled_from(ids)),
                    "category_id": draw(st.sampled_from([1, 1, 1, 2])), "bbox": draw(BOX),
                    **draw(st.sampled_from([{}, {"area": 9}, {"iscrowd": 1}, {"iscrowd": 0, "area": 0.5}]))}
                   for n in range(draw(st.integers(0, 6)) if ids else 0)]
    return {"images": images, "annotations": annotations,
            "categories": [{"id": 2, "name": "person"}, {"id": 1, "name": "face"}]}


def entries(ids):
    return st.lists(st.fixed_dictionaries({"image_id": st.sampled_from(ids),
                                           "category_id": st.just(1), "bbox": BOX,
                                           "score": st.one_of(NUMBER, st.sampled_from([0.5, 0.9]))}),
                    max_size=8)


def all_finite(value):
    """Whether every number in nested dicts, lists and arrays is finite."""
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return (all(map(all_finite, value)) if isinstance(value, (list, tuple))
            else isinstance(value, str) or bool(np.isfinite(value).all()))


def accepted(read):
    """Return what `read` returns, or None if it raises InputError. The message must be one line."""
    try:
        with np.errstate(divide="raise", invalid="raise"):
            return read()
    except InputError as error:
        assert str(error) and "\n" not in str(error)


@fuzz
@given(text=documents(cocos()), seed=st.integers(0, 99))
def test_coco_annotations(folder, text, seed):
    """Accepted annotations can be scored, trained on and written again."""
    (folder / "a.json").write_text(text)
    faces = accepted(lambda: read_annotations(folder / "a.json"))
    if faces is None:
        return
    assert all(all_finite(getattr(faces, name)) for name in ("sizes", "xywh", "area"))
    dataset, rng = FaceDataset(faces, 32, 32, 5), np.random.default_rng(seed)
    assert not len(dataset) or dataset[0, (seed,)].error
    for index in range(len(dataset)):
        own = slice(dataset.starts[index], dataset.starts[index + 1])
        assert np.isfinite(random_view(rng, (60, 40), dataset.faces[own][~dataset.ignored[own]])).all()
    chosen = rng.permutation(len(faces.image))
    found = Detections(faces.image[chosen], faces.xywh[chosen], rng.random(len(chosen)))
    write_json(folder / "r.json", to_results(faces, found))
    detections = read_results(folder / "r.json", faces)
    scores = accepted(lambda: score_faces(faces, detections))
    assert all_finite(scores) and "AP50" in table(scores)


@fuzz
@given(text=documents(entries([7, 3])))
def test_coco_results(folder, text):
    (folder / "good.json").write_text(
        json.dumps({"images": [{"id": 7, "file_name": "a"}, {"id": 3, "file_name": "b"}],
                    "categories": [{"id": 1, "name": "face"}],
                    "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50]}]}))
    (folder / "x.json").write_text(text)
    faces = read_annotations(folder / "good.json")
    found = accepted(lambda: read_results(folder / "x.json", faces))
    if found is not None:
        scores = accepted(lambda: score_faces(faces, found))
        assert all_finite(scores)


@st.composite
def damaged(draw, good):
    """One of the byte strings `good`, with some bytes changed, and perhaps cut off."""
    content = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 6))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def encoded(form, **more):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)).save(file, form, **more)
    return file.getvalue()


@fuzz
@given(content=damaged([encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("GIF"),
                        encoded("WEBP"), encoded("BMP"), encoded("TIFF", compression="tiff_lzw")]),
       scale=st.sampled_from([1, 0.3]))
def test_damaged_pictures(folder, content, scale):
    (folder / "x.jpg").write_bytes(content)
    try:
        assert decode_picture(open_picture(folder / "x.jpg"), scale).mode == "RGB"
    except InputError as error:
        assert "x.jpg" in str(error)


CONFIG = Config.scaled_from_300(64, 48, width=0.25)
ANCHORS = make_anchors(CONFIG)
SIDE = st.floats(-1e6, 1e6, width=32) | st.floats(-8, 80, width=32) | st.sampled_from([0.0, 2.0 ** -99, 16.0])


@fuzz
@given(faces=arrays(np.float32, st.tuples(st.integers(0, 6), st.just(4)), elements=SIDE),
       seed=st.integers(0, 999), scale=st.sampled_from([0, 1, 1e3, 1e6]))
def test_boxes_from_matching_to_the_picture(faces, seed, scale):
    """Faces go through match, encode, loss and gradient; outputs through decode and NMS."""
    torch.manual_seed(seed)
    faces = torch.from_numpy(faces)
    image = torch.randint(0, 2, (len(faces),))
    ignored = torch.rand(len(faces)) < 0.3
    labels, targets = match(ANCHORS, faces, ignored, image, 2)
    assert targets.isfinite().all() and set(labels.unique().tolist()) <= {-1, 0, 1}
    logits, offsets = ((scale * torch.randn(2, len(ANCHORS), n)).requires_grad_() for n in (2, 4))
    weights = torch.zeros(2, requires_grad=True)
    for names in (("cross-entropy", "smooth-l1"), ("quality-focal", "eiou")):
        losses = torch.stack(multibox_loss(logits, offsets, labels, targets, ANCHORS, weights,
                                           batch_divisor(labels == 1), *names))
        losses[0].backward()
        assert losses.isfinite().all()
        assert all(part.grad.isfinite().all() for part in (logits, offsets, weights))
    ordered = torch.cat([torch.minimum(faces[:, :2], faces[:, 2:]),
                         torch.maximum(faces[:, :2], faces[:, 2:]) + 1], 1)[None]  # [1, N, 4]
    coded = encode(ordered, ANCHORS[:1])
    assert coded.isfinite().all() and decode(coded, ANCHORS[:1]).isfinite().all()
    found = [to_picture(own, (64, 48), (320, 200))
             for own in postprocess(logits.detach(), offsets.detach(), ANCHORS)]
    for own in found:
        assert len(own) <= TOP and all_finite(own)
        assert (own[:, :4] >= 0).all() and (own[:, 2:4] <= (320, 200)).all()
