"""Tests of exported models as detectors: input conventions, errors, evaluate.py and detect.py with them."""

import copy
import json
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import detect
import evaluate
import export
from detector import MODEL, load_detector
from detector import detect as detect_faces
from model import checkpoint
from support.runtimes import open_network, openvino_core
from support.script import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small):
    """A folder with small.pth and its generic export in plain/."""
    torch.manual_seed(0)
    network = copy.deepcopy(small).train()  # batch-norm statistics of noise, for varied outputs
    network(torch.rand(16, 3, 48, 64))
    folder = tmp_path_factory.mktemp("exported")
    torch.save(checkpoint(network), folder / "small.pth")
    export.main(["--model", str(folder / "small.pth"), "--out", str(folder / "plain"), "--ir"])
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model not written by export.py: its detection rows contain the mean of each input channel."""
    import openvino as ov
    node = helper.make_node
    nodes = [node("ReduceMean", ["data", "axes"], ["means"], keepdims=0),          # [1, 3]
             node("Concat", ["start", "means", "end"], ["row"], axis=1),           # image, label, score, box
             node("Concat", ["row", "stop"], ["rows"], axis=0), node("Reshape", ["rows", "shape"], ["out"])]
    rows = {"axes": np.array([2, 3]), "start": np.float32([[0, 1, 0.5, 0.25]]),
            "end": np.zeros((1, 0), np.float32),
            "stop": np.float32([[-1, 0, 0, 0, 0, 0, 0]]), "shape": np.array([1, 1, 2, 7])}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "foreign", [info("data", TensorProto.FLOAT, [1, 3, 40, 20])],
                              [info("out", TensorProto.FLOAT, [1, 1, 2, 7])],
                              [onnx.numpy_helper.from_array(value, name) for name, value in rows.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder = tmp_path_factory.mktemp("foreign")
    onnx.save(model, folder / "foreign.onnx")
    ov.save_model(openvino_core().read_model(folder / "foreign.onnx"),
                  folder / "foreign.xml", compress_to_fp16=False)
    return folder


@pytest.mark.parametrize("name", ["foreign.onnx", "foreign.xml"])
def test_conventions_of_others(foreign, name):
    picture = torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None].expand(3, 40, 20)[None]
    for colour, white, means in (("rgb", 1, (0.2, 0.4, 0.8)), ("bgr", 1, (0.8, 0.4, 0.2)),
                                 ("bgr", 255, (204, 102, 51))):
        detector = load_detector(foreign / name, colour=colour, white=white)
        assert detector.size == (20, 40)
        # one face, its box scaled from 0-1 to 20x40; the row with image -1 ends the list
        (faces,) = detector(picture)
        np.testing.assert_allclose(faces, [[0.25 * 20, means[0] * 40, means[1] * 20, means[2] * 40, 0.5]],
                                   rtol=1e-6)


@pytest.mark.slow
def test_what_a_model_takes_must_be_known(foreign, folder, refused):
    line = refused(detect.main, "no.jpg", "--model", foreign / "foreign.onnx")
    assert "no.jpg" in line  # missing pictures are reported first
    arguments = ("--data", "x.json", "--model")
    assert "x.json" in refused(evaluate.main, *arguments, folder / "plain/model.xml")
    for kwargs, reason in (({}, "--colour"), ({"colour": "rgb"}, "--range")):
        with pytest.raises(InputError, match=reason):
            load_detector(foreign / "foreign.onnx", **kwargs)


@pytest.mark.slow
def test_refusals(folder, tmp_path):
    def refused(path, match, **kwargs):
        with pytest.raises(InputError, match=match) as error:
            load_detector(path, **kwargs)
        assert "\n" not in str(error.value)
    plain = folder / "plain"
    refused(tmp_path / "none.onnx", "no such model")
    (tmp_path / "broken.onnx").write_bytes((plain / "model.onnx").read_bytes()[:5000])
    refused(tmp_path / "broken.onnx", "not an ONNX file|cannot read it")
    (tmp_path / "model.xml").write_bytes((plain / "model.xml").read_bytes())
    refused(tmp_path / "model.xml", "model.bin are not beside it")
    (tmp_path / "model.bin").write_bytes((plain / "model.bin").read_bytes()[:100])
    refused(tmp_path / "model.xml", "OpenVINO cannot read it")
    refused(plain / "model.onnx", "takes 64x48; its size is fixed", size=(96, 96))


@pytest.mark.slow
def test_evaluate_prints_the_same_table(folder, sample, capsys, tmp_path):
    def ap(model):
        evaluate.main(["--data", str(sample / "val.json"), "--model", str(model), "--workers", "0", "--json",
                       str(tmp_path / "scores.json")])
        return json.loads((tmp_path / "scores.json").read_text())["coco"]
    expected = ap(folder / "small.pth")
    assert ap(folder / "plain/model.onnx") == pytest.approx(expected, abs=5e-4)
    assert ap(folder / "plain/model.xml") == pytest.approx(expected, abs=5e-4)


@pytest.mark.slow
def test_openvino_computes_in_float32(folder):
    compiled = open_network(folder / "plain/model.xml", threads=1).compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.slow
def test_one_detector_serves_several_threads(folder):
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, 48, 64), np.uint8)
    for name in ("plain/model.xml", "plain/model.onnx"):
        detector = load_detector(folder / name)
        expected, = detector(picture)
        with ThreadPool(4) as pool:
            for found, in pool.imap(detector, [picture] * 200):
                np.testing.assert_array_equal(found, expected)


WITHOUT_TORCH = """
import runpy, sys
from pathlib import Path
for name in ("torch", "torchvision", "scipy", "onnx", "openvino", "matplotlib"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
if sys.argv[2:]:
    sys.argv[:2] = [sys.argv[1] + "/detect.py"]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    import numpy
    from detector import detect, load_detector
    numpy.savez("faces.npz", detect(load_detector(), "photo.jpg"))
"""


@pytest.mark.slow
def test_without_torch(tmp_path):
    """The shipped .onnx: detect.py and the README's lines of Python give what they give with torch."""
    def run(*words):
        return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, ROOT, *words], cwd=tmp_path,
                              capture_output=True, text=True)
    shutil.copy(ROOT / "docs/photo.jpg", tmp_path / "photo.jpg")
    for words in ((), ("photo.jpg",)):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    own = np.load(tmp_path / "faces.npz")["arr_0"]
    for path, digits in ((ROOT / "weights/face_ssd300.onnx", 0), (MODEL, 0.01)):
        expected = detect_faces(load_detector(path, device="cpu"), tmp_path / "photo.jpg")
        assert (own.dtype, own.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(own, expected, rtol=0, atol=digits)
    entry, = json.loads((tmp_path / "detections/detections.json").read_text())
    likely = own[own[:, 4] >= detect.SHOWN]
    np.testing.assert_allclose([face["box"] for face in entry["faces"]], likely[:, :4], atol=0.006)
    for words in (["--model", MODEL], ["--tiles", "300"], ["--size", "640"]):
        done = run("photo.jpg", *words)
        assert done.returncode == 2 and "needs PyTorch" in done.stderr and "Traceback" not in done.stderr
