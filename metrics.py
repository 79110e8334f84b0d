"""Accuracy of a detector: COCO AP and AR, AP by face size, operating points and WIDER FACE AP.

Pure functions over arrays, in float64; nothing is rounded. Each takes the M faces ("gt") and the D detections
("dt") of a whole dataset as flat arrays:

    gt_image `[M]`, dt_image `[D]`       integer image ids
    gt_xywh `[M, 4]`, dt_xywh `[D, 4]`   boxes: x, y, width, height in pixels of the original image
    dt_score `[D]`                       finite

The order of the rows matters only for ties. Equal scores are sorted by image id, then by input order.

How it works: first find the P pairs of a face and a detection of the same image that overlap with IoU 0.5
or more. No protocol here uses a lower threshold. There are few such pairs, so every later step handles all
images at once. A metric over no faces is -1.
"""

from dataclasses import dataclass

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)        # COCO's IoU thresholds
RECALLS = np.linspace(0, 1, 101)         # the recalls at which COCO reads the precision
AREAS = {"": (0, 1e10), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2), "_large": (96 ** 2, 1e10)}
MAX_DETECTIONS = (1, 10, 100)
FACE_SIZES = (0, 30, 60, 100)            # px, as in the reference's table: all faces, > 30, > 60, > 100
PAIRS = 2 ** 20                          # box pairs compared at once; limits the memory on crowded images
MEASURES = ("precision", "recall", "false_per_photo", "f1")  # of a ScoreCurve
WIDER_THRESHOLDS = 1 - np.arange(1, 1001) / 1000


@dataclass
class Curve:
    """A precision-recall curve and its average precision."""
    ap: float
    recall: np.ndarray      # [R]
    precision: np.ndarray   # [R]


@dataclass
class OperatingPoint:
    """How a detector performs if only detections of at least `score` are shown."""
    score: float
    precision: float
    recall: float
    f1: float
    false_per_picture: float
    false_with_faces: float     # a picture that has faces, or regions to ignore; -1 where there is none such
    false_without_faces: float  # a picture that has neither


@dataclass
class Outcomes:
    """What D detections on I photos are: faces, false, or neither (on regions to ignore). In any order."""
    image: np.ndarray   # [D] int64, the index of each detection's photo
    score: np.ndarray   # [D] float64
    hit: np.ndarray     # [D] bool: finds a face
    false: np.ndarray   # [D] bool
    faces: np.ndarray   # [I] int64, the faces to be found on each photo
    empty: np.ndarray   # [I] bool: the photo has neither faces nor regions to ignore


@dataclass
class ScoreCurve:
    """How a detector performs with each threshold, highest first. 0/0 counts as 0."""
    score: np.ndarray            # [T] float64
    precision: np.ndarray        # [T]
    recall: np.ndarray           # [T]
    false_per_photo: np.ndarray  # [T]
    f1: np.ndarray               # [T]


def coco_ap(gt_image: np.ndarray, gt_xywh: np.ndarray, gt_ignored: np.ndarray, gt_area: np.ndarray,
            dt_image: np.ndarray, dt_xywh: np.ndarray, dt_score: np.ndarray) -> tuple[dict, dict]:
    """Compute the 12 COCO numbers of one class, as pycocotools does (Lin et al. 2014; COCOeval.py, bbox).

    gt_ignored `[M]` marks crowd regions; gt_area `[M]` is the annotated area in pixels. Returns two dicts:
    the numbers by name (AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large),
    and the curves at IoU 0.5 and 0.75, {0.5: Curve, 0.75: Curve}.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, gt_ignored)
    gt_area = np.asarray(gt_area, np.float64)
    rank, dt_image, dt_xywh = _best_hundred(dt_image, dt_xywh, dt_score)
    dt_area = dt_xywh[:, 2] * dt_xywh[:, 3]
    pairs = _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd)

    precision, recall = {}, {}
    for name, (low, high) in AREAS.items():
        ignored = crowd | (gt_area < low) | (gt_area > high)
        outside = (dt_area < low) | (dt_area > high)
        hit, counted = _coco_hits(pairs, rank, ignored, crowd, outside)
        faces = np.count_nonzero(~ignored)
        precision[name] = np.array([_coco_precision(h, c, faces) for h, c in zip(hit, counted)])  # [10, 101]
        recall[name] = {n: hit[:, rank < n].sum(1) / faces if faces else -np.ones(len(IOUS))
                        for n in MAX_DETECTIONS}

    curves = {iou: Curve(float(at.mean()), RECALLS, at)
              for iou, at in zip((0.5, 0.75), precision[""][[0, 5]])}
    numbers = {"AP": precision[""].mean(), "AP50": curves[0.5].ap, "AP75": curves[0.75].ap}
    numbers |= {f"AP{name}": precision[name].mean() for name in AREAS if name}
    numbers |= {f"AR{n}": recall[""][n].mean() for n in MAX_DETECTIONS}
    numbers |= {f"AR{name}": recall[name][MAX_DETECTIONS[-1]].mean() for name in AREAS if name}
    return {name: float(number) for name, number in numbers.items()}, curves


def coco_matches(gt_image: np.ndarray, gt_xywh: np.ndarray, gt_ignored: np.ndarray, dt_image: np.ndarray,
                 dt_xywh: np.ndarray, dt_score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match detections to faces of all sizes as in `coco_ap`, for who computes its AP on resampled images.

    Returns, for the 100 best detections of each image, best first: their image `[D]`, which find a face
    `[10, D]` and which count at all `[10, D]`, a row for each IoU threshold.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, gt_ignored)
    rank, dt_image, dt_xywh = _best_hundred(dt_image, dt_xywh, dt_score)
    pairs = _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd)
    return dt_image, *_coco_hits(pairs, rank, crowd, crowd, np.zeros(len(rank), bool))


def size_ap(gt_image: np.ndarray, gt_xywh: np.ndarray, gt_ignored: np.ndarray, dt_image: np.ndarray,
            dt_xywh: np.ndarray, dt_score: np.ndarray, sizes: tuple = FACE_SIZES) -> dict[int, float]:
    """Compute VOC AP at IoU 0.5 over the faces larger than each of `sizes`: {size: AP}.

    The size of a box is its shorter side, in pixels. AP is the area under the precision envelope, over all
    points, as in the reference's accuracy table. Smaller faces and crowd regions are ignored: they count
    neither as found nor as missed. Detections matched to them do not count either, nor do unmatched
    detections that are not larger than `size`.
    """
    _, dt_image, dt_xywh, _ = _best_first(dt_image, dt_xywh, dt_score)
    result = {}
    for size, (face, counted, asked) in _by_size(gt_image, gt_xywh, gt_ignored,
                                                 dt_image, dt_xywh, sizes).items():
        faces = np.count_nonzero(asked)
        found, shown = _counts_at_hits(face >= 0, counted)
        result[size] = _envelope_area(found / faces, found / shown) if faces else -1.0
    return result


def match_faces(gt_image: np.ndarray, gt_xywh: np.ndarray, gt_ignored: np.ndarray, dt_image: np.ndarray,
                dt_xywh: np.ndarray, dt_score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match detections to faces as in `size_ap`, at IoU 0.5 and for all sizes. Three arrays, in input order:

    - face `[D]` int64: the index of the face that a detection finds, -1 if it finds none;
    - false `[D]` bool: the false detections (those on regions to ignore are not);
    - asked `[M]` bool: the faces that are to be found.

    A score threshold changes nothing of this for the detections that it leaves.
    """
    order, dt_image, dt_xywh, _ = _best_first(dt_image, dt_xywh, dt_score)
    found, counted, asked = _by_size(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, (0,))[0]
    face, false = np.empty(len(order), np.int64), np.empty(len(order), bool)
    face[order], false[order] = found, counted & (found < 0)
    return face, false, asked


def outcomes(gt_image: np.ndarray, gt_xywh: np.ndarray, gt_ignored: np.ndarray, dt_image: np.ndarray,
             dt_xywh: np.ndarray, dt_score: np.ndarray, photos: int) -> Outcomes:
    """Match detections to faces as `match_faces` does. Here images are indices below `photos`."""
    face, false, asked = match_faces(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score)
    gt_image = np.asarray(gt_image, np.int64)
    return Outcomes(np.asarray(dt_image, np.int64), np.asarray(dt_score, np.float64), face >= 0, false,
                    np.bincount(gt_image[asked], minlength=photos),
                    np.bincount(gt_image, minlength=photos) == 0)


def operating_points(found: Outcomes, scores: tuple = (0.3, 0.5, 0.7)) -> list[OperatingPoint]:
    """How a detector performs at IoU 0.5 if only detections of at least each of `scores` are shown.

    One more point follows: the threshold with the best F1 (1 if there are no detections). 0/0 counts as 0.
    """
    def point(score):
        shown = found.score >= score
        hits = np.count_nonzero(found.hit & shown)
        false = np.count_nonzero(found.false & shown)
        on_empty = np.count_nonzero(found.false & shown & found.empty[found.image])
        counts = hits, false, found.faces.sum(), len(found.faces)
        precision, recall, false_per_photo, f1 = (float(measure(name, *counts)) for name in MEASURES)
        return OperatingPoint(float(score), precision, recall, f1, false_per_photo,
                              (false - on_empty) / full if full else -1.0,
                              on_empty / empty if empty else -1.0)

    empty = np.count_nonzero(found.empty)
    full = len(found.empty) - empty
    curve = score_curve(found)
    best = curve.score[np.argmax(curve.f1)] if len(curve.score) else 1.0
    return [point(score) for score in (*scores, best)]


def score_curve(found: Outcomes) -> ScoreCurve:
    """Every threshold that makes a difference: the distinct scores of the detections that count."""
    counted = np.flatnonzero(found.hit | found.false)
    order = counted[np.argsort(-found.score[counted], kind="stable")]
    score = found.score[order]
    ends = np.flatnonzero(np.diff(score, append=-np.inf))  # equal scores are shown or hidden as one
    hits = np.cumsum(found.hit[order])[ends]
    false = np.cumsum(found.false[order])[ends]
    counts = hits, false, found.faces.sum(), len(found.faces)
    return ScoreCurve(score[ends], *(measure(name, *counts) for name in MEASURES))


def measure(name, found, false, faces, photos, spare=0):
    """One of MEASURES, of counts, with `spare` mistakes more than counted."""
    if name == "precision":
        return found / np.maximum(found + false + spare, 1)
    if name == "recall":
        return found / np.maximum(faces + spare, 1)
    if name == "f1":
        return 2 * found / np.maximum(found + false + faces + spare, 1)
    return (false + spare) / max(photos, 1)


def wider_ap(gt_image: np.ndarray, gt_xywh: np.ndarray, kept: dict, dt_image: np.ndarray,
             dt_xywh: np.ndarray, dt_score: np.ndarray) -> dict[str, Curve]:
    """Compute WIDER FACE AP as the official code does (Yang et al. 2016): {level: Curve}.

    A curve has 1,000 points, one per score threshold. kept {level: `[M]` bool} marks the faces of each level.
    All other faces are ignored, and so are the detections on them. Images without any annotated box, of
    whatever level, are left out with all their detections. In the other images every false detection counts.
    """
    gt_image, gt_xywh, crowd = _faces(gt_image, gt_xywh, np.zeros(len(gt_image)))
    _, dt_image, dt_xywh, dt_score = _best_first(dt_image, dt_xywh, dt_score)
    lowest, highest = dt_score.min(initial=1), dt_score.max(initial=0)
    score = (dt_score - lowest) / (highest - lowest) if highest > lowest else np.ones(len(dt_score))
    face = _best_face(*_overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd, pixel=1), len(score))
    annotated = np.isin(dt_image, gt_image)

    curves = {}
    for level, asked in kept.items():
        asked = np.asarray(asked, bool)
        hit = _first_on_face(face, asked)
        counted = annotated & ((face < 0) | np.append(asked, False)[face])
        found, shown = (np.searchsorted(-score[flags], -WIDER_THRESHOLDS, side="right")
                        for flags in (hit, counted))
        faces = np.count_nonzero(asked)
        recall, precision = found / max(faces, 1), found / np.maximum(shown, 1)
        curves[level] = Curve(_envelope_area(recall, precision) if faces else -1.0, recall, precision)
    return curves


def _faces(image, xywh, ignored):
    """Convert faces given as any sequences to arrays: int64 `[M]`, float64 `[M, 4]`, bool `[M]`."""
    return np.asarray(image, np.int64), np.asarray(xywh, np.float64).reshape(-1, 4), np.asarray(ignored, bool)


def _best_first(image, xywh, score):
    """Sort detections by score, best first; equal scores by image id, then by input order.

    Returns the order `[D]`, and image `[D]`, xywh `[D, 4]` and score `[D]` in that order.
    """
    image, score = np.asarray(image, np.int64), np.asarray(score, np.float64)
    order = np.lexsort((image, -score))  # a stable sort
    return order, image[order], np.asarray(xywh, np.float64).reshape(-1, 4)[order], score[order]


def _rank_in_image(dt_image):
    """Rank each detection within its own image, 0 for the best: `[D]`. The input is sorted, best first."""
    order = np.argsort(dt_image, kind="stable")
    first = np.searchsorted(dt_image[order], dt_image[order])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first
    return rank


def _best_hundred(image, xywh, score):
    """The 100 best detections of each image, best first: their rank `[D]`, image `[D]` and xywh `[D, 4]`."""
    _, image, xywh, _ = _best_first(image, xywh, score)
    rank = _rank_in_image(image)
    kept = rank < MAX_DETECTIONS[-1]
    return rank[kept], image[kept], xywh[kept]


def _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd, pixel=0):
    """Find all pairs of a detection and a face of the same image with IoU >= 0.5.

    Returns three arrays `[P]`: detection indices, face indices, IoU. For a crowd region the union is the area
    of the detection alone (COCO). `pixel=1` makes boxes pixel-inclusive, one pixel wider and higher (WIDER).
    The arithmetic has the same order of operations as pycocotools and the official WIDER code, so that the
    results are equal to the last bit.
    """
    gt_order, gt_image, gt_start, gt_end = _sorted_corners(gt_image, gt_xywh)
    dt_order, dt_image, dt_start, dt_end = _sorted_corners(dt_image, dt_xywh)
    gt_areas = _areas(gt_xywh, pixel)
    dt_areas = _areas(dt_xywh, pixel)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for g0, g1, d0, d1 in _blocks(gt_image, dt_image):
        start = np.maximum(dt_start[:, d0:d1, None], gt_start[:, None, g0:g1])
        width, height = np.minimum(dt_end[:, d0:d1, None], gt_end[:, None, g0:g1]) - start + pixel
        d, g = np.nonzero((width > 0) & (height > 0))
        shared = width[d, g] * height[d, g]
        d, g = dt_order[d0 + d], gt_order[g0 + g]
        union = np.where(crowd[g], dt_areas[d], dt_areas[d] + gt_areas[g] - shared)
        iou = shared / np.where(union > 0, union, 1)  # the union of tiny boxes can underflow to 0
        near = iou >= 0.5
        found.append((d[near], g[near], iou[near]))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def _blocks(gt_image, dt_image):
    """Yield (g0, g1, d0, d1), faces g0 to g1 and detections d0 to d1 of one image, at most about PAIRS pairs.

    Both arrays of image ids are sorted.
    """
    for image in np.intersect1d(gt_image, dt_image):
        g0, g1 = np.searchsorted(gt_image, (image, image + 1))
        first, last = np.searchsorted(dt_image, (image, image + 1))
        step = max(1, PAIRS // (g1 - g0))
        for d0 in range(first, last, step):
            yield g0, g1, d0, min(d0 + step, last)


def _sorted_corners(image, xywh):
    """Sort boxes by image: order `[N]`, image `[N]`, upper left and lower right corners `[2, N]` each."""
    order = np.argsort(image, kind="stable")
    start = xywh[order, :2].T
    return order, image[order], start, start + xywh[order, 2:].T


def _areas(xywh, pixel):
    """The areas `[N]` of boxes, or of pixel-inclusive ones as the official WIDER code computes them."""
    side = xywh[:, :2] + xywh[:, 2:] - xywh[:, :2] + 1 if pixel else xywh[:, 2:]
    return side[:, 0] * side[:, 1]


def _coco_match(d, g, iou, rank, ignored, crowd):
    """Match detections to faces as COCO does: the index of each detection's face `[10, D]`, -1 for none.

    There is one row for each of the 10 IoU thresholds. d, g, iou `[P]` are the pairs from `_overlaps`, rank
    `[D]` is from `_rank_in_image`. The rules, within one image:
    - Detections choose in order of score. Each takes the free face with the highest IoU, if that reaches the
      threshold.
    - Faces that count come first. An ignored face is taken only if no other face is free.
    - Of two faces with equal IoU, the later one in the file is taken.
    - A face can be taken once, but a crowd region any number of times.

    The loop runs over the rank within the image: first the best detection of every image, then every second
    best, and so on. Detections of one step lie on different images, so none can take a face from another.
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


def _coco_hits(pairs, rank, ignored, crowd, outside):
    """Which detections find a face, and which count at all, at each IoU threshold: bool `[10, D]` each.

    outside `[D]` marks detections that do not count where they find nothing.
    """
    match = _coco_match(*pairs, rank, ignored, crowd)
    dropped = np.where(match < 0, outside, np.append(ignored, False)[match])
    return (match >= 0) & ~dropped, ~dropped


def _coco_precision(hit, counted, faces):
    """Read the precision envelope at COCO's 101 recalls: `[101]`, all -1 if there are no faces.

    hit `[D]` marks detections that find a face, counted `[D]` those that count at all; best first.
    """
    if not faces:
        return np.full(len(RECALLS), -1.0)
    found, shown = _counts_at_hits(hit, counted)
    precision = np.append(_envelope(found / (shown + np.spacing(1))), 0.0)  # 0 above the highest recall
    return precision[np.searchsorted(found / faces, RECALLS)]


def _by_size(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, sizes):
    """Match detections, best first, to faces as VOC does at IoU 0.5, for each of `sizes`.

    Returns {size: (face, counted, asked)}:
    - face `[D]`: the index of the face that a detection finds, -1 if it finds none;
    - counted `[D]`: whether the detection counts at all, as true or false;
    - asked `[M]`: whether the face is to be found: no crowd region, and larger than `size`.
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
    """Choose for each detection the face with the highest IoU: `[D]`, -1 if it overlaps with none.

    d, g, iou `[P]` are the pairs from `_overlaps`. Of two faces with equal IoU, the first is chosen.
    """
    order = np.lexsort((g, -iou, d))
    d, first = np.unique(d[order], return_index=True)
    face = np.full(detections, -1)
    face[d] = g[order][first]
    return face


def _first_on_face(face, asked):
    """Mark the detections that find a face: `[D]`, for detections sorted best first.

    face `[D]` is from `_best_face`, asked `[M]` marks the faces to be found. If several detections have the
    same face, only the best of them finds it; the others are repetitions.
    """
    candidates = np.flatnonzero(np.append(asked, False)[face])
    _, first = np.unique(face[candidates], return_index=True)
    hit = np.zeros(len(face), bool)
    hit[candidates[first]] = True
    return hit


def _counts_at_hits(hit, counted):
    """Count the faces found and the detections shown, up to and including each hit: float64 `[hits]` each.

    Only hits matter for the precision envelope: between two hits the precision can only fall.
    """
    shown = np.cumsum(counted)[hit].astype(np.float64)
    return np.arange(1.0, len(shown) + 1), shown


def _envelope(precision):
    """The precision envelope `[R]`: at each recall, the best precision at this recall or a higher one."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def _envelope_area(recall, precision):
    """The area under the precision envelope, over all points of the curve (the AP of VOC 2010 and later)."""
    return float(np.sum(np.diff(recall, prepend=0.0) * _envelope(precision)))
