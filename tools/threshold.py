"""Choose the score from which detections are shown, so that a promise about them is kept on other photos too.

A promise is a precision or a recall of at least so much, or at most so many false detections a photo. The
lowest score that keeps it on the photos at hand keeps it only on about half of all others: it was chosen for
them, with their luck. So it has to hold in SURE of the resamples of the photos (the bootstrap, Efron 1979),
each with one mistake more than it has. Without that one, photos that happen to have no mistake would promise
anything, as all their resamples have none either. (Conformal risk control, Angelopoulos et al. 2022, adds it
for the same reason.)
"""

import argparse
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


RESAMPLES, SEED = 1000, 0
SURE = 0.9               # the share of resamples in which the promise has to hold
INTERVAL = 0.025, 0.975  # the quantiles of the resamples that are reported
CELLS = 2 ** 22          # resamples x photos, or x thresholds, computed at once; limits the memory
POINTS = 1000            # of a curve that is written to a file
CURVES = {"precision": "precision", "recall": "recall", "false": "false_per_photo"}  # of ScoreCurve


class Promise(NamedTuple):
    """Precision or recall of at least `value`, or at most `value` false detections a photo ("false")."""
    measure: str
    value: float

    def __str__(self):
        return f"{self.measure}={self.value:g}"


@dataclass
class Outcomes:
    """What D detections on I photos are: faces, false, or neither (on regions to ignore). In any order."""
    image: np.ndarray   # [D] int64, the index of each detection's photo
    score: np.ndarray   # [D] float64
    hit: np.ndarray     # [D] bool: finds a face
    false: np.ndarray   # [D] bool
    faces: np.ndarray   # [I] int64, the faces to be found on each photo


@dataclass
class ScoreCurve:
    """How a detector performs with each threshold, highest first. 0/0 counts as 0."""
    score: np.ndarray            # [T] float64
    precision: np.ndarray        # [T]
    recall: np.ndarray           # [T]
    false_per_photo: np.ndarray  # [T]


def parse_promise(text):
    """Parse `precision=0.95`, `recall=0.9` or `false=0.1` to a Promise, for argparse."""
    measure, _, value = text.partition("=")
    try:
        value = float(value)
    except ValueError:
        value = math.nan
    if not (measure in ("precision", "recall") and 0 < value < 1 or measure == "false" and 0 < value < 1e9):
        raise argparse.ArgumentTypeError(
            f"{text!r}: precision=0.95 or recall=0.9 (between 0 and 1) or false=0.1 (a photo) expected")
    return Promise(measure, value)


def score_curve(outcomes: Outcomes) -> ScoreCurve:
    """Every threshold that makes a difference: the distinct scores of the detections that count."""
    counted = outcomes.hit | outcomes.false
    order = np.argsort(-outcomes.score[counted], kind="stable")
    score = outcomes.score[counted][order]
    ends = np.flatnonzero(np.diff(score, append=-np.inf))  # equal scores are shown together or not at all
    found, false = (np.cumsum(flags[counted][order])[ends] for flags in (outcomes.hit, outcomes.false))
    counts = found, false, outcomes.faces.sum(), len(outcomes.faces)
    return ScoreCurve(score[ends], *(_measure(name, *counts) for name in CURVES))


def thin(curve: ScoreCurve, points: int = POINTS) -> ScoreCurve:
    """Leave about `points` points of a longer curve: even steps of recall, and of log(1 + false detections).

    The first and the last stay.
    """
    if len(curve.score) <= points:
        return curve
    false = np.log1p(curve.false_per_photo / (curve.false_per_photo.max() or 1) * len(curve.score))
    steps = sum(values / values.max() for values in (curve.recall, false) if values.max() > 0)
    kept = np.diff(np.floor(steps * points / 2), prepend=-1) > 0
    kept[-1] = True
    return ScoreCurve(*(values[kept] for values in vars(curve).values()))


def choose(outcomes: Outcomes, promise: Promise) -> tuple[float | None, float | None]:
    """The cheapest thresholds that keep a promise: on these photos alone, and on others too; None: no score.

    Cheapest is the lowest for precision and false detections, and the highest for recall.
    """
    every, photos = score_curve(outcomes), len(outcomes.faces)
    curve = thin(every, POINTS)
    points = len(curve.score)
    first = np.searchsorted(-curve.score, -outcomes.score)  # [D], the highest threshold that shows each
    found, false = (np.bincount((outcomes.image * points + first)[flags], minlength=photos * points)
                    .reshape(photos, points).cumsum(1).astype(np.float64)  # [I, T], at each threshold
                    for flags in (outcomes.hit, outcomes.false))
    share = np.zeros(points)
    for weights in _resamples(photos, points):  # [b, I]
        counts = weights @ found, weights @ false, weights @ outcomes.faces[:, None], photos
        share += _keeps(promise, _measure(promise.measure, *counts, spare=1)).sum(0) / RESAMPLES
    here = _keeps(promise, getattr(curve, CURVES[promise.measure]))
    scores = []
    for kept in (here, here & (share > SURE - 1e-9)):
        if not kept.any():
            scores.append(None)
            continue
        score = curve.score[kept][0 if promise.measure == "recall" else -1]
        scores.append(_round_down(score, every.score[every.score < score].max(initial=-np.inf)))
    return tuple(scores)


def refusal(outcomes: Outcomes, promise: Promise, here: float | None) -> str:
    """Say in one line why `choose` found no score for others."""
    if not outcomes.faces.sum() and promise.measure != "false":
        return f"{promise}: there are no faces to measure it on"
    if here is not None:
        return (f"{promise}: score {here:g} keeps it on these {len(outcomes.faces)} photos, but they are too "
                "few to promise it for others; measure on more, or ask for less")
    curve = score_curve(outcomes)
    values = getattr(curve, CURVES[promise.measure])
    if not len(values):
        return f"{promise}: there are no detections to choose from"
    best = (np.argmin if promise.measure == "false" else np.argmax)(values)
    return (f"{promise}: no score keeps it; the best is {promise.measure}={values[best]:.3g} "
            f"at score {curve.score[best]:.3g}")


def intervals(outcomes: Outcomes, score: float) -> dict[str, tuple[float, float, float]]:
    """Precision, recall and false detections a photo at a threshold: {name: (value, low, high)}.

    From `low` to `high` lie 95 % of the resamples of the photos.
    """
    photos, shown = len(outcomes.faces), outcomes.score >= score
    counts = np.stack([*(np.bincount(outcomes.image[shown & flags], minlength=photos)
                         for flags in (outcomes.hit, outcomes.false)), outcomes.faces])      # [3, I]
    resampled = np.concatenate([weights @ counts.T for weights in _resamples(photos)]).T     # [3, RESAMPLES]
    result = {}
    for name in CURVES:
        value = _measure(name, *counts.sum(1), photos)
        result[name] = (float(value), *np.quantile(_measure(name, *resampled, photos), INTERVAL).tolist())
    return result


def _measure(name, found, false, faces, photos, spare=0):
    """Precision, recall or false detections a photo, of counts, with `spare` mistakes more than counted."""
    if name == "precision":
        return found / np.maximum(found + false + spare, 1)
    if name == "recall":
        return found / np.maximum(faces + spare, 1)
    return (false + spare) / max(photos, 1)


def _keeps(promise, value):
    """Whether a value of its measure keeps a promise."""
    return value <= promise.value if promise.measure == "false" else value >= promise.value


def _resamples(photos, width=1):
    """Yield in blocks `[b, I]` how often each photo is drawn: RESAMPLES draws of I photos with replacement.

    They are the same whatever `width`, the values that the caller computes of each.
    """
    generator, left = np.random.default_rng(SEED), RESAMPLES if photos else 0
    while left:
        block = min(left, max(1, CELLS // max(width, photos)))
        yield generator.multinomial(photos, np.full(photos, 1 / photos), block).astype(np.float64)
        left -= block


def _round_down(score, below):
    """`score` with as few decimals as leave it above `below`, at least 3: easy to write down, same effect."""
    for digits in range(3, 8):
        rounded = math.floor(score * 10 ** digits) / 10 ** digits
        if below < rounded <= score:
            return rounded
    return float(score)
