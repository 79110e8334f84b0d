"""Tests of tools.average: the mean of checkpoints, and what is refused."""

import pytest
import torch

from tools import average
from model import SSD, Config, checkpoint, load_model


@pytest.fixture
def two(tmp_path):
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in paths:
        torch.save(checkpoint(SSD(Config(64, 64, 0.25))), path)
    return list(map(str, paths))


@pytest.mark.parametrize("shares, first", [
    ([], 0.5), (["--shares", "1", "3"], 0.25), (["--shares", "0", "1"], 0)])
def test_the_mean_is_that_of_every_tensor(two, tmp_path, shares, first):
    average.main([*two, *shares, "--out", str(tmp_path / "mean.pth")])
    a, b, mean = (load_model(path).state_dict() for path in (*two, tmp_path / "mean.pth"))
    for key in a:
        torch.testing.assert_close(
            mean[key], first * a[key] + (1 - first) * b[key] if a[key].is_floating_point() else a[key])


def test_the_averaged_weights_of_a_run_count(two, tmp_path):
    a, b = (load_model(path) for path in two)
    torch.save(checkpoint(a, ema=b.state_dict()), tmp_path / "run.pth")
    average.main([str(tmp_path / "run.pth"), "--out", str(tmp_path / "slim.pth")])
    slim = load_model(tmp_path / "slim.pth").state_dict()
    assert all(torch.equal(slim[key], value) for key, value in b.state_dict().items())


def test_refused(two, tmp_path, refused):
    out = ["--out", str(tmp_path / "mean.pth")]
    torch.save(checkpoint(SSD(Config(64, 96, 0.25))), tmp_path / "c.pth")
    assert "c.pth: is of another architecture" in refused(average.main, *two, tmp_path / "c.pth", *out)
    assert "no-such.pth" in refused(average.main, two[0], str(tmp_path / "no-such.pth"), *out)
    for shares in (["1"], ["0", "0"], ["-1", "2"], ["nan", "1"]):
        assert "--shares takes" in refused(average.main, *two, "--shares", *shares, *out)
    assert not (tmp_path / "mean.pth").exists()
