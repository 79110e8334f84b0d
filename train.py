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
import sys
import time
from contextlib import suppress
from pathlib import Path

# First, so that Ctrl-C during the slow imports below ends in one line.
from support.script import InputError, bad_values, command, first_line, git_commit

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from anchors import make_anchors
from checkpoints import find_checkpoint, load_momentum, make_model, resume_command, resume_model, save
from support.coco import join, read_annotations
from data import FaceDataset, TrainBatches, make_loader, to_input
from detector import TorchDetector, detect_all
from support.distributed import (StopFlag, from_first, gather, join_processes, launch_id, leave_processes, mean, say,
                         share_weights, together)
from evaluate import score_faces
from loss import Criterion
from support.monitor import Monitor, describe_run
from support.options import parse_args, report_changes
from teacher import load_teacher

PAYS = 5000  # photos of 300x300 in an epoch from which on compiling on a CPU takes less time than it saves


def settle_speed(args, content, device, processes, photos, pixels):
    """Settle --precision and --compile where the flags leave them open.

    A run that is resumed keeps its own. A new one takes what is fast here; `photos` are those of an epoch, of
    so many `pixels`. How many epochs there will be plays no part: it changes when a run is resumed.
    """
    before = content["flags"] if content else {}
    if args.precision is None:
        fast = device.startswith("cuda") or device == "cpu" and not content and computes_bf16()
        args.precision = "bf16" if fast else "fp32"
        if before.get("precision") in ("bf16", "fp32"):
            args.precision = before["precision"]
    if args.compile is None:
        long = photos * pixels >= PAYS * 300 * 300
        args.compile = bool(before["compile"] if "compile" in before else
                            not content and device == "cpu" and processes == 1 and long)
    if args.compile:
        say("trying the compiler, up to half a minute the first time")
    if args.compile and (trouble := cannot_compile(device)):
        say(f"cannot compile here ({trouble}): training goes on without, which is slower")
        args.compile = False


def computes_bf16():
    """Whether this CPU multiplies bfloat16 numbers itself. Where it does not, they are far slower."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def cannot_compile(device):
    """Why torch.compile does not work here, in one line (no C++ compiler, no Python.h); None if it does."""
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.zeros(64, device=device))
    except Exception as error:  # the compilers' own kinds
        return first_line(error)


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
        self.model = self.eager = self.raw_model = model.to(device, memory_format=self.layout)
        self.ema = copy.deepcopy(self.raw_model).requires_grad_(False) if args.ema else None
        self.teacher = None
        if args.distill:
            self.teacher = load_teacher(args.teacher or [args.load_from], model.config)
            self.teacher.to(device, memory_format=self.layout)
        self.optimizer = torch.optim.SGD(self.raw_model.parameters(), args.lr, args.momentum,
                                         weight_decay=args.weight_decay)
        self.anchors = make_anchors(self.raw_model.config).to(device)
        self.criterion = Criterion(self.anchors, self.raw_model.loss_weights, args.distill,
                                   matching=args.matching, class_loss=args.class_loss, box_loss=args.box_loss)
        self.autocast = functools.partial(torch.autocast, device.split(":")[0], torch.bfloat16,
                                          args.precision == "bf16")
        self.epoch = self.step = self.done = 0     # epochs trained, iterations in all, photos of this epoch
        self.sums = torch.zeros(4, device=device)  # total, class, box loss and their number in this epoch
        self.record = None                         # of the last epoch, as long as it is not validated
        self.best, self.waited = -1.0, 0           # AP50, and the validated epochs since it was reached
        self.unreadable = {}
        self.batches = TrainBatches(len(dataset), args.batch_size, args.repeat, args.seed, rank, processes,
                                    not args.no_augment)
        if content:
            self.restore(content)
        self.loader = make_loader(dataset, self.batches, args.workers, device)

    def restore(self, content):
        """Continue from a checkpoint's content. What the flags say now is what is used."""
        load_momentum(self.optimizer, content)
        self.epoch, self.step, self.done = content["epoch"], content["step"], content["done"]
        self.best, self.waited = content["best"], content["waited"]
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
            self.best, self.waited = -1.0, 0
            say("another validation set than before: best.pth begins anew")

    @property
    def finished(self):
        """Whether there is no epoch left to train: all are done, or --patience has come to its end."""
        impatient = self.args.patience is not None and self.waited >= self.args.patience
        return self.epoch >= self.args.epochs or impatient

    def connect(self):
        """Tie the network to those of the other processes, and compile it. All processes must come here."""
        for model in (self.raw_model, self.ema, self.teacher):
            if model:
                share_weights(model)
        if self.processes > 1:
            own_gpu = [self.device] if self.device.startswith("cuda") else None
            self.model = DistributedDataParallel(self.model, device_ids=own_gpu)
        self.eager = self.model
        if self.args.compile:
            self.model = torch.compile(self.model)

    def save(self):
        """Write last.pth, whole or not at all. All processes must come here."""
        sums = mean(self.sums).cpu()
        if self.rank == 0:
            more = {"ema": self.ema.state_dict()} if self.ema else {}
            save(Path(self.args.out) / "last.pth", self.raw_model, **more, **self.marks,
                 optimizer=self.optimizer.state_dict(), epoch=self.epoch, step=self.step, done=self.done,
                 best=self.best, waited=self.waited, sums=sums, record=self.record,
                 flags=vars(self.args))

    def update(self, batch):
        """Do one training step on a Batch; returns its losses `[3]`: total, class, box."""
        batch = batch.to(self.device)
        images = to_input(batch.images.contiguous(memory_format=self.layout))     # [B, 3, H, W]
        # Compiled is the shape of whole batches: the last, smaller one of an epoch would be compiled again.
        network = self.model if len(images) == self.args.batch_size else self.eager
        with self.autocast():
            outputs = network(images)                                             # [B, A, 2], [B, A, 4]
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
            if stop.at_once and stop.number:                # told while the first batch was loaded
                raise SystemExit(stop.code)
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
        self.waited = 0 if ap50 > self.best else self.waited + 1
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


def read_val(args):
    """The Annotations to validate on, or None. A set that was found, not named, need not be fit for it."""
    beside = Path(args.data[0]).with_name("val.json")
    found = args.val is None and [Path(path).name for path in args.data] == ["train.json"] and beside.exists()
    args.val = str(beside) if found else None if args.val == "none" else args.val
    if not args.val:
        return None
    try:
        val = read_annotations(args.val)
        val.require_photos()
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
    parts = [read_annotations(path) for path in args.data]
    parts += [read_annotations(path).unlabelled() for path in args.unlabelled or []]
    for part in parts:
        part.require_photos()
    faces, val = join(parts), read_val(args)
    if not len(faces.ids):
        raise InputError(f"{args.data[0]}: no photos to train on")
    if args.patience and not val:
        raise InputError("--patience waits for a better AP50: name a set to validate on with --val")
    torch.manual_seed(args.seed)
    with bad_values():
        return faces, val, make_model(args, content)


def prepare(args):
    """Everything before the loop: (Trainer, validation Annotations or None, Monitor, StopFlag)."""
    rank, processes, device = join_processes(args.device)
    if args.sync_bn and not device.startswith("cuda"):
        raise InputError(f"--sync-bn works on GPUs only, the device is {device}", reported=rank > 0)
    torch.backends.cudnn.benchmark = True
    content = from_first(lambda: find_checkpoint(args))
    args.resume = content["path"] if content else None
    faces, val, model = together(lambda: read_inputs(args, content))
    marks = {"launch": from_first(launch_id), "photos": faces.fingerprint(), "commit": git_commit()}
    if val:
        marks["val"] = val.fingerprint()
    dataset = FaceDataset(faces, *model.config.input_size, args.min_face, args.min_size)
    settle_speed(args, content, device, processes, len(dataset) * args.repeat,
                 math.prod(model.config.input_size))
    trainer = together(lambda: Trainer(args, model, dataset, content, marks, rank, processes, device))
    trainer.connect()
    validated = trainer.epoch - bool(trainer.record)
    monitor = together(lambda: None if rank else Monitor(args, model, validated))
    stop = StopFlag()  # before the lines below: who has read them may count on a signal saving the run
    if rank == 0:
        if content:
            report_changes(args, content)
        describe_run(trainer, dataset, content)
        if not val:
            print("no validation (no --val): best.pth is not written")
    return trainer, val, monitor, stop


@command
def main(argv=None):
    """Train, validating and saving after each epoch."""
    args = parse_args(argv, __doc__)
    last, again = str(Path(args.out) / "last.pth"), resume_command(args, argv)
    trainer, val, monitor, stop = prepare(args)
    try:
        if args.resume != last:
            trainer.save()  # from here on there is a checkpoint, and the folder is known to be writable
        while trainer.record or not trainer.finished:
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
    except (RuntimeError, SystemExit):
        if not stop.number:
            raise
        if trainer.rank == 0:
            with suppress(OSError):  # Ctrl-C may have ended a reader, such as tee, as well
                tqdm.write(f"stopped; the run is saved in {last}. To go on:\n{again}", file=sys.stderr)
        raise SystemExit(stop.code) from None  # after a RuntimeError too: the others have saved and left
    trainer.loader = None  # ends its workers. At the exit of Python their end could be taken for a failure
    if monitor:
        monitor.close()
        for line in trainer.unreadable.values():
            print(f"unreadable: {line}")
        best = f", best.pth AP50 {trainer.best:.4f}" if val else ""
        early = f"; stopped early: {trainer.waited} epochs without a better AP50 (--patience {args.patience})"
        print(f"finished {trainer.epoch} epochs: {last}{best}{early if trainer.epoch < args.epochs else ''}")
    if trainer.processes > 1:
        trainer.model = None  # it must not be the last to hold the group: ending that late can wait for ever
        leave_processes()


if __name__ == "__main__":
    main()
