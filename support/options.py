"""Flags: types that check a value, those that choose a network to use, and all flags of train.py."""

import math
from argparse import Action, ArgumentTypeError, BooleanOptionalAction

from support.script import ROOT, FlagFileParser, parse_sides, parse_size
from support.threads import usable_cores, use_threads


def number(kind, fits, words):
    """An argparse type: a number of `kind` (int or float) that `fits`; `words` say which those are."""
    def parse(text):
        value = kind(text)
        if not fits(value):
            raise ArgumentTypeError(f"{text} is not {words}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def at_least(bound):
    """An argparse type: a whole number of at least `bound`."""
    return number(int, lambda value: value >= bound, f"at least {bound}")


POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0")
WEIGHT = number(float, lambda value: 0 <= value < math.inf, "0 or more")
DECAY = number(float, lambda value: 0 <= value < 1, "in [0, 1)")
SHARE = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
SEED = number(int, lambda value: 0 <= value < 2 ** 32, "from 0 to below 2 to the 32")


class TilesFlag(Action):
    """`--tiles SIDE [OVERLAP]` as [side, overlap] in pixels of the picture."""

    def __call__(self, parser, namespace, values, option=None):
        side, overlap = [*values, values[0] // 4][:2]
        if len(values) > 2 or side < 16 or not 0 <= overlap <= side * 3 // 4:
            parser.error(f"{option}: SIDE of at least 16 pixels and OVERLAP of at most three quarters of it")
        setattr(namespace, self.dest, [side, overlap])


def add_model_flags(parser):
    """Add the flags that choose the network that detects, and its input."""
    add = parser.add_argument
    add("--model", help="a checkpoint, .onnx or .xml (default: the shipped network)")
    add("--size", type=parse_size, help="network input, S or WxH (default: the model's own)")
    add("--tiles", action=TilesFlag, nargs="+", type=int, metavar=("SIDE", "OVERLAP"),
        help="also look at overlapping tiles of SIDE pixels of the picture (OVERLAP: default SIDE / 4)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--threads", type=use_threads, help="of the CPU (default: the cores this process may use)")
    add("--colour", choices=("rgb", "bgr"), help="what an .onnx or .xml not from export.py takes")
    add("--range", type=int, choices=(1, 255), help="white in the input of such a model")


def parse_args(argv, description=None):
    """Parse and check the flags of train.py. `description` is what --help shows above them.

    What shapes the weights defaults to None: a checkpoint decides, or else the reference."""
    parser = FlagFileParser(description, fromfile_prefix_chars="@")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["data/train.json"], help="COCO files (default data/train.json)")
    add("--unlabelled", nargs="+", metavar="JSON", help="COCO files of photos that a teacher labels")
    add("--val", help="COCO json to validate on, or none (default: the val.json beside the one train.json)")
    add("--min-face", type=int, default=17, help="ignore faces with a side below, in the photo (default 17)")
    add("--min-size", type=WEIGHT, default=0, metavar="PX", help="the same at the network's input (0)")
    add("--complete", nargs="+", default=[], metavar="JSON", help="those of --data that no teacher corrects")
    add("--own-shape", type=SHARE, default=0, help="share of crops of the photo's own shape (default 0)")
    add("--no-augment", action="store_true", help="show the photos as they are")
    add("--repeat", type=at_least(1), default=2, help="passes in an epoch (default 2)")
    add("--max-unreadable", type=at_least(0), default=10, help="stop at more unreadable photos (default 10)")
    add = parser.add_argument_group("model and starting point").add_argument
    add("--size", type=parse_size, help="network input, S or WxH (default 300, or the checkpoint's)")
    add("--width", type=float, help="channel multiplier (default 0.75, or the checkpoint's)")
    add("--anchors", type=parse_sides, nargs="+", metavar="WxH", help="for 300x300 (see tools.fit_anchors)")
    add("--pretrained", nargs="?", const="", metavar="PATH", help="ImageNet backbone: torchvision's, or PATH")
    add("--load-from", nargs="?", const=str(ROOT / "weights/face_ssd300.pth"), metavar="CHECKPOINT",
        help="start from a detector's weights (without a value: the shipped ones)")
    add("--distill", type=WEIGHT, nargs=2, metavar=("SCORES", "BOXES"),
        help="learn from a teacher too: weights of its scores and boxes (default off; begin with 0.3 0.4)")
    add("--teacher", nargs="+", metavar="CHECKPOINT[@SIZE]",
        help="networks with the same anchors that teach, such as a.pth@480 (default --load-from)")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default OUT/last.pth)")
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=at_least(0), default=70, help="default 70")
    add("--batch-size", type=at_least(1), default=65, help="photos per process (default 65)")
    add("--lr", type=POSITIVE, default=0.05,
        help="learning rate (default 0.05); often used with N processes: 0.05 x N, --warmup 1200 / N")
    add("--milestones", type=int, nargs="*", default=[40, 55, 65],
        help="epochs at which lr is divided by 10 (default 40 55 65)")
    add("--warmup", type=at_least(0), help="iterations from lr / 3 to lr (default 1200, or 4 epochs if less)")
    add("--momentum", type=DECAY, default=0.9, help="default 0.9")
    add("--weight-decay", type=WEIGHT, default=5e-4, help="default 5e-4")
    add("--clip", type=POSITIVE, help="greatest norm of the gradient (default: no limit)")
    add("--ema", type=DECAY, default=0.0, metavar="DECAY", help="average weights, as 0.999 (default off)")
    add("--freeze-bn", action="store_true", help="keep batch-norm statistics as they are")
    add("--patience", type=at_least(1), metavar="N", help="stop after N epochs without a better AP50")
    add("--seed", type=SEED, default=0, help="default 0")
    add = parser.add_argument_group("loss").add_argument
    add("--matching", choices=("iou", "aligned"), default="iou",
        help="anchors that learn a face: those of IoU 0.4, or the 9 with best score and box (default iou)")
    add("--class-loss", choices=("cross-entropy", "quality-focal"), default="cross-entropy",
        help="with hard negatives, or quality focal loss: a score is its box's IoU (default cross-entropy)")
    add("--box-loss", choices=("smooth-l1", "eiou"), default="smooth-l1",
        help="smooth L1 of the offsets, or EIoU of the boxes (default smooth-l1)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/face", help="folder of the run (default %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU or a CPU that computes in it")
    add("--workers", type=at_least(0), default=usable_cores(),
        help="loading processes of each process (default: the cores it may use)")
    add("--threads", type=at_least(1), help="of the training step (default: OMP_NUM_THREADS, or the cores)")
    add("--cache", metavar="FOLDER", help="keep the photos there, decoded: faster from epoch 2 on")
    add("--save-every", type=at_least(1), default=500, help="iterations between saves (default 500)")
    add("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs")
    add("--compile", action=BooleanOptionalAction,
        help="torch.compile the network (default: on a CPU, in one process, if the run is long enough)")
    args = parser.parse_args(argv)
    if not set(args.complete) <= set(args.data):
        parser.error("--complete names files of --data")
    if args.cache and args.no_augment:
        parser.error("--cache is for augmented photos, without --no-augment")
    if args.distill and not (args.load_from or args.teacher):
        parser.error("--distill needs a network to learn from: --load-from or --teacher")
    if (args.teacher or args.unlabelled) and not args.distill:
        parser.error("--teacher and --unlabelled need weights of what is learned: --distill 0.3 0.4")
    return args


def report_changes(args, content):
    """Print which flags differ from those of the checkpoint that is resumed. They are what is used."""
    before = content["flags"]
    silent = {"resume", "out", "workers", "threads", "device", "size", "width", "anchors", "pretrained"}
    if args.teacher or not args.distill:
        silent.add("load_from")  # else it is the teacher
    for key, now in vars(args).items():
        if key not in silent and now != before.get(key, now):
            print(f"resumed with --{key.replace('_', '-')} {now}, it was {before[key]}")
