"""Photos in, drawings out: read any picture file upright as RGB, draw or hide faces, contact sheets."""

import io
import math
import os
import warnings
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from support.script import CONTROL, InputError, bad_values, require, whole_file

with suppress(ImportError):  # reads HEIC, where it is installed
    from pillow_heif import register_heif_opener
    register_heif_opener()

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # what undoes its values
PICTURES = {ending for ending, kind in Image.registered_extensions().items()  # of the files that Pillow reads
            if Image.MIME.get(kind, "").startswith("image/")}
HEIC = {".heic", ".heif", ".hif"} - PICTURES
LISTED = 20  # bad pictures named in one message
BLOCKS = 6   # of a hidden face's mosaic, in a row: a face of any size is as hard to recognise
CROWD = 10   # with more faces than these, labels shrink with the faces
FACE, IGNORED, MISSED, FALSE = "#38e04a", "#f5a623", "#ff3b30", "#ffd60a"


def load_picture(path):
    """Read the picture in a file, upright, as RGB (PIL). Raises InputError if it cannot be read."""
    return decode_picture(open_picture(path))


def open_picture(path):
    """Open a picture file (PIL), of which only the header is read. Raises InputError if it cannot be."""
    require(os.path.isfile(path), f"{path}: no such picture")  # opening a pipe could wait for ever
    with _decoding(path):
        return Image.open(os.fspath(path))


def upright_size(image):
    """The upright (width, height) of an opened picture, decoded or not."""
    with _decoding(image.filename):
        lying = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if lying and image.format != "TIFF" else image.size  # Pillow turns TIFF itself


def read_sizes(names, images):
    """The sizes `[(width, height)]` of pictures `names` in the folder `images`. InputError names up to 20."""
    bad = {"missing": [], "unreadable": []}

    def read(name):
        path = os.path.join(images, name)
        try:
            with open_picture(path) as image:
                return upright_size(image)
        except InputError:
            bad["unreadable" if os.path.isfile(path) else "missing"].append(repr(name))

    with warnings.catch_warnings(), ThreadPool() as pool:
        warnings.simplefilter("ignore")  # about large pictures: only headers are read
        sizes = list(tqdm(pool.imap(read, names, chunksize=16), "image sizes", len(names), disable=None))
    parts = [f"{len(them):,} {kind} ({', '.join(sorted(them)[:LISTED])}{', ...' * (len(them) > LISTED)})"
             for kind, them in bad.items() if them]
    require(not parts, f"{images}: of {len(names):,} pictures {' and '.join(parts)}; all are needed")
    return sizes


def decode_picture(image, scale=1):
    """Decode an opened picture: upright, RGB (PIL), whatever its file holds. Raises InputError if it cannot.

    A `scale` below 1 lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, if not below `scale`."""
    with _decoding(image.filename), image:
        if scale < 1:
            image.draft("RGB", [math.ceil(side * scale) for side in image.size])
        image = _whole(image)
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
        if turn:  # ImageOps.exif_transpose writes the EXIF anew, which fails for odd ones
            image = image.transpose(Image.Transpose[turn])
        if image.mode[0] in "IF":  # grey of 16 bits, which convert() would clip
            grey = np.asarray(image) / (256 if image.getextrema()[1] > 255 else 1)
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")


def _whole(image):
    """Decode an opened picture. A JPEG may lack its end marker, but no pixel: two endings must not matter."""
    try:
        image.load()
        return image
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
        data = Path(image.filename).read_bytes()
        ends = [Image.open(io.BytesIO(data + filler + b"\xff\xd9")) for filler in (b"", b"\x55" * 64)]
        if ends[0].tobytes() != ends[1].tobytes():
            raise
        return ends[0]


@contextmanager
def _decoding(path):
    """Turn whatever a decoder raises on a broken file into InputError: it may be nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: Pillow refuses what is really too large
            yield
    except Exception as error:
        reason = error or type(error).__name__
        if Path(path).suffix.lower() in HEIC:
            reason = "pip install pillow-heif reads HEIC"
        raise InputError(f"{path}: cannot be read as a picture ({reason})") from None


def draw_faces(image, boxes, scores=None, colour=FACE, text_size=None):
    """Draw boxes `[N, 4]` (xyxy, pixels) and, if given, scores `[N]` on a copy of `image` (PIL, RGB).

    Without `text_size` (pixels) labels follow the size of the image, and in a crowd that of the faces."""
    image = image.copy()
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    draw = ImageDraw.Draw(image)
    thickness = max(1, round(max(image.size) / 350))
    if text_size is None:
        text_size = max(9, round(max(image.size) / 55))
        if len(boxes) > CROWD:
            text_size = min(text_size, max(7, 0.4 * np.median(boxes[:, 2] - boxes[:, 0])))
    font = ImageFont.load_default(text_size)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        if scores is not None:
            text = f"{scores[n]:.2f}"
            _, _, right, bottom = draw.textbbox((thickness, 0), text, font=font)
            x = max(0, min(x1, image.width - right - thickness))
            y = y1 - bottom - thickness
            if y <= 0:
                y = y1 + thickness
            draw.rectangle((x, y, x + right + thickness, y + bottom + thickness), fill=colour)
            draw.text((x + thickness, y), text, fill="black", font=font)
    return image


def hide_faces(image, boxes):
    """Make the faces in boxes `[N, 4]` (xyxy, pixels) unrecognisable on a copy of `image` (PIL, RGB).

    Each becomes a mosaic in an ellipse 1.5 times as wide and high, which covers the box's corners."""
    image = image.copy()
    for x1, y1, x2, y2 in np.asarray(boxes, float).reshape(-1, 4):
        x, y = math.floor(x1 - (x2 - x1) / 4), math.floor(y1 - (y2 - y1) / 4)
        part = image.crop((x, y, math.ceil(x2 + (x2 - x1) / 4), math.ceil(y2 + (y2 - y1) / 4)))
        if min(part.size):
            blocks = part.resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
            ellipse = Image.new("L", part.size)
            ImageDraw.Draw(ellipse).ellipse((0, 0, part.width - 1, part.height - 1), fill=255)
            image.paste(blocks.resize(part.size, Image.Resampling.NEAREST), (x, y), ellipse)
    return image


def contact_sheet(images, columns=4, side=320):
    """Lay `images` (PIL) side by side in one picture, each fitted into a `side` x `side` square on grey."""
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "#404040")
    for n, image in enumerate(images):
        scale = side / max(image.size)
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
        x, y = n % columns * (side + 4) + 2, n // columns * (side + 4) + 2
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
    return sheet


def save_picture(image, path):
    """Write a PIL image, whole or not at all."""
    with whole_file(path) as temporary, bad_values(f"{path}: "):  # a WebP ends at 16,383 px
        image.save(temporary)


def drawable(text: str) -> str:
    """A text, such as a file name, without what a font cannot draw: control characters, half characters."""
    return text.translate(CONTROL).encode("utf-8", "backslashreplace").decode()
