"""Find faces on pictures, in folders, on a video or a webcam, and draw them.

    python detect.py photo.jpg                                   # detections/photo.jpg, detections.json
    python detect.py folder 'more/*.png' --score 0.5 --out found
    python detect.py clip.mp4                                    # needs OpenCV; so does a webcam: detect.py 0
    python detect.py photo.jpg --size 640x480                    # a larger input finds smaller faces
"""

import glob
import itertools
import os
import re
import time
from pathlib import Path

# First, so that Ctrl-C during the slow imports below ends in one line.
from script import InputError, command, new_parser, parse_picture, parse_size, whole_file, write_json

import numpy as np
from PIL import Image
from tqdm import tqdm

from detector import MODEL, detect, load_detector
from pictures import contact_sheet, draw_faces, load_picture, save_picture

DRAWN = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}  # drawings keep these formats
PICTURES = DRAWN | {".avif", ".jp2"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}


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

    Raises InputError where a drawing would overwrite an input.
    """
    targets, taken = [], set()
    for file in files:
        video = file.suffix.lower() in VIDEOS
        kept = file.suffix.lower() == ".mp4" if video else file.suffix.lower() in DRAWN
        name = file.name if kept else file.name + (".mp4" if video else ".png")
        numbered = itertools.chain(
            [name], (f"{Path(name).stem}-{n}{Path(name).suffix}" for n in itertools.count(2)))
        name = next(name for name in numbered if name.lower() not in taken)
        taken.add(name.lower())
        targets.append(Path(out) / name)
    inputs = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"{target}: --out {out} would overwrite it; name another folder")
    return targets


def open_video(source):
    """Open a video file (Path) or webcam (number) in OpenCV: (the cv2 module, the capture)."""
    webcam = "webcam " if isinstance(source, int) else ""
    try:
        import cv2
    except ImportError:
        raise InputError(f"{webcam}{source}: videos and webcams need OpenCV: "
                         "pip install 'opencv-python-headless<4.12'") from None
    capture = cv2.VideoCapture(source if webcam else str(source))
    if not capture.isOpened():
        raise InputError(f"{webcam}{source}: cannot be opened as a video")
    return cv2, capture


def detect_video(detector, source, out, score):
    """Annotate a video file, or a webcam until Ctrl-C, to the MP4 `out`; returns the faces of every frame."""
    cv2, capture = open_video(source)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    live, rate = isinstance(source, int), capture.get(cv2.CAP_PROP_FPS) or 25
    frames, total = [], None if live else int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    with whole_file(out) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        try:
            with tqdm(total=total, unit="frame", desc=str(source)) as bar:
                while True:
                    ok, frame = capture.read()
                    if not ok:
                        break
                    image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    frames.append(likely_faces(detector, image, score))
                    drawn = np.array(draw_faces(image, frames[-1][:, :4], frames[-1][:, 4]))
                    writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
                    bar.update()
        except KeyboardInterrupt:  # how a webcam's recording is meant to end; a file's is given up
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


def as_json(faces):
    """Faces `[K, 5]` for the JSON file."""
    return [{"box": [round(v, 2) for v in face[:4]], "score": round(face[4], 5)} for face in faces.tolist()]


def is_webcam(name):
    """Whether an argument is a webcam's number, and no file's name."""
    return re.fullmatch("[0-9]{1,3}", name) is not None and not os.path.exists(name)


def parse_args(argv):
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="pictures, folders, patterns, videos, or a webcam's number")
    add("--model", default=MODEL, help="a checkpoint, .onnx or .xml (default: the shipped network)")
    add("--out", default="detections", help="folder of the results (default %(default)s)")
    add("--sheet", "--grid", type=parse_picture, metavar="PNG",
        help="also lay the first 24 pictures side by side in one")
    add("--score", type=float, default=0.4, help="least score of a face that is shown (default %(default)s)")
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    add("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    return parser.parse_args(argv)


@command
def main(argv=None):
    """Detect faces on everything named, write annotated copies and one JSON."""
    args = parse_args(argv)
    webcams = [int(name) for name in args.inputs if is_webcam(name)]
    files = find_inputs([name for name in args.inputs if not is_webcam(name)], args.out)
    jobs = list(zip(files, name_outputs(files, args.out)))
    jobs += [(number, Path(args.out) / f"webcam{number}.mp4") for number in webcams]
    detector = load_detector(args.model, args.size, args.device, args.colour, args.range)

    entries, failed, shown, count, started = [], [], [], 0, time.perf_counter()
    for source, target in tqdm(jobs, unit="picture", disable=True if len(jobs) < 2 else None):
        entry = {"file": str(source)}
        try:
            if isinstance(source, int) or source.suffix.lower() in VIDEOS:
                frames = detect_video(detector, source, target, args.score)
                entries.append(entry | {"drawn": target.name, "frames": [as_json(faces) for faces in frames]})
                count += sum(map(len, frames))
                continue
            image = load_picture(source)
            faces = likely_faces(detector, image, args.score)
            count += len(faces)
            entry |= {"width": image.width, "height": image.height, "faces": as_json(faces)}
            entries.append(entry)  # found, whether or not it can be drawn
            drawn = draw_faces(image, faces[:, :4], faces[:, 4])
            save_picture(drawn, target)
            entry["drawn"] = target.name
            if args.sheet and len(shown) < 24:
                drawn.thumbnail((640, 640))  # 24 large ones would fill the memory
                shown.append(drawn)
        except InputError as error:  # the others go on
            failed.append(str(error))
    if entries:  # what an earlier run has found is not replaced by nothing
        write_json(Path(args.out) / "detections.json", entries)
    if shown:
        save_picture(contact_sheet(shown), args.sheet)
    print(f"{count} faces in {len(entries)} files, {time.perf_counter() - started:.1f} s; "
          f"see {args.sheet if shown else args.out}")
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} failed: " + "; ".join(failed[:5]))


if __name__ == "__main__":
    main()
