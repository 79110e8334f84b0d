"""The loss: multibox with hard negatives and a learned balance, newer parts for it, and distillation."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from anchors import decode, match, pair_iou, task_aligned
from support.coco import COMPLETE, UNLABELLED

NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 10  # an image without faces still teaches
FACES = 10  # positive anchors that an image has at least, for the teacher's part: those of one face
QUALITY_WEIGHT, EIOU_WEIGHT = 4, 2  # as in docs/trials.md, where no other values were tried


def batch_divisor(positive):
    """What this process divides its sums by: max(positives `[B, A]` bool, images) of the whole batch.

    The whole batch is that of all processes. Divided by their number, since gradients are averaged over them
    afterwards: N processes with batch B / N then follow one process with batch B."""
    count = positive.sum().float()
    if not dist.is_initialized():
        return count.clamp(min=len(positive))
    counts = torch.stack([count, torch.full_like(count, len(positive))])
    dist.all_reduce(counts)
    return counts.max() / dist.get_world_size()


def multibox_loss(logits, offsets, labels, targets, anchors, loss_weights, divisor,
                  class_loss="cross-entropy", box_loss="smooth-l1"):
    """The loss of a batch and its two parts, each a scalar: total, class, box.

    logits `[B, A, 2]`, offsets `[B, A, 4]`, labels `[B, A]` (1 face, 0 background, -1 neither), targets
    `[B, A, 4]` (finite everywhere), anchors `[A, 4]`, loss_weights `[2]`. The parts are those of CLASS_LOSSES
    and BOX_LOSSES with these names. Balance: exp(-w0) class + w0 / 2 + exp(-w1) box + w1 / 2 (Kendall et al.
    2018). Computed in float32 whatever the inputs are."""
    inputs = logits.float(), offsets.float(), labels, targets, anchors
    parts = torch.stack([CLASS_LOSSES[class_loss](*inputs), BOX_LOSSES[box_loss](*inputs)]) / divisor
    total = (torch.exp(-loss_weights) * parts + 0.5 * loss_weights).sum()
    return total, *parts


def hard_cross_entropy(logits, offsets, labels, targets, anchors):
    """Cross-entropy of positives and, per image, max(3 x positives, 10) hardest negatives (SSD, Liu 2016)."""
    positive, negative = labels == 1, labels == 0
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), positive.flatten().long(), reduction="none")
    cross_entropy = cross_entropy.view_as(labels)
    # Cross-entropy is never below 0, so zeros in the place of non-negatives sort last and add nothing.
    hardest = (cross_entropy * negative).sort(dim=1, descending=True).values            # [B, A]
    wanted = (NEGATIVES_PER_POSITIVE * positive.sum(1, keepdim=True)).clamp(min=MIN_NEGATIVES)
    taken = torch.arange(labels.shape[1], device=labels.device) < wanted                # [B, A]
    return (cross_entropy * positive).sum() + (hardest * taken).sum()


def quality_focal(logits, offsets, labels, targets, anchors):
    """Quality focal loss (Li et al. 2020), the sum over faces and background.

    A face's score shall be the IoU of the box that is predicted with it, background's 0: cross-entropy to
    that, times the squared distance from it. No negatives are chosen; easy ones weigh nothing."""
    with torch.no_grad():
        quality = pair_iou(decode(offsets, anchors), decode(targets, anchors)) * (labels == 1)      # [B, A]
    background, face = logits.log_softmax(-1).unbind(-1)
    cost = -(quality * face + (1 - quality) * background) * (face.exp() - quality).detach() ** 2
    return QUALITY_WEIGHT * (cost * (labels >= 0)).sum()


def smooth_l1(logits, offsets, labels, targets, anchors):
    """Smooth L1 of the positives' offsets, summed."""
    return (F.smooth_l1_loss(offsets, targets, reduction="none").sum(-1) * (labels == 1)).sum()


def eiou(logits, offsets, labels, targets, anchors):
    """EIoU loss (Zhang et al. 2022) of the positives' boxes, summed: 1 - IoU, and three distances squared.

    Those of the centres, by the diagonal of the box around both, and of the sides, by its sides."""
    # Over all anchors: to pick the positives a GPU would have to wait for their number.
    boxes, faces = decode(offsets, anchors), decode(targets, anchors)                   # [B, A, 4]
    around = torch.maximum(boxes[..., 2:], faces[..., 2:]) - torch.minimum(boxes[..., :2], faces[..., :2])
    around = (around ** 2).clamp(min=1e-6)                                              # [B, A, 2]
    centres = (boxes[..., :2] + boxes[..., 2:] - faces[..., :2] - faces[..., 2:]) / 2
    sides = boxes[..., 2:] - boxes[..., :2] - faces[..., 2:] + faces[..., :2]
    apart = (centres ** 2).sum(-1) / around.sum(-1) + (sides ** 2 / around).sum(-1)
    return EIOU_WEIGHT * ((1 - pair_iou(boxes, faces) + apart) * (labels == 1)).sum()


CLASS_LOSSES = {"cross-entropy": hard_cross_entropy, "quality-focal": quality_focal}
BOX_LOSSES = {"smooth-l1": smooth_l1, "eiou": eiou}


def confidence(teacher_logits: torch.Tensor) -> torch.Tensor:
    """How far a teacher's faces replace the labels, `[B, A]`: 0 up to a score of 0.5, 1 from 0.9 on."""
    return ((teacher_logits.float().softmax(-1)[..., 1] - 0.5) / 0.4).clamp(0, 1)


def distillation_loss(logits, offsets, teacher_logits, teacher_offsets, taught, weight, divisor):
    """How far the student is from the teacher, each a scalar: (scores, boxes).

    Shapes and divisor are as in `multibox_loss`; taught `[B, A]` bool and weight `[B, A]` are from
    `soft_targets`. Scores: the divergence from the teacher's (Hinton et al. 2015, at temperature 1). Boxes:
    the L1 distance, weighted by its confidence. L1 is felt however small, as a strict IoU needs it."""
    teacher = teacher_logits.float().softmax(-1)                                        # [B, A, 2]
    divergence = F.kl_div(logits.float().log_softmax(-1), teacher, reduction="none").sum(-1)
    distance = (offsets.float() - teacher_offsets.float()).abs().sum(-1) * weight
    return (divergence * taught).sum() / divisor, distance.sum() / divisor


class Criterion:
    """The loss of a batch: matching, multibox loss and, with a teacher, distillation.

    anchors `[A, 4]`; loss_weights `[2]`, the model's; distill: the weights of the distillation's two parts;
    matching: "iou" or "aligned" (`task_aligned`); class_loss, box_loss: names in CLASS_LOSSES, BOX_LOSSES."""

    def __init__(self, anchors, loss_weights, distill=(0, 0), matching="iou", class_loss="cross-entropy",
                 box_loss="smooth-l1"):
        self.anchors, self.loss_weights, self.distill = anchors, loss_weights, distill
        self.matching, self.class_loss, self.box_loss = matching, class_loss, box_loss

    def __call__(self, outputs, batch, teacher=None):
        """The losses `[3]` (total, class, box) and what distillation adds to the first of them.

        outputs: logits `[B, A, 2]` and offsets `[B, A, 4]`; teacher: the same of the teacher, or None."""
        chosen = None
        if self.matching == "aligned":
            chosen = task_aligned(*outputs, self.anchors, batch.faces, batch.image)
        labels, targets = match(self.anchors, batch.faces, batch.ignored, batch.image, len(batch.images),
                                batch.crowd, chosen)                                # [B, A], [B, A, 4]
        labels = labels.masked_fill((batch.labels == UNLABELLED)[:, None], -1)
        divisor = batch_divisor(labels == 1)
        distilled = 0
        if teacher:
            labels, targets, taught, weight = soft_targets(labels, targets, *teacher, batch.has_faces,
                                                           batch.labels == COMPLETE)
            # Few labels must not make the teacher's part so much stronger that training diverges.
            seen = batch_divisor((labels == 1) | (confidence(teacher[0]) > 0)).clamp(min=FACES * len(labels))
            scores, boxes = distillation_loss(*outputs, *teacher, taught, weight, seen)
            distilled = self.distill[0] * scores + self.distill[1] * boxes
        losses = multibox_loss(*outputs, labels, targets, self.anchors, self.loss_weights, divisor,
                               self.class_loss, self.box_loss)
        return torch.stack(losses), distilled


def soft_targets(labels, targets, teacher_logits, teacher_offsets, has_faces, complete):
    """Let a teacher correct the labels `[B, A]` and the box targets `[B, A, 4]`.

    has_faces `[B]` bool: which photos have faces, ignored ones included; complete `[B]` bool: on which the
    labels are trusted. Returns (labels, targets, taught `[B, A]` bool: where the teacher's scores are
    learned, weight `[B, A]` of its boxes).

    Datasets differ in where a face ends: the more confident the teacher, the nearer is the target to its box.
    A face that only it sees is not taught as background, except on photos without any face, at which somebody
    looked. Where labels are complete its boxes do not count, and a face that only it sees is background."""
    weight = confidence(teacher_logits)                                                 # [B, A]
    seen_alone = (labels == 0) & (weight > 0)
    hidden = seen_alone & (has_faces & ~complete)[:, None]
    taught = (labels != 1) & ~(seen_alone & complete[:, None])
    weight = weight.masked_fill(complete[:, None], 0)
    targets = torch.lerp(targets, teacher_offsets.float(), weight[..., None])
    return labels.masked_fill(hidden, -1), targets, taught, weight
