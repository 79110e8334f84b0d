"""Teachers: several, wider, at a larger input; and photos that only they label."""
import json

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import train
from anchors import POSITIVE_IOU, decode, encode, make_anchors
from support.coco import read_annotations
from data import FaceDataset, collate
from loss import Criterion
from model import SSD, Config, checkpoint
from teacher import Teacher, load_teacher, to_logits

SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3", "--lr",
         "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
CONFIG = Config(64, 48, 0.25)
IMAGES = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def network(seed, width=0.25):
    """An untrained network that is sure of some faces."""
    torch.manual_seed(seed)
    model = SSD(Config(64, 48, width)).eval()
    with torch.no_grad():
        model.bbox_head.cls_convs[0][-1].weight *= 30
    return model


class Sees(torch.nn.Module):
    """A stand-in for a network: it sees the given boxes (pixels of its own input) with the given scores."""

    def __init__(self, size, boxes, scores):
        super().__init__()
        self.config, self.size, self.asked = CONFIG, size, []
        anchors = make_anchors(CONFIG, size)
        self.place = box_iou(boxes, anchors).argmax(1)
        self.offsets, self.scores = torch.zeros(len(anchors), 4), torch.full([len(anchors)], 1e-4)
        self.offsets[self.place], self.scores[self.place] = encode(boxes, anchors[self.place]), scores

    def forward(self, images):
        self.asked.append(images)
        return tuple(one.expand(len(images), -1, -1) for one in (to_logits(self.scores), self.offsets))


def test_one_teacher_at_the_students_size_answers_as_it_is():
    model = network(0)
    for mine, its in zip(Teacher([(model, CONFIG.input_size)], CONFIG)(IMAGES), model(IMAGES)):
        assert torch.equal(mine, its)


def test_what_is_seen_at_a_larger_input_is_a_target_for_the_anchors_that_answer_for_it():
    boxes = torch.tensor([[8.0, 8, 40, 50], [60, 30, 90, 75], [100, 10, 118, 36]])  # of 128x96
    scores, anchors = torch.tensor([0.9, 0.4, 0.7]), make_anchors(CONFIG)
    sees = Sees((128, 96), boxes, scores)
    logits, offsets = Teacher([(sees, (128, 96))], CONFIG)(IMAGES)
    large, = sees.asked
    assert large.shape == (3, 3, 96, 128) and torch.allclose(
        large.mean((2, 3)), IMAGES.mean((2, 3)), atol=1e-2)
    iou = box_iou(boxes / 2, anchors)
    expected = torch.full([len(anchors)], 1e-6)
    answers = (iou >= POSITIVE_IOU) | (iou == iou.max(1, keepdim=True).values)
    face = torch.where(answers, iou, -1).argmax(0)
    seen = answers.any(0)
    expected[seen] = scores[face[seen]]
    for own_logits, own_offsets in zip(logits, offsets):
        torch.testing.assert_close(own_logits.softmax(-1)[:, 1], expected, atol=1e-5, rtol=0)
        found = decode(own_offsets, anchors)[seen]
        torch.testing.assert_close(found, (boxes / 2)[face[seen]], atol=1e-3, rtol=0)
        assert not own_offsets[~seen].any()
    assert seen.sum() >= 3


def test_several_teach_their_mean_the_surer_the_more():
    models = [network(1), network(2, width=0.5)]
    both = Teacher([(model, CONFIG.input_size) for model in models], CONFIG)(IMAGES)
    answers = [model(IMAGES) for model in models]
    scores = torch.stack([logits.softmax(-1)[..., 1] for logits, _ in answers])
    torch.testing.assert_close(both[0].softmax(-1)[..., 1], scores.mean(0), atol=2e-6, rtol=0)
    expected = sum(own[..., None] * offsets for own, (_, offsets) in zip(scores, answers))
    expected = expected / scores.sum(0)[..., None]
    sure = scores.min(0).values > 1e-3
    torch.testing.assert_close(both[1][sure], expected[sure], atol=1e-4, rtol=1e-4)
    assert sure.sum() > 20


@pytest.fixture
def files(tmp_path):
    """Checkpoints of three networks: start.pth, wide.pth, and other.pth with other anchors."""
    for name, model in (("start", network(0)), ("wide@2", network(1, 0.5)),
                        ("other", SSD(Config(64, 48, 0.25, [(9, 9), (20, 30)])))):
        torch.save(checkpoint(model), tmp_path / f"{name}.pth")
    return tmp_path


def test_words_name_a_file_and_perhaps_a_size(files):
    words = [f"{files}/start.pth@128x96", f"{files}/wide@2.pth", f"{files}/start.pth@96"]
    teacher = load_teacher(words, CONFIG)
    assert teacher.sizes == [(128, 96), (64, 48), (96, 96)]
    assert [one.config.width for one in teacher.networks] == [0.25, 0.5, 0.25]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("words, said", [
    ("--load-from start.pth --teacher other.pth --distill 1 1", "other.pth: --distill needs the same"),
    ("--load-from start.pth --teacher start.pth@32 --distill 1 1", "@32: the input of a teacher must be"),
    ("--load-from start.pth --teacher start.pth@a --distill 1 1", "start.pth@a"),
    ("--teacher absent.pth --distill 1 1", "absent.pth"),
    ("--teacher start.pth", "--distill 0.3 0.4"),
    ("--unlabelled x.json", "--distill 0.3 0.4"),
    ("--distill 1 1", "--load-from or --teacher"),
    ("--load-from start.pth --distill 1 1 --unlabelled absent.json", "absent.json"),
])
def test_what_does_not_fit_is_refused_in_one_line(sample, files, refused, monkeypatch, words, said):
    monkeypatch.chdir(files)
    assert said in refused(train.main, *SMALL, "--size", "64x48", "--data", sample / "train.json", "--out",
                           files / "r", *words.split())
    assert not (files / "r/last.pth").exists()


def test_nothing_is_learned_from_the_boxes_of_unlabelled_photos(sample):
    anchors, read = make_anchors(Config()), read_annotations(sample / "train.json")
    unlabelled = FaceDataset(read.unlabelled(), 300, 300)
    for index in range(len(unlabelled)):
        for seed in (None, (index, 0), (index, 1)):
            batch = collate([unlabelled[index, seed]])
            logits, offsets = torch.zeros(1, len(anchors), 2), torch.zeros(1, len(anchors), 4)
            logits.requires_grad_(), offsets.requires_grad_()
            teacher = torch.tensor([0.0, 3]).expand_as(logits), torch.ones_like(offsets)
            criterion = Criterion(anchors, torch.zeros(2), [1, 1])
            losses, distilled = criterion((logits, offsets), batch, teacher)
            assert losses[1] == losses[2] == 0  # also at the border, and on the black around a photo
            distilled.backward()
            assert logits.grad.abs().sum() > 0 and offsets.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_run_with_teachers_and_unlabelled_photos_resumes_bit_by_bit(sample, files, capsys):
    nameless = json.loads((sample / "val.json").read_text())
    for entry in nameless["images"]:
        del entry["width"], entry["height"]
        entry["file_name"] = str(sample / entry["file_name"])
    nameless["annotations"] = []
    (files / "more.json").write_text(json.dumps(nameless))

    def run(name, *flags):
        train.main([*SMALL, "--size", "64x48", "--data", str(sample / "train.json"), "--val", "none", "--out",
                    str(files / name), *flags])
        return torch.load(files / name / "last.pth", weights_only=True)

    taught = ["--load-from", f"{files}/start.pth", "--teacher", f"{files}/start.pth@96",
              f"{files}/wide@2.pth", "--distill", "0.5", "0.5",
              "--unlabelled", f"{files}/more.json"]
    whole = run("whole", *taught, "--epochs", "2")
    assert f"train.json + {files}/more.json (unlabelled): 18 photos" in capsys.readouterr().out
    run("parts", *taught, "--epochs", "1")
    parts = run("parts", *taught, "--epochs", "2", "--resume")
    assert all(torch.equal(value, parts["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert whole["step"] == 2 * 4  # 12 and 6 photos in batches of 5
    without = run("without", *taught[:2], "--epochs", "2")
    assert not np.allclose(whole["state_dict"]["backbone.bn_first.weight"],
                           without["state_dict"]["backbone.bn_first.weight"], rtol=0, atol=1e-7)
