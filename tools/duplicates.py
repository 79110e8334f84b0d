"""Near-duplicate photos: hashes of small grey thumbnails propose the pairs, the thumbnails decide.

A hash is a dHash of both directions: is each cell of an 8 x 8 thumbnail brighter than the one to its left,
and than the one above it? That survives another size, another JPEG quality, other colours; not a crop. All
pairs of hashes are compared, as one product of matrices: seconds for 10,000 photos, minutes for 100,000.
"""

import os
from multiprocessing.pool import ThreadPool

from support.script import InputError

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.pictures import decode_picture, open_picture, upright_size

SIDE = 32           # of a thumbnail, pixels
BITS = 112          # of a hash: 56 across, 56 down
MOST_BITS = 28      # that may differ; two random photos differ in 50 or so
LEAST = 0.95        # correlation of the thumbnails of near-duplicates
NEAREST = 8         # by hash whose thumbnails are compared


def thumbnail(path) -> tuple:
    """The upright (width, height) of a photo, and its thumbnail, grey uint8 `[32, 32]`, squeezed to a square.

    Returns instead the InputError (not raised), and a black thumbnail, if the photo cannot be read."""
    try:
        image = open_picture(path)
        size = upright_size(image)
        image = decode_picture(image, 2 * SIDE / min(size))
    except InputError as error:
        return error, np.zeros((SIDE, SIDE), np.uint8)
    return size, np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def thumbnails(paths: list) -> tuple[list, np.ndarray]:
    """What `thumbnail` returns for all photos: a list, and uint8 `[I, 32, 32]`."""
    with ThreadPool(os.cpu_count()) as pool:
        read = list(tqdm(pool.imap(thumbnail, paths, chunksize=16), "photos", len(paths), disable=None))
    return [size for size, _ in read], np.stack([pixels for _, pixels in read])


def hashes(pixels: np.ndarray) -> torch.Tensor:
    """The hashes `[I, 112]`, 1 and -1, of thumbnails uint8 `[I, 32, 32]`."""
    cells = pixels.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    across, down = cells[:, :, 1:] > cells[:, :, :-1], cells[:, 1:] > cells[:, :-1]
    bits = np.concatenate([across.reshape(-1, 56), down.reshape(-1, 56)], 1)
    return torch.from_numpy(2 * bits.astype(np.float32) - 1)


def near_duplicates(pixels: np.ndarray, place: np.ndarray) -> dict:
    """Find for each thumbnail of uint8 `[I, 32, 32]` the earlier one it resembles most, maybe mirrored.

    `place` `[I]` is the number of each photo's set; one of another set is preferred, so that each leak is
    found. Returns {index: (index of the earlier, correlation from 0.95 to 1, whether mirrored)}."""
    if not len(pixels):
        return {}
    views = [pixels, pixels[:, :, ::-1]]
    hashed, places = [hashes(view) for view in views], torch.from_numpy(place)
    found = {}
    for rows in torch.arange(len(pixels)).split(256):
        end = int(rows[-1]) + 1
        same = torch.stack([(hashed[0][rows] @ view[:end].T + BITS) / 2 for view in hashed]).amax(0)  # [R, I]
        same[(same < BITS - MOST_BITS) | (torch.arange(end) >= rows[:, None])] = 0
        same[(same > 0) & (places[:end] != places[rows, None])] += BITS
        for n, others in zip(rows.tolist(), same.topk(min(NEAREST, end)).indices):
            alike = [(place[other] != place[n], correlate(pixels[n], view[other]), other, mirrored)
                     for other in others[same[n - rows[0], others] > 0].tolist()
                     for mirrored, view in enumerate(views)]
            alike = [one for one in alike if one[1] >= LEAST]
            if alike:
                _, correlation, other, mirrored = max(alike)
                found[n] = other, min(correlation, 1.0), bool(mirrored)
    return found


def correlate(one, other):
    """The correlation of two thumbnails; 0 if one is of one colour, which says nothing."""
    one, other = (pixels.astype(np.float32) - pixels.mean() for pixels in (one, other))
    return float((one * other).sum() / max(np.sqrt((one * one).sum() * (other * other).sum()), 1e-6))
