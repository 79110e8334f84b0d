"""Tests of loss.py: equal to the formula written out, finite without faces, gradients of the right sign."""

import math

import pytest
import torch
import torch.nn.functional as F

from anchors import decode, encode, make_anchors
from data import Batch
from loss import (EIOU_WEIGHT, QUALITY_WEIGHT, Criterion, batch_divisor, confidence, distillation_loss, eiou,
                  multibox_loss, quality_focal, soft_targets)
from model import Config


ANCHORS = make_anchors(Config())[:200]
NEWER = {"class_loss": "quality-focal", "box_loss": "eiou"}


def case(seed=0, batch=3, anchors=200, positives=0.05, ignored=0.05):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch, anchors, generator=generator)
    labels = (draw < positives).long() - ((draw > 1 - ignored)).long()
    logits = torch.randn(batch, anchors, 2, generator=generator)
    offsets, targets = torch.randn(2, batch, anchors, 4, generator=generator)
    return logits, offsets, labels, targets * (labels == 1)[..., None]


def slow(logits, offsets, labels, targets):
    """The class and box loss written out, image by image."""
    class_sum = box_sum = 0.0
    for z, d, y, t in zip(logits.double(), offsets.double(), labels, targets.double()):
        cost = [-F.log_softmax(z[a], 0)[int(y[a] == 1)].item() for a in range(len(y))]
        positives = [a for a in range(len(y)) if y[a] == 1]
        negatives = sorted((cost[a] for a in range(len(y)) if y[a] == 0), reverse=True)
        class_sum += sum(cost[a] for a in positives) + sum(negatives[:max(3 * len(positives), 10)])
        difference = (d - t)[positives].abs()
        box_sum += torch.where(difference < 1, difference ** 2 / 2, difference - 0.5).sum().item()
    divisor = max((labels == 1).sum().item(), len(labels))
    return class_sum / divisor, box_sum / divisor


@pytest.mark.parametrize(
    "arguments", [{}, {"positives": 0.4}, {"positives": 0}, {"batch": 1, "ignored": 0.9}, {"anchors": 5}]
)
def test_equals_the_formula(arguments):
    inputs = case(**arguments)
    weights = torch.tensor([0.3, -0.7])
    total, class_loss, box_loss = multibox_loss(*inputs, ANCHORS[:inputs[2].shape[1]], weights,
                                                batch_divisor(inputs[2] == 1))
    expected = slow(*inputs)
    assert class_loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert box_loss.item() == pytest.approx(expected[1], rel=1e-5)
    assert total.item() == pytest.approx(
        math.exp(-0.3) * expected[0] + 0.15 + math.exp(0.7) * expected[1] - 0.35, rel=1e-5)


def gradients(logits, offsets, labels, targets, weights=(0.0, 0.0), **losses):
    """The loss and its gradients by logits, offsets and loss weights."""
    leaves = [t.clone().requires_grad_() for t in (logits, offsets, torch.tensor(weights))]
    total, *_ = multibox_loss(leaves[0], leaves[1], labels, targets, ANCHORS, leaves[2],
                              batch_divisor(labels == 1), **losses)
    total.backward()
    return total, [leaf.grad for leaf in leaves]


def test_a_batch_without_faces_is_finite_and_still_teaches():
    logits, offsets, labels, targets = case(positives=0, ignored=0)
    total, (by_logits, by_offsets, by_weights) = gradients(logits, offsets, labels, targets)
    assert total.isfinite() and by_weights.isfinite().all()
    assert ((by_logits != 0).any(-1).sum(1) == 10).all() and not by_offsets.any()
    assert (by_logits[..., 0] <= 0).all() and (by_logits[..., 1] >= 0).all()  # towards background


@pytest.mark.parametrize("losses", [{}, NEWER])
def test_ignored_anchors_teach_nothing(losses):
    logits, offsets, labels, targets = case(positives=0.1, ignored=0.5)
    _, (by_logits, by_offsets, _) = gradients(logits, offsets, labels, targets, **losses)
    assert not by_logits[labels == -1].any() and not by_offsets[labels != 1].any()
    assert by_logits[labels == 1].any(-1).all()


@pytest.mark.parametrize("losses", [{}, NEWER])
def test_permuting_anchors_or_images_changes_nothing(losses):
    inputs = case(seed=4)
    weights, order, rows = torch.zeros(2), torch.randperm(200), torch.tensor([2, 0, 1])
    expected = torch.stack(multibox_loss(*inputs, ANCHORS, weights, batch_divisor(inputs[2] == 1), **losses))
    for shuffled, own in (([t[:, order] for t in inputs], ANCHORS[order]),
                          ([t[rows] for t in inputs], ANCHORS)):
        changed = multibox_loss(*shuffled, own, weights, batch_divisor(shuffled[2] == 1), **losses)
        torch.testing.assert_close(expected, torch.stack(changed))


def test_bfloat16_outputs_are_computed_in_float32():
    logits, offsets, labels, targets = case()
    half = multibox_loss(logits.bfloat16(), offsets.bfloat16(), labels,
                         targets, ANCHORS, torch.zeros(2), batch_divisor(labels == 1))
    assert all(loss.dtype == torch.float32 for loss in half)
    full = multibox_loss(logits, offsets, labels, targets, ANCHORS, torch.zeros(2),
                         batch_divisor(labels == 1))
    torch.testing.assert_close(torch.stack(half), torch.stack(full), rtol=0.02, atol=0)


def test_extreme_logits_stay_finite():
    logits, offsets, labels, targets = case()
    total, grads = gradients(logits * 1e6, offsets * 1e6, labels, targets)
    assert total.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_distillation_is_0_at_the_teacher_and_lets_scores_of_labelled_faces_go():
    logits, offsets, labels, _ = case(positives=0.2)
    divisor = batch_divisor(labels == 1)
    nothing = distillation_loss(logits, offsets, logits, offsets, labels != 1, confidence(logits), divisor)
    assert torch.stack(nothing).tolist() == pytest.approx([0, 0], abs=1e-6)
    moved = logits.clone().requires_grad_(), (offsets + 1).requires_grad_()
    sum(distillation_loss(moved[0] * 1.5, moved[1], logits, offsets,
                          labels != 1, confidence(logits), divisor)).backward()
    assert not moved[0].grad[labels == 1].any() and moved[0].grad[labels != 1].any(-1).all()
    # boxes are pulled wherever the teacher saw a face
    assert (moved[1].grad.any(-1) == (confidence(logits) > 0)).all() and (confidence(logits) > 0).any()


@pytest.mark.parametrize("moved", [0.01, -3.0])
def test_distillation_is_the_distance_of_boxes_and_the_divergence_of_scores(moved):
    start = torch.tensor([[[0.0, 3], [0, 1], [3, 0]]])  # wholly, partly and not confident
    labels, offsets, weight = torch.tensor([[1, 0, 0]]), torch.zeros(1, 3, 4), confidence(start)
    scores, boxes = distillation_loss(
        torch.zeros(1, 3, 2), offsets + moved, start, offsets, labels != 1, weight, 2
    )
    assert boxes.item() == pytest.approx(4 * abs(moved) * weight.sum().item() / 2, rel=1e-5)
    p = start[0, 1:].softmax(-1)  # those without a labelled face
    assert scores.item() == pytest.approx((p * (p / 0.5).log()).sum().item() / 2, rel=1e-5)


def test_the_teacher_counts_from_a_score_of_a_half_on_and_wholly_from_nine_tenths_on():
    scores = torch.tensor([0.01, 0.1, 0.5, 0.6, 0.7, 0.9, 0.99])
    logits = torch.stack([torch.zeros(7), torch.logit(scores)], -1)
    assert confidence(logits).tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1], abs=1e-6)


def test_a_confident_teacher_sets_the_box_and_what_it_sees_is_no_background_beside_faces():
    # The teacher sees faces at the first three anchors.
    logits = torch.tensor([[0.0, 3], [0, 1], [0, 3], [3, 0], [3, 0]]).expand(3, 5, 2)
    offsets = torch.arange(20.0).view(5, 4).expand(3, 5, 4)
    labels = torch.tensor([[1, 0, -1, 1, 0], [0, 0, 0, 0, 0], [0, 0, -1, 0, 0]])
    given = labels, torch.full((3, 5, 4), -1.0), logits, offsets, torch.tensor([True, False, True])
    labels, targets, taught, weight = soft_targets(*given, torch.zeros(3, dtype=torch.bool))
    # The second photo has no face, the third has only an ignored one.
    assert labels.tolist() == [[1, -1, -1, 1, 0], [0, 0, 0, 0, 0], [-1, -1, -1, 0, 0]]
    expected = [1, (1 / (1 + math.exp(-1)) - 0.5) / 0.4, 1, 0, 0]
    assert weight[0].tolist() == pytest.approx(expected)
    assert targets[0, :, 0].tolist() == pytest.approx([-1 + w * (4 * n + 1) for n, w in enumerate(expected)])
    assert torch.equal(taught, given[0] != 1)
    _, distance = distillation_loss(logits, offsets + 1, logits, offsets, taught, weight, 2)
    assert distance.item() == pytest.approx(4 * 3 * sum(expected) / 2)
    # Where labels are complete, they stay, and the score of what the teacher alone sees is not learned.
    own, boxes, taught, weight = soft_targets(*given, torch.tensor([True, True, True]))
    assert torch.equal(own, given[0]) and torch.equal(boxes, given[1]) and not weight.any()
    assert taught[:2].tolist() == [[False, False, True, False, True], [False] * 3 + [True] * 2]


def test_unlabelled_photos_are_taught_no_more_strongly_than_labelled_ones():
    """Few positives must not multiply the teacher's part: one photo of eight has labels."""
    anchors = make_anchors(Config())
    generator = torch.Generator().manual_seed(0)
    teacher_logits = torch.randn(8, len(anchors), 2, generator=generator)
    teacher_logits[..., 0] += 4                            # mostly background
    teacher = teacher_logits, torch.zeros(8, len(anchors), 4)
    faces = torch.tensor([[100.0, 100, 160, 170]]).expand(8, 4)
    no = torch.zeros(8, dtype=torch.bool)
    strength = {}
    for unlabelled in (0, 7):
        kinds = torch.tensor([0] * (8 - unlabelled) + [2] * unlabelled).byte()
        kept = torch.arange(8) < 8 - unlabelled
        own = faces * kept[:, None], no, no, torch.arange(8), kept, kinds
        batch = Batch(torch.zeros(8, 3, 300, 300), *own)
        logits = torch.zeros(8, len(anchors), 2, requires_grad=True)
        outputs = logits, torch.zeros(8, len(anchors), 4)
        Criterion(anchors, torch.zeros(2), (1, 0))(outputs, batch, teacher)[1].backward()
        strength[unlabelled] = logits.grad.norm()
    assert strength[7] < 3 * strength[0]  # by the labels alone it would be 8


def test_padding_changes_nothing():
    """Not a bit of the losses and gradients, with and without a teacher."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(9, 2, generator=generator) * 200
    faces = torch.cat([corners, corners + 8 + 90 * torch.rand(9, 2, generator=generator)], 1)
    ignored, crowd = torch.arange(9) % 4 == 0, torch.arange(9) % 8 == 0
    image = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    kinds = torch.tensor([0, 1, 0, 2]).byte()
    anchors = make_anchors(Config())
    outputs = torch.randn(4, len(anchors), 6, generator=generator)
    teacher = torch.randn(4, len(anchors), 2, generator=generator) * 3, outputs[..., :4].clone()
    for losses in ([], ["aligned", "quality-focal", "eiou"]):
        results = []
        for more in (0, 7, 55):
            padded = [torch.cat([value, value.new_zeros(more, *value.shape[1:])])
                      for value in (faces, ignored, crowd, image)]
            has_faces = torch.tensor([True, True, True, False])
            batch = Batch(torch.zeros(4, 3, 300, 300), *padded, has_faces, kinds)
            own = outputs.clone().requires_grad_()
            criterion = Criterion(anchors, torch.zeros(2), (0.3, 0.4), *losses)
            parts, distilled = criterion((own[..., 4:], own[..., :4]), batch, teacher)
            (parts[0] + distilled).backward()
            results.append((parts, distilled, own.grad))
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_quality_focal_loss_equals_the_formula():
    """Also a face whose box is right: its score is to be 1. One whose box misses it: 0."""
    logits, offsets, labels, targets = case()
    right, off = (labels == 1).nonzero()[:2].tolist()
    targets[tuple(right)] = offsets[tuple(right)]
    targets[tuple(off)] = offsets[tuple(off)] + torch.tensor([80.0, 0, 0, 0])
    boxes, faces = (decode(values, ANCHORS).double().tolist() for values in (offsets, targets))
    expected, qualities = 0.0, []
    for n, a in (labels >= 0).nonzero().tolist():
        score = logits[n, a].double().softmax(0)[1].item()
        quality = iou(boxes[n][a], faces[n][a]) if labels[n, a] == 1 else 0.0
        qualities.append(quality)
        cost = -quality * math.log(score) - (1 - quality) * math.log(1 - score)
        expected += QUALITY_WEIGHT * cost * (score - quality) ** 2
    assert max(qualities) == pytest.approx(1) and 0.01 < sorted(qualities)[-10] < 0.99
    loss = quality_focal(logits, offsets, labels, targets, ANCHORS)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_quality_focal_loss_teaches_scores_alone_and_background_little_once_it_is_known():
    logits, offsets, labels, targets = case(positives=0)
    quality_focal(logits.requires_grad_(), offsets.requires_grad_(), labels, targets, ANCHORS).backward()
    assert offsets.grad is None and not logits.grad[labels == -1].any()
    assert (logits.grad[..., 1][labels == 0] > 0).all()                     # a face's score falls
    easy = torch.tensor([4.0, -4]).expand_as(logits)
    assert quality_focal(easy, offsets, labels, targets, ANCHORS) < 1e-5


def test_eiou_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 50, 2, 2, generator=generator, dtype=torch.float64) * 90
    boxes, faces, own = (corners.sort(2).values + torch.tensor([[0.0, 0], [1, 1]])).flatten(2)
    labels = torch.arange(50)[None] % 3 - 1
    expected = 0.0
    for a, b in zip(boxes[labels[0] == 1].tolist(), faces[labels[0] == 1].tolist()):
        width, height = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
        x, y = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        wider, higher = (a[2] - a[0]) - (b[2] - b[0]), (a[3] - a[1]) - (b[3] - b[1])
        expected += EIOU_WEIGHT * (
            1 - iou(a, b) + (x * x + y * y) / (width ** 2 + height ** 2) + (wider / width) ** 2
            + (higher / height) ** 2)
    loss = eiou(None, encode(boxes, own)[None], labels, encode(faces, own)[None], own)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert eiou(None, encode(boxes, own)[None], labels, encode(boxes, own)[None], own).abs() < 1e-9


def test_eiou_moves_a_box_that_does_not_overlap_its_face_towards_it():
    """There the IoU alone has no gradient."""
    offsets, targets = torch.zeros(1, 200, 4), torch.zeros(1, 200, 4)
    targets[..., 0] = 50                                                    # five anchor widths to the right
    labels = torch.zeros(1, 200, dtype=torch.long)
    labels[0, 7] = 1
    eiou(None, offsets.requires_grad_(), labels, targets, ANCHORS).backward()
    assert offsets.grad[0, 7, 0] < 0 and offsets.grad[0, 7, 1].abs() < 1e-6
    assert not offsets.grad[labels != 1].any()


@pytest.mark.parametrize("losses", [{}, NEWER])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_losses_are_finite_whatever_the_network_says(losses, scale):
    for positives in (0, 0.05):
        logits, offsets, labels, targets = case(positives=positives)
        total, parts = gradients(scale * logits, scale * offsets, labels, targets, **losses)
        assert total.isfinite() and all(part.isfinite().all() for part in parts)


def test_the_criterion_uses_what_it_is_told(monkeypatch):
    """The batch's labels are those of the anchors that answer best; both losses get through."""
    anchors, seen = make_anchors(Config()), []
    face = torch.tensor([[100.0, 100, 160, 160]])
    no = torch.tensor([False])
    batch = Batch(torch.zeros(1, 3, 300, 300), face, no, no, torch.tensor([0]), ~no, torch.tensor([0]))
    logits, offsets = torch.zeros(1, len(anchors), 2), torch.zeros(1, len(anchors), 4)
    monkeypatch.setattr("loss.multibox_loss", lambda *values: seen.append(values) or (torch.zeros(()),) * 3)
    for more in ([], ["aligned", "quality-focal", "eiou"]):
        Criterion(anchors, torch.zeros(2), (0, 0), *more)((logits, offsets), batch)
    (_, _, near, *_, first, second), (_, _, aligned, *_, third, fourth) = seen
    assert (first, second, third, fourth) == ("cross-entropy", "smooth-l1", "quality-focal", "eiou")
    assert (aligned == 1).sum() == 9 and (near == 1).sum() > 9
