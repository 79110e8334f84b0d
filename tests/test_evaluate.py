"""Tests of evaluate.py: scoring a model or predictions, alone and in several processes."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import wider
from detector import detect_all, load_detector
from evaluate import score_faces
from coco import Detections, read_annotations, to_results
from script import write_json
from model import checkpoint


class Oracle:
    """A perfect detector: it returns the annotated faces, in the order of the annotations."""
    size = (64, 64)

    def __init__(self, annotations):
        self.answers = iter(range(len(annotations.ids)))
        self.annotations = annotations

    def __call__(self, images):
        found = []
        for _ in images:
            index = next(self.answers)
            own = self.annotations.xywh[self.annotations.image == index]
            corners = np.concatenate([own[:, :2], own[:, :2] + own[:, 2:]],
                                     1) * np.tile(64 / self.annotations.sizes[index], 2)
            found.append(np.concatenate([corners, np.full((len(own), 1), 0.9)], 1).astype(np.float32))
        return found


@pytest.fixture
def model_file(tmp_path, small):
    torch.save(checkpoint(small), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_boxes_return_to_their_photos(sample):
    annotations = read_annotations(sample / "val.json")
    detections, errors = detect_all(Oracle(annotations), annotations, batch_size=4, workers=0)
    assert not errors and np.abs(detections.xywh - annotations.xywh).max() < 0.01
    assert score_faces(annotations, detections)[0]["coco"]["AP"] == pytest.approx(1)


def test_command_and_its_files(sample, tmp_path, model_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(sample / "val.json"), "--workers", "0"]
    evaluate.main([*flags, "--model", str(model_file), "--out", "r.json",
                   "--json", "n.json", "--plot", "p.png", "--worst", "3"])
    ran = capsys.readouterr().out
    assert all(word in ran
               for word in ("AP50", "AR_large", "> 100 px", "best F1", "6 photos", "wrote worst.png"))
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert (len(numbers["coco"]) == 12 and len(numbers["sha256"]["model"]) == 64
            and numbers["versions"]["torch"] and "commit" in numbers)
    assert Image.open("p.png").width > 500 and Image.open("worst.png").height > 100
    evaluate.main([*flags, "--predictions", "r.json", "--json", "again.json"])
    assert "AP50" in capsys.readouterr().out
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[key] == numbers[key] for key in ("coco", "AP50_by_size", "operating_points"))


def test_every_size_asked_for_is_shown(sample):
    annotations = read_annotations(sample / "val.json")
    perfect = Detections(annotations.image, annotations.xywh, np.ones(len(annotations.image)))
    shown = evaluate.table(score_faces(annotations, perfect, range(1, 16))[0])
    assert all(f"> {size} px" in shown for size in range(1, 16)) and "AR_large" in shown


def test_an_irs_weights_are_hashed_with_it(tmp_path):
    args = evaluate.parse_args(["--data", "x.json"])
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text(name)
    assert evaluate.settings(args, model=str(tmp_path / "m.xml"))["sha256"].keys() == {"model", "weights"}


@pytest.mark.slow
def test_two_processes_give_the_same_digits(sample, tmp_path, model_file):
    one, two = (["--data", str(sample / "val.json"), "--model", str(model_file), "--workers", "0",
                 "--batch-size", "2", "--json", str(tmp_path / f"{name}.json"),
                 "--out", str(tmp_path / f"{name}-results.json")] for name in ("one", "two"))
    evaluate.main(one)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           "2", "evaluate.py", *two], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP50") == 1 and done.stdout.count("wrote ") == 2, done.stdout
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert all(one[key] == two[key] for key in ("coco", "AP50_by_size", "operating_points"))
    assert (tmp_path / "one-results.json").read_bytes() == (tmp_path / "two-results.json").read_bytes()


def test_unreadable_photos_stop_the_scoring_unless_told_otherwise(
    sample, tmp_path, model_file, refused, capsys):
    content = json.loads((sample / "val.json").read_text())
    content["images"][0]["file_name"] = "absent.jpg"
    (sample / "broken.json").write_text(json.dumps(content))
    flags = ["--data", sample / "broken.json", "--model", model_file, "--workers", "0"]
    assert "1 photos could not be used" in refused(evaluate.main, *flags, "--out", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
    evaluate.main([str(word) for word in (*flags, "--skip-unreadable")])
    out = capsys.readouterr().out
    assert "left out, with their faces: 1" in out and "5 photos" in out


def test_scoring_predictions_does_without_torch(sample, tmp_path):
    annotations = read_annotations(sample / "val.json")
    write_json(tmp_path / "r.json",
               to_results(annotations,
                          Detections(annotations.image, annotations.xywh, np.ones(len(annotations.image)))))
    code = ("import sys, evaluate; evaluate.main(sys.argv[1:]); "
            "print([name for name in ('torch', 'torchvision') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, "--data", sample / "val.json",
                           "--predictions", tmp_path / "r.json"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "1.0000" in done.stdout


def test_no_detections_at_all(sample):
    annotations = read_annotations(sample / "val.json")
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    scores, _ = score_faces(annotations, nothing)
    assert scores["coco"]["AP"] == 0 and scores["operating_points"][-1]["recall"] == 0
    assert "AP50" in evaluate.table(scores)


def test_refused(sample, tmp_path, refused):
    assert "no such model" in refused(evaluate.main, "--data", sample / "val.json",
                                      "--model", tmp_path / "absent.pth")
    assert "no such file" in refused(evaluate.main, "--data", tmp_path / "absent.json")
    assert "need --wider" in refused(evaluate.main, "--predictions", tmp_path)
    assert "eval_tools" in refused(evaluate.main, "--wider", tmp_path, "--predictions", tmp_path)


@pytest.mark.slow
def test_the_start_weights_have_their_published_accuracy(shared, tmp_path):
    """A third of the photos, for speed. The README has the accuracy on all of them."""
    content = json.loads((shared / "data/webcam_val.json").read_text())
    kept = {image["id"] for image in content["images"][::3]}
    content["images"] = [image | {"file_name": str(shared / "data" / image["file_name"])}
                         for image in content["images"] if image["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "part.json").write_text(json.dumps(content))
    annotations = read_annotations(tmp_path / "part.json")
    detections, errors = detect_all(load_detector(shared / "weights/wider_face_tiny_ssd_075x.pth",
                                                  device="cpu"), annotations, workers=0)
    assert not errors and score_faces(annotations, detections)[0]["coco"]["AP50"] > 0.75


@pytest.mark.slow
def test_real_predictions_score_alike_in_every_form(shared, tmp_path, capsys):
    """A published WIDER folder, and the folder and the COCO results that we write from it, score the same."""
    with tarfile.open(shared / "data/wider_eval/retinaface_mnet025_predictions.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    truth = wider.read_ground_truth(shared / "data/wider_eval/ground_truth")
    images = [{"id": n + 1, "file_name": f"images/{name}.jpg"} for n, name in enumerate(truth.names)]
    write_json(tmp_path / "val.json",
               {"images": images, "annotations": [], "categories": [{"id": 1, "name": "face"}]})
    common = ["--wider", str(shared / "data/wider_eval/ground_truth")]
    data = ["--data", str(tmp_path / "val.json")]
    for number, (predictions, more) in enumerate((
            ("retinaface_mnet025", [*data, "--out", f"{tmp_path}/r.json", "--wider-out", f"{tmp_path}/copy"]),
            ("copy", []), ("r.json", data))):
        evaluate.main([*common, "--predictions", str(tmp_path / predictions),
                       *more, "--json", f"{tmp_path}/{number}.json"])
    scores = [json.loads((tmp_path / f"{number}.json").read_text())["wider"] for number in range(3)]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0] == pytest.approx({"easy": 0.9069584243856689, "medium": 0.8815790551288838,
                                       "hard": 0.7382863255381045}, abs=1e-9)
