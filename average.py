"""Average the weights of checkpoints: a soup of runs that left from one start, or the way back to it.

    python average.py runs/a/last.pth runs/b/last.pth --out soup.pth
    python average.py start.pth runs/a/last.pth --shares 1 4 --out milder.pth      # 4 / 5 of the way from the start
    python average.py runs/a/last.pth --out slim.pth                               # weights and configuration only

Runs that fine-tuned the same weights agree in what they learned and differ in their noise: the mean keeps the one and
loses the other (Wortsman et al. 2022, Model soups), and a share of the start forgets less (Wortsman et al. 2022, WiSE-FT).
"""
import argparse
import math

from checkpoints import save
from formats import InputError, bad_values, command
from model import load_model


def average(models, shares):
    """The first of `models` (SSD, of one configuration) with the mean of all their tensors in proportion to `shares`."""
    states = [model.state_dict() for model in models]
    total = sum(shares)
    mean = {key: sum(state[key] * (share / total) for state, share in zip(states, shares)) if value.is_floating_point() else value
            for key, value in states[0].items()}
    models[0].load_state_dict(mean)
    return models[0]


@command
def main(argv=None):
    """Read, average, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of a run (its averaged weights count) or official")
    parser.add_argument("--shares", type=float, nargs="+", help="of each checkpoint in the mean (default: equal)")
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    args = parser.parse_args(argv)
    shares = args.shares or [1.0] * len(args.checkpoints)
    if len(shares) != len(args.checkpoints) or not (0 <= min(shares) and 0 < sum(shares) < math.inf):
        parser.error("--shares takes one number of 0 or more for each checkpoint, not all 0")
    with bad_values():
        models = [load_model(path) for path in args.checkpoints]
    for path, model in zip(args.checkpoints, models):
        if model.config != models[0].config:
            raise InputError(f"{path}: is of another architecture than {args.checkpoints[0]}, they have no mean")
    save(args.out, average(models, shares))
    print(f"{args.out}: " + " + ".join(f"{share / sum(shares):.3f} x {path}" for share, path in zip(shares, args.checkpoints)))


if __name__ == "__main__":
    main()
