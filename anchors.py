"""Anchors: where they are, which faces they answer for, and how boxes are coded against them.

As a command it fits anchor sizes to a dataset, beside the hand-designed ones:

    python anchors.py --data data/train.json            # nine anchors, scatter in anchors.png
    python anchors.py --data data/train.json -k 6 --size 320x240
"""

import math

# First, so that Ctrl-C during the slow imports below ends in one line.
from script import InputError, command, new_parser, parse_picture, parse_size, whole_file

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from coco import read_annotations
from model import HAND_DESIGNED, STRIDE, Config, grid_size

VARIANCES = (0.1, 0.1, 0.2, 0.2)
POSITIVE_IOU = 0.4
ALIGNED, LEAST_IOU = 9, 0.2  # of task_aligned: how many anchors for each face, and their own IoU with it
CROWD_COVER = 0.5  # of its own area, as evaluation has it: the union with a crowd is the detection alone
MAX_LOG = math.log(1000 / 16)  # bound on log(side / anchor side), so that no offset overflows exp


def make_anchors(config: Config, size: tuple | None = None, rounded: bool = True) -> torch.Tensor:
    """All anchors `[A, 4]`, xyxy in pixels of the network input, cells row-major, anchor fastest.

    `size` (width, height) of the input is the configuration's own unless given. `rounded`: corners are
    rounded in pixel-inclusive coordinates before they are shifted to their cells, as training and the
    generic export have it. Else they are unrounded and centred on the cell, as PriorBoxClustered (the
    DetectionOutput export) has it.
    """
    columns, rows = grid_size(*(size or config.input_size))
    sides = torch.tensor(config.anchors, dtype=torch.float64)               # [n, 2]
    if rounded:  # half to even, on the inclusive corners of a box centred in the cell's pixels 0..15
        centre = (STRIDE - 1) / 2
        first, last = torch.round(centre - (sides - 1) / 2), torch.round(centre + (sides - 1) / 2)
        base = torch.cat([first, last + 1], 1)                              # [n, 4]
    else:
        base = torch.cat([STRIDE / 2 - sides / 2, STRIDE / 2 + sides / 2], 1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) * STRIDE       # [cells, 1, 4]
    return (shifts + base).reshape(-1, 4).float()                           # [cells * n, 4]


def encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Offsets `[..., 4]` of boxes `[..., 4]` against anchors `[..., 4]`, both xyxy (SSD, Liu et al. 2016)."""
    boxes, anchors = box_convert(boxes, "xyxy", "cxcywh"), box_convert(anchors, "xyxy", "cxcywh")
    centres = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    sides = torch.log((boxes[..., 2:] / anchors[..., 2:]).clamp(min=1e-6))
    return torch.cat([centres, sides], -1) / boxes.new_tensor(VARIANCES)


def decode(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes `[..., 4]`, xyxy, of offsets `[..., 4]` against anchors `[..., 4]`; the inverse of `encode`."""
    anchors = box_convert(anchors, "xyxy", "cxcywh")
    scaled = offsets * offsets.new_tensor(VARIANCES)
    centres = anchors[..., :2] + scaled[..., :2] * anchors[..., 2:]
    sides = anchors[..., 2:] * scaled[..., 2:].clamp(max=MAX_LOG).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], -1)


def match(anchors: torch.Tensor, faces: torch.Tensor, ignored: torch.Tensor, image: torch.Tensor, batch: int,
          crowd: torch.Tensor | None = None,
          chosen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the anchors with the faces of a whole batch: labels `[B, A]` and offsets `[B, A, 4]`.

    As `assign`, with the offsets to each anchor's face; they are 0 where there is no face.
    """
    labels, face = assign(anchors, faces, ignored, image, batch, crowd, chosen)
    boxes = torch.cat([faces, faces.new_ones(1, 4)])[face]                  # [B, A, 4]
    return labels, encode(boxes, anchors).masked_fill(labels[..., None] != 1, 0)


def assign(anchors: torch.Tensor, faces: torch.Tensor, ignored: torch.Tensor, image: torch.Tensor, batch: int,
           crowd: torch.Tensor | None = None,
           chosen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign the faces of a whole batch to the anchors: labels `[B, A]` and which face it is, `[B, A]`.

    Labels are 1 for a face, 0 for background, -1 for neither; the face is T where the label is not 1.
    anchors `[A, 4]`; faces `[T, 4]` of all images together, xyxy in input pixels; ignored `[T]` bool;
    image `[T]`, the place in the batch of each face's image; batch B; crowd `[T]` bool, which of the
    ignored are crowd regions (None: none of them); chosen `[T, A]` bool, the anchors that may answer for
    each face (None: those whose IoU with it is 0.4 or more).

    Positive are the chosen anchors of faces that are not ignored. Besides, each such face takes its best
    anchor, if it overlaps any. Of faces that share an anchor, the one of highest IoU takes it, but those
    whose best it is come first. Of the other anchors, neither are those whose IoU with an ignored face is
    0.4 or more, and those with half their area or more in a crowd region.
    """
    number = torch.arange(len(faces), device=faces.device)
    iou = box_iou(faces, anchors)                                           # [T, A]
    near = iou >= POSITIVE_IOU
    learned = iou.masked_fill(ignored[:, None], 0)
    highest, best = learned.max(1)
    learned = learned * (near if chosen is None else chosen)
    learned[number, best] = highest + 2 * (highest > 0)                     # its best anchor above all others
    rows = image[:, None].expand_as(iou)
    zeros = iou.new_zeros(batch, len(anchors))                              # [B, A]
    top = zeros.scatter_reduce(0, rows, learned, "amax")
    # Which face that was: of equals the first, which has most faces from it on. They are counted in floats,
    # exact below 2 ** 24, since Apple's MPS reduces no integers. Anchors that no face claims get face T, a
    # row of its own below.
    claims = (learned == top[image]) * (len(faces) - number[:, None]).to(iou.dtype)
    face = len(faces) - zeros.scatter_reduce(0, rows, claims, "amax").long()
    positive = top > 0
    unsure = near & ignored[:, None]
    if crowd is not None:
        unsure |= (covered(anchors, faces) >= CROWD_COVER) & crowd[:, None]
    unsure = zeros.scatter_reduce(0, rows, unsure.to(iou.dtype), "amax") > 0
    return positive.long() - (unsure & ~positive).long(), face.masked_fill(~positive, len(faces))


@torch.no_grad()
def task_aligned(logits: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor, faces: torch.Tensor,
                 image: torch.Tensor) -> torch.Tensor:
    """The anchors `[T, A]`, bool, that answer best for each face (TOOD, Feng et al. 2021, section 3.2).

    Each face's anchors are ranked by score x IoU ** 6, the IoU of the box they predict with the face. Chosen
    are the best nine of those whose own IoU with it is 0.2 or more; small faces have fewer. So scores and
    boxes are learned in the same places. logits `[B, A, 2]` and offsets `[B, A, 4]` are the network's
    outputs; the rest is as in `assign`.
    """
    scores = logits.float().softmax(-1)[..., 1][image]                      # [T, A]
    iou = pair_iou(decode(offsets.float(), anchors)[image], faces[:, None])
    alignment = scores * iou ** 6 * (box_iou(faces, anchors) >= LEAST_IOU)
    highest, best = alignment.topk(min(ALIGNED, len(anchors)))
    return torch.zeros_like(alignment, dtype=torch.bool).scatter(1, best, highest > 0)


def pair_iou(boxes, others):
    """IoU `[...]` of each of boxes `[..., 4]` with its partner in others `[..., 4]`, xyxy."""
    start = torch.maximum(boxes[..., :2], others[..., :2])
    end = torch.minimum(boxes[..., 2:], others[..., 2:])
    common = (end - start).clamp(min=0).prod(-1)
    areas = sum((one[..., 2:] - one[..., :2]).clamp(min=0).prod(-1) for one in (boxes, others))
    return common / (areas - common).clamp(min=1e-6)


def covered(anchors, regions):
    """The share `[T, A]` of each anchor's area within each region; anchors `[A, 4]`, regions `[T, 4]`."""
    start = torch.maximum(regions[:, None, :2], anchors[:, :2])             # [T, A, 2]
    end = torch.minimum(regions[:, None, 2:], anchors[:, 2:])
    return (end - start).clamp(min=0).prod(-1) / (anchors[:, 2:] - anchors[:, :2]).prod(-1)


def shape_iou(sides, anchors):
    """IoU `[M, k]` of sides `[M, 2]` and anchors `[k, 2]` laid on one centre (numpy)."""
    common = np.minimum(sides[:, None], anchors).prod(2)
    return common / (sides.prod(1)[:, None] + anchors.prod(1) - common)


def fit(sides: np.ndarray, k: int, seed: int = 0, iterations: int = 300) -> np.ndarray:
    """Fit k anchors `[k, 2]` to face sides `[M, 2]`, smallest first.

    k-means with 1 - IoU as the distance (YOLO9000, Redmon and Farhadi 2017, section 2).
    """
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

    Left out are ignored faces and those with a side below `min_face` pixels of the photo.
    """
    sizes = annotations.sizes[annotations.image]
    if (sizes <= 0).any():
        name = annotations.names[annotations.image[(sizes <= 0).any(1)][0]]
        raise InputError(f"{annotations.path}: image {name} has no width and height, they are needed here")
    sides = annotations.xywh[:, 2:] * (width, height) / sizes
    return sides[~annotations.ignored & (annotations.xywh[:, 2:] >= min_face).all(1)]


def draw_scatter(path, sides, sets):
    """Face sides as a log-log scatter with each of `sets` {label: anchors `[k, 2]`} over it, to a PNG."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 7), layout="constrained").subplots()
    axes.loglog(*sides.T, ".", color="0.6", markersize=2, alpha=0.5, label=f"{len(sides):,} faces")
    for marker, (label, anchors) in zip("sD", sets.items()):
        axes.loglog(*anchors.T, marker, markersize=9, markerfacecolor="none", markeredgewidth=2, label=label)
    axes.set(xlabel="width at the network's input [px]", ylabel="height at the network's input [px]")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as temporary:
        axes.figure.savefig(temporary, dpi=110)


@command
def main(argv=None):
    """Fit anchors to a dataset and print them beside the hand-designed ones."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/train.json", help="COCO json (default %(default)s)")
    add("-k", type=int, default=9, help="how many anchors (default 9)")
    add("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    add("--min-face", type=int, default=17, help="smaller faces do not count (default 17 px), as in train.py")
    add("--out", type=parse_picture, default="anchors.png", help="the scatter (default %(default)s)")
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
    draw_scatter(args.out, sides, sets)
    at_300 = " ".join(f"{w:.1f}x{h:.1f}" for w, h in sets["fitted"] * 300 / np.array(args.size))
    print(f"{len(sides)} faces; scatter in {args.out}; to train with the fitted ones:\n"
          f"python train.py --size {args.size[0]}x{args.size[1]} --anchors {at_300}")


if __name__ == "__main__":
    main()
