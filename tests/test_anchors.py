"""Tests of anchors.py: both kinds of anchors, their order, encode and decode, matching, the command."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from tools import fit_anchors as module
from anchors import POSITIVE_IOU, decode, encode, make_anchors, match, pair_iou, task_aligned
from tools.fit_anchors import fit, shape_iou
from support.coco import read_annotations
from model import HAND_DESIGNED, Config


def test_rounded_anchors_follow_the_pixel_inclusive_convention():
    base = make_anchors(Config())[:9]
    for (w, h), box in zip(HAND_DESIGNED, base.tolist()):  # Python's round() is half to even, as torch's
        x1, x2, y1, y2 = (round(7.5 + sign * (side - 1) / 2) for side in (w, h) for sign in (-1, 1))
        assert box == [x1, y1, x2 + 1, y2 + 1]
    assert (base[0, 2:] - base[0, :2]).tolist() == [10, 15]


def test_unrounded_anchors_are_centred_on_the_cell():
    base = make_anchors(Config(), rounded=False)[:9]
    torch.testing.assert_close(base[:, 2:] - base[:, :2], torch.tensor(HAND_DESIGNED))
    torch.testing.assert_close((base[:, 2:] + base[:, :2]) / 2, torch.full((9, 2), 8.0))


@pytest.mark.parametrize("rounded", [True, False])
def test_order_is_the_heads(rounded):
    config = Config(64, 48)
    boxes = make_anchors(config, rounded=rounded).view(3, 4, 9, 4)
    torch.testing.assert_close(boxes[2, 1] - boxes[0, 0], torch.tensor([16.0, 32, 16, 32]).expand(9, 4))
    assert len(make_anchors(Config())) == 3249
    assert torch.equal(make_anchors(config, (300, 300), rounded), make_anchors(Config(), rounded=rounded))


def random_boxes(generator, n, low=1.0, high=200.0):
    corner = torch.rand(n, 2, generator=generator) * 250 - 20
    return torch.cat([corner, corner + low + torch.rand(n, 2, generator=generator) * (high - low)], 1)


def test_decode_inverts_encode():
    generator = torch.Generator().manual_seed(0)
    own = make_anchors(Config(), rounded=False)[torch.randint(3249, (500,), generator=generator)]
    boxes = random_boxes(generator, 500)
    torch.testing.assert_close(decode(encode(boxes, own), own), boxes, rtol=1e-4, atol=2e-3)


def test_encode_is_the_coding_of_the_paper():
    offsets = encode(torch.tensor([[10.0, 20, 40, 80]]), torch.tensor([[0.0, 0, 20, 40]]))
    expected = [(25 - 10) / 20 / 0.1, (50 - 20) / 40 / 0.1, np.log(30 / 20) / 0.2, np.log(60 / 40) / 0.2]
    assert offsets[0].tolist() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_coding_is_finite_for_any_box_and_offset(values):
    own = make_anchors(Config())[:9]
    values = torch.tensor(values).expand(9, 4)
    assert encode(values, own).isfinite().all() and decode(values, own).isfinite().all()


def inside(anchor, region):
    """The part of a box's own area that lies in a region."""
    (x1, y1, x2, y2), (left, top, right, bottom) = anchor.tolist(), region.tolist()
    width, height = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
    return max(0.0, width) * max(0.0, height) / ((x2 - x1) * (y2 - y1))


def slow_match(own, faces, ignored, crowd=None, chosen=None):
    """The matching rule written out, one anchor at a time, for one image."""
    labels, assigned = [], []
    iou = box_iou(faces, own) if len(faces) else torch.zeros(0, len(own))
    best = {n: int(iou[n].argmax()) if iou[n].any() else None for n in range(len(faces)) if not ignored[n]}
    for a in range(len(own)):
        may = {n: iou[n, a] >= POSITIVE_IOU if chosen is None else bool(chosen[n, a]) for n in best}
        claims = [(float(iou[n, a] + 2 * (best[n] == a)), -n) for n in best if may[n] or best[n] == a]
        overlap, face = max(claims, default=(0.0, 0))
        taken = overlap > 0
        unsure = any(ignored[n] and (iou[n, a] >= POSITIVE_IOU or crowd is not None and crowd[n]
                                     and inside(own[a], faces[n]) >= 0.5) for n in range(len(faces)))
        labels.append(1 if taken else -1 if unsure else 0)
        assigned.append(-face if taken else None)
    return labels, assigned


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crowds, chosen", [(False, False), (True, False), (True, True)])
def test_matching_a_batch_follows_the_rule_one_by_one(seed, crowds, chosen):
    """Also for faces that are equal, that lie beyond all anchors, that are empty, and that tie."""
    generator = torch.Generator().manual_seed(seed)
    own = make_anchors(Config.scaled_from_300(96, 96))
    counts = [3, 0, 7, 1, 12]
    faces = [random_boxes(generator, n, 3, 90) / 2.5 for n in counts]
    if seed % 2:
        faces = [own_faces.round() for own_faces in faces]
        faces[2][3], faces[2][4:6] = faces[2][0], own[:2]
    faces[4][:3] = torch.tensor([[500.0, 10, 520, 30], [-90, -90, -50, -50], [20, 20, 20, 60]])
    ignored = [torch.rand(n, generator=generator) < 0.4 for n in counts]
    crowd = [marks & (torch.rand(len(marks), generator=generator) < 0.5) for marks in ignored]
    image = torch.arange(5).repeat_interleave(torch.tensor(counts))
    may = [torch.rand(n, len(own), generator=generator) < 0.1 for n in counts]
    labels, offsets = match(own, torch.cat(faces), torch.cat(ignored), image, 5,
                            torch.cat(crowd) if crowds else None, torch.cat(may) if chosen else None)
    for n in range(5):
        expected, assigned = slow_match(own, faces[n], ignored[n], crowd[n] if crowds else None,
                                        may[n] if chosen else None)
        assert labels[n].tolist() == expected
        for a, face in enumerate(assigned):
            if face is None:
                assert not offsets[n, a].any()
            else:
                torch.testing.assert_close(offsets[n, a], encode(faces[n][face], own[a]))
    assert {0, 1} <= set(labels.unique().tolist())


@pytest.mark.parametrize("seed", range(4))
def test_the_anchors_that_answer_best_are_chosen_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    own = make_anchors(Config.scaled_from_300(96, 96))
    faces, image = random_boxes(generator, 6, 3, 90) / 2.5, torch.tensor([0, 0, 2, 2, 2, 2])
    faces[5] = torch.tensor([-90.0, -90, -50, -50])                         # no anchor overlaps it
    logits = torch.randn(3, len(own), 2, generator=generator)
    offsets = torch.randn(3, len(own), 4, generator=generator)
    chosen = task_aligned(logits, offsets, own, faces, image)
    for n in range(6):
        scores, boxes = logits[image[n]].softmax(-1)[:, 1], decode(offsets[image[n]], own)
        worth = [float(scores[a] * box_iou(faces[n:n + 1], boxes[a:a + 1]) ** 6)
                 if box_iou(faces[n:n + 1], own[a:a + 1]) >= 0.2 else 0.0 for a in range(len(own))]
        best = sorted(range(len(own)), key=lambda a: -worth[a])[:9]
        assert chosen[n].nonzero().flatten().tolist() == sorted(a for a in best if worth[a] > 0)
    assert chosen[:5].any(1).sum() > 2 and not chosen[5].any()
    assert task_aligned(logits[:, :4], offsets[:, :4], own[:4], faces[:0], image[:0]).shape == (0, 4)


def test_iou_of_pairs():
    boxes, others = random_boxes(torch.Generator().manual_seed(0), 40, 3, 90).view(2, 20, 4)
    assert torch.allclose(pair_iou(boxes, others), box_iou(boxes, others).diagonal())
    nothing = torch.tensor([5.0, 5, 5, 5])
    assert pair_iou(nothing, nothing) == 0 and pair_iou(boxes[0], boxes[0]) == 1


def test_a_crowd_region_protects_the_anchors_that_lie_in_it():
    """As evaluation has it: a detection with half its own area in a crowd region is not counted as false."""
    own = make_anchors(Config())
    region, face = torch.tensor([[50.0, 50, 250, 250]]), torch.tensor([[100.0, 100, 140, 150]])
    within = torch.tensor([inside(anchor, region[0]) for anchor in own])
    mark = torch.tensor([True])
    labels, _ = match(own, region, mark, torch.tensor([0]), 1, mark)
    assert (within == 0.5).any() and (within == 1).sum() > 500
    assert torch.equal(labels[0] == -1, (within >= 0.5) | (box_iou(region, own)[0] >= POSITIVE_IOU))
    assert not (labels == 1).any() and (labels == 0).any()
    alone, _ = match(own, face, ~mark, torch.tensor([0]), 1)
    marks = torch.tensor([True, False])
    both, offsets = match(own, torch.cat([region, face]), marks, torch.zeros(2, dtype=torch.long), 1, marks)
    assert torch.equal(both == 1, alone == 1) and (alone == 1).any()      # a face to learn comes first
    assert torch.equal(both[alone != 1], labels[alone != 1]) and torch.equal(offsets.any(-1), both == 1)
    ignored, _ = match(own, region, mark, torch.tensor([0]), 1)           # one large ignored face is no crowd
    assert torch.equal(ignored[0] == -1, box_iou(region, own)[0] >= POSITIVE_IOU)


def test_a_crowd_region_without_area_protects_nothing():
    own = make_anchors(Config.scaled_from_300(96, 96))
    empty = torch.tensor([[20.0, 20, 20, 60], [30, 30, 30, 30], [60, 60, 40, 40], [500, 500, 600, 600]])
    labels, offsets = match(own, empty, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), 1,
                            torch.ones(4, dtype=torch.bool))
    assert not labels.any() and not offsets.any()


def test_a_face_that_overlaps_no_anchor_takes_none():
    own = make_anchors(Config())
    faces = torch.tensor([[1000.0, 1000, 1040, 1040], [50, 50, 50, 50], [100, 100, 130, 140]])
    labels, offsets = match(own, faces, torch.zeros(3, dtype=torch.bool), torch.tensor([0, 0, 1]), 2)
    assert not labels[0].any() and not offsets[0].any()
    assert labels[1].any() and offsets.abs().max() < 20


def test_the_least_overlap_of_a_positive_is_0_4():
    """Anchors of 10 x 10: faces that cover 41 % and 39 % of one, beside a better anchor for each face."""
    own = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.1], [100, 0, 110, 10], [100, 0, 110, 3.9]])
    faces = torch.tensor([[0.0, 0, 10, 4.1], [100, 0, 110, 3.9]])
    image = torch.tensor([0, 0])
    assert match(own, faces, torch.tensor([False, False]), image, 1)[0].tolist() == [[1, 1, 0, 1]]
    assert match(own, faces, torch.tensor([True, True]), image, 1)[0].tolist() == [[-1, -1, 0, -1]]


def test_matching_reduces_no_integers(monkeypatch):
    """Apple's MPS cannot before macOS 15."""
    reduce, kinds = torch.Tensor.scatter_reduce, set()

    def recorded(self, *arguments, **more):
        kinds.add(self.dtype)
        return reduce(self, *arguments, **more)
    monkeypatch.setattr(torch.Tensor, "scatter_reduce", recorded)
    faces, ignored, image = (torch.tensor([[10.0, 10, 50, 50]] * 2), torch.tensor([True, False]),
                             torch.tensor([0, 1]))
    match(make_anchors(Config()), faces, ignored, image, 2)
    assert kinds <= {torch.float32}


def test_matching_without_faces():
    own = make_anchors(Config.scaled_from_300(64, 64))
    labels, offsets = match(own, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool),
                            torch.zeros(0, dtype=torch.long), 2)
    assert labels.shape == (2, len(own)) and not labels.any() and not offsets.any()


def test_every_face_takes_its_best_anchor_even_below_the_threshold():
    own = make_anchors(Config())
    face = torch.tensor([[100.0, 100, 103, 103]])
    labels, _ = match(own, face, torch.tensor([False]), torch.tensor([0]), 1)
    assert labels.sum() == 1 and labels[0, box_iou(face, own).argmax()] == 1
    assert box_iou(face, own).max() < POSITIVE_IOU


def test_order_of_faces_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    own, faces = make_anchors(Config.scaled_from_300(96, 96)), random_boxes(generator, 9, 3, 60) / 2
    ignored, order = torch.arange(9) % 3 == 0, torch.randperm(9, generator=generator)
    one = match(own, faces, ignored, torch.zeros(9, dtype=torch.long), 1)
    two = match(own, faces[order], ignored[order], torch.zeros(9, dtype=torch.long), 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_fit_finds_clusters():
    generator = np.random.default_rng(0)
    centres = np.array([(10, 15), (40, 60), (150, 200)])
    sides = np.concatenate([centre * generator.uniform(0.9, 1.1, (200, 2)) for centre in centres])
    assert fit(sides, 3) == pytest.approx(centres, rel=0.05)
    assert shape_iou(np.array([[10.0, 10]]), np.array([[20.0, 5]])).item() == pytest.approx(50 / 150)


@pytest.mark.slow
def test_command(sample, tmp_path, capsys, refused):
    module.main(["--data", str(sample / "train.json"), "-k", "4"])
    out = capsys.readouterr().out
    assert "hand-designed: mean best IoU" in out and "--anchors" in out
    counts = []
    for least in ("0", "17", "30"):
        module.main(["--data", str(sample / "train.json"), "-k", "2", "--min-face", least])
        counts.append(int(capsys.readouterr().out.split(" faces; ")[0].split()[-1]))
    sides = read_annotations(sample / "train.json").xywh[:, 2:].min(1)
    assert counts == [(sides >= least).sum() for least in (0, 17, 30)] and counts[0] > counts[2]
    assert "cannot be fitted" in refused(module.main, "--data", sample / "train.json", "-k", 9999)
    assert "no such file" in refused(module.main, "--data", tmp_path / "absent.json")
