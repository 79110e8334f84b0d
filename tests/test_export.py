"""Tests of export.py: the same faces as PyTorch in every form, the metadata, and what is refused."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export
from anchors import decode, make_anchors
from detector import TorchDetector, load_detector
from export import DetectionOutput, differences
from model import checkpoint, load_model
from support.pictures import load_picture
from support.runtimes import open_network, openvino_core
from support.script import InputError, file_hash
from tools.sample import photo

ROOT = Path(__file__).resolve().parents[1]
PICTURES = [photo(np.random.default_rng(n), width, height, False)[1] for n, (width, height) in
            enumerate([(64, 48), (160, 100), (90, 120)])]


@pytest.fixture(scope="module")
def lively(small):
    """The small network with batch-norm statistics of noise, so that outputs differ from place to place."""
    torch.manual_seed(0)
    network = copy.deepcopy(small).train()
    for _ in range(3):
        network(torch.rand(16, 3, 48, 64))
    return network.eval()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, lively):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    torch.save(checkpoint(lively, epoch=7), path)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_file):
    """Run the command, a generic export with IR, in a process of its own: (the finished process, folder)."""
    folder = tmp_path_factory.mktemp("generic")
    words = [sys.executable, ROOT / "export.py", "--model", model_file, "--out", folder, "--ir"]
    return subprocess.run(words, capture_output=True, text=True), folder


@pytest.fixture(scope="module")
def graphs(done):
    """Cache build(): the exporter takes seconds, and most tests need the same three graphs."""
    made, build = {("generic", (64, 48)): onnx.load(done[1] / "model.onnx")}, export.build

    def remember(model, head, size):
        if (head, size) not in made:
            made[head, size] = build(model, head, size)
        return copy.deepcopy(made[head, size])
    return remember


@pytest.fixture
def run(monkeypatch, graphs, model_file, tmp_path):
    """Run export.py in this process with the cached graphs; returns the folder."""
    def command(*arguments):
        monkeypatch.setattr(export, "build", graphs)
        export.main(["--model", str(model_file), "--out", str(tmp_path), *map(str, arguments)])
        return tmp_path
    return command


def gap(detector, reference, least=0.05):
    """The largest difference of boxes and of scores on PICTURES."""
    gaps = differences(detector, reference, PICTURES, least)
    assert len(gaps) > 20
    return gaps.max(0)


@pytest.mark.slow
def test_the_command_is_silent_and_complete(done):
    process, folder = done
    assert process.returncode == 0 and process.stderr == ""
    lines = process.stdout.splitlines()
    assert len(lines) == 2 and all("boxes within" in line for line in lines)
    assert sorted(os.listdir(folder)) == ["model.bin", "model.onnx", "model.xml"]


@pytest.mark.slow
def test_generic_agrees_in_both_runtimes(done, lively):
    folder = done[1]
    for name in ("model.onnx", "model.xml"):
        pixels, score = gap(load_detector(folder / name), TorchDetector(lively))
        assert pixels < 1e-3 and score < 1e-5
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version == export.OPSET
    assert not graph.graph.node[0].metadata_props  # no folders of whoever exported it
    noise = np.random.default_rng(0).random((1, 3, 48, 64), np.float32)
    boxes, labels = open_network(folder / "model.onnx")(noise)
    assert boxes.shape == (len(labels), 5) and (labels == 0).all() and labels.dtype == np.int64
    assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= (64, 48, 64, 48)).all()
    assert (np.diff(boxes[:, 4]) <= 0).all() and len(boxes) <= 200


@pytest.mark.slow
def test_detection_output_agrees_with_unrounded_anchors(run, lively):
    folder, reference = run("--ir", "--head", "detection_output"), DetectionOutput(lively, rounded=False)
    for name in ("model.onnx", "model.xml"):
        detector = load_detector(folder / name)
        assert detector.network.runtime.startswith("OpenVINO")
        pixels, score = gap(detector, reference)
        assert pixels < 1e-3 and score < 1e-5
    assert gap(detector, TorchDetector(lively))[0] > 0.1  # the test would see a wrong convention
    assert {node.op_type for node in onnx.load(folder / "model.onnx").graph.node if node.domain} == {
        "PriorBoxClustered", "DetectionOutput"}


@pytest.mark.slow
def test_raw_batch_equals_singles_and_decodes_as_documented(run, lively):
    folder = run("--ir", "--head", "raw")
    images = np.random.default_rng(0).random((8, 3, 48, 64), np.float32)
    for name, colours in (("model.onnx", slice(None)), ("model.xml", slice(None, None, -1))):
        network = open_network(folder / name)
        batch = network(np.ascontiguousarray(images[:, colours]))
        singles = [network(np.ascontiguousarray(image[None, colours])) for image in images]
        for n in (0, 1):
            np.testing.assert_allclose(batch[n], np.concatenate([single[n] for single in singles]), atol=1e-5)
        assert gap(load_detector(folder / name), TorchDetector(lively))[0] < 1e-3
    metadata = network.metadata
    names = {"np": np, "H": 48, "W": 64, "logits": batch[0], "offsets": batch[1],
             **{key: json.loads(metadata[key]) for key in ("cell_anchors", "variances")}}
    exec(metadata["decoding"], names)
    expected = decode(torch.from_numpy(batch[1]), make_anchors(lively.config))
    np.testing.assert_allclose(names["boxes"], expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(names["scores"], torch.from_numpy(batch[0]).softmax(-1)[..., 1], atol=1e-6)
    assert len(metadata["decoding"].splitlines()) <= 10


@pytest.mark.slow
def test_a_threshold_goes_along_in_its_own_size_and_precision(monkeypatch, graphs, tmp_path, lively, sample,
                                                              capsys):
    monkeypatch.setattr(export, "build", graphs)
    entry = {"score": 0.5125, "size": [64, 48], "tiles": [200, 50], "target": "precision=0.95",
             "data": {"file": "val.json"}}
    torch.save(checkpoint(lively, threshold=entry), tmp_path / "sure.pth")
    flags = ["--model", str(tmp_path / "sure.pth"), "--out", str(tmp_path)]
    export.main([*flags, "--ir"])
    for name in ("sure.pth", "model.onnx", "model.xml"):
        assert load_detector(tmp_path / name, tiles=[200, 50]).threshold == entry
        assert load_detector(tmp_path / name).threshold is None  # it was measured with tiles
    assert "left out" not in capsys.readouterr().out
    # INT8 shifts the scores. NNCF is an extra: quantising is left out here.
    monkeypatch.setattr(export, "find_spec", lambda name: True)
    monkeypatch.setattr(export, "quantise", lambda ir, photos, load: ir)
    export.main([*flags, "--int8", "--data", str(sample / "val.json")])
    assert "threshold is left out" in capsys.readouterr().out
    assert load_detector(tmp_path / "model.xml", tiles=[200, 50]).threshold is None
    assert load_detector(tmp_path / "model.onnx", tiles=[200, 50]).threshold == entry
    graph = onnx.load(tmp_path / "model.onnx")
    for prop in graph.metadata_props:
        prop.value = "{" if prop.key == "threshold" else prop.value
    onnx.save(graph, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match="broken.onnx: its threshold is damaged"):
        load_detector(tmp_path / "broken.onnx")
    export.main([*flags, "--head", "raw", "--size", "96x64"])
    assert load_detector(tmp_path / "model.onnx", tiles=[200, 50]).threshold is None
    assert "threshold is left out: it is for 64x48 in float32" in capsys.readouterr().out


@pytest.mark.slow
def test_metadata_round_trip(done, lively, model_file):
    folder = done[1]
    given, ir = (open_network(folder / name).metadata for name in ("model.onnx", "model.xml"))
    assert ir == given | {"colour": "BGR"}
    assert (given["head"], given["colour"], given["value_range"], given["layout"], given["size"]) == (
        "generic", "RGB", "0-1", "NCHW", "64x48")
    assert np.array_equal(json.loads(given["anchors"]), lively.config.anchors)
    assert (given["source"], given["source_sha256"],
            given["source_epoch"]) == ("small.pth", file_hash(model_file), "7")
    assert (given["score_threshold"], given["nms_threshold"], given["top_k"]) == ("0.02", "0.45", "200")


@pytest.mark.slow
def test_fp16_is_half_the_size(done, run):
    folder = run("--fp16")
    assert (folder / "model.bin").stat().st_size < 0.6 * (done[1] / "model.bin").stat().st_size


@pytest.mark.slow
def test_a_model_that_differs_is_not_written(monkeypatch, run, graphs, model_file, tmp_path, refused):
    run("--ir")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def tampered(*arguments):
        graph = graphs(*arguments)
        weight = next(tensor for tensor in graph.graph.initializer
                      if tensor.name.endswith("cls_convs.0.3.weight"))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05),
                                                weight.name))
        return graph
    monkeypatch.setattr(export, "build", tampered)
    line = refused(export.main, "--model", model_file, "--out", tmp_path, "--ir")
    assert "model.onnx differs from the checkpoint, nothing was written" in line
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_photos_for_int8_are_spread_over_the_whole_set():
    assert export.spread(SimpleNamespace(ids=range(10), file=int), 4) == [0, 3, 6, 9]


def test_refusals(refused, model_file, tmp_path, monkeypatch):
    assert "no_such.pth" in refused(export.main, "--model", tmp_path / "no_such.pth", "--out", tmp_path)
    assert "--int8 needs photos" in refused(export.main, "--model", model_file, "--int8")
    monkeypatch.setitem(sys.modules, "nncf", None)  # asked for before anything is read
    line = refused(export.main, "--model", model_file, "--int8", "--data", tmp_path / "absent.json")
    assert "requirements-int8.txt" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None,
                    reason="NNCF is an extra: pip install -r requirements-int8.txt")
def test_int8_quantises_every_convolution(monkeypatch, run, sample, capfd):
    import openvino as ov
    monkeypatch.setitem(export.TOLERANCES, "INT8", (64, 1, 0.3))  # loose: this network is untrained
    folder = run("--int8", "--data", sample / "val.json")
    assert capfd.readouterr().err == ""
    model = openvino_core().read_model(folder / "model.xml")
    whole_numbers = [node for node in model.get_ops() if node.get_type_name() == "Constant"
                     and node.get_element_type() == ov.Type.i8]
    convolutions = [node for node in model.get_ops()
                    if node.get_type_name() in ("Convolution", "GroupConvolution")]
    assert len(whole_numbers) == len(convolutions) == 55
    assert open_network(folder / "model.xml").metadata["precision"] == "INT8"


@pytest.mark.slow
def test_the_released_network_exports_to_its_release(shared, tmp_path):
    """Our detection_output IR of the released weights gives the same faces as the released IR."""
    weights = shared / "weights/wider_face_tiny_ssd_075x.pth"
    export.main(["--model", str(weights), "--out", str(tmp_path), "--head", "detection_output",
                 "--ir", "--data", str(shared / "data/webcam_val.json")])
    reference = DetectionOutput(load_model(weights), rounded=False)
    pictures = [load_picture(path) for path in sorted((shared / "data/masks").iterdir())[:4]]
    released = load_detector(shared / "peers/face-detection-retail-0005.xml", colour="bgr", white=255)
    for detector in (load_detector(tmp_path / "model.xml"), released):
        gaps = differences(detector, reference, pictures, 0.05)
        assert len(gaps) and gaps[:, 0].max() < 0.05 and gaps[:, 1].max() < 1e-3
