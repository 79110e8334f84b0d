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
import train
from support import wider
from checkpoints import make_model, save
from detector import MODEL, detect_all, load_detector
from evaluate import score_faces
from support.coco import Detections, read_annotations, read_results, to_results
from support.script import write_json
from model import checkpoint, read_checkpoint


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


@pytest.fixture
def answers(sample, tmp_path):
    """Annotations of val.json, and a results file: all faces at 0.9, a false one at 0.5 where no face is."""
    annotations = read_annotations(sample / "val.json")
    empty = np.setdiff1d(np.arange(len(annotations.ids)), annotations.image)[:1]
    found = Detections(np.append(annotations.image, empty), np.append(annotations.xywh, [[1, 1, 9, 9]], 0),
                       np.append(np.full(len(annotations.image), 0.9), 0.5))
    write_json(tmp_path / "answers.json", to_results(annotations, found))
    return annotations, tmp_path / "answers.json"


def test_threshold_curve_and_photos_as_files(sample, answers, tmp_path, capsys, refused):
    annotations, results = answers
    flags = ["--data", str(sample / "val.json"), "--predictions", str(results)]
    files = {name: str(tmp_path / "out" / name) for name in ("n.json", "p.png", "w.jpg", "p.csv")}
    evaluate.main([*flags, "--threshold-at", "false=0.2", "--json", files["n.json"], "--plot", files["p.png"],
                   "--worst", "9", "--worst-out", files["w.jpg"], "--per-photo", files["p.csv"]])
    out = capsys.readouterr().out
    assert all(f"wrote {file}" in out for file in files.values())
    assert "false=0.2: score 0.9 keeps it" in out and "recall 1.000 (1.000 to 1.000)" in out
    numbers = json.loads((tmp_path / "out/n.json").read_text())
    assert numbers["threshold"]["only_here"] == 0.5 < numbers["threshold"]["score"] == 0.9
    assert numbers["curve"]["score"] == [0.9, 0.5] and numbers["curve"]["recall"] == [1, 1]
    assert numbers["curve"]["false_per_photo"] == [0, 1 / 6]
    empty = 6 - len(np.unique(annotations.image))
    best = numbers["operating_points"][0]  # of score 0.3
    assert (best["false_with_faces"], best["false_without_faces"]) == (0, 1 / empty)
    rows = (tmp_path / "out/p.csv").read_text().splitlines()
    assert rows[0] == "file,faces,ignored,found,missed,false,best_false,lowest_found" and len(rows) == 7

    line = refused(evaluate.main, *flags, "--threshold-at", "precision=0.999", "--json", tmp_path / "no.json")
    assert "val.json: precision=0.999: score 0.9 keeps it on these 6 photos" in line and "too few" in line
    assert not (tmp_path / "no.json").exists()


def test_photos_without_faces_stand_apart(sample, answers):
    annotations, results = answers
    lines = evaluate.table(score_faces(annotations, read_results(results, annotations))[0]).splitlines()
    assert lines[-5].endswith("with faces   without faces")
    empty = 6 - len(np.unique(annotations.image))
    assert lines[-4].split()[2:] == ["1.000", "0.17", "0.00", f"{1 / empty:.2f}"]


def test_threshold_in_a_copy_of_the_checkpoint(sample, tmp_path, model_file, refused, monkeypatch):
    """The scores of an untrained network are near 0.5; it keeps a promise that allows enough."""
    new, flags = tmp_path / "new.pth", ["--data", sample / "val.json", "--workers", 0]
    torch.save(read_checkpoint(model_file) | {"epoch": 3}, model_file)
    before = model_file.read_bytes()
    words = [*flags, "--model", model_file, "--threshold-at", "false=150", "--save-threshold"]
    assert "is the model itself" in refused(evaluate.main, *words, model_file)
    (tmp_path / "link.pth").symlink_to(model_file)
    assert "is the model itself" in refused(evaluate.main, *words, tmp_path / "link.pth")
    evaluate.main([str(word) for word in (*words, new, "--size", "96x64")])
    assert model_file.read_bytes() == before
    content, own = read_checkpoint(new), read_checkpoint(model_file)
    entry = content.pop("threshold")
    assert content.keys() == own.keys() and content["epoch"] == 3 and content["config"] == own["config"]
    assert all(torch.equal(tensor, own["state_dict"][name]) for name, tensor in content["state_dict"].items())
    assert entry["size"] == [96, 64] and entry["tiles"] is None and entry["promise"] == "false=150"
    assert entry["data"]["file"] == "val.json" and entry["data"]["photos"] == 6
    assert load_detector(new).threshold == entry and load_detector(model_file).threshold is None

    # A run that starts from it makes other weights: the promise is none of theirs.
    args = train.parse_args(["--data", str(sample / "train.json"), "--load-from", str(new)])
    save(tmp_path / "next.pth", make_model(args, None))
    assert load_detector(tmp_path / "next.pth").threshold is None

    torch.save(content | {"threshold": entry | {"score": "high"}}, new)
    assert refused(evaluate.main, *flags, "--model", new).endswith(
        "new.pth: its threshold is damaged; choose it anew with evaluate.py --threshold-at ... "
        "--save-threshold NEW.pth")


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
    promise = ["--threshold-at", "recall=0.9"]
    for words, line in ((["--threshold-at", "recall=90"], "precision=0.95 or recall=0.9"),
                        (["--save-threshold", "new.pth"], "needs the promise"),
                        ([*promise, "--save-threshold", "new.onnx"], "something like new.pth"),
                        ([*promise, "--save-threshold", "new.pth", "--model", "m.xml"], "needs a checkpoint"),
                        ([*promise, "--save-threshold", "n.pth", "--predictions", "r.json"],
                         "needs a checkpoint"),
                        ([*promise, "--save-threshold", MODEL], "is the model itself"),
                        ([*promise, "--wider", tmp_path], "need --data alone"),
                        (["--worst-out", "worst.txt"], "something like worst.png")):
        assert line in refused(evaluate.main, *words)


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
