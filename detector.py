"""The detector as a library: load any model, find the faces on a picture or on a whole dataset.

    from detector import detect, load_detector
    detector = load_detector()                                   # the shipped network, or a .pth, .onnx, .xml
    for x1, y1, x2, y2, score in detect(detector, "photo.jpg"):  # best first; PIL images and arrays work too
        ...
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import clip_boxes_to_image, nms
from tqdm import tqdm

from anchors import decode, make_anchors
from support.coco import Annotations, Detections, to_xywh
from data import FaceDataset, eval_batches, make_loader, to_image, to_input, to_tensor
from support.distributed import choose_device, gather
from model import SSD, Config, read_checkpoint, rebuild
from support.pictures import load_picture
from support.runtimes import SUFFIXES, open_network
from support.script import InputError, bad_values, first_line

SCORE, NMS_IOU, TOP = 0.02, 0.45, 200  # the reference's: least score, NMS threshold, most faces on a picture
MODEL = str(Path(__file__).resolve().parent / "weights/face_ssd300.pth")  # the shipped network
TILE_BATCH = 16      # tiles that go through the network at once, where it has an input size
TILE_BORDER = 0.02   # of a tile's side: a box that ends this near to an inner border may be cut by it
TILE_COVERED = 0.5   # of the smaller box: a cut box and another that share more are one face


def postprocess(logits: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor,
                score: float = SCORE) -> list[torch.Tensor]:
    """Make faces of raw outputs: logits `[B, A, 2]`, offsets `[B, A, 4]`, anchors `[A, 4]`.

    Returns B tensors `[K, 5]`: xyxy in pixels of the network input and the score, best first. Softmax score
    above `score`, NMS at IoU 0.45, at most 200. Boxes may reach outside the input; `to_picture` clips them.
    """
    scores, boxes = logits.float().softmax(-1)[..., 1], decode(offsets.float(), anchors)  # [B, A], [B, A, 4]
    faces = []
    for own_scores, own_boxes in zip(scores, boxes):
        likely = own_scores > score
        own_scores, own_boxes = own_scores[likely], own_boxes[likely]
        kept = nms(own_boxes, own_scores, NMS_IOU)[:TOP]
        faces.append(torch.cat([own_boxes[kept], own_scores[kept, None]], 1))
    return faces


def to_picture(faces: np.ndarray, input_size: tuple, picture_size: tuple) -> np.ndarray:
    """Scale faces `[K, 5]` from pixels of the network input to pixels of the picture, and clip them to it.

    Returns float64 `[K, 5]`. Both sizes are (width, height). Boxes change from one to the other only here.
    """
    scale = np.tile(np.divide(picture_size, input_size), 2)
    boxes = torch.from_numpy(np.asarray(faces[:, :4], np.float64) * scale)
    boxes = clip_boxes_to_image(boxes, picture_size[::-1]).numpy()
    return np.concatenate([boxes, np.asarray(faces[:, 4:], np.float64)], 1)


class TorchDetector:
    """A network with its postprocessing: uint8 pictures `[B, 3, H, W]`, RGB, to B arrays `[K, 5]`.

    Faces are as `postprocess` has them. `size` (width, height) may differ from the network's own. A larger
    one finds smaller faces, since anchors keep their pixels. `threshold` is the one its file holds, a dict
    as `check_threshold` has it, or None; it holds for the size that it names.
    """

    threshold = None

    def __init__(self, model: SSD, size: tuple | None = None, device: str = "cpu", rounded: bool = True):
        self.model, self.device = model.to(device).eval(), device
        self.size = size or (model.config.input_width, model.config.input_height)
        self.anchors = make_anchors(model.config, self.size, rounded).to(device)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> list[np.ndarray]:
        logits, offsets = self.model(to_input(images.to(self.device)))
        return [faces.cpu().numpy() for faces in postprocess(logits, offsets, self.anchors)]


class ExportedDetector:
    """An exported network with its input convention; it is used as a TorchDetector is.

    `size` is (width, height) of the pictures it takes. It is None for models with embedded preprocessing:
    these take whole pictures, one at a time. `colour` is RGB or BGR, `white` the value of white in the
    input (1 or 255), `head` one of export.py's. `threshold` is as in TorchDetector.
    """

    threshold = None

    def __init__(self, network, colour: str, white: int, head: str):
        self.network, self.colour, self.white, self.head = network, colour, white, head
        self.size = None if network.uint8 else tuple(network.shape[:1:-1])
        if head not in ("generic", "detection_output", "raw"):
            raise ValueError(f"no head {head!r}")
        if head == "raw":
            config = Config(*self.size, anchors=json.loads(network.metadata["anchors"]))
            self.anchors = make_anchors(config)

    def __call__(self, images: torch.Tensor) -> list[np.ndarray]:
        images = images.flip(1) if self.colour == "BGR" else images
        if self.size is None:
            return [
                self._faces(self.network(image[None].permute(0, 2, 3, 1).contiguous().numpy()), image.shape)
                for image in images]
        images = (to_input(images) if self.white == 1 else images.float()).contiguous()
        if self.head == "raw":
            logits, offsets = map(torch.from_numpy, self.network(images.numpy()))
            return [faces.numpy() for faces in postprocess(logits, offsets, self.anchors)]
        return [self._faces(self.network(image[None].numpy()), image.shape) for image in images]

    def _faces(self, outputs, shape):
        """Make faces `[K, 5]`, best first, of the outputs for one picture of `shape` (3, H, W)."""
        if self.head == "generic":
            faces = outputs[0]
        else:
            rows = outputs[0].reshape(-1, 7)  # image, label, score, box in 0-1; no faces at the end: image -1
            rows = rows[(rows[:, 0] == 0) & (rows[:, 1] == 1)]
            faces = np.concatenate([rows[:, 3:] * np.float32(shape[:0:-1] * 2), rows[:, 2:3]], 1)
        return faces[np.argsort(-faces[:, 4], kind="stable")]


def load_detector(path: str | Path = MODEL, size: tuple | None = None, device: str | None = None,
                  colour: str | None = None, white: int | None = None, threads: int = 0):
    """Load a model file (.pth, .onnx, .xml) as a detector: a TorchDetector or an ExportedDetector.

    Without `path` it is the network that ships with this repository. `size` (width, height) overrides a
    checkpoint's input size. `colour` (rgb or bgr) and `white` (1 or 255) say what an exported model of
    others takes. `threads` limits an exported model's. Raises InputError.
    """
    if not Path(path).is_file():
        hint = ("train one (python train.py makes runs/face/best.pth) or name one with --model"
                if str(path) == MODEL else "name a checkpoint with --model")
        raise InputError(f"{path}: no such model; {hint}")
    if Path(path).suffix in SUFFIXES:
        return _load_exported(path, size, colour, white, threads)
    if colour or white:
        raise InputError(f"{path}: a checkpoint's input is known; "
                         "--colour and --range are for exported models of others")
    with bad_values():
        content = read_checkpoint(path)
        model = rebuild(content, content.get("ema") or content["state_dict"], path)
        detector = TorchDetector(model, size, choose_device(device))
    detector.threshold = check_threshold(content.get("threshold"), path)
    return detector


def _load_exported(path, size, colour, white, threads):
    """The detector of an .onnx or .xml file: what it takes is in its metadata, or the caller says it."""
    network = open_network(path, threads)
    metadata, shape = network.metadata, network.shape
    if "head" in metadata:
        if colour or white:
            raise InputError(f"{path}: says itself what it takes ({metadata.get('colour')}, "
                             f"{metadata.get('value_range')}); leave --colour and --range out")
        try:  # on a black picture: what the metadata says must be true
            ranges, layouts = {"0-1": 1, "0-255": 255}, ("RGB", "BGR")
            colour, white = layouts[layouts.index(metadata["colour"])], ranges[metadata["value_range"]]
            if not network.uint8 and (len(shape) != 4 or shape[1] != 3 or None in shape[2:]):
                raise ValueError(f"input {shape}")
            detector = ExportedDetector(network, colour, white, metadata["head"])
            faces, = detector(torch.zeros(1, 3, *(detector.size or (64, 48))[::-1], dtype=torch.uint8))
            if faces.ndim != 2 or faces.shape[1] != 5:
                raise ValueError(f"faces of shape {list(faces.shape)}")
        except Exception as error:  # runtimes have exceptions of their own
            raise InputError(f"{path}: its inputs or outputs are not what its metadata says "
                             f"({first_line(error)})") from None
        detector.threshold = check_threshold(metadata.get("threshold"), path)
    else:
        if not colour or not white:
            raise InputError(f"{path}: was not written by export.py; say what it takes with "
                             "--colour rgb|bgr and --range 1|255")
        if len(shape) != 4 or shape[1] != 3 or None in shape[2:] or network.uint8:
            raise InputError(f"{path}: its input is {shape}, float [1, 3, H, W] expected")
        detector = ExportedDetector(network, colour.upper(), white, "detection_output")
        outputs = network(np.zeros([1, *shape[1:]], np.float32))
        if len(outputs) != 1 or outputs[0].shape[-1] != 7:
            raise InputError(f"{path}: its outputs are {[list(o.shape) for o in outputs]}, "
                             "one [1, 1, N, 7] expected")
    if size and size != detector.size:
        takes = (
            "takes pictures of any size" if detector.size is None else "takes {}x{}".format(*detector.size))
        raise InputError(f"{path}: {takes}; an exported model's size is fixed, see export.py --size")
    return detector


def check_threshold(entry: dict | str | None, path) -> dict | None:
    """The threshold that a model file holds, if any: a dict, or JSON in an exported file's metadata.

    `score`; `size` [width, height] of the network input and `tiles` ([side, overlap], None: whole photos)
    with which it was measured; `target`, such as "precision=0.95"; and more plain values. Raises InputError
    if it makes no sense.
    """
    def numbers(*values):
        return all(type(value) in (int, float) and abs(value) < 1e9 for value in values)
    if entry is None:
        return None
    try:
        entry = json.loads(entry if isinstance(entry, str) else json.dumps(entry))  # plain values, or refused
        (width, height), tiles = entry["size"], entry["tiles"]
        side, overlap = (1, 0) if tiles is None else tiles
        if (numbers(entry["score"], width, height, side, overlap) and min(width, height, side) >= 1
                and isinstance(entry["target"], str)):
            return entry
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise InputError(f"{path}: its threshold is damaged; choose it anew with "
                     "python -m tools.threshold ... --save MODEL.pth NEW.pth")


def to_pixels(detector, image: Image.Image) -> torch.Tensor:
    """A picture (PIL, RGB) as the detector takes it: uint8 `[3, H, W]`, whole where it has no `size`."""
    return to_tensor(image.resize(detector.size or image.size, Image.Resampling.BILINEAR))


def detect(detector, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Find the faces on one picture: `[K, 5]`, xyxy in its pixels and the score, best first.

    `image` is a file, a PIL image, or an RGB array uint8 `[H, W, 3]`. All 200 best are there, the doubtful
    too: keep those of a score above, say, 0.4. Raises InputError if a file cannot be read.
    """
    if isinstance(image, (str, Path)):
        image = load_picture(image)
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    faces, = detector(to_pixels(detector, image)[None])
    return to_picture(faces, detector.size or image.size, image.size)


def detect_all(detector, annotations: Annotations, batch_size: int = 16, workers: int = 2, rank: int = 0,
               processes: int = 1, check=None) -> tuple[Detections, dict]:
    """Find the faces on all photos of some Annotations.

    Returns Detections sorted by photo, and {index: line} of the photos that cannot be read. Several
    processes share the photos. Each gets the whole result, the same as one process would. `check()` is
    called before each batch, as often in every process.
    """
    # A detector without a size takes whole pictures, one at a time.
    batch_size = batch_size if detector.size else 1
    batches = eval_batches(len(annotations.ids), batch_size, rank, processes)
    loader = make_loader(FaceDataset(annotations, *(detector.size or ())), batches, workers)
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
    margin = TILE_BORDER * (view[2:] - view[:2])
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
        if covered.max(initial=0) > TILE_COVERED:
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
        batch = TILE_BATCH if self.detector.size else 1
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
