"""Near-duplicate photos: hashes of small grey thumbnails propose the pairs, the thumbnails decide.

A hash is a dHash of both directions: is each cell of an 8 x 8 thumbnail brighter than the one to its left,
and than the one above it? That survives another size, JPEG quality, other colours; not a crop.
"""

import os
from multiprocessing.pool import ThreadPool

from support.script import InputError

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.pictures import decode_picture, open_picture, upright_size

SIDE = 32           # of a thumbnail, pixels
BITS = 112          # of a hash: 56 across, 56 down
MOST_BITS = 28      # that may differ; two random photos differ in 50 or so
LEAST = 0.95        # correlation of the thumbnails of near-duplicates


def thumbnail(path) -> tuple:
    """The upright (width, height) of a photo, or its InputError, and a grey thumbnail uint8 `[32, 32]`."""
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


def hashes(pixels: np.ndarray) -> np.ndarray:
    """The hashes `[I, 112]`, 1 and -1, of thumbnails uint8 `[I, 32, 32]`."""
    cells = pixels.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    across, down = cells[:, :, 1:] > cells[:, :, :-1], cells[:, 1:] > cells[:, :-1]
    bits = np.concatenate([across.reshape(-1, 56), down.reshape(-1, 56)], 1)
    return 2 * bits.astype(np.float32) - 1


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Thumbnails uint8 `[I, 32, 32]` as `[I, 1024]` whose products are correlations, 0 for a single grey."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-3)


def near_duplicates(pixels: np.ndarray, place: np.ndarray) -> dict:
    """Find for each thumbnail of uint8 `[I, 32, 32]` the earlier one it resembles most, maybe mirrored.

    Photos of another set, by `place` `[I]`, come first. Returns {index: (the earlier, correlation)}."""
    views = [pixels, pixels[:, :, ::-1]]
    hashed, thumbs = [hashes(view) for view in views], [normalised(view) for view in views]
    found = {}
    for n in range(len(pixels)):
        equal = np.maximum(*(view[:n] @ hashed[0][n] for view in hashed))  # bits, less those that differ
        near = np.flatnonzero(equal >= BITS - 2 * MOST_BITS)
        correlation = np.maximum(*(view[near] @ thumbs[0][n] for view in thumbs))
        rank = (correlation + (place[near] != place[n])) * (correlation >= LEAST)
        if rank.any():
            best = rank.argmax()
            found[n] = int(near[best]), min(float(correlation[best]), 1.0)
    return found
