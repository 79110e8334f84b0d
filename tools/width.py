"""A trained network at another width: cut to the channels that matter most, or widened.

train.py does this when `--load-from` and `--width` disagree. A cut network has to be trained before it is of
use, but learns in a fraction of the time that one from nothing takes.
"""

import copy
from itertools import pairwise

import torch
from torch import nn

from model import SSD, Config


@torch.no_grad()
def resize(source: SSD, config: Config) -> SSD:
    """An SSD of `config` that starts from what `source`, of another width, has learned.

    Both need the same number of anchors. A narrower one keeps of each layer the channels that matter most. A
    wider one computes the same as `source`: its added channels start at random, and nobody hears them before
    they have learned (Net2Net, Chen et al. 2016).
    """
    model, source = SSD(config), copy.deepcopy(source)
    for importance, made, heard in channel_groups(source):
        order = importance.argsort(descending=True)
        for layer in made:
            for tensor in layer.state_dict().values():
                if tensor.ndim:  # batch norm counts its batches in a single number
                    tensor.copy_(tensor[order])
        for layer in heard:
            layer.weight.copy_(layer.weight[:, order])
    for own, trained in zip(model.state_dict().values(), source.state_dict().values()):
        both = tuple(slice(min(sides)) for sides in zip(own.shape, trained.shape))
        if own.ndim > 1:
            own[both[0]] = 0
        own[both] = trained[both]
    return model


def channel_groups(model):
    """Yield each group of channels that can only change places together: (importance, made, heard).

    importance `[C]`: the mean square of what a channel adds to the next layers, as batch norms tell it
    without a photo. made: the layers with a row for each channel. heard: convolutions with a column for each.
    """
    stem, *blocks = model.backbone.features
    layers = [[layer for layer in block.conv if not isinstance(layer, nn.ReLU)] for block in blocks]
    for *expand, depthwise, bn, project, out in layers:  # the channels within a block
        yield relu_power(bn) * heard_by(project, out), [*(expand or stem[:2]), depthwise, bn], [project]
    starts = [n for n, block in enumerate(blocks) if not block.residual]
    for first, after in pairwise(starts):  # those between blocks, shared by all that add to them
        made = [layer for block in layers[first:after] for layer in block[-2:]]
        bns, readers = made[1::2], [block[:2] for block in layers[first + 1:after + 1]]
        power = sum(bn.weight ** 2 for bn in bns) + sum(bn.bias for bn in bns) ** 2
        yield (power * sum(heard_by(*reader) for reader in readers), made,
               [convolution for convolution, _ in readers])
    made, heard, importance = layers[-1][-2:], [], 0
    for depthwise, bn, _, output in (*model.bbox_head.cls_convs, *model.bbox_head.reg_convs):
        columns = output.weight.square().sum((0, 2, 3))
        importance = importance + relu_power(bn) * columns / columns.sum()
        made, heard = [*made, depthwise, bn], [*heard, output]
    yield importance, made, heard


def relu_power(bn):
    """The mean square `[C]` of ReLU's output behind a batch norm, whose own output is taken as normal."""
    deviation, normal = bn.weight.abs().clamp(min=1e-6), torch.distributions.Normal(0.0, 1.0)
    ratio = bn.bias / deviation
    return (bn.bias ** 2 + deviation ** 2) * normal.cdf(ratio) \
        + bn.bias * deviation * normal.log_prob(ratio).exp()


def heard_by(convolution, bn):
    """How much a 1x1 convolution and its batch norm make of each input channel: mean squares `[C]`."""
    scale = bn.weight ** 2 / (bn.running_var + bn.eps)
    return (convolution.weight.square().sum((2, 3)) * scale[:, None]).sum(0)
