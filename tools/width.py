"""Make a trained network of another width: cut to the channels that matter most, or widened.

    python -m tools.width weights/face_ssd300.pth 0.5 runs/half.pth
    python train.py --load-from runs/half.pth --distill 0.5 0.5 --teacher weights/face_ssd300.pth

A cut network has to be trained before it is of use. A widened one computes the same as before.
"""

import copy
from itertools import pairwise

from support.script import bad_values, command, Parser, require

import torch
from torch import nn

from checkpoints import save
from model import SSD, Config, load_model


@torch.no_grad()
def resize(source: SSD, config: Config) -> SSD:
    """An SSD of `config` that starts from what `source`, of another width, has learned.

    A narrower one keeps the channels that matter most. Those that a wider one adds start at random, and no
    layer reads them before it has learned to (Net2Net, Chen et al. 2016)."""
    model = SSD(config)
    source = copy.deepcopy(source)
    for importance, producers, consumers in channel_groups(source):
        order = importance.argsort(descending=True)
        for layer in producers:
            for tensor in layer.state_dict().values():
                if tensor.ndim:  # batch norm counts its batches in a single number
                    tensor.copy_(tensor[order])
        for layer in consumers:
            layer.weight.copy_(layer.weight[:, order])
    for own, trained in zip(model.state_dict().values(), source.state_dict().values()):
        both = tuple(slice(min(sides)) for sides in zip(own.shape, trained.shape))
        if own.ndim > 1:
            own[both[0]] = 0
        elif own.ndim:  # batch norms: a new one's scale of 1 would drown trained ones of a tenth
            own.fill_(trained.mean())
        own[both] = trained[both]
    return model


def channel_groups(model):
    """All groups of channels that can only change places as one: (importance, producers, consumers) each.

    importance `[C]`: the mean square of what a channel adds to the next layers, by the batch norms.
    producers: the layers with a row for each channel. consumers: the convolutions with a column for each."""
    stem, *blocks = model.backbone.features  # each has expand, norm, depthwise, norm, project, norm
    layers = [[layer for layer in block.conv if not isinstance(layer, nn.ReLU)] for block in blocks]
    groups = []
    for *expand, depthwise, norm, project, out in layers:  # the stem makes the first block's channels
        importance = relu_power(norm) * column_power(project, out)
        groups.append((importance, [*(expand or stem[:2]), depthwise, norm], [project]))
    # Blocks that add to their input share their output's channels with those before them.
    starts = [number for number, block in enumerate(blocks) if not block.residual]
    for first, after in pairwise(starts):
        groups.append(shared_group(layers[first:after], layers[first + 1:after + 1]))
    return [*groups, feature_group(layers[-1], [*model.bbox_head.cls_convs, *model.bbox_head.reg_convs])]


def shared_group(writers, readers):
    """The group of the channels that the blocks `writers` add to, and the blocks `readers` expand."""
    producers = [layer for block in writers for layer in block[-2:]]
    norms = producers[1::2]
    power = sum(norm.weight ** 2 for norm in norms) + sum(norm.bias for norm in norms) ** 2
    wanted = sum(column_power(expand, norm) for expand, norm, *_ in readers)
    return power * wanted, producers, [block[0] for block in readers]


def feature_group(last, branches):
    """The group of the feature map's channels, which both branches of the head take through a depthwise."""
    importance, producers, consumers = 0, last[-2:], []
    for depthwise, norm, _, output in branches:
        columns = output.weight.square().sum((0, 2, 3))
        importance += relu_power(norm) * columns / columns.sum()
        producers += [depthwise, norm]
        consumers.append(output)
    return importance, producers, consumers


def relu_power(bn):
    """The mean square `[C]` of ReLU's output behind a batch norm, whose own output is taken as normal."""
    mean, deviation, normal = bn.bias, bn.weight.abs().clamp(min=1e-6), torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(mean / deviation).exp()
    return (mean ** 2 + deviation ** 2) * normal.cdf(mean / deviation) + mean * deviation * density


def column_power(convolution, bn):
    """How much a 1x1 convolution and its batch norm make of each input channel: mean squares `[C]`."""
    return (bn.weight ** 2 / (bn.running_var + bn.eps)) @ convolution.weight.square().sum((2, 3))


@command
def main(argv=None):
    """Read, resize, write."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a trained network")
    parser.add_argument("width", type=float, help="its new channel multiplier, such as 0.5")
    parser.add_argument("out", help="the checkpoint to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # for the channels that a wider one adds
    with bad_values():
        source = load_model(args.checkpoint)
        config = Config(*source.config.input_size, args.width, source.config.anchors)
    require(config.width != source.config.width, f"{args.checkpoint}: is of width {config.width:g} already")
    save(args.out, resize(source, config))
    print(f"{args.out}: {args.checkpoint}, from width {source.config.width:g} to {config.width:g}")


if __name__ == "__main__":
    main()
