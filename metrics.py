"""Accuracy of a detector: COCO AP and AR, AP by face size, operating points and WIDER FACE AP.

Pure functions over arrays, in float64; nothing is rounded. Each takes the M faces ("gt") and the D detections
("dt") of a whole dataset as flat arrays:

    gt_image `[M]`, dt_image `[D]`       integer image ids
    gt_xywh `[M, 4]`, dt_xywh `[D, 4]`   boxes: x, y, width, height in pixels of the original image
    dt_score `[D]`                       finite

Equal scores are sorted by image id, then by input order. Only pairs of a face and a detection with IoU 0.5 or
more matter; they are few, so each step handles all images at once. A metric over no faces is -1.
"""

from dataclasses import dataclass

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)        # COCO's IoU thresholds
RECALLS = np.linspace(0, 1, 101)         # the recalls at which COCO reads the precision
AREAS = {"": (0, 1e10), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2), "_large": (96 ** 2, 1e10)}
MAX_DETECTIONS = (1, 10, 100)
FACE_SIZES = (0, 30, 60, 100)            # px, as in the reference's table: all faces, > 30, > 60, > 100
PAIRS = 2 ** 20                          # box pairs compared at once; limits the memory on crowded images
WIDER_THRESHOLDS = 1 - np.arange(1, 1001) / 1000


@dataclass
class Outcomes:
    """What D detections on I photos with M faces are: faces, false, or neither (on regions to ignore)."""
    image: np.ndarray   # [D] int64, the index of each detection's photo
    score: np.ndarray   # [D] float64
    face: np.ndarray    # [D] int64, the index of the face that it finds, -1 for none
    false: np.ndarray   # [D] bool
    asked: np.ndarray   # [M] bool: the face is to be found
    faces: np.ndarray   # [I] int64, the faces to be found on each photo

    @property
    def hit(self):
        """Which detections find a face: bool `[D]`."""
        return self.face >= 0


def coco_ap(gt_image, gt_xywh, gt_ignored, gt_area, dt_image, dt_xywh, dt_score) -> dict[str, float]:
    """Compute the 12 COCO numbers of one class, as pycocotools does (Lin et al. 2014; COCOeval.py, bbox).

    gt_ignored `[M]` marks crowd regions; gt_area `[M]` is the annotated area in pixels."""
    gt_area = np.asarray(gt_area, np.float64)
    crowd, rank, _, dt_xywh, pairs = _coco_pairs(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score)
    dt_area = dt_xywh[:, 2] * dt_xywh[:, 3]

    precision, recall = {}, {}
    for name, (low, high) in AREAS.items():
        ignored = crowd | (gt_area < low) | (gt_area > high)
        outside = (dt_area < low) | (dt_area > high)
        hit, counted = _coco_hits(pairs, rank, ignored, crowd, outside)
        faces = np.count_nonzero(~ignored)
        precision[name] = np.array([coco_precision(h, c, faces) for h, c in zip(hit, counted)])  # [10, 101]
        recall[name] = {n: hit[:, rank < n].sum(1) / faces if faces else -np.ones(len(IOUS))
                        for n in MAX_DETECTIONS}

    every = precision[""]
    numbers = {"AP": every.mean(), "AP50": every[0].mean(), "AP75": every[5].mean()}
    numbers |= {f"AP{name}": precision[name].mean() for name in AREAS if name}
    numbers |= {f"AR{n}": recall[""][n].mean() for n in MAX_DETECTIONS}
    numbers |= {f"AR{name}": recall[name][MAX_DETECTIONS[-1]].mean() for name in AREAS if name}
    return {name: float(number) for name, number in numbers.items()}


def coco_matches(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score) -> tuple:
    """Match detections to faces of all sizes as in `coco_ap`, for AP on resampled images.

    Returns, for the 100 best detections of each image, best first: their image `[D]`, and at each IoU
    threshold which find a face `[10, D]` and which count at all `[10, D]`."""
    crowd, rank, image, _, pairs = _coco_pairs(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score)
    return image, *_coco_hits(pairs, rank, crowd, crowd, np.zeros(len(rank), bool))


def coco_precision(hit, counted, faces: float, weights=1.0) -> np.ndarray:
    """Read the precision envelope at COCO's 101 recalls: `[101]`, all -1 if there are no faces.

    hit `[D]` marks detections that find a face, counted `[D]` those that count at all, best first; each is
    there `weights` `[D]` times."""
    if not faces:
        return np.full(len(RECALLS), -1.0)
    # Only hits matter for the envelope: between two of them the precision can only fall.
    found, shown = (np.cumsum(flags * weights)[hit] for flags in (hit, counted))
    precision = np.append(_envelope(found / (shown + np.spacing(1))), 0.0)  # 0 above the highest recall
    return precision[np.searchsorted(found / faces, RECALLS)]


def size_ap(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score, sizes=FACE_SIZES) -> dict[int, float]:
    """Compute VOC AP at IoU 0.5 over faces larger than each of `sizes`, as the reference's table: {size: AP}.

    The size of a box is its shorter side, in pixels. Smaller faces and crowd regions count neither as found
    nor as missed, nor do detections matched to them, nor unmatched ones that are not larger than `size`."""
    _, by_size = _by_size(sizes, gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score)
    result = {}
    for size, (face, counted, asked) in by_size.items():
        faces = np.count_nonzero(asked)
        hit = face >= 0
        found, shown = np.cumsum(hit)[hit], np.cumsum(counted)[hit]
        result[size] = _envelope_area(found / faces, found / shown) if faces else -1.0
    return result


def outcomes(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score, photos: int) -> Outcomes:
    """Match detections to faces as in `size_ap`, at IoU 0.5 and for all sizes, whatever score is shown.

    Here images are indices below `photos`. The Outcomes are in input order."""
    order, by_size = _by_size((0,), gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score)
    found, counted, asked = by_size[0]
    face, false = np.empty(len(order), np.int64), np.empty(len(order), bool)
    face[order], false[order] = found, counted & (found < 0)
    return Outcomes(np.asarray(dt_image, np.int64), np.asarray(dt_score, np.float64), face, false, asked,
                    np.bincount(np.asarray(gt_image, np.int64)[asked], minlength=photos))


def rates(found, false, faces, photos: int, spare: int = 0) -> dict:
    """Precision, recall, false detections a picture and F1 of counts and `spare` mistakes more. 0/0 is 0."""
    return {"precision": found / np.maximum(found + false + spare, 1),
            "recall": found / np.maximum(faces + spare, 1),
            "false_per_picture": (false + spare) / max(photos, 1),
            "f1": 2 * found / np.maximum(found + false + faces + spare, 1)}


def score_curve(found: Outcomes, scores: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The `rates` at IoU 0.5 if only detections of at least each of `scores` `[T]` are shown: arrays `[T]`.

    Without `scores` it is each that makes a difference, highest first. They are returned as "score"."""
    if scores is None:
        scores = np.unique(found.score[found.hit | found.false])[::-1]
    hits, false = (np.searchsorted(np.sort(-found.score[flags]), -scores, side="right")
                   for flags in (found.hit, found.false))
    return {"score": scores, **rates(hits, false, found.faces.sum(), len(found.faces))}


def operating_points(found: Outcomes, scores: tuple = (0.3, 0.5, 0.7)) -> list[dict[str, float]]:
    """The points of `score_curve` at `scores`, and at the score with the best F1 (1 without detections)."""
    curve = score_curve(found)
    best = curve["score"][np.argmax(curve["f1"])] if len(curve["score"]) else 1
    points = score_curve(found, np.array([*scores, best]))
    return [dict(zip(points, map(float, point))) for point in zip(*points.values())]


def wider_ap(gt_image, gt_xywh, kept: dict, dt_image, dt_xywh, dt_score) -> dict[str, float]:
    """Compute WIDER FACE AP as the official code does, at 1,000 thresholds (Yang et al. 2016): {level: AP}.

    kept {level: `[M]` bool} marks the faces of each level. All other faces are ignored, and so are the
    detections on them, and images without any annotated box."""
    gt_image, gt_xywh, none, _, dt_image, dt_xywh, dt_score = _sorted(
        gt_image, gt_xywh, np.zeros(len(gt_image)), dt_image, dt_xywh, dt_score)
    lowest, highest = dt_score.min(initial=1), dt_score.max(initial=0)
    score = (dt_score - lowest) / (highest - lowest) if highest > lowest else np.ones(len(dt_score))
    face = _best_face(*_overlaps(gt_image, gt_xywh, dt_image, dt_xywh, none, pixel=1), len(score))
    annotated = np.isin(dt_image, gt_image)

    result = {}
    for level, asked in kept.items():
        asked = np.asarray(asked, bool)
        hit = _first_on_face(face, asked)
        counted = annotated & ((face < 0) | np.append(asked, False)[face])
        found, shown = (np.searchsorted(-score[flags], -WIDER_THRESHOLDS, side="right")
                        for flags in (hit, counted))
        faces = np.count_nonzero(asked)
        result[level] = _envelope_area(found / faces, found / np.maximum(shown, 1)) if faces else -1.0
    return result


def _sorted(gt_image, gt_xywh, gt_ignored, dt_image, dt_xywh, dt_score):
    """Faces, and detections in order (by score; equal ones by image id, then input order), as arrays.

    Returns the three of the faces, the order, and the three of the detections in it."""
    dt_image, dt_score = np.asarray(dt_image, np.int64), np.asarray(dt_score, np.float64)
    gt_xywh, dt_xywh = (np.asarray(xywh, np.float64).reshape(-1, 4) for xywh in (gt_xywh, dt_xywh))
    order = np.lexsort((dt_image, -dt_score))  # a stable sort
    return (np.asarray(gt_image, np.int64), gt_xywh, np.asarray(gt_ignored, bool),
            order, dt_image[order], dt_xywh[order], dt_score[order])


def _by_image(image):
    """The rows of each image, in their order: {id: indices}."""
    order = np.argsort(image, kind="stable")
    ids, first = np.unique(image[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, first[1:])))


def _coco_pairs(*faces_and_detections):
    """Crowd `[M]`; rank, image, xywh of each image's 100 best detections, best first; their `_overlaps`."""
    gt_image, gt_xywh, crowd, _, dt_image, dt_xywh, _ = _sorted(*faces_and_detections)
    rank = np.empty(len(dt_image), np.int64)
    for own in _by_image(dt_image).values():
        rank[own] = np.arange(len(own))
    kept = rank < MAX_DETECTIONS[-1]
    rank, dt_image, dt_xywh = rank[kept], dt_image[kept], dt_xywh[kept]
    return crowd, rank, dt_image, dt_xywh, _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd)


def _overlaps(gt_image, gt_xywh, dt_image, dt_xywh, crowd, pixel=0):
    """Find all pairs of a detection and a face of the same image with IoU >= 0.5: their indices, IoU; `[P]`.

    For a crowd region the union is the area of the detection alone (COCO). `pixel=1` makes boxes one pixel
    wider and higher (WIDER). The order of operations is that of pycocotools and the official WIDER code, so
    that the results are equal to the last bit."""
    gt_start, gt_end, gt_areas = _corners(gt_xywh, pixel)
    dt_start, dt_end, dt_areas = _corners(dt_xywh, pixel)
    faces, detections = _by_image(gt_image), _by_image(dt_image)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for image in faces.keys() & detections.keys():
        of_image, some = faces[image], detections[image]
        for own in np.array_split(some, 1 + len(of_image) * len(some) // PAIRS):
            start = np.maximum(dt_start[:, own, None], gt_start[:, None, of_image])
            width, height = np.minimum(dt_end[:, own, None], gt_end[:, None, of_image]) - start + pixel
            d, g = np.nonzero((width > 0) & (height > 0))
            shared = width[d, g] * height[d, g]
            d, g = own[d], of_image[g]
            union = np.where(crowd[g], dt_areas[d], dt_areas[d] + gt_areas[g] - shared)
            iou = shared / np.where(union > 0, union, 1)  # the union of tiny boxes can underflow to 0
            near = iou >= 0.5
            found.append((d[near], g[near], iou[near]))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def _corners(xywh, pixel):
    """Upper left and lower right corners `[2, N]` of boxes, and their areas `[N]`."""
    start = xywh[:, :2].T
    end = start + xywh[:, 2:].T
    width, height = end - start + 1 if pixel else xywh[:, 2:].T
    return start, end, width * height


def _coco_hits(pairs, rank, ignored, crowd, outside):
    """Which detections find a face, and which count at all, at each IoU threshold: bool `[10, D]` each.

    outside `[D]` marks detections that do not count where they find nothing. Within one image detections
    choose in order of score. Each takes the free face with the highest IoU, if that reaches the threshold; of
    equal ones the later in the file; an ignored face only if no other is free. A face can be taken once, a
    crowd region any number of times. A step of the loop are the detections of one rank: they lie on different
    images, so none can take a face from another."""
    d, g, iou = pairs
    order = np.lexsort((-g, -iou, ignored[g], d, rank[d]))
    d, g, iou = d[order], g[order], iou[order]
    match = np.full((len(IOUS), len(rank)), -1)
    taken = np.zeros((len(IOUS), len(ignored)), bool)
    steps = np.unique(rank[d], return_index=True)[1]
    for start, end in zip(steps, [*steps[1:], len(d)]):
        face = g[start:end]
        detection, first = np.unique(d[start:end], return_index=True)
        free = (iou[start:end] >= IOUS[:, None]) & (crowd[face] | ~taken[:, face])
        choice = np.minimum.reduceat(np.where(free, np.arange(end - start), end - start), first, axis=1)
        threshold, which = np.nonzero(choice < end - start)
        chosen = face[choice[threshold, which]]
        match[threshold, detection[which]] = chosen
        taken[threshold, chosen] = True
    dropped = np.where(match < 0, outside, np.append(ignored, False)[match])
    return (match >= 0) & ~dropped, ~dropped


def _by_size(sizes, *faces_and_detections):
    """Match detections to faces as VOC does at IoU 0.5, for each of `sizes`.

    Returns the order of the detections, best first, and {size: (face, counted, asked)}: the face that each
    finds, -1 for none, `[D]`; whether it counts, `[D]`; which faces are to be found, `[M]`."""
    gt_image, gt_xywh, crowd, order, dt_image, dt_xywh, _ = _sorted(*faces_and_detections)
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
    return order, result


def _best_face(d, g, iou, detections):
    """The face with the highest IoU for each detection: `[D]`, -1 for none; of equal ones the first."""
    order = np.lexsort((g, -iou, d))
    d, first = np.unique(d[order], return_index=True)
    face = np.full(detections, -1)
    face[d] = g[order][first]
    return face


def _first_on_face(face, asked):
    """Which detections, best first, find a face: `[D]`. Each `face` `[D]` that is `asked` for `[M]`, once."""
    candidates = np.flatnonzero(np.append(asked, False)[face])
    _, first = np.unique(face[candidates], return_index=True)
    hit = np.zeros(len(face), bool)
    hit[candidates[first]] = True
    return hit


def _envelope(precision):
    """The precision envelope `[R]`: at each recall, the best precision at this recall or a higher one."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def _envelope_area(recall, precision):
    """The area under the precision envelope, over all points of the curve (the AP of VOC 2010 and later)."""
    return float(np.sum(np.diff(recall, prepend=0.0) * _envelope(precision)))
