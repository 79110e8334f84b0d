"""The detector as a library: load any model, find the faces on a picture or on a whole dataset.

    from detector import detect, load_detector
    detector = load_detector()                                   # the shipped network, or a .pth, .onnx, .xml
    for x1, y1, x2, y2, score in detect(detector, "photo.jpg"):  # best first; PIL images and arrays work too
        ...

Exported models run without PyTorch (requirements-run.txt); the shipped network is then its .onnx.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.coco import Annotations, Detections, to_xywh
from support.pictures import load_picture
from support.runtimes import SUFFIXES, open_network
from support.script import InputError, bad_values, first_line, require

WITH_TORCH = find_spec("torch") is not None
if WITH_TORCH:
    import torch
    from torchvision.ops import nms

    from anchors import decode, make_anchors
    from data import FaceDataset, eval_batches, make_loader, to_input
    from model import SSD, Config, folded, read_checkpoint, rebuild
    from support.distributed import choose_device, gather

SCORE, NMS_IOU, TOP = 0.02, 0.45, 200  # the reference's: least score, NMS threshold, most faces on a picture
WEIGHTS = Path(__file__).resolve().parent / "weights"
MODEL = str(WEIGHTS / ("face_ssd300.pth" if WITH_TORCH else "face_ssd300.onnx"))  # the shipped network
ENOUGH = 800        # best anchors of a picture: NMS mostly finds TOP faces among them, and is slow on all
TILE_BATCH = 16     # tiles that go through the network at once, where it has an input size
TILE_BORDER = 0.02  # of a tile's side: a box that ends this near to an inner border may be cut by it
TILE_COVERED = 0.5  # of the smaller box: a cut box and another that share more are one face


def need_torch(what: str) -> None:
    """Raise InputError where PyTorch is not installed."""
    require(WITH_TORCH, f"{what} needs PyTorch, which is not installed: pip install -r requirements.txt")


def postprocess(logits: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor,
                score: float = SCORE) -> list[torch.Tensor]:
    """Make faces of raw outputs: logits `[B, A, 2]`, offsets `[B, A, 4]`, anchors `[A, 4]`.

    Returns B tensors `[K, 5]` on the CPU: xyxy in pixels of the network input and the score, best first, at
    most 200, after NMS. Boxes may reach outside the input; `to_picture` clips them."""
    scores, order = logits.float().softmax(-1)[..., 1].sort(descending=True, stable=True)       # [B, A]
    boxes = decode(offsets.float(), anchors).gather(1, order[..., None].expand(-1, -1, 4))      # [B, A, 4]
    found = []
    for own, place, likely in zip(scores, boxes, (scores > score).sum(1).tolist()):
        best = min(likely, ENOUGH)
        kept = nms(place[:best], own[:best], NMS_IOU)
        if len(kept) < TOP and best < likely:
            kept = nms(place[:likely], own[:likely], NMS_IOU)
        found.append(torch.cat([place[kept], own[kept, None]], 1)[:TOP])
    return list(torch.cat(found).cpu().split([len(faces) for faces in found]))  # from a GPU in one copy


def to_picture(faces: np.ndarray, input_size: tuple, picture_size: tuple) -> np.ndarray:
    """Scale faces `[K, 5]` from pixels of the input to the picture's, clipped; sizes are (width, height)."""
    faces = np.array(faces, np.float64)
    faces[:, :4] *= np.tile(np.divide(picture_size, input_size), 2)
    faces[:, :4] = faces[:, :4].clip(0, np.tile(picture_size, 2))
    return faces


class TorchDetector:
    """A network with its postprocessing: uint8 pictures `[B, 3, H, W]`, RGB, to B arrays `[K, 5]`.

    Faces are as in `postprocess`. `size` (width, height) may be another than the network's, anchors stay."""

    threshold = None  # `check_threshold`'s dict, where the model has one for this size and these tiles

    def __init__(self, model: SSD, size: tuple | None = None, device: str = "cpu", rounded: bool = True):
        self.model, self.device = folded(model).to(device), device
        self.size = size or model.config.input_size
        self.anchors = make_anchors(model.config, self.size, rounded).to(device)

    def __call__(self, images: np.ndarray | torch.Tensor) -> list[np.ndarray]:
        with torch.inference_mode():
            images = torch.as_tensor(images).to(self.device, non_blocking=True)
            logits, offsets = self.model(to_input(images.contiguous(memory_format=torch.channels_last)))
            return [faces.numpy() for faces in postprocess(logits, offsets, self.anchors)]


class ExportedDetector:
    """An exported network, used as a TorchDetector is. Its metadata: see export.py's `describe`."""

    threshold = None

    def __init__(self, network, metadata: dict):
        self.network, self.head = network, metadata["head"]
        self.size = tuple(network.shape[:1:-1])  # (width, height)
        self.bgr = ("RGB", "BGR").index(metadata["colour"])
        self.white = {"0-1": 1, "0-255": 255}[metadata["value_range"]]
        if self.head not in ("generic", "detection_output", "raw"):
            raise ValueError(f"head {self.head!r}")
        if self.head == "raw":
            self.anchors = make_anchors(Config(*self.size, anchors=json.loads(metadata["anchors"])))

    def __call__(self, images: np.ndarray | torch.Tensor) -> list[np.ndarray]:
        images = np.asarray(images)
        if self.bgr:
            images = images[:, ::-1]
        images = np.ascontiguousarray(images, np.float32) / np.float32(255 / self.white)
        if self.head == "raw":
            logits, offsets = map(torch.from_numpy, self.network(images))
            return [faces.numpy() for faces in postprocess(logits, offsets, self.anchors)]
        return [self._faces(self.network(image[None])[0]) for image in images]

    def _faces(self, faces):
        """Make faces `[K, 5]`, best first, of the output for one picture."""
        if faces.shape[-1] != (5 if self.head == "generic" else 7):
            raise ValueError(f"its output is {list(faces.shape)}")
        if self.head == "detection_output":  # [1, 1, N, 7]: image, label, score, box in 0-1
            rows = faces[0, 0]
            rows = rows[(rows[:, 0] == 0) & (rows[:, 1] == 1)]  # after the last face image is -1
            faces = np.concatenate([rows[:, 3:] * np.float32(self.size * 2), rows[:, 2:3]], 1)
        return faces[np.argsort(-faces[:, 4], kind="stable")]


def load_detector(path: str | Path = MODEL, size: tuple | None = None, device: str | None = None,
                  colour: str | None = None, white: int | None = None, tiles: tuple | None = None):
    """Load a model file (.pth, .onnx, .xml) as a TorchDetector or an ExportedDetector.

    `size` (width, height) overrides a checkpoint's; `colour` (rgb, bgr) and `white` (1, 255) say what a model
    of others takes; `tiles` (side, overlap) makes it a TiledDetector. Raises InputError."""
    require(Path(path).is_file(), f"{path}: no such model; train.py makes .pth, export.py .onnx and .xml")
    if size:
        need_torch("--size")
    if Path(path).suffix in SUFFIXES:
        network = open_network(path)
        entry = network.metadata.get("threshold")
        detector = _exported(network, path, colour, white)
        require(not size or size == detector.size,
                "{}: takes {}x{}; its size is fixed, see export.py --size".format(path, *detector.size))
    else:
        need_torch(f"{path}: a checkpoint")
        require(not (colour or white), f"{path}: a checkpoint takes RGB in 0-1, without --colour and --range")
        with bad_values():
            content = read_checkpoint(path)
            detector = TorchDetector(rebuild(content, path), size, choose_device(device))
        entry = content.get("threshold")
    entry = check_threshold(entry, path)
    fits = entry and detector.size == tuple(entry["size"]) and entry["tiles"] == (tiles and list(tiles))
    if tiles:
        detector = TiledDetector(detector, *tiles)
    detector.threshold = entry if fits else None
    return detector


def _exported(network, path, colour, white):
    """The detector of an exported network. What is known of it must be true, on a black picture."""
    metadata = network.metadata
    require("head" not in metadata or not (colour or white),
            f"{path}: says itself what it takes; leave --colour and --range out")
    if "head" not in metadata:
        require(colour and white, f"{path}: was not written by export.py; say what it takes with "
                "--colour rgb|bgr and --range 1|255")
        metadata = {"head": "detection_output", "colour": colour.upper(), "value_range": f"0-{white}"}
    if metadata["head"] == "raw":
        need_torch(f"{path}: head raw")
    try:
        detector = ExportedDetector(network, metadata)
        detector(np.zeros((1, 3, *detector.size[::-1]), np.uint8))
    except Exception as error:  # runtimes have exceptions of their own
        raise InputError(f"{path}: its inputs or outputs are not what its metadata says, or --colour and "
                         f"--range ({first_line(error)})") from None
    return detector


def check_threshold(entry: dict | str | None, path) -> dict | None:
    """The threshold that a model file holds, if any: a dict, or JSON in an exported file's metadata.

    `score`; the `size` [width, height] of the input and the `tiles` ([side, overlap] or None) that it was
    measured with; `target`, such as "precision=0.95"; and more. Raises InputError if it makes no sense."""
    if entry is None:
        return None
    with suppress(KeyError, TypeError, ValueError):
        entry = json.loads(entry) if isinstance(entry, str) else entry
        width, height = entry["size"]
        side, overlap = (1, 0) if entry["tiles"] is None else entry["tiles"]
        if (0 <= entry["score"] <= 1 <= min(width, height, side) and overlap >= 0
                and isinstance(entry["target"], str)):
            return entry
    raise InputError(f"{path}: its threshold is damaged; choose it anew with python -m tools.threshold")


def to_pixels(detector, image: Image.Image) -> np.ndarray:
    """A picture (PIL, RGB) as the detector takes it: uint8 `[3, H, W]`, whole where it has no `size`."""
    resized = image.resize(detector.size or image.size, Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def find(detector, pixels: list[np.ndarray], sizes: list[tuple]) -> list[np.ndarray]:
    """Find the faces on pictures, of which `to_pixels` made `pixels`: a list of `[K, 5]` in their pixels."""
    if detector.size and pixels:
        found = detector(np.stack(pixels))
    else:
        found = [detector(own[None])[0] for own in pixels]
    return [to_picture(faces, detector.size or size, size) for faces, size in zip(found, sizes)]


def detect(detector, image: str | Path | Image.Image | np.ndarray | list) -> np.ndarray | list[np.ndarray]:
    """Find the faces on one picture: float64 `[K, 5]`, xyxy in its pixels and the score, best first.

    `image` is a file, a PIL image, or an RGB array uint8 `[H, W, 3]`; a list of them gives a list. Doubtful
    faces are there too: keep those above 0.4, for example. Raises InputError for what is no picture."""
    images = [_as_picture(one) for one in (image if isinstance(image, list) else [image])]
    found = find(detector, [to_pixels(detector, one) for one in images], [one.size for one in images])
    return found if isinstance(image, list) else found[0]


def _as_picture(image):
    """What `detect` takes as a picture (PIL, RGB)."""
    if isinstance(image, (str, Path)):
        return load_picture(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size and image.shape[2:] == (3,):
        image = Image.fromarray(image)
    require(isinstance(image, Image.Image) and min(image.size), f"{type(image).__name__} "
            f"{getattr(image, 'shape', '')}: a file, a PIL image or an RGB array uint8 [H, W, 3] is expected")
    return image.convert("RGB")


def detect_all(detector, annotations: Annotations, batch_size: int | None = None, workers: int = 2,
               rank: int = 0, processes: int = 1, check=None) -> tuple[Detections, dict]:
    """Find the faces on all photos of some Annotations.

    Returns Detections sorted by photo, and {index: line} of photos that cannot be read; whole in each of
    several processes. `check()` is called before each batch, as often in every process."""
    device = getattr(detector, "device", "cpu")
    batch_size = batch_size or (64 if device.startswith("cuda") else 16)
    if not detector.size:  # whole pictures go one at a time
        batch_size = 1
    batches = eval_batches(len(annotations.ids), batch_size, rank, processes)
    loader = make_loader(FaceDataset(annotations, *(detector.size or ())), batches, workers, device)
    found, errors = {}, {}
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=True if rank else None):
        if check:
            check()
        for index, size, faces in zip(batch.index, batch.sizes, detector(batch.images)):
            found[index] = to_picture(faces, detector.size or size, size)
        errors |= batch.errors
    if check and len(batches) < len(eval_batches(len(annotations.ids), batch_size, 0, processes)):
        check()  # the first process has a batch more
    found, errors = gather(found), gather(errors)
    faces = {index: found[index] for index in sorted(found) if index not in errors}
    stacked = np.concatenate([np.zeros((0, 5)), *faces.values()])
    image = np.repeat(np.array(list(faces), np.int64), [len(own) for own in faces.values()])
    return Detections(image, to_xywh(stacked[:, :4]), stacked[:, 4]), errors


def cut(size: tuple, side: int, overlap: int) -> np.ndarray:
    """Lay tiles over a picture of `size` (width, height): int `[V, 4]`, xyxy, first the whole picture.

    Neighbours share `overlap` pixels or more. A picture no larger than a tile is the only view."""
    def starts(length):
        count = 1 + max(0, math.ceil((length - side) / (side - overlap)))
        return np.linspace(0, max(0, length - side), count).round().astype(int)

    width, height = np.minimum(size, side)
    tiles = [(x, y, x + width, y + height) for y in starts(size[1]) for x in starts(size[0])]
    return np.array([(0, 0, *size), *(tiles if len(tiles) > 1 else [])])


def merge(faces: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Merge the faces `[K, 5]` of all views so that each counts once: `[N, 5]`, best first.

    `part` `[K]` marks those that may be cut by a tile's border: half a face has too small an IoU with the
    whole for NMS. So it is dropped where it lies mostly inside another, which has the better score then."""
    whole = torch.from_numpy(faces[~part])
    merged = whole[nms(whole[:, :4], whole[:, 4], NMS_IOU)].numpy()
    wholes = len(merged)
    parts = faces[part]
    for face in parts[np.argsort(-parts[:, 4], kind="stable")]:
        shared = np.minimum(merged[:, 2:4], face[2:4]) - np.maximum(merged[:, :2], face[:2])
        area = (face[2:4] - face[:2]).prod()
        areas = np.full(len(merged), area)
        areas[wholes:] = np.minimum(area, (merged[wholes:, 2:4] - merged[wholes:, :2]).prod(1))
        covered = shared.clip(0).prod(1) / areas.clip(1e-9)
        if covered.max(initial=0) > TILE_COVERED:
            best = covered.argmax()
            merged[best, 4] = max(merged[best, 4], face[4])
        else:
            merged = np.concatenate([merged, face[None]])
    return merged[np.argsort(-merged[:, 4], kind="stable")]


class TiledDetector:
    """As any detector, on pictures and on tiles of `side` pixels that share `overlap`; K is unlimited."""

    size = None  # it takes pictures of any
    threshold = None

    def __init__(self, detector, side: int, overlap: int):
        need_torch("--tiles")
        self.detector, self.side, self.overlap = detector, side, overlap

    def __call__(self, images: np.ndarray | torch.Tensor) -> list[np.ndarray]:
        return [self._faces(Image.fromarray(np.asarray(pixels).transpose(1, 2, 0))) for pixels in images]

    def _faces(self, image):
        """The faces `[K, 5]` on one picture (PIL), in its pixels."""
        views = cut(image.size, self.side, self.overlap)
        faces, parts = [np.zeros((0, 5))], [np.zeros(0, bool)]
        for first in range(0, len(views), TILE_BATCH):
            own = views[first:first + TILE_BATCH]
            for view, found in zip(own, detect(self.detector, [image.crop(view.tolist()) for view in own])):
                found[:, :4] += np.tile(view[:2], 2)
                faces.append(found)
                # A face is a part if it ends at a border of its view that is no border of the picture.
                margin = TILE_BORDER * (view[2:] - view[:2])
                begins_there = (found[:, :2] < view[:2] + margin) & (view[:2] > 0)
                ends_there = (found[:, 2:4] > view[2:] - margin) & (view[2:] < image.size)
                parts.append((begins_there | ends_there).any(1))
        return merge(np.concatenate(faces), np.concatenate(parts))
