"""Train the detector: from nothing, from weights, or on from a checkpoint; on a CPU, one GPU or many.

python train.py --data data/train.json                     # runs/face/{last,best}.pth, log.jsonl, curves.png
torchrun --nproc_per_node 4 train.py                       # four processes, four times the batch
python train.py @recipes/wider_face.txt --out runs/wider   # flags from a file; any flag after it overrides
python train.py --resume                                   # goes on where the last run in --out stopped
python train.py --resume --epochs 80                       # a finished run longer, at its final small rate
"""

import copy
import functools
import math
import os
import time
from argparse import SUPPRESS
from pathlib import Path

# First, so that Ctrl-C during the slow imports below ends in one line.
from script import FlagFileParser, InputError, bad_values, command, git_commit, parse_sides, parse_size

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from anchors import make_anchors
from checkpoints import (find_checkpoint, load_momentum, load_teacher, make_model, report_changes,
                         resume_model, save)
from coco import join, read_annotations
from data import FaceDataset, TrainBatches, make_loader, to_input
from detector import TorchDetector, detect_all
from distributed import (StopFlag, from_first, gather, join_processes, launch_id, leave_processes, mean, say,
                         share_weights, together)
from evaluate import score_faces
from loss import Criterion
from monitor import Monitor, describe_run

DATA = "data/train.json"


def lr_at(step, epoch, lr, milestones, warmup):
    """The learning rate of iteration `step` (from 0, of the whole run) in `epoch` (from 0): a pure function.

    `lr`, divided by 10 at each epoch of `milestones`. Over the first `warmup` iterations it rises linearly
    from a third.
    """
    lr *= 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return lr * (1 + 2 * step / warmup) / 3 if step < warmup else lr


class Trainer:
    """The state of a run, and the loop over it. All that the loop changes is in its checkpoint."""
    layout = torch.channels_last  # the order in memory that convolutions like best

    def __init__(self, args, model, dataset, content=None, marks=None, rank=0, processes=1, device="cpu"):
        """Begin a run, or with `content` continue that of a checkpoint.

        `marks` are kept in checkpoints as they are: which launch this is, which photos it trains on and
        validates on.
        """
        self.args, self.rank, self.processes, self.device = args, rank, processes, device
        self.marks = marks or {}
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_bn else model
        self.model = self.raw_model = model.to(device, memory_format=self.layout)
        self.ema = copy.deepcopy(self.raw_model).requires_grad_(False) if args.ema else None
        self.teacher = None
        if args.distill:
            self.teacher = load_teacher(args, model.config).to(device, memory_format=self.layout)
        self.optimizer = torch.optim.SGD(self.raw_model.parameters(), args.lr, args.momentum,
                                         weight_decay=args.weight_decay)
        self.anchors = make_anchors(self.raw_model.config).to(device)
        self.criterion = Criterion(self.anchors, self.raw_model.loss_weights, args.distill)
        self.autocast = functools.partial(torch.autocast, device.split(":")[0], torch.bfloat16,
                                          args.precision == "bf16")
        self.epoch = self.step = self.done = 0     # epochs trained, iterations in all, photos of this epoch
        self.sums = torch.zeros(4, device=device)  # total, class, box loss and their number in this epoch
        self.record = None                         # of the last epoch, as long as it is not validated
        self.best, self.unreadable = -1.0, {}
        self.batches = TrainBatches(len(dataset), args.batch_size, args.repeat, args.seed, rank, processes,
                                    not args.no_augment)
        if content:
            self.restore(content)
        self.loader = make_loader(dataset, self.batches, args.workers, device)

    def restore(self, content):
        """Continue from a checkpoint's content. What the flags say now is what is used."""
        load_momentum(self.optimizer, content)
        self.epoch, self.step, self.done = content["epoch"], content["step"], content["done"]
        self.best = content["best"]
        self.sums, self.record = content["sums"].to(self.device), content.get("record")
        if self.ema:
            self.ema.load_state_dict(resume_model(self.args, content, averaged=True).state_dict())
        flags, own = content["flags"], vars(self.args)
        photos = content.get("photos") in (None, self.marks["photos"])  # None: an older checkpoint's
        if self.done and not (photos and all(own[key] == flags.get(key) for key in ("seed", "repeat"))):
            self.done, self.sums = 0, torch.zeros_like(self.sums)
            say("this epoch begins anew: its photos are other ones now, or come in another order")
        self.marks.setdefault("val", content.get("val"))  # without validation, the last set's is kept
        same = self.marks["val"] == content["val"] if content.get("val") else own["val"] == flags.get("val")
        if own["val"] and not same and self.best >= 0:
            self.best = -1.0
            say("another validation set than before: best.pth begins anew")

    def connect(self):
        """Tie the network to those of the other processes, and compile it. All processes must come here."""
        for model in (self.raw_model, self.ema, self.teacher):
            if model:
                share_weights(model)
        if self.processes > 1:
            own_gpu = [self.device] if self.device.startswith("cuda") else None
            self.model = DistributedDataParallel(self.model, device_ids=own_gpu)
        if self.args.compile:
            self.model = torch.compile(self.model)

    def save(self):
        """Write last.pth, whole or not at all. All processes must come here."""
        sums = mean(self.sums).cpu()
        if self.rank == 0:
            more = {"ema": self.ema.state_dict()} if self.ema else {}
            save(Path(self.args.out) / "last.pth", self.raw_model, **more, **self.marks,
                 optimizer=self.optimizer.state_dict(), epoch=self.epoch, step=self.step, done=self.done,
                 best=self.best, sums=sums, record=self.record, flags=vars(self.args))

    def update(self, batch):
        """Do one training step on a Batch; returns its losses `[3]`: total, class, box."""
        batch = batch.to(self.device)
        images = to_input(batch.images.contiguous(memory_format=self.layout))     # [B, 3, H, W]
        with self.autocast():
            outputs = self.model(images)                                          # [B, A, 2], [B, A, 4]
            teacher = self.teacher(images) if self.teacher else None              # the same shapes
        losses, distilled = self.criterion(outputs, batch, teacher)
        self.optimizer.zero_grad()
        (losses[0] + distilled).backward()
        if self.args.clip:
            torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.args.clip)
        self.optimizer.step()
        if self.ema:
            move_average(self.ema, self.raw_model, min(self.args.ema, (1 + self.step) / (10 + self.step)))
        return losses.detach()

    def run_epoch(self, stop):
        """Train to the end of the epoch; its means are in `record` then. Saves and exits at a signal."""
        args, whole = self.args, self.args.batch_size * self.processes
        self.batches.epoch = self.epoch
        self.done = self.batches.skip(self.done)
        for module in self.raw_model.modules():
            module.train(not (args.freeze_bn and isinstance(module, _BatchNorm)))
        started, shown, seen, before = time.perf_counter(), 0.0, 0, None
        bar = tqdm(self.loader, f"epoch {self.epoch + 1}/{args.epochs}", leave=False,
                   disable=None if self.rank == 0 else True)
        for batch in bar:
            rate = lr_at(self.step, self.epoch, args.lr, args.milestones, args.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            stop.at_once = args.compile and before is None  # it compiles, for minutes, and nothing is lost
            losses = self.update(batch)
            stop.at_once = False
            self.sums += torch.cat([losses, losses.new_ones(1)])
            self.step, self.done = self.step + 1, self.done + whole
            seen += len(batch.index) * self.processes
            loss = check_finite(before)
            before = read_later(losses), batch.index
            self.check_readable(batch.errors)
            if time.perf_counter() - shown > 1 and loss is not None and not bar.disable:
                shown = time.perf_counter()
                speed = seen / (shown - started)
                bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.2g}, {speed:.0f} photos/s")
            stopping = stop.agreed()
            if stopping or self.step % args.save_every == 0:
                check_finite(before)
                self.save()
            if stopping:
                raise SystemExit(stop.code)
        check_finite(before)
        self.check_readable(gather(self.unreadable))
        if len(self.unreadable) == self.batches.n:
            raise InputError(f"{args.data[0]}: not one photo could be read, so nothing was learned: "
                             + "; ".join(list(self.unreadable.values())[:5]))
        total, class_loss, box_loss, count = mean(self.sums).tolist()
        self.epoch, self.done, self.sums = self.epoch + 1, 0, torch.zeros_like(self.sums)
        seconds = time.perf_counter() - started
        self.record = {
            "epoch": self.epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"],
            "loss": total / count, "class_loss": class_loss / count, "box_loss": box_loss / count,
            "loss_weights": self.raw_model.loss_weights.tolist(), "seconds": seconds,
            "photos_per_second": seen / seconds}

    def validate(self, annotations, stop):
        """Score the model, or its averaged weights, on Annotations: adds to `record`, keeps best.pth."""
        model = self.ema or self.raw_model
        share_weights(model)  # each process has batch-norm statistics of its own, the first one's are saved
        detector = TorchDetector(model, device=self.device)
        detections, errors = detect_all(detector, annotations, 16, self.args.workers, self.rank,
                                        self.processes, stop.check)
        if errors:
            lines = "; ".join(list(errors.values())[:5])
            if len(errors) > self.args.max_unreadable:
                raise InputError(f"{self.args.val}: {len(errors)} photos could not be used "
                                 f"(--max-unreadable {self.args.max_unreadable}): {lines}",
                                 reported=self.rank > 0)
            say(f"{self.args.val}: left out, with their faces, {len(errors)} photos that could not be "
                f"used: {lines}")
            annotations, detections = annotations.without(errors, detections)
        scores, _ = score_faces(annotations, detections)
        ap50 = scores["coco"]["AP50"]
        if ap50 > self.best and self.rank == 0:
            save(Path(self.args.out) / "best.pth", model, epoch=self.epoch, ap50=ap50)
        self.best = max(self.best, ap50)
        self.record |= {"AP": scores["coco"]["AP"], "AP50": ap50, "AP50_by_size": scores["AP50_by_size"]}

    def check_readable(self, errors):
        """Remember unreadable photos {index: line}, and stop once there are too many."""
        self.unreadable |= errors
        if len(self.unreadable) > self.args.max_unreadable:
            lines = "; ".join(list(self.unreadable.values())[:5])
            raise InputError(f"{len(self.unreadable)} photos could not be used "
                             f"(--max-unreadable {self.args.max_unreadable}): {lines}")


def read_later(losses):
    """Begin to copy `losses` `[3]` to the CPU, and return a function that waits until they are there.

    Called a step later, it waits for nothing. Read at once, they would leave the GPU without work.
    """
    if not losses.is_cuda:
        return lambda: losses
    copy, done = torch.empty(losses.shape, pin_memory=True), torch.cuda.Event()
    copy.copy_(losses, non_blocking=True)
    done.record()

    def wait():
        done.synchronize()
        return copy
    return wait


def check_finite(step):
    """Stop if the (losses from read_later, photo indices) of a step are not finite; else return the loss."""
    if step is None:
        return None
    losses = step[0]()
    if not losses.isfinite().all():
        raise InputError(f"the loss is not finite ({losses[0]:.3g}) on the photos with indices {step[1]}; "
                         "resume the last checkpoint with a lower --lr or with --clip 10, or, should it be "
                         "ruined as well, start again so")
    return losses[0].item()


@torch.no_grad()
def move_average(average, model, decay):
    """Move averaged weights and batch-norm statistics towards the current ones."""
    averaged, current = ([tensor for tensor in one.state_dict().values() if tensor.is_floating_point()]
                         for one in (average, model))
    torch._foreach_lerp_(averaged, current, 1 - decay)  # all in one call, as torch.optim.swa_utils does it


def make_parser():
    """The flags. What shapes the weights defaults to None: a checkpoint decides, or else the reference."""
    parser = FlagFileParser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help=f"COCO json to train on, or several (default {DATA})")
    add("--val", help="COCO json to validate on, or none (default: the val.json beside the one train.json)")
    add("--min-face", type=int, default=17,
        help="ignore faces with a side below this, in the photo (default 17 px)")
    add("--min-size", type=float, default=0, metavar="PX",
        help="ignore faces with a side below this at the network's input, as augmented (default 0 px)")
    add("--no-augment", action="store_true", help="show the photos as they are")
    add("--repeat", type=int, default=2, help="passes in an epoch (default 2)")
    add("--max-unreadable", type=int, default=10, help="stop at more unreadable photos (default 10)")
    add = parser.add_argument_group("model and starting point").add_argument
    add("--size", type=parse_size, help="network input, S or WxH (default 300, or the checkpoint's)")
    add("--width", type=float, help="channel multiplier (default 0.75, or the checkpoint's)")
    add("--anchors", type=parse_sides, nargs="+", metavar="WxH", help="anchors for 300x300 (see anchors.py)")
    add("--pretrained", nargs="?", const="", metavar="PATH",
        help="ImageNet backbone: torchvision's, or in PATH")
    add("--load-from", metavar="CHECKPOINT", help="start from a detector's weights")
    add("--distill", type=float, nargs=2, metavar=("SCORES", "BOXES"),
        help="learn from --load-from as a teacher too, and forget less: weights of its scores where no face "
             "is labelled, and of its boxes (default off; begin with 0.3 0.4)")
    add("--hold", dest="distill", type=float, nargs=2, help=SUPPRESS)  # its name in older recipes
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default OUT/last.pth)")
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, default=70, help="default 70")
    add("--batch-size", type=int, default=65, help="photos per process (default 65)")
    add("--lr", type=float, default=0.05,
        help="learning rate (default 0.05). It and --warmup stay as they are for N processes, whose batch is "
             "N times as large; often used then: --lr 0.05 x N, --warmup 1200 / N")
    add("--milestones", type=int, nargs="*", default=[40, 55, 65],
        help="epochs at which lr is divided by 10 (default 40 55 65)")
    add("--warmup", type=int, default=1200, help="iterations from lr / 3 to lr (default 1200)")
    add("--momentum", type=float, default=0.9, help="default 0.9")
    add("--weight-decay", type=float, default=5e-4, help="default 5e-4")
    add("--clip", type=float, help="greatest norm of the gradient (default: any)")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="average weights, as 0.999 (default off)")
    add("--freeze-bn", action="store_true", help="keep batch-norm statistics as they are")
    add("--seed", type=int, default=0, help="default 0")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/face", help="folder of the run (default %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, else fp32")
    add("--workers", type=int, help="loading processes for each process (default: share the cores)")
    add("--save-every", type=int, default=500, help="iterations between saves in an epoch (default 500)")
    add("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--tensorboard", action="store_true", help="also write TensorBoard events (pip install tensorboard)")
    return parser


def parse_args(argv):
    """Parse and check the flags."""
    parser = make_parser()
    args = parser.parse_args(argv)
    least = {"epochs": 0, "batch_size": 1, "repeat": 1, "warmup": 0, "save_every": 1, "workers": 0,
             "max_unreadable": 0, "seed": 0}
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}")
    rates = 0 < args.lr < math.inf and 0 <= args.ema < 1 and 0 <= args.weight_decay < math.inf
    if not rates or (args.clip is not None and not 0 < args.clip < math.inf):
        parser.error("--lr and --clip must be above 0, --ema in [0, 1), --weight-decay 0 or more")
    if not 0 <= args.momentum < 1 or args.seed >= 2 ** 32 or not 0 <= args.min_size < math.inf:
        parser.error("--momentum must be in [0, 1), --seed below 2 to the 32, --min-size 0 or more")
    if args.distill and not (args.load_from and all(0 <= weight < math.inf for weight in args.distill)):
        parser.error("--distill takes weights of 0 or more, and needs --load-from")
    args.data = args.data or [DATA]
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return args


def read_val(args):
    """The Annotations to validate on, or None. A set that was found, not named, need not be fit for it."""
    beside = Path(args.data[0]).with_name("val.json")
    found = args.val is None and [Path(path).name for path in args.data] == ["train.json"] and beside.exists()
    args.val = str(beside) if found else None if args.val == "none" else args.val
    if not args.val:
        return None
    try:
        val = read_annotations(args.val)
        absent = [val.file(n) for n in range(len(val.ids)) if not val.file(n).is_file()]
        if absent:
            raise InputError(f"{args.val}: {len(absent)} of its {len(val.ids)} photos are missing, such as "
                             f"{absent[0]}; name another set with --val, or --val none")
        if val.ignored.all():
            raise InputError(f"{args.val}: holds no face to find, so there is no AP to choose best.pth by; "
                             "name another set with --val, or --val none")
        return val
    except InputError as error:
        if not found:
            raise
        args.val = None
        say(f"{error}; training goes on without validation")


def read_inputs(args, content):
    """Read what a process needs before it meets the others: Annotations, those of --val, and the model."""
    faces, val = join([read_annotations(path) for path in args.data]), read_val(args)
    if not len(faces.ids):
        raise InputError(f"{args.data[0]}: no photos to train on")
    torch.manual_seed(args.seed)
    with bad_values():
        return faces, val, make_model(args, content)


def prepare(args):
    """Everything before the loop: (Trainer, validation Annotations or None, Monitor)."""
    rank, processes, device = join_processes(args.device)
    if args.sync_bn and not device.startswith("cuda"):
        raise InputError(f"--sync-bn works on GPUs only, the device is {device}", reported=rank > 0)
    args.precision = args.precision or ("bf16" if device.startswith("cuda") else "fp32")
    torch.backends.cudnn.benchmark = True
    content = from_first(lambda: find_checkpoint(args))
    args.resume = content["path"] if content else None
    faces, val, model = together(lambda: read_inputs(args, content))
    marks = {"launch": from_first(launch_id), "photos": faces.fingerprint(), "commit": git_commit()}
    if val:
        marks["val"] = val.fingerprint()
    dataset = FaceDataset(faces, *model.config.input_size, args.min_face, args.min_size)
    trainer = together(lambda: Trainer(args, model, dataset, content, marks, rank, processes, device))
    trainer.connect()
    validated = trainer.epoch - bool(trainer.record)
    monitor = together(lambda: None if rank else Monitor(args, model, validated))
    if rank == 0:
        if content:
            report_changes(args, content)
        describe_run(trainer, dataset, content)
        if not val:
            print("no validation (no --val): best.pth is not written")
    return trainer, val, monitor


@command
def main(argv=None):
    """Train, validating and saving after each epoch."""
    args = parse_args(argv)
    trainer, val, monitor = prepare(args)
    stop = StopFlag()
    try:
        if not args.resume:
            trainer.save()  # from here on there is a checkpoint, and the folder is known to be writable
        while trainer.epoch < args.epochs or trainer.record:
            if not trainer.record:
                trainer.run_epoch(stop)
            if val:
                trainer.save()  # a signal may end the validation; the run then resumes with it
                trainer.validate(val, stop)
            if monitor:  # before the save: an epoch that is done again loses its line, none is ever missing
                monitor.epoch(trainer, val)
            trainer.record = None
            trainer.save()
            stop.check()
    except RuntimeError:
        if stop.number:  # the others have saved and left
            raise SystemExit(stop.code) from None
        raise
    trainer.loader = None  # ends its workers. At the exit of Python their end could be taken for a failure
    if monitor:
        monitor.close()
        for line in trainer.unreadable.values():
            print(f"unreadable: {line}")
        best = f", best.pth AP50 {trainer.best:.4f}" if val else ""
        print(f"finished {trainer.epoch} epochs: {args.out}/last.pth{best}")
    if trainer.processes > 1:
        trainer.model = None  # it must not be the last to hold the group: ending that late can wait for ever
        leave_processes()


if __name__ == "__main__":
    main()
