"""Photos and their faces, from the disk to a batch: read, augment, collate, load."""

import math
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from support.cache import PhotoCache
from support.coco import MADE, UNLABELLED, Annotations, to_xyxy
from support.pictures import decode_picture, load_picture, open_picture, upright_size
from support.script import InputError, require

CROP_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # None: the whole picture
CROP_TRIES = 40
OWN_SIDES = (0.6, 0.75, 0.9, 1, 1.1, 1.2)  # of views that keep the picture's shape, in its sides
ROWS = 64  # a Batch has a multiple of so many for its faces
# From RGB. The first row, Y, is the grey.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(YIQ)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Pictures, uint8 `[B, 3, H, W]`, as the network takes them: float32 in 0-1."""
    return torch.as_tensor(images).float() / 255


def random_view(rng: np.random.Generator, size: tuple, faces: np.ndarray) -> np.ndarray:
    """Choose the part of a picture to train on: xyxy in its pixels. What lies outside the picture is black.

    It may lie on a canvas of 1-2 times its size. Of that a part is taken that some face overlaps with a
    random least IoU (SSD, Liu et al. 2016, section 2.2). size (width, height); faces `[N, 4]`, xyxy."""
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
        aspect = sides[:, 0] / sides[:, 1]
        shaped = (aspect >= 0.5) & (aspect <= 2)
        corner, end = corner[shaped], (corner + sides)[shaped]
        inside = ((corner[:, None] < centres) & (centres < end[:, None])).all(2)        # [tries, N]
        start = np.maximum(corner[:, None], faces[:, :2])
        common = (np.minimum(end[:, None], faces[:, 2:]) - start).clip(0).prod(2)
        areas = (end - corner).prod(1)[:, None] + (faces[:, 2:] - faces[:, :2]).prod(1)
        good = (inside & (common / (areas - common) >= least)).any(1)
        if good.any():
            return np.concatenate([corner[good.argmax()], end[good.argmax()]])


def own_shape_view(rng: np.random.Generator, size: tuple, faces: np.ndarray) -> np.ndarray:
    """As random_view, in the picture's own shape: faces keep theirs, and more of the small ones are seen."""
    size = np.array(size, float)
    centres = (faces[:, :2] + faces[:, 2:]) / 2
    for _ in range(CROP_TRIES):
        sides = size * OWN_SIDES[rng.integers(len(OWN_SIDES))]
        corner = (size - sides) * rng.random(2)
        if not len(faces) or ((corner < centres) & (centres < corner + sides)).all(1).any():
            return np.concatenate([corner, corner + sides])
    return np.concatenate([np.zeros(2), size])


def distort_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Distort brightness, contrast, saturation and hue of a PIL image, each with probability 0.5.

    brightness +-32 of 255, contrast and saturation x 0.5-1.5, hue +-18 degrees (Howard 2013, with SSD's
    ranges). In YIQ all four are one affine map: one pass over the pixels, one rounding, after the crop."""
    coins = rng.random(4) < 0.5
    if not coins.any():
        return image
    add = rng.uniform(-32, 32) * coins[0]
    contrast, saturation = np.where(coins[1:3], rng.uniform(0.5, 1.5, 2), 1)
    hue = math.radians(rng.uniform(-18, 18)) * coins[3]
    colours = np.eye(3)
    colours[1:, 1:] = saturation * np.array([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    matrix = contrast * np.column_stack([FROM_YIQ @ colours @ YIQ, [add] * 3])          # [3, 4]
    return image.convert("RGB", matrix.ravel().tolist())


def cut_view(pixels: np.ndarray, view: np.ndarray, target: tuple) -> tuple:
    """The part of pixels `[h, w, 3]` that shows `view` (xyxy) at the size `target`: (PIL, view in it)."""
    margin = np.ceil((view[2:] - view[:2]) / target) + 1  # how far the filter reaches
    height, width = pixels.shape[:2]
    left, top = np.clip(view[:2] - margin, 0, (width - 1, height - 1)).astype(int)
    right, bottom = np.clip(np.ceil(view[2:] + margin), (left + 1, top + 1), (width, height)).astype(int)
    image = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    return image, view - (left, top, left, top)


def resize_view(image: Image.Image, view: np.ndarray, width: int, height: int) -> tuple:
    """Resize `view` (xyxy) of an image to `width` x `height`: (what lies inside, its corner in the view)."""
    x1, y1, x2, y2 = view
    w, h = image.size
    sx, sy = width / (x2 - x1), height / (y2 - y1)
    left, top = math.ceil(max(0, -x1 * sx) - 1e-6), math.ceil(max(0, -y1 * sy) - 1e-6)
    right = math.floor(min(width, (w - x1) * sx) + 1e-6)
    bottom = math.floor(min(height, (h - y1) * sy) + 1e-6)
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
    ignored: np.ndarray    # bool `[N]`: neither faces to learn nor background
    crowd: np.ndarray      # bool `[N]`: those of them that are regions with many faces
    size: tuple            # (width, height) of the photo on disk, upright
    labels: int = MADE     # how far its labels can be trusted, as in Annotations
    error: str = ""        # why the photo could not be read; it is then black and has no faces


class FaceDataset(Dataset):
    """The photos of some Annotations at network size. It holds only arrays, which forked workers share.

    Its keys are (index, seed). With seed None the photo comes as it is, else the seed, a sequence of
    integers, fixes the augmentation, which takes the photo from the `cache`, if there is one. Faces with a
    side below `min_face` pixels of the photo, or `min_size` of the network input, are ignored. The share
    `own_shape` of the views keeps the photo's shape. Without `width` and `height` photos keep their sizes."""

    def __init__(self, annotations: Annotations, width: int | None = None, height: int | None = None,
                 min_face: float = 0, min_size: float = 0, own_shape: float = 0,
                 cache: PhotoCache | None = None):
        self.width, self.height, self.folder = width, height, annotations.path.parent
        self.names = np.array([os.fsencode(name) for name in annotations.names] or [b""])
        self.sizes = annotations.sizes
        self.starts = np.searchsorted(annotations.image, np.arange(len(annotations.ids) + 1))
        self.faces = to_xyxy(annotations.xywh)
        self.ignored = annotations.ignored | (annotations.xywh[:, 2:] < min_face).any(1)
        self.crowd = annotations.crowd
        self.labels = annotations.labels
        self.min_size = min_size
        self.own_shape = own_shape
        self.cache = cache

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, key) -> Item:
        index, seed = key
        own, path = slice(*self.starts[index:index + 2]), self.folder / os.fsdecode(self.names[index])
        faces, ignored, crowd = self.faces[own], self.ignored[own], self.crowd[own]
        try:
            if seed is None:  # decoded at full size: evaluation's resize is PIL's on the whole picture
                image = load_picture(path)
                size = image.size
            elif self.cache:
                image, size = self.cache.load(path)
            else:
                image = open_picture(path)
                size = upright_size(image)
            said = tuple(self.sizes[index])
            require(0 in said or said == size,  # else its boxes would be off
                    "{}: is {}x{}, but its json says {}x{}".format(path, *size, *said))
            if seed is None:
                target = (self.width, self.height) if self.width else size
                picture = image.resize(target, Image.Resampling.BILINEAR)
                faces = faces * np.tile(np.divide(target, size), 2)
            else:
                picture, faces, ignored, crowd = self.augment(image, size, faces, ignored, crowd, seed)
        except InputError as error:  # what to do about it is for the caller to say
            black = torch.zeros(3, self.height or 1, self.width or 1, dtype=torch.uint8)
            none = np.zeros((0, 4), np.float32), np.zeros(0, bool), np.zeros(0, bool)
            return Item(index, black, *none, (1, 1), UNLABELLED, str(error))
        ignored = ignored | (faces[:, 2:] - faces[:, :2] < self.min_size).any(1)
        faces = faces.clip(0, picture.size * 2)
        ignored |= (faces[:, 2:] <= faces[:, :2]).any(1)  # outside, which a json without sizes hides
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if seed is None:  # training wants it as it lies in memory, channels last
            pixels = pixels.contiguous()
        return Item(index, pixels, faces.astype(np.float32), ignored, crowd, size, int(self.labels[index]))

    def augment(self, image, size, faces, ignored, crowd, seed):
        """Crop, resize, distort and perhaps flip an opened picture: (picture, faces, ignored, crowd)."""
        rng, target = np.random.default_rng(seed), (self.width, self.height)
        choose = own_shape_view if self.own_shape and rng.random() < self.own_shape else random_view
        view = choose(rng, size, faces[~ignored])
        scale = target / (view[2:] - view[:2])
        if self.cache:
            reduced = np.array(image.shape[1::-1] * 2) / (size * 2)
            image, view_in_image = cut_view(image, view * reduced, target)
        else:
            image = decode_picture(image, max(scale))
            reduced = np.array(image.size * 2) / (size * 2)  # a JPEG may have been decoded smaller
            view_in_image = view * reduced
        inside, corner = resize_view(image, view_in_image, *target)
        picture = distort_colours(inside, rng)
        if picture.size != target:  # the view reaches beyond the photo
            canvas = Image.new("RGB", target)
            canvas.paste(picture, corner)
            picture = canvas
        faces = (faces - np.tile(view[:2], 2)) * np.tile(scale, 2)
        centres = (faces[:, :2] + faces[:, 2:]) / 2
        kept = ((centres > 0) & (centres < target)).all(1)
        kept |= crowd & ((faces[:, 2:] > 0) & (faces[:, :2] < target)).all(1)  # also what is seen of a crowd
        faces, ignored, crowd = faces[kept], ignored[kept], crowd[kept]
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            faces[:, [0, 2]] = target[0] - faces[:, [2, 0]]
        return picture, faces, ignored, crowd


@dataclass
class Batch:
    """B photos and all faces on them, T rows: a multiple of ROWS, on a GPU a power of two, for few graphs.

    The rows beyond the faces are empty boxes, which no anchor overlaps, so they change nothing."""
    images: torch.Tensor   # uint8 `[B, 3, H, W]`, RGB
    faces: torch.Tensor    # float32 `[T, 4]`, xyxy in pixels of the network input
    ignored: torch.Tensor  # bool `[T]`
    crowd: torch.Tensor    # bool `[T]`
    image: torch.Tensor    # int64 `[T]`, each face's place in the batch
    has_faces: torch.Tensor  # bool `[B]`: photos with faces or regions to ignore
    labels: torch.Tensor   # uint8 `[B]`: how far their labels can be trusted, as in Annotations
    index: list = ()       # B indices of the photos in their Annotations
    sizes: list = ()       # B sizes (width, height) on disk
    errors: dict = field(default_factory=dict)  # {index: one line} of the photos that could not be read

    TENSORS = ("images", "faces", "ignored", "crowd", "image", "has_faces", "labels")

    def tensors(self) -> list:
        """The tensors alone, in the order of TENSORS."""
        return [getattr(self, name) for name in self.TENSORS]

    def to(self, device: str) -> "Batch":
        """Copy the tensors to `device`, without waiting where they are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory. The DataLoader calls this."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change):
        return replace(self, **{name: change(getattr(self, name)) for name in self.TENSORS})


def collate(items: list[Item], few_shapes: bool = False) -> Batch:
    """Make a Batch of Items. `few_shapes`: its rows for faces are a power of two."""
    counts = torch.tensor([len(item.faces) for item in items])
    total = int(counts.sum())
    rows = max(1, math.ceil(total / ROWS)) * ROWS
    if few_shapes:
        rows = 1 << (rows - 1).bit_length()

    def filled(values):
        return torch.cat([values, values.new_zeros(rows - total, *values.shape[1:])])

    def joined(name):
        return filled(torch.from_numpy(np.concatenate([getattr(item, name) for item in items])))
    return Batch(torch.stack([item.picture for item in items]),
                 joined("faces"), joined("ignored"), joined("crowd"),
                 filled(torch.arange(len(items)).repeat_interleave(counts)), counts > 0,
                 torch.tensor([item.labels for item in items], dtype=torch.uint8),
                 [item.index for item in items], [item.size for item in items],
                 {item.index: item.error for item in items if item.error})


class TrainBatches:
    """The batches of an epoch for one process. They depend on seed, epoch and place alone: any can be redone.

    An epoch is `repeat` passes over n photos in one shuffled order, filled up to a multiple of `world`
    processes. Process `rank` takes every world-th photo, so the processes' k-th batches are one process's
    k-th batch of `world` times the size. Set `epoch` first; `skip` leaves out what is done of it."""

    def __init__(self, n, batch, repeat=1, seed=0, rank=0, world=1, augment=True):
        self.n, self.batch, self.repeat, self.seed = n, batch, repeat, seed
        self.rank, self.world, self.augment = rank, world, augment
        self.epoch = self.start = 0
        own = math.ceil(n * repeat / world)
        self.total = math.ceil(own / batch)
        self.last = own - (self.total - 1) * batch  # photos of the last batch

    def __len__(self):
        return self.total - self.start

    def skip(self, done: int) -> int:
        """Begin the epoch after `done` photos, at the last whole batch there: returns the photos that skips.

        If `done` was counted in batches of another size, photos may come again, but none is left out."""
        whole = self.batch * self.world
        self.start = self.total if done >= self.n * self.repeat else done // whole
        return self.start * whole

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n * self.repeat) % self.n
        places = np.arange(self.rank, math.ceil(len(order) / self.world) * self.world, self.world)
        for first in range(self.start * self.batch, len(places), self.batch):
            own = [int(place) for place in places[first:first + self.batch]]
            yield [(int(order[place % len(order)]), (self.seed, self.epoch, place) if self.augment else None)
                   for place in own]


def eval_batches(n: int, batch: int, rank: int = 0, world: int = 1) -> list:
    """The batches of process `rank`: all processes' show each of n photos once, as it is.

    Cut before they are dealt out: a photo's company, and so its detections, are the same for any `world`."""
    return [[(index, None) for index in range(first, min(first + batch, n))]
            for first in range(rank * batch, n, world * batch)]


def make_loader(dataset: FaceDataset, batches, workers: int, device: str = "cpu") -> DataLoader:
    """A DataLoader of Batches. Its `workers` live as long as it does."""
    on_gpu = torch.device(device).type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, collate_fn=partial(collate, few_shapes=on_gpu),
                      num_workers=workers, worker_init_fn=_outlive_signals, persistent_workers=workers > 0,
                      pin_memory=on_gpu)


def _outlive_signals(_):
    """Leave signals to the main process, which saves first. Workers end when it asks them to, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # If it goes while multiprocessing's thread hands it a batch, that thread would print a traceback.
    report = sys.excepthook
    sys.excepthook = lambda kind, *more: issubclass(kind, (EOFError, ConnectionError)) or report(kind, *more)
