"""COCO AP and AR, AP by face size, operating points, WIDER FACE AP: pure functions over arrays, float64, never rounded.

All take M faces and D detections of a whole set as flat arrays: `gt_image` [M] and `dt_image` [D], integer image ids;
`gt_xywh` [M, 4] and `dt_xywh` [D, 4], x, y, width, height in pixels of the original image; `dt_score` [D], finite.
Order matters only where scores or overlaps tie: equal scores go by image id, then by input order.

All rest on the P pairs of a detection and a face of the same image that overlap by IoU 0.5, the lowest threshold any
of the protocols looks at: few, so that what follows is done for all images at once. A metric over no faces is -1.
"""

from dataclasses import dataclass

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)        # COCO's thresholds
RECALLS = np.linspace(0, 1, 101)         # and the recalls its precision is read at
AREAS = {"": (0, 1e10), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2), "_large": (96 ** 2, 1e10)}
MAX_DETECTIONS = (1, 10, 100)
FACE_SIZES = (0, 30, 60, 100)            # the reference's table: all faces, > 30, > 60, > 100 px
PAIRS = 2 ** 20                          # compared at once: memory stays bounded, whatever one image holds
WIDER_THRESHOLDS = 1 - np.arange(1, 1001) / 1000


@dataclass
class Curve:
    """A precision-recall curve and its average precision."""
    ap: float
    recall: np.ndarray      # [R]
    precision: np.ndarray   # [R]


@dataclass
class OperatingPoint:
    """What a detector does when detections of at least `score` are shown."""
    score: float
    precision: float
    recall: float
    f1: float
    false_per_picture: float


def coco_ap(gt_image, gt_xywh, gt_ignored, gt_area, dt_image, dt_xywh, dt_score):
    """The 12 COCO numbers of one class, as pycocotools computes them (Lin et al. 2014, COCOeval.py, bbox).

    `gt_ignored` [M] marks crowd regions, `gt_area` [M] is the annotated area in pixels. Returns {name: number}, by the
    names AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large,
    and the curves at IoU 0.5 and 0.75, {0.5: Curve, 0.75: Curve}.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, gt_ignored)
    gt_area = np.asarray(gt_area, np.float64)
    _, dt_image, dt_xywh, dt_score = _best_first(dt_image, dt_xywh, dt_score)
    rank = _rank_in_image(dt_image)
    shown = rank < MAX_DETECTIONS[-1]
    dt_image, dt_xywh, rank = dt_image[shown], dt_xywh[shown], rank[shown]
    dt_area = dt_xywh[:, 2] * dt_xywh[:, 3]
    pairs = _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd)

    precision, recall = {}, {}
    for name, (low, high) in AREAS.items():
        ignored = crowd | (gt_area < low) | (gt_area > high)
        outside = (dt_area < low) | (dt_area > high)
        match = _coco_match(*pairs, rank, ignored, crowd)                                          # [T, D]
        dropped = np.where(match < 0, outside, np.append(ignored, False)[match])
        hit = (match >= 0) & ~dropped
        faces = np.count_nonzero(~ignored)
        precision[name] = np.array([_coco_precision(h, ~x, faces) for h, x in zip(hit, dropped)])  # [T, 101]
        recall[name] = {
            n: hit[:, rank < n].sum(1) / faces if faces else -np.ones(len(IOUS)) for n in MAX_DETECTIONS
        }

    curves = {
        iou: Curve(float(at.mean()), RECALLS, at) for iou, at in zip((0.5, 0.75), precision[""][[0, 5]])
    }
    numbers = {"AP": precision[""].mean(), "AP50": curves[0.5].ap, "AP75": curves[0.75].ap}
    numbers |= {f"AP{name}": precision[name].mean() for name in AREAS if name}
    numbers |= {f"AR{n}": recall[""][n].mean() for n in MAX_DETECTIONS}
    numbers |= {f"AR{name}": recall[name][MAX_DETECTIONS[-1]].mean() for name in AREAS if name}
    return {name: float(number) for name, number in numbers.items()}, curves


def size_ap(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score, sizes=FACE_SIZES):
    """VOC AP at IoU 0.5 over the faces larger than each of `sizes`: {size: AP}, size = min(width, height) in pixels.

    The protocol of the reference's accuracy table: the area under the precision envelope, over all points. Smaller
    faces and crowd regions are ignored, with the detections on them and the unmatched detections that are no larger.
    """
    _, dt_image, dt_xywh, _ = _best_first(dt_image, dt_xywh, dt_score)
    result = {}
    for size, (face, counted, asked) in _by_size(
        gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, sizes
    ).items():
        faces = np.count_nonzero(asked)
        found, shown = _counts_at_hits(face >= 0, counted)
        result[size] = _envelope_area(found / faces, found / shown) if faces else -1.0
    return result


def operating_points(
    gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score, pictures, scores=(0.3, 0.5, 0.7)
):
    """Precision, recall and false detections per picture at IoU 0.5 over all faces, matched as in `size_ap`.

    `pictures` is the number of images, with and without faces. Returns an `OperatingPoint` for each of `scores`, then
    the one of the best F1, whose score is the lowest one shown (1 without detections). 0/0 is 0.
    """
    _, dt_image, dt_xywh, dt_score = _best_first(dt_image, dt_xywh, dt_score)
    face, counted, asked = _by_size(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, (0,))[0]
    faces = np.count_nonzero(asked)
    found, shown = (
        np.append(0, np.cumsum(flags)) for flags in (face >= 0, counted)
    )  # [D + 1], by detections shown
    f1 = 2 * found / np.maximum(shown + faces, 1)

    def point(score):
        n = np.searchsorted(-dt_score, -score, side="right")
        return OperatingPoint(
            float(score),
            float(found[n] / max(shown[n], 1)),
            float(found[n] / max(faces, 1)),
            float(f1[n]),
            float((shown[n] - found[n]) / max(pictures, 1)),
        )

    ends = 1 + np.flatnonzero(
        np.diff(dt_score, append=-np.inf)
    )  # equal scores are shown together or not at all
    best = dt_score[ends[np.argmax(f1[ends])] - 1] if len(ends) else 1.0
    return [point(score) for score in (*scores, best)]


def mistakes(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score):
    """Which faces are missed [M] and which detections are false [D], in input order, matched as in `size_ap`."""
    order, dt_image, dt_xywh, _ = _best_first(dt_image, dt_xywh, dt_score)
    face, counted, missed = _by_size(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, (0,))[0]
    missed[face[face >= 0]] = False
    false = np.zeros(len(order), bool)
    false[order] = counted & (face < 0)
    return missed, false


def wider_ap(gt_image, gt_xywh, kept, dt_image, dt_xywh, dt_score):
    """WIDER FACE AP (Yang et al. 2016) as the official code computes it: {level: Curve}, over 1,000 score thresholds.

    `kept` {level: [M] bool} marks the faces that a level asks for; the others are ignored, with the detections on them.
    Detections in images without any annotated box, kept or not, are left out; elsewhere each false one counts.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, np.zeros(len(gt_image)))
    _, dt_image, dt_xywh, dt_score = _best_first(dt_image, dt_xywh, dt_score)
    lowest, highest = min(dt_score.min(initial=1), 1), max(dt_score.max(initial=0), 0)
    score = (dt_score - lowest) / (highest - lowest) if highest > lowest else np.ones(len(dt_score))
    face = _best_face(*_overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd, pixel=1), len(score))
    annotated = np.isin(dt_image, gt_image)

    curves = {}
    for level, asked in kept.items():
        asked = np.asarray(asked, bool)
        hit = _first_on_face(face, asked)
        counted = annotated & ((face < 0) | np.append(asked, False)[face])
        found, shown = (
            np.searchsorted(-score[flags], -WIDER_THRESHOLDS, side="right") for flags in (hit, counted)
        )
        faces = np.count_nonzero(asked)
        recall, precision = found / max(faces, 1), found / np.maximum(shown, 1)
        curves[level] = Curve(_envelope_area(recall, precision) if faces else -1.0, recall, precision)
    return curves


def _faces(image, xywh, ignored):
    """The faces as arrays [M], [M, 4], [M] of the right types, whatever they came in."""
    return np.asarray(image, np.int64), np.asarray(xywh, np.float64).reshape(-1, 4), np.asarray(ignored, bool)


def _best_first(image, xywh, score):
    """The order [D] of detections, best first, equal scores by image, then as they came; and they in this order."""
    image, score = np.asarray(image, np.int64), np.asarray(score, np.float64)
    order = np.lexsort((image, -score))  # stable
    return order, image[order], np.asarray(xywh, np.float64).reshape(-1, 4)[order], score[order]


def _rank_in_image(dt_image):
    """[D], how many better detections the image of each has."""
    order = np.argsort(dt_image, kind="stable")
    first = np.searchsorted(dt_image[order], dt_image[order])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first
    return rank


def _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd, pixel=0):
    """Detections [P], faces [P] and IoU [P] of the pairs with IoU >= 0.5 within one image.

    The union with a crowd region is the detection alone. With `pixel` 1 both ends of a box are pixels inside it, one
    more in width and height (WIDER). Operations are ordered as in pycocotools and the official code: same bits.
    """

    def corners(image, xywh):
        order = np.argsort(image, kind="stable")
        start = xywh[order, :2].T
        return order, image[order], start, start + xywh[order, 2:].T  # the corners [2, M] each
    gt_order, gt_image, gt_start, gt_end = corners(gt_image, gt_xywh)
    dt_order, dt_image, dt_start, dt_end = corners(dt_image, dt_xywh)
    images = np.intersect1d(gt_image, dt_image)
    cuts = [np.searchsorted(ids, images, side) for ids in (gt_image, dt_image) for side in ("left", "right")]

    def area(xywh):
        side = xywh[:, :2] + xywh[:, 2:] - xywh[:, :2] + 1 if pixel else xywh[:, 2:]
        return side[:, 0] * side[:, 1]
    dt_areas, gt_areas = area(dt_xywh), area(gt_xywh)

    def near(found):
        d, g, shared = (np.concatenate(parts) for parts in zip(*found))
        dt_area, gt_area = dt_areas[d], gt_areas[g]
        union = np.where(crowd[g], dt_area, dt_area + gt_area - shared)
        iou = shared / np.where(union > 0, union, 1)  # areas below 1e-308 are 0
        return tuple(part[iou >= 0.5] for part in (d, g, iou))

    pairs, found, waiting = [], [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))], 0
    blocks = ((g0, g1, d, min(d + max(1, PAIRS // (g1 - g0)), d1)) for g0, g1, d0, d1 in zip(*cuts)
              for d in range(d0, d1, max(1, PAIRS // (g1 - g0))))
    for g0, g1, d0, d1 in blocks:
        width, height = (
            np.minimum(dt_end[axis, d0:d1, None], gt_end[axis, g0:g1])
            - np.maximum(dt_start[axis, d0:d1, None], gt_start[axis, g0:g1])
            + pixel
            for axis in (0, 1)
        )
        d, g = np.nonzero((width > 0) & (height > 0))
        found.append((dt_order[d0 + d], gt_order[g0 + g], width[d, g] * height[d, g]))
        waiting += len(d)
        if waiting > PAIRS:  # few of the pairs that touch are near
            pairs.append(near(found))
            found, waiting = found[:1], 0
    return tuple(np.concatenate(parts) for parts in zip(*pairs, near(found)))


def _coco_match(d, g, iou, rank, ignored, crowd):
    """The face that each detection takes at each of COCO's thresholds, -1 for none: [T, D].

    In order of score, a detection takes the best face still free; any face of the area range goes before the ignored
    ones, the later of two with equal IoU first, and a crowd region is always free. Detections of the same rank
    compete only across images, that is not at all, so each step of the loop serves all images.
    """
    order = np.lexsort((-g, -iou, ignored[g], d, rank[d]))
    d, g, iou = d[order], g[order], iou[order]
    match = np.full((len(IOUS), len(rank)), -1)
    taken = np.zeros((len(IOUS), len(ignored)), bool)
    steps = np.searchsorted(rank[d], np.arange(MAX_DETECTIONS[-1] + 1))
    for start, end in zip(steps[:-1], steps[1:]):
        if start == end:
            continue
        face = g[start:end]
        detection, first = np.unique(d[start:end], return_index=True)
        free = (iou[start:end] >= IOUS[:, None]) & (crowd[face] | ~taken[:, face])
        choice = np.minimum.reduceat(np.where(free, np.arange(end - start), end - start), first, axis=1)
        threshold, which = np.nonzero(choice < end - start)
        chosen = face[choice[threshold, which]]
        match[threshold, detection[which]] = chosen
        taken[threshold, chosen] = True
    return match


def _coco_precision(hit, counted, faces):
    """The envelope of precision at COCO's 101 recalls, -1 without faces: [101]."""
    if not faces:
        return np.full(len(RECALLS), -1.0)
    found, shown = _counts_at_hits(hit, counted)
    precision = np.append(_envelope(found / (shown + np.spacing(1))), 0.0)  # 0 beyond the highest recall
    return precision[np.searchsorted(found / faces, RECALLS)]


def _by_size(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, sizes):
    """VOC matching at IoU 0.5 of detections, best first, with the faces larger than each of `sizes`.

    Returns {size: (the face each detection finds or -1 [D], which count at all [D], the faces asked for [M])}.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, gt_ignored)
    d, g, iou = _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd)
    real = ~crowd[g]
    face = _best_face(d[real], g[real], iou[real], len(dt_image))
    on_crowd = np.zeros(len(dt_image), bool)
    on_crowd[d[~real]] = True
    result = {}
    for size in sizes:
        asked = ~crowd & (gt_xywh[:, 2:].min(1) > size)
        large_and_alone = ~on_crowd & (dt_xywh[:, 2:].min(1) > size)
        counted = np.where(face < 0, large_and_alone, np.append(asked, False)[face])
        result[size] = np.where(_first_on_face(face, asked), face, -1), counted, asked
    return result


def _best_face(d, g, iou, detections):
    """From pairs [P] each, the face of the highest IoU for each detection, the first of equals, -1 for none: [D]."""
    order = np.lexsort((g, -iou, d))
    d, first = np.unique(d[order], return_index=True)
    face = np.full(detections, -1)
    face[d] = g[order][first]
    return face


def _first_on_face(face, asked):
    """Which detections, best first, are the first on a face that is asked for; later ones repeat it: [D]."""
    candidates = np.flatnonzero(np.append(asked, False)[face])
    _, first = np.unique(face[candidates], return_index=True)
    hit = np.zeros(len(face), bool)
    hit[candidates[first]] = True
    return hit


def _counts_at_hits(hit, counted):
    """Faces found and detections shown, up to and with each hit, as floats: [hits] each.

    Between two hits precision only falls, so the envelope has its corners at hits and the rest can be left out.
    """
    shown = np.cumsum(counted)[hit].astype(np.float64)
    return np.arange(1.0, len(shown) + 1), shown


def _envelope(precision):
    """The best precision at this recall or a higher one: [R]."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def _envelope_area(recall, precision):
    """The area under the envelope of a precision-recall curve, over all its points (VOC 2010 and later)."""
    return float(np.sum(np.diff(recall, prepend=0.0) * _envelope(precision)))
