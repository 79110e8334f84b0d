"""Videos, webcams and streams: read, draw, write, by OpenCV."""

import itertools
import mimetypes
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.script import InputError, require, whole_file

VIDEOS = {ending for ending, kind in mimetypes.types_map.items() if kind.startswith("video/")}
VIDEOS |= set(".mkv .wmv .asf .flv .ogv .ts .mts .m2ts .vob .3gp .3g2 .mxf .m4v".split())  # not in all tables


def open_video(source):
    """Open a video file (Path), a stream (address) or a webcam (number) in OpenCV: (cv2, the capture)."""
    try:
        import cv2
    except ImportError:
        raise InputError(f"{source}: videos and webcams need OpenCV: "
                         "pip install 'opencv-python-headless<4.12'") from None
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    require(capture.isOpened(), f"{source}: cannot be opened as a video")
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)  # phones store frames lying; not every version turns them
    return cv2, capture


def read_frames(capture, total):
    """Yield the frames of a video (BGR arrays) and, up to `total`, None for each that cannot be read."""
    for number in itertools.count(1):
        there, frame = capture.read()
        if not there and number > total:
            return
        yield frame if there else None


def annotate_video(source, target, find, change, frames):
    """Write a video with what `change(image, faces)` makes of each frame (PIL) and its faces, `find(image)`.

    The faces `[K, 5]` of each frame are added to `frames`. A webcam or stream is recorded until Ctrl-C at its
    true speed: late frames are written twice, early ones left out. Returns how many frames could not be read.
    Raises InputError if `target` (MP4) could not be written."""
    cv2, capture = open_video(source)
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    total = total if 0 < total < 10 ** 7 else 0  # four days; a damaged header promises more
    live = not isinstance(source, Path) and (isinstance(source, int) or not total)
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not rate > 0 or live and rate > 120:  # drivers without a rate say 0 or their clock's
        rate = 25
    rate = round(min(rate, 650), 3 if rate < 65 else 2)  # MPEG-4 takes no fraction beyond 65535
    writer = drawn = began = None
    holes = gap = 0
    with whole_file(target) as temporary:
        try:
            bar = tqdm(read_frames(capture, 0 if live else total), str(source), total or None, unit="frame")
            for frame in bar:
                if frame is None:
                    gap += 1
                    continue
                holes += gap
                gap = 0
                if live:
                    now = time.monotonic()
                    began = began or now
                    due = int((now - began) * rate)  # the place of this frame in the recording
                    if due < len(frames):
                        continue
                    for _ in range(due - len(frames)):
                        writer.write(drawn)
                        frames.append(frames[-1])
                if writer is None:
                    size = frame.shape[1::-1]
                    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                    writes = writer.isOpened()
                image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                faces = find(image)
                drawn = cv2.cvtColor(np.array(change(image, faces)), cv2.COLOR_RGB2BGR)
                writer.write(drawn)
                frames.append(faces)
        except KeyboardInterrupt:  # how a live recording is meant to end; a file's is given up
            if not live:
                raise
        finally:
            capture.release()
            if writer:
                writer.release()
        require(frames, f"{source}: no frame could be read")
        require(writes, "{}: OpenCV cannot write {}x{} at {:g} frames/s".format(target, *size, rate))
    # Containers may only estimate the number of frames, so a quarter of a second at the end is not missed.
    return holes + gap * (gap > rate / 4)
