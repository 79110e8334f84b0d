"""Export a checkpoint to ONNX and OpenVINO IR, which run without PyTorch and without this repository.

    python export.py                              # export/model.onnx, NMS included: boxes [K, 5], labels [K]
    python export.py --ir                         # also export/model.xml and model.bin
    python export.py --ir --head detection_output # the reference's SSD form: faster, slightly other boxes
    python export.py --fp16                       # IR of half the size
    python export.py --int8 --data data/val.json  # IR quantised on photos; needs requirements-int8.txt
    python export.py --head raw --size 320x240    # the network alone, any batch; metadata says how to decode

The ONNX file (opset 18) takes RGB, the IR takes BGR as OpenCV reads it; both take float32 [1, 3, H, W] in
0-1. The metadata of each file describes its input and output, and the checkpoint it was made from. New files
are first compared with PyTorch on several pictures, and replace older ones only if they agree.
"""

import importlib
import json
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

from support.script import ROOT, InputError, bad_values, command, file_hash, Parser, parse_size, require

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from anchors import VARIANCES, decode, make_anchors
from data import to_input
from detector import (MODEL, NMS_IOU, SCORE, TOP, TorchDetector, check_threshold, detect, load_detector,
                      postprocess, to_pixels)
from model import STRIDE, grid_size, read_checkpoint, rebuild
from support.coco import read_annotations
from support.pictures import load_picture
from support.runtimes import OPENVINO_DOMAIN, SECTION, openvino_core, quantise
from support.threads import use_threads

OPSET = 18
CALIBRATION = 300  # photos that the ranges of INT8 are taken from
COMPARED = 8       # pictures that an export is compared with PyTorch on

# How far an export may be from PyTorch: pixels of the network input, score, and the least score of the faces
# that are compared. The released network on 41 photos: 90 % of the faces are within 0.03 px and 0.002 (FP16),
# 0.8 px and 0.05 (INT8), all within 0.0001 px and 0.000001 (FP32).
TOLERANCES = {"FP32": (0.01, 0.0001, 0.05), "FP16": (1, 0.03, 0.3), "INT8": (6, 0.25, 0.3)}
WITHIN = 0.9  # share of the faces that must be: of nearly equal scores rounding decides which survives NMS

DECODING = """\
# from logits [B, A, 2], offsets [B, A, 4] of input [B, 3, H, W]; cell_anchors and variances: in this metadata
y, x = np.mgrid[:-(-H // 16), :-(-W // 16)]
anchors = (np.stack([x, y, x, y], -1).reshape(-1, 1, 4) * 16 + np.array(cell_anchors)).reshape(-1, 4)
sides = anchors[:, 2:] - anchors[:, :2]
centres = anchors[:, :2] + sides / 2 + offsets[..., :2] * variances[:2] * sides
sides = sides * np.exp(offsets[..., 2:] * variances[2:])
boxes = np.concatenate([centres - sides / 2, centres + sides / 2], -1)   # [B, A, 4] xyxy, input pixels
scores = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))               # [B, A] of a face
# then, per image: scores above score_threshold, NMS at IoU nms_threshold, best top_k, clipped to the input
"""


class Generic(nn.Module):
    """Image `[1, 3, H, W]` to boxes `[1, A, 4]`, scores `[1, 1, A]` for ONNX's NMS, and `[A, 5]` of both."""

    def __init__(self, model, anchors):
        super().__init__()
        self.model = model
        self.register_buffer("anchors", anchors)

    def forward(self, image):
        logits, offsets = self.model(image)
        boxes, scores = decode(offsets, self.anchors), logits.softmax(-1)[..., 1:]  # [1, A, 4], [1, A, 1]
        return boxes, scores.transpose(1, 2), torch.cat([boxes[0], scores[0]], 1)


def to_onnx(network, size, outputs, free_batch=False):
    """Export a module to an ONNX model: `image` of `size` (width, height), of any batch with `free_batch`."""
    image = torch.zeros(2 if free_batch else 1, 3, *size[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        model = torch.onnx.export(network, (image,), dynamo=True, verbose=False, opset_version=OPSET,
                                  input_names=["image"], output_names=outputs,
                                  dynamic_shapes=({0: "batch"},) if free_batch else None).model_proto
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")  # source lines, with the folders of whoever exports
    graph.name = "face_detector"
    return model


def build(model, head, size):
    """Build the ONNX model of `head` for a network input of `size` (width, height), RGB in 0-1."""
    if head == "generic":
        network = Generic(model, make_anchors(model.config, size)).eval()
        return add_nms(to_onnx(network, size, ["all_boxes", "all_scores", "all_faces"]), size)
    network = to_onnx(model, size, ["logits", "offsets"], free_batch=head == "raw")
    return network if head == "raw" else add_detection_output(network, model.config, size)


def add_tail(model, nodes, constants, outputs):
    """Append nodes and constants {name: array} to an ONNX model, and make `outputs` its only outputs."""
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.ClearField("output")
    model.graph.output.extend(outputs)
    return model


def add_nms(model, size):
    """Append NMS and clipping to an exported Generic: outputs boxes `[K, 5]` and labels `[K]`, best first."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("NonMaxSuppression", ["all_boxes", "all_scores", "top", "iou", "least"], ["chosen"]),  # [K, 3]
        node("Gather", ["chosen", "label_column"], ["labels"], axis=1),  # all 0: face is the only class
        node("Gather", ["chosen", "anchor_column"], ["places"], axis=1),
        node("Gather", ["all_faces", "places"], ["faces"], axis=0),  # [K, 5]
        node("Max", ["faces", "first"], ["faces_inside"]),
        node("Min", ["faces_inside", "last"], ["boxes"]),
    ]
    constants = {"top": np.array([TOP]), "iou": np.float32([NMS_IOU]), "least": np.float32([SCORE]),
                 "label_column": np.array(1), "anchor_column": np.array(2),
                 "first": np.zeros(5, np.float32), "last": np.float32([*size, *size, 1])}
    return add_tail(model, nodes, constants, [info("boxes", TensorProto.FLOAT, ["N", 5]),
                                              info("labels", TensorProto.INT64, ["N"])])


def add_detection_output(model, config, size):
    """Append DetectionOutput, `[1, 1, 200, 7]`: image, label, score, box in 0-1, by anchors not rounded."""
    node = helper.make_node
    widths, heights = zip(*config.anchors)
    features = np.zeros((1, 1, *grid_size(*size)[::-1]), np.float32)  # only its shape is used
    nodes = [
        node("Softmax", ["logits"], ["probabilities"], axis=2),
        node("Reshape", ["probabilities", "flat"], ["all_probabilities"]),  # [1, A * 2]
        node("Reshape", ["offsets", "flat"], ["all_offsets"]),              # [1, A * 4]
        node("PriorBoxClustered", ["features", "image"], ["priors"], domain=OPENVINO_DOMAIN,
             width=widths, height=heights, step=float(STRIDE), offset=0.5, variance=VARIANCES, clip=0),
        node("DetectionOutput", ["all_offsets", "all_probabilities", "priors"], ["detections"],
             domain=OPENVINO_DOMAIN, num_classes=2, background_label_id=0, top_k=TOP, keep_top_k=TOP,
             nms_threshold=NMS_IOU, confidence_threshold=SCORE, share_location=1, normalized=1,
             code_type="caffe.PriorBoxParameter.CENTER_SIZE", variance_encoded_in_target=0),
    ]
    model.opset_import.append(helper.make_opsetid(OPENVINO_DOMAIN, 1))
    output = helper.make_tensor_value_info("detections", TensorProto.FLOAT, [1, 1, TOP, 7])
    return add_tail(model, nodes, {"flat": np.array([1, -1]), "features": features}, [output])


def swap_colours(model):
    """Make an ONNX model of ours take BGR, by the weights of its first batch norm and convolution."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    norm = next(node for node in model.graph.node if "image" in node.input)
    first = next(node for node in model.graph.node if norm.output[0] in node.input)
    for name, axis in [*((name, 0) for name in norm.input[1:]), (first.input[1], 1)]:
        turned = np.flip(numpy_helper.to_array(weights[name]), axis).copy()
        weights[name].CopyFrom(numpy_helper.from_array(turned, name))


def describe(path, content, model, size, head):
    """Make the metadata {str: str}: the input, how to read the outputs, and the checkpoint it came from."""
    cell = make_anchors(model.config, (STRIDE, STRIDE), head != "detection_output").tolist()
    metadata = {
        "head": head, "precision": "FP32", "colour": "RGB", "value_range": "0-1", "layout": "NCHW",
        "type": "float32", "size": "{}x{}".format(*size), "stride": str(STRIDE),
        "variances": json.dumps(VARIANCES), "anchors": json.dumps(model.config.anchors),
        "cell_anchors": json.dumps(cell), "score_threshold": str(SCORE), "nms_threshold": str(NMS_IOU),
        "top_k": str(TOP), "source": Path(path).name, "source_sha256": file_hash(path)}
    if "epoch" in content:
        metadata["source_epoch"] = str(content["epoch"])
    if head == "raw":
        metadata["decoding"] = DECODING
    threshold = check_threshold(content.get("threshold"), path)
    if threshold and tuple(threshold["size"]) == tuple(size):  # at another size the scores are others
        metadata["threshold"] = json.dumps(threshold)
    return metadata


def write_ir(model, metadata, path, reference, fp16=False, photos=None):
    """Write an ONNX model of ours, which is changed, as IR (.xml and .bin) with BGR input.

    `fp16` stores the weights in float16; `photos` are files to quantise on, at the input size of `reference`.
    Returns the precision."""
    import openvino as ov
    swap_colours(model)
    ir = openvino_core().read_model(model.SerializeToString())
    # OpenVINO 2024 has a module of its own for this.
    passes = importlib.import_module(getattr(ov, "runtime", ov).__name__ + ".passes")
    manager = passes.Manager()
    # Shape arithmetic stands between the weights and the depthwise convolutions: NNCF would not find these.
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(ir)
    metadata = metadata | {"colour": "BGR", "precision": "FP16" if fp16 else "FP32"}
    if photos:
        def load(photo):
            pixels = torch.from_numpy(to_pixels(reference, load_picture(photo)))
            return {"image": to_input(pixels.flip(0)[None]).numpy()}  # [1, 3, H, W], BGR
        ir = quantise(ir, photos, load)
        metadata["precision"] = "INT8"
        metadata.pop("threshold", None)  # found with float32, and INT8 shifts the scores
    for key, value in metadata.items():
        ir.set_rt_info(value, [SECTION, key])
    ov.save_model(ir, path, compress_to_fp16=fp16)
    return metadata["precision"]


def spread(annotations, most):
    """The files of up to `most` photos, evenly spread over the dataset."""
    count = len(annotations.ids)
    places = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return [annotations.file(index) for index in places]


class DetectionOutput(TorchDetector):
    """A TorchDetector that works as OpenVINO's DetectionOutput: only the 200 best anchors reach the NMS."""

    @torch.inference_mode()
    def __call__(self, images):
        found = []
        for logits, offsets in zip(*self.model(to_input(images))):
            best = (logits[:, 1] - logits[:, 0]).topk(min(TOP, len(logits))).indices
            found += postprocess(logits[None, best], offsets[None, best], self.anchors[best])
        return [faces.numpy() for faces in found]


def differences(detector, reference, pictures, least):
    """Compare a detector with the TorchDetector `reference` on `pictures` (PIL): differences `[n, 2]`.

    A row is the distance in pixels of the network input and the difference in score of a face that one of
    them scores `least` or more from the nearest face of the other."""
    rows = []
    for picture in pictures:
        scale = np.append(np.tile(np.divide(reference.size, picture.size), 2), 1)
        ours, theirs = (detect(one, picture) * scale for one in (detector, reference))
        for some, others in ((ours, theirs), (theirs, ours)):
            for face in some[some[:, 4] >= least]:
                gaps = np.abs(others - face)                                        # [K, 5]
                gaps = np.stack([gaps[:, :4].max(1), gaps[:, 4]], 1)
                rows.append(gaps[gaps.sum(1).argmin()] if len(gaps) else (0, face[4]))  # or none was found
    return np.array(rows).reshape(-1, 2)


def check(path, reference, pictures, kind):
    """Compare a model file of `kind` with the checkpoint's detector: a line to report, or InputError."""
    pixels, score, least = TOLERANCES[kind]
    gaps = differences(load_detector(path), reference, pictures, least)             # [n, 2]
    most = gaps.max(0, initial=0)
    line = (f"{kind}, {len(pictures)} pictures compared with PyTorch, {len(gaps)} faces of both: boxes "
            f"within {most[0]:.2g} px, scores {most[1]:.2g}; allowed for {WITHIN:.0%}: {pixels} px, {score}")
    if len(gaps) and (np.quantile(gaps, WITHIN, 0) > (pixels, score)).any():
        raise InputError(f"{path.name} differs from the checkpoint, nothing was written; {line}")
    return line


def pictures_to_compare(annotations):
    """Photos of `annotations`, or without them parts of our own photo, some around its face (PIL)."""
    if annotations:
        return [load_picture(photo) for photo in spread(annotations, COMPARED)]
    photo = load_picture(ROOT / "docs/photo.jpg")
    around = [photo.crop((40 * n, 10 * n, 512 - 50 * n, 512 - 70 * n)) for n in range(4)]
    return around + [photo.crop((x, y, x + 256, y + 192)) for x in (0, 128, 256) for y in (0, 160, 320)]


@command
def main(argv=None):
    """Build the files, compare them with PyTorch, and write them."""
    args = parse_args(argv)
    with bad_values():
        content = read_checkpoint(args.model)
        model = rebuild(content, args.model).eval()
    size = args.size or model.config.input_size
    annotations = read_annotations(args.data) if args.data else None
    require(annotations is None or len(annotations.ids), f"{args.data}: no photos")
    pictures = pictures_to_compare(annotations)
    reference = TorchDetector(model, size)
    if args.head == "detection_output":
        reference = DetectionOutput(model, size, rounded=False)
    graph = build(model, args.head, size)
    metadata = describe(args.model, content, model, size, args.head)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
        folder = Path(folder)
        kinds = {"model.onnx": "FP32"}
        helper.set_model_props(graph, metadata)
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, folder / "model.onnx")
        if args.ir:
            photos = spread(annotations, CALIBRATION) if args.int8 else None
            kinds["model.xml"] = write_ir(graph, metadata, folder / "model.xml", reference, args.fp16, photos)
        lines = [f"{out / name}: {args.head}, {size[0]}x{size[1]}, "
                 + check(folder / name, reference, pictures, kind) for name, kind in kinds.items()]
        if (out / "model.xml").exists() and not args.ir:
            lines.append(f"{out / 'model.xml'}: removed, it was an older export's; --ir writes a new one")
        for name in ("model.xml", "model.bin"):  # an older IR never stays beside a new .bin or .onnx
            (out / name).unlink(missing_ok=True)
        for path in sorted(folder.iterdir()):  # the .bin before its .xml
            os.replace(path, out / path.name)
    if content.get("threshold") and (args.int8 or "threshold" not in metadata):
        lines.append("the checkpoint's threshold is left out: it is for {}x{} in float32".format(
            *content["threshold"]["size"]))
    print("\n".join(lines))


def parse_args(argv):
    """Parse and check the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=MODEL, help="a checkpoint (default: the shipped network)")
    add("--out", default="export", help="folder of the files (default %(default)s); an older IR is removed")
    add("--head", default="generic", choices=("generic", "detection_output", "raw"),
        help="outputs: faces after NMS (default), OpenVINO's DetectionOutput, logits and offsets")
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--data", help="COCO json: photos for --int8, and for the comparison with PyTorch")
    add("--threads", type=use_threads, help="of the CPU (default: the cores this process may use)")
    add = parser.add_argument_group("OpenVINO IR (each of these flags writes one)").add_argument
    add("--ir", action="store_true", help="float32, input BGR in 0-1")
    add("--fp16", action="store_true", help="weights stored in float16")
    add("--int8", action="store_true", help="quantised on photos of --data")
    args = parser.parse_args(argv)
    if args.int8 and (args.fp16 or not args.data):
        parser.error("--int8 needs photos, --data data/val.json, and no --fp16")
    if args.int8 and not find_spec("nncf"):
        parser.error("--int8 needs NNCF: pip install -r requirements-int8.txt")
    args.ir = args.ir or args.fp16 or args.int8
    return args


if __name__ == "__main__":
    main()
