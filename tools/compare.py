"""Is one model better than another, or is it luck? Two models on the same photos, with standard errors.

    python -m tools.compare val.json a.json b.json        # detections that evaluate.py --out has written
    python -m tools.compare val.json weights/face_ssd300.pth runs/face/best.pth --false 0.1

AP and AP50 are COCO's. Recall is at IoU 0.5 and the score, each model's own, from which there are `--false`
false detections a photo; also by size of face at the network's input, and by blur, occlusion and event (the
photo's folder) where the json has them. What fits an `iscrowd` box does not count. The standard error is
that of a paired bootstrap over photos (Efron 1979): a difference below two of them may be luck.
"""

from itertools import pairwise
from pathlib import PurePosixPath

from support.script import command, Parser, require

import numpy as np

from evaluate import read_detections
from metrics import coco_matches, coco_precision, outcomes
from support.coco import Annotations, Detections, arrays, face_entries, read_annotations

INPUT = 300                                   # px, the sides of the network's input that sizes refer to
SIZES = (6, 8, 10, 12, 15, 20, 30, 60)        # px there: the square root of a face's area
RESAMPLES, SEED = 300, 0
LEAST = 10                                    # faces of a group that is shown, on two photos at least


class Matched:
    """A model's detections on some photos, matched once; `measure` then takes any weights of the photos."""

    def __init__(self, annotations: Annotations, detections: Detections):
        self.image, self.hit, self.counted = coco_matches(*arrays(annotations, detections))
        found = outcomes(*arrays(annotations, detections), len(annotations.ids))
        self.asked, self.face_image = found.asked, annotations.image
        self.face_score = np.full(len(annotations.image), -np.inf)  # of the detection that finds it
        self.face_score[found.face[found.hit]] = found.score[found.hit]
        order = np.flatnonzero(found.false)[np.argsort(-found.score[found.false], kind="stable")]
        self.false_image, self.false_score = found.image[order], found.score[order]

    def measure(self, weights: np.ndarray, groups: np.ndarray, rate: float) -> np.ndarray:
        """AP, AP50 and the recall of each group of faces at `rate` false detections a photo: `[2 + G]`.

        weights `[I]` is how often each photo counts, groups `[G, M]` bool. NaN where there are no faces."""
        faces = weights[self.face_image] * self.asked
        if not faces.any():
            return np.full(2 + len(groups), np.nan)
        ap = [coco_precision(hit, counted, faces.sum(), weights[self.image]).mean()
              for hit, counted in zip(self.hit, self.counted)]
        too_many = np.cumsum(weights[self.false_image]) > rate * weights.sum()
        threshold = self.false_score[too_many.argmax()] if too_many.any() else -np.inf
        with np.errstate(invalid="ignore"):
            recall = groups @ (faces * (self.face_score > threshold)) / (groups @ faces)
        return np.array([np.mean(ap), ap[0], *recall])


def face_groups(annotations: Annotations) -> dict[str, np.ndarray]:
    """The groups of faces that recall is measured on: {name: bool `[M]`}."""
    sizes = annotations.sizes[annotations.image]
    require((sizes > 0).all(), f"{annotations.path}: its images need width and height, for sizes of faces")
    side = np.sqrt((annotations.xywh[:, 2:] * INPUT / sizes).clip(min=0).prod(1))
    groups = {"all faces": np.ones(len(side), bool)}
    groups |= {f"{low}-{high} px": (side >= low) & (side < high) for low, high in pairwise(SIZES)}
    groups[f"> {SIZES[-1]} px"] = side >= SIZES[-1]
    _, entries = face_entries(annotations)
    for key in ("blur", "occlusion"):
        values = np.array([own if isinstance(own := entry.get(key), int | float) else 0 for entry in entries])
        if values.any():  # flags of 0 may be left out
            groups |= {f"{key} {value}": values == value for value in np.unique(values)}
    events = np.array([PurePosixPath(name).parent.name for name in annotations.names])[annotations.image]
    if len(set(events)) > 1:
        groups |= {event: events == event for event in np.unique(events)}
    counted = {name: annotations.image[own & ~annotations.ignored] for name, own in groups.items()}
    return {name: groups[name] for name, image in counted.items()
            if name == "all faces" or len(image) >= LEAST and len(set(image)) > 1}  # one photo tells no error


def compare(one: Matched, other: Matched, groups: dict, rate: float, photos: int) -> np.ndarray:
    """Measure two models: `[2 + G, 4]`, of each row one, other, the difference and its standard error."""
    masks = np.stack(list(groups.values())).astype(float)
    values = np.stack([model.measure(np.ones(photos), masks, rate) for model in (one, other)])
    resamples = np.random.default_rng(SEED).multinomial(photos, np.full(photos, 1 / photos), RESAMPLES)
    differences = [other.measure(weights, masks, rate) - one.measure(weights, masks, rate)
                   for weights in resamples.astype(float)]
    return np.stack([*values, values[1] - values[0], np.nanstd(differences, 0, ddof=1)], 1)


def find(path: str, annotations: Annotations) -> Detections:
    """The detections of a results json, or of a model that is run."""
    if path.endswith(".json"):
        seen, detections, _ = read_detections(annotations.path, path)
        require(len(seen.ids) == len(annotations.ids),
                f"{path}: is of only {len(seen.ids)} photos of {annotations.path}")
        return detections
    from detector import detect_all, load_detector  # torch takes seconds
    detections, errors = detect_all(load_detector(path), annotations)
    require(not errors, f"{len(errors)} photos could not be used, such as {[*errors.values()][:1]}")
    return detections


@command
def main(argv=None):
    """Read or detect, match, measure, print."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="COCO json")
    add("models", nargs=2, metavar="MODEL", help="detections (.json), or a model that is run")
    add("--false", type=float, default=0.3, metavar="RATE", help="a photo (default %(default)s)")
    args = parser.parse_args(argv)
    annotations = read_annotations(args.data)
    if len(set(annotations.image[~annotations.ignored])) < 2 or not args.false > 0:
        parser.error(f"{args.data} needs faces on two photos, and --false a number above 0")
    models = [Matched(annotations, find(path, annotations)) for path in args.models]
    groups = face_groups(annotations)
    rows = compare(*models, groups, args.false, len(annotations.ids))
    print(f"{args.data}: {len(annotations.ids):,} photos; recall at {args.false:g} false detections a photo")
    print(f"{'':24}{'faces':>8}{'a':>9}{'b':>9}{'b - a':>10}{'+-':>9}")
    counts = ["", "", *((own & ~annotations.ignored).sum() for own in groups.values())]
    for name, count, (*values, difference, error) in zip(["AP", "AP50", *groups], counts, rows):
        print(f"{name[:23]:<24}{count:>8}{values[0]:9.4f}{values[1]:9.4f}{difference:+10.4f}{error:9.4f}")


if __name__ == "__main__":
    main()
