"""Tests of metrics.py: equality with pycocotools and the official WIDER code, invariants, worked examples."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from metrics import coco_ap, operating_points, outcomes, size_ap, wider_ap

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2 ** 32 - 1)


def random_boxes(rng, count, step):
    """Random boxes `[count, 4]` of all COCO sizes, on a grid of `step` pixels.
    A coarse grid makes many overlaps equal."""
    size = np.exp(rng.uniform(np.log(8), np.log(160), (count, 1))) * rng.uniform(0.7, 1.4, (count, 2))
    boxes = np.hstack((rng.uniform(0, 120, (count, 2)), size))
    return np.maximum(np.round(boxes / step), [0, 0, 1, 1]) * step if step else boxes


def random_set(seed, pictures=6, most=14, apart=0):
    """Random arguments for `coco_ap`: faces, and detections near them.

    Some faces are found twice, some not at all; scores and overlaps have ties. Each face lies `apart` pixels
    further to the right than the one before."""
    rng = np.random.default_rng(seed)
    step = rng.choice([0, 1, 8, 20])
    ids = rng.choice(1000, pictures, replace=False)
    gt_image = np.repeat(ids, rng.integers(0, most, pictures))
    gt_xywh = random_boxes(rng, len(gt_image), step)
    gt_xywh[:, 0] += apart * np.arange(len(gt_image))
    # areas can be those of masks, smaller than the box
    gt_area = gt_xywh[:, 2] * gt_xywh[:, 3] * rng.choice([1, 0.6], len(gt_image))
    copies = np.repeat(np.arange(len(gt_image)), rng.integers(0, 4, len(gt_image)))
    shift = rng.normal(0, rng.choice([0, 0.02, 0.1]), (len(copies), 4)) * gt_xywh[copies][:, [2, 3, 2, 3]]
    near = gt_xywh[copies] + (np.round(shift / step) * step if step else shift)
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    elsewhere = random_boxes(rng, rng.integers(0, 3 * most), step)
    dt_image = np.concatenate((gt_image[copies], rng.choice(ids, len(elsewhere))))
    dt_xywh = np.concatenate((near, elsewhere))
    dt_score = rng.uniform(size=len(dt_image))
    if rng.integers(2):
        dt_score = np.round(dt_score, 1)
    order = rng.permutation(len(dt_image))
    crowd = rng.uniform(size=len(gt_image)) < rng.choice([0, 0.2])
    return gt_image, gt_xywh, crowd, gt_area, dt_image[order], dt_xywh[order], dt_score[order]


def pycocotools_numbers(gt_image, gt_xywh, crowd, gt_area, dt_image, dt_xywh, dt_score):
    """The 12 numbers, computed by pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        faces = coco.COCO()
        faces.dataset = {
            "images": [{"id": int(i)} for i in np.union1d(gt_image, dt_image)], "categories": [{"id": 1}],
            "annotations": [
                {"id": n, "image_id": int(i), "category_id": 1, "bbox": b, "area": a, "iscrowd": int(c)}
                for n, (i, b, a, c) in enumerate(zip(gt_image, gt_xywh.tolist(), gt_area, crowd), 1)]}
        faces.createIndex()
        detections = [{"image_id": int(i), "category_id": 1, "bbox": b, "score": s}
                      for i, b, s in zip(dt_image, dt_xywh.tolist(), dt_score)]
        if detections:
            detections = faces.loadRes(detections)
        else:  # loadRes needs at least one detection
            detections = coco.COCO()
            detections.dataset = {**faces.dataset, "annotations": []}
            detections.createIndex()
        evaluation = cocoeval.COCOeval(faces, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def assert_as_pycocotools(arguments):
    numbers = coco_ap(*arguments)
    assert list(numbers) == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                             "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    np.testing.assert_allclose(list(numbers.values()), pycocotools_numbers(*arguments), rtol=0, atol=1e-9)


@pytest.mark.slow
@SETTINGS
@given(SEEDS)
def test_coco_equals_pycocotools_on_crowds_areas_and_ties(seed):
    assert_as_pycocotools(random_set(seed))


def test_crowded_images_are_compared_in_blocks(monkeypatch):
    arguments = random_set(3)
    expected = coco_ap(*arguments)
    monkeypatch.setattr(metrics, "PAIRS", 5)
    assert coco_ap(*arguments) == expected


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(SEEDS)
def test_coco_equals_pycocotools_beyond_100_detections_per_image(seed):
    assert_as_pycocotools(random_set(seed, pictures=2, most=90))


def test_coco_equals_pycocotools_without_faces_or_detections():
    gt_image, gt_xywh, crowd, gt_area, *detections = random_set(1)
    none = np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)
    faces = gt_image, gt_xywh, crowd, gt_area
    for arguments in ((none[0], none[1], none[2], none[2], *detections), (*faces, *none),
                      (gt_image, gt_xywh, np.ones_like(crowd), gt_area, *detections)):
        assert_as_pycocotools(arguments)
    assert set(coco_ap([], [], [], [], *none).values()) == {-1.0}
    assert set(coco_ap(*faces, [], [], []).values()) <= {0.0, -1.0}


# Invariants of the COCO numbers, for any detections

def distinct_scores(seed):
    *rest, dt_score = random_set(seed)
    return *rest, np.random.default_rng(seed).permutation(len(dt_score)) / max(len(dt_score), 1)


@SETTINGS
@given(SEEDS)
def test_coco_order_does_not_matter_when_scores_differ(seed):
    gt_image, gt_xywh, crowd, gt_area, dt_image, dt_xywh, dt_score = arguments = distinct_scores(seed)
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)  # other ids change the order of the images
    d = rng.permutation(len(dt_score))
    permuted = ids[gt_image], gt_xywh, crowd, gt_area, ids[dt_image[d]], dt_xywh[d], dt_score[d]
    assert coco_ap(*permuted) == coco_ap(*arguments)


@SETTINGS
@given(SEEDS)
def test_perfect_detections_of_separate_faces_give_one(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 60)
    image = rng.integers(0, 9, count)
    xywh = np.column_stack((np.arange(count) * 300, rng.uniform(0, 50, count),
                            rng.uniform(8, 200, (count, 2))))
    score = np.round(rng.uniform(size=count), 1)
    numbers = coco_ap(image, xywh, np.zeros(count), xywh[:, 2] * xywh[:, 3], image, xywh, score)
    averages = [number for name, number in numbers.items() if name not in ("AR1", "AR10") and number != -1]
    np.testing.assert_allclose(averages, 1, rtol=0, atol=1e-12)
    by_size = [ap for ap in size_ap(image, xywh, np.zeros(count), image, xywh, score).values() if ap != -1]
    np.testing.assert_allclose(by_size, 1, rtol=0, atol=1e-12)
    levels = {"all": np.ones(count, bool)}
    assert wider_ap(image, xywh, levels, image, xywh, score)["all"] == pytest.approx(1, abs=1e-12)
    best = operating_points(outcomes(image, xywh, np.zeros(count), image, xywh, score, 9))[-1]
    assert all(best[name] == 1 for name in ("precision", "recall", "f1")) and not best["false_per_picture"]


# AP by face size and operating points, worked out by hand

def test_size_ap_by_hand():
    gt_image = [1, 1, 2, 2]
    # faces of size 50, 20 and 100, and a crowd region
    gt_xywh = [[0, 0, 50, 50], [200, 0, 20, 80], [0, 0, 100, 120], [300, 300, 200, 200]]
    ignored = [False, False, False, True]
    detections = [  # image, box, score
        (1, [0, 0, 50, 50], 0.9),        # finds the face of 50
        (1, [0, 0, 50, 40], 0.8),        # the same face again: false
        (1, [200, 0, 20, 80], 0.7),      # finds the face of 20
        (2, [400, 0, 60, 90], 0.6),      # false, and of size 60
        (2, [310, 310, 40, 40], 0.55),   # lies on the crowd region: ignored
        (2, [0, 0, 100, 120], 0.5),      # finds the face of 100
    ]
    arguments = gt_image, gt_xywh, ignored, *zip(*detections)
    result = size_ap(*arguments)
    assert result[0] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)  # precision at the three hits
    assert result[30] == pytest.approx((1 + 2 / 4) / 2)         # the face of 20 and its detection are ignored
    assert result[60] == pytest.approx(1)                       # so are the face of 50 and the false one
    assert result[100] == -1                                    # no face is larger than 100
    assert size_ap(*arguments, sizes=(99,)) == {99: pytest.approx(1)}
    found = outcomes(*arguments, photos=4)
    points = [list(point.values()) for point in operating_points(found, (0.5, 0.7, 0.95))]
    assert points[0] == points[3] == [0.5, 3 / 5, 1, 2 / 4, pytest.approx(2 * 3 / (5 + 3))]
    assert points[1][1:4] == [2 / 3, 2 / 3, 1 / 4] and points[2][1:4] == [0, 0, 0]
    # false: a face that is already found, and nothing there; not false: on the crowd region
    assert found.face.tolist() == [0, -1, 1, -1, -1, 2] and np.flatnonzero(found.false).tolist() == [1, 3]
    assert found.asked.tolist() == [True, True, True, False] and found.faces.tolist() == [0, 2, 1, 0]


@SETTINGS
@given(SEEDS)
def test_matches_add_up_in_any_order(seed):
    gt_image, gt_xywh, crowd, _, *detections = distinct_scores(seed)
    found = outcomes(gt_image, gt_xywh, crowd, *detections, photos=1000)
    point = operating_points(found, (0,))[0]
    assert found.false.sum() == round(1000 * point["false_per_picture"])
    assert found.hit.sum() == round(point["recall"] * (~crowd).sum())
    faces = found.face[found.hit]
    assert len(set(faces)) == len(faces) and found.asked[faces].all()  # a face is found once
    order = np.random.default_rng(seed).permutation(len(found.face))
    turned = outcomes(gt_image, gt_xywh, crowd, *(values[order] for values in detections), photos=1000)
    assert (turned.face == found.face[order]).all() and (turned.false == found.false[order]).all()


def test_size_ap_looks_only_at_the_best_face_of_a_detection():
    # The best face of the second detection is taken: it is false, although its IoU with the other is 0.6.
    gt_xywh = [[0, 0, 100, 100], [25, 0, 100, 100]]
    dt_xywh = [[0, 0, 100, 100], [0, 0, 98, 100]]
    assert size_ap([1, 1], gt_xywh, [0, 0], [1, 1], dt_xywh, [0.9, 0.8], (0,)) == {0: pytest.approx(0.5)}
    assert coco_ap([1, 1], gt_xywh, [0, 0], [1e4, 1e4], [1, 1],
                   dt_xywh, [0.9, 0.8])["AP50"] == pytest.approx(1)
    # A face goes before the crowd region around it.
    assert size_ap([1, 1], [[0, 0, 500, 500], [0, 0, 50, 50]], [1, 0],
                   [1], [[0, 0, 50, 40]], [1], (0,)) == {0: 1}


def test_best_f1_shows_equal_scores_together():
    # three faces, the first two detected, and three false detections
    xywh = [[100 * n, 0, 10, 10] for n in range(6)]
    arguments = [0] * 3, [xywh[0], xywh[1], xywh[5]], [0] * 3, [0] * 5, xywh[:5]
    best = operating_points(outcomes(*arguments, [0.9, 0.5, 0.5, 0.5, 0.5], photos=1))[-1]
    # F1 with the second alone would be 0.8, but it is never shown alone
    assert (best["score"], best["f1"]) == (0.9, 0.5)
    best = operating_points(outcomes(*arguments, [0.9, 0.5, 0.5, 0.4, 0.4], photos=1))[-1]
    assert list(best.values())[:4] == [0.5, 2 / 3, 2 / 3, 1]


def test_nothing_at_all():
    nothing = [], [], [], [], []
    assert size_ap([], *nothing) == {0: -1, 30: -1, 60: -1, 100: -1}
    assert all(set(list(point.values())[1:]) == {0}
               for point in operating_points(outcomes([], *nothing, photos=3)))
    assert wider_ap([], [], {"easy": []}, [], [], [])["easy"] == -1
    assert wider_ap([1], [[0, 0, 9, 9]], {"easy": [True]}, [], [], [])["easy"] == 0
    assert size_ap([1], [[0, 0, 9, 9]], [0], [], [], [])[0] == 0


# WIDER FACE AP

def official_wider_ap(gt_image, gt_xywh, kept, dt_image, dt_xywh, dt_score):
    """The official evaluation of one level, written out box by box and threshold by threshold."""
    low, high = min([1, *dt_score]), max([0, *dt_score])
    norm = [(s - low) / (high - low) if high > low else 1 for s in dt_score]
    proposals, found, faces = np.zeros(1000), np.zeros(1000), 0
    for image in np.union1d(gt_image, dt_image):
        gt, keep = gt_xywh[gt_image == image], kept[gt_image == image]
        rows = sorted(np.flatnonzero(dt_image == image), key=lambda n: -norm[n])
        faces += keep.sum()
        if not len(gt) or not rows:
            continue
        taken, proposal, recalled = [False] * len(gt), [], []
        for n in rows:
            ious = [pixel_iou(dt_xywh[n], box) for box in gt]
            best = int(np.argmax(ious))
            matched = ious[best] >= 0.5
            proposal.append(not (matched and not keep[best]))
            taken[best] |= matched and keep[best]
            recalled.append(sum(taken))
        for t in range(1000):
            shown = sum(norm[n] >= 1 - (t + 1) / 1000 for n in rows)
            if shown:
                proposals[t] += sum(proposal[:shown])
                found[t] += recalled[shown - 1]
    precision = np.divide(found, proposals, out=np.zeros(1000), where=proposals > 0)
    recall = np.concatenate(([0], found / faces, [1]))
    envelope = np.concatenate(([0], precision, [0]))
    for i in range(1001, 0, -1):
        envelope[i - 1] = max(envelope[i - 1], envelope[i])
    return sum((recall[i + 1] - recall[i]) * envelope[i + 1] for i in range(1001))


def pixel_iou(a, b):
    a_area, b_area = ((box[0] + box[2] - box[0] + 1) * (box[1] + box[3] - box[1] + 1) for box in (a, b))
    width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    return width * height / (a_area + b_area - width * height) if width > 0 and height > 0 else 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_wider_equals_the_official_code(seed):
    rng = np.random.default_rng(seed)
    gt_image, gt_xywh, _, _, *detections = random_set(seed, pictures=4, most=7)
    gt_xywh[rng.uniform(size=len(gt_xywh)) < 0.05, 2:] = 0  # WIDER FACE has such rows, flagged invalid
    kept = rng.uniform(size=len(gt_image)) < rng.choice([0.3, 0.9], len(gt_image))
    if len(gt_image):
        kept[gt_image == gt_image[0]] = False  # an image without faces of this level
    result = wider_ap(gt_image, gt_xywh, {"some": kept, "all": np.ones_like(kept)}, *detections)
    for level, flags in (("some", kept), ("all", np.ones_like(kept))):
        if flags.any():
            ap = official_wider_ap(gt_image, gt_xywh, flags, *detections)
            np.testing.assert_allclose(result[level], ap, rtol=0, atol=1e-9)
        else:
            assert result[level] == -1


def test_wider_edges():
    gt, kept = [[0, 0, 9, 9]], {"easy": [True]}
    # Both end pixels count: 10 x 5 of 10 x 10 is IoU 0.5, and 4 / 9 in continuous coordinates.
    assert wider_ap([1], gt, kept, [1], [[0, 0, 9, 4]], [1])["easy"] == 1
    assert wider_ap([1], gt, kept, [1], [[0, 0, 9, 3.9]], [1])["easy"] == 0
    assert size_ap([1], gt, [False], [1], [[0, 0, 9, 4]], [1])[0] == 0
    # If all scores are equal, each becomes 1.
    assert wider_ap([1], gt, kept, [1, 1], [[0, 0, 9, 9], [50, 0, 9, 9]], [0, 0])["easy"] == 0.5
    # Of two faces with equal IoU, the first is taken.
    assert wider_ap([1, 1], gt * 2, {"easy": [True, False]}, [1], gt, [1])["easy"] == 1
    assert wider_ap([1, 1], gt * 2, {"easy": [False, True]}, [1], gt, [1])["easy"] == 0
    # Detections on an image without any box do not count.
    assert wider_ap([1], gt, kept, [1, 2], [[0, 0, 9, 9]] * 2, [0.5, 1])["easy"] == 1
    # On an image that only has boxes of other levels, they do.
    kept = {"easy": [True, False]}
    assert wider_ap([1, 2], gt * 2, kept, [1, 2], [[0, 0, 9, 9], [50, 0, 9, 9]], [0.5, 1])["easy"] == 0.5
