"""What a run is given: validation sets, starting points, schedules, small faces, crowds, unreadable files."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from anchors import make_anchors
from support.coco import read_annotations
from data import FaceDataset, collate
from loss import Criterion
from model import SSD, Config, checkpoint, load_model
from tools.sample import draw_sample

pytestmark = pytest.mark.slow
SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3",
         "--lr", "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu"]


def run(out, *flags):
    train.main([*SMALL, "--out", str(out), *map(str, flags)])


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]


@pytest.fixture
def mine(sample, tmp_path):
    """A copy of the drawn set that a test may damage: train.json, val.json and their photos."""
    shutil.copytree(sample, tmp_path / "mine")
    return tmp_path / "mine"


def change(path, **parts):
    """Change parts of a COCO file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


# The validation set

def test_the_val_json_beside_the_one_train_json_is_taken(mine, tmp_path):
    run(tmp_path / "r", "--data", mine / "train.json", "--epochs", 1)
    assert "AP50" in logged(tmp_path / "r")[0] and (tmp_path / "r/best.pth").exists()


@pytest.mark.parametrize("flags", [["--val", "none"], ["{mine}/val.json"]])
def test_it_is_not_taken_beside_other_names_or_when_turned_off(mine, tmp_path, flags):
    run(tmp_path / "r", "--epochs", 1, "--data", mine / "train.json",
        *[flag.format(mine=mine) for flag in flags])
    assert "AP50" not in logged(tmp_path / "r")[0] and not (tmp_path / "r/best.pth").exists()


@pytest.mark.parametrize("wrong, line", [("photo", "1 of its 6 photos are missing, such as"),
                                         ("faces", "holds no face to find")])
def test_a_set_that_cannot_be_validated_on(mine, tmp_path, refused, capsys, wrong, line):
    """It is refused before training where --val names it, and left out where it was only found beside."""
    if wrong == "photo":
        next(mine.glob("val/*/*.jpg")).unlink()
    else:
        change(mine / "val.json", annotations=[])
    flags = ["--data", mine / "train.json", "--epochs", 0]
    assert line in refused(train.main, *SMALL, *flags, "--val", mine / "val.json", "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
    run(tmp_path / "r", *flags)
    assert any(text.startswith("no validation: ") and line in text
               for text in capsys.readouterr().out.splitlines())


def test_unreadable_validation_photos_are_left_out_within_the_budget(mine, tmp_path, capsys, refused):
    photo = next(mine.glob("val/*/*.jpg"))
    photo.write_bytes(b"no picture")
    flags = ["--data", mine / "train.json", "--epochs", 1]
    run(tmp_path / "r", *flags)
    out = capsys.readouterr().out
    assert ("left out, with their faces, 1 photos" in out and photo.name in out
            and "AP50" in logged(tmp_path / "r")[0])
    assert "--max-unreadable 0" in refused(train.main, *SMALL, *flags, "--max-unreadable", 0, "--out",
                                           tmp_path / "s")
    assert torch.load(tmp_path / "s/last.pth", weights_only=True)["epoch"] == 1   # trained, and not lost
    run(tmp_path / "s", *flags, "--resume")
    assert [line["epoch"] for line in logged(tmp_path / "s") if "epoch" in line] == [1]


# Photos and faces to learn from

def test_nothing_learned_is_refused(mine, tmp_path, refused):
    for photo in mine.glob("train/*/*.jpg"):
        photo.write_bytes(b"no picture")
    flags = ["--data", mine / "train.json", "--val", "none", "--epochs", 1, "--max-unreadable", 99]
    assert "12 photos could not be used" in refused(train.main, *SMALL, *flags, "--out", tmp_path / "r")


def one_photo(folder, boxes, size=(300, 300), **more):
    """A dataset of one grey photo with boxes, and whether each is a crowd."""
    from PIL import Image
    Image.new("RGB", size, (90, 90, 90)).save(folder / "x.png")
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": crowd}
                   for n, (box, crowd) in enumerate(boxes)]
    (folder / "x.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "x.png", "width": size[0], "height": size[1]}],
        "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}))
    return FaceDataset(read_annotations(folder / "x.json"), 300, 300, **more)


def test_what_a_crop_shows_of_a_crowd_is_ignored(tmp_path):
    """Its centre is outside most crops around the small face, 100 pixels below it."""
    dataset = one_photo(tmp_path, [([0, 0, 300, 140], 1), ([20, 240, 40, 40], 0)])
    for seed in range(60):
        item = dataset[0, (seed,)]
        _, top, _, bottom = item.faces[~item.crowd][0]
        border = top - 100 * (bottom - top) / 40  # where the region ends
        assert item.ignored[item.crowd].all()
        if 0 < top and bottom < 300 and abs(border) > 2:
            assert item.crowd.any() == (border > 0)


def test_an_ignored_face_without_an_anchor_makes_a_photo_with_faces(tmp_path, monkeypatch):
    """So what the teacher sees on it is not taught as background; on a photo without faces it is."""
    seen, anchors = [], make_anchors(Config())
    monkeypatch.setattr("loss.multibox_loss",
                        lambda *values: seen.append(values[2]) or (torch.zeros(()),) * 3)
    empty = one_photo(tmp_path, [])[0, None]
    tiny = one_photo(tmp_path, [([10, 10, 1, 1], 0)], min_face=17)[0, None]
    outputs = torch.zeros(2, len(anchors), 2), torch.zeros(2, len(anchors), 4)
    teacher = torch.tensor([0.0, 9]).expand(2, len(anchors), 2), outputs[1]
    Criterion(anchors, torch.zeros(2), [0.1, 0.1])(outputs, collate([empty, tiny]), teacher)
    assert (seen[0][0] == 0).all() and (seen[0][1] == -1).all()


def test_faces_too_small_at_the_networks_input_are_ignored(tmp_path):
    boxes = [([10, 10, 60, 60], 0), ([200, 200, 30, 90], 0)]                # at half size 30 and 15 px
    dataset = one_photo(tmp_path, boxes, size=(600, 600), min_size=20)
    assert dataset[0, None].ignored.tolist() == [False, True]
    assert not one_photo(tmp_path, boxes, size=(600, 600))[0, None].ignored.any()
    for seed in range(40):
        item = dataset[0, (seed,)]
        sides = item.faces[:, 2:] - item.faces[:, :2]
        assert item.ignored[(sides < 19.9).any(1) & (item.faces > 0).all(1) & (item.faces < 300).all(1)].all()


# Where a run starts

def test_load_from_wins_over_pretrained(sample, tmp_path):
    torch.save(checkpoint(SSD(Config(64, 64, 0.25))), tmp_path / "x.pth")
    run(tmp_path / "r", "--data", sample / "train.json", "--epochs", 0, "--load-from", tmp_path / "x.pth",
        "--pretrained", tmp_path / "absent.pth")
    started, given = (load_model(path).state_dict() for path in (tmp_path / "r/last.pth", tmp_path / "x.pth"))
    assert all(torch.equal(started[key], given[key]) for key in given)


@pytest.mark.parametrize("weights", [("1", "nan"), ("nan", "1"), ("inf", "0"), ("-1", "0")])
def test_weights_of_distillation_are_numbers(refused, weights):
    assert "is not 0 or more" in refused(train.main, "--load-from", "x.pth", "--distill", *weights)


# The step and the schedule

def test_without_clip_one_infinite_gradient_touches_no_other(sample):
    """With --clip, gradients are cut to that norm."""
    dataset = FaceDataset(read_annotations(sample / "train.json"), 64, 64)
    batch = collate([dataset[n, None] for n in range(4)])
    for clip in (None, 0.5):
        args = train.parse_args([*SMALL, *(["--clip", str(clip)] if clip else [])])
        trainer = train.Trainer(args, SSD(Config.scaled_from_300(64, 64, 0.25)), dataset)
        names = dict(trainer.raw_model.named_parameters())
        if not clip:
            names["backbone.bn_first.bias"].register_hook(lambda gradient: gradient * math.inf)
        trainer.update(batch, 0.01)
        gradients = [parameter.grad for parameter in names.values()]
        if clip:
            assert torch.stack([gradient.norm() for gradient in gradients]).norm() == pytest.approx(
                clip, rel=0.01)
        else:
            assert sum(not gradient.isfinite().all() for gradient in gradients) == 1


@pytest.mark.parametrize("flags, line", [
    (["--milestones", 3, 9], "the learning rate never falls: its --milestones [3, 9] lie beyond"),
    (["--milestones"], None), (["--milestones", 2, 9], None)])
def test_a_schedule_beyond_the_run_is_said(sample, tmp_path, capsys, flags, line):
    run(tmp_path / "r", "--data", sample / "train.json", "--val", "none", "--epochs", 3, "--milestones", 2,
        *flags)
    out = capsys.readouterr().out
    assert line in out if line else "never falls" not in out


@pytest.mark.slow
def test_the_loss_in_the_log_is_that_of_all_processes(tmp_path):
    """Batch norms frozen, two processes with batch 4 do the first step of one with batch 8."""
    draw_sample(tmp_path / "s", train=8, val=1)
    torch.save(checkpoint(SSD(Config.scaled_from_300(64, 64, 0.25))), tmp_path / "x.pth")
    flags = [*SMALL, "--freeze-bn", "--load-from", tmp_path / "x.pth", "--data", tmp_path / "s/train.json",
             "--epochs", 1, "--lr", "1e-9"]
    flags = [str(flag) for flag in flags]
    train.main([*flags, "--batch-size", "8", "--out", str(tmp_path / "r1")])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           "2", "train.py", *flags, "--batch-size", "4", "--out", tmp_path / "r2"],
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 batches of 4 x 2 processes" in done.stdout and (tmp_path / "r2/best.pth").exists()
    one, two = ([logged(tmp_path / name)[0][key] for key in ("loss", "class_loss", "box_loss", "AP")]
                for name in ("r1", "r2"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
