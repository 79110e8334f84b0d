"""For torch.hub: the network with the shipped weights.

    import torch
    model = torch.hub.load(REPO, "face_ssd300")                    # REPO: owner/name on GitHub
    model = torch.hub.load(FOLDER, "face_ssd300", source="local")  # or a folder
"""

from pathlib import Path

from model import SSD, load_model

dependencies = ["torch"]


def face_ssd300(pretrained=True):
    """The SSD in evaluation mode: images `[B, 3, 300, 300]`, RGB in 0-1, to logits `[B, A, 2]` and offsets.

    detector.postprocess makes faces of them. Without `pretrained` the weights are random."""
    path = Path(__file__).resolve().parent / "weights/face_ssd300.pth"
    return load_model(path) if pretrained else SSD().eval()
