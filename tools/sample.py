"""Draw a small dataset of faces on varied backgrounds, so that everything can be tried without a download.

    python -m tools.sample data/sample
    python -m tools.sample data/sample --train 1000 --val 100 --seed 1

Writes train.json and val.json (COCO), photos in train/ and val/, and their faces as WIDER's texts have them.
The same arguments draw the same pixels, and a larger dataset begins with the photos of a smaller one.
"""

from pathlib import Path

from support.script import command, Parser, require, whole_file

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from support.options import SEED, at_least
from wider_to_coco import convert

SUPER = 3  # people are drawn this much larger and averaged down, for smooth edges
REACH = 3  # of a drawing, from the middle of its head: half heights of the head
SKINS = ((250, 219, 191), (235, 192, 155), (210, 160, 118), (176, 122, 82), (139, 90, 59), (98, 63, 43))
HAIRS = ((28, 22, 20), (58, 38, 26), (96, 62, 36), (150, 104, 56), (208, 172, 104), (170, 168, 165))
MASKS = ((235, 238, 240), (150, 195, 220), (40, 40, 45), (230, 170, 180))
# For a photo 240 px high: event, least and most heads, least and greatest height of one, and what is behind:
# tiles of this width and height, with this gap around each and this shift of every second row.
EVENTS = (("0--Portrait", 1, 2, 65, 220, None),
          ("1--Street", 1, 5, 20, 140, (40, 50, 10, 0)),
          ("2--Crowd", 4, 10, 15, 55, (25, 11, 1, .5)))


class Figure:
    """A person in the coordinates of its head: crown at y = -1, chin at 1. `half` is that unit in pixels."""

    def __init__(self, half):
        self.side = 2 * round(REACH * half)
        self.half = self.side / 2 / REACH
        self.image = Image.new("RGBA", (self.side * SUPER, self.side * SUPER))
        self.draw = ImageDraw.Draw(self.image)

    def oval(self, x, y, rx, ry, colour, start=0, end=360):
        """Fill an oval with centre (x, y) and half axes rx, ry, or its part between two angles (degrees)."""
        box = (np.array([x - rx, y - ry, x + rx, y + ry]) + REACH) * self.half * SUPER
        self.draw.chord(box.tolist(), start, end, colour)

    def paste(self, image, x, y, tilt):
        """Put it into a photo, turned by `tilt` degrees about the centre of its head, which is at (x, y)."""
        turned = self.image.rotate(tilt).reduce(SUPER)
        image.paste(turned, (x - self.side // 2, y - self.side // 2), turned)


def to_image(pixels):
    """Make an RGB picture of `pixels` `[H, W, 3]`, from 0 to 255 or a little beyond."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shade(colour, factor):
    """Make `colour` darker (factor below 1) or lighter."""
    return tuple(min(max(int(c * factor), 0), 255) for c in colour)


def pick(rng, choices):
    """Pick one of the colours `choices` and make it a little darker or lighter."""
    return shade(choices[rng.integers(len(choices))], rng.uniform(.92, 1.08))


def paint(rng):
    """Pick any colour, more often a dull one."""
    colour = rng.uniform(20, 240, 3)
    return shade(colour + (colour.mean() - colour) * rng.uniform(0, .9), 1)


def background(rng, tiles, width, height):
    """Draw a photo without people: uneven light, soft noise, rows of `tiles`, ovals a little like faces."""
    pixels = np.full((height, width, 3), paint(rng), float)
    for grain, most in ((height, 60), (30, 16), (8, 16), (2, 16)):
        shape = height // grain + 2, width // grain + 2
        cells = rng.normal(128, rng.uniform(2, most), (*shape, 1)) + rng.normal(0, most / 5, (*shape, 3))
        pixels += np.asarray(to_image(cells).resize((width, height), Image.Resampling.BICUBIC), float) - 128
    image = to_image(pixels)
    if tiles:
        draw = ImageDraw.Draw(image)
        colour = paint(rng)
        wide, high, gap = np.array(tiles[:3]) * height / 240 * rng.uniform(.7, 1.4, 3)
        for row, column in np.ndindex(int(height / high) + 1, int(width / wide) + 2):
            x = (column - row % 2 * tiles[3]) * wide
            box = x + gap, row * high + gap, x + wide - gap, (row + 1) * high - gap
            draw.rectangle(box, shade(colour, rng.uniform(.8, 1.15)))
    for _ in range(rng.integers(1, 7)):
        figure = Figure(height * np.exp(rng.uniform(np.log(.03), np.log(.16))))
        figure.oval(0, 0, rng.uniform(.7, 1), 1, pick(rng, SKINS))
        figure.paste(image, *rng.integers(0, image.size).tolist(), rng.uniform(-35, 35))
    return image


def person(rng, figure):
    """Draw a person: the half width of the head, without hair and ears, and whether it wears a mask."""
    skin, hair = pick(rng, SKINS), pick(rng, HAIRS)
    width = rng.uniform(.7, .82)
    figure.oval(0, 3, rng.uniform(1.3, 1.8), 1.8, paint(rng))  # shoulders
    figure.oval(0, .1, width * rng.uniform(.9, 1.3), rng.uniform(.8, 1.4), hair)
    figure.oval(0, .9, .4, .7, shade(skin, .78))  # neck
    figure.oval(0, 0, width * 1.12, .22, shade(skin, .85))  # ears
    light = rng.uniform(-.03, .03)
    for k in range(6):  # nested ovals look like a soft shadow on one side
        figure.oval(light * k, -.01 * k, width * (1 - .07 * k), 1 - .07 * k, shade(skin, .8 + .04 * k))
    face(rng, figure, skin, hair, width)
    masked = rng.random() < .15
    if masked:
        figure.oval(0, 0, width * .98, .98, pick(rng, MASKS), 5, 175)
    figure.oval(0, -.1, width * 1.06, 1.02, hair, *rng.uniform((195, 320), (220, 345)))
    return width, masked


def face(rng, figure, skin, hair, width):
    """Draw eyes, brows, nose and mouth of a head that is turned a little."""
    yaw, pitch = rng.triangular(-.7, 0, .7), rng.normal(0, .05)

    def feature(angle, y):
        """Where a feature of the turned head appears (x, y), and its foreshortening there, 0.3 to 1."""
        return width * np.sin(angle + yaw), y + pitch, max(np.cos(angle + yaw), .3)

    size, brow = rng.uniform((.85, .14), (1.25, .2))
    for side in (-.5, .5):
        x, y, narrow = feature(side, -.12)
        figure.oval(x, y - .02, .17 * size * narrow, .1 * size, shade(skin, .35), 170, 10)
        figure.oval(x, y, .15 * size * narrow, .085 * size, (245, 243, 240))
        figure.oval(x, y, .075 * size * narrow, .08 * size, (45, 32, 25))
        figure.oval(x, y - .1, .27 * size * narrow, brow, shade(hair, .8), 215, 325)
    x, y, narrow = feature(.05, .23)
    figure.oval(x, y - .13, .07 * narrow, .22, shade(skin, 1.08))
    figure.oval(x, y, .13 * narrow, .075, shade(skin, .84))
    x, y, narrow = feature(0, .52)
    lips = shade((200, 95, 90), .3 + .5 * skin[0] / 255)
    figure.oval(x, y - .05, rng.uniform(.2, .32) * narrow, .11, lips, 10, 170)


def placements(rng, event, width, height):
    """Place heads apart: centres and half heights `[(x, y, half)]`, top first: no body covers a face."""
    _, fewest, most, low, high, _ = event
    placed = []
    for half in np.exp(rng.uniform(np.log(low / 2), np.log(high / 2), rng.integers(fewest, most + 1))):
        half = max(half * min(width, height) / 240, 7.5)  # keeps both sides of every box at 10 px or more
        for _ in range(30):
            x, y = rng.uniform(.8 * half, (width - .8 * half, height - .8 * half)).astype(int).tolist()
            if all(np.hypot(x - x2, y - y2) > 1.15 * (half + half2) for x2, y2, half2 in placed):
                placed.append((x, y, half))
                break
    return sorted(placed, key=lambda place: place[1])


def photo(rng, width, height, empty):
    """Draw one photo, without people if `empty`: (event, RGB image, one row per face).

    A row is x y w h blur expression illumination invalid occlusion pose, as in WIDER FACE."""
    event = EVENTS[rng.integers(len(EVENTS))]
    image = background(rng, event[-1], width, height)
    blur = max(rng.uniform(-2.2, 1.3), 0)
    light = rng.triangular(.45, 1, 1.15)
    rows = []
    for x, y, half in [] if empty else placements(rng, event, width, height):
        figure = Figure(half)
        tilt = rng.triangular(-25, 0, 25)
        narrow, masked = person(rng, figure)
        figure.paste(image, x, y, tilt)
        sine, cosine = np.sin(np.radians(tilt)), np.cos(np.radians(tilt))
        reach = figure.half * np.hypot((narrow * cosine, narrow * sine), (sine, cosine))  # of the turned oval
        x1, y1 = np.floor((x, y) - reach).clip(0).astype(int)
        x2, y2 = np.ceil((x, y) + reach).clip(0, (width, height)).astype(int)
        blurred = (blur > 0) + (blur > .9)
        rows.append((x1, y1, x2 - x1, y2 - y1, blurred, 0, int(light < .65), 0, int(masked), 0))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), float)
    pixels = pixels * light * rng.uniform(.93, 1.07, 3) + rng.normal(0, rng.uniform(0, 7), pixels.shape)
    return event[0], to_image(pixels), rows


def draw_sample(folder, train=240, val=40, size=(320, 240), seed=0):
    """Draw a dataset of `train` + `val` photos of `size` (width, height) into `folder`: `{split: counts}`."""
    folder = Path(folder)
    counts = {}
    for stream, (split, count) in enumerate({"train": train, "val": val}.items()):
        target = folder / f"{split}.json"
        text = folder / f"wider_{split}_bbx_gt.txt"
        require(text.exists() or not target.exists(),
                f"{target}: was not drawn by tools.sample and stays; name another folder")
        lines = []
        for index in tqdm(range(count), f"drawing {split}", disable=None):
            rng = np.random.default_rng([seed, stream, index])
            event, image, rows = photo(rng, *size, empty=index % 10 == 3)
            name = f"{event}/{event.replace('--', '_')}_{split}_{index}.jpg"
            (folder / split / event).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / name, quality=int(rng.integers(70, 96)))
            lines += [name, str(len(rows)), *(" ".join(map(str, row)) for row in rows or [(0,) * 10])]
        with whole_file(text) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[split] = convert(text, folder / split, target)
    return counts


@command
def main(argv=None):
    """Draw the training and the validation photos."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", help="where to write, such as data/sample")
    add("--train", type=at_least(1), default=240, help="photos to train on (default %(default)s)")
    add("--val", type=at_least(1), default=40, help="photos to validate on (default %(default)s)")
    add("--seed", type=SEED, default=0, help="another seed draws other photos (default %(default)s)")
    args = parser.parse_args(argv)
    for split, met in draw_sample(args.folder, args.train, args.val, seed=args.seed).items():
        print(f"{args.folder}/{split}.json: {met['pictures']} photos, {met['annotations']} faces, "
              f"{met['without annotation']} photos without faces")


if __name__ == "__main__":
    main()
