"""Find faces on pictures, in folders, on a video or a webcam, and draw them.

    python detect.py photo.jpg                                   # detections/photo.jpg, detections/detections.json
    python detect.py folder 'more/*.png' --score 0.5 --out found
    python detect.py clip.mp4                                    # needs OpenCV, as does a webcam: python detect.py 0
    python detect.py photo.jpg --size 640x480                    # a larger input finds smaller faces
"""
import argparse
import glob
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import clip_boxes_to_image, nms
from tqdm import tqdm

from anchors import decode, make_anchors
from data import resize_view
from formats import InputError, bad_values, command, parse_picture, parse_size, whole_file, write_json
from model import STRIDE, load_model
from pictures import draw_faces, grid, load_picture, save_picture

SCORE, NMS_IOU, TOP = 0.02, 0.45, 200  # the reference's: least score, NMS threshold, most faces a picture
MODEL = "weights/face_ssd300.pth"
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}


def postprocess(logits, offsets, anchors, score=SCORE):
    """Raw outputs to faces: logits `[B, A, 2]`, offsets `[B, A, 4]`, anchors `[A, 4]` to B tensors `[K, 5]`.

    A face is xyxy in pixels of the network input and its score, best first: softmax score above `score`, NMS at IoU
    0.45, at most 200. Boxes may reach outside the input, `to_picture` clips them.
    """
    scores, boxes = logits.float().softmax(-1)[..., 1], decode(offsets.float(), anchors)  # [B, A], [B, A, 4]
    faces = []
    for own_scores, own_boxes in zip(scores, boxes):
        own = own_scores > score
        own_scores, own_boxes = own_scores[own], own_boxes[own]
        kept = nms(own_boxes, own_scores, NMS_IOU)[:TOP]
        faces.append(torch.cat([own_boxes[kept], own_scores[kept, None]], 1))
    return faces


def to_picture(faces, input_size, picture_size):
    """Faces `[K, 5]` in pixels of the network input to float64 `[K, 5]` in pixels of the picture, clipped to it.

    Both sizes are (width, height). The only place where boxes change from one to the other.
    """
    scale = np.tile(np.divide(picture_size, input_size), 2)
    boxes = torch.from_numpy(np.asarray(faces[:, :4], np.float64) * scale)
    return np.concatenate([clip_boxes_to_image(boxes, picture_size[::-1]).numpy(), np.asarray(faces[:, 4:], np.float64)], 1)


class TorchDetector:
    """A network with its postprocessing: uint8 pictures `[B, 3, H, W]`, RGB, to B arrays `[K, 5]` (see postprocess).

    `size` (width, height) may differ from the network's own, larger ones find smaller faces: anchors keep their pixels.
    """

    def __init__(self, model, size=None, device="cpu", rounded=True):
        self.model, self.device = model.to(device).eval(), device
        self.size = size or (model.config.input_width, model.config.input_height)
        grid = [-(-side // STRIDE) for side in self.size]
        self.anchors = make_anchors(model.config, rounded, grid).to(device)

    @torch.inference_mode()
    def __call__(self, images):
        logits, offsets = self.model(images.to(self.device).float() / 255)
        return [faces.cpu().numpy() for faces in postprocess(logits, offsets, self.anchors)]


def choose_device(name=None):
    """`name` if it is a device that is there (else InputError); without a name cuda, mps or cpu, the first there is."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # read back: meta makes tensors, but holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0][:160]
        raise InputError(f"--device {name}: not available here ({reason})") from None
    return name


def load_detector(path, size=None, device=None, colour=None, value_range=None):
    """The detector of a model file (.pth, .onnx, .xml); `size` (width, height) overrides a checkpoint's input size.

    `colour` and `value_range`: what an exported model of others takes, see runtimes.load_exported. Raises InputError.
    """
    if not Path(path).is_file():
        hint = ("train one (python train.py makes runs/face/best.pth) or name one with --model"
                if str(path) == MODEL else "name a checkpoint with --model")
        raise InputError(f"{path}: no such model; {hint}")
    if Path(path).suffix in (".onnx", ".xml"):
        from runtimes import load_exported  # here, as runtimes imports this file
        return load_exported(path, size, colour, value_range)
    if colour or value_range:
        raise InputError(f"{path}: a checkpoint's input is known; --colour and --range are for exported models of others")
    with bad_values():
        return TorchDetector(load_model(path), size, choose_device(device))


def detect(detector, image):
    """Faces `[K, 5]` of one picture (PIL, RGB): xyxy in its pixels and the score, best first."""
    size = detector.size or image.size  # without one, it takes whole pictures
    resized, _ = resize_view(image, (0, 0, *image.size), *size)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]     # [1, 3, H, W]
    return to_picture(detector(pixels)[0], size, image.size)


def find_inputs(arguments):
    """The picture and video files that the arguments name: files, folders (all within), globs, in order, each once."""
    found = []
    for argument in arguments:
        if os.path.isdir(argument):
            files = sorted(p for p in Path(argument).rglob("*") if p.suffix.lower() in PICTURES | VIDEOS)
        elif os.path.exists(argument):
            files = [Path(argument)]
        else:
            files = [Path(name) for name in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise InputError(f"{argument}: no such file, nor a folder or pattern with pictures")
        found += files
    return list(dict.fromkeys(found))


def open_video(source):
    """An OpenCV capture of a video file (Path) or webcam (number)."""
    try:
        import cv2
    except ImportError:
        raise InputError(f"{source}: videos and webcams need OpenCV: pip install 'opencv-python-headless<4.12'") from None
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        raise InputError(f"{'webcam ' if isinstance(source, int) else ''}{source}: cannot be opened as a video")
    return cv2, capture


def detect_video(detector, source, out, score):
    """Annotate a video file, or a webcam until Ctrl-C, to the MP4 `out`; returns the faces of every frame."""
    cv2, capture = open_video(source)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    live = isinstance(source, int)
    frames, total = [], None if live else int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    with whole_file(out) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), capture.get(cv2.CAP_PROP_FPS) or 25, size)
        try:
            with tqdm(total=total, unit="frame", desc=str(source)) as bar:
                while True:
                    ok, frame = capture.read()
                    if not ok:
                        break
                    image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    faces = detect(detector, image)
                    faces = faces[faces[:, 4] >= score]
                    frames.append(faces)
                    drawn = np.array(draw_faces(image, faces[:, :4], faces[:, 4]))
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


def as_json(faces):
    """Faces `[K, 5]` for the JSON file."""
    return [{"box": [round(v, 2) for v in face[:4]], "score": round(face[4], 5)} for face in faces.tolist()]


@command
def main(argv=None):
    """Detect faces on everything named, write annotated copies and one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="pictures, folders, patterns, videos, or a webcam's number")
    parser.add_argument("--model", default=MODEL, help="a checkpoint, .onnx or .xml (default %(default)s)")
    parser.add_argument("--out", default="detections", help="folder of the results (default %(default)s)")
    parser.add_argument("--grid", type=parse_picture, metavar="PNG", help="also lay the first 24 pictures side by side in one")
    parser.add_argument("--score", type=float, default=0.4, help="least score of a face that is shown (default %(default)s)")
    parser.add_argument("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    parser.add_argument("--range", type=int, choices=(1, 255), help="white in the input of such a model")
    args = parser.parse_args(argv)
    webcam = lambda name: re.fullmatch("[0-9]{1,3}", name) and not os.path.exists(name)
    webcams = [int(name) for name in args.inputs if webcam(name)]
    files = find_inputs([name for name in args.inputs if not webcam(name)])
    detector = load_detector(args.model, args.size, args.device, args.colour, args.range)

    # Inputs of equal names in different folders keep those folders; drawings never overwrite their photos.
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])) if files else Path()
    entries, failed, shown, faces_found, started = [], [], [], 0, time.perf_counter()
    for file in tqdm(files, unit="picture", disable=True if len(files) < 2 else None):
        target = Path(args.out) / Path(os.path.abspath(file)).relative_to(root)
        if target.resolve() == file.resolve():
            raise InputError(f"{file}: --out {args.out} would overwrite it; name another folder")
        try:
            if file.suffix.lower() in VIDEOS:
                out = target if target.suffix.lower() == ".mp4" else target.with_name(f"{target.name}.mp4")
                frames = detect_video(detector, file, out, args.score)
                entries.append({"file": str(file), "frames": [as_json(faces) for faces in frames]})
                faces_found += sum(map(len, frames))
                continue
            image = load_picture(file)
        except InputError as error:
            failed.append(str(error))
            continue
        faces = detect(detector, image)
        faces = faces[faces[:, 4] >= args.score]
        drawn = draw_faces(image, faces[:, :4], faces[:, 4])
        save_picture(drawn, target if target.suffix.lower() in PICTURES else target.with_name(f"{target.name}.png"))
        if args.grid and len(shown) < 24:
            drawn.thumbnail((640, 640))  # 24 large ones would fill the memory
            shown.append(drawn)
        entries.append({"file": str(file), "width": image.width, "height": image.height, "faces": as_json(faces)})
        faces_found += len(faces)
    for number in webcams:
        frames = detect_video(detector, number, Path(args.out) / f"webcam{number}.mp4", args.score)
        entries.append({"file": str(number), "frames": [as_json(faces) for faces in frames]})
        faces_found += sum(map(len, frames))
    write_json(Path(args.out) / "detections.json", entries)
    if shown:
        save_picture(grid(shown), args.grid)
    print(f"{faces_found} faces in {len(entries)} files, {time.perf_counter() - started:.1f} s; "
          f"see {args.grid if shown else args.out}")
    if failed:
        raise InputError(f"{len(failed)} of {len(files)} could not be read: " + "; ".join(failed[:5]))


if __name__ == "__main__":
    main()
