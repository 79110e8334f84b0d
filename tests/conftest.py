"""What the tests share: a small drawn dataset, a small network, and the folder of real data where it is."""
import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the processes that tests start; threads that wait for cores only disturb

import pytest
import torch

from model import SSD, Config
from sample import draw_sample

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with train.json (12 photos) and val.json (6)."""
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder, train=12, val=6, seed=0)
    return folder


@pytest.fixture(scope="session")
def shared():
    """The folder of real photos, weights and ground truth that may lie beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(
            "no ../shared beside the repository: real photos, weights and WIDER ground truth are not here"
        )
    return folder


@pytest.fixture(scope="session")
def small():
    """An untrained network of 64 x 48 input and quarter width, in evaluation mode."""
    torch.manual_seed(0)
    return SSD(Config.scaled_from_300(64, 48, width=0.25)).eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of hard_world.py."""
    import hard_world
    folder = tmp_path_factory.mktemp("hard")
    hard_world.build(folder)
    return folder


@pytest.fixture
def world(built, monkeypatch):
    """That folder as the working directory."""
    monkeypatch.chdir(built)
    return built


@pytest.fixture
def refused(capsys):
    """Run a script's main on arguments that must be refused: exit 2 and one line, which is returned."""
    def check(main, *arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2, error
        assert "Traceback" not in error
        return error.splitlines()[-1]
    return check
