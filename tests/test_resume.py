"""Tests of resuming: every flag counts as given, other processes, batches and sets, wrong checkpoints."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import train
from data import TrainBatches
from model import SSD, Config, checkpoint
from script import InputError
from test_train import SMALL, run, same


class Never:
    """A StopFlag that nobody raises."""
    at_once, code = False, 0

    def agreed(self):
        return False

    def check(self):
        pass


@pytest.fixture(scope="module")
def begun(sample, tmp_path_factory):
    """The folder of a run that has not trained yet, and weights of another network beside it."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, sample, "--epochs", 0, "--val", "none")
    torch.manual_seed(5)
    torch.save(checkpoint(SSD(Config.scaled_from_300(64, 64, 0.25))), folder / "other.pth")
    content = json.loads((sample / "train.json").read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [face for face in content["annotations"] if face["image_id"] in ids]
    (sample / "four.json").write_text(json.dumps(content))
    return folder


def resume(folder, sample, *flags):
    """What train.main works with after --resume and `flags`: (Trainer, validation set, Monitor)."""
    common = ["--data", sample / "train.json", "--out", folder, "--val", "none", "--resume"]
    return train.prepare(train.parse_args([str(word) for word in (*SMALL, *common, *flags)]))


def trained(trainer):
    trainer.run_epoch(Never())
    return trainer


def gradient(trainer):
    trainer.update(next(iter(trainer.loader)))
    return torch.cat([p.grad.flatten() for p in trainer.raw_model.parameters() if p.grad is not None]).norm()


def rates(trainer):
    return {group["lr"] for group in trained(trainer).optimizer.param_groups}


def decays(trainer):
    return {group["weight_decay"] for group in trainer.optimizer.param_groups}


def saves(trainer):
    calls = []
    trainer.save = lambda: calls.append(1)
    trained(trainer)
    return len(calls)


def budget(trainer):
    with pytest.raises(InputError):
        trainer.check_readable({0: "broken"})
    return True


def moved_average(trainer):
    gradient(trainer)
    return not same(trainer.ema.state_dict(), trainer.raw_model.state_dict())


def enabled(trainer):
    with trainer.autocast():
        return torch.is_autocast_enabled("cpu")


def kept_weights(trainer, folder):
    own = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    return same(trainer.raw_model.state_dict(), own)


# Flags, and what must hold for (trainer t, validation set v, monitor m, folder f), or the refusal's words.
FLAGS = {
    "data": (["--data", "{sample}/four.json"],
             lambda t, v, m, f: len(t.loader.dataset) == t.batches.n == 4),
    "val": (["--val", "{sample}/val.json"], lambda t, v, m, f: len(v.ids) == 6),
    "min_face": (["--min-face", "1000"], lambda t, v, m, f: t.loader.dataset[0, None].ignored.all()),
    "min_size": (["--min-size", "1000"], lambda t, v, m, f: t.loader.dataset[0, None].ignored.all()),
    "no_augment": (["--no-augment"],
                   lambda t, v, m, f: {key for own in t.batches for _, key in own} == {None}),
    "repeat": (["--repeat", "3"], lambda t, v, m, f: len(t.loader) == math.ceil(36 / 5)),
    "max_unreadable": (["--max-unreadable", "0"], lambda t, v, m, f: budget(t)),
    "size": (["--size", "96"], "input_width is 64, not 96"),
    "width": (["--width", "0.5"], "width is 0.25, not 0.5"),
    "anchors": (["--anchors", "10x15"], "anchors is"),
    "pretrained": (["--pretrained", "absent.pth"], lambda t, v, m, f: kept_weights(t, f)),
    "load_from": (["--load-from", "{folder}/other.pth"],
                  lambda t, v, m, f: kept_weights(t, f)),
    "distill": (["--load-from", "{folder}/other.pth", "--distill", "0.5", "0.25"],
                lambda t, v, m, f: t.criterion.distill == [0.5, 0.25] and not kept_weights_of(t.teacher, t)),
    "resume": (["--resume", "{folder}/last.pth"], lambda t, v, m, f: kept_weights(t, f)),
    "epochs": (["--epochs", "3"], lambda t, v, m, f: t.args.epochs == m.epochs == 3),  # and see below
    "batch_size": (["--batch-size", "3"], lambda t, v, m, f: len(next(iter(t.loader)).index) == 3),
    "lr": (["--lr", "0.002"], lambda t, v, m, f: rates(t) == {train.lr_at(2, 0, 0.002, [40], 3)}),
    "milestones": (["--milestones", "0"],
                   lambda t, v, m, f: rates(t) == {train.lr_at(2, 0, 0.01, [0], 3)}),
    "warmup": (["--warmup", "0"], lambda t, v, m, f: rates(t) == {0.01}),
    "momentum": (["--momentum", "0.5"],
                 lambda t, v, m, f: {group["momentum"] for group in t.optimizer.param_groups} == {0.5}),
    "weight_decay": (["--weight-decay", "0.25"], lambda t, v, m, f: decays(t) == {0.25}),
    "clip": (["--clip", "1e-4"], lambda t, v, m, f: gradient(t) < 1.01e-4),
    "ema": (["--ema", "0.5"], lambda t, v, m, f: moved_average(t)),
    "freeze_bn": (["--freeze-bn"],
                  lambda t, v, m, f: not trained(t).raw_model.backbone.bn_first.running_mean.any()),
    "seed": (["--seed", "7"], lambda t, v, m, f: {key[0] for own in t.batches for _, key in own} == {7}),
    "out": (["--resume", "{folder}/last.pth", "--out", "{folder}/more"],
            lambda t, v, m, f: t.save() is None and (f / "more/last.pth").exists() and m.out == f / "more"),
    "device": (["--device", "xla"], "not available here"),
    "precision": (["--precision", "bf16"], lambda t, v, m, f: enabled(t)),
    "workers": (["--workers", "1"], lambda t, v, m, f: t.loader.num_workers == 1),
    "save_every": (["--save-every", "1"], lambda t, v, m, f: saves(t) == 3),
    "sync_bn": (["--sync-bn"], "works on GPUs only"),
    "compile": (["--compile"], lambda t, v, m, f: isinstance(t.model, torch._dynamo.OptimizedModule)),
    "tensorboard": (["--tensorboard"], lambda t, v, m, f: m.writer is not None),
}


def kept_weights_of(teacher, trainer):
    return same(teacher.state_dict(), trainer.raw_model.state_dict())


def test_the_table_has_every_flag():
    assert {action.dest for action in train.make_parser()._actions} - {"help"} == FLAGS.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_a_resumed_run_uses_the_flag_as_given(begun, sample, tmp_path, name):
    for path in ("last.pth", "other.pth"):
        shutil.copy(begun / path, tmp_path)
    flags, check = FLAGS[name]
    flags = [word.format(sample=sample, folder=tmp_path) for word in flags]
    if isinstance(check, str):
        with pytest.raises(InputError, match=check):
            resume(tmp_path, sample, *flags)
    else:
        made = resume(tmp_path, sample, *flags)
        assert check(*made, tmp_path)
        if name in ("momentum", "weight_decay"):  # the buffers stay, the rates do not come back with them
            made[0].save()
            old = resume(tmp_path, sample)[0].optimizer.param_groups[0]
            assert (old["momentum"], old["weight_decay"]) == (0.9, 5e-4)


def test_epochs_and_path_of_a_resumed_run(begun, sample, tmp_path):
    """The run's own file is accepted by any of its names."""
    shutil.copy(begun / "last.pth", tmp_path)
    for epochs, name in enumerate((os.path.abspath, os.path.relpath), 1):
        last = run(tmp_path, sample, "--epochs", epochs, "--resume", name(tmp_path / "last.pth"))
        assert last["epoch"] == epochs


@pytest.mark.parametrize("seed", range(40))
def test_no_photo_is_lost_whatever_resumes_a_stopped_epoch(seed):
    rng, covered, done = np.random.default_rng(seed), set(), 0
    n, repeat = rng.integers(1, 40), rng.integers(1, 3)
    order = np.random.default_rng((seed, 3)).permutation(n * repeat)
    for _ in range(20):
        world, batch = rng.integers(1, 5), rng.integers(1, 9)
        parts = [TrainBatches(n, batch, repeat, seed, rank, world) for rank in range(world)]
        before = done
        for part in parts:
            part.epoch = 3
            done = part.skip(before)
        whole = batch * world
        assert done % whole == 0 and (before - whole < done <= before or before >= n * repeat)
        steps = list(zip(*parts, strict=True))
        stop = rng.integers(0, len(steps) + 1)
        for step in steps[:stop]:
            covered |= {key[2] % len(order) for own in step for _, key in own}
            done += whole
        if stop == len(steps):
            break
    else:
        for part in parts:
            part.skip(done)
        covered |= {key[2] % len(order) for part in parts for own in part for _, key in own}
    assert covered == set(range(n * repeat))


@pytest.mark.parametrize("flags", [["--seed", 1], ["--repeat", 2], ["--data", "four.json"]])
def test_an_epoch_of_other_photos_begins_anew(begun, sample, tmp_path, capsys, flags):
    content = torch.load(begun / "last.pth", weights_only=True)
    torch.save(content | {"done": 5, "sums": torch.ones(4)}, tmp_path / "last.pth")
    trainer, *_ = resume(tmp_path, sample)
    assert trainer.done == 5 and "anew" not in capsys.readouterr().out
    flags = [sample / word if word == "four.json" else word for word in flags]
    trainer, *_ = resume(tmp_path, sample, *flags)
    assert trainer.done == 0 and not trainer.sums.any()
    assert "this epoch begins anew" in capsys.readouterr().out


def test_another_validation_set_begins_best_anew(begun, sample, tmp_path, capsys):
    shutil.copy(begun / "last.pth", tmp_path)
    copied = tmp_path / "copied"
    shutil.copytree(sample, copied)

    def best(*flags):
        trainer, *_ = resume(tmp_path, sample, *flags)
        trainer.save()
        return trainer, "best.pth begins anew" in capsys.readouterr().out
    trainer, _ = best("--val", sample / "val.json")
    trainer.best = 0.5
    trainer.save()
    for flags in (["--val", copied / "val.json"], ["--val", "none"], ["--val", sample / "val.json"]):
        trainer, said = best(*flags)
        assert trainer.best == 0.5 and not said
    trainer, said = best("--val", sample / "four.json")
    assert trainer.best == -1 and said


OLD = ("photos", "val", "record", "launch")  # what older checkpoints do not have


@pytest.mark.slow
def test_older_checkpoints_resume_exactly(begun, sample, tmp_path):
    flags = ["--load-from", begun / "other.pth", "--distill", 0.3, 0.4, "--epochs"]
    content = run(tmp_path / "new", sample, *flags, 1)
    old = {key: value for key, value in content.items() if key not in OLD}
    old["flags"] = {("hold" if key == "distill" else key): value for key, value in content["flags"].items()
                    if key != "min_size"}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old/last.pth")
    new, again = (run(tmp_path / name, sample, *flags, 2, "--resume") for name in ("new", "old"))
    assert same(new["state_dict"], again["state_dict"]) and new["step"] == again["step"] == 6


def with_momentum(content, buffer):
    return {"optimizer": {"state": {0: {"momentum_buffer": buffer}}, "param_groups": []}}


WRONG = {
    "optimizer list": {"optimizer": []}, "optimizer empty": {"optimizer": {}},
    "optimizer state": {"optimizer": {"state": [], "param_groups": []}},
    "momentum shape": lambda c: with_momentum(c, torch.zeros(1)),
    "momentum kind": lambda c: with_momentum(c, [1.0]),
    "momentum nan": lambda c: with_momentum(c, next(iter(c["state_dict"].values())) * math.nan),
    "momentum unknown": {"optimizer": {"state": {9999: {"momentum_buffer": torch.zeros(1)}}}},
    "epoch list": {"epoch": [1]}, "epoch negative": {"epoch": -1}, "step negative": {"step": -1},
    "done text": {"done": "5"}, "done bool": {"done": True},
    "best nan": {"best": math.nan}, "best": {"best": "x"},
    "sums list": {"sums": [0.0] * 4},
    "sums shape": {"sums": torch.zeros(3)},
    "sums nan": {"sums": torch.full((4,), math.nan)},
    "sums kind": {"sums": torch.zeros(4, dtype=torch.int64)},
    "sums of nothing": {"done": 15, "sums": torch.zeros(4)},
    "flags list": {"flags": []}, "record list": {"record": [1]},
    "record number": {"record": 5}, "record empty": {"record": {"epoch": 0}},
    "record of another epoch": {"record": {"epoch": 7, "loss": 1.0}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_of_the_wrong_kind_is_refused(begun, sample, tmp_path, refused, name):
    content, change = torch.load(begun / "last.pth", weights_only=True), WRONG[name]
    torch.save(content | (change(content) if callable(change) else change), tmp_path / "last.pth")
    line = refused(train.main, *SMALL, "--data", sample / "train.json", "--val", "none", "--out", tmp_path,
                   "--epochs", 1, "--resume")
    assert "last.pth: cannot be resumed, its" in line or 'its "optimizer" is no dictionary' in line


def test_flags_may_be_missing_in_a_checkpoint(begun, sample, tmp_path):
    content = torch.load(begun / "last.pth", weights_only=True)
    torch.save(content | {"flags": {}}, tmp_path / "last.pth")
    assert resume(tmp_path, sample)[0].epoch == 0
