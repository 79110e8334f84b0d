"""Anchors: where they are, which faces they answer for, and how boxes are coded against them."""

import math

import torch
from torchvision.ops import box_convert, box_iou

from model import STRIDE, Config, grid_size

VARIANCES = (0.1, 0.1, 0.2, 0.2)  # of x, y, width, height. As numbers: a tensor of them a GPU would wait for
POSITIVE_IOU = 0.4
ALIGNED, LEAST_IOU = 9, 0.2  # of task_aligned: how many anchors for each face, and their own IoU with it
CROWD_COVER = 0.5  # of its own area, as evaluation has it: the union with a crowd is the detection alone
MAX_LOG = math.log(1000 / 16)  # bound on log(side / anchor side), so that no offset overflows exp


def make_anchors(config: Config, size: tuple | None = None, rounded: bool = True) -> torch.Tensor:
    """All anchors `[A, 4]`, xyxy in pixels of the network input, cells row-major, anchor fastest.

    `size` (width, height) is the configuration's own unless given. `rounded`: corners are rounded in
    pixel-inclusive coordinates, as in training; else centred on the cell, as in PriorBoxClustered."""
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
    return torch.cat([centres / VARIANCES[0], sides / VARIANCES[2]], -1)


def decode(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes `[..., 4]`, xyxy, of offsets `[..., 4]` against anchors `[..., 4]`; the inverse of `encode`."""
    anchors = box_convert(anchors, "xyxy", "cxcywh")
    centres = anchors[..., :2] + offsets[..., :2] * VARIANCES[0] * anchors[..., 2:]
    sides = anchors[..., 2:] * (offsets[..., 2:] * VARIANCES[2]).clamp(max=MAX_LOG).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], -1)


def match(anchors, faces, ignored, image, batch: int, crowd=None, chosen=None) -> tuple:
    """As `assign`: labels `[B, A]`, and offsets `[B, A, 4]` to each anchor's face, 0 where there is none."""
    labels, face = assign(anchors, faces, ignored, image, batch, crowd, chosen)
    boxes = torch.cat([faces, faces.new_ones(1, 4)])[face]                  # [B, A, 4]
    return labels, encode(boxes, anchors).masked_fill(labels[..., None] != 1, 0)


def assign(anchors, faces, ignored, image, batch: int, crowd=None, chosen=None) -> tuple:
    """Assign the faces of a whole batch to the anchors: labels `[B, A]` and which face it is, `[B, A]`.

    Labels are 1 for a face, 0 for background, -1 for neither; the face is T where the label is not 1.
    anchors `[A, 4]`; faces `[T, 4]` of all images, xyxy in input pixels; ignored `[T]` bool; image `[T]`, the
    place in the batch of each face's; crowd `[T]` bool, those ignored that are regions (None: none); chosen
    `[T, A]` bool, the anchors that may answer for each face (None: those whose IoU with it is 0.4 or more).

    Positive are the chosen anchors of faces that are not ignored, and the best anchor of each such face that
    overlaps any. Of faces that share an anchor, the one of highest IoU takes it, but those whose best it is
    come first. Of the other anchors, neither are those whose IoU with an ignored face is 0.4 or more, and
    those with half their area or more in a crowd region."""
    number = torch.arange(len(faces), device=faces.device)
    iou = box_iou(faces, anchors)                                           # [T, A]
    near = iou >= POSITIVE_IOU
    learned = iou.masked_fill(ignored[:, None], 0)
    highest, best = learned.max(1)
    learned = learned * (near if chosen is None else chosen)
    learned[number, best] = highest + 2 * (highest > 0)                     # its best anchor above all others
    top, face = first_of_highest(learned, image, batch)
    positive = top > 0
    unsure = near & ignored[:, None]
    if crowd is not None:
        unsure |= (covered(anchors, faces) >= CROWD_COVER) & crowd[:, None]
    unsure = highest_of_images(unsure.to(iou.dtype), image, batch) > 0
    labels = positive.long() - (unsure & ~positive).long()
    return labels, face.masked_fill(~positive, len(faces))


def highest_of_images(values, image, batch):
    """The highest `[B, A]` of values `[T, A]` over the faces of each image, 0 at least; image `[T]`."""
    rows = image[:, None].expand_as(values)
    return values.new_zeros(batch, values.shape[1]).scatter_reduce(0, rows, values, "amax")


def first_of_highest(values, image, batch):
    """The highest `[B, A]` of values `[T, A]` in each image, and the first face `[B, A]` that has it.

    The places are counted backwards and in floats, exact below 2 ** 24: Apple's MPS reduces no integers."""
    top = highest_of_images(values, image, batch)
    backwards = torch.arange(len(values), 0, -1, device=values.device, dtype=values.dtype)
    last = highest_of_images((values == top[image]) * backwards[:, None], image, batch)
    return top, len(values) - last.long()


@torch.no_grad()
def task_aligned(logits, offsets, anchors, faces, image) -> torch.Tensor:
    """The anchors `[T, A]`, bool, that answer best for each face (TOOD, Feng et al. 2021, section 3.2).

    Of the anchors whose own IoU with the face is 0.2 or more these are the nine with the highest score x
    IoU ** 6, the IoU of the box they predict. logits `[B, A, 2]`, offsets `[B, A, 4]`; rest as `assign`."""
    scores = logits.float().softmax(-1)[..., 1][image]                      # [T, A]
    iou = pair_iou(decode(offsets.float(), anchors)[image], faces[:, None])
    alignment = scores * iou ** 6 * (box_iou(faces, anchors) >= LEAST_IOU)
    highest, best = alignment.topk(min(ALIGNED, len(anchors)))
    return torch.zeros_like(alignment, dtype=torch.bool).scatter(1, best, highest > 0)


def pair_iou(boxes, others):
    """IoU `[...]` of each of boxes `[..., 4]` with its partner in others `[..., 4]`, xyxy."""
    start = torch.maximum(boxes[..., :2], others[..., :2])
    end = torch.minimum(boxes[..., 2:], others[..., 2:])
    common = area(end - start)
    areas = area(boxes[..., 2:] - boxes[..., :2]) + area(others[..., 2:] - others[..., :2])
    return common / (areas - common).clamp(min=1e-6)


def area(sides):
    """Areas `[...]` of sides `[..., 2]`, 0 where one is negative."""
    sides = sides.clamp(min=0)  # not prod() of them, for whose gradient a GPU is waited for
    return sides[..., 0] * sides[..., 1]


def covered(anchors, regions):
    """The share `[T, A]` of each anchor's area within each region; anchors `[A, 4]`, regions `[T, 4]`."""
    start = torch.maximum(regions[:, None, :2], anchors[:, :2])             # [T, A, 2]
    end = torch.minimum(regions[:, None, 2:], anchors[:, 2:])
    return area(end - start) / area(anchors[:, 2:] - anchors[:, :2])
