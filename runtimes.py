"""Exported models as detectors: .onnx in ONNX Runtime, .xml in OpenVINO, both on the CPU and in float32.

What a model takes is read from the metadata that export.py wrote into it; for models of others, whose outputs are those
of DetectionOutput `[1, 1, N, 7]`, the caller says it. An .onnx with OpenVINO's own operators runs in OpenVINO.
"""
import functools
import json
from pathlib import Path

import numpy as np
import torch

from anchors import decode, make_anchors
from data import resize_view
from detect import TOP, TorchDetector, detect, postprocess, to_picture
from formats import InputError
from model import Config

SUFFIXES = (".onnx", ".xml")
OPENVINO_DOMAIN = "org.openvinotoolkit"  # of ONNX operators that only OpenVINO has
SECTION = "face_detector"                # of an IR's rt_info, where our metadata is

# How far from PyTorch an export may be: pixels of the network input, score, which faces are compared, and the share of
# them that has to comply. Lower precision tips some NMS decisions, so single faces may differ more. Measured with the
# released network on 41 photos, 90 % within: embedded 0.12 px, 0.006; FP16 0.03, 0.002; INT8 0.8, 0.05. FP32: all within
# 0.0001 px, 0.000001.
TOLERANCES = {"FP32": (0.01, 0.0001, 0.05, 1), "embedded": (1, 0.05, 0.3, 0.9), "FP16": (1, 0.03, 0.3, 0.9),
              "INT8": (6, 0.25, 0.3, 0.9)}
TIE = 1e-5  # runtimes differ by up to 1e-6 in a score


class OnnxNetwork:
    """An .onnx file in ONNX Runtime. `threads` 0 lets the runtime choose. Raises InputError if it cannot be read."""

    def __init__(self, path, threads=0):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types are private
            raise InputError(f"{path}: ONNX Runtime cannot read it ({_first_line(error)})") from None
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        first = self.session.get_inputs()[0]
        self.input, self.uint8 = first.name, first.type == "tensor(uint8)"
        self.shape = [side if isinstance(side, int) else None for side in first.shape]

    def __call__(self, array):
        return self.session.run(None, {self.input: array})


@functools.cache
def openvino_core():
    """OpenVINO's Core, one for the life of the process.

    Its CPU plugin gives signal handlers a stack that is gone with the plugin: the next signal would end Python.
    """
    import openvino as ov
    return ov.Core()


class OpenVinoNetwork:
    """An .xml (with its .bin) or .onnx file in OpenVINO, computing in float32 (INT8 where the file is quantised)."""

    def __init__(self, path, threads=0):
        import openvino as ov
        core = openvino_core()
        # Without the hint OpenVINO computes in bfloat16 wherever the processor has it, and the figures change silently.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            model = core.read_model(str(path))
            self.compiled = core.compile_model(model, "CPU", options)
        except Exception as error:  # RuntimeError and its private subclasses
            raise InputError(f"{path}: OpenVINO cannot read it ({_first_line(error)})") from None
        self.runtime = f"OpenVINO {ov.__version__.split('-')[0]}"
        own = model.has_rt_info([SECTION])
        self.metadata = dict(model.get_rt_info([SECTION]).value) if own else {}
        first = model.inputs[0]
        self.uint8 = first.element_type == ov.Type.u8
        self.shape = [None if side.is_dynamic else side.get_length() for side in first.partial_shape]

    def __call__(self, array):
        results = self.compiled(array)
        return [results[port] for port in self.compiled.outputs]


def _first_line(error):
    """The most telling short line of a runtime's error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or [type(error).__name__])[0][:160]


def open_network(path, threads=0):
    """An exported file as a callable: input array to the list of output arrays.

    It has `.shape` of the first input (None where a side is free), `.uint8`, `.metadata` {str: str} and `.runtime`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such model")
    if path.suffix == ".xml":
        if not path.with_suffix(".bin").is_file():
            raise InputError(f"{path}: its weights {path.with_suffix('.bin').name} are not beside it")
        return OpenVinoNetwork(path, threads)
    import onnx
    try:
        content = onnx.load(path)
    except Exception as error:  # protobuf's and onnx's own
        raise InputError(f"{path}: not an ONNX file, or a truncated one ({_first_line(error)})") from None
    if all(entry.domain != OPENVINO_DOMAIN for entry in content.opset_import):
        return OnnxNetwork(path, threads)
    network = OpenVinoNetwork(path, threads)
    network.metadata = {entry.key: entry.value for entry in content.metadata_props}
    return network


class ExportedDetector:
    """A network with its input convention, as detect.TorchDetector: uint8 pictures `[B, 3, H, W]`, RGB, to B float32
    arrays `[K, 5]`, boxes xyxy in pixels of those pictures and scores, best first.

    `size` is (width, height) of the pictures it takes. It is None for models with embedded preprocessing: these take
    whole pictures, one at a time.
    """

    def __init__(self, network, colour, value_range, head):
        self.network, self.colour, self.value_range, self.head = network, colour, value_range, head
        self.size = None if network.uint8 else tuple(network.shape[:1:-1])
        if head == "raw":
            config = Config(*self.size, anchors=json.loads(network.metadata["anchors"]))
            self.anchors = make_anchors(config)

    def __call__(self, images):
        images = np.asarray(images)[:, ::-1] if self.colour == "BGR" else np.asarray(images)
        if self.size is None:
            return [self._faces(self.network(np.ascontiguousarray(image.transpose(1, 2, 0)[None])), image.shape)
                    for image in images]
        images = np.divide(images, 255 // self.value_range, dtype=np.float32, order="C")
        if self.head == "raw":
            logits, offsets = map(torch.from_numpy, self.network(images))
            return [faces.numpy() for faces in postprocess(logits, offsets, self.anchors)]
        return [self._faces(self.network(image[None]), image.shape) for image in images]

    def _faces(self, outputs, shape):
        """Outputs for one picture of `shape` (3, H, W) to faces `[K, 5]`, best first."""
        if self.head == "generic":
            faces = outputs[0]
        else:
            rows = outputs[0].reshape(-1, 7)  # image, label, score, box in 0-1; what is not a face has image -1
            rows = rows[(rows[:, 0] == 0) & (rows[:, 1] == 1)]
            faces = np.concatenate([rows[:, 3:] * np.float32(shape[:0:-1] * 2), rows[:, 2:3]], 1)
        return faces[np.argsort(-faces[:, 4], kind="stable")]


def load_exported(path, size=None, colour=None, value_range=None, threads=0):
    """The detector of an .onnx or .xml file.

    `colour` (rgb or bgr) and `value_range` (1 or 255, the value of white) are for models without our metadata, and only
    for them. Raises InputError if the file cannot be used, or takes another size than `size` (width, height).
    """
    network = open_network(path, threads)
    metadata, shape = network.metadata, network.shape
    if "head" in metadata:
        if colour or value_range:
            raise InputError(f"{path}: says itself what it takes ({metadata['colour']}, {metadata['value_range']}); "
                             "leave --colour and --range out")
        white = int(metadata["value_range"].split("-")[1])
        detector = ExportedDetector(network, metadata["colour"], white, metadata["head"])
    else:
        if not colour or not value_range:
            raise InputError(f"{path}: was not written by export.py; say what it takes with "
                             "--colour rgb|bgr and --range 1|255")
        if len(shape) != 4 or shape[1] != 3 or None in shape[2:] or network.uint8:
            raise InputError(f"{path}: its input is {shape}, float [1, 3, H, W] expected")
        detector = ExportedDetector(network, colour.upper(), value_range, "detection_output")
        outputs = network(np.zeros([1, *shape[1:]], np.float32))
        if len(outputs) != 1 or outputs[0].shape[-1] != 7:
            raise InputError(f"{path}: its outputs are {[list(o.shape) for o in outputs]}, one [1, 1, N, 7] expected")
    if size and size != detector.size:
        takes = "takes pictures of any size" if detector.size is None else "takes {}x{}".format(*detector.size)
        raise InputError(f"{path}: {takes}; an exported model's size is fixed, see export.py --size")
    return detector


class DetectionOutput(TorchDetector):
    """PyTorch's side of --head detection_output: unrounded anchors, of which the 200 best-scored reach the NMS."""

    @torch.inference_mode()
    def __call__(self, images):
        found = []
        for logits, offsets in zip(*self.model(images.float() / 255)):
            best = (logits[:, 1] - logits[:, 0]).topk(min(TOP, len(logits))).indices
            found += postprocess(logits[None, best], offsets[None, best], self.anchors[best])
        return [faces.numpy() for faces in found]


@torch.inference_mode()
def all_boxes(reference, picture):
    """What every anchor of a TorchDetector says of a picture (PIL): `[A, 5]`, clipped boxes in input pixels, scores."""
    resized, _ = resize_view(picture, (0, 0, *picture.size), *reference.size)
    logits, offsets = reference.model(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255)
    rows = torch.cat([decode(offsets[0], reference.anchors), logits[0].softmax(-1)[:, 1:]], 1)
    return to_picture(rows.numpy(), reference.size, reference.size)


def differences(detector, reference, pictures, least):
    """How far a detector is from a TorchDetector on `pictures` (PIL): `[n, 2]`, pixels of the network input and score.

    Each face that one of them scores `least` or more is compared with the nearest of the other's; where the other finds
    none at all, the score is the difference. Where anchors share a score to within TIE, rounding decides which of them
    NMS keeps: such a face is compared with the nearest of all the reference's boxes.
    """
    rows = []
    for picture in pictures:
        scale = np.append(np.tile(np.divide(reference.size, picture.size), 2), 1)
        ours, theirs = (detect(one, picture) * scale for one in (detector, reference))
        every = all_boxes(reference, picture)
        for some, others in ((ours, theirs), (theirs, ours)):
            for face in some[some[:, 4] >= least]:
                tied = (np.abs(every[:, 4] - face[4]) < TIE).sum() > 1
                gaps = np.abs((every if tied else others) - face)                   # [K, 5]
                distance = gaps[:, :4].max(1)
                place = (distance + gaps[:, 4]).argmin() if len(gaps) else None
                rows.append((0, face[4]) if place is None else (distance[place], gaps[place, 4]))
    return np.array(rows).reshape(-1, 2)


def check(path, reference, pictures, kind):
    """Compare a model file with PyTorch on `pictures` (PIL): one line. Raises InputError if they differ.

    `reference` is the checkpoint's detector, `kind` a key of TOLERANCES.
    """
    pixels, score, least, share = TOLERANCES[kind]
    gaps = differences(load_exported(path), reference, pictures, least)             # [n, 2]
    most = gaps.max(0, initial=0)
    line = (f"{kind}, {len(gaps)} faces of {len(pictures)} pictures compared with PyTorch's: boxes within "
            f"{most[0]:.2g} px, scores within {most[1]:.2g}; allowed {pixels} px, {score}"
            + f" for {share:.0%} of them" * (share < 1))
    if len(gaps) and (np.quantile(gaps, share, 0) > (pixels, score)).any():
        raise InputError(f"{path.name} differs from the checkpoint, nothing was written; {line}")
    return line
