"""benchmark.py: each command runs and prints a row for what it compares. Its figures are not tested."""
import pytest

from tools import benchmark
import train

pytestmark = pytest.mark.slow


def test_training_compares_each_way_with_the_plain_step(monkeypatch, capfd):
    monkeypatch.setattr(train, "cannot_compile", lambda device: "no compiler")
    benchmark.main(["training", "--device", "cpu", "--photos", "2", "--batch-sizes", "2", "--rounds", "1"])
    out, err = capfd.readouterr()
    rows = [line for line in out.splitlines() if "photos/s" in line]
    assert "not compiled: no compiler" in out and "Traceback" not in err
    assert [row.split("   ")[0].strip() for row in rows] == [
        f"{what}, memory {memory}" for memory in ("given back", "kept")
        for what in ("train.py fp32", "train.py bf16", "torchvision ssdlite320 fp32")]
    assert rows[0].endswith("ratio 1.00")


def test_an_epoch_beside_its_parts(capsys):
    benchmark.main(["epoch", "--device", "cpu", "--photos", "4", "--batch-sizes", "2", "--workers", "0",
                    "--rounds", "1"])
    assert "loader alone" in capsys.readouterr().out


def test_loading_beside_torchvisions(capsys):
    benchmark.main(["loading", "--photos", "2", "--rounds", "1"])
    assert "torchvision" in capsys.readouterr().out
