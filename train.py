"""Train the detector from scratch, from weights or on from a checkpoint; on a CPU, one GPU or many.

python train.py --data data/train.json                     # runs/face/{last,best}.pth, log.jsonl, curves.png
torchrun --nproc_per_node 4 train.py                       # four processes, four times the batch
python train.py @recipes/wider_face.txt --out runs/wider   # flags from a file; any flag after it overrides
python train.py --resume                                   # goes on where the last run in --out stopped
python train.py --resume --epochs 80                       # a finished run longer, at its final small rate
"""

import copy
import functools
import math
import shlex
import sys
import threading
from contextlib import suppress
from pathlib import Path

from support.script import InputError, bad_values, command, first_line, git_commit, require

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from anchors import make_anchors
from checkpoints import find_checkpoint, make_model, resume_model, save
from data import Batch, FaceDataset, TrainBatches, make_loader, to_input
from detector import TorchDetector, detect_all
from evaluate import score_faces
from loss import Criterion
from model import grid_size
from support.cache import PhotoCache
from support.coco import join, read_annotations
from support.distributed import (StopFlag, all_or_none, from_first, gather, join_processes, launch_id,
                                 leave_processes, mean, print_once, share_weights)
from support.graphs import Graphs
from support.monitor import Monitor, Progress, describe_run
from support.options import parse_args, report_changes
from teacher import load_teacher

WARM_UP = 1200  # iterations, but no more than four epochs
PAYS = 10_000  # views of 300x300 in a run from which on compiling on a CPU takes less time than it saves


def lr_at(step, epoch, lr, milestones, warmup):
    """The learning rate of iteration `step` (from 0, of the whole run) in `epoch` (from 0): a pure function.

    It is `lr`, a tenth of it from each of `milestones` on, and rises from a third of it over `warmup`."""
    lr *= 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return lr * (1 + 2 * step / warmup) / 3 if step < warmup else lr


def train_one_epoch(trainer, stop):
    """Train to the end of the epoch; its means are in `trainer.record` then. Saves and exits at a signal."""
    args = trainer.args
    trainer.start_epoch()
    progress = Progress(trainer, check_finite)
    stop.at_once(args.compile)  # the first step compiles for up to a minute, and nothing would be lost
    for batch in trainer.loader:
        rate = lr_at(trainer.step, trainer.epoch, args.lr, args.milestones, args.warmup)
        losses = trainer.update(batch, rate)
        stop.at_once(False)
        trainer.count(batch, losses)
        progress.show(len(batch.index), losses, rate)
        stopping = stop.agreed()
        if stopping or trainer.step % args.save_every == 0:
            trainer.save()
        if stopping:
            raise SystemExit(stop.code)
    trainer.finish_epoch(*progress.close())


class Trainer:
    """The state of a run, and its training step. All that changes is in its checkpoint."""
    layout = torch.channels_last  # the order in memory that convolutions like best

    def __init__(self, args, model, dataset, content=None, run=None, rank=0, processes=1, device="cpu"):
        """Begin a run, or with `content` continue that of a checkpoint. `run`: see `prepare`."""
        self.args, self.run = args, run or {}
        self.rank, self.processes, self.device = rank, processes, device
        if args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.raw_model = model.to(device, memory_format=self.layout)
        self.model = self.eager = self.raw_model
        self.ema = copy.deepcopy(self.raw_model).requires_grad_(False) if args.ema else None
        self.teacher = None
        if args.distill:
            self.teacher = load_teacher(args.teacher or [args.load_from], model.config).to(device)
        on_gpu = device.startswith("cuda")
        self.optimizer = torch.optim.SGD(self.raw_model.parameters(), args.lr, args.momentum,
                                         weight_decay=args.weight_decay, fused=on_gpu)
        for parameter in self.raw_model.parameters():  # a recorded graph needs them in one place
            parameter.grad = torch.zeros_like(parameter)
        self.graphs = None
        if on_gpu and processes == 1 and (self.teacher is None or self.teacher.same_size):
            self.graphs = Graphs(self.gradients, self.raw_model.buffers())
        self.anchors = make_anchors(self.raw_model.config).to(device)
        self.criterion = Criterion(self.anchors, self.raw_model.bbox_head.loss_weights, args.distill,
                                   matching=args.matching, class_loss=args.class_loss, box_loss=args.box_loss)
        self.autocast = functools.partial(torch.autocast, device.split(":")[0], torch.bfloat16,
                                          args.precision == "bf16", cache_enabled=False)
        self.epoch = 0         # epochs trained
        self.step = 0          # iterations in all
        self.done = 0          # photos of this epoch, of all processes
        self.sums = torch.zeros(4, device=device)  # total, class, box loss and their number in this epoch
        self.record = None     # of the last epoch, as long as it is not validated
        self.best = -1.0       # AP50
        self.waited = 0        # validated epochs since it was reached
        self.unreadable = {}
        self.batches = TrainBatches(len(dataset), args.batch_size, args.repeat, args.seed, rank, processes,
                                    not args.no_augment)
        cells = math.prod(grid_size(*model.config.input_size))
        require(self.batches.last * cells > 1 or args.freeze_bn, "the last batch of an epoch is one photo, "
                "whose feature map is one cell: too little for batch norm; change --batch-size or --size")
        if args.warmup is None:
            args.warmup = min(WARM_UP, 4 * self.batches.total)
        if content:
            self.restore(content)
        self.loader = make_loader(dataset, self.batches, args.workers, device)

    def restore(self, content):
        """Continue from a checkpoint's content. What the flags say now is what is used."""
        groups = self.optimizer.state_dict()["param_groups"]  # the rates and the decay are those of the flags
        self.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})
        for name in ("epoch", "step", "done", "best", "waited", "record"):
            setattr(self, name, content[name])
        self.sums = content["sums"].to(self.device)
        if self.ema:
            self.ema.load_state_dict(resume_model(self.args, content, averaged=True).state_dict())
        if self.done and self.run["order"] != content.get("order"):
            self.done = 0
            self.sums = torch.zeros_like(self.sums)
            print_once("this epoch begins anew: its photos are other ones now, or come in another order")
        if not self.run["val"]:
            self.run["val"] = content["val"]  # while nothing is validated, the last set's is kept
        elif content["val"] not in (None, self.run["val"]):
            self.best = -1.0
            self.waited = 0
            print_once("another validation set than before: best.pth begins anew")

    @property
    def finished(self):
        """Whether there is no epoch left to train: all are done, or --patience has come to its end."""
        return self.epoch >= self.args.epochs or self.waited >= (self.args.patience or math.inf)

    def connect(self):
        """Tie the network to those of the other processes, and compile it. All processes must come here."""
        for model in filter(None, (self.raw_model, self.ema, self.teacher)):
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
        check_finite(sums)  # a ruined run must not replace what is there
        if self.rank == 0:
            more = {"ema": self.ema.state_dict()} if self.ema else {}
            save(Path(self.args.out) / "last.pth", self.raw_model, **more, **self.run,
                 optimizer=self.optimizer.state_dict(), epoch=self.epoch, step=self.step, done=self.done,
                 best=self.best, waited=self.waited, sums=sums, record=self.record,
                 flags=vars(self.args))

    def update(self, batch, rate):
        """Do one training step on a Batch; returns its losses `[3]`: total, class, box."""
        if self.graphs and len(batch.images) == self.args.batch_size:
            losses = self.graphs(*batch.tensors())
        else:
            losses = self.gradients(*batch.to(self.device).tensors())
        if self.args.clip:
            torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ema:
            decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():  # all in one call, as torch.optim.swa_utils does it
                torch._foreach_lerp_(floats_of(self.ema), floats_of(self.raw_model), 1 - decay)
        return losses

    def gradients(self, *tensors):
        """Compute the gradients on the tensors of a Batch, and its losses `[3]`."""
        batch = Batch(*tensors)
        images = to_input(batch.images.contiguous(memory_format=self.layout))     # [B, 3, H, W]
        # Compiled is the shape of whole batches: the last, smaller one of an epoch would be compiled again.
        network = self.model if len(images) == self.args.batch_size else self.eager
        with self.autocast():
            outputs = network(images)                                             # [B, A, 2], [B, A, 4]
            teacher = self.teacher(images) if self.teacher else None              # the same shapes
        losses, distilled = self.criterion(outputs, batch, teacher)
        self.optimizer.zero_grad(set_to_none=False)
        (losses[0] + distilled).backward()
        return losses.detach()

    def start_epoch(self):
        """Make ready for the rest of an epoch: its batches, and the modes of the network's parts."""
        self.batches.epoch = self.epoch
        self.done = self.batches.skip(self.done)
        for module in self.raw_model.modules():
            module.train(not (self.args.freeze_bn and isinstance(module, _BatchNorm)))

    def count(self, batch, losses):
        """Count a step, and the photos that could not be used."""
        self.sums += torch.cat([losses, losses.new_ones(1)])
        self.step += 1
        self.done += self.args.batch_size * self.processes
        self.unreadable |= batch.errors
        self.check_readable(self.unreadable, self.batches.n)

    def finish_epoch(self, photos, seconds):
        """Make the record of a trained epoch. All processes must come here."""
        self.unreadable = gather(self.unreadable)
        self.check_readable(self.unreadable, self.batches.n, reported=self.rank > 0)
        sums = mean(self.sums)
        check_finite(sums)
        total, class_loss, box_loss, count = sums.tolist()
        self.epoch += 1
        self.done = 0
        self.sums = torch.zeros_like(self.sums)
        self.record = {
            "epoch": self.epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"],
            "loss": total / count, "class_loss": class_loss / count, "box_loss": box_loss / count,
            "loss_weights": self.raw_model.bbox_head.loss_weights.tolist(), "seconds": seconds,
            "photos_per_second": photos / seconds}

    def validate(self, annotations, stop):
        """Score the model, or its averaged weights, on Annotations: adds to `record`, keeps best.pth."""
        model = self.ema or self.raw_model
        share_weights(model)  # each process has batch-norm statistics of its own, the first one's are saved
        detector = TorchDetector(model, device=self.device)
        detections, errors = detect_all(detector, annotations, None, self.args.workers, self.rank,
                                        self.processes, stop.check)
        self.check_readable(errors, len(annotations.ids), f"{self.args.val}: ", self.rank > 0)
        if errors:
            print_once(f"{self.args.val}: left out, with their faces, {len(errors)} photos that could not be "
                       f"used, such as {next(iter(errors.values()))}")
            annotations, detections = annotations.without(errors, detections)
        scores = score_faces(annotations, detections)
        ap50 = scores["coco"]["AP50"]
        if ap50 > self.best and self.rank == 0:
            save(Path(self.args.out) / "best.pth", model, epoch=self.epoch, ap50=ap50,
                 photos=self.run.get("photos"))
        self.waited = 0 if ap50 > self.best else self.waited + 1
        self.best = max(self.best, ap50)
        self.record |= {"AP": scores["coco"]["AP"], "AP50": ap50, "AP50_by_size": scores["AP50_by_size"]}

    def check_readable(self, errors, photos, file="", reported=False):
        """Stop if too many of `photos`, or all, could not be used: `errors` are {index: line}."""
        if len(errors) > min(self.args.max_unreadable, photos - 1):
            raise InputError(f"{file}{len(errors)} photos could not be used (--max-unreadable "
                             f"{self.args.max_unreadable}): {'; '.join(list(errors.values())[:5])}", reported)


def check_finite(losses):
    """Stop if losses, or their sums, are not finite; the first of them is returned as a number."""
    require(losses.isfinite().all(), f"the loss is not finite ({losses[0]:.3g}); resume the last checkpoint, "
            "or start again, with a lower --lr or with --clip 10")
    return losses[0].item()


def floats_of(model):
    """The weights and batch-norm statistics of a model, that can be averaged."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def choose_precision(args, before, device):
    """--precision where it is left open: that of the run that is resumed, or else what is fast here."""
    if args.precision or before:
        return args.precision or before.get("precision", "fp32")
    cpu = torch.cpu.get_capabilities()  # where it does not multiply bfloat16 itself, that is far slower
    fast = device.startswith("cuda") or device == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return "bf16" if fast else "fp32"


def choose_compile(args, before, device, processes, views, pixels):
    """Whether to compile: as --compile or the resumed run has it, else if the run is long enough to pay."""
    wanted = args.compile
    if wanted is None:
        pays = device == "cpu" and processes == 1 and views * pixels >= PAYS * 300 * 300
        wanted = before.get("compile", False) if before else pays
    if not wanted:
        return False
    print_once("trying the compiler, up to half a minute the first time")
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.zeros(64, device=device))
    except Exception as error:  # no C++ compiler, no Python.h: the compilers' own kinds
        print_once(f"cannot compile here ({first_line(error)}): training goes on without, which is slower")
        return False
    return True


def find_val(args):
    """The Annotations to validate on, or None: those of --val, or of a val.json beside the one train.json."""
    if args.val not in (None, "none"):
        return read_val(args.val)
    beside = Path(args.data[0]).with_name("val.json")
    if not args.val and [Path(path).name for path in args.data] == ["train.json"] and beside.exists():
        try:
            return read_val(beside)
        except InputError as error:  # nobody has asked for it
            print_once(f"no validation: {error}")
    return None


def read_val(path):
    """The Annotations of a validation set. Raises InputError where photos are missing, or hold no face."""
    val = read_annotations(path)
    absent = [val.file(n) for n in range(len(val.ids)) if not val.file(n).is_file()]
    require(not absent, f"{path}: {len(absent)} of its {len(val.ids)} photos are missing, such as "
            f"{absent and absent[0]}; name another set with --val")
    require(not val.ignored.all(), f"{path}: holds no face to find; name another set with --val")
    return val


def read_inputs(args, content):
    """What a process reads before it meets the others: Annotations, the fingerprints of --data, the model."""
    parts = [read_annotations(path) for path in args.data]
    trained_on = [part.fingerprint() for part in parts]
    parts = [part.complete() if path in args.complete else part for path, part in zip(args.data, parts)]
    parts += [read_annotations(path).unlabelled() for path in args.unlabelled or []]
    for part in parts:
        part.require_photos()
    faces = join(parts)
    require(len(faces.ids), f"{args.data[0]}: no photos to train on")
    torch.manual_seed(args.seed)
    with bad_values():
        return faces, trained_on, make_model(args, content)


def prepare(args):
    """Everything before the loop: (Trainer, validation Annotations or None, Monitor, StopFlag)."""
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, processes, device = join_processes(args.device)
    if args.sync_bn and not device.startswith("cuda"):
        raise InputError(f"--sync-bn works on GPUs only, the device is {device}", reported=rank > 0)
    content = from_first(lambda: find_checkpoint(args))
    args.resume = content["path"] if content else None
    val = from_first(lambda: find_val(args))
    args.val = str(val.path) if val else None
    if args.patience and not val:
        raise InputError("--patience waits for a better AP50: name a set to validate on with --val", rank > 0)
    faces, trained_on, model = all_or_none(lambda: read_inputs(args, content))
    run = {"launch": from_first(launch_id), "photos": trained_on, "commit": git_commit(),  # for checkpoints
           "val": val.fingerprint() if val else None,
           "order": f"{faces.fingerprint()} {args.seed} {args.repeat}"}  # of an epoch's photos
    size = model.config.input_size
    cache = PhotoCache(args.cache, size) if args.cache else None
    if cache:
        from_first(lambda: cache.check(faces.file(n) for n in range(len(faces.ids))))
    dataset = FaceDataset(faces, *size, args.min_face, args.min_size, args.own_shape, cache)
    before = content["flags"] if content else None
    photos = len(dataset) * args.repeat
    args.precision = choose_precision(args, before, device)
    args.compile = choose_compile(args, before, device, processes, photos * args.epochs, math.prod(size))
    trainer = all_or_none(lambda: Trainer(args, model, dataset, content, run, rank, processes, device))
    trainer.connect()
    validated = trainer.epoch - bool(trainer.record)
    monitor = all_or_none(lambda: None if rank else Monitor(args, model, validated, photos))
    stop = StopFlag()  # before the lines below: who has read them may count on a signal saving the run
    if rank == 0:
        if content:
            report_changes(args, content)
        describe_run(trainer, dataset, content)
        if not val:
            print("no validation (no --val): best.pth is not written")
    return trainer, val, monitor, stop


def train(trainer, val, monitor, stop):
    """Train and validate epoch by epoch, and save after each part, until the run is finished."""
    while trainer.record or not trainer.finished:
        if not trainer.record:
            train_one_epoch(trainer, stop)
        if val:
            trainer.save()  # a signal may end the validation; the run then resumes with it
            trainer.validate(val, stop)
        if monitor:  # before the save: an epoch that is done again loses its line, none is ever missing
            monitor.epoch(trainer.record, trainer.finished)
        trainer.record = None
        trainer.save()
        stop.check()


@command
def main(argv=None):
    """Prepare, train, report how it ended."""
    args = parse_args(argv, __doc__)
    last = str(Path(args.out) / "last.pth")
    trainer, val, monitor, stop = prepare(args)
    try:
        if args.resume != last:
            trainer.save()  # from here on there is a checkpoint, and the folder is known to be writable
        train(trainer, val, monitor, stop)
    except (RuntimeError, SystemExit):
        if not stop.number:
            raise
        report = threading.excepthook  # a GPU's loader has a thread that would report the end of its workers
        threading.excepthook = lambda error: issubclass(error.exc_type, ConnectionError) or report(error)
        again = "" if launch_id() else f":\n{shlex.join([*sys.orig_argv, '--resume'])}"
        if trainer.rank == 0:
            with suppress(OSError):  # Ctrl-C may have ended a reader, such as tee, as well
                tqdm.write(f"stopped; the run is saved in {last}; to go on, the same with --resume{again}",
                           file=sys.stderr)
        raise SystemExit(stop.code) from None  # after a RuntimeError too: the others have saved and left
    trainer.loader = None  # ends its workers. At the exit of Python their end could be taken for a failure
    if monitor:
        monitor.lock.close()  # another run may write in the folder now
        for line in trainer.unreadable.values():
            print(f"unreadable: {line}")
        best = f", best.pth AP50 {trainer.best:.4f}" if val else ""
        early = f"; stopped early: {trainer.waited} epochs without a better AP50 (--patience {args.patience})"
        print(f"finished {trainer.epoch} epochs: {last}{best}{early if trainer.epoch < args.epochs else ''}")
    trainer.model = None  # it must not be the last to hold the group: ending that late can wait for ever
    leave_processes()


if __name__ == "__main__":
    main()
