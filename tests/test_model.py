"""Tests of model.py: number of parameters, shapes, and every kind of weight file."""

import math
from pathlib import Path

import pytest
import torch
from torchvision.models import mobilenet_v2

from model import (HAND_DESIGNED, SSD, Config, checkpoint, folded, grid_size, load_imagenet, load_model,
                   load_weights)


@pytest.mark.parametrize("width, height", [(300, 300), (320, 240), (65, 17), (16, 16)])
def test_one_row_per_anchor_for_any_input(width, height):
    config = Config(width, height, width=0.25)
    logits, offsets = SSD(config).eval()(torch.rand(2, 3, height, width))
    columns, rows = grid_size(*config.input_size)
    assert logits.shape == (2, columns * rows * 9, 2) and offsets.shape == (2, columns * rows * 9, 4)


def test_rows_are_cells_row_major_with_the_anchor_fastest():
    model = SSD(Config.scaled_from_300(64, 48, width=0.25)).eval()
    features = torch.zeros(1, model.backbone.channels, 3, 4)
    features[0, :, 2, 0] = 1  # one bright cell: row 2, column 0
    quiet, bright = (model.bbox_head(f)[1].view(3, 4, 36) for f in (torch.zeros_like(features), features))
    changed = (quiet != bright).any(-1).nonzero().tolist()
    assert changed == [[1, 0], [1, 1], [2, 0], [2, 1]]  # its 3 x 3 neighbourhood


def test_a_batch_gives_what_single_images_give(small):
    images = torch.rand(5, 3, 48, 64)
    singles = [small(image[None]) for image in images]
    for n, batch in enumerate(small(images)):
        expected = torch.cat([outputs[n] for outputs in singles])
        torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)


def test_folded_answers_as_the_network_with_the_norms_in_its_convolutions():
    model = SSD(Config(64, 48, 0.25)).eval()
    for name, values in model.state_dict().items():
        if values.ndim == 1 and "loss" not in name:
            values.uniform_(0.5, 1.5)
    images, fold = torch.rand(2, 3, 48, 64), folded(model)
    assert [type(module) for module in fold.modules()].count(torch.nn.BatchNorm2d) == 1
    for mine, its in zip(fold(images), model(images)):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_initial_values():
    """Backbone: Kaiming, fan out, deviation sqrt(2 / outputs). Head: Xavier, up to sqrt(6 / (in + out))."""
    model = SSD()
    assert not model.bbox_head.loss_weights.any()
    assert not model.bbox_head.cls_convs[0][3].bias.any()
    weight = model.backbone.features[16].conv[6].weight.detach()
    assert weight.std() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.05)
    weight = model.bbox_head.reg_convs[0][3].weight.detach().abs()
    bound = (6 / sum(weight.shape[:2])) ** 0.5
    assert 0.99 * bound < weight.max() <= bound and weight.mean() == pytest.approx(bound / 2, rel=0.05)


def test_a_checkpoint_rebuilds_its_model_without_flags(tmp_path, small):
    config = Config(80, 64, 0.5, ((5, 7), (20, 30)))
    model = SSD(config).eval()
    torch.save(checkpoint(model, epoch=3), tmp_path / "x.pth")
    loaded = load_model(tmp_path / "x.pth")
    image = torch.rand(1, 3, 64, 80)
    assert loaded.config == config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model(image), loaded(image)))


@pytest.mark.parametrize("wrong", [
    {"input_width": 15}, {"input_height": 8193}, {"input_width": 64.5}, {"width": 0.06}, {"width": 8.1},
    {"anchors": ()}, {"anchors": ((9, 9),) * 101}, {"anchors": ((9, 0.9),)}, {"anchors": ((9, math.inf),)}])
def test_configurations_that_no_memory_would_hold_are_refused(wrong):
    Config(16, 8192, 1 / 16, ((1, 1),) * 100)
    with pytest.raises(ValueError, match="expected"):
        Config(**wrong)


def test_averaged_weights_are_preferred(tmp_path, small):
    averaged = {name: torch.full_like(tensor, 2) for name, tensor in small.state_dict().items()}
    torch.save(checkpoint(small, ema=averaged), tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth").bbox_head.loss_weights.tolist() == [2, 2]


def test_official_layout(tmp_path):
    """A checkpoint of the reference has no Config of ours; the width is known from the shapes."""
    model = SSD(Config(width=1.0))
    torch.save({"meta": {"config": "text"}, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth").config == Config(width=1.0)


def test_load_weights_tells_what_did_not_fit(tmp_path, small):
    torch.save(checkpoint(small), tmp_path / "x.pth")
    fewer = SSD(Config(64, 48, 0.25, HAND_DESIGNED[:4]))
    unfit = load_weights(fewer, tmp_path / "x.pth")
    assert unfit == [f"bbox_head.{branch}_convs.0.3.{kind}"
                     for branch in ("reg", "cls") for kind in ("weight", "bias")]
    assert torch.equal(fewer.backbone.features[5].conv[0].weight, small.backbone.features[5].conv[0].weight)


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5])
def test_imagenet_weights_are_cut_to_width(tmp_path, width):
    source = mobilenet_v2(weights=None)
    for module in source.modules():  # give the statistics other values than the defaults
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    torch.save(source.state_dict(), tmp_path / "imagenet.pth")
    model = SSD(Config(width=width))
    last = model.backbone.features[17].conv[0].weight.clone()
    load_imagenet(model, tmp_path / "imagenet.pth")
    for ours, theirs in ((model.backbone.features[0][0], source.features[0][0]),
                         (model.backbone.features[1].conv[3], source.features[1].conv[1]),
                         (model.backbone.features[16].conv[6], source.features[16].conv[2])):
        out, inside = ours.weight.shape[:2]
        assert torch.equal(ours.weight, theirs.weight[:out, :inside])
    own = model.backbone.features[9].conv[4].running_mean
    assert torch.equal(own, source.features[9].conv[1][1].running_mean[:len(own)])
    assert torch.equal(model.backbone.features[17].conv[0].weight, last)


def test_imagenet_errors(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        load_imagenet(SSD(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--pretrained FILE"):
        load_imagenet(SSD(), tmp_path / "absent.pth")
    torch.save(mobilenet_v2(weights=None).state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match="width 1.0"):
        load_imagenet(SSD(Config(width=1.25)), tmp_path / "imagenet.pth")


@pytest.mark.parametrize("name, width, parameters", [
    ("face_ssd300.pth", 0.75, 1_033_670), ("face_ssd300_0.5.pth", 0.5, 481_150),
    ("face_ssd300_1.0.pth", 1.0, 1_794_174)])
def test_the_shipped_networks(name, width, parameters):
    path = Path(__file__).parents[1] / "weights" / name
    model = load_model(path)
    assert model.config == Config(width=width) and path.stat().st_size < 8e6
    assert sum(p.numel() for p in model.parameters()) == parameters
