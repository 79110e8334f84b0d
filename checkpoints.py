"""A run's checkpoints: where its model starts from, what is saved, and on which terms it may be resumed."""
import io
import os
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from formats import InputError, bad_values, whole_file
from model import SSD, Config, checkpoint, config_of, load_imagenet, load_model, load_weights, read_checkpoint, rebuild


def check_out(args):
    """Settle --resume: a run is never overwritten, and one that torchrun has restarted goes on by itself."""
    last = Path(args.out) / "last.pth"
    if last.exists() and args.resume != "" and Path(args.resume or "") != last:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            raise InputError(f"{last} exists: continue that run with --resume, or name another folder with --out")
        args.resume = ""
    if args.resume == "":
        args.resume = str(last)
    if args.resume and not os.path.exists(args.resume):
        raise InputError(f"{args.resume}: no checkpoint to resume")


def claim(out):
    """The locked file `out`/.lock. No other run may write into the folder while it is open, or until this process ends.

    lockf, not flock: its locks are not inherited by loading processes, which outlive a killed run by seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{out}: another run is writing there; let it end, or name another folder with --out") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    return file


def report_changes(args, content):
    """Print which flags differ from those of the checkpoint that is resumed."""
    own = {key: value for key, value in vars(args).items() if key in content["flags"]}
    for key in sorted(own.keys() - {"resume", "out", "workers", "device", "size", "width", "anchors"}):
        if own[key] != content["flags"][key]:
            print(f"resumed with --{key.replace('_', '-')} {own[key]}, it was {content['flags'][key]}")


def asked(args, config):
    """`config` with what the flags ask for in its place; --anchors are given for 300 x 300 and scaled to the input."""
    width, height = args.size or (config.input_width, config.input_height)
    anchors = Config.new(width, height, anchors=args.anchors).anchors if args.anchors else config.anchors
    return Config(width, height, config.width if args.width is None else args.width, anchors)


def make_model(args):
    """The model to train, on the CPU, and the content of the checkpoint it resumes (None for a new run)."""
    if args.resume:
        content = read_checkpoint(args.resume)
        config = config_of(content, args.resume)
        if not {"optimizer", "epoch", "step", "done", "best", "sums", "flags"} <= content.keys():
            raise InputError(f"{args.resume}: holds weights only, nothing to resume; start from it with --load-from")
        wanted = asdict(asked(args, config))
        changed = [f"{key} is {value}, not {wanted[key]}" for key, value in asdict(config).items() if value != wanted[key]]
        if changed:
            raise InputError(f"{args.resume}: the architecture of a run cannot change: " + "; ".join(changed))
        return rebuild(content, content["state_dict"], args.resume), content
    if args.load_from:  # its anchors are kept at any input size, being pixels
        model = SSD(asked(args, config_of(read_checkpoint(args.load_from), args.load_from)))
        unfit = load_weights(model, args.load_from)
        if unfit:
            tqdm.write(f"{args.load_from}: {len(unfit)} tensors did not fit and start at random: {', '.join(unfit[:8])}")
        return model, None
    model = SSD(asked(args, Config.new(*(args.size or (300, 300)))))
    if args.pretrained is not None:
        load_imagenet(model, args.pretrained or None)
    return model, None


def save(path, model, **more):
    """Write a checkpoint, whole or not at all."""
    buffer = io.BytesIO()  # torch.save's own errors do not tell a full disk
    torch.save(checkpoint(model, **more), buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())  # a view of it, left in the error of a full disk, ends Python 3.12 by a crash


def load_start(args, config):
    """The network that --hold holds on to: the one of --load-from, whose anchors must be the trained model's."""
    with bad_values():
        start = load_model(args.load_from)
    if start.config.anchors != config.anchors:
        raise InputError(f"{args.load_from}: --hold needs the same anchors in the model that is trained")
    return start.requires_grad_(False)
