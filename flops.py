"""Count the network's multiply-accumulates (MACs) and parameters.

    python flops.py
    python flops.py --width 1.0 --size 320x240
    python flops.py --model weights/face_ssd300.pth
"""

from support.script import bad_values, command, new_parser, parse_size

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from model import SSD, Config, load_model


def count(model, width, height):
    """Count the MACs for one picture of `width` x `height`: (those of convolutions alone, of all layers).

    The second adds one operation per bias and per ReLU element and two per BatchNorm element, as the
    published 0.51 GMACs do.
    """
    extras = {nn.BatchNorm2d: 2, nn.ReLU: 1}  # operations per element of the output
    convolutions, more = [], []

    def note(module, _, output):
        if isinstance(module, nn.Conv2d):
            convolutions.append(output.numel() * module.weight[0].numel())  # an element sums over one filter
            more.append(output.numel() * (module.bias is not None))
        more.append(output.numel() * extras[type(module)] if type(module) in extras else 0)

    with register_module_forward_hook(note), torch.no_grad():
        model.to("meta").eval()(torch.empty(1, 3, height, width, device="meta"))  # computes shapes only
    return sum(convolutions), sum(convolutions + more)


@command
def main(argv=None):
    """Print the totals."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", help="a checkpoint, instead of --width")
    add("--width", type=float, default=0.75, help="channel multiplier (default %(default)s)")
    add("--size", type=parse_size, help="network input, S or WxH (default 300, or the checkpoint's)")
    args = parser.parse_args(argv)
    with bad_values():
        model = load_model(args.model) if args.model else SSD(Config(width=args.width))
    width, height = args.size or model.config.input_size
    parameters = sum(p.numel() for p in model.parameters())
    convolutions, everything = count(model, width, height)
    print(f"width {model.config.width:g}, input {width} x {height}")
    print(f"parameters                {parameters:>13,}  ({parameters / 1e6:.2f} M, with two loss weights)")
    print(f"MACs, convolutions only   {convolutions:>13,}")
    print(f"MACs, all layers          {everything:>13,}  "
          f"({everything / 1e9:.2f} G: with biases, BatchNorm x 2, ReLU)")


if __name__ == "__main__":
    main()
