"""A run's checkpoints: where its model starts, what is saved, on which terms it resumes."""

import io
import os
from dataclasses import asdict
from pathlib import Path

import torch

from model import SSD, Config, checkpoint, config_of, load_imagenet, load_weights, read_checkpoint, rebuild
from support.distributed import launch_id, print_once
from support.script import bad_values, require, whole_file

STATE = {"optimizer", "epoch", "step", "done", "best", "waited", "sums", "record", "val", "flags"}  # of a run


@bad_values()
def find_checkpoint(args):
    """Settle --resume: the content of the checkpoint to continue, or None for a new run.

    A run is never overwritten. One that this launch of torchrun began, or resumed, goes on by itself when
    torchrun restarts it."""
    last = Path(args.out) / "last.pth"
    path = str(last) if args.resume == "" else args.resume
    if last.exists() and (path is None or os.path.realpath(path) != os.path.realpath(last)):
        own = launch_id() is not None and read_checkpoint(last).get("launch") == launch_id()
        require(own, f"{last} exists: continue that run with --resume alone, or name another --out")
        path = str(last)
    if path is None:
        return None
    require(os.path.exists(path), f"{path}: no checkpoint to resume")
    content = read_checkpoint(path)
    require(STATE <= content.keys(),
            f"{path}: holds weights only, nothing to resume; start from it with --load-from")
    return content | {"path": path}


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
    if not args.load_from:
        model = SSD(wanted_config(args, Config.scaled_from_300(*(args.size or (300, 300)))))
        if args.pretrained is not None:
            load_imagenet(model, args.pretrained or None)
        return model
    path = args.load_from
    own = config_of(read_checkpoint(path), path)
    config = wanted_config(args, own)  # its anchors are kept at any input size, being pixels
    require(config.width == own.width, f"{path}: is of width {own.width:g}; python -m tools.width {path} "
            f"{config.width:g} NEW.pth makes one of that width to start from")
    model = SSD(config)
    unfit = load_weights(model, path)
    if unfit:
        print_once(f"{path}: {len(unfit)} tensors did not fit and start at random: " + ", ".join(unfit[:8]))
    return model


def resume_model(args, content, averaged=False):
    """The model of a checkpoint's content, averaged weights if asked for; InputError if flags do not fit."""
    path = content["path"]
    config = config_of(content, path)
    wanted = asdict(wanted_config(args, config))
    changed = [f"{key} is {value}, not {wanted[key]}" for key, value in asdict(config).items()
               if value != wanted[key]]
    require(not changed, f"{path}: the architecture of a run cannot change: {'; '.join(changed)}")
    with bad_values():
        return rebuild(content, path, averaged)


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
