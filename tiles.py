"""Small faces on large photos: a detector that looks at the whole picture and at overlapping tiles of it.

    from tiles import TiledDetector
    detector = TiledDetector(load_detector(), side=300)
    faces = detect(detector, "crowd.jpg")              # detect_all takes it too

On the command line: `--tiles SIDE [OVERLAP]` of detect.py and evaluate.py.
"""

import math

import numpy as np
import torch
from torchvision.ops import nms

from data import to_image
from detector import NMS_IOU, to_picture, to_pixels

BATCH = 16      # tiles that go through the network at once, where it has an input size
BORDER = 0.02   # of a tile's side: a box that ends this near to an inner border may be cut by it
COVERED = 0.5   # of the smaller box: a cut box and another that share more are one face


def cut(size: tuple, side: int, overlap: int) -> np.ndarray:
    """Lay tiles over a picture of `size` (width, height): int `[V, 4]`, xyxy, first the whole picture.

    Tiles are `side` x `side` or as large as the picture is, evenly spread; neighbours share `overlap` pixels
    or more. A picture that is no larger than one tile is its own only view.
    """
    def starts(length):
        count = 1 + max(0, math.ceil((length - side) / (side - overlap)))
        return np.linspace(0, max(0, length - side), count).round().astype(int)

    width, height = np.minimum(size, side)
    tiles = [(x, y, x + width, y + height) for y in starts(size[1]) for x in starts(size[0])]
    return np.array([(0, 0, *size), *(tiles if len(tiles) > 1 else [])])


def at_inner_border(faces: np.ndarray, view: np.ndarray, size: tuple) -> np.ndarray:
    """Which faces `[K, 5]` end at a border of their `view` that is no border of the picture: bool `[K]`."""
    margin = BORDER * (view[2:] - view[:2])
    inner = np.concatenate([view[:2] > 0, view[2:] < size])                                 # [4]
    near = np.concatenate([faces[:, :2] < view[:2] + margin, faces[:, 2:4] > view[2:] - margin], 1)
    return (near & inner).any(1)


def merge(faces: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Merge the faces `[K, 5]` of all views so that each counts once: `[N, 5]`, best first.

    `part` `[K]` marks those that may be cut by a tile's border: half a face has too small an IoU with the
    whole for NMS. So those are dropped that lie mostly inside a box of another view, which then has the
    better of both scores. Of two parts the better stays.
    """
    whole, parts = faces[~part], faces[part]
    boxes, scores = torch.from_numpy(whole[:, :4]), torch.from_numpy(whole[:, 4])
    merged = whole[nms(boxes, scores, NMS_IOU).numpy()]
    is_part = np.zeros(len(merged), bool)
    for face in parts[np.argsort(-parts[:, 4], kind="stable")]:
        sides = np.minimum(merged[:, 2:4], face[2:4]) - np.maximum(merged[:, :2], face[:2])
        shared = sides.clip(0).prod(1)
        area, areas = (face[2:4] - face[:2]).prod(), (merged[:, 2:4] - merged[:, :2]).prod(1)
        covered = shared / np.where(is_part, np.minimum(area, areas), area).clip(1e-9)
        if covered.max(initial=0) > COVERED:
            best = covered.argmax()
            merged[best, 4] = max(merged[best, 4], face[4])
        else:
            merged, is_part = np.concatenate([merged, face[None]]), np.append(is_part, True)
    return merged[np.argsort(-merged[:, 4], kind="stable")]


class TiledDetector:
    """Any detector, on whole pictures and on tiles of them: `[B, 3, H, W]` to B arrays `[K, 5]`.

    `side` and `overlap` are pixels of the picture. Every view is resized to the network's input as a picture
    is. A face up to `overlap` wide is seen whole in some tile, a larger one in the whole picture. `size` is
    None: it takes pictures of any size. There is no limit of 200 faces.
    """

    size = None

    def __init__(self, detector, side: int, overlap: int | None = None):
        self.detector, self.side = detector, side
        self.overlap = side // 4 if overlap is None else overlap
        if not 0 <= self.overlap < side:
            raise ValueError(f"tiles of {side} pixels cannot share {self.overlap}")
        self.threshold = getattr(detector, "threshold", None)

    def __call__(self, images: torch.Tensor) -> list[np.ndarray]:
        return [self._faces(to_image(pixels)) for pixels in images]

    def _faces(self, image):
        """The faces `[K, 5]` on one picture (PIL), in its pixels."""
        views = cut(image.size, self.side, self.overlap)
        faces, parts = [np.zeros((0, 5))], [np.zeros(0, bool)]
        batch = BATCH if self.detector.size else 1
        for first in range(0, len(views), batch):
            own = views[first:first + batch]
            pixels = torch.stack([to_pixels(self.detector, image.crop(view.tolist())) for view in own])
            for view, found in zip(own, self.detector(pixels)):
                seen = tuple(view[2:] - view[:2])
                found = to_picture(found, self.detector.size or seen, seen)
                found[:, :4] += np.tile(view[:2], 2)
                faces.append(found)
                parts.append(at_inner_border(found, view, image.size))
        return merge(np.concatenate(faces), np.concatenate(parts))
