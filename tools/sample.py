"""Draw a small dataset of faces on varied backgrounds, so that everything can be tried without a download.

    python -m tools.sample data/sample
    python -m tools.sample data/sample --train 1000 --val 100 --seed 1

Writes train.json and val.json (COCO) to the folder, the photos to train/ and val/, and the WIDER-style texts
wider_{train,val}_bbx_gt.txt that the json files are converted from. The same arguments draw the same pixels.
Every photo has its own random stream, so a larger dataset begins with the photos of a smaller one.
"""

import time
from pathlib import Path

from support.script import InputError, command, new_parser, whole_file

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from wider_to_coco import convert

SUPER = 3  # photos are drawn this much larger and averaged down, for smooth edges
SPLITS = ("train", "val")
SKINS = ((250, 219, 191), (235, 192, 155), (210, 160, 118), (176, 122, 82), (139, 90, 59), (98, 63, 43))
HAIRS = ((28, 22, 20), (58, 38, 26), (96, 62, 36), (150, 104, 56),
         (208, 172, 104), (150, 62, 30), (170, 168, 165))
EYES = ((70, 45, 25), (40, 30, 25), (80, 120, 70), (70, 110, 160))
MASKS = ((235, 238, 240), (150, 195, 220), (40, 40, 45), (230, 170, 180))
# event, scenery, least and most faces, least and greatest width of a face in pixels (photo 240 px high)
EVENTS = (("0--Portrait", "wall", 1, 2, 50, 170),
          ("1--Street", "windows", 1, 5, 15, 75),
          ("2--Garden", "leaves", 1, 4, 20, 100),
          ("3--Crowd", "bricks", 4, 10, 11, 42),
          ("4--Office", "shelves", 1, 4, 20, 110))
# scenery: width and height of one tile with the gap around it, and that gap, in pixels (photo 240 px high)
TILES = {"windows": (40, 50, 10), "bricks": (25, 11, 1), "shelves": (9, 40, .3)}


class Pen:
    """Draw on `canvas` in the coordinates of one head: centre (0, 0), crown at y = -1, chin at y = 1.

    `middle` is its centre on the canvas and `unit` half its height, in canvas pixels; `tilt` is in radians.
    """

    def __init__(self, canvas, middle, unit, tilt):
        self.draw, self.middle, self.unit = ImageDraw.Draw(canvas), np.array(middle), unit
        self.turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def place(self, points):
        """Convert `points` `[P, 2]` from head coordinates to canvas pixels."""
        return np.asarray(points, float) @ self.turn * self.unit + self.middle

    def shape(self, points, colour):
        """Fill the polygon `points` `[P, 2]`."""
        self.draw.polygon([tuple(p) for p in self.place(points)], colour)

    def oval(self, x, y, rx, ry, colour):
        """Fill an oval with centre (x, y) and half axes rx, ry."""
        self.shape(ring(rx, ry) + (x, y), colour)

    def line(self, points, width, colour):
        """Draw a line through `points` `[P, 2]`."""
        self.draw.line([tuple(p) for p in self.place(points)], colour,
                       max(1, round(width * self.unit)), "curve")


def ring(rx, ry, taper=0.0, start=0.0, end=2.0):
    """Points `[P, 2]` on an oval, clockwise from `start` to `end`: half turns from its top.

    `taper` above 0 narrows the lower half, like a chin."""
    angle = np.linspace(start * np.pi, end * np.pi, 49)
    x, y = np.sin(angle), -np.cos(angle)
    return np.stack([rx * x * (1 - taper * np.maximum(y, 0) ** 2), ry * y], 1)


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


def background(rng, scenery, width, height):
    """Draw a canvas without people: a gradient of two colours, soft noise, and the scenery's pattern."""
    first, last, (across, down) = np.array(paint(rng)), np.array(paint(rng)), rng.uniform(-1, 1, 2)
    ramp = across * np.linspace(-.5, .5, width)[:, None] + down * np.linspace(-.5, .5, height)[:, None, None]
    pixels = first + (last - first) * (ramp + .5)
    for grain in (30, 8, 2):
        rows, columns, (grey, colour) = height // grain + 2, width // grain + 2, rng.uniform((2, 0), (16, 7))
        cells = 128 + rng.normal(0, grey, (rows, columns, 1)) + rng.normal(0, colour, (rows, columns, 3))
        smooth = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(smooth, float) - 128
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((width * SUPER, height * SUPER))
    draw, base, unit = ImageDraw.Draw(canvas), paint(rng), height / 240 * SUPER
    if scenery == "leaves":
        for _ in range(rng.integers(80, 300)):
            (x, y), r = rng.uniform(0, 1, 2) * canvas.size, rng.uniform(2, 16) * unit
            green = tuple(rng.integers((20, 60, 10), (120, 170, 80)).tolist())
            draw.ellipse((x, y, x + r, y + r * rng.uniform(.4, 1.6)), green)
    elif scenery in TILES:
        wide, high, gap = np.array(TILES[scenery]) * unit * rng.uniform(.7, 1.4, 3)
        for row in range(int(canvas.height / high) + 1):
            for column in range(-1, int(canvas.width / wide) + 1):
                x, y = (column + row % 2 / 2 * (scenery == "bricks")) * wide, row * high
                top = y + (rng.uniform(.05, .4) * high if scenery == "shelves" else gap)
                colour = paint(rng) if scenery == "shelves" else shade(base, rng.uniform(.8, 1.15))
                draw.rectangle((x + gap, top, x + wide - gap, y + high - gap), colour)
    return canvas


def distractors(rng, canvas):
    """Draw things that look a little like faces: ovals, clocks, boards, heads from behind."""
    for _ in range(rng.integers(1, 7)):
        unit = canvas.height * np.exp(rng.uniform(np.log(.03), np.log(.16)))
        pen = Pen(canvas, rng.uniform(0, 1, 2) * canvas.size, unit, rng.uniform(-.6, .6))
        colour = pick(rng, SKINS) if rng.random() < .6 else paint(rng)
        kind = rng.choice(["oval", "clock", "board", "behind"])
        if kind == "board":
            pen.shape([(-.8, -1), (.8, -1), (.8, 1), (-.8, 1)], colour)
        else:
            pen.oval(0, 0, rng.uniform(.7, 1), 1, colour)
        if kind == "clock":
            pen.oval(0, 0, .55, .8, shade(colour, 1.3))
            pen.line([(0, -.6), (0, 0), (.35, .1)], .08, (30, 30, 30))
        elif kind == "behind":
            body(rng, pen, colour)
            pen.oval(0, -.1, .85, 1.05, pick(rng, HAIRS))


def body(rng, pen, skin):
    """Draw the neck and shoulders below a head."""
    wide = rng.uniform(1.3, 1.8)
    right = np.array([(.3, 1.25), (wide * .7, 1.5), (wide, 1.9), (wide * 1.05, 4)])
    pen.shape([*right, *(right * (-1, 1))[::-1]], paint(rng))
    pen.shape([(-.36, .5), (.36, .5), (.4, 1.3), (0, 1.55), (-.4, 1.3)], shade(skin, .78))


def head(rng, pen, skin):
    """Draw one head: returns its box and its WIDER attributes (expression, occlusion, pose).

    The box, xyxy on the canvas, fits the oval of the head tightly, without hair, hat and ears."""
    yaw, pitch = rng.triangular(-.7, 0, .7), rng.normal(0, .05)
    width, taper, hair, cloth = rng.uniform(.7, .82), rng.uniform(.08, .3), pick(rng, HAIRS), paint(rng)
    style = rng.choice(["bald", "short", "long", "round", "hat", "scarf"], p=[.1, .36, .24, .1, .12, .08])
    top = cloth if style in ("hat", "scarf") else hair
    if style == "round":
        pen.oval(0, -.35, width * 1.55, 1.1, top)
    for side in (-1, 1):
        if side * yaw < .35:  # otherwise the head hides this ear
            pen.oval(side * width * .98, 0, .13, .22, shade(skin, .85))
    if style in ("long", "scarf"):
        pen.oval(0, .25, width * 1.3, 1.4, top)
    outline, light = ring(width, 1, taper), rng.uniform(-.12, .12)
    for k in range(6):  # nested ovals look like a soft shadow on one side
        pen.shape(outline * (1 - .07 * k) + (light * k * .2, -.01 * k), shade(skin, .8 + .04 * k))

    def feature(angle, y):
        """Where a feature of the turned head appears (x, y), and its foreshortening there, 0.3 to 1."""
        return width * np.sin(angle + yaw), y + pitch, max(np.cos(angle + yaw), .3)

    expression = face(rng, pen, skin, hair, feature)
    cover, (x, y, narrow) = rng.choice(["", "beard", "mask", "glasses"], p=[.66, .1, .1, .14]), feature(0, 0)
    if cover == "beard":
        lips = [(x - .34 * narrow, y + .68), (x, y + .72), (x + .34 * narrow, y + .68)]
        pen.shape([*ring(width * .99, 1, taper, .58, 1.42), *lips], shade(hair, .9))
        pen.line([(x - .3 * narrow, y + .42), (x, y + .36), (x + .3 * narrow, y + .42)], .08, shade(hair, .9))
    elif cover == "mask":
        colour, nose = pick(rng, MASKS), [(x - .3 * narrow, y + .06), (x, y), (x + .3 * narrow, y + .06)]
        pen.shape([*ring(width * .97, .98, taper, .47, 1.53), *nose], colour)
        pen.line([(x - .35 * narrow, y + .4), (x + .35 * narrow, y + .4)], .03, shade(colour, .8))
    elif cover == "glasses":
        glasses(rng, pen, feature)
    if style != "bald":
        low, part = rng.uniform(-.72, -.45), rng.uniform(-.4, .4)
        right, left = (np.array([(0.95, -0.2), (0.6, low)]) * (width, 1),
                       np.array([(-0.6, low), (-0.95, -0.2)]) * (width, 1))
        pen.shape([*ring(width * 1.06, 1.12, 0, -0.42, 0.42), *right,
                   (part, low - rng.uniform(0, 0.2)), *left], top)
    if style == "hat":
        brim = width * np.array([-1.2, 1.2, 1.1, -1.1])
        pen.shape(np.stack([brim, [-.5, -.5, -.66, -.66]], 1), shade(cloth, .7))
    corners = pen.place(outline)
    return (*corners.min(0), *corners.max(0)), (int(expression), int(cover == "mask"), int(abs(yaw) > .45))


def face(rng, pen, skin, hair, feature):
    """Draw eyes, brows, nose and mouth; returns whether the mouth is open."""
    size, (brow, thick) = rng.uniform(.85, 1.25), rng.uniform(.04, .08, 2)
    iris, closed = pick(rng, EYES), rng.random() < .07
    for side in (-1, 1):
        x, y, narrow = feature(side * .5, -.12)
        lid = np.array([(-.16, 0), (0, -.1), (.16, 0)]) * (narrow, 1) * size
        pen.oval(x, y - .02, .2 * narrow, .13, shade(skin, .8))
        if not closed:
            pen.oval(x, y, .15 * size * narrow, .085 * size, (245, 243, 240))
            pen.oval(x, y, .078 * size * narrow, .08 * size, iris)
            pen.oval(x, y, .04 * size * narrow, .045 * size, (15, 12, 12))
        pen.line(lid * (1, -.5 if closed else 1) + (x, y), .03, shade(skin, .35))
        pen.line(lid * (1.15, brow / .1) + (x, y - .17), thick, shade(hair, .8))
    (bridge, top, _), (x, y, narrow) = feature(0, -.12), feature(.05, .2)
    pen.line([(bridge, top), (x, y)], .09, shade(skin, 1.08))
    pen.line([(bridge - .06, top + .04), (x - .11 * narrow, y)], .03, shade(skin, .78))
    pen.oval(x, y + .03, .13 * narrow, .075, shade(skin, .84))
    pen.oval(x, y, .1 * narrow, .06, shade(skin, 1.05))
    for side in (-.07, .07):
        pen.oval(x + side * narrow, y + .06, .03, .02, shade(skin, .45))

    (x, y, narrow), half, curve = feature(0, .52), rng.uniform(.2, .32), rng.uniform(-.05, .12)
    lips, is_open = shade((200, 95, 90), .45 + .55 * skin[0] / 255), rng.random() < .3
    if is_open:
        pen.oval(x, y, half * narrow, rng.uniform(.08, .16), lips)
        pen.oval(x, y, half * .8 * narrow, .07, (70, 20, 25))
        pen.oval(x, y - .04, half * .65 * narrow, .035, (250, 248, 240))
    else:
        half *= narrow
        pen.oval(x, y + curve / 2, half * .7, .07, lips)
        pen.line([(x - half, y - curve), (x, y + curve / 2), (x + half, y - curve)], .035, shade(lips, .6))
    return is_open


def glasses(rng, pen, feature):
    """Draw clear glasses or sunglasses."""
    frame, dark = pick(rng, HAIRS), rng.random() < .4
    for x, y, narrow in (feature(-.5, -.1), feature(.5, -.1)):
        if dark:
            pen.oval(x, y, .25 * narrow, .19, (28, 26, 30))
        pen.line(ring(.25 * narrow, .19) + (x, y), .045, frame)
    pen.line([feature(side * .15, -.13)[:2] for side in (-1, 1)], .045, frame)


def placements(rng, event, width, height):
    """Place heads: boxes `[(x, y, w, h)]` before they are tilted, with room for hair between them.

    One in eight of the larger heads may reach over the edge of the photo."""
    _, _, fewest, most, low, high = event
    placed = []
    for _ in range(rng.integers(fewest, most + 1)):
        w = np.exp(rng.uniform(np.log(low), np.log(high))) * min(width, height) / 240
        w = max(w, 11.5)  # keeps both sides of every box at 10 px or more
        h, slack = w * 1.3, .25 * w if w > 30 and rng.random() < .125 else 0
        for _ in range(30):
            x, y = rng.uniform(-slack, width - w + slack), rng.uniform(-slack, height - h + slack)
            if all(x + w * 1.2 < ox or ox + ow * 1.2 < x or y + h * 1.2 < oy or oy + oh * 1.2 < y
                   for ox, oy, ow, oh in placed):
                placed.append((x, y, w, h))
                break
    return placed


def photo(rng, width, height, empty):
    """Draw one photo, without people if `empty`: (event, RGB image, one row per face).

    A row is x y w h blur expression illumination invalid occlusion pose, as in WIDER FACE."""
    event = EVENTS[rng.integers(len(EVENTS))]
    canvas = background(rng, event[1], width, height)
    distractors(rng, canvas)
    people = [(Pen(canvas, ((x + w / 2) * SUPER, (y + h / 2) * SUPER), h / 2 * SUPER,
                   rng.triangular(-.45, 0, .45)), pick(rng, SKINS))
              for x, y, w, h in ([] if empty else placements(rng, event, width, height))]
    for pen, skin in people:  # all bodies first, so that no body covers a face
        body(rng, pen, skin)
    heads = [head(rng, pen, skin) for pen, skin in people]

    blur, light = max(rng.uniform(-2.2, 1.3), 0), rng.triangular(.45, 1, 1.15)
    pixels = np.asarray(canvas.reduce(SUPER).filter(ImageFilter.GaussianBlur(blur)), float)
    pixels = pixels * light * rng.uniform(.93, 1.07, 3) + rng.normal(0, rng.uniform(0, 7), pixels.shape)
    rows = []
    for box, (expression, occlusion, pose) in heads:
        x1, y1 = np.maximum(np.floor(np.array(box[:2]) / SUPER), 0).astype(int).tolist()
        x2, y2 = np.minimum(np.ceil(np.array(box[2:]) / SUPER), (width, height)).astype(int).tolist()
        blurred, dark = (blur > 0) + (blur > .9), int(light < .65)
        rows.append((x1, y1, x2 - x1, y2 - y1, blurred, expression, dark, 0, occlusion, pose))
    return event[0], Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), rows


def draw_split(folder, split, count, size, seed):
    """Draw `count` photos into folder/split, and write their WIDER-style text and their json.

    Returns the counts of wider_to_coco.py's `convert`."""
    lines = []
    for index in tqdm(range(count), f"drawing {split}", disable=None):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        event, image, rows = photo(rng, *size, empty=index % 10 == 3)
        name = f"{event}/{event.replace('--', '_')}_{split}_{index}.jpg"
        (folder / split / event).mkdir(parents=True, exist_ok=True)
        image.save(folder / split / name, quality=int(rng.integers(70, 96)))
        lines += [name, str(len(rows)), *(" ".join(map(str, row)) for row in rows or [(0,) * 10])]
    text = folder / f"wider_{split}_bbx_gt.txt"
    with whole_file(text) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return convert(text, folder / split, folder / f"{split}.json")


def draw_sample(folder, train=240, val=40, size=(320, 240), seed=0):
    """Draw a dataset of `train` + `val` photos of `size` (width, height) into `folder`: `{split: counts}`.

    Raises InputError if `folder` has a train.json or val.json that this script did not write."""
    folder = Path(folder)
    for split in SPLITS:
        if (folder / f"{split}.json").exists() and not (folder / f"wider_{split}_bbx_gt.txt").exists():
            raise InputError(
                f"{folder}/{split}.json: was not drawn by sample.py and stays, choose another folder")
    return {split: draw_split(folder, split, count, size, seed) for split, count in zip(SPLITS, (train, val))}


@command
def main(argv=None):
    """Draw the training and the validation photos."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("folder", help="where to write, such as data/sample")
    add("--train", type=int, default=240, help="photos to train on (default %(default)s)")
    add("--val", type=int, default=40, help="photos to validate on (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other photos (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.train, args.val) < 1 or args.seed < 0:
        raise InputError("--train and --val take 1 photo or more, --seed 0 or more")
    start = time.perf_counter()
    counts = draw_sample(args.folder, args.train, args.val, seed=args.seed)
    for split, met in counts.items():
        print(f"{args.folder}/{split}.json: {met['pictures']} photos, {met['annotations']} faces, "
              f"{met['without annotation']} photos without faces")
    print(f"drawn in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
