"""Fit anchor sizes to a dataset, beside the hand-designed ones.

    python -m tools.fit_anchors --data data/train.json            # nine anchors
    python -m tools.fit_anchors --data data/train.json -k 6 --size 320x240
"""

from support.script import InputError, command, new_parser, parse_size

import numpy as np

from anchors import POSITIVE_IOU
from model import HAND_DESIGNED
from support.coco import read_annotations


def shape_iou(sides, anchors):
    """IoU `[M, k]` of sides `[M, 2]` and anchors `[k, 2]` laid on one centre (numpy)."""
    common = np.minimum(sides[:, None], anchors).prod(2)
    return common / (sides.prod(1)[:, None] + anchors.prod(1) - common)


def fit(sides: np.ndarray, k: int, seed: int = 0, iterations: int = 300) -> np.ndarray:
    """Fit k anchors `[k, 2]` to face sides `[M, 2]`, smallest first.

    k-means with 1 - IoU as the distance (YOLO9000, Redmon and Farhadi 2017, section 2)."""
    centres = np.random.default_rng(seed).choice(np.unique(sides, axis=0), k, replace=False)
    nearest = None
    for _ in range(iterations):
        previous, nearest = nearest, shape_iou(sides, centres).argmax(1)
        if previous is not None and (nearest == previous).all():
            break
        centres = np.stack([sides[nearest == i].mean(0) if (nearest == i).any() else centres[i]
                            for i in range(k)])
    return centres[centres.prod(1).argsort()]


def network_sides(annotations, width, height, min_face=0):
    """Sides `[M, 2]` of the faces to learn, in pixels of the network input.

    Left out are ignored faces and those with a side below `min_face` pixels of the photo."""
    sizes = annotations.sizes[annotations.image]
    if (sizes <= 0).any():
        name = annotations.names[annotations.image[(sizes <= 0).any(1)][0]]
        raise InputError(f"{annotations.path}: image {name} has no width and height, they are needed here")
    sides = annotations.xywh[:, 2:] * (width, height) / sizes
    return sides[~annotations.ignored & (annotations.xywh[:, 2:] >= min_face).all(1)]


@command
def main(argv=None):
    """Fit anchors to a dataset and print them beside the hand-designed ones."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/train.json", help="COCO json (default %(default)s)")
    add("-k", type=int, default=9, help="how many anchors (default 9)")
    add("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    add("--min-face", type=int, default=17, help="smaller faces do not count (default 17 px), as in train.py")
    args = parser.parse_args(argv)
    sides = network_sides(read_annotations(args.data), *args.size, args.min_face)
    distinct = len(np.unique(sides, axis=0))
    if not 1 <= args.k <= distinct:
        raise InputError(
            f"{args.data}: -k {args.k} anchors cannot be fitted to {distinct} different sizes of faces of "
            f"{args.min_face} px and more")
    sets = {"hand-designed": np.array(HAND_DESIGNED) * args.size / 300, "fitted": fit(sides, args.k)}
    for label, anchors in sets.items():
        best = shape_iou(sides, anchors).max(1)
        recall = (best >= POSITIVE_IOU).mean()
        print(f"{label:>13}: mean best IoU {best.mean():.3f}, recall at {POSITIVE_IOU} {recall:.3f}  "
              + " ".join(f"{w:.1f}x{h:.1f}" for w, h in anchors))
    at_300 = " ".join(f"{w:.1f}x{h:.1f}" for w, h in sets["fitted"] * 300 / np.array(args.size))
    print(f"{len(sides)} faces; to train with the fitted ones:\n"
          f"python train.py --size {args.size[0]}x{args.size[1]} --anchors {at_300}")


if __name__ == "__main__":
    main()
