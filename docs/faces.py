"""Draw docs/faces.jpg, the head of the README: what the shipped network finds on five photos.

    python -m tools.sample data/sample --train 1 --val 60
    PYTHONPATH=. python docs/faces.py
"""
from pathlib import Path

import numpy as np
from PIL import Image

from detector import detect, load_detector
from support.pictures import draw_faces, load_picture, save_picture

HEIGHT, SCORE = 514, 0.5
DRAWN = (10, 25, 28, 47)  # numbers of photos in data/sample/val: one of their 15 faces is missed


def main():
    """The photo at the left in full height, the drawn ones beside it in two rows of two."""
    drawn = [next(Path("data/sample/val").rglob(f"*_val_{number}.jpg")) for number in DRAWN]
    drawn_width = round(HEIGHT / 2 * 4 / 3)  # they are 320 x 240
    cells = [("docs/photo.jpg", 0, 0, HEIGHT)]
    cells += [(path, HEIGHT + n % 2 * drawn_width, n // 2 * HEIGHT // 2, HEIGHT // 2)
              for n, path in enumerate(drawn)]
    sheet, detector, found = Image.new("RGB", (HEIGHT + 2 * drawn_width, HEIGHT)), load_detector(), []
    for path, x, y, height in cells:
        picture = load_picture(path)
        scale = height / picture.height
        size = round(picture.width * scale), height
        sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (x, y))
        faces = detect(detector, picture)                                        # [K, 5]
        found.append(faces[faces[:, 4] >= SCORE] * (*[scale] * 4, 1) + (x, y, x, y, 0))
    found = np.concatenate(found)
    save_picture(draw_faces(sheet, found[:, :4], found[:, 4], text_size=15), "docs/faces.jpg")


if __name__ == "__main__":
    main()
