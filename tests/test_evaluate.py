"""Tests of evaluate.py: scoring a model or predictions, alone and in several processes."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

import evaluate
from detector import detect_all
from evaluate import score_faces
from model import checkpoint, read_checkpoint
from support import wider
from support.coco import Detections, read_annotations, read_results, to_results
from support.script import InputError, file_hash, write_json
from test_metrics import official_wider_ap


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
    assert score_faces(annotations, detections)["coco"]["AP"] == pytest.approx(1)


def test_command_and_its_files(sample, tmp_path, model_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(sample / "val.json")
    evaluate.main(["--data", data, "--workers", "0", "--model", str(model_file), "--out", "out/r.json",
                   "--json", "n.json"])
    ran = capsys.readouterr().out
    words = "AP50", "AR_large", "> 100 px", "best F1", "6 photos", "wrote out/r.json", "wrote n.json"
    assert all(word in ran for word in words)
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert len(numbers["coco"]) == 12 and len(numbers["sha256"]["model"]) == 64
    assert "commit" in numbers and numbers["flags"]["data"] == data
    evaluate.main(["--data", data, "--predictions", "out/r.json", "--json", "again.json"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[key] == numbers[key] for key in ("coco", "AP50_by_size", "operating_points"))


def test_what_made_the_detections_lies_beside_them(sample, tmp_path, model_file):
    """Tools refuse detections of other photos, and a note that is of other detections."""
    data, out = str(sample / "val.json"), tmp_path / "r.json"
    torch.save(read_checkpoint(model_file) | {"photos": ["their hash"]}, model_file)
    evaluate.main(["--data", data, "--workers", "0", "--model", str(model_file), "--size", "96x64",
                   "--tiles", "160", "--out", str(out)])
    annotations, detections, made = evaluate.read_detections(data, out)
    assert len(annotations.ids) == 6 and len(detections.score) == len(json.loads(out.read_text()))
    assert made["sha256"] == {"model": file_hash(model_file)} and made["trained_on"] == ["their hash"]
    assert made["size"] == [96, 64] and made["tiles"] == [160, 40] and made["model"] == "small.pth"
    with pytest.raises(InputError, match="r.json: is of other photos than"):
        content = json.loads((sample / "val.json").read_text())
        content["images"][0]["file_name"] = "other.jpg"
        write_json(tmp_path / "other.json", content)
        evaluate.read_detections(tmp_path / "other.json", out)
    out.write_text(out.read_text() + " ")
    with pytest.raises(InputError, match="r.made.json: is not of .*r.json as it is now"):
        evaluate.read_detections(data, out)
    evaluate.main(["--data", data, "--predictions", str(out), "--out", str(out)])  # nobody knows what made it
    assert evaluate.read_detections(data, out)[2] is None


@pytest.fixture
def answers(sample, tmp_path):
    """Annotations of val.json, and a results file: all faces at 0.9, a false one at 0.5 where no face is."""
    annotations = read_annotations(sample / "val.json")
    empty = np.setdiff1d(np.arange(len(annotations.ids)), annotations.image)[:1]
    found = Detections(np.append(annotations.image, empty), np.append(annotations.xywh, [[1, 1, 9, 9]], 0),
                       np.append(np.full(len(annotations.image), 0.9), 0.5))
    write_json(tmp_path / "answers.json", to_results(annotations, found))
    return annotations, tmp_path / "answers.json"


def test_every_size_asked_for_is_shown(sample):
    annotations = read_annotations(sample / "val.json")
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    scores = score_faces(annotations, nothing, range(1, 16))
    assert all(f"> {size} px" in evaluate.table(scores) for size in range(1, 16))
    assert scores["coco"]["AP"] == 0 and scores["operating_points"][-1]["recall"] == 0


def test_an_irs_weights_are_hashed_with_it(tmp_path):
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).touch()
    assert evaluate.hashes(str(tmp_path / "m.xml"), data=None).keys() == {"model", "weights"}


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
    evaluate.main([str(word) for word in (*flags, "--skip-unreadable", "--out", tmp_path / "r.json")])
    out = capsys.readouterr().out
    assert "left out, with their faces: 1" in out and "5 photos" in out
    seen, _, _ = evaluate.read_detections(sample / "broken.json", tmp_path / "r.json")
    assert len(seen.ids) == 5  # tools leave it out as well


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


def test_refused(sample, tmp_path, answers, refused):
    assert "no such model" in refused(evaluate.main, "--data", sample / "val.json",
                                      "--model", tmp_path / "absent.pth")
    assert "no such file" in refused(evaluate.main, "--data", tmp_path / "absent.json")
    assert "eval_tools" in refused(evaluate.main, "--wider", tmp_path, "--predictions", tmp_path)
    results = ["--predictions", answers[1]]
    for words, line in ((["--predictions", tmp_path], "need --wider"),
                        (["--batch-size", "0"], "at least 1"),
                        (["--wider-part"], "is for --wider"),
                        (["--wider", tmp_path, "--predictions", tmp_path, "--out", "x"], "need the photos"),
                        ([*results, "--tiles", "64"], "--predictions runs no model: --tiles would do no"),
                        ([*results, "--skip-unreadable"], "--skip-unreadable would do nothing"),
                        ([*results, "--model", "x.pth"], "--model would do nothing")):
        assert line in refused(evaluate.main, *words)


@pytest.mark.parametrize("category", [0, "1", None, True])
def test_results_of_no_category_of_the_set_are_named(sample, answers, refused, category):
    annotations, path = answers
    entries = json.loads(path.read_text())
    entries[1]["category_id"] = category
    write_json(path, entries)
    assert f"entry 1 is of category_id {category!r}, which is not in" in refused(
        evaluate.main, "--data", sample / "val.json", "--predictions", path)


def test_results_of_other_categories_are_left_out_but_not_all(sample, answers, tmp_path):
    annotations, path = answers
    content, entries = json.loads((sample / "val.json").read_text()), json.loads(path.read_text())
    content["categories"].append({"id": 7, "name": "dog"})
    write_json(tmp_path / "two.json", content)
    two = read_annotations(tmp_path / "two.json")
    dogs = [entry | {"category_id": 7} for entry in entries]
    write_json(path, [entries[0] | {"category_id": 1.0}, *dogs[1:]])
    assert len(read_results(path, two).score) == 1
    write_json(path, dogs)
    with pytest.raises(InputError, match="none of its .* entries is of category_id 1, the face"):
        read_results(path, two)


def test_boxes_in_fractions_of_the_photo_are_refused(sample, answers, tmp_path, refused):
    annotations, path = answers
    found = read_results(path, annotations)
    scale = np.tile(annotations.sizes[found.image], 2)
    write_json(path, to_results(annotations, Detections(found.image, found.xywh / scale, found.score)))
    assert "within 0-1, as fractions" in refused(
        evaluate.main, "--data", sample / "val.json", "--predictions", path)
    (tmp_path / "e").mkdir()
    (tmp_path / "e/a.txt").write_text("a\n1\n0.25 0.25 0.5 0.5 0.9\n")
    with pytest.raises(InputError, match="within 0-1, as fractions"):
        wider.read_predictions(tmp_path, ["e/a"])
    write_json(path, [])
    assert len(read_results(path, annotations).score) == 0  # nothing is none of them


# Parts of WIDER

@pytest.fixture
def wider_world(tmp_path):
    """A val of three events with a photo each: .mat files, a json of the two last, detections on all."""
    from test_wider import write_ground_truth
    (tmp_path / "mat").mkdir()
    write_ground_truth(tmp_path / "mat", "abc", (3, 2, 4), ((1, 3), (2,), (1, 2, 4)))
    truth = wider.read_ground_truth(tmp_path / "mat")
    rng = np.random.default_rng(0)
    image = np.append(truth.image, rng.integers(0, 3, 9))
    xywh = np.append(truth.xywh * 1.0, rng.uniform(100, 200, (9, 4)), 0)
    found = Detections(image, xywh, rng.uniform(0.1, 0.8, len(image)))
    wider.write_predictions(tmp_path / "all", truth.names, found)
    images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(truth.names)]
    for name, kept in (("all", images), ("part", images[1:])):
        write_json(tmp_path / f"{name}.json",
                   {"images": kept, "annotations": [], "categories": [{"id": 1, "name": "face"}]})
    return truth, found


def test_a_part_of_wider_is_measured_alone(wider_world, tmp_path, capsys):
    """Equal to the official code, written out box by box, on the part's faces and detections."""
    truth, found = wider_world

    def measured(data, *more):
        evaluate.main(["--wider", str(tmp_path / "mat"), "--data", str(tmp_path / data), "--predictions",
                       str(tmp_path / "all"), "--json", str(tmp_path / "n.json"), *more])
        return json.loads((tmp_path / "n.json").read_text())["wider"], capsys.readouterr().out
    faces, seen = truth.image > 0, found.image > 0
    part, out = measured("part.json", "--wider-part")
    for level, kept in truth.kept.items():
        expected = official_wider_ap(truth.image[faces], truth.xywh[faces], kept[faces],
                                           found.image[seen], found.xywh[seen], found.score[seen])
        assert part[level] == pytest.approx(expected, abs=1e-9)
    assert "2 of 3 photos, not comparable with published figures" in out
    missed, out = measured("part.json")
    assert "1 images of the ground truth are not in" in out and missed["hard"] < part["hard"]
    whole, out = measured("all.json", "--wider-part")
    assert whole == measured("all.json")[0] != part and "not comparable" not in out


def test_photos_of_something_else_are_refused(wider_world, tmp_path, refused):
    write_json(tmp_path / "x.json", {"images": [{"id": 1, "file_name": "q/z.jpg"}], "annotations": []})
    write_json(tmp_path / "r.json", [{"image_id": 1, "category_id": 1, "bbox": [9, 9, 9, 9], "score": 1}])
    words = ["--wider", tmp_path / "mat", "--data", tmp_path / "x.json", "--predictions", tmp_path / "r.json"]
    assert "none of the photos is one of WIDER" in refused(evaluate.main, *words, "--wider-part")
    assert "none of the photos is one of WIDER" in refused(evaluate.main, *words[:4], "--model", "unread")
    assert "has no image q/z, but there are detections of it" in refused(evaluate.main, *words)


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
