"""Fit anchor sizes to a dataset, beside the hand-designed ones.

    python -m tools.fit_anchors --data data/train.json -k 6 --size 320x240
"""

from support.script import command, Parser, parse_size, require

import numpy as np

from anchors import POSITIVE_IOU
from model import HAND_DESIGNED
from support.coco import read_annotations


def shape_iou(sides, anchors):
    """IoU `[M, k]` of sides `[M, 2]` and anchors `[k, 2]` laid on one centre (numpy)."""
    common = np.minimum(sides[:, None], anchors).prod(2)
    return common / (sides.prod(1)[:, None] + anchors.prod(1) - common)


def fit(sides: np.ndarray, k: int) -> np.ndarray:
    """Fit k anchors `[k, 2]`, smallest first, to face sides `[M, 2]`: k-means by 1 - IoU (YOLO9000, 2017)."""
    centres = np.random.default_rng(0).choice(np.unique(sides, axis=0), k, replace=False)
    before = None
    while not np.array_equal(centres, before):
        before, nearest = centres, shape_iou(sides, centres).argmax(1)
        centres = np.stack([sides[nearest == i].mean(0) if (nearest == i).any() else centres[i]
                            for i in range(k)])
    return centres[centres.prod(1).argsort()]


@command
def main(argv=None):
    """Fit anchors to a dataset and print them beside the hand-designed ones."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/train.json", help="COCO json (default %(default)s)")
    add("-k", type=int, default=9, help="how many anchors (default 9)")
    add("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    add("--min-face", type=int, default=17, help="smaller faces do not count (default 17 px), as in train.py")
    args = parser.parse_args(argv)
    annotations, size = read_annotations(args.data), np.array(args.size)
    sizes = annotations.sizes[annotations.image]
    unsized = [annotations.names[n] for n in annotations.image[(sizes <= 0).any(1)]]
    require(not unsized, f"{args.data}: image {' '.join(unsized[:1])} has no width and height")
    learned = ~annotations.ignored & (annotations.xywh[:, 2:] >= args.min_face).all(1)
    sides = (annotations.xywh[:, 2:] * size / sizes)[learned]  # at the network's input
    distinct = len(np.unique(sides, axis=0))
    require(1 <= args.k <= distinct, f"{args.data}: -k {args.k} anchors cannot be fitted to {distinct} "
            f"different sizes of faces of {args.min_face} px and more")
    designed = np.array(HAND_DESIGNED) * size / 300
    for label, anchors in (("hand-designed", designed), ("fitted", fit(sides, args.k))):
        best = shape_iou(sides, anchors).max(1)
        print(f"{label:>13}: mean best IoU {best.mean():.3f}, "
              f"recall at {POSITIVE_IOU} {(best >= POSITIVE_IOU).mean():.3f}  "
              + " ".join(f"{w:.1f}x{h:.1f}" for w, h in anchors))
    at_300 = " ".join(f"{w:.1f}x{h:.1f}" for w, h in anchors * 300 / size)
    print(f"{len(sides)} faces; to train with the fitted ones:\n"
          f"python train.py --data {args.data} --size {size[0]}x{size[1]} --anchors {at_300}")


if __name__ == "__main__":
    main()
