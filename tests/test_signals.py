"""Several processes: a signal to any of them, two machines that differ, and runs that torchrun restarts."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import train
from hard_world import REPOSITORY
from tools.sample import draw_sample

pytestmark = pytest.mark.slow
FLAGS = ["--size", "64", "--width", "0.25", "--batch-size", "3", "--repeat", "1", "--warmup", "3", "--lr",
         "0.01", "--min-face", "0", "--workers", "1", "--device", "cpu", "--data", "s/train.json", "--out",
         "run"]
# What each rank runs: train.py, with slower steps or batches of the validation, and its exit code in a file.
WRAPPER = """import os, signal, sys, time
sys.path.insert(0, {repository!r})
import detector, train
name = "rank" + os.environ.get("RANK", "0")
update, call = train.Trainer.update, detector.TorchDetector.__call__
def slow(self, batch, rate):
    result = update(self, batch, rate)
    open(name + ".step", "w").write(str(self.step + 1))
    time.sleep(float(os.environ.get("STEP", 0)))
    return result
def slow_call(self, images):
    open(name + ".validates", "w").write("")
    time.sleep(float(os.environ.get("VALIDATION", 0)))
    return call(self, images)
train.Trainer.update, detector.TorchDetector.__call__ = slow, slow_call
open(name + ".pid", "w").write(str(os.getpid()))
try:
    train.main(sys.argv[1:])
except SystemExit as end:
    open(name + ".code", "w").write(str(end.code))
    raise
open(name + ".code", "w").write("0")
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw_sample(folder, train=12, val=40)  # three batches to validate on
    return folder


@pytest.fixture
def node(drawn, tmp_path):
    """Make a folder with a copy of the photos: one machine."""
    def make(name):
        shutil.copytree(drawn, tmp_path / name / "s")
        (tmp_path / name / "wrapper.py").write_text(WRAPPER.format(repository=str(REPOSITORY)))
        return tmp_path / name
    return make


def start(folder, launcher, *flags, **more):
    """Start `torchrun launcher... wrapper.py` in a folder; it ignores no signal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in more.items()}
    words = [sys.executable, "-m", "torch.distributed.run", *launcher, "wrapper.py", *FLAGS, *map(str, flags)]
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def alone(folder, *flags):
    """Train in this process, to the end."""
    before = os.getcwd()
    os.chdir(folder)
    train.main([*FLAGS, *map(str, flags)])
    os.chdir(before)


def last(folder):
    return torch.load(folder / "run/last.pth", weights_only=True)


def wait_for(path, seconds=60):
    for _ in range(seconds * 20):
        if path.exists() and path.stat().st_size or path.suffix == ".validates" and path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def pair():
    """The flags of two agents that meet on this machine as two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            f"127.0.0.1:{port}"]


def ended(*agents, seconds=100):
    """Wait for agents of torchrun; returns what they printed, stderr without torchrun's own tracebacks."""
    return [agent.communicate(timeout=seconds) for agent in agents]


STANDALONE = ["--standalone", "--nproc_per_node", "2"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(node):
    folder = node("n")
    agent = start(folder, STANDALONE, "--epochs", 50, "--val", "none", STEP=0.3)
    wait_for(folder / "rank0.step")
    os.kill(int((folder / "rank1.pid").read_text()), signal.SIGTERM)
    told = time.time()
    _, error = ended(agent)[0]
    steps = [int((folder / f"rank{n}.step").read_text()) for n in (0, 1)]
    assert time.time() - told < 20 and steps[0] == steps[1] == last(folder)["step"]
    assert [(folder / f"rank{n}.code").read_text() for n in (0, 1)] == ["143", "143"], error
    assert f"{REPOSITORY}/train.py" not in error  # no traceback of ours
    assert error.count("stopped; the run is saved in run/last.pth; to go on, the same with --resume\n") == 1


def test_a_signal_while_two_processes_validate_loses_nothing(node, tmp_path):
    """Both end; the resumed run validates first, the weights that were saved."""
    folder = node("n")
    agent = start(folder, STANDALONE, "--epochs", 1, VALIDATION=2)
    wait_for(folder / "rank0.validates")
    os.killpg(agent.pid, signal.SIGTERM)
    ended(agent)
    assert [(folder / f"rank{n}.code").read_text() for n in (0, 1)] == ["143", "143"]
    before = last(folder)
    assert before["record"]["epoch"] == 1
    ended(start(folder, STANDALONE, "--epochs", 1, "--resume"))
    after = last(folder)
    assert all(torch.equal(value, after["state_dict"][key]) for key, value in before["state_dict"].items())
    assert after["record"] is None and after["step"] == before["step"]
    evaluate.main(["--data", str(folder / "s/val.json"), "--model", str(folder / "run/last.pth"),
                   "--json", str(tmp_path / "numbers.json")])
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    assert [line["epoch"] for line in epochs] == [1] and epochs[0]["loss"] == before["record"]["loss"]
    # evaluate.py has another order in memory: the last digits differ.
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert epochs[0]["AP"] == pytest.approx(numbers["coco"]["AP"], rel=1e-3)


def test_two_machines_resume_from_the_first_ones_checkpoint_or_refuse(node):
    """Only one of them has it. Which is the first, torchrun decides."""
    nodes = [node("a"), node("b")]
    alone(nodes[0], "--epochs", 2)
    flags = pair()
    outputs = ended(*(start(folder, flags, "--epochs", 3, "--resume") for folder in nodes))
    if (nodes[0] / "rank0.code").exists():
        assert last(nodes[0])["epoch"] == 3 and "from epoch 3, iteration 9" in outputs[0][0]
        assert (nodes[1] / "rank1.code").read_text() == "0" and not (nodes[1] / "run/last.pth").exists()
    else:
        assert (nodes[0] / "rank1.code").read_text() == (nodes[1] / "rank0.code").read_text() == "2"
        assert "run/last.pth: no checkpoint to resume" in outputs[1][1] and last(nodes[0])["epoch"] == 2


def test_a_machine_without_the_data_ends_both_in_a_line(node):
    nodes = [node("a"), node("b")]
    (nodes[1] / "s/train.json").unlink()
    flags, began = pair(), time.time()
    outputs = ended(*(start(folder, flags, "--epochs", 1, "--val", "none") for folder in nodes))
    assert time.time() - began < 60
    assert "s/train.json: no such file" in outputs[1][1] and "has given up: s/train.json" in outputs[0][1]
    assert {path.read_text() for folder in nodes for path in folder.glob("*.code")} == {"2"}


def test_an_older_run_is_not_taken_up_by_a_restart(node):
    """Refused at the first attempt, and at the second: torchrun's restart did not begin that run."""
    folder = node("n")
    alone(folder, "--epochs", 1, "--val", "none")
    before = (folder / "run/last.pth").read_bytes()
    launcher = ["--standalone", "--nproc_per_node", "1", "--max-restarts", "1"]
    agent = start(folder, launcher, "--epochs", 2, "--val", "none")
    _, error = ended(agent)[0]
    assert agent.returncode and error.count("train.py: run/last.pth exists: continue that run") == 2
    assert (folder / "run/last.pth").read_bytes() == before
