"""Teachers: networks whose scores and boxes another one learns, at a larger input where they see more."""

from argparse import ArgumentTypeError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms

from anchors import assign, decode, encode, make_anchors
from detector import NMS_IOU, SCORE
from model import folded, load_model
from support.script import InputError, bad_values, parse_size

LEAST = 1e-6  # of a score, so that its logarithm is finite


class Teacher(nn.Module):
    """The mean of several networks, as soft targets for a student of the configuration `config`.

    networks: pairs of an SSD and a size (width, height). At the student's own input size a network answers
    anchor by anchor. At a larger one it gets the same pictures enlarged. Its anchors are then others, so what
    it detects is matched with the student's anchors, as labelled faces are."""

    def __init__(self, networks: list, config):
        super().__init__()
        self.networks = nn.ModuleList(network for network, _ in networks)
        self.sizes, self.own = [size for _, size in networks], config.input_size
        self.register_buffer("anchors", make_anchors(config), persistent=False)
        for number, (network, size) in enumerate(networks):
            self.register_buffer(f"anchors{number}", make_anchors(network.config, size), persistent=False)
        self.same_size = all(size == self.own for size in self.sizes)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[B, 3, H, W]`, the student's input, to logits `[B, A, 2]` and offsets `[B, A, 4]`.

        The score is the mean of the networks'. The box is the mean of theirs by score."""
        answers = [network(images) if size == self.own else self.enlarged(number, images)
                   for number, (network, size) in enumerate(zip(self.networks, self.sizes))]
        if len(answers) == 1:
            return answers[0]
        scores = torch.stack([logits.float().softmax(-1)[..., 1] for logits, _ in answers])  # [N, B, A]
        offsets = torch.stack([offsets.float() for _, offsets in answers])  # [N, B, A, 4]
        shares = (scores.clamp(min=LEAST) / scores.clamp(min=LEAST).sum(0))[..., None]
        return to_logits(scores.mean(0)), (offsets * shares).sum(0)

    def enlarged(self, number, images):
        """What network `number` answers for the pictures enlarged to its size, at the student's anchors."""
        size = self.sizes[number]
        larger = F.interpolate(images, size=size[::-1], mode="bilinear", align_corners=False)
        logits, offsets = self.networks[number](larger)
        boxes = decode(offsets.float(), getattr(self, f"anchors{number}"))          # [B, A', 4]
        scores = logits.float().softmax(-1)[..., 1]                                 # [B, A']
        image, place = (scores > SCORE).nonzero(as_tuple=True)
        scores, boxes = scores[image, place], boxes[image, place]
        kept = batched_nms(boxes, scores, image, NMS_IOU)
        scores, image = scores[kept], image[kept]                                   # [T]
        width, height = (own / side for own, side in zip(self.own, size))
        boxes = boxes[kept] * boxes.new_tensor([width, height, width, height])
        ignored = torch.zeros_like(image, dtype=torch.bool)
        labels, face = assign(self.anchors, boxes, ignored, image, len(images))
        scores = torch.cat([scores, scores.new_zeros(1)])[face]                     # [B, A]
        boxes = torch.cat([boxes, boxes.new_ones(1, 4)])[face]
        return to_logits(scores), encode(boxes, self.anchors).masked_fill(labels[..., None] != 1, 0)


def to_logits(scores):
    """Two logits `[..., 2]` whose softmax has the face score `[...]`."""
    scores = scores.clamp(LEAST, 1 - LEAST)
    return torch.stack([(1 - scores).log(), scores.log()], -1)


def load_teacher(words: list[str], config) -> Teacher:
    """The Teacher of CHECKPOINT or CHECKPOINT@SIZE, one or several, for a student of `config`.

    Raises InputError if one cannot be read, has other anchors, or a size smaller than the student's."""
    networks = []
    for word in words:
        path, at, size = word.rpartition("@")
        try:
            size = parse_size(size) if at else None
        except ArgumentTypeError:  # an @ in the name of a file
            size = None
        path, size = (path, size) if size else (word, config.input_size)
        with bad_values():
            network = folded(load_model(path))
        if network.config.anchors != config.anchors:
            raise InputError(f"{path}: --distill needs the same anchors in the model that is trained")
        if any(side < own for side, own in zip(size, config.input_size)):
            raise InputError("{}: the input of a teacher must be at least that of the model that is trained, "
                             "{}x{}".format(word, *config.input_size))
        networks.append((network, size))
    return Teacher(networks, config)
