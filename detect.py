"""Find faces on pictures, in folders, on a video or a webcam, and draw them.

    python detect.py photo.jpg                     # detections/photo.jpg and detections/detections.json
    python detect.py folder 'more/*.png' --score 0.5 --out found
    python detect.py clip.mp4                      # needs OpenCV; so do a webcam, 0, and rtsp:// or http://
    python detect.py folder clip.mp4 --blur        # makes the faces unrecognisable instead
    python detect.py photo.jpg --size 640x480      # a larger input finds smaller faces
    python detect.py crowd.jpg --tiles 300         # still smaller ones, in tiles of the photo
"""

import glob
import itertools
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.script import InputError, command, Parser, require, write_json

from tqdm import tqdm

from detector import MODEL, detect, find, load_detector, to_pixels
from support.options import add_model_flags, number
from support.pictures import HEIC, PICTURES, draw_faces, hide_faces, load_picture, save_picture
from support.video import VIDEOS, annotate_video

KEPT = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".mp4"}  # formats of drawings
STREAMS = ("http://", "https://", "rtsp://")
SHOWN = 0.4  # least score of a face that is shown, where neither --score nor the model says
BATCH = 8    # pictures that go through the network at once; as many more are read ahead by threads
parse_score = number(float, lambda score: 0 <= score <= 1, "a score between 0 and 1")


def is_video(source):
    """Whether a source is a video (Path), webcam (number) or stream (address)."""
    return not isinstance(source, Path) or source.suffix.lower() in VIDEOS


def find_inputs(arguments, out):
    """The pictures and videos in files, folders and globs, each once, and what was left out; InputError."""
    found, others = [], Counter()
    for argument in arguments:
        if os.path.isdir(argument):
            inside = files_in(Path(argument), Path(out).resolve())
            files = [path for path in inside if path.suffix.lower() in PICTURES | VIDEOS]
            others.update(path.suffix.lower() or path.name for path in sorted({*inside} - {*files}))
        else:
            names = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
            files = [Path(name) for name in names if not os.path.isdir(name)]
        require(files, f"{argument}: no such file, nor a folder or pattern with pictures{left_out(others)}")
        found += files
    return list(dict.fromkeys(found)), left_out(others)


def files_in(folder, out):
    """All files in a folder, without what a Mac adds and without results of an earlier run, in `out`."""
    own = out if folder.resolve() in out.parents else None
    return [path for path in sorted(folder.rglob("*"))
            if not path.is_dir() and own not in path.resolve().parents
            and not path.name.startswith("._") and "__MACOSX" not in path.parts]


def left_out(others):
    """What was left out, {ending: how many}, as the end of a line."""
    if not others:
        return ""
    kinds = ", ".join(f"{many} {kind}" for kind, many in others.most_common())
    return f"; left out: {kinds}" + " (pip install pillow-heif reads HEIC)" * bool(HEIC & set(others))


def name_outputs(sources, out):
    """Where each drawing goes: flat in folder `out`, x-2.jpg for the second x.jpg. Never over an input."""
    targets, taken = {}, set()
    inputs = {source.resolve() for source in sources if isinstance(source, Path)}
    for source in sources:
        name = source.name if isinstance(source, Path) else "live.mp4"
        stem, ending = os.path.splitext(name)
        if ending.lower() not in KEPT:
            stem, ending = name, ".mp4" if is_video(source) else ".png"
        numbered = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(stem + ending for stem in numbered if (stem + ending).lower() not in taken)
        taken.add(name.lower())
        targets[source] = Path(out) / name
        require(targets[source].resolve() not in inputs,
                f"{targets[source]}: --out {out} would overwrite it; name another folder")
    return targets


def search(detector, files, score, use):
    """Find the faces on pictures: yields `use(file, picture, faces [K, 5])` of each, in order.

    A file that cannot be read gives its InputError as the picture, and None. Threads read the next pictures
    and use the last ones while some go through the network."""
    def read(file):
        try:
            image = load_picture(file)
            return image, to_pixels(detector, image)
        except InputError as error:  # the others go on
            return error, None

    used = ()
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # of large pictures; threads cannot each set that
        reading = pool.map(read, files[:BATCH])
        for first in range(0, len(files), BATCH):
            images, pixels = zip(*reading)
            reading = pool.map(read, files[first + BATCH:first + 2 * BATCH])
            good = [(own, image.size) for image, own in zip(images, pixels) if own is not None]
            found = iter(find(detector, [own for own, _ in good], [size for _, size in good]))
            faces = [None if own is None else next(found) for own in pixels]
            faces = [own if own is None else own[own[:, 4] >= score] for own in faces]
            yield from used
            used = pool.map(use, files[first:first + BATCH], images, faces)
        yield from used


def save_drawing(source, target, image, faces, change):
    """Write what `change(image, faces)` makes of a picture: its entry for detections.json, an error or ""."""
    if faces is None:
        return None, str(image)
    entry = {"file": str(source), "width": image.width, "height": image.height, "faces": as_json(faces)}
    try:
        save_picture(change(image, faces), target)
    except InputError as error:  # the faces are found, whether or not they can be drawn
        return entry, str(error)
    return entry | {"drawn": target.name}, ""


def save_video(source, target, find_faces, change):
    """The same for a video, webcam or stream, with the faces of each frame."""
    frames, drawn, error = [], {"drawn": target.name}, ""
    try:
        lost = annotate_video(source, target, find_faces, change, frames)
        if lost:
            error = f"{source}: {len(frames)} of {len(frames) + lost} frames could be read"
    except InputError as trouble:
        drawn, error = {}, str(trouble)
    entry = {"file": str(source), "frames": [as_json(faces) for faces in frames]} | drawn
    return entry if frames else None, error


def as_json(faces):
    """Faces `[K, 5]` for the JSON file."""
    return [{"box": [round(v, 2) for v in face[:4]], "score": round(face[4], 5)} for face in faces.tolist()]


def describe(entries, pictures):
    """What was found: the faces on pictures, if any were given, and of each video the frames with faces."""
    faces = [len(entry["faces"]) for entry in entries if "faces" in entry]
    found = [f"faces in {sum(map(bool, entry['frames']))} of {count(len(entry['frames']), 'frame')} of "
             f"{entry['file']}" for entry in entries if "frames" in entry]
    if pictures:
        found.insert(0, f"{count(sum(faces), 'face')} on {count(len(faces), 'picture')}")
    return ", ".join(found)


def count(number, noun):
    """"1 face", "2 faces"."""
    return f"{number} {noun}" + "s" * (number != 1)


def refuse_failed(failed, total):
    """Raise InputError if any of the inputs failed."""
    require(not failed, f"{len(failed)} of {total} failed: {'; '.join(map(str, failed[:5]))}")


def chosen_detector(args):
    """The detector that the flags choose."""
    return load_detector(args.model or MODEL, args.size, args.device, args.colour, args.range, args.tiles)


@command
def main(argv=None):
    """Detect faces on everything named, write annotated copies and one JSON."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="pictures, folders, patterns, videos, streams or a webcam's number")
    add("--out", default="detections", help="folder of the results (default %(default)s)")
    add("--score", type=parse_score,
        help=f"least score of a face that is shown (default: the model's own threshold, else {SHOWN})")
    add("--blur", action="store_true", help="make the faces unrecognisable instead of drawing boxes")
    add("--no-scores", action="store_true", help="draw the boxes alone")
    add_model_flags(parser)
    args = parser.parse_args(argv)

    webcams = [word for word in args.inputs if re.fullmatch("[0-9]{1,3}", word) and not os.path.exists(word)]
    streams = [word for word in args.inputs if word.lower().startswith(STREAMS)]
    sources, omitted = find_inputs([word for word in args.inputs if word not in webcams + streams], args.out)
    sources += [*map(int, webcams), *streams]
    targets = name_outputs(sources, args.out)
    detector = chosen_detector(args)
    score = SHOWN if args.score is None else args.score
    reason = ""
    if detector.threshold and args.score is None:
        score = detector.threshold["score"]
        reason = f"; score {score:.3f} is the model's, for {detector.threshold['target']}"
    started = time.perf_counter()

    def find_faces(image):
        faces = detect(detector, image)
        return faces[faces[:, 4] >= score]

    def change(image, faces):
        if args.blur:
            return hide_faces(image, faces[:, :4])
        return draw_faces(image, faces[:, :4], None if args.no_scores else faces[:, 4])

    def draw(file, image, faces):
        return save_drawing(file, targets[file], image, faces, change)

    pictures = [source for source in sources if not is_video(source)]
    found = search(detector, pictures, score, draw)
    results = list(tqdm(found, total=len(pictures), unit="picture", disable=None))
    for source in filter(is_video, sources):
        results.append(save_video(source, targets[source], find_faces, change))
    entries = [entry for entry, _ in results if entry]
    if entries:  # what an earlier run has found is not replaced by nothing
        write_json(Path(args.out) / "detections.json", entries)
        seconds = time.perf_counter() - started
        print(f"{describe(entries, pictures)}; see {args.out}; {seconds:.1f} s{reason}{omitted}")
    refuse_failed([error for _, error in results if error], len(sources))


if __name__ == "__main__":
    main()
