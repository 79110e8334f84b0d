"""Photos in, pictures out: read any picture file upright as RGB, draw boxes on it, lay pictures side by side."""
import math
import os
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from formats import InputError, whole_file

ORIENTATION = 0x0112  # the EXIF tag
FACE, IGNORED, MISSED, FALSE = "#38e04a", "#f5a623", "#ff3b30", "#ffd60a"


def upright_size(image):
    """Upright (width, height) of an opened picture, decoded or not."""
    lying = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if lying and image.format != "TIFF" else image.size  # Pillow turns TIFF itself


def decode(image, scale=1):
    """An opened picture upright as RGB (PIL), whatever its file holds.

    EXIF orientation is applied; grey, CMYK, 16-bit, palette and alpha pictures become RGB; of an animation the first
    frame is taken. A `scale` below 1 lets a JPEG be decoded at 1/2, 1/4 or 1/8, as long as that is not below `scale`.
    """
    if scale < 1:
        image.draft("RGB", [math.ceil(side * scale) for side in image.size])
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_picture(path, scale=1):
    """The picture in a file as `decode` has it. Raises InputError if it cannot be read."""
    with open_picture(path) as image:
        return decode(image, scale)


@contextmanager
def open_picture(path):
    """Open a picture (PIL) of which only the header is read. Whatever goes wrong with it inside raises InputError."""
    if not os.path.isfile(path):  # opening a pipe or a device could wait for ever
        raise InputError(f"{path}: no such picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: Pillow refuses what is really too large
            with Image.open(path) as image:
                yield image
    except InputError:
        raise
    except Exception as error:  # decoders raise nearly everything on broken files
        raise InputError(f"{path}: cannot be read as a picture ({error or type(error).__name__})") from None


def draw_faces(image, boxes, scores=None, colour=FACE, text_size=None):
    """A copy of `image` (PIL, RGB) with boxes `[N, 4]` (xyxy, pixels) and, if given, scores `[N]` as text.

    `text_size` in pixels; without one it follows the size of the image.
    """
    image = image.copy()
    draw, thickness = ImageDraw.Draw(image), max(1, round(max(image.size) / 350))
    font = ImageFont.load_default(text_size or max(9, round(max(image.size) / 55)))
    for n, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, float).reshape(-1, 4)):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        if scores is not None:
            text = f"{scores[n]:.2f}"
            _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
            y = y1 - bottom - 2 if y1 > bottom + 2 else y1 + thickness
            draw.rectangle((x1, y, x1 + right + 2, y + bottom + 1), fill=colour)
            draw.text((x1 + 1, y), text, fill="black", font=font)
    return image


def grid(images, columns=4, side=320):
    """`images` (PIL) side by side in one picture, each fitted into a `side` x `side` square on grey."""
    rows = -(-len(images) // columns)
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
