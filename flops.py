"""Count the network's multiply-accumulates (MACs) and parameters, layer by layer.

    python flops.py
    python flops.py --width 1.0 --size 320x240
    python flops.py --model weights/face_ssd300.pth
"""

from support.script import bad_values, command, Parser, parse_size

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from model import SSD, Config, load_model


def count(model, width, height):
    """Count each layer of `model` for one picture of `width` x `height`: a list of dicts, one per layer.

    The keys are layer, type, output (shape without the batch), parameters, convolution (MACs of convolutions
    alone) and all. The last adds one operation per bias and per ReLU element and two per BatchNorm element;
    the published 0.51 GMACs are counted in this way."""
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    rows = []

    def note(module, _, output):
        if module not in names:
            return
        elements = output.numel()
        macs = 0
        extra = {nn.BatchNorm2d: 2, nn.ReLU: 1}.get(type(module), 0)
        if isinstance(module, nn.Conv2d):
            macs = elements * module.weight[0].numel()  # each output element is a sum over one filter
            extra = int(module.bias is not None)
        rows.append({"layer": names[module], "type": type(module).__name__, "output": tuple(output.shape[1:]),
                     "parameters": sum(p.numel() for p in module.parameters()), "convolution": macs,
                     "all": macs + extra * elements})

    with register_module_forward_hook(note), torch.no_grad():
        model.to("meta").eval()(torch.empty(1, 3, height, width, device="meta"))  # computes shapes only
    return rows


@command
def main(argv=None):
    """Print the table of layers and the totals."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="a checkpoint, instead of --width")
    add("--width", type=float, default=0.75, help="channel multiplier (default %(default)s)")
    add("--size", type=parse_size, help="network input, S or WxH (default 300, or the checkpoint's)")
    args = parser.parse_args(argv)
    with bad_values():
        model = load_model(args.model) if args.model else SSD(Config(width=args.width))
    width, height = args.size or model.config.input_size
    parameters = sum(p.numel() for p in model.parameters())
    rows = count(model, width, height)
    total = {key: sum(row[key] for row in rows) for key in ("convolution", "all")}

    print(f"{'layer':<32}{'type':<13}{'output':>15}{'parameters':>12}{'MACs':>14}{'share':>8}")
    for row in rows:
        shape = "x".join(map(str, row["output"]))
        print(f"{row['layer']:<32}{row['type']:<13}{shape:>15}{row['parameters']:>12,}{row['all']:>14,}"
              f"{row['all'] / total['all']:>8.2%}")
    print(f"\nwidth {model.config.width:g}, input {width} x {height}")
    print(f"parameters                {parameters:>13,}  ({parameters / 1e6:.2f} M, with two loss weights)")
    print(f"MACs, convolutions only   {total['convolution']:>13,}")
    print(f"MACs, all layers          {total['all']:>13,}  "
          f"({total['all'] / 1e9:.2f} G: with biases, BatchNorm x 2, ReLU)")


if __name__ == "__main__":
    main()
