"""The network: MobileNetV2 (width 0.75) with one SSD head, 1.03 M parameters, 0.51 GMACs at 300 x 300.

Parameter names are those of the official training snapshots, so theirs and ours load without a mapping. This
file imports nothing of this repository: copy it, and `load_model` works elsewhere.
"""

import copy
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDE = 16  # input pixels per cell of the only feature map

# Widths and heights of the anchors, pixels of a 300 x 300 input, hand-designed by the reference system.
HAND_DESIGNED = ((9.4, 15.0), (25.1, 39.6), (14.7, 25.5), (34.7, 63.2), (143.0, 227.5), (77.4, 162.9),
                 (128.8, 124.5), (51.1, 105.1), (75.6, 72.6))

# MobileNetV2 (Sandler et al. 2018, table 2) as the reference system changed it: the sixth row keeps stride 1,
# so that the map stays at 1/16, and the last row is 4, 480 where the paper has 6, 320.
ROWS = (
    # expansion t, channels c, blocks n, stride s
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 1),
    (4, 480, 1, 1),
)


def grid_size(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of the grid, the feature map's cells, for an input of `width` x `height` pixels."""
    return math.ceil(width / STRIDE), math.ceil(height / STRIDE)


@dataclass(frozen=True)
class Config:
    """What shapes the weights; saved with them, so that a checkpoint rebuilds its model without flags."""
    input_width: int = 300
    input_height: int = 300
    width: float = 0.75                # multiplies every channel count
    anchors: tuple = HAND_DESIGNED     # (width, height) in pixels of the network input

    def __post_init__(self):
        object.__setattr__(self, "anchors", tuple((float(w), float(h)) for w, h in self.anchors))
        sides = [side for anchor in self.anchors for side in anchor]
        # The upper bounds are no limits of the method: a hostile file of a few bytes could fill the memory.
        if not all(isinstance(side, int) and STRIDE <= side <= 8192 for side in self.input_size):
            raise ValueError(f"input {self.input_width}x{self.input_height}: "
                             f"sides of {STRIDE} to 8192 pixels expected")
        if not 1 / 16 <= self.width <= 8:
            raise ValueError(f"width {self.width}: between 0.0625 and 8 expected")
        if not 1 <= len(self.anchors) <= 100 or not all(1 <= side < math.inf for side in sides):
            raise ValueError("anchors: 1 to 100 expected, with sides of at least a pixel of the input")

    @property
    def input_size(self) -> tuple[int, int]:
        """(width, height) of the network input."""
        return self.input_width, self.input_height

    @classmethod
    def scaled_from_300(cls, input_width: int, input_height: int, width: float = 0.75,
                        anchors=HAND_DESIGNED) -> "Config":
        """The configuration of an untrained model, whose `anchors` are given for 300 x 300 and scaled."""
        return cls(input_width, input_height, width,
                   [(w * input_width / 300, h * input_height / 300) for w, h in anchors])


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; add the input where the shapes agree."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        expand = []
        if expansion > 1:
            expand = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(
            *expand,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Images `[B, 3, H, W]`, RGB in 0-1, to features `[B, int(480 w), ceil(H / 16), ceil(W / 16)]`."""

    def __init__(self, width):
        super().__init__()
        channels = int(32 * width)
        self.bn_first = nn.BatchNorm2d(3)  # takes the place of mean and deviation in the preprocessing
        layers = [nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels),
                                nn.ReLU(inplace=True))]
        for expansion, outputs, blocks, stride in ROWS:
            for block in range(blocks):
                layers.append(
                    InvertedResidual(channels, int(outputs * width), stride if block == 0 else 1, expansion))
                channels = int(outputs * width)
        self.features = nn.Sequential(*layers)
        self.channels = channels

    def forward(self, images):
        return self.features(self.bn_first(images))


class SSDHead(nn.Module):
    """Features `[B, C, h, w]` to logits `[B, A, 2]`, offsets `[B, A, 4]`: cells row-major, anchor fastest."""

    def __init__(self, channels, anchors):
        super().__init__()
        self.reg_convs = nn.ModuleList([self._branch(channels, anchors * 4)])
        self.cls_convs = nn.ModuleList([self._branch(channels, anchors * 2)])
        self.loss_weights = nn.Parameter(torch.zeros(2))  # learned balance of class and box loss, see loss.py

    @staticmethod
    def _branch(channels, outputs):
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                             nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, outputs, 1))

    def forward(self, features):
        logits = self.cls_convs[0](features)                                        # [B, 9 * 2, h, w]
        offsets = self.reg_convs[0](features)                                       # [B, 9 * 4, h, w]
        return (logits.permute(0, 2, 3, 1).reshape(len(logits), -1, 2),             # [B, A, 2]
                offsets.permute(0, 2, 3, 1).reshape(len(offsets), -1, 4))           # [B, A, 4]


class SSD(nn.Module):
    """The detector: images `[B, 3, H, W]`, RGB in 0-1, to logits `[B, A, 2]` and offsets `[B, A, 4]`.

    The two logits are background and face; A = 9 * ceil(H / 16) * ceil(W / 16), from 16 x 16 pixels on."""

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        self.backbone = MobileNetV2(config.width)
        self.bbox_head = SSDHead(self.backbone.channels, len(config.anchors))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.bbox_head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bbox_head(self.backbone(images))


def folded(model: nn.Module) -> nn.Module:
    """A copy to detect with: the same outputs but for rounding, in half the time on a CPU.

    Each batch norm is in the weights of the convolution before it, and pixels are in the order that
    convolutions like best."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for place, (conv, norm) in enumerate(pairwise(layers)):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                layers[place], layers[place + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


def checkpoint(model: SSD, **more) -> dict:
    """What a checkpoint of ours holds: configuration, weights and `more`, all plain types and tensors."""
    return {"config": asdict(model.config), "state_dict": model.state_dict(), **more}


def read_checkpoint(path) -> dict:
    """A checkpoint's content, on the CPU. No code in it is run. Raises ValueError, one line, if damaged."""
    content = load_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path}: a checkpoint without \"state_dict\", "
                         "ours or the official snapshots' is expected")
    for key in ("ema", "state_dict"):
        require_tensors(content.get(key) or {}, f"{path}: not a checkpoint, its \"{key}\"")
    return content


def load_file(path):
    """What torch.save wrote, on the CPU. Raises ValueError, one line, if the file is absent or damaged."""
    if not os.path.isfile(path):  # opening a pipe would wait for somebody to write into it
        raise ValueError(f"{path}: not a checkpoint, there is no such file")
    try:
        fault = zip_fault(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what is refused below anyway
            content = None if fault else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # on foreign bytes the loaders raise nearly everything
        fault = "not a checkpoint, or truncated, or it holds more than tensors and plain values"
    if fault:
        raise ValueError(f"{path}: {fault}")
    return content


def zip_fault(path) -> str | None:
    """What is wrong with a checkpoint that is a zip, whose checksums torch.load does not look at."""
    if not zipfile.is_zipfile(path):  # PyTorch before 1.6 wrote none
        return None
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type for member in archive.infolist()):
            return "refused, it is compressed; torch.save does not do that"
        return "damaged, its checksums tell; copy or download it again" if archive.testzip() else None


def require_tensors(state, subject) -> None:
    """Raise ValueError, starting with `subject`, unless `state` is {name: tensor}."""
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise ValueError(f"{subject} holds other things than named tensors")


def fill(model: nn.Module, state: dict, path) -> None:
    """Load {name: tensor} into a model of these shapes. Raises ValueError if one is not finite."""
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path}: holds weights that are not finite; was it a training that diverged?")
    model.load_state_dict(state, strict=False)


def fitting(model: nn.Module, state: dict) -> dict:
    """Those of `state` {name: tensor} that `model` has too, in the same shape."""
    return {name: state[name] for name, own in model.state_dict().items()
            if name in state and state[name].shape == own.shape}


def config_of(content: dict, path="") -> Config:
    """The Config of a checkpoint's content; an official snapshot has none, there the shapes tell."""
    try:
        if "config" in content:
            return Config(**content["config"])
        state = content["state_dict"]
        anchors = HAND_DESIGNED[:len(state["bbox_head.cls_convs.0.3.weight"]) // 2]
        return Config(width=len(state["backbone.features.0.0.weight"]) / 32, anchors=anchors)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: not a checkpoint of this detector ({reason})") from None


def load_model(path) -> SSD:
    """The model of a checkpoint, ours or an official snapshot, in evaluation mode, as `rebuild` makes it."""
    return rebuild(read_checkpoint(path), path).eval()


def rebuild(content: dict, path, averaged: bool = True) -> SSD:
    """The model of a checkpoint's content, with its `averaged` weights if there are. Raises ValueError."""
    model = SSD(config_of(content, path))
    state = averaged and content.get("ema") or content["state_dict"]
    same = fitting(model, state)
    wrong = [name for name in [*state, *model.state_dict()] if name not in same]
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of this detector "
                         f"({ascii(wrong[0])[:160]} is missing, unknown or of another shape)")
    fill(model, same, path)
    return model


def load_weights(model: SSD, path) -> list[str]:
    """Start `model` from a snapshot of any shape: the names that did not fit, or ValueError if all."""
    content = read_checkpoint(path)
    same = fitting(model, content.get("ema") or content["state_dict"])
    if not any(tensor.ndim for tensor in same.values()):
        raise ValueError(f"{path}: no tensor of it fits this model")
    fill(model, same, path)
    return [name for name in model.state_dict() if name not in same]


def load_imagenet(model: SSD, path=None) -> None:
    """Start the backbone from torchvision's ImageNet MobileNetV2 (width 1.0), each tensor cut to shape.

    The last block does not fit (4, 480 for 6, 320) and stays random, as does the input's batch norm. `path`
    is a file of the weights, else torchvision downloads them. Raises ValueError if they cannot be had."""
    from torchvision.models import MobileNet_V2_Weights
    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    name = path or "the download"
    blocks = sum(row[2] for row in ROWS)  # block 0 is the stem; the last, number 17, is left out
    wanted = tuple(f"features.{n}." for n in range(blocks))
    ours = {key: tensor for key, tensor in model.backbone.state_dict().items() if key.startswith(wanted)}
    try:
        source = load_file(path) if path else weights.get_state_dict(progress=True, check_hash=True)
        require_tensors(source, "it")
        theirs = [tensor for key, tensor in source.items() if key.startswith(wanted)]
        if len(ours) != len(theirs):
            raise ValueError("other layers")
    except Exception as error:  # a download may fail in any way
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{name}: not torchvision's MobileNetV2 weights ({reason}); fetch {weights.url} "
                         "and name it, --pretrained FILE") from None
    if model.config.width > 1:
        raise ValueError("ImageNet weights are of width 1.0, they cannot fill a wider network")
    cut = {key: tensor[tuple(slice(n) for n in own.shape)]  # nested differently, but listed in the same order
           for (key, own), tensor in zip(ours.items(), theirs)}
    fill(model.backbone, cut, name)
