"""The files around the detector: COCO annotations and results, read with checks and written whole.

Nothing here imports torch, so that a wrong file is reported before anything slow is loaded. Boxes stay `xywh` as in the
files (x, y, width, height in pixels, float64): the two evaluation protocols are defined on them to the last digit.
"""
import argparse
import functools
import json
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np


CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}  # file names may hold them
TROUBLE = {  # what libraries say when the machine gives up, and our line for it
    "DataLoader worker": "a loading process was killed, perhaps for want of memory: lower --workers or --batch-size",
    "out of memory": "out of memory: lower --batch-size or --size",
    "allocate": "out of memory: lower --batch-size, --size or --workers"}


class InputError(Exception):
    """Bad input from outside. The message is one line: which file, which entry, what to do."""


def command(main):
    """Decorate a script's `main(argv=None)`: bad input becomes one line on stderr and exit code 2.

    So does a machine that gives up (killed workers, no memory). Ctrl-C exits with 130 and SIGTERM with 143, as shells
    expect; a reader that closes the pipe (`| head`) is no error. Under torchrun each process reports its own trouble,
    but what all of them met before they joined is reported once.
    """
    def fail(text):
        distributed = sys.modules.get("torch.distributed")
        if os.environ.get("RANK", "0") == "0" or distributed and distributed.is_initialized():
            print(f"{Path(sys.modules[main.__module__].__file__).name}: {text.translate(CONTROL)}", file=sys.stderr)
        sys.exit(2)

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        except ValueError:
            pass  # only the main thread may set handlers; elsewhere SIGTERM keeps its default
        try:
            return main(argv)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush at exit
            sys.exit(0)
        except (InputError, OSError) as error:
            text = str(error)
            if isinstance(error, OSError) and error.strerror:  # without "[Errno 28]", with the file
                text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            fail(text)
        except (RuntimeError, MemoryError) as error:
            said = "out of memory" if isinstance(error, MemoryError) else str(error)
            known = [line for words, line in TROUBLE.items() if words in said]
            if not known:  # a bug of ours
                raise
            fail(known[0])
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
    return wrapped


@contextmanager
def bad_values():
    """Turn ValueError (how model.py, which knows nothing of this file, reports bad files) into InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def parse_size(text):
    """`S` or `WxH` (as 320x240) to (width, height) in pixels, for argparse."""
    try:
        width, height = (int(side) for side in (text.lower().split("x") if "x" in text.lower() else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, S or WxH expected") from None
    if not 16 <= min(width, height) <= max(width, height) <= 8192:
        raise argparse.ArgumentTypeError(f"{text!r}: sides between 16 and 8192 pixels expected")
    return width, height


def parse_sides(text):
    """`WxH` in fractions of pixels, as 9.4x15, to (width, height), for argparse."""
    try:
        width, height = (float(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of sides, WxH expected") from None
    return width, height


def parse_picture(text):
    """The name of a picture to write, for argparse: its ending must be of a format that can be."""
    if Path(text).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a picture, something like {Path(text).stem}.png expected")
    return text


class FlagFileParser(argparse.ArgumentParser):
    """An argument parser that takes `@FILE`: flags as on the command line, several on a line, with # comments."""

    def __init__(self, **more):
        super().__init__(fromfile_prefix_chars="@", **more)

    def convert_arg_line_to_args(self, line):
        """argparse's hook. From Python 3.12 on, bytes that are no text arrive as surrogates, which encode() refuses."""
        return shlex.split(line.encode().decode(), comments=True)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, which leaves such files to fail as they may: no text, open quotes, a file that names itself."""
        try:
            return super().parse_known_args(args, namespace)
        except (ValueError, RecursionError) as error:
            self.error(f"a file of flags cannot be read: {error}")


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    A reader sees the old file or the new one, never half of either.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file is to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # libraries choose the format by suffix
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        raise InputError(f"{path}: {error.strerror or error}; not written, what was there is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write `content` as JSON, whole or not at all; NaN and infinity are refused (they are not JSON)."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8")


def read_json(path):
    """The content of a JSON file. Raises InputError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # -sig: a byte order mark is accepted
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python takes
        raise InputError(f"{path}: not JSON ({error})") from None


@dataclass
class Annotations:
    """The faces of one COCO-format file as arrays; faces are sorted by image, in file order within one."""
    path: Path                # the file; names are relative to its folder
    category: int             # id of the face category
    ids: np.ndarray           # [I] int64, image ids
    names: list               # [I] str, file_name as written
    sizes: np.ndarray         # [I, 2] int64, width and height as written, 0 if the file does not say
    image: np.ndarray         # [M] int64, the index (not the id) of each face's image
    xywh: np.ndarray          # [M, 4] float64
    area: np.ndarray          # [M] float64, width x height where the file gives none
    ignored: np.ndarray       # [M] bool: iscrowd, or a box that cannot be learned (empty, or outside its picture)
    counts: dict = field(default_factory=dict)  # what was met on the way, for the reports

    def file(self, index):
        """The path of picture `index`."""
        return self.path.parent / self.names[index]

    def without(self, left_out, image):
        """These Annotations without the photos at indices `left_out`, and indices `image` `[D]` renumbered to match."""
        kept = np.setdiff1d(np.arange(len(self.ids)), list(left_out))
        faces = np.isin(self.image, kept)
        return replace(self, ids=self.ids[kept], names=[self.names[n] for n in kept], sizes=self.sizes[kept],
                       image=np.searchsorted(kept, self.image[faces]), xywh=self.xywh[faces], area=self.area[faces],
                       ignored=self.ignored[faces]), np.searchsorted(kept, image)


def read_annotations(path):
    """Read a COCO-format file into `Annotations`.

    Faces are the category `face`, or the only category there is. Images without faces are kept. Boxes that are empty,
    reversed or outside their picture are kept and marked ignored. Raises InputError for what cannot be read safely.
    """
    path = Path(path)
    content = read_json(path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: not COCO annotations, no list \"{key}\"")
    images, annotations = content["images"], content["annotations"]
    for kind, entries in (("images", images), ("annotations", annotations)):
        _check_ids(path, kind, entries)
    for index, entry in enumerate(images):
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or not _names_a_file(name):
            raise InputError(f"{path}: images[{index}] (id {entry['id']}) has no file_name that could be a file's")

    category = _face_category(path, content.get("categories"), annotations)
    faces = [a for a in annotations if a.get("category_id") == category]
    index_of = {entry["id"]: index for index, entry in enumerate(images)}
    try:
        image = np.array([index_of[a["image_id"]] for a in faces], np.int64)
    except (KeyError, TypeError):
        bad = next(a for a in faces if not isinstance(a.get("image_id"), int) or a["image_id"] not in index_of)
        raise InputError(f"{path}: annotation {bad['id']} belongs to image {bad.get('image_id')!r}, "
                         "which is not in \"images\"") from None
    numbers = [a["id"] for a in faces]
    xywh = _numbers(path, "bbox", [a.get("bbox") for a in faces], numbers, (4,))
    area = _numbers(path, "area", [a.get("area", own) for a, own in zip(faces, (xywh[:, 2] * xywh[:, 3]).tolist())], numbers, ())
    sizes = np.array([[_size(path, e, "width"), _size(path, e, "height")] for e in images], np.int64).reshape(-1, 2)

    crowd = np.array([_is_crowd(path, a) for a in faces], bool)
    empty = (xywh[:, 2:] <= 0).any(1)
    known, size = (sizes[image] > 0).all(1), sizes[image]
    outside = known & ((xywh[:, :2] >= size) | (xywh[:, :2] + xywh[:, 2:] <= 0)).any(1) & ~empty
    order = np.argsort(image, kind="stable")
    counts = {"images": len(images), "faces": len(faces), "images without faces": len(images) - len(np.unique(image)),
              "crowd": int(crowd.sum()), "empty boxes": int(empty.sum()), "boxes outside": int(outside.sum()),
              "of other categories": len(annotations) - len(faces)}
    return Annotations(path, category, np.array([e["id"] for e in images], np.int64), [e["file_name"] for e in images],
                       sizes, image[order], xywh[order], area[order], (crowd | empty | outside)[order], counts)


def join(parts):
    """Several Annotations as one: their photos one set after another, ids from 1, names absolute."""
    first = parts[0]
    if len(parts) == 1:
        return first
    names = [os.path.abspath(part.file(n)) for part in parts for n in range(len(part.ids))]
    start = np.cumsum([0] + [len(part.ids) for part in parts])
    together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("sizes", "xywh", "area", "ignored")}
    counts = {key: sum(part.counts[key] for part in parts) for key in first.counts}
    image = np.concatenate([part.image + before for part, before in zip(parts, start)])
    return Annotations(first.path, first.category, np.arange(1, start[-1] + 1), names, image=image, counts=counts, **together)


def read_results(path, annotations):
    """Read detections in COCO results form, `[{image_id, category_id, bbox, score}]`.

    Returns image indices `[D]`, xywh `[D, 4]`, scores `[D]`, float64, in file order; other categories are left out.
    Raises InputError for unknown images and for numbers that are not finite.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{path}: not COCO results, a list of {{image_id, category_id, bbox, score}} is expected")
    numbers = [n for n, e in enumerate(entries) if e.get("category_id") == annotations.category]
    entries = [entries[n] for n in numbers]
    index_of = {int(image_id): index for index, image_id in enumerate(annotations.ids)}
    try:
        image = np.array([index_of[e["image_id"]] for e in entries], np.int64)
    except (KeyError, TypeError):
        number, bad = next((n, e.get("image_id")) for n, e in zip(numbers, entries)
                           if not isinstance(e.get("image_id"), int) or e["image_id"] not in index_of)
        raise InputError(f"{path}: entry {number} is of image {bad!r}, which is not in {annotations.path}") from None
    xywh, score = (_numbers(path, key, [e.get(key) for e in entries], numbers, shape)
                   for key, shape in (("bbox", (4,)), ("score", ())))
    return image, xywh, score


def results(annotations, image, xywh, score):
    """Detections as a COCO results list: the inverse of `read_results`."""
    ids = annotations.ids[np.asarray(image, np.int64)].tolist()
    return [{"image_id": i, "category_id": annotations.category, "bbox": box, "score": s}
            for i, box, s in zip(ids, np.asarray(xywh, np.float64).tolist(), np.asarray(score, np.float64).tolist())]


def _names_a_file(name):
    try:
        return b"\0" not in os.fsencode(name) and len(name) < 4096
    except UnicodeEncodeError:  # half a character, which JSON can hold and no file system has
        return False


def _check_ids(path, kind, entries):
    """Every entry is an object with its own integer id."""
    seen = set()
    for index, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2 ** 63:
            raise InputError(f"{path}: {kind}[{index}] has no integer \"id\"")
        if number in seen:
            raise InputError(f"{path}: {kind}[{index}] repeats id {number}; ids must differ")
        seen.add(number)


def _face_category(path, categories, annotations):
    """The id of the category `face`, or of the only one. Without `categories` those in use count."""
    listed = ([{"id": a.get("category_id")} for a in annotations] or [{"id": 1}]) if categories is None else categories
    if not isinstance(listed, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), int) for c in listed):
        raise InputError(f"{path}: \"categories\" must be a list of {{id, name}} with integer ids")
    categories = list({c["id"]: c for c in listed}.values())
    named = [c["id"] for c in categories if str(c.get("name")).strip().lower() == "face"]
    if len(named) != 1 and len(categories) != 1:
        names = ", ".join(str(c.get("name")) for c in categories) or "none"
        raise InputError(f"{path}: which category is the face? One must be named \"face\", there are: {names}")
    known = {c["id"] for c in categories}
    for entry in annotations:  # left out silently, faces of a category that is misnumbered would be missed
        if not isinstance(entry.get("category_id"), int) or entry["category_id"] not in known:
            raise InputError(f"{path}: annotation {entry['id']} is of category {str(entry.get('category_id'))[:60]}, "
                             "which is not in \"categories\"")
    return (named or [categories[0]["id"]])[0]


def _numbers(path, key, values, numbers, shape):
    """`values` as one finite float64 array `[len(values), *shape]`; the first bad one is named, by its entry of `numbers`."""
    try:  # all at once is fast; one by one only to find the one to name
        array = np.array(values)
        if array.dtype.kind in "iuf" and array.shape == (len(values), *shape) and (np.abs(array.astype(float)) < 1e15).all():
            return array.astype(np.float64)
    except (ValueError, MemoryError):
        pass  # of several lengths, or long words among them

    def good(value):
        values = value if shape else [value]
        return (isinstance(values, list) and len(values) == (shape or (1,))[0]
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e15 for v in values))
    for number, value in zip(numbers, values):  # `abs(nan) < x` is False, so NaN is bad too
        if not good(value):
            expected = f"{shape[0]} finite numbers" if shape else "a finite number"
            raise InputError(f"{path}: entry {number}: {key} is {str(value)[:60]}, {expected} expected")
    return np.array(values, np.float64).reshape(len(values), *shape)


def _is_crowd(path, entry):
    """A face's `iscrowd`, 0 or 1 or their like; of text, "0" would count as yes."""
    value = entry.get("iscrowd", 0)
    if value not in (0, 1):
        raise InputError(f"{path}: annotation {entry['id']}: iscrowd is {repr(value)[:60]}, 0 or 1 expected")
    return bool(value)


def _size(path, entry, key):
    value = entry.get(key) or 0
    if not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise InputError(f"{path}: image {entry['id']}: {key} is {value!r}, pixels expected")
    return int(value)
