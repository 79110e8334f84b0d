"""metrics.py: equal to pycocotools and to the official WIDER code, and what must hold for any detections."""
import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import IOUS, coco_ap, operating_points, size_ap, wider_ap
from wider import read_ground_truth

GROUND_TRUTH = Path(__file__).parent.parent / "../shared/data/wider_eval/ground_truth"
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2 ** 32 - 1)


def random_boxes(rng, count, step):
    """Boxes [count, 4] on a grid of `step` pixels, of all COCO sizes; a coarse grid makes many overlaps equal."""
    size = np.exp(rng.uniform(np.log(8), np.log(160), (count, 1))) * rng.uniform(0.7, 1.4, (count, 2))
    boxes = np.hstack((rng.uniform(0, 120, (count, 2)), size))
    return np.maximum(np.round(boxes / step), [0, 0, 1, 1]) * step if step else boxes


def random_set(seed, pictures=6, most=14, step=None):
    """Faces and detections near them, some twice or nowhere, with ties of scores and overlaps: `coco_ap`'s arguments."""
    rng = np.random.default_rng(seed)
    step = rng.choice([0, 1, 8, 20]) if step is None else step
    ids = rng.choice(1000, pictures, replace=False)
    gt_image = np.repeat(ids, rng.integers(0, most, pictures))
    gt_xywh = random_boxes(rng, len(gt_image), step)
    gt_area = gt_xywh[:, 2] * gt_xywh[:, 3] * rng.choice([1, 0.6], len(gt_image))  # of a mask, less than the box
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
    """The 12 numbers and the precision at IoU 0.5 and 0.75 [2, 101], by pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        faces = coco.COCO()
        faces.dataset = {
            "images": [{"id": int(i)} for i in np.union1d(gt_image, dt_image)], "categories": [{"id": 1}],
            "annotations": [{"id": n, "image_id": int(i), "category_id": 1, "bbox": b, "area": a, "iscrowd": int(c)}
                            for n, (i, b, a, c) in enumerate(zip(gt_image, gt_xywh.tolist(), gt_area, crowd), 1)]}
        faces.createIndex()
        detections = [{"image_id": int(i), "category_id": 1, "bbox": b, "score": s}
                      for i, b, s in zip(dt_image, dt_xywh.tolist(), dt_score)]
        if detections:
            detections = faces.loadRes(detections)
        else:  # loadRes needs one
            detections = coco.COCO()
            detections.dataset = {**faces.dataset, "annotations": []}
            detections.createIndex()
        evaluation = cocoeval.COCOeval(faces, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"][[0, 5], :, 0, 0, 2]


def assert_as_pycocotools(arguments):
    numbers, curves = coco_ap(*arguments)
    expected, precision = pycocotools_numbers(*arguments)
    assert list(numbers) == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                             "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    np.testing.assert_allclose(list(numbers.values()), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose([curves[0.5].precision, curves[0.75].precision], precision, rtol=0, atol=1e-9)


@SETTINGS
@given(SEEDS)
def test_coco_equals_pycocotools_on_crowds_areas_and_ties(seed):
    assert_as_pycocotools(random_set(seed))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(SEEDS)
def test_coco_equals_pycocotools_beyond_100_detections_per_image(seed):
    assert_as_pycocotools(random_set(seed, pictures=2, most=90, step=8))


def test_coco_equals_pycocotools_without_faces_or_detections():
    gt_image, gt_xywh, crowd, gt_area, *detections = random_set(1)
    none = np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)
    faces = gt_image, gt_xywh, crowd, gt_area
    for arguments in ((none[0], none[1], none[2], none[2], *detections), (*faces, *none),
                      (gt_image, gt_xywh, np.ones_like(crowd), gt_area, *detections)):
        assert_as_pycocotools(arguments)
    assert set(coco_ap([], [], [], [], *none)[0].values()) == {-1.0}
    assert set(coco_ap(*faces, [], [], [])[0].values()) <= {0.0, -1.0}


def test_coco_thresholds_are_those_of_the_curves():
    assert IOUS[0] == 0.5 and IOUS[5] == 0.75


# What must hold for COCO, whatever the detections.

def distinct_scores(seed):
    *rest, dt_score = random_set(seed)
    return *rest, np.random.default_rng(seed).permutation(len(dt_score)) / max(len(dt_score), 1)


@SETTINGS
@given(SEEDS)
def test_coco_order_does_not_matter_when_scores_differ(seed):
    gt_image, gt_xywh, crowd, gt_area, dt_image, dt_xywh, dt_score = arguments = distinct_scores(seed)
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)  # other ids: the images come in another order
    d = rng.permutation(len(dt_score))
    permuted = ids[gt_image], gt_xywh, crowd, gt_area, ids[dt_image[d]], dt_xywh[d], dt_score[d]
    assert coco_ap(*permuted)[0] == coco_ap(*arguments)[0]


@SETTINGS
@given(SEEDS)
def test_coco_monotone_changes_of_the_scores_do_not_matter(seed):
    *rest, dt_score = random_set(seed)
    assert coco_ap(*rest, np.exp(3 * dt_score) - 7)[0] == coco_ap(*rest, dt_score)[0]


@SETTINGS
@given(SEEDS)
def test_a_false_detection_below_all_others_leaves_every_ap(seed):
    gt_image, gt_xywh, crowd, gt_area, dt_image, dt_xywh, dt_score = arguments = random_set(seed, most=8)
    more = (np.append(dt_image, 5000), np.vstack((dt_xywh, [900, 900, 50, 50])), np.append(dt_score, -1))
    before, after = coco_ap(*arguments)[0], coco_ap(gt_image, gt_xywh, crowd, gt_area, *more)[0]
    assert before == after
    faces = gt_image, gt_xywh, crowd
    assert size_ap(*faces, dt_image, dt_xywh, dt_score) == size_ap(*faces, *more)


@SETTINGS
@given(SEEDS)
def test_perfect_detections_of_separate_faces_give_one(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 60)
    image = rng.integers(0, 9, count)
    xywh = np.column_stack((np.arange(count) * 300, rng.uniform(0, 50, count), rng.uniform(8, 200, (count, 2))))
    score = np.round(rng.uniform(size=count), 1)
    numbers, _ = coco_ap(image, xywh, np.zeros(count), xywh[:, 2] * xywh[:, 3], image, xywh, score)
    averages = [number for name, number in numbers.items() if name not in ("AR1", "AR10") and number != -1]
    np.testing.assert_allclose(averages, 1, rtol=0, atol=1e-12)
    by_size = [ap for ap in size_ap(image, xywh, np.zeros(count), image, xywh, score).values() if ap != -1]
    np.testing.assert_allclose(by_size, 1, rtol=0, atol=1e-12)
    levels = {"all": np.ones(count, bool)}
    assert wider_ap(image, xywh, levels, image, xywh, score)["all"].ap == pytest.approx(1, abs=1e-12)
    best = operating_points(image, xywh, np.zeros(count), image, xywh, score, 9)[-1]
    assert (best.precision, best.recall, best.f1, best.false_per_picture) == (1, 1, 1, 0)


@SETTINGS
@given(SEEDS)
def test_detecting_everything_twice_never_raises_ap(seed):
    gt_image, gt_xywh, crowd, gt_area, *detections = random_set(seed, step=0)
    twice = [np.concatenate((values, values)) for values in detections]
    once, again = (coco_ap(gt_image, gt_xywh, np.zeros_like(crowd), gt_area, *d)[0] for d in (detections, twice))
    assert all(again[name] <= once[name] + 1e-12 for name in ("AP50",))
    faces = gt_image, gt_xywh, crowd
    once, again = size_ap(*faces, *detections), size_ap(*faces, *twice)
    assert all(again[size] <= once[size] + 1e-12 for size in once)
