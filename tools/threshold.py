"""Choose the score from which detections are shown, so that a target is met on other photos too.

    python -m tools.threshold val.json detections.json precision=0.95     # what evaluate.py --out wrote
    python -m tools.threshold val.json detections.json false=0.1 --save runs/face/best.pth runs/face/sure.pth

The lowest score that meets a target on some photos meets it on only about half of all others: it has their
luck. So it has to do in SURE of the resamples of the photos (the bootstrap, Efron 1979), each with one
mistake more than it has (conformal risk control, Angelopoulos et al. 2022).
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.script import InputError, bad_values, command, Parser, require

import numpy as np

from evaluate import hashes, made_path, read_detections
from metrics import Outcomes, outcomes, rates, score_curve
from support.coco import arrays, read_annotations

STEPS = 1000             # thresholds between 0 and 1: three decimals are easy to write down
RESAMPLES, SEED = 1000, 0
BLOCK = 100              # resamples computed at once; limits the memory
SURE = 0.9               # the share of resamples in which the target has to be met
INTERVAL = 0.025, 0.975  # the quantiles of the resamples that are reported
MOST = 100_000           # photos; more are not advised


class Target(NamedTuple):
    """Precision or recall of at least `value`, or at most `value` false detections a picture."""
    measure: str    # of metrics.rates
    value: float

    def __str__(self):
        """As it is typed."""
        return f"{self.measure.removesuffix('_per_picture')}={self.value:g}"

    def met(self, measured):
        """Whether the `metrics.rates` meet the target."""
        value = measured[self.measure]
        return value <= self.value if self.measure == "false_per_picture" else value >= self.value


def parse_target(text):
    """Parse `precision=0.95`, `recall=0.9` or `false=0.1` to a Target, for argparse."""
    name, _, value = text.partition("=")
    with suppress(ValueError):
        most = {"precision": 1, "recall": 1, "false": 1e9}.get(name, 0)
        if 0 < float(value) < most:
            return Target(name.replace("false", "false_per_picture"), float(value))
    raise argparse.ArgumentTypeError(
        f"{text!r}: precision=0.95 or recall=0.9 (between 0 and 1) or false=0.1 (a photo) expected")


def choose(found: Outcomes, target: Target, times: int = 1) -> tuple[float | None, float | None]:
    """The lowest (of a recall the highest) thresholds that meet a target on these photos and on others too.

    None: no score. `times` asks what would be chosen of so many times as many photos."""
    scores = np.unique(np.floor(found.score[found.hit | found.false] * STEPS) / STEPS)[::-1]
    hits = shown_by_photo(found, found.hit, scores)
    false = shown_by_photo(found, found.false, scores)
    share = np.zeros(len(scores))
    for weights in _resamples(len(found.faces), times):  # [b, I]
        faces = (weights @ found.faces)[:, None]
        resampled = rates(weights @ hits, weights @ false, faces, times * len(found.faces), spare=1)
        share += target.met(resampled).sum(0) / RESAMPLES
    here = target.met(score_curve(found, scores))
    best = 0 if target.measure == "recall" else -1
    return tuple(float(scores[met][best]) if met.any() else None
                 for met in (here, here & (share > SURE - 1e-9)))


def shown_by_photo(found: Outcomes, flags: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How many detections in `flags` `[D]` each of `scores` `[T]`, falling, shows on each photo: `[I, T]`."""
    counts = np.zeros((len(found.faces), len(scores) + 1))
    np.add.at(counts, (found.image[flags], np.searchsorted(-scores, -found.score[flags])), 1)
    return counts.cumsum(1)[:, :-1]


def refusal(found: Outcomes, target: Target, here: float | None) -> str:
    """Say in one line why `choose` found no score for others."""
    if here is not None:
        photos = len(found.faces)
        times = [2 ** n for n in range(1, 99) if 2 ** n * photos <= MOST]
        enough = next((n for n in times if choose(found, target, n)[1] is not None), 0)
        advice = f"about {enough * photos:,} such photos are" if enough else f"{MOST:,} such photos are not"
        return (f"{target}: score {here:g} meets it on these {photos} photos, but they are too few "
                f"to say so of others; {advice} enough")
    reached = score_curve(found)[target.measure]
    if not len(reached) or not found.faces.sum():
        return f"{target}: there are no detections to choose from, or no faces"
    best = reached.min() if target.measure == "false_per_picture" else reached.max()
    return f"{target}: no score meets it; the best is {best:.3g}"


def intervals(found: Outcomes, score: float) -> dict[str, tuple[float, float, float]]:
    """The `metrics.rates` at a threshold, with those of 95 % of the resamples: {name: (value, low, high)}."""
    photos = len(found.faces)
    shown = [shown_by_photo(found, flags, np.array([score])) for flags in (found.hit, found.false)]
    counts = np.column_stack([*shown, found.faces])                                    # [I, 3]
    resampled = np.concatenate([weights @ counts for weights in _resamples(photos)])   # [RESAMPLES, 3]
    values, spread = rates(*counts.sum(0), photos), rates(*resampled.T, photos)
    return {name: (float(value), *np.quantile(spread[name], INTERVAL).tolist())
            for name, value in values.items()}


def said(found, score):
    """The `intervals` as text."""
    return ", ".join("{} {:.3f} ({:.3f} to {:.3f})".format(name.replace("_", " "), *own)
                     for name, own in intervals(found, score).items())


def _resamples(photos, times=1):
    """Yield in blocks `[b, I]` how often each of I photos is drawn: RESAMPLES draws of times x I photos."""
    generator = np.random.default_rng(SEED)
    for _ in range(0, RESAMPLES if photos else 0, BLOCK):
        yield generator.multinomial(times * photos, np.full(photos, 1 / photos), BLOCK).astype(np.float64)


def read_model(args, made):
    """The content of the checkpoint to save into. Raises InputError unless it made the detections."""
    from model import read_checkpoint  # torch takes seconds
    model, new = args.save
    differ = os.path.realpath(new) != os.path.realpath(model)
    require(differ and {Path(model).suffix, Path(new).suffix} == {".pth"}, f"--save {model} {new}: two "
            "checkpoints (.pth) are expected; export.py then puts the threshold into .onnx and .xml")
    with bad_values():
        content = read_checkpoint(model)
    require(made, f"{made_path(args.detections)}: no such file, so nothing says which model made "
            f"{args.detections}; evaluate.py --model {model} --out writes both")
    require(made["sha256"] == hashes(model),
            f"{args.detections}: was made by another model ({made['model']}), not by {model}")
    return content


@command
def main(argv=None):
    """Read, choose, print, save."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="COCO json")
    add("detections", help="detections on its photos, as evaluate.py --out writes them")
    add("target", type=parse_target, help="precision=0.95, recall=0.9 or false=0.1 (a photo)")
    add("--save", nargs=2, metavar=("MODEL", "NEW"), help="write MODEL with the threshold in it to NEW")
    args = parser.parse_args(argv)
    annotations, detections, made = read_detections(args.data, args.detections)
    content = read_model(args, made) if args.save else None
    if made and read_annotations(args.data).fingerprint() in (made.get("trained_on") or ()):
        print(f"warning: {made['model']} was trained on the photos of {args.data}, "
              "on others it does worse than what follows")
    found = outcomes(*arrays(annotations, detections), len(annotations.ids))
    here, score = choose(found, args.target)
    if here is not None:
        print(f"{args.target}: score {here:g} meets it on these photos alone: {said(found, here)}")
    if score is None:
        raise InputError(f"{args.data}: {refusal(found, args.target, here)}")
    print(f"{args.target}: score {score:g} meets it, also with one mistake more, in {SURE:.0%} of "
          f"{RESAMPLES:,} resamples of these photos: {said(found, score)}")
    if args.save:
        from checkpoints import write_content
        data = {"file": os.path.basename(args.data), "photos": len(annotations.ids),
                "faces": int(found.faces.sum()), "fingerprint": annotations.fingerprint()}
        entry = {"score": score, "target": str(args.target), "size": made["size"], "tiles": made["tiles"]}
        write_content(args.save[1], content | {"threshold": entry | {"data": data}})
        print(f"wrote {args.save[1]}")


if __name__ == "__main__":
    main()
