"""For torch.hub: the network with the shipped weights.

    import torch
    model = torch.hub.load(REPO, "face_ssd300")                    # REPO: owner/name on GitHub
    model = torch.hub.load(FOLDER, "face_ssd300", source="local")  # or a folder
"""

from pathlib import Path

from model import SSD, load_model

dependencies = ["torch"]


def face_ssd300(pretrained=True):
    """The SSD network in evaluation mode: images `[B, 3, 300, 300]` to logits and offsets.

    Images are RGB in 0-1, logits `[B, A, 2]` (background, face), offsets `[B, A, 4]`; detector.py makes faces
    of them. `pretrained` loads the shipped weights; without it they are random.
    """
    if not pretrained:
        return SSD().eval()
    return load_model(Path(__file__).resolve().parent / "weights/face_ssd300.pth")
