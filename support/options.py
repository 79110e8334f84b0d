"""The flags of train.py: what they are, and which values make sense."""

import math
from argparse import BooleanOptionalAction

from support.script import ROOT, FlagFileParser, parse_sides, parse_size
from support.threads import usable_cores

DATA = "data/train.json"


def make_parser(description=None):
    """The flags. What shapes the weights defaults to None: a checkpoint decides, or else the reference."""
    parser = FlagFileParser(description)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help=f"COCO json to train on, or several (default {DATA})")
    add("--unlabelled", nargs="+", metavar="PHOTOS",
        help="COCO json of more photos, whose boxes are not used: the teacher alone says what is on them")
    add("--val", help="COCO json to validate on, or none (default: the val.json beside the one train.json)")
    add("--min-face", type=int, default=17,
        help="ignore faces with a side below this, in the photo (default 17 px)")
    add("--min-size", type=float, default=0, metavar="PX",
        help="ignore faces with a side below this at the network's input, as augmented (default 0 px)")
    add("--complete", nargs="+", default=[], metavar="JSON",
        help="those of --data whose labels are complete: there the teacher corrects nothing")
    add("--own-shape", type=float, default=0, metavar="SHARE",
        help="of the views that are crops of the photo's own shape, for photos of many faces (default 0)")
    add("--no-augment", action="store_true", help="show the photos as they are")
    add("--repeat", type=int, default=2, help="passes in an epoch (default 2)")
    add("--max-unreadable", type=int, default=10, help="stop at more unreadable photos (default 10)")
    add = parser.add_argument_group("model and starting point").add_argument
    add("--size", type=parse_size, help="network input, S or WxH (default 300, or the checkpoint's)")
    add("--width", type=float, help="channel multiplier (default 0.75, or the checkpoint's)")
    add("--anchors", type=parse_sides, nargs="+", metavar="WxH",
        help="anchors for 300x300 (see tools.fit_anchors)")
    add("--pretrained", nargs="?", const="", metavar="PATH",
        help="ImageNet backbone: torchvision's, or in PATH")
    add("--load-from", nargs="?", const=str(ROOT / "weights/face_ssd300.pth"), metavar="CHECKPOINT",
        help="start from a detector's weights (named without a value: the shipped ones)")
    add("--distill", type=float, nargs=2, metavar=("SCORES", "BOXES"),
        help="learn from a teacher too, and forget less: weights of its scores where no face is labelled, "
             "and of its boxes (default off; begin with 0.3 0.4)")
    add("--teacher", nargs="+", metavar="CHECKPOINT[@SIZE]",
        help="who teaches: networks with the same anchors, of any width, at SIZE or WxH if given, such as "
             "start.pth@480; the mean of several (default --load-from)")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default OUT/last.pth)")
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, default=70, help="default 70")
    add("--batch-size", type=int, default=65, help="photos per process (default 65)")
    add("--lr", type=float, default=0.05,
        help="learning rate (default 0.05). It and --warmup stay as they are for N processes, whose batch is "
             "N times as large; often used then: --lr 0.05 x N, --warmup 1200 / N")
    add("--milestones", type=int, nargs="*", default=[40, 55, 65],
        help="epochs at which lr is divided by 10 (default 40 55 65)")
    add("--warmup", type=int,
        help="iterations from lr / 3 to lr (default 1200, or four epochs if that is less)")
    add("--momentum", type=float, default=0.9, help="default 0.9")
    add("--weight-decay", type=float, default=5e-4, help="default 5e-4")
    add("--clip", type=float, help="greatest norm of the gradient (default: any)")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="average weights, as 0.999 (default off)")
    add("--freeze-bn", action="store_true", help="keep batch-norm statistics as they are")
    add("--patience", type=int, metavar="N",
        help="stop after N validated epochs in a row without a better AP50 (default: all epochs are trained)")
    add("--seed", type=int, default=0, help="default 0")
    add = parser.add_argument_group("loss").add_argument
    add("--matching", choices=("iou", "aligned"), default="iou",
        help="which anchors learn a face: those of IoU 0.4, or the 9 that answer best for it (default iou)")
    add("--class-loss", choices=("cross-entropy", "quality-focal"), default="cross-entropy",
        help="cross-entropy with hard negatives, or quality focal loss: a score is to be its box's IoU "
             "(default cross-entropy)")
    add("--box-loss", choices=("smooth-l1", "eiou"), default="smooth-l1",
        help="smooth L1 of the offsets, or EIoU of the boxes (default smooth-l1)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/face", help="folder of the run (default %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=("fp32", "bf16"),
        help="default bf16 on a GPU and on a CPU that computes in it, else fp32")
    add("--workers", type=int, help="loading processes for each process (default: share the cores)")
    add("--cache", metavar="FOLDER",
        help="keep the photos there, reduced and decoded: faster from the second epoch on (0.6 MB a photo)")
    add("--save-every", type=int, default=500, help="iterations between saves in an epoch (default 500)")
    add("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs")
    add("--compile", action=BooleanOptionalAction,
        help="torch.compile the network (default: on a CPU, in one process, if an epoch is long enough)")
    add("--tensorboard", action="store_true", help="also write TensorBoard events (pip install tensorboard)")
    return parser


def parse_args(argv, description=None):
    """Parse and check the flags. `description` is what --help shows above them."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    least = {"epochs": 0, "batch_size": 1, "repeat": 1, "warmup": 0, "save_every": 1, "workers": 0,
             "max_unreadable": 0, "patience": 1, "seed": 0}
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}")
    rates = 0 < args.lr < math.inf and 0 <= args.ema < 1 and 0 <= args.weight_decay < math.inf
    if not rates or (args.clip is not None and not 0 < args.clip < math.inf):
        parser.error("--lr and --clip must be above 0, --ema in [0, 1), --weight-decay 0 or more")
    if not 0 <= args.momentum < 1 or args.seed >= 2 ** 32 or not 0 <= args.min_size < math.inf:
        parser.error("--momentum must be in [0, 1), --seed below 2 to the 32, --min-size 0 or more")
    if not 0 <= args.own_shape <= 1:
        parser.error("--own-shape must be in [0, 1]")
    if not set(args.complete) <= set(args.data or [DATA]):
        parser.error("--complete names files of --data")
    if args.distill and not all(0 <= weight < math.inf for weight in args.distill):
        parser.error("--distill takes weights of 0 or more")
    if args.distill and not (args.load_from or args.teacher):
        parser.error("--distill needs a network to learn from: --load-from or --teacher")
    if (args.teacher or args.unlabelled) and not args.distill:
        parser.error("--teacher and --unlabelled need weights of what is learned: --distill 0.3 0.4")
    args.data = args.data or [DATA]
    if args.workers is None:
        args.workers = usable_cores()
    return args


def report_changes(args, content):
    """Print which flags differ from those of the checkpoint that is resumed. They are what is used."""
    before = content["flags"]
    silent = {"resume", "out", "workers", "device", "size", "width", "anchors", "pretrained"}
    if args.teacher or not args.distill:
        silent.add("load_from")  # else it is the teacher
    for key in sorted((vars(args).keys() & before.keys()) - silent):
        now = getattr(args, key)
        if now != before[key]:
            print(f"resumed with --{key.replace('_', '-')} {now}, it was {before[key]}")
