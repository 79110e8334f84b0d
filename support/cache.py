"""Photos reduced once to what training can use, and kept in a folder as raw pixels: train.py --cache.

A raw photo needs no decoding and less resizing. One of 1024x683 takes 0.6 MB at an input of 300 x 300, all of
WIDER FACE 8 GB; the loading processes share what of it the memory holds.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from support.pictures import load_picture
from support.script import require, whole_file

# How many times as wide and high as the input photos are kept, or more: a view of four fifths of one still
# has a pixel for each of the network's. Smaller views are enlarged, as they would be from a smaller photo.
KEPT = 1.25


class PhotoCache:
    """A folder of raw photos for an input of `size` (width, height). Absent ones are made when used."""

    def __init__(self, folder, size):
        self.folder, self.size = Path(folder), size

    def file(self, path):
        """Where the photo `path` is kept: its place, state and the input's size are in the name."""
        state = os.stat(path)
        place = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:20]
        return self.folder / "{}-{}x{}-{}-{}.rgb".format(place, *self.size, state.st_size, state.st_mtime_ns)

    def check(self, paths):
        """Raise InputError if a photo has changed since it was kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {name.rsplit("-", 2)[0]: name for name in os.listdir(self.folder) if name.endswith(".rgb")}
        for path in filter(os.path.isfile, paths):
            name = self.file(path).name
            require(kept.get(name.rsplit("-", 2)[0], name) == name, f"{path}: has changed since it was put "
                    f"into {self.folder}; remove that folder, or name another with --cache")

    def load(self, path):
        """The photo `path`, reduced, uint8 `[h, w, 3]`, its upright (width, height). Raises InputError."""
        require(os.path.isfile(path), f"{path}: no such picture")
        file = self.file(path)
        if not file.exists():
            self.keep(path, file)
        try:
            content = np.memmap(file, np.uint8, "r")
            width, height, *size = content[:16].view("<u4").tolist()
            return content[16:].reshape(height, width, 3), tuple(size)
        except ValueError:  # cut short when the machine lost power
            self.keep(path, file)
            return self.load(path)

    def keep(self, path, file):
        """Reduce a photo and write it, whole or not at all: its size, that on disk, the pixels."""
        image = load_picture(path)
        size = image.size
        scale = KEPT * max(np.divide(self.size, size))
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in size], Image.Resampling.BILINEAR)
        with whole_file(file) as temporary, open(temporary, "wb") as opened:
            np.array([*image.size, *size], "<u4").tofile(opened)
            np.asarray(image).tofile(opened)
