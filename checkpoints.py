"""A run's checkpoints: where its model starts, what is saved, on which terms it resumes; and their mean.

As a command it averages the weights of checkpoints. Runs that fine-tuned the same weights agree in what they
learned and differ in their noise: the mean keeps the one and loses the other (Model soups, Wortsman et al.
2022). A share of the start forgets less (WiSE-FT, Wortsman et al. 2022):

    python checkpoints.py runs/a/last.pth runs/b/last.pth --out soup.pth
    python checkpoints.py start.pth runs/a/last.pth --shares 1 4 --out milder.pth  # 4 / 5 of the way from the start
    python checkpoints.py runs/a/last.pth --out slim.pth                           # weights and configuration only
"""

import io
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from model import (
    SSD,
    Config,
    checkpoint,
    config_of,
    load_imagenet,
    load_model,
    load_weights,
    read_checkpoint,
    rebuild,
)
from script import InputError, bad_values, command, new_parser, whole_file


def check_out(args):
    """Settle --resume: a run is never overwritten, and one that torchrun has restarted goes on by itself."""
    last = Path(args.out) / "last.pth"
    if last.exists() and args.resume != "" and Path(args.resume or "") != last:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            raise InputError(
                f"{last} exists: continue that run with --resume, or name another folder with --out"
            )
        args.resume = ""
    if args.resume == "":
        args.resume = str(last)
    if args.resume and not os.path.exists(args.resume):
        raise InputError(f"{args.resume}: no checkpoint to resume")


def claim(out):
    """Lock the folder of a run: no other run may write there while the returned file is open.

    The lock ends with this process. lockf, not flock: its locks are not inherited by loading processes,
    which outlive a killed run by seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{out}: another run is writing there; let it end, "
                         "or name another folder with --out") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    return file


def report_changes(args, content):
    """Print which flags differ from those of the checkpoint that is resumed."""
    before = content["flags"]
    shapes = {
        "resume",
        "out",
        "workers",
        "device",
        "size",
        "width",
        "anchors",
    }  # the architecture is checked apart
    for key in sorted((vars(args).keys() & before.keys()) - shapes):
        now = getattr(args, key)
        if now != before[key]:
            print(f"resumed with --{key.replace('_', '-')} {now}, it was {before[key]}")


def wanted_config(args, config):
    """`config` with what the flags ask for in its place. --anchors are given for 300 x 300 and scaled."""
    width, height = args.size or config.input_size
    anchors = config.anchors
    if args.anchors:
        anchors = Config.scaled_from_300(width, height, anchors=args.anchors).anchors
    return Config(width, height, config.width if args.width is None else args.width, anchors)


def make_model(args):
    """The model to train, on the CPU, and the content of the checkpoint it resumes (None for a new run)."""
    if args.resume:
        return resume_model(args)
    if args.load_from:  # its anchors are kept at any input size, being pixels
        model = SSD(wanted_config(args, config_of(read_checkpoint(args.load_from), args.load_from)))
        unfit = load_weights(model, args.load_from)
        if unfit:
            tqdm.write(f"{args.load_from}: {len(unfit)} tensors did not fit and start at random: "
                       + ", ".join(unfit[:8]))
        return model, None
    model = SSD(wanted_config(args, Config.scaled_from_300(*(args.size or (300, 300)))))
    if args.pretrained is not None:
        load_imagenet(model, args.pretrained or None)
    return model, None


def resume_model(args):
    """The model of the checkpoint that --resume names, and the checkpoint's content."""
    content = read_checkpoint(args.resume)
    config = config_of(content, args.resume)
    if not {"optimizer", "epoch", "step", "done", "best", "sums", "flags"} <= content.keys():
        raise InputError(
            f"{args.resume}: holds weights only, nothing to resume; start from it with --load-from"
        )
    wanted = asdict(wanted_config(args, config))
    changed = [f"{key} is {value}, not {wanted[key]}" for key, value in asdict(config).items()
               if value != wanted[key]]
    if changed:
        raise InputError(f"{args.resume}: the architecture of a run cannot change: " + "; ".join(changed))
    flags = content["flags"]
    if "hold" in flags:  # the flag's name in older checkpoints
        flags["distill"] = flags.pop("hold")
    return rebuild(content, content["state_dict"], args.resume), content


def load_teacher(args, config):
    """The network that --distill learns from: that of --load-from, with the anchors of the model in training."""
    with bad_values():
        teacher = load_model(args.load_from)
    if teacher.config.anchors != config.anchors:
        raise InputError(f"{args.load_from}: --distill needs the same anchors in the model that is trained")
    return teacher.requires_grad_(False)


def save(path, model, **more):
    """Write a checkpoint, whole or not at all."""
    buffer = io.BytesIO()  # torch.save's own errors do not tell a full disk
    torch.save(checkpoint(model, **more), buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(
            buffer.getvalue()
        )  # a view of it, left in the error of a full disk, crashes Python 3.12


def average(models, shares):
    """Give the first of `models` (SSD, of one configuration) the mean of all their tensors, by `shares`."""
    states = [model.state_dict() for model in models]
    total = sum(shares)
    mean = dict(states[0])  # batch counts are whole numbers and stay the first one's
    for key, value in states[0].items():
        if value.is_floating_point():
            mean[key] = sum(state[key] * (share / total) for state, share in zip(states, shares))
    models[0].load_state_dict(mean)
    return models[0]


@command
def main(argv=None):
    """Average checkpoints: read, average, write."""
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="of a run (its averaged weights count) or official")
    parser.add_argument(
        "--shares", type=float, nargs="+", help="of each checkpoint in the mean (default: equal)"
    )
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    args = parser.parse_args(argv)
    shares = args.shares or [1.0] * len(args.checkpoints)
    if len(shares) != len(args.checkpoints) or not (0 <= min(shares) and 0 < sum(shares) < math.inf):
        parser.error("--shares takes one number of 0 or more for each checkpoint, not all 0")
    with bad_values():
        models = [load_model(path) for path in args.checkpoints]
    for path, model in zip(args.checkpoints, models):
        if model.config != models[0].config:
            raise InputError(
                f"{path}: is of another architecture than {args.checkpoints[0]}, they have no mean"
            )
    save(args.out, average(models, shares))
    parts = [f"{share / sum(shares):.3f} x {path}" for share, path in zip(shares, args.checkpoints)]
    print(f"{args.out}: " + " + ".join(parts))


if __name__ == "__main__":
    main()
