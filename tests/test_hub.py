"""hubconf.py: the network by torch.hub, from another folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import load_model

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys, torch
model = torch.hub.load(sys.argv[1], "face_ssd300", source="local")
assert not model.training
torch.manual_seed(0)
image = torch.rand(1, 3, 300, 300)
with torch.no_grad():
    torch.save([image, *model(image)], "outputs.pt")
"""


@pytest.mark.slow
def test_the_shipped_network(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, ROOT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image, logits, offsets = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert logits.shape == (1, 3249, 2) and offsets.shape == (1, 3249, 4)
    with torch.no_grad():
        expected = load_model(ROOT / "weights/face_ssd300.pth")(image)
    torch.testing.assert_close((logits, offsets), expected, rtol=1e-5, atol=1e-5)
