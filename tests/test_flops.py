"""Tests of flops.py: the published figures, and agreement with PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flops
from model import SSD, Config


@pytest.mark.parametrize("width, parameters, convolution, everything", [
    (0.75, 1_033_670, 480_132_828, 511_685_790), (1.0, 1_794_174, 827_918_128, 869_802_246)])
def test_published_figures(width, parameters, convolution, everything):
    rows = flops.count(SSD(Config(width=width)), 300, 300)
    assert sum(row["convolution"] for row in rows) == convolution
    assert sum(row["all"] for row in rows) == everything
    assert sum(row["parameters"] for row in rows) == parameters - 2  # the two loss weights belong to no layer


@pytest.mark.parametrize("width, size", [(0.5, (320, 240)), (1.3, (65, 130))])
def test_agrees_with_torchs_own_counter(width, size):
    model = SSD(Config(width=width)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, *size[::-1]))
    assert 2 * sum(row["convolution"] for row in flops.count(model, *size)) == counter.get_total_flops()


def test_command(capsys, tmp_path, refused):
    flops.main([])
    out = capsys.readouterr().out
    assert all(figure in out for figure in ("1,033,670", "480,132,828", "511,685,790", "0.51 G", "1.03 M"))
    assert "no such" in refused(flops.main, "--model", tmp_path / "absent.pth").lower()
    assert "expected" in refused(flops.main, "--size", "abc")
