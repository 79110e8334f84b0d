"""Near-duplicate photos: hashes of small grey thumbnails propose the pairs, the thumbnails decide.

A hash is a dHash of both directions: is each cell of an 8 x 8 thumbnail brighter than the one to its left,
and than the one above it? That survives another size, another JPEG quality, other colours; not a crop. Two
photos are compared only if 16 neighbouring bits agree (locality-sensitive hashing: Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, section 3.4), so the time grows as the number of photos, not its square.
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
NEIGHBOURS = 40     # of a photo that are looked at among those that share 16 bits with it
ONES = np.array([bin(byte).count("1") for byte in range(256)])


def thumbnail(path) -> tuple:
    """The upright (width, height) of a photo, and its thumbnail, grey uint8 `[32, 32]`, squeezed to a square.

    Returns instead of them the InputError (not raised), and None, if the photo cannot be read.
    """
    try:
        image = open_picture(path)
        size = upright_size(image)
        image = decode_picture(image, 2 * SIDE / min(size))
    except InputError as error:
        return error, None
    return size, np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def thumbnails(paths: list) -> tuple[list, np.ndarray]:
    """What `thumbnail` returns for all photos: a list, and uint8 `[I, 32, 32]`, black if unread."""
    with ThreadPool(os.cpu_count()) as pool:
        read = list(tqdm(pool.imap(thumbnail, paths, chunksize=16), "photos", len(paths), disable=None))
    black = np.zeros((SIDE, SIDE), np.uint8)
    return [size for size, _ in read], np.stack([black if pixels is None else pixels for _, pixels in read])


def hashes(pixels: np.ndarray) -> np.ndarray:
    """The hashes uint8 `[I, 14]` of thumbnails uint8 `[I, 32, 32]`."""
    cells = pixels.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    across, down = cells[:, :, 1:] > cells[:, :, :-1], cells[:, 1:] > cells[:, :-1]
    return np.packbits(np.concatenate([across.reshape(-1, 56), down.reshape(-1, 56)], 1), axis=1)


def neighbours(order, train):
    """Which photos to compare, of those in `order` `[I]` by hash: pairs of index arrays.

    Each with the 40 that follow, and with the last before it and the first after it in the training set
    (`train`, bool `[I]`, by index), so that a photo is found there however often it is among the others.
    """
    for step in range(1, min(NEIGHBOURS + 1, len(order))):
        yield order[:-step], order[step:]
    for way in (order, order[::-1]):
        last = np.maximum.accumulate(np.where(train[way], np.arange(len(way)), -1))
        yield way[last[last >= 0]], way[last >= 0]


def near_duplicates(pixels: np.ndarray, place=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the near-duplicates among thumbnails uint8 `[I, 32, 32]`, mirrored ones too.

    `place` `[I]` is 0 for photos of the training set. Returns pairs `[P, 2]`, the lower index first; the
    correlation `[P]` of each, 0.95 to 1; and whether it is a mirrored one, bool `[P]`. Of more than 40 photos
    that are all alike some pairs are left out, but no photo, and no photo that is also in the training set.
    """
    count = len(pixels)
    pixels = np.concatenate([pixels, pixels[:, :, ::-1]])         # the mirrored ones have indices from I on
    train = np.tile(np.zeros(count, int) if place is None else place, 2) == 0
    hashed = hashes(pixels)
    found = [np.zeros((0, 2), np.int64)]
    for band in hashed.reshape(len(pixels), BITS // 16, 2).view(np.uint16)[:, :, 0].T:
        order = np.lexsort((*hashed.T, band))                     # those that share 16 bits lie together
        for one, other in neighbours(order, train):
            alike = (band[one] == band[other]) & (np.minimum(one, other) < count)
            alike &= one % count != other % count
            one, other = one[alike], other[alike]
            near = ONES[hashed[one] ^ hashed[other]].sum(1) <= MOST_BITS
            found.append(np.stack([one[near], other[near]], 1))
    pairs = np.concatenate(found)
    mirrored = (pairs >= count).any(1)
    pairs = np.unique(np.column_stack([np.sort(pairs % max(count, 1), 1), mirrored]), axis=0)
    correlation = correlate(pixels, pairs[:, 0], pairs[:, 1] + count * pairs[:, 2])
    alike = correlation >= LEAST
    return pairs[alike, :2], correlation[alike], pairs[alike, 2] > 0


def correlate(pixels, one, other):
    """The correlation `[P]` of thumbnails `one` and `other`, indices `[P]`; 0 for those of one colour."""
    result = np.zeros(len(one))
    for start in range(0, len(one), 4096):                        # limits the memory
        part = slice(start, start + 4096)
        a, b = (pixels[index[part]].reshape(-1, SIDE * SIDE).astype(np.float32) for index in (one, other))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        result[part] = (a * b).sum(1) / np.maximum(norm, 1e-6)
    return result
