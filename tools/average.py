"""Average the weights of checkpoints.

Runs that fine-tuned the same weights agree in what they learned and differ in their noise, which the mean
loses (Model soups, Wortsman et al. 2022). A share of the start forgets less (WiSE-FT, by the same):

    python -m tools.average runs/a/last.pth runs/b/last.pth --out soup.pth
    python -m tools.average start.pth runs/a/last.pth --shares 1 4 --out milder.pth   # 4/5 of the way
    python -m tools.average runs/a/last.pth --out slim.pth   # weights and config only
"""

import math

from support.script import bad_values, command, Parser, require

from checkpoints import save
from model import load_model


def average(models, shares):
    """Give the first of `models` (SSD, of one configuration) the mean of all their tensors, by `shares`."""
    states = [model.state_dict() for model in models]
    for key, value in states[0].items():
        if value.is_floating_point():  # batch counts are whole numbers and stay the first one's
            value.copy_(sum(state[key] * (share / sum(shares)) for state, share in zip(states, shares)))
    return models[0]


@command
def main(argv=None):
    """Average checkpoints: read, average, write."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="PTH", help="of a run (its averaged weights count) or official")
    add("--shares", type=float, nargs="+", help="of each checkpoint in the mean (default: equal)")
    add("--out", required=True, help="the checkpoint to write")
    args = parser.parse_args(argv)
    shares = args.shares or [1.0] * len(args.checkpoints)
    if len(shares) != len(args.checkpoints) or not (0 <= min(shares) and 0 < sum(shares) < math.inf):
        parser.error("--shares takes one number of 0 or more for each checkpoint, not all 0")
    with bad_values():
        models = [load_model(path) for path in args.checkpoints]
    for path, model in zip(args.checkpoints, models):
        require(model.config == models[0].config,
                f"{path}: is of another architecture than {args.checkpoints[0]}, they have no mean")
    save(args.out, average(models, shares))
    parts = [f"{share / sum(shares):.3f} x {path}" for share, path in zip(shares, args.checkpoints)]
    print(f"{args.out}: {' + '.join(parts)}")


if __name__ == "__main__":
    main()
