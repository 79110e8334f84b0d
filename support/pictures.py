"""Photos in, drawings out: read any picture file upright as RGB, draw boxes, lay pictures side by side."""

import math
import os
import warnings
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from support.script import CONTROL, InputError, whole_file

ORIENTATION = 0x0112  # the EXIF tag
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2"}  # are read
LISTED = 20  # bad pictures named in one message
FACE, IGNORED, MISSED, FALSE = "#38e04a", "#f5a623", "#ff3b30", "#ffd60a"


def load_picture(path):
    """Read the picture in a file, upright, as RGB (PIL). Raises InputError if it cannot be read."""
    return decode_picture(open_picture(path))


def open_picture(path):
    """Open a picture file (PIL). Only its header is read yet. Raises InputError if it cannot be read."""
    if not os.path.isfile(path):  # opening a pipe or a device could wait for ever
        raise InputError(f"{path}: no such picture")
    with _decoding(path):
        return Image.open(os.fspath(path))


def upright_size(image):
    """The upright (width, height) of an opened picture, decoded or not."""
    with _decoding(image.filename):
        lying = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if lying and image.format != "TIFF" else image.size  # Pillow turns TIFF itself


def picture_size(path):
    """Read a picture's upright (width, height) from its header.

    Returns None if there is no such file, and the InputError (not raised) if it is unreadable.
    """
    if not os.path.isfile(path):
        return None
    try:
        with open_picture(path) as image:
            return upright_size(image)
    except InputError as error:
        return error


def read_sizes(pictures, images, jobs):
    """Read the sizes `[(width, height)]` of all pictures in the folder `images`, with `jobs` threads.

    Raises InputError if any is missing or unreadable; the message names up to 20.
    """
    names = [name for name, _ in pictures]
    paths = [os.path.join(images, name) for name in names]
    with warnings.catch_warnings(), ThreadPool(jobs) as pool:
        warnings.simplefilter("ignore")  # about large pictures: harmless, as only headers are read
        sizes = list(tqdm(pool.imap(picture_size, paths, chunksize=16),
                          "image sizes", len(paths), disable=None))
    bad = {"missing": [repr(name) for name, size in zip(names, sizes) if size is None],
           "unreadable": [repr(name) for name, size in zip(names, sizes) if isinstance(size, Exception)]}
    if any(bad.values()):
        parts = [f"{len(them):,} {kind} ({', '.join(them[:LISTED])}{', ...' if len(them) > LISTED else ''})"
                 for kind, them in bad.items() if them]
        raise InputError(f"{images}: of {len(names):,} pictures {' and '.join(parts)}; all are needed")
    return sizes


def decode_picture(image, scale=1):
    """Decode an opened picture: upright, RGB (PIL), whatever its file holds.

    EXIF orientation is applied. Grey, CMYK, 16-bit, palette and alpha pictures become RGB. Of an animation
    the first frame is taken. A `scale` below 1 lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, as
    long as that is not below `scale`. Raises InputError if it cannot be read.
    """
    with _decoding(image.filename), image:
        if scale < 1:
            image.draft("RGB", [math.ceil(side * scale) for side in image.size])
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip
            image = Image.fromarray(_to_bytes(np.asarray(image).astype(np.float64), image.mode))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def _to_bytes(values, mode):
    """Scale grey values `[H, W]` of a PIL picture of mode I or F to uint8, as its file likely means it."""
    values = np.nan_to_num(values, posinf=0, neginf=0).clip(0)
    most = values.max(initial=0)
    if mode == "F" and most <= 1:
        return (values * 255).round().astype(np.uint8)
    steps = 65536 if mode != "I" and mode != "F" else next((n for n in (256, 65536) if most < n), most + 1)
    return (values * 256 / steps).clip(0, 255).astype(np.uint8)


@contextmanager
def _decoding(path):
    """Turn whatever a decoder raises on a broken file into InputError: it may be nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: Pillow refuses what is really too large
            yield
    except Exception as error:
        reason = error or type(error).__name__
        raise InputError(f"{path}: cannot be read as a picture ({reason})") from None


def draw_faces(image, boxes, scores=None, colour=FACE, text_size=None):
    """Draw boxes `[N, 4]` (xyxy, pixels) and, if given, scores `[N]` on a copy of `image` (PIL, RGB).

    `text_size` is in pixels; without one it follows the size of the image, as lines and margins do. Labels
    stay inside the image.
    """
    image = image.copy()
    draw, thickness = ImageDraw.Draw(image), max(1, round(max(image.size) / 350))
    font = ImageFont.load_default(text_size or max(9, round(max(image.size) / 55)))
    for n, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, float).reshape(-1, 4)):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        if scores is not None:
            text = f"{scores[n]:.2f}"
            _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
            right, bottom = right + 2 * thickness, bottom + thickness
            x, y = max(0, min(x1, image.width - right)), y1 - bottom if y1 > bottom else y1 + thickness
            draw.rectangle((x, y, x + right, y + bottom), fill=colour)
            draw.text((x + thickness, y), text, fill="black", font=font)
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
    with whole_file(path) as temporary:
        image.save(temporary)


def drawable(text: str) -> str:
    """A text, such as a file name, without what a font cannot draw: control characters, half characters."""
    return text.translate(CONTROL).encode("utf-8", "backslashreplace").decode()
