"""Find faces on pictures, in folders, on a video or a webcam, and draw them.

    python detect.py photo.jpg                                   # detections/photo.jpg, detections.json
    python detect.py folder 'more/*.png' --score 0.5 --out found
    python detect.py clip.mp4                                    # needs OpenCV; so does a webcam: detect.py 0
    python detect.py rtsp://camera/live                          # so do http:// and https://
    python detect.py photo.jpg --size 640x480                    # a larger input finds smaller faces
    python detect.py crowd.jpg --tiles 300                       # still smaller ones, in tiles of the photo
    python detect.py folder --coco pre.json                      # first labels, to correct or to train on
    python detect.py no-faces --mine 0.3 negatives.json          # photos without faces that fool the model
"""

import glob
import itertools
import os
import re
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

# First, so that Ctrl-C during the slow imports below ends in one line.
from support.script import (InputError, TilesFlag, command, new_parser, parse_picture, parse_size, whole_file,
                    write_json)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.coco import to_xywh
from detector import MODEL, TiledDetector, detect, load_detector, to_picture, to_pixels
from support.pictures import PICTURES, contact_sheet, draw_faces, load_picture, save_picture

DRAWN = PICTURES - {".avif", ".jp2"}  # drawings keep these formats
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
STREAMS = ("http://", "https://", "rtsp://")
SHOWN = 0.4                # least score of a face that is shown, where neither --score nor the model says
SURE, DOUBTFUL = 0.5, 0.2  # --coco: least score of a face, and of what may be one
BATCH = 8                  # pictures that go through the network at once, where it has an input size
AHEAD = BATCH              # pictures that are read before it, and drawn after it, meanwhile


@dataclass
class Work:
    """An input on its way: read, searched, drawn."""
    source: Path | int | str          # a picture or video; a webcam's number; a stream's address
    target: Path                      # where the drawing goes
    image: Image.Image | None = None  # the picture, until it is drawn
    pixels: torch.Tensor | None = None
    size: tuple = ()                  # (width, height)
    faces: np.ndarray | None = None   # [K, 5], best first
    entry: dict | None = None         # for detections.json
    drawn: Image.Image | None = None  # small, for --sheet
    error: str = ""

    def is_video(self):
        return not isinstance(self.source, Path) or self.source.suffix.lower() in VIDEOS


def find_inputs(arguments, out):
    """List the pictures and videos that the arguments name: files, folders (all within), globs; each once.

    Results of an earlier run, in a folder `out` below a searched one, are left out. Raises InputError if an
    argument names nothing.
    """
    found, out = [], Path(out).resolve()
    for argument in arguments:
        if os.path.isdir(argument):
            files = sorted(p for p in Path(argument).rglob("*") if p.suffix.lower() in PICTURES | VIDEOS)
            if Path(argument).resolve() in out.parents:
                files = [file for file in files if out not in file.resolve().parents]
        elif os.path.exists(argument):
            files = [Path(argument)]
        else:
            files = [
                Path(name) for name in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise InputError(f"{argument}: no such file, nor a folder or pattern with pictures")
        found += files
    return list(dict.fromkeys(found))


def name_outputs(files, out):
    """Choose where each file's drawing goes: flat in the folder `out`, x-2.jpg for the second x.jpg.

    Webcams (numbers) and streams (addresses) become .mp4 files. Raises InputError where a drawing would
    overwrite an input.
    """
    targets, taken = [], set()
    for source in files:
        file = source
        if isinstance(source, int):
            file = Path(f"webcam{source}.mp4")
        elif isinstance(source, str):
            address = urlsplit(source)
            file = Path(Path(address.path).stem or address.hostname or "stream").with_suffix(".mp4")
        video = file.suffix.lower() in VIDEOS
        kept = file.suffix.lower() == ".mp4" if video else file.suffix.lower() in DRAWN
        name = file.name if kept else file.name + (".mp4" if video else ".png")
        numbered = itertools.chain(
            [name], (f"{Path(name).stem}-{n}{Path(name).suffix}" for n in itertools.count(2)))
        name = next(name for name in numbered if name.lower() not in taken)
        taken.add(name.lower())
        targets.append(Path(out) / name)
    inputs = {file.resolve() for file in files if isinstance(file, Path)}
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"{target}: --out {out} would overwrite it; name another folder")
    return targets


def open_video(source):
    """Open a video file (Path), a stream (address) or a webcam (number) in OpenCV: (cv2, the capture)."""
    name = f"webcam {source}" if isinstance(source, int) else str(source)
    try:
        import cv2
    except ImportError:
        raise InputError(f"{name}: videos and webcams need OpenCV: "
                         "pip install 'opencv-python-headless<4.12'") from None
    capture = cv2.VideoCapture(source if isinstance(source, int) else name)
    if not capture.isOpened():
        raise InputError(f"{name}: cannot be opened as a video")
    return cv2, capture


def detect_video(detector, source, out, score):
    """Annotate a video, or a webcam or stream until Ctrl-C, to the MP4 `out`: the faces of its frames.

    What is live is recorded at its true speed. A machine too slow for every frame writes the last one again
    until its time is over, and frames that come faster than the recording's rate are left out.
    """
    cv2, capture = open_video(source)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    rate, total = capture.get(cv2.CAP_PROP_FPS), max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    live = not isinstance(source, Path) and (isinstance(source, int) or not total)
    if not rate > 0 or live and rate > 120:  # drivers without a rate say 0 or their clock's
        rate = 25
    frames, began, drawn = [], None, None
    with whole_file(out) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        try:
            with tqdm(total=None if live else total or None, unit="frame", desc=str(source)) as bar:
                while True:
                    ok, frame = capture.read()
                    if not ok:
                        break
                    bar.update()
                    if live:
                        now = time.monotonic()
                        began = began or now
                        due = int((now - began) * rate)  # the place of this frame in the recording
                        if due < len(frames):
                            continue
                        for _ in range(due - len(frames)):
                            writer.write(drawn)
                            frames.append(frames[-1])
                    image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    faces = likely_faces(detector, image, score)
                    drawn = np.array(draw_faces(image, faces[:, :4], faces[:, 4]))
                    drawn = cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
                    writer.write(drawn)
                    frames.append(faces)
        except KeyboardInterrupt:  # how a live recording is meant to end; a file's is given up
            if not live:
                raise
        finally:
            writer.release()
            capture.release()
        if not frames:
            raise InputError(f"{source}: no frame could be read")
    return frames


def likely_faces(detector, image, score):
    """The faces `[K, 5]` on a picture of at least that score."""
    faces = detect(detector, image)
    return faces[faces[:, 4] >= score]


def in_threads(pool, do, items):
    """Yield `do(item)` of each item, in order; threads do up to AHEAD of them meanwhile."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(do, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read(detector, work):
    """Read a picture and make it ready for the detector."""
    if not work.is_video():
        try:
            work.image = load_picture(work.source)
            work.size, work.pixels = work.image.size, to_pixels(detector, work.image)
        except InputError as error:  # the others go on
            work.error = str(error)
    return work


def search(detector, works, score, videos):
    """Find the faces on what has been read, several pictures at once; videos only if they are wanted."""
    for batch in batches(works, BATCH if detector.size else 1):
        pictures = [work for work in batch if work.pixels is not None]
        found = detector(torch.stack([work.pixels for work in pictures])) if pictures else []
        for work, faces in zip(pictures, found):
            faces = to_picture(faces, detector.size or work.size, work.size)
            work.faces, work.pixels = faces[faces[:, 4] >= score], None
            work.entry = {"file": str(work.source), "width": work.size[0], "height": work.size[1],
                          "faces": as_json(work.faces)}
        for work in batch:
            if work.is_video():
                search_video(detector, work, score, videos)
            yield work


def search_video(detector, work, score, wanted):
    """Find and draw the faces on a video."""
    try:
        if not wanted:
            raise InputError(f"{work.source}: a video; --coco and --mine take pictures")
        frames = detect_video(detector, work.source, work.target, score)
    except InputError as error:
        work.error = str(error)
        return
    work.faces = np.concatenate(frames)
    work.entry = {"file": str(work.source), "drawn": work.target.name,
                  "frames": [as_json(faces) for faces in frames]}


def batches(works, size):
    """Cut what comes into lists of at most `size`. A video ends one: what is before it comes first."""
    batch = []
    for work in works:
        batch.append(work)
        if len(batch) == size or work.is_video():
            yield batch
            batch = []
    if batch:
        yield batch


def draw(work, save, sheet):
    """Draw the faces on a picture, and save that or keep a small copy for the sheet, as wanted."""
    image, work.image = work.image, None
    if image is None or not (save or sheet):
        return work
    drawn = draw_faces(image, work.faces[:, :4], work.faces[:, 4])
    try:
        if save:
            save_picture(drawn, work.target)
            work.entry["drawn"] = work.target.name
    except InputError as error:  # the faces are found, whether or not they can be drawn
        work.error = str(error)
        return work
    if sheet:
        drawn.thumbnail((640, 640))  # 24 large ones would fill the memory
        work.drawn = drawn
    return work


def as_json(faces):
    """Faces `[K, 5]` for the JSON file."""
    return [{"box": [round(v, 2) for v in face[:4]], "score": round(face[4], 5)} for face in faces.tolist()]


def to_coco(works, out, labelled):
    """COCO content of pictures, with their faces if `labelled`; names are relative to the file `out`.

    A face has its score. What may be a face (below SURE) is marked iscrowd: neither face nor background.
    """
    folder = os.path.realpath(Path(out).parent)
    images, annotations = [], []
    for image_id, work in enumerate(works, 1):
        file = os.path.join(os.path.realpath(work.source.parent), work.source.name)
        images.append({"id": image_id, "file_name": Path(os.path.relpath(file, folder)).as_posix(),
                       "width": work.size[0], "height": work.size[1]})
        for box, score in zip(to_xywh(work.faces[:, :4]).round(2).tolist(), work.faces[:, 4].tolist()):
            if labelled:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                                    "bbox": box, "area": round(box[2] * box[3], 2),
                                    "iscrowd": int(score < SURE), "score": round(score, 5)})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}


def write_results(args, works, score):
    """Write the json that was asked for; returns what to say about it."""
    files = f"{len(works)} files"
    if args.coco:
        content = to_coco(works, args.coco, labelled=True)
        doubtful = sum(face["iscrowd"] for face in content["annotations"])
        write_json(args.coco, content)
        return (f"{len(content['annotations']) - doubtful} faces and {doubtful} doubtful (iscrowd) "
                f"in {files}; see {args.coco}")
    if args.mine:
        fooled = [work for work in works if len(work.faces)]
        write_json(args.mine[1], to_coco(fooled, args.mine[1], labelled=False))
        return f"{len(fooled)} of {files} have a face of score {score:g} or more; see {args.mine[1]}"
    write_json(Path(args.out) / "detections.json", [work.entry for work in works])
    return f"{sum(len(work.faces) for work in works)} faces in {files}; see {args.out}"


def choose_score(args, detector):
    """The least score of a face that is kept, and what to say where the model chose it."""
    threshold = getattr(detector, "threshold", None)
    if args.coco or args.mine:
        return (DOUBTFUL if args.coco else args.mine[0]), ""
    if args.score is not None or not threshold:
        return (SHOWN if args.score is None else args.score), ""
    said = f"; score {threshold['score']:.3f} is the model's, for {threshold['target']}"
    size, tiles = args.size or detector.size, args.tiles
    if size and list(size) != list(threshold["size"]) or tiles != (threshold["tiles"] or None):
        made = "{}x{}".format(*threshold["size"])
        made += " in tiles of {}, {}".format(*threshold["tiles"]) if threshold["tiles"] else ""
        said += f" at {made}: not at this size"
    return threshold["score"], said


def is_webcam(name):
    """Whether an argument is a webcam's number, and no file's name."""
    return re.fullmatch("[0-9]{1,3}", name) is not None and not os.path.exists(name)


def parse_args(argv):
    """Parse and check the flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="pictures, folders, patterns, videos, a stream's http://, https:// or "
        "rtsp:// address, or a webcam's number")
    add("--model", default=MODEL, help="a checkpoint, .onnx or .xml (default: the shipped network)")
    add("--out", default="detections", help="folder of the results (default %(default)s)")
    add("--sheet", "--grid", type=parse_picture, metavar="PNG",
        help="also lay the first 24 pictures side by side in one")
    add("--score", type=float,
        help=f"least score of a face that is shown (default: the model's own threshold, else {SHOWN})")
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--tiles", action=TilesFlag)
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    add("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    add = parser.add_argument_group("instead of drawings").add_argument
    add("--coco", metavar="JSON", help="write first labels as COCO: a face from score "
        f"{SURE} on, iscrowd (neither face nor background) from {DOUBTFUL} on")
    add("--mine", nargs=2, metavar=("SCORE", "JSON"), help="of photos without faces, write those with a "
        "face of that score as COCO, to train on")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.coco, args.mine, args.score is not None))) > 1:
        parser.error("--coco, --mine and --score: one of them (each sets the least score)")
    if args.mine:
        try:
            args.mine[0] = float(args.mine[0])
        except ValueError:
            parser.error(f"--mine {args.mine[0]}: a score is expected, such as 0.3")
    name = args.coco or (args.mine and args.mine[1])
    if name and Path(name).suffix != ".json":
        parser.error(f"{name}: the name of a .json is expected")
    return args


@command
def main(argv=None):
    """Detect faces on everything named, write annotated copies and one JSON."""
    args = parse_args(argv)
    def is_file(name):
        return not is_webcam(name) and not name.lower().startswith(STREAMS)

    sources = find_inputs([name for name in args.inputs if is_file(name)], args.out)
    sources += [int(name) if is_webcam(name) else name for name in args.inputs if not is_file(name)]
    works = [Work(*job) for job in zip(sources, name_outputs(sources, args.out))]
    detector = load_detector(args.model, args.size, args.device, args.colour, args.range)
    score, said = choose_score(args, detector)
    if args.tiles:
        detector = TiledDetector(detector, *args.tiles)

    done, failed, shown, started = [], [], [], time.perf_counter()
    save = not (args.coco or args.mine)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # Reading and drawing in threads, the network in this one.
        found = search(detector, in_threads(pool, lambda work: read(detector, work), works), score, save)
        drawn = in_threads(pool, lambda work: draw(work, save, args.sheet), found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures; threads cannot each set that
            quiet = True if len(works) < 2 else None
            for work in tqdm(drawn, total=len(works), unit="picture", disable=quiet):
                if work.entry:
                    done.append(work)
                if work.error:
                    failed.append(work.error)
                if work.drawn and len(shown) < 24:
                    shown.append(work.drawn)
                work.drawn = None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if done:  # what an earlier run has found is not replaced by nothing
        report = write_results(args, done, score)
    else:
        report = "0 faces in 0 files"
    if shown:
        save_picture(contact_sheet(shown), args.sheet)
        report += f" and {args.sheet}"
    print(f"{report}; {time.perf_counter() - started:.1f} s{said}")
    if failed:
        raise InputError(f"{len(failed)} of {len(works)} failed: " + "; ".join(failed[:5]))


if __name__ == "__main__":
    main()
