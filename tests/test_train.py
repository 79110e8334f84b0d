"""Tests of train.py: schedule, files of a run, exact resuming, starting points, several processes."""

import gc
import json
import os
import signal

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import train
from anchors import make_anchors
from data import FaceDataset, collate
from support.coco import read_annotations
from support.distributed import mean
from loss import Criterion
from model import SSD, Config, checkpoint, load_model

SMALL = ["--size", "64", "--width", "0.25", "--batch-size", "5", "--repeat", "1",
         "--warmup", "3", "--lr", "0.01", "--min-face", "0", "--workers", "0", "--device", "cpu"]


def run(out, sample, *flags):
    train.main([*SMALL, "--data", str(sample / "train.json"), "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pth", weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("step, epoch, expected", [
    (0, 0, 0.05 / 3), (600, 0, 0.05 * 2 / 3), (1200, 3, 0.05), (5000, 39, 0.05), (5000, 40, 0.005),
    (5000, 54, 0.005), (5000, 55, 5e-4), (9999, 69, 5e-5), (600, 40, 0.005 * 2 / 3)])
def test_learning_rate(step, epoch, expected):
    assert train.lr_at(step, epoch, 0.05, [40, 55, 65], 1200) == pytest.approx(expected)


def test_recipes_are_flag_files_and_later_flags_override():
    args = train.parse_args(["@recipes/wider_face.txt", "--epochs", "3"])
    assert args.epochs == 3 and args.pretrained == "" and args.milestones == [40, 55, 65]
    for recipe in os.listdir("recipes"):
        train.parse_args([f"@recipes/{recipe}", "--load-from", "x.pth"])


def test_a_run_leaves_checkpoints_log_and_curves(sample, tmp_path, capsys):
    last = run(tmp_path / "r", sample, "--val", sample / "val.json", "--epochs", 2)
    out = capsys.readouterr().out
    assert "12 photos" in out and "3 batches of 5 x 1 processes" in out and "epoch 2/2" in out
    assert sorted(os.listdir(tmp_path / "r")) == [".lock", "best.pth", "curves.png", "last.pth", "log.jsonl"]
    assert last["epoch"] == 2 and last["step"] == 6
    flags, *epochs = map(json.loads, (tmp_path / "r/log.jsonl").read_text().splitlines())
    assert flags["flags"]["lr"] == 0.01 and [line["epoch"] for line in epochs] == [1, 2]
    assert all({"lr", "AP", "AP50", "photos_per_second"} <= line.keys() for line in epochs)
    assert torch.load(tmp_path / "r/best.pth", weights_only=True)["photos"] == last["photos"]
    assert read_annotations(sample / "train.json").fingerprint() in last["photos"]
    assert load_model(tmp_path / "r/best.pth").config == Config.scaled_from_300(64, 64, 0.25)


def test_the_record_of_an_epoch_holds_means(sample, tmp_path, monkeypatch):
    losses = iter(torch.tensor([[3.0, 2, 1], [5, 4, 3], [10, 6, 5]]))
    monkeypatch.setattr(train.Trainer, "update", lambda *_: next(losses))
    run(tmp_path / "r", sample, "--val", "none", "--epochs", 1)
    record = json.loads((tmp_path / "r/log.jsonl").read_text().splitlines()[-1])
    assert (record["loss"], record["class_loss"], record["box_loss"], record["step"]) == (6, 4, 3, 3)


@pytest.mark.slow
def test_training_lowers_the_loss(sample, tmp_path):
    run(tmp_path / "r", sample, "--epochs", 8, "--no-augment", "--lr", "0.05", "--clip", "10")
    losses = [json.loads(line)["class_loss"]
              for line in (tmp_path / "r/log.jsonl").read_text().splitlines()[1:]]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_resuming_is_exact(sample, tmp_path):
    """2 + 2 epochs equal 4 epochs, to the last bit of weights, averages and momentum."""
    flags = ["--ema", "0.9", "--workers", "1", "--milestones", "2"]
    whole = run(tmp_path / "whole", sample, "--epochs", 4, *flags)
    run(tmp_path / "parts", sample, "--epochs", 2, *flags)
    parts = run(tmp_path / "parts", sample, "--epochs", 4, *flags, "--resume")
    assert same(whole["state_dict"], parts["state_dict"]) and same(whole["ema"], parts["ema"])
    for key, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], parts["optimizer"]["state"][key]["momentum_buffer"])
    log = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_in_mid_epoch_and_resuming_is_exact(sample, tmp_path, monkeypatch, number, code):
    whole = run(tmp_path / "whole", sample, "--epochs", 2)
    update, calls = train.Trainer.update, []

    def interrupted(self, batch, rate):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return update(self, batch, rate)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "parts", sample, "--epochs", 2)
    assert stop.value.code == code
    saved = torch.load(tmp_path / "parts/last.pth", weights_only=True)
    assert (saved["epoch"], saved["done"], saved["step"]) == (1, 5, 4)
    parts = run(tmp_path / "parts", sample, "--epochs", 2, "--resume")
    assert same(whole["state_dict"], parts["state_dict"]) and parts["step"] == 6
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("whole", "parts")]
    losses = [[line["loss"] for line in run if "epoch" in line] for run in lines]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_an_epoch_of_which_all_is_done_ends_and_one_of_other_photos_begins_anew(sample, tmp_path, capsys):
    last = run(tmp_path / "r", sample, "--epochs", 0)
    torch.save(last | {"done": 15, "sums": torch.ones(4)}, tmp_path / "r/last.pth")  # of 12, in batches of 5
    assert run(tmp_path / "r", sample, "--epochs", 1, "--resume", "--batch-size", 4)["step"] == 0
    for change, steps in ((["--seed", 1], 3), (["--repeat", 2], 5)):
        torch.save(last | {"done": 10, "sums": torch.ones(4)}, tmp_path / "r/last.pth")
        assert run(tmp_path / "r", sample, "--epochs", 1, "--resume", *change)["step"] == steps
        assert "this epoch begins anew" in capsys.readouterr().out
    torch.save(last | {"done": 10, "sums": torch.ones(4)}, tmp_path / "r/last.pth")
    assert run(tmp_path / "r", sample, "--epochs", 1, "--resume")["step"] == 1


@pytest.mark.slow
def test_a_finished_run_goes_on_at_its_final_rate(sample, tmp_path):
    run(tmp_path / "r", sample, "--epochs", 2, "--milestones", 1)
    run(tmp_path / "r", sample, "--epochs", 3, "--milestones", 1, "--resume")
    assert json.loads((tmp_path / "r/log.jsonl").read_text().splitlines()[-1])["lr"] == pytest.approx(0.001)


def test_starting_from_weights(sample, tmp_path, capsys, refused):
    torch.save(checkpoint(SSD(Config(64, 64, 0.25))), tmp_path / "x.pth")
    last = run(tmp_path / "same", sample, "--load-from", tmp_path / "x.pth", "--epochs", 0, "--size", "96x64")
    own = torch.load(tmp_path / "x.pth", weights_only=True)
    assert (last["config"] == own["config"] | {"input_width": 96}
            and same(last["state_dict"], own["state_dict"]))
    run(tmp_path / "other", sample, "--load-from", tmp_path / "x.pth",
        "--epochs", 0, "--anchors", "10x15", "20x30")
    assert "4 tensors did not fit" in capsys.readouterr().out
    assert "is of width 0.25; python -m tools.width" in refused(
        train.main, *SMALL, "--data", sample / "train.json", "--load-from", tmp_path / "x.pth",
        "--width", 0.125)


@pytest.mark.slow
def test_anchors_given_for_300_are_scaled_to_the_input_whatever_the_start(sample, tmp_path):
    flags = ["--anchors", "10x15", "20x30", "--epochs"]
    last = run(tmp_path / "new", sample, *flags, 0)
    expected = ((10 * 64 / 300, 15 * 64 / 300), (20 * 64 / 300, 30 * 64 / 300))
    assert load_model(tmp_path / "new/last.pth").config.anchors == expected
    assert run(tmp_path / "new", sample, *flags, 1, "--resume")["config"] == last["config"]
    run(tmp_path / "from", sample, "--load-from", tmp_path / "new/last.pth", *flags, 0)
    assert load_model(tmp_path / "from/last.pth").config.anchors == expected
    run(tmp_path / "larger", sample, "--load-from", tmp_path / "new/last.pth", "--epochs", 0, "--size", "128")
    assert load_model(tmp_path / "larger/last.pth").config.anchors == expected  # those of the checkpoint


@pytest.mark.slow
def test_distillation_forgets_less(sample, tmp_path):
    torch.save(checkpoint(SSD(Config(64, 64, 0.25))), tmp_path / "x.pth")
    start, moved = load_model(tmp_path / "x.pth"), {}
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for weight in (0, 10):
        run(tmp_path / f"{weight}", sample, "--load-from", tmp_path / "x.pth",
            "--epochs", 2, "--distill", weight, weight, "--freeze-bn", "--clip", 10)
        scores = [model(images)[0].softmax(-1)[..., 1]
                  for model in (start, load_model(tmp_path / f"{weight}/last.pth"))]
        moved[weight] = (scores[0] - scores[1]).abs().mean().item()
    assert moved[10] < 0.8 * moved[0]


def test_distillation_needs_the_anchors_of_the_teacher(sample, tmp_path, refused):
    torch.save(checkpoint(SSD(Config(64, 64, 0.25))), tmp_path / "x.pth")
    flags = [*SMALL, "--data", sample / "train.json", "--load-from", tmp_path / "x.pth", "--epochs", 0,
             "--distill", 0.1, 0.1]
    nine = [f"{10 + n}x{15 + n}" for n in range(9)]
    assert "same anchors" in refused(train.main, *flags, "--out", tmp_path / "r", "--anchors", *nine)
    assert not (tmp_path / "r/last.pth").exists()
    train.main([str(word) for word in (*flags, "--out", tmp_path / "s")])
    assert (tmp_path / "s/last.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ema, decays", [(0.9, (1 / 10, 2 / 11, 3 / 12)), (0.15, (1 / 10, 0.15, 0.15))])
def test_the_average_forgets_its_first_weights_sooner(sample, tmp_path, ema, decays):
    """Its decay starts at a tenth and rises to --ema, so that the untrained weights do not stay in it."""
    flags = ["--ema", ema, "--batch-size", 12, "--val", "none"]  # one iteration an epoch
    before = run(tmp_path / "r", sample, "--epochs", 0, *flags)
    average = before["state_dict"]
    for epoch, decay in enumerate(decays, 1):
        now = run(tmp_path / "r", sample, "--epochs", epoch, *flags, "--resume")
        assert now["step"] == epoch
        for name, value in now["state_dict"].items():
            if value.is_floating_point():
                expected = decay * average[name] + (1 - decay) * value
                torch.testing.assert_close(now["ema"][name], expected, rtol=1e-4, atol=1e-6)
        assert not same(now["state_dict"], before["state_dict"])
        average, before = now["ema"], now
    run(tmp_path / "r", sample, "--epochs", 4, *flags, "--resume", "--val", sample / "val.json")
    for name in ("last.pth", "best.pth"):
        last = torch.load(tmp_path / "r/last.pth", weights_only=True)
        assert same(load_model(tmp_path / "r" / name).state_dict(), last["ema"])


@pytest.mark.slow
def test_no_loading_process_outlives_a_run(sample, tmp_path):
    gc.disable()  # the run must end its workers even if a reference cycle keeps main's variables alive
    try:
        run(tmp_path / "r", sample, "--epochs", 1, "--workers", 2)
        assert torch.multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_refused(sample, tmp_path, refused):
    common = [*SMALL, "--data", sample / "train.json", "--out", tmp_path / "r"]
    train.main([str(word) for word in (*common, "--epochs", 0)])
    assert "exists: continue that run with --resume" in refused(train.main, *common)
    assert "input_width is 64, not 96" in refused(train.main, *common, "--resume", "--size", "96")
    assert "exists" in refused(train.main, *common, "--resume", tmp_path / "other.pth")
    torch.save(checkpoint(SSD(Config(64, 64, 0.25))), tmp_path / "weights.pth")
    assert "--load-from" in refused(train.main, *common[:-1], tmp_path / "new",
                                    "--resume", tmp_path / "weights.pth")
    assert "no checkpoint to resume" in refused(train.main, *common[:-1], tmp_path / "new", "--resume")
    assert "sides of at least a pixel" in refused(train.main, *common[:-1], tmp_path / "new", "--size", "24")
    assert "works on GPUs only" in refused(train.main, *common[:-1], tmp_path / "new", "--sync-bn")
    assert "--clip: inf is not above 0" in refused(train.main, "--clip", "inf")


def test_a_loss_that_is_not_finite_stops(sample, tmp_path, refused):
    line = refused(train.main, *SMALL, "--data", sample / "train.json",
                   "--out", tmp_path / "r", "--epochs", 9, "--lr", "1e30")
    assert "not finite" in line


def batch_gradients(rank, world, folder, port, losses):
    """Save the gradients of one batch of 6 photos, shared by `world` processes; batch norm in eval mode."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    raw_model = SSD(Config.scaled_from_300(64, 64, 0.25)).eval()
    model = DistributedDataParallel(raw_model) if world > 1 else raw_model
    dataset = FaceDataset(read_annotations(f"{folder}/train.json"), 64, 64)
    batch = collate([dataset[index, (7, index)] for index in range(rank, 6, world)])
    criterion = Criterion(make_anchors(raw_model.config), raw_model.bbox_head.loss_weights, (0, 0), *losses)
    criterion(model(batch.images.float() / 255), batch)[0][0].backward()
    assert mean(torch.tensor([rank + 1.0])).tolist() == [(world + 1) / 2]
    torch.save({name: p.grad for name, p in raw_model.named_parameters()},
               f"{folder}/gradients-{world}-{rank}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("losses", [(), ("aligned", "quality-focal", "eiou")])
def test_two_processes_compute_the_gradients_of_one(sample, losses):
    batch_gradients(0, 1, sample, 0, losses)
    arguments = 2, str(sample), 29517 + os.getpid() % 1000, losses
    torch.multiprocessing.spawn(batch_gradients, arguments, nprocs=2)
    one, *two = (torch.load(sample / f"gradients-{name}.pth") for name in ("1-0", "2-0", "2-1"))
    for name, gradient in one.items():
        for other in two:
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert all(gradient.any() for name, gradient in one.items() if name.startswith("bbox_head"))
