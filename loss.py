"""The multibox loss: hard-mined classification, smooth L1 boxes, and a learned balance between them."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 10  # an image without faces still teaches


def batch_divisor(labels):
    """What this process divides its sums by, from labels `[B, A]`: max(positives, images) of the batch over all processes.

    Divided by the number of processes, since gradients are averaged over them afterwards: N processes with batch B / N
    then follow one process with batch B.
    """
    counts = torch.stack([(labels == 1).sum(), labels.new_tensor(len(labels))]).float()
    processes = 1
    if dist.is_initialized():
        dist.all_reduce(counts)
        processes = dist.get_world_size()
    return counts.max() / processes


def multibox_loss(logits, offsets, labels, targets, loss_weights, divisor):
    """The loss of a batch and its two parts, each a scalar: total, class, box.

    logits `[B, A, 2]`, offsets `[B, A, 4]`, labels `[B, A]` (1 face, 0 background, -1 neither), targets `[B, A, 4]`
    (finite everywhere), loss_weights `[2]`. Class: cross-entropy of all positives and, per image, the max(3 x positives,
    10) hardest negatives (SSD, Liu et al. 2016, section 2.2). Box: smooth L1 of the positives. Balance: exp(-w0) class
    + w0 / 2 + exp(-w1) box + w1 / 2 (Kendall et al. 2018). Computed in float32 whatever the inputs are.
    """
    logits, offsets = logits.float(), offsets.float()
    positive, negative = labels == 1, labels == 0
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), positive.flatten().long(), reduction="none").view_as(labels)
    # Cross-entropy is never below 0, so zeros in the place of non-negatives sort last and add nothing.
    hardest = (cross_entropy * negative).sort(dim=1, descending=True).values            # [B, A]
    wanted = (NEGATIVES_PER_POSITIVE * positive.sum(1, keepdim=True)).clamp(min=MIN_NEGATIVES)
    taken = torch.arange(labels.shape[1], device=labels.device) < wanted                # [B, A]
    class_loss = ((cross_entropy * positive).sum() + (hardest * taken).sum()) / divisor
    box_loss = (F.smooth_l1_loss(offsets, targets, reduction="none").sum(-1) * positive).sum() / divisor
    parts = torch.stack([class_loss, box_loss])
    total = (torch.exp(-loss_weights) * parts + 0.5 * loss_weights).sum()
    return total, class_loss, box_loss


def trust(start_logits):
    """How far the faces of the start are believed, `[B, A]`: not at all up to a score of 0.5, wholly from 0.9 on."""
    return ((start_logits.float().softmax(-1)[..., 1] - 0.5) / 0.4).clamp(0, 1)


def hold_loss(logits, offsets, start_logits, start_offsets, believed, labels, divisor):
    """How far (scores, boxes), each a scalar, have moved from those of the network that training started from.

    Shapes and divisor as in `multibox_loss`; believed `[B, A]`, from `trust`. Scores: their divergence where no face is
    labelled (Hinton et al. 2015, at temperature 1). Boxes: everywhere their L1 distance, as far as they are believed; L1,
    which is felt however small it is, for it is the last percents of a box that a strict IoU asks for.
    """
    start = start_logits.float().softmax(-1)                                            # [B, A, 2]
    divergence = F.kl_div(logits.float().log_softmax(-1), start, reduction="none").sum(-1)
    moved = (offsets.float() - start_offsets.float()).abs().sum(-1) * believed
    return (divergence * (labels != 1)).sum() / divisor, moved.sum() / divisor
