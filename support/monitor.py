"""Record a training run: what it prints, log.jsonl, the curves drawn from it."""

import json
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.script import InputError, git_commit, one_line, whole_file

REDRAWN = 10   # seconds between drawings of the curves, which take a good part of one
READ = 1       # seconds between readings of the loss: a GPU has to be waited for each time
PRINTED = 60   # seconds between the lines of an epoch where there is no terminal


def describe_run(trainer, dataset, content):
    """Print what is trained on what, and from where."""
    args = trainer.args
    config = trainer.raw_model.config
    goal = f"from epoch {trainer.epoch + 1}, iteration {trainer.step + 1}" if content else f"to {args.out}"
    sets = args.data + [f"{path} (unlabelled)" for path in args.unlabelled or []]
    print(f"{' + '.join(sets)}: {len(dataset):,} photos, {len(dataset.ignored):,} faces "
          f"({dataset.ignored.sum():,} ignored); an epoch is {args.repeat} passes, "
          f"{trainer.batches.total:,} batches of {args.batch_size} x {trainer.processes} processes")
    print(f"width {config.width:g}, input {config.input_width}x{config.input_height}, {trainer.device}, "
          f"{args.precision}{', compiled in the first iteration' if args.compile else ''}; {goal}")
    if args.milestones and min(args.milestones) >= args.epochs > 1:
        print(f"the learning rate never falls: its --milestones {args.milestones} lie beyond the "
              f"{args.epochs} epochs")


class Progress:
    """What a running epoch shows: a bar on a terminal, elsewhere a line a minute. Counts photos and seconds.

    The loss is read once a second and checked: `check_finite` raises where it is not finite."""

    def __init__(self, trainer, check_finite):
        self.trainer, self.check_finite = trainer, check_finite
        self.batches = len(trainer.batches)  # of this epoch, that are left
        self.photos = self.steps = 0
        self.began = self.read = self.printed = time.perf_counter()
        self.title = f"epoch {trainer.epoch + 1}/{trainer.args.epochs}"
        self.bar = tqdm(total=self.batches, desc=self.title, leave=False, disable=trainer.rank > 0 or None)

    def show(self, photos, losses, rate):
        """Count a step of `photos` in this process; show its losses `[3]` and the rate when it is time to."""
        trainer = self.trainer
        self.photos += photos * trainer.processes
        self.steps += 1
        self.bar.update()
        now = time.perf_counter()
        if now - self.read < READ:
            return
        self.read = now
        loss = self.check_finite(losses)
        seconds = now - self.began
        text = f"loss {loss:.3f}, lr {rate:.2g}, {self.photos / seconds:.0f} photos/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable and trainer.rank == 0 and now - self.printed >= PRINTED:
            self.printed = now
            epochs = trainer.args.epochs - trainer.epoch - 1
            left = self.batches - self.steps + epochs * trainer.batches.total
            print(f"{self.title}: {self.photos:,} photos, {self.steps / self.batches:.0%}, {text}, "
                  f"{left * seconds / self.steps / 60:.0f} min left", flush=True)

    def close(self):
        """Take the bar away: (photos, seconds) of the epoch since this process began."""
        self.bar.close()
        return self.photos, time.perf_counter() - self.began


class Monitor:
    """Records a run in its folder: one JSON line with the flags, then one per epoch."""

    def __init__(self, args, model, epoch, photos):
        """A run resumed after `epoch` epochs, of so many `photos`, loses the lines of later ones."""
        self.out, self.epochs, self.photos = Path(args.out), args.epochs, photos
        self.drawn = time.perf_counter()
        self.undrawn = False  # whether drawing has failed: it is not tried again
        self.lock = claim(self.out)
        self.log = self.out / "log.jsonl"
        lines = read_log(self.log) if self.log.exists() and args.resume else []
        self.lines = [line for line in lines if line.get("epoch", 0) <= epoch]
        self.write({"flags": vars(args), "parameters": sum(p.numel() for p in model.parameters()),
                    "torch": torch.__version__, "commit": git_commit()})

    def write(self, line):
        """Add a line. The file is rewritten as a whole, so that a kill never leaves half a line."""
        self.lines.append(line)
        with whole_file(self.log) as temporary:
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.lines)
            temporary.write_text(text, encoding="utf-8")

    def epoch(self, record, finished):
        """Record an epoch: log line, printed line, curves. What draws never ends a training."""
        self.write(record)
        speed = record["photos_per_second"]
        left = (self.epochs - record["epoch"]) * self.photos / speed if speed else 0  # nothing was left to do
        accuracy = f", AP {record['AP']:.4f}, AP50 {record['AP50']:.4f}" if "AP" in record else ""
        print(f"epoch {record['epoch']}/{self.epochs}: loss {record['loss']:.4f} "
              f"(class {record['class_loss']:.3f}, box {record['box_loss']:.3f}), lr {record['lr']:.2g}"
              f"{accuracy}, {speed:.0f} photos/s, {left / 60:.0f} min left", flush=True)
        if self.undrawn or not finished and time.perf_counter() - self.drawn < REDRAWN:
            return
        try:
            draw_curves([line for line in self.lines if "epoch" in line], self.out / "curves.png")
        except Exception as error:  # matplotlib absent, a font broken, a disk full
            self.undrawn = True
            print(f"curves.png is not drawn, the training goes on: {one_line(error)}", flush=True)
        self.drawn = time.perf_counter()


def claim(out):
    """Lock the folder of a run while the returned file is open. What a killed run left half-written goes.

    lockf, not flock: loading processes, which outlive a killed run by seconds, do not inherit its locks."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{out}: another run is writing there; let it end, "
                         "or name another folder with --out") from None
    except (ImportError, OSError):
        return file  # Windows, or a file system without locks
    for left in out.iterdir():
        if re.fullmatch(r"\.(last|best|log|curves)\.\d+\.\w+", left.name):  # script.whole_file's names
            left.unlink(missing_ok=True)
    return file


def read_log(path):
    """The lines of a log.jsonl as dicts. Raises InputError if the file is not such a log."""
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a training log ({error})") from None


def draw_curves(records, path):
    """Draw losses, accuracy and learning rate over the epochs of a log to the PNG `path`."""
    from matplotlib.figure import Figure
    panels = {"loss": ("loss", "class_loss", "box_loss"), "learning rate": ("lr",)}
    if any("AP" in record for record in records):
        panels["AP on --val"] = ("AP", "AP50")
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        for key in keys:
            points = [(record["epoch"], record[key]) for record in records if key in record]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None, label=key)
        axes.set(title=title, xlabel="epoch", yscale="log" if title == "learning rate" else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
