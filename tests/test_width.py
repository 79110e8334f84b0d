"""Tests of tools.width: a trained network cut or widened."""

import pytest
import torch
from torch import nn

from model import SSD, Config, checkpoint, load_model
from tools.width import channel_groups, main, resize


@pytest.fixture
def trained():
    """A small network whose batch norms are not those of a new one."""
    model = SSD(Config(64, 48, 0.25))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.3)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2)
    return model.eval()


def answers(model, images):
    with torch.no_grad():
        return torch.cat(model.eval()(images), -1)


def test_a_wider_network_starts_as_the_narrow_one_and_all_of_it_learns(trained):
    images = torch.rand(2, 3, 48, 64)
    wider = resize(trained, Config(64, 48, 0.4))
    assert torch.allclose(answers(wider, images), answers(trained, images), atol=1e-4)
    for own, norm in zip(wider.modules(), trained.modules()):  # added ones are no louder
        if isinstance(norm, nn.BatchNorm2d):
            assert torch.allclose(own.weight.mean(), norm.weight.mean())
    layer = wider.backbone.features[3].conv[0]
    before = layer.weight.clone()
    for _ in range(2):  # the first step is that of the next layer, which did not read the added channels
        wider.train()(images)[0][..., 1].mean().backward()
        torch.optim.SGD(wider.parameters(), 0.1).step()
    assert (layer.weight != before).flatten(1).any(1).all()


def test_the_groups_hold_every_channel_once(trained):
    """Each layer's rows are moved by one group, each convolution's columns as well."""
    made = [id(layer) for _, layers, _ in channel_groups(trained) for layer in layers]
    heard = [id(layer) for _, _, layers in channel_groups(trained) for layer in layers]
    layers = [layer for layer in trained.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    outputs = {id(branch[3]) for branch in (*trained.bbox_head.cls_convs, *trained.bbox_head.reg_convs)}
    photo = {id(trained.backbone.bn_first)}
    assert sorted(made) == sorted({id(layer) for layer in layers} - outputs - photo)
    mixing = {id(layer) for layer in layers if isinstance(layer, nn.Conv2d) and layer.groups == 1}
    assert sorted(heard) == sorted(mixing - {id(trained.backbone.features[0][0])})
    for importance, layers, readers in channel_groups(trained):
        assert {len(layer.weight) for layer in layers} == {len(importance)}
        assert {layer.weight.shape[1] for layer in readers} == {len(importance)}


def test_a_cut_network_keeps_what_matters(trained):
    """Channels that nobody reads are the ones that go: without them it computes the same."""
    narrow = Config(64, 48, 0.125)
    kept = [len(importance) for importance, _, _ in channel_groups(SSD(narrow))]
    for (importance, _, readers), number in zip(channel_groups(trained), kept):
        useless = torch.randperm(len(importance))[number:]
        with torch.no_grad():
            for reader in readers:
                reader.weight[:, useless] = 0
    images = torch.rand(2, 3, 48, 64)
    assert torch.allclose(answers(resize(trained, narrow), images), answers(trained, images), atol=1e-4)


def test_the_command(tmp_path, capsys, refused):
    torch.save(checkpoint(SSD(Config(64, 48, 0.25))), tmp_path / "a.pth")
    main([str(tmp_path / "a.pth"), "0.125", str(tmp_path / "b.pth")])
    assert load_model(tmp_path / "b.pth").config.width == 0.125
    assert "from width 0.25 to 0.125" in capsys.readouterr().out
    for name in ("c.pth", "d.pth"):
        main([str(tmp_path / "a.pth"), "0.4", str(tmp_path / name)])
    assert (tmp_path / "c.pth").read_bytes() == (tmp_path / "d.pth").read_bytes()
    assert "is of width 0.25 already" in refused(main, tmp_path / "a.pth", 0.25, tmp_path / "e.pth")
    assert "between 0.0625 and 8" in refused(main, tmp_path / "a.pth", 99, tmp_path / "e.pth")
