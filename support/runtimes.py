"""Run exported networks on the CPU in float32: .onnx files in ONNX Runtime, .xml files in OpenVINO.

Input and outputs are arrays; detector.py turns the outputs into faces. An .onnx file with OpenVINO's own
operators runs in OpenVINO. ONNX Runtime is enough for the others: nothing here needs torch or onnx.
"""

import functools
import logging
import threading
from pathlib import Path

from support.script import InputError, first_line
from support.threads import chosen_threads

SUFFIXES = (".onnx", ".xml")
OPENVINO_DOMAIN = "org.openvinotoolkit"  # the domain of ONNX operators that only OpenVINO has
SECTION = "face_detector"                # the section of an IR's rt_info that holds our metadata


class OnnxNetwork:
    """An .onnx file in ONNX Runtime. See `open_network`."""

    def __init__(self, path, threads):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        first = self.session.get_inputs()[0]
        self.input = first.name
        self.shape = [side if isinstance(side, int) else None for side in first.shape]

    def __call__(self, array):
        return self.session.run(None, {self.input: array})


@functools.cache
def openvino_core():
    """OpenVINO's Core, one for the whole process: the next signal after its end would crash Python."""
    try:
        import openvino as ov
    except ImportError:
        raise InputError("this model needs OpenVINO: pip install -r requirements.txt") from None
    return ov.Core()


class OpenVinoNetwork:
    """An .xml file (with its .bin) or .onnx file in OpenVINO. See `open_network`."""

    def __init__(self, path, threads):
        core = openvino_core()
        import openvino as ov
        # Without the hint OpenVINO uses bfloat16 on processors that have it, and results change silently.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                   "INFERENCE_NUM_THREADS": threads}
        model = core.read_model(str(path))
        self.compiled = core.compile_model(model, "CPU", options)
        self.lock = threading.Lock()  # it has one request, which several threads may want
        self.runtime = f"OpenVINO {ov.__version__.split('-')[0]}"
        section = next((name for name in (SECTION, "framework") if model.has_rt_info([name])), None)
        self.metadata = dict(model.get_rt_info([section]).value) if section else {}
        sides = model.inputs[0].partial_shape
        self.shape = [None if side.is_dynamic else side.get_length() for side in sides]

    def __call__(self, array):
        with self.lock:
            results = self.compiled(array)
        return [results[port] for port in self.compiled.outputs]


def open_network(path, threads=0):
    """Open an exported file as a callable: input array to list of output arrays.

    It has the `shape` of the input (None where any size is taken), `metadata` {str: str}, and `runtime` (its
    name and version). Raises InputError if the file cannot be used."""
    path = Path(path)
    if path.suffix == ".xml" and not path.with_suffix(".bin").is_file():
        raise InputError(f"{path}: its weights {path.with_suffix('.bin').name} are not beside it")
    kind, runtime = OnnxNetwork, "ONNX Runtime"
    if path.suffix == ".xml" or OPENVINO_DOMAIN.encode() in path.read_bytes():
        kind, runtime = OpenVinoNetwork, "OpenVINO"
    try:
        return kind(path, threads or chosen_threads())
    except InputError:
        raise
    except Exception as error:  # the exception types of both are private
        raise InputError(f"{path}: {runtime} cannot read it ({first_line(error)})") from None


def quantise(model, photos, load):
    """Quantise an IR to INT8 with NNCF on `photos`, of which `load(photo)` makes its inputs, a dict."""
    waiting = [result.get_node() for result in model.outputs]
    decoding = set()  # what comes after the last convolutions: INT8 is too coarse for pixels
    while waiting:
        for node in (value.get_node() for value in waiting.pop().input_values()):
            name = node.get_friendly_name()
            if node.get_type_name() not in ("Convolution", "Constant", "Parameter") and name not in decoding:
                decoding.add(name)
                waiting.append(node)
    logging.disable(logging.WARNING)  # NNCF and its imports log a lot
    try:
        import nncf
        import rich
        rich.reconfigure(quiet=True)  # NNCF's progress bars
        # PERFORMANCE is symmetric. MIXED, with zero points, was 3 % slower and not more accurate.
        return nncf.quantize(model, nncf.Dataset(photos, load), preset=nncf.QuantizationPreset.PERFORMANCE,
                             subset_size=len(photos),
                             ignored_scope=nncf.IgnoredScope(names=sorted(decoding)))
    finally:
        logging.disable(logging.NOTSET)
