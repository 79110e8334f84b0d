"""A run's checkpoints: where its model starts, what is saved, on which terms it resumes."""

import io
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from support.distributed import launch_id, print_once
from support.script import InputError, bad_values, whole_file
from model import (SSD, Config, checkpoint, config_of, load_imagenet, load_weights,
                   read_checkpoint, rebuild)


# What a run's checkpoint holds beside the model, and of which type.
KINDS = {"optimizer": dict, "epoch": int, "step": int, "done": int, "best": float, "waited": int,
         "sums": torch.Tensor, "record": dict | None, "flags": dict}


def find_checkpoint(args):
    """Settle --resume: the content of the checkpoint to continue, or None for a new run.

    A run is never overwritten. One that this launch of torchrun began, or resumed, goes on by itself when
    torchrun restarts it."""
    last = Path(args.out) / "last.pth"
    path = str(last) if args.resume == "" else args.resume
    if last.exists() and (path is None or os.path.realpath(path) != os.path.realpath(last)):
        with bad_values():
            own = launch_id() is not None and read_checkpoint(last).get("launch") == launch_id()
        if not own:
            raise InputError(f"{last} exists: continue that run with --resume, "
                             "or name another folder with --out")
        path = str(last)
    if path is None:
        return None
    if not os.path.exists(path):
        raise InputError(f"{path}: no checkpoint to resume")
    with bad_values():
        content = read_checkpoint(path)
    check_run(content, path)
    return content | {"path": path}


def resume_command(args, argv=None):
    """The shell command that goes on with a run: the words that started it, torchrun's too, and --resume."""
    words = list(sys.orig_argv) if argv is None else [sys.orig_argv[0], "train.py", *argv]
    if launch_id() is not None:
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
        except OSError:  # no Linux
            words = ["torchrun", "...", *sys.argv]
    if args.resume != "":  # a --resume CHECKPOINT before it then counts no more
        words.append("--resume")
    return shlex.join(words)


def check_run(content, path):
    """Refuse a checkpoint that is none of a run."""
    if not KINDS.keys() <= content.keys():
        raise InputError(f"{path}: holds weights only, nothing to resume; start from it with --load-from")
    wrong = [key for key, kind in KINDS.items() if not isinstance(content[key], kind)]
    if wrong:
        raise InputError(f"{path}: cannot be resumed, its {', '.join(wrong)} make no sense")


def wanted_config(args, config):
    """`config` with what the flags ask for in its place. --anchors are given for 300 x 300 and scaled."""
    width, height = args.size or config.input_size
    anchors = config.anchors
    if args.anchors:
        anchors = Config.scaled_from_300(width, height, anchors=args.anchors).anchors
    return Config(width, height, config.width if args.width is None else args.width, anchors)


def make_model(args, content):
    """The model to train, on the CPU: that of the checkpoint `content` to resume, or of a new run."""
    if content:
        return resume_model(args, content)
    if args.load_from:
        if args.pretrained is not None:
            print_once("--load-from brings all weights: --pretrained is not used")
        return start_from(args.load_from, args)
    model = SSD(wanted_config(args, Config.scaled_from_300(*(args.size or (300, 300)))))
    if args.pretrained is not None:
        load_imagenet(model, args.pretrained or None)
    return model


def start_from(path, args):
    """The model of a new run that starts from a detector's weights, as far as they fit what the flags ask."""
    own = config_of(read_checkpoint(path), path)
    config = wanted_config(args, own)  # its anchors are kept at any input size, being pixels
    if config.width != own.width:
        raise InputError(f"{path}: is of width {own.width:g}; python -m tools.width {path} {config.width:g} "
                         "NEW.pth makes one of that width to start from")
    model = SSD(config)
    unfit = load_weights(model, path)
    if unfit:
        print_once(f"{path}: {len(unfit)} tensors did not fit and start at random: " + ", ".join(unfit[:8]))
    return model


def resume_model(args, content, averaged=False):
    """The model of a checkpoint's content, with its averaged weights if asked for and there.

    Raises InputError if the flags ask for another architecture, or the weights do not fit."""
    path = content["path"]
    config = config_of(content, path)
    wanted = asdict(wanted_config(args, config))
    changed = [f"{key} is {value}, not {wanted[key]}" for key, value in asdict(config).items()
               if value != wanted[key]]
    if changed:
        raise InputError(f"{path}: the architecture of a run cannot change: " + "; ".join(changed))
    with bad_values():
        return rebuild(content, averaged and content.get("ema") or content["state_dict"], path)


def load_momentum(optimizer, content):
    """Take the momentum out of a checkpoint's content. The rates and the decay stay those of the flags."""
    state, groups = content["optimizer"].get("state"), optimizer.state_dict()["param_groups"]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    try:
        for number, own in state.items():
            buffer = own["momentum_buffer"]
            fits = buffer is None or buffer.shape == parameters[number].shape and buffer.isfinite().all()
            if not fits:
                raise ValueError
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{content['path']}: cannot be resumed, its optimizer is of another model") from None


def save(path, model, **more):
    """Write a checkpoint, whole or not at all."""
    write_content(path, checkpoint(model, **more))


def write_content(path, content):
    """Write what a checkpoint holds, whole or not at all."""
    buffer = io.BytesIO()  # torch.save's own errors do not tell a full disk
    torch.save(content, buffer)
    with whole_file(path) as temporary:
        # Not a view of it: left in the error of a full disk, that crashes Python 3.12.
        temporary.write_bytes(buffer.getvalue())
