"""Record a training run: log.jsonl, the curves drawn from it, and TensorBoard if asked for."""

import json
import time
from pathlib import Path

import numpy as np
import torch

from checkpoints import claim
from data import collate, to_image, to_input
from detector import TorchDetector, detect
from support.pictures import FALSE, IGNORED, contact_sheet, draw_faces, load_picture
from support.script import InputError, git_commit, whole_file

PICTURES = 16  # on each contact sheet
REDRAWN = 10   # seconds between drawings of the curves, which take a good part of one


def describe_run(trainer, dataset, content):
    """Print what is trained on what, from where, and what of the schedule lies beyond the run."""
    args, config = trainer.args, trainer.raw_model.config
    goal = f"from epoch {trainer.epoch + 1}, iteration {trainer.step + 1}" if content else f"to {args.out}"
    sets = args.data + [f"{path} (unlabelled)" for path in args.unlabelled or []]
    print(f"{' + '.join(sets)}: {len(dataset):,} photos, {len(dataset.ignored):,} faces "
          f"({dataset.ignored.sum():,} ignored); an epoch is {args.repeat} passes, "
          f"{trainer.batches.total:,} batches of {args.batch_size} x {trainer.processes} processes")
    print(f"width {config.width:g}, input {config.input_width}x{config.input_height}, {trainer.device}, "
          f"{args.precision}{', compiled in the first iteration' if args.compile else ''}; {goal}")
    iterations = args.epochs * trainer.batches.total
    if args.epochs and args.warmup >= iterations:
        print(f"the run has {iterations:,} iterations, all within the warm-up of {args.warmup:,}: "
              f"--warmup {iterations // 20} fits")
    if args.epochs > 1 and args.milestones and min(args.milestones) >= args.epochs:
        fitting = sorted({round(args.epochs * share) for share in (0.6, 0.8, 0.9)} - {0, args.epochs})
        print(f"the learning rate never falls: its milestones {args.milestones} lie beyond the {args.epochs} "
              f"epochs; --milestones {' '.join(map(str, fitting))} fits")


class Monitor:
    """Records a run in its folder: one JSON line with the flags, then one per epoch."""

    def __init__(self, args, model, epoch):
        """A run resumed after `epoch` epochs loses the lines of later ones, which it will do again."""
        self.out, self.started, self.first = Path(args.out), time.perf_counter(), epoch
        self.epochs, self.drawn, self.writer = args.epochs, self.started, None
        self.lock = claim(self.out)
        self.log = self.out / "log.jsonl"
        lines = read_log(self.log) if self.log.exists() and args.resume else []
        self.lines = [line for line in lines if line.get("epoch", 0) <= epoch]
        self.write({"flags": vars(args), "parameters": sum(p.numel() for p in model.parameters()),
                    "torch": torch.__version__, "commit": git_commit()})
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs it installed: pip install tensorboard") from None
            self.writer = SummaryWriter(self.out, purge_step=epoch + 1)

    def write(self, line):
        """Add a line. The file is rewritten as a whole, so that a kill never leaves half a line."""
        self.lines.append(line)
        with whole_file(self.log) as temporary:
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.lines)
            temporary.write_text(text, encoding="utf-8")

    def epoch(self, trainer, val=None):
        """Record a Trainer's last epoch: log line, curves, a printed line, TensorBoard."""
        record = trainer.record
        self.write(record)
        if time.perf_counter() - self.drawn > REDRAWN or trainer.finished:
            draw_curves([line for line in self.lines if "epoch" in line], self.out / "curves.png")
            self.drawn = time.perf_counter()
        an_epoch = (time.perf_counter() - self.started) / (record["epoch"] - self.first)  # seconds
        left = an_epoch * (self.epochs - record["epoch"])
        accuracy = f", AP {record['AP']:.4f}, AP50 {record['AP50']:.4f}" if "AP" in record else ""
        print(f"epoch {record['epoch']}/{self.epochs}: loss {record['loss']:.4f} "
              f"(class {record['class_loss']:.3f}, box {record['box_loss']:.3f}), lr {record['lr']:.2g}"
              f"{accuracy}, {record['photos_per_second']:.0f} photos/s, {left / 60:.0f} min left", flush=True)
        if self.writer:
            for key in ("loss", "class_loss", "box_loss", "lr", "photos_per_second", "AP", "AP50"):
                if key in record:
                    self.writer.add_scalar(key, record[key], record["epoch"])
            self.picture("training", training_sheet(trainer), record["epoch"])
            if val is not None:
                self.picture("validation", validation_sheet(trainer, val), record["epoch"])
            self.writer.flush()

    def close(self):
        """Let another run write in the folder."""
        self.lock.close()
        if self.writer:
            self.writer.close()

    def picture(self, name, image, epoch):
        """Add a picture to TensorBoard."""
        self.writer.add_image(name, np.asarray(image), epoch, dataformats="HWC")


def read_log(path):
    """Read the lines of a log.jsonl as dicts. Raises InputError if the file is not such a log."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no object")
        return lines
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a training log ({error})") from None


def draw_curves(records, path):
    """Draw losses, accuracy and learning rate over the epochs of a log to the PNG `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    panels = {"loss": ("loss", "class_loss", "box_loss"), "AP on --val": ("AP", "AP50"),
              "learning rate": ("lr",)}
    if not any("AP" in record for record in records):
        del panels["AP on --val"]
    figure = Figure(figsize=(3.2 * len(panels), 3.2))
    figure.subplots_adjust(left=0.2 / len(panels), right=0.98, bottom=0.15, top=0.9, wspace=0.35)
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        for key in keys:
            points = [(record["epoch"], record[key]) for record in records if key in record]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None, label=key)
        axes.set(title=title, xlabel="epoch", xlim=(0.5, records[-1]["epoch"] + 0.5),
                 yscale="log" if title == "learning rate" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def training_sheet(trainer):
    """Training photos as the network sees them: faces green, ignored ones orange, positive anchors yellow."""
    dataset, pictures = trainer.loader.dataset, []
    items = [dataset[index, None if trainer.args.no_augment else (trainer.args.seed, trainer.epoch, place)]
             for place, index in enumerate(
                 np.random.default_rng(trainer.epoch).permutation(len(dataset))[:PICTURES])]
    batch = collate(items).to(trainer.device)
    with torch.no_grad():
        outputs = (trainer.ema or trainer.raw_model).eval()(to_input(batch.images))
    labels, _ = trainer.criterion.match(outputs, batch)
    for item, own in zip(items, labels):
        image = draw_faces(to_image(item.picture), trainer.anchors[own == 1].cpu(), colour=FALSE)
        image = draw_faces(image, item.faces[~item.ignored])
        pictures.append(draw_faces(image, item.faces[item.ignored], colour=IGNORED))
    return contact_sheet(pictures)


def validation_sheet(trainer, annotations):
    """Draw the first validation photos with the faces that the model finds at a score of 0.4 or more."""
    detector, pictures = TorchDetector(trainer.ema or trainer.raw_model, device=trainer.device), []
    for index in range(min(PICTURES, len(annotations.ids))):
        image = load_picture(annotations.file(index))
        faces = detect(detector, image)
        faces = faces[faces[:, 4] >= 0.4]
        pictures.append(draw_faces(image, faces[:, :4], faces[:, 4]))
    return contact_sheet(pictures)
