"""Fixtures for all tests: a small drawn dataset, a small network, the folder of real data."""

import os
import signal
from pathlib import Path

# For the processes that tests start: several threads each would only fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from model import SSD, Config, checkpoint
from tools.sample import draw_sample

torch.set_num_threads(1)


def pytest_configure(config):
    """Heed Ctrl-C, and what tests start too, also where a shell's & has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with train.json (12 photos) and val.json (6 photos)."""
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder, train=12, val=6, seed=0)
    return folder


@pytest.fixture(scope="session")
def shared():
    """The folder of real photos, weights and ground truth, if it is beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(
            "no ../shared beside the repository: real photos, weights and WIDER ground truth are not here")
    return folder


@pytest.fixture(scope="session")
def small():
    """An untrained network with 64x48 input and width 0.25, in evaluation mode."""
    torch.manual_seed(0)
    return SSD(Config.scaled_from_300(64, 48, width=0.25)).eval()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory, small):
    """The checkpoint of that network."""
    path = tmp_path_factory.mktemp("model") / "small.pth"
    torch.save(checkpoint(small), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of bad files that hard_world.py builds."""
    import hard_world
    folder = tmp_path_factory.mktemp("hard")
    hard_world.build(folder)
    return folder


@pytest.fixture
def world(built, monkeypatch):
    """The folder of bad files, as the working directory."""
    monkeypatch.chdir(built)
    return built


@pytest.fixture(autouse=True)
def signals():
    """Give each test the handlers of signals that it found: scripts set their own, and end with them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys):
    """Run a script's main on bad arguments: check for exit code 2, no traceback; return the last line."""
    def check(main, *arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2, error
        assert "Traceback" not in error and "usage:" not in error
        return error.splitlines()[-1]
    return check
