"""Photos and their faces, from the disk to a batch: read, augment, collate, load.

As a command it shows photos with their faces, the first thing to do with one's own labels:

    python data.py --data data/train.json --out grid.png              # as they are
    python data.py --data data/train.json --out grid.png --augment    # as the training sees them
    python data.py --data mine.json --split 5 train.json val.json     # and every fifth photo is kept out for validation
"""
import argparse
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou

from formats import InputError, command, parse_picture, parse_size, read_annotations, read_json, write_json
from pictures import IGNORED, decode, draw_faces, grid, load_picture, open_picture, save_picture, upright_size

CROP_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # None: the whole picture
CROP_TRIES = 40
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # from RGB; Y is the grey
FROM_YIQ = np.linalg.inv(YIQ)


def random_view(rng, size, faces):
    """The part of a picture to train on, xyxy in its pixels; what lies outside the picture is black.

    First the picture may be placed on a canvas 1-2 times its size, then a part of the canvas is taken that some face
    overlaps with a random least IoU (SSD, Liu et al. 2016, section 2.2; torchvision's RandomZoomOut, RandomIoUCrop).
    size (width, height); faces `[N, 4]`, xyxy.
    """
    size = np.array(size, float)
    origin, canvas = np.zeros(2), size
    if rng.random() < 0.5:
        canvas = size * rng.uniform(1, 2)
        origin = -(canvas - size) * rng.random(2)
    centres = (faces[:, :2] + faces[:, 2:]) / 2
    while True:
        least = CROP_IOUS[rng.integers(len(CROP_IOUS))]
        if least is None or not len(faces):
            return np.concatenate([origin, origin + canvas])
        sides = rng.uniform(0.1, 1, (CROP_TRIES, 2)) * canvas
        corner = origin + (canvas - sides) * rng.random((CROP_TRIES, 2))
        views = np.concatenate([corner, corner + sides], 1)                             # [tries, 4]
        aspect = sides[:, 0] / sides[:, 1]
        inside = ((corner[:, None] < centres) & (centres < views[:, None, 2:])).all(2)  # [tries, N]
        iou = box_iou(torch.from_numpy(views), torch.from_numpy(faces)).numpy()
        good = (aspect >= 0.5) & (aspect <= 2) & inside.any(1) & ((iou * inside).max(1) >= least)
        if good.any():
            return views[good.argmax()]


def distort_colours(image, rng):
    """Photometric distortion of a PIL image, each with probability 0.5: brightness, contrast, saturation, hue.

    brightness +-32 of 255, contrast and saturation x 0.5-1.5, hue +-18 degrees (Howard 2013, with SSD's ranges). In YIQ
    saturation and hue stretch and turn the plane of colours, so all four together are one affine map of RGB: one pass over
    the pixels and one rounding. It works pixel by pixel, so it may follow the crop and cost less.
    """
    coins = rng.random(4) < 0.5
    if not coins.any():
        return image
    add = rng.uniform(-32, 32) * coins[0]
    contrast, saturation = np.where(coins[1:3], rng.uniform(0.5, 1.5, 2), 1)
    hue = math.radians(rng.uniform(-18, 18)) * coins[3]
    colours = np.eye(3)
    colours[1:, 1:] = saturation * np.array([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    matrix = contrast * np.column_stack([FROM_YIQ @ colours @ YIQ, [add] * 3])                      # [3, 4]
    return image.convert("RGB", matrix.ravel().tolist())


def resize_view(image, view, width, height):
    """The part `view` (xyxy, pixels of `image`) resized to `width` x `height`: what lies inside, and its corner there."""
    (x1, y1, x2, y2), (w, h) = view, image.size
    sx, sy = width / (x2 - x1), height / (y2 - y1)
    left, top = math.ceil(max(0, -x1 * sx) - 1e-6), math.ceil(max(0, -y1 * sy) - 1e-6)
    right, bottom = math.floor(min(width, (w - x1) * sx) + 1e-6), math.floor(min(height, (h - y1) * sy) + 1e-6)
    if right <= left or bottom <= top:
        return Image.new("RGB", (1, 1)), (0, 0)
    box = (max(0, x1 + left / sx), max(0, y1 + top / sy), min(w, x1 + right / sx), min(h, y1 + bottom / sy))
    return image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box), (left, top)


@dataclass
class Item:
    """One photo as the network sees it."""
    index: int             # of the photo in its Annotations
    picture: torch.Tensor  # uint8 `[3, H, W]`, RGB
    faces: np.ndarray      # float32 `[N, 4]`, xyxy in pixels of `picture`
    ignored: np.ndarray    # bool `[N]`
    size: tuple            # (width, height) of the photo on disk, upright
    error: str = ""        # why the photo could not be read; it is then black and has no faces


class FaceDataset(Dataset):
    """The photos of some Annotations at network size. All it holds are arrays, which forked workers share.

    Its keys are (index, seed): seed None for the photo as it is, else a sequence of integers that fixes its
    augmentation, whichever worker does it. Faces with a side below `min_face` pixels of the photo are ignored.
    Without `width` and `height` the photos keep their sizes.
    """

    def __init__(self, annotations, width=None, height=None, min_face=0):
        self.width, self.height, self.folder = width, height, annotations.path.parent
        self.names = np.array([os.fsencode(name) for name in annotations.names] or [b""])
        self.sizes = annotations.sizes
        self.starts = np.searchsorted(annotations.image, np.arange(len(annotations.ids) + 1))
        corner, sides = np.split(annotations.xywh, 2, 1)
        self.faces = np.concatenate([corner, corner + sides], 1)
        self.ignored = annotations.ignored | (sides < min_face).any(1)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, key):
        index, seed = key
        own = slice(self.starts[index], self.starts[index + 1])
        try:
            return self._read(index, seed, self.faces[own], self.ignored[own])
        except InputError as error:  # what to do about it is for the caller to say
            picture = torch.zeros(3, self.height or 1, self.width or 1, dtype=torch.uint8)
            return Item(index, picture, np.zeros((0, 4), np.float32), np.zeros(0, bool), (1, 1), str(error))

    def _read(self, index, seed, faces, ignored):
        path = self.folder / os.fsdecode(self.names[index])
        rng = None if seed is None else np.random.default_rng(seed)
        with open_picture(path) as image:
            size = upright_size(image)
            target = (self.width, self.height) if self.width else size
            if (self.sizes[index] > 0).all() and tuple(self.sizes[index]) != size:
                raise InputError(f"{path}: is {size[0]}x{size[1]}, but its json says "
                                 f"{self.sizes[index][0]}x{self.sizes[index][1]}")
            if rng:
                view = random_view(rng, size, faces[~ignored])
                image = decode(image, max(target / (view[2:] - view[:2])))
            else:  # evaluation decodes at full size: its resize is defined as PIL's on the whole picture
                view = np.array([0, 0, *size], float)
                image = decode(image)
        inside, corner = resize_view(image, view * (np.array(image.size * 2) / (size * 2)), *target)
        faces = (faces - np.tile(view[:2], 2)) * np.tile(target / (view[2:] - view[:2]), 2)
        if rng:
            inside = distort_colours(inside, rng)
            centres = (faces[:, :2] + faces[:, 2:]) / 2
            kept = ((centres > 0) & (centres < target)).all(1)
            faces, ignored = faces[kept], ignored[kept]
        if inside.size != target:
            whole = Image.new("RGB", target)
            whole.paste(inside, corner)
            inside = whole
        faces = faces.clip(0, target * 2)
        ignored = ignored | (faces[:, 2:] <= faces[:, :2]).any(1)  # wholly outside, which a json without sizes does not tell
        if rng and rng.random() < 0.5:
            inside = inside.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            faces[:, [0, 2]] = target[0] - faces[:, [2, 0]]
        picture = torch.from_numpy(np.array(inside)).permute(2, 0, 1).contiguous()
        return Item(index, picture, faces.astype(np.float32), ignored, size)


@dataclass
class Batch:
    """B photos and all T faces on them."""
    images: torch.Tensor   # uint8 `[B, 3, H, W]`, RGB
    faces: torch.Tensor    # float32 `[T, 4]`, xyxy in pixels of the network input
    ignored: torch.Tensor  # bool `[T]`
    image: torch.Tensor    # int64 `[T]`, each face's place in the batch
    index: list            # B indices of the photos in their Annotations
    sizes: list            # B sizes (width, height) on disk
    errors: dict           # {index: one line} of the photos that could not be read

    def to(self, device):
        """The same batch with its tensors on `device`, copied without waiting where they are pinned."""
        move = lambda name: getattr(self, name).to(device, non_blocking=True)
        return replace(self, **{name: move(name) for name in ("images", "faces", "ignored", "image")})

    def pin_memory(self):
        """The same batch in page-locked memory; called by the DataLoader."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("images", "faces", "ignored", "image")})


def collate(items):
    """Items to a Batch."""
    counts = [len(item.faces) for item in items]
    return Batch(torch.stack([item.picture for item in items]),
                 torch.from_numpy(np.concatenate([item.faces for item in items])),
                 torch.from_numpy(np.concatenate([item.ignored for item in items])),
                 torch.arange(len(items)).repeat_interleave(torch.tensor(counts)),
                 [item.index for item in items], [item.size for item in items],
                 {item.index: item.error for item in items if item.error})


class TrainBatches:
    """The batches of an epoch for one process: a pure function of seed, epoch and place, so any of it can be redone.

    An epoch is `repeat` passes over n photos in one shuffled order, filled up to a multiple of `world` processes;
    process `rank` takes every world-th. Together the processes' k-th batches are one process's k-th batch of
    `world` times the size. Set `epoch` before iterating, and `start` to skip batches already done.
    """

    def __init__(self, n, batch, repeat=1, seed=0, rank=0, world=1, augment=True):
        self.n, self.batch, self.repeat, self.seed, self.rank, self.world = n, batch, repeat, seed, rank, world
        self.augment = augment
        self.epoch = self.start = 0
        self.total = math.ceil(math.ceil(n * repeat / world) / batch)

    def __len__(self):
        return self.total - self.start

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n * self.repeat) % self.n
        places = np.arange(self.rank, math.ceil(len(order) / self.world) * self.world, self.world)
        for first in range(self.start * self.batch, len(places), self.batch):
            yield [(int(order[place % len(order)]), (self.seed, self.epoch, int(place)) if self.augment else None)
                   for place in places[first:first + self.batch]]


def eval_batches(n, batch, rank=0, world=1):
    """The batches of process `rank` that together show each of n photos once, as it is.

    They are cut before they are dealt out: a photo's company, and so its detections, are the same for any `world`.
    """
    return [[(index, None) for index in range(first, min(first + batch, n))] for first in range(0, n, batch)][rank::world]


def make_loader(dataset, batches, workers, device="cpu"):
    """A DataLoader of Batches; its `workers` live as long as it does."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, worker_init_fn=_heed_no_signals,
                      persistent_workers=workers > 0, pin_memory=torch.device(device).type == "cuda")


def _heed_no_signals(_):
    """Ctrl-C reaches workers too; the main process saves first and then ends them itself (by SIGTERM, if need be)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe(annotations, min_face):
    """Counts and face sizes as lines of text."""
    sides = annotations.xywh[~annotations.ignored, 2:].min(1) if (~annotations.ignored).any() else np.zeros(0)
    lines = [", ".join(f"{count:,} {what}" for what, count in annotations.counts.items() if count or what == "faces")]
    if len(sides):
        quantiles = np.quantile(sides, (0, 0.1, 0.5, 0.9, 1))
        lines.append("smaller side of a face, px: least {:.0f}, 10 % {:.0f}, median {:.0f}, 90 % {:.0f}, most {:.0f}"
                     .format(*quantiles) + f"; below {min_face} px: {(sides < min_face).sum():,}")
    return lines


def split(annotations, every, train, val):
    """Write two COCO files of some Annotations' file: every `every`-th photo to `val`, the others to `train`."""
    content, photos = read_json(annotations.path), os.path.realpath(annotations.path.parent)
    kept_out = np.arange(len(annotations.ids)) % every == every - 1
    for path, own in ((train, ~kept_out), (val, kept_out)):
        to_photos = os.path.relpath(photos, os.path.dirname(os.path.realpath(path)))  # names in a json are relative to it
        images = [image | {"file_name": Path(to_photos, image["file_name"]).as_posix()}
                  for n, image in enumerate(content["images"]) if own[n]]
        ids = set(annotations.ids[own].tolist())
        faces = [face for face in content["annotations"] if face.get("image_id") in ids]
        write_json(path, content | {"images": images, "annotations": faces})
        print(f"{path}: {len(images):,} photos, {len(faces):,} boxes")


@command
def main(argv=None):
    """Show photos of a dataset with their faces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/train.json", help="COCO json (default %(default)s)")
    parser.add_argument("--out", type=parse_picture, default="grid.png", help="the picture (default %(default)s)")
    parser.add_argument("--augment", action="store_true", help="show the training's view, augmented, at --size")
    parser.add_argument("--count", type=int, default=16, help="photos shown (default %(default)s)")
    parser.add_argument("--size", type=parse_size, default=(300, 300), help="network input, S or WxH (default 300)")
    parser.add_argument("--min-face", type=int, default=17, help="smaller faces are ignored (default %(default)s px)")
    parser.add_argument("--seed", type=int, default=0, help="another seed shows other photos (default %(default)s)")
    parser.add_argument("--split", nargs=3, metavar=("N", "TRAIN", "VAL"), help="also write every N-th photo to the json VAL "
                        "and the others to TRAIN")
    args = parser.parse_args(argv)
    annotations = read_annotations(args.data)
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if not len(annotations.ids) or args.count < 1:
        raise InputError(f"{args.data}: no photos to show")
    if args.split and not (args.split[0].isdecimal() and 2 <= int(args.split[0]) <= len(annotations.ids)):
        parser.error(f"--split {args.split[0]}: a number from 2 to that of the photos ({len(annotations.ids)}) expected")
    if args.split and len({os.path.realpath(path) for path in (args.data, *args.split[1:])}) < 3:
        parser.error("--split: TRAIN and VAL must be two new files")
    dataset = FaceDataset(annotations, *args.size, args.min_face)
    pictures = []
    for place, index in enumerate(np.random.default_rng(args.seed).permutation(len(dataset))[:args.count]):
        if args.augment:
            item = dataset[index, (args.seed, place)]
            image, faces, ignored, error = (Image.fromarray(item.picture.permute(1, 2, 0).numpy()), item.faces,
                                            item.ignored, item.error)
        else:
            own = slice(dataset.starts[index], dataset.starts[index + 1])
            image, faces, ignored, error = load_picture(annotations.file(index)), dataset.faces[own], dataset.ignored[own], ""
        if error:
            raise InputError(error)
        pictures.append(draw_faces(draw_faces(image, faces[~ignored]), faces[ignored], colour=IGNORED))
    save_picture(grid(pictures), args.out)
    print("\n".join(describe(annotations, args.min_face)))
    print(f"{len(pictures)} photos in {args.out}: faces green, ignored ones orange")
    if args.split:
        split(annotations, int(args.split[0]), *args.split[1:])


if __name__ == "__main__":
    main()
