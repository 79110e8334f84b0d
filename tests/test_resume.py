"""Resuming: what the flags say is what is used, nothing is skipped, and damaged checkpoints are refused."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import TrainBatches
from model import SSD, Config, checkpoint

pytestmark = pytest.mark.slow
SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1", "--warmup", "3",
         "--lr", "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32"]


def run(out, sample, *flags):
    train.main([*SMALL, "--data", str(sample / "train.json"), "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pth", weights_only=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A detector to start from and to learn from."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save(checkpoint(SSD(Config.scaled_from_300(64, 64, 0.25))), path)
    return path


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained") / "r"
    run(folder, sample, "--epochs", 1, "--val", "none")
    return folder


@pytest.fixture
def begun(trained, tmp_path):
    """A copy of that run in tmp_path / "r"; returns its checkpoint."""
    shutil.copytree(trained, tmp_path / "r")
    return torch.load(tmp_path / "r/last.pth", weights_only=True)


class Rates:
    """A stand-in for the optimizer of a Trainer: remembers the rate of each step, and steps."""

    def __init__(self, optimizer):
        self.optimizer, self.rates = optimizer, []

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def step(self):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()


def first_rate(trainer):
    """The learning rate of the first step of the next epoch."""
    trainer.optimizer = rates = Rates(trainer.optimizer)
    train.train_one_epoch(trainer, train.StopFlag())
    return rates.rates[0]


def group(trainer):
    return trainer.optimizer.param_groups[0]


# flag: the new value, and what a Trainer, the validation set and the Monitor that resume with it really use
USED = {
    "--data": (["{sample}/val.json"], lambda t, v, m: len(t.loader.dataset) == 6),
    "--min-face": (["1000"], lambda t, v, m: t.loader.dataset.ignored.all()),
    "--no-augment": ([], lambda t, v, m: next(iter(t.batches))[0][1] is None),
    "--patience": (["1", "--val", "{sample}/val.json"],
                   lambda t, v, m: not t.finished and (setattr(t, "waited", 1), t.finished)[1]),
    "--seed": (["5"], lambda t, v, m: next(iter(t.batches))[0][1][0] == 5),
    "--epochs": (["9"], lambda t, v, m: m.epochs == 9 and t.args.epochs == 9),
    "--lr": (["0.5"], lambda t, v, m: first_rate(t) == 0.5),
    "--warmup": (["6"], lambda t, v, m: first_rate(t) == pytest.approx(0.01 * (1 + 2 * 3 / 6) / 3)),
    "--momentum": (["0.5"], lambda t, v, m: group(t)["momentum"] == 0.5),
    "--clip": (["1e-9"], lambda t, v, m: moves_nowhere(t)),
    "--freeze-bn": ([], lambda t, v, m: not (train.train_one_epoch(t, train.StopFlag()),
                                             t.raw_model.backbone.bn_first.training)[1]),
    "--class-loss": (["quality-focal"], lambda t, v, m: t.criterion.class_loss == "quality-focal"),
    "--precision": (["bf16"], lambda t, v, m: enabled(t)),
    "--save-every": (["1"], lambda t, v, m: saves(t) == 3),
    "--compile": ([], lambda t, v, m: t.model is not t.eager),
    "--distill": (["0.3", "0.4", "--load-from", "{start}"],
                  lambda t, v, m: t.teacher is not None and t.criterion.distill == [0.3, 0.4]),
    "--unlabelled": (["{sample}/val.json", "--teacher", "{start}", "--distill", "0.3", "0.4"],
                     lambda t, v, m: len(t.loader.dataset) == 18),
}
def moves_nowhere(trainer):
    """Whether a step hardly changes the weights: its gradient is cut, and decay and momentum are off."""
    group(trainer)["momentum"] = group(trainer)["weight_decay"] = 0
    before = [p.detach().clone() for p in trainer.raw_model.parameters()]
    train.train_one_epoch(trainer, train.StopFlag())
    return all((a - b).abs().max() < 1e-8 for a, b in zip(before, trainer.raw_model.parameters()))


def enabled(trainer):
    with trainer.autocast():
        return torch.is_autocast_enabled("cpu")


def saves(trainer):
    """How often an epoch saves."""
    calls = []
    trainer.save = lambda: calls.append(1)
    train.train_one_epoch(trainer, train.StopFlag())
    return len(calls)


@pytest.mark.parametrize("flag", USED)
def test_a_flag_that_is_changed_is_used(sample, tmp_path, begun, start, flag, capsys):
    values, used = USED[flag]
    words = [value.format(sample=sample, start=start) for value in values]
    args = train.parse_args([*SMALL, "--data", str(sample / "train.json"), "--out", str(tmp_path / "r"),
                             "--val", "none", "--resume", flag, *words])
    trainer, val, monitor, _ = train.prepare(args)
    assert used(trainer, val, monitor)
    assert f"resumed with {flag} " in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(40))
def test_no_photo_is_left_out_whatever_stops_and_goes_on(seed):
    """An epoch in parts, each with batches of another size by another number of processes."""
    rng = np.random.default_rng(seed)
    n, repeat = int(rng.integers(1, 40)), int(rng.integers(1, 3))
    order, seen, done = None, set(), 0
    for _ in range(30):
        world, batch = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        parts = [TrainBatches(n, batch, repeat, 3, rank, world) for rank in range(world)]
        starts = {part.skip(done) for part in parts}
        assert len(starts) == 1 and min(starts) <= done or done >= n * repeat
        done = min(starts)
        steps = len(parts[0])
        for taken, group in enumerate(zip(*parts)):
            if taken == rng.integers(0, steps + 1):
                break
            seen |= {place % (n * repeat) for own in group for _, (_, _, place) in own}
            done += world * batch
        if done >= n * repeat:
            break
    else:
        part = TrainBatches(n, 1, repeat, 3)
        part.skip(done)
        seen |= {place for own in part for _, (_, _, place) in own}
    assert seen == set(range(n * repeat)), order


def test_another_validation_set_begins_best_anew_and_the_same_elsewhere_does_not(sample, tmp_path, capsys):
    flags = ["--val", sample / "val.json"]
    run(tmp_path / "r", sample, "--epochs", 1, *flags)
    last = torch.load(tmp_path / "r/last.pth", weights_only=True)
    torch.save(last | {"best": 2.0}, tmp_path / "r/last.pth")       # no set can reach that
    content, best = (sample / "val.json").read_text(), (tmp_path / "r/best.pth").read_bytes()
    (sample / "copy.json").write_text(content)
    assert run(tmp_path / "r", sample, "--epochs", 2, "--val", sample / "copy.json", "--resume")["best"] == 2
    assert run(tmp_path / "r", sample, "--epochs", 3, "--val", "none", "--resume")["best"] == 2
    assert run(tmp_path / "r", sample, "--epochs", 4, *flags, "--resume")["best"] == 2
    assert "best.pth begins anew" not in capsys.readouterr().out
    assert (tmp_path / "r/best.pth").read_bytes() == best
    other = run(tmp_path / "r", sample, "--epochs", 5, "--val", sample / "train.json", "--resume")
    assert 0 <= other["best"] <= 1 and (tmp_path / "r/best.pth").read_bytes() != best
    assert "another validation set than before: best.pth begins anew" in capsys.readouterr().out


def test_the_runs_own_checkpoint_by_its_whole_path(sample, tmp_path, begun, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = (tmp_path / "r/last.pth").resolve()
    assert run(Path("r"), sample, "--epochs", 2, "--resume", last)["epoch"] == 2


def test_epochs_that_are_done_again_are_logged_once(sample, tmp_path, begun):
    run(tmp_path / "r", sample, "--epochs", 3, "--val", "none", "--resume")
    torch.save(begun, tmp_path / "r/last.pth")
    run(tmp_path / "r", sample, "--epochs", 2, "--val", "none", "--resume")
    lines = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]


def test_an_epoch_is_logged_once_though_it_was_saved_before_it_was_validated(sample, tmp_path, monkeypatch):
    """The run ends while validating. The resumed run begins with that, and has the digits of a whole run."""
    whole = run(tmp_path / "whole", sample, "--epochs", 2, "--val", sample / "val.json")
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "validate", lambda *_: (_ for _ in ()).throw(SystemExit(143)))
        with pytest.raises(SystemExit):
            run(tmp_path / "r", sample, "--epochs", 2, "--val", sample / "val.json")
    saved = torch.load(tmp_path / "r/last.pth", weights_only=True)
    assert saved["epoch"] == 1 and saved["record"]["epoch"] == 1 and "AP" not in saved["record"]
    parts = run(tmp_path / "r", sample, "--epochs", 2, "--val", sample / "val.json", "--resume")
    assert all(torch.equal(whole["state_dict"][key], parts["state_dict"][key]) for key in whole["state_dict"])
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "r")]
    kept = [[(line["epoch"], line["loss"], line["AP"]) for line in log if "epoch" in line] for log in logs]
    assert kept[0] == kept[1] and [epoch for epoch, *_ in kept[1]] == [1, 2]
