"""Tests of tools.threshold: hand-computed curves and choices, what holds for any detections, the command."""

import argparse
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from checkpoints import make_model, save
from detector import check_threshold, load_detector
from metrics import Outcomes, score_curve
from model import checkpoint, read_checkpoint
from support.coco import Detections, read_annotations, to_results
from support.script import InputError, file_hash, write_json
from tools.threshold import Target, choose, intervals, main, parse_target, refusal

FALSE, PRECISION, RECALL = parse_target("false=0.2"), Target("precision", 0.7), Target("recall", 0.6)


def outcomes(rows, faces):
    """Outcomes of rows (photo, score, kind): "hit", "false", or anything else for a region to ignore."""
    image, score, kind = zip(*rows) if rows else ((), (), ())
    kind = np.array(kind, dtype=object)
    return Outcomes(np.array(image, np.int64), np.array(score, np.float64), np.where(kind == "hit", 0, -1),
                    kind == "false", np.ones(sum(faces), bool), np.array(faces, np.int64))


HAND = outcomes([(0, 0.5, "false"), (1, 0.9, "hit"), (0, 0.8, "false"), (2, 0.5, "hit"), (0, 0.7, "hit"),
                 (1, 0.85, "ignored")], [1, 2, 1, 0])


def random_outcomes(seed, photos=40, apart=0.5):
    """Photos of 0 to 4 faces, and detections whose score tells hits from false ones more or less."""
    rng = np.random.default_rng(seed)
    faces = rng.integers(0, 5, photos)
    found = rng.binomial(faces, 0.9)
    image = np.concatenate([np.repeat(np.arange(photos), found), rng.integers(0, photos, 4 * photos)])
    hit = np.arange(len(image)) < found.sum()
    score = np.round(np.clip(rng.normal(np.where(hit, apart + 0.2, 0.2), 0.2), 0.02, 1), 3)
    false = ~hit & (rng.random(len(hit)) < 0.9)
    return Outcomes(image, score, np.where(hit, 0, -1), false, np.ones(faces.sum(), bool), faces)


def measured(found, score):
    """Precision, recall and false detections a photo, counted one by one."""
    shown = found.score >= score
    hits, false = (found.hit & shown).sum(), (found.false & shown).sum()
    return {"precision": hits / max(hits + false, 1), "recall": hits / max(found.faces.sum(), 1),
            "false_per_picture": false / len(found.faces),
            "f1": 2 * hits / max(hits + false + found.faces.sum(), 1)}


def test_curve_by_hand():
    curve = score_curve(HAND)
    assert curve["score"].tolist() == [0.9, 0.8, 0.7, 0.5]  # the ignored one changes nothing
    np.testing.assert_allclose(curve["precision"], [1, 1 / 2, 2 / 3, 3 / 5])
    np.testing.assert_allclose(curve["recall"], [1 / 4, 1 / 4, 2 / 4, 3 / 4])
    np.testing.assert_allclose(curve["false_per_picture"], [0, 1 / 4, 1 / 4, 2 / 4])


def test_choice_by_hand_on_the_photos_alone():
    assert choose(HAND, Target("precision", 0.6))[0] == 0.5   # 3 / 5, and 1 / 2 in between is no obstacle
    assert choose(HAND, Target("precision", 0.65))[0] == 0.7
    assert choose(HAND, Target("recall", 0.5))[0] == 0.7
    assert choose(HAND, Target("false_per_picture", 0.25))[0] == 0.7
    assert choose(HAND, Target("false_per_picture", 0.2))[0] == 0.9
    assert choose(HAND, Target("recall", 0.8)) == (None, None)


def test_one_mistake_more_is_asked_for():
    """40 photos with a face each, all found: any resample is perfect, and with one mistake 40 of 41."""
    perfect = outcomes([(n, 0.9, "hit") for n in range(40)], [1] * 40)
    for measure in ("precision", "recall"):
        assert choose(perfect, Target(measure, 0.975)) == (0.9, 0.9)
        assert choose(perfect, Target(measure, 0.976)) == (0.9, None)
    assert choose(perfect, Target("false_per_picture", 1 / 40)) == (0.9, 0.9)
    assert choose(perfect, Target("false_per_picture", 0.9 / 40)) == (0.9, None)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10 ** 6))
def test_what_is_chosen_keeps_the_target_and_is_the_cautious_side(seed):
    found = random_outcomes(seed)
    for target in (FALSE, PRECISION, RECALL):
        here, score = choose(found, target)
        for chosen in (here, score):
            if chosen is not None:
                value = measured(found, chosen)[target.measure]
                assert value <= target.value if target is FALSE else value >= target.value
        if score is not None:
            assert score <= here if target is RECALL else score >= here


def test_intervals_hold_the_value_and_narrow_with_photos():
    few, many = random_outcomes(1, 30), random_outcomes(1, 3000)
    widths = []
    for found in (few, many):
        result = intervals(found, 0.4)
        for name, (value, low, high) in result.items():
            assert value == pytest.approx(measured(found, 0.4)[name]) and low <= value <= high
        widths.append([high - low for _, low, high in result.values()])
    assert (np.array(widths[0]) > 5 * np.array(widths[1])).all()  # a hundred times the photos: a tenth
    assert intervals(few, 0.4) == intervals(few, 0.4)             # seeded
    _, low, high = intervals(many, 0.4)["false_per_picture"]
    counts = np.bincount(many.image[many.false & (many.score >= 0.4)], minlength=3000)
    assert high - low == pytest.approx(2 * 1.96 * counts.std() / 3000 ** 0.5, rel=0.1)


@pytest.mark.slow
def test_the_target_is_kept_on_other_photos():
    """Drawn from one source: chosen on 60 photos, what it gives on 20,000 others, 40 times."""
    other = random_outcomes(99, 20_000, apart=0.4)
    for target in (FALSE, PRECISION, RECALL):
        kept = []
        for seed in range(40):
            scores = choose(random_outcomes(seed, 60, apart=0.4), target)
            values = [measured(other, score)[target.measure] for score in scores]
            kept.append([v <= target.value if target is FALSE else v >= target.value for v in values])
        alone, others = np.mean(kept, 0)
        assert others >= 0.85 > 0.75 > alone, (target, alone, others)


def test_thresholds_have_three_decimals_and_what_they_show_meets_the_target():
    found = outcomes([(0, 0.87654321, "hit"), (0, 0.8758, "false"), (1, 0.3, "false")], [1, 0])
    assert choose(found, Target("precision", 0.9))[0] == 0.876
    found.score[1] = 0.8762  # 0.876 shows it as well
    assert choose(found, Target("precision", 0.9))[0] is None and choose(found, RECALL)[0] == 0.876


def test_nothing_to_choose_from():
    nothing = outcomes([], [0, 0])
    assert choose(nothing, FALSE) == (None, None)
    assert "no detections" in refusal(nothing, FALSE, None)
    assert "no faces" in refusal(outcomes([(0, 0.5, "false")], [0]), RECALL, None)
    assert choose(outcomes([], []), FALSE) == (None, None)
    assert "no score meets it; the best is 0.75" in refusal(HAND, Target("recall", 0.8), None)
    assert "too few" in refusal(HAND, RECALL, 0.5)


def test_parse_target():
    assert str(parse_target("precision=0.95")) == "precision=0.95" and str(FALSE) == "false=0.2"
    assert parse_target("false=2") == Target("false_per_picture", 2.0)
    for text in ("precision", "precision=1", "recall=-1", "recall=nan", "false=inf", "false=0", "f1=0.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="precision=0.95"):
            parse_target(text)


def test_how_many_photos_are_needed():
    """A face found on each of 12 photos, and a false detection."""
    few = outcomes([(n, 0.9, "hit") for n in range(12)] + [(0, 0.5, "false")], [1] * 12)
    target = Target("precision", 0.98)  # with one mistake more 12 of 13; of four times the photos 48 of 49
    assert choose(few, target) == (0.9, None)
    assert "about 96 such photos are enough" in refusal(few, target, 0.9)
    assert "100,000 such photos are not enough" in refusal(few, Target("recall", 0.9999999), 0.9)


# The command

@pytest.fixture
def world(sample, tmp_path, small):
    """val.json, a model, detections and what made them: each face at 0.9, a false one at 0.5."""
    annotations = read_annotations(sample / "val.json")
    found = Detections(np.append(annotations.image, 0), np.append(annotations.xywh, [[1, 1, 9, 9]], 0),
                       np.append(np.full(len(annotations.image), 0.9), 0.5))
    torch.save(checkpoint(small) | {"epoch": 3}, tmp_path / "m.pth")
    write_json(tmp_path / "r.json", to_results(annotations, found))
    names = [[n, name.split("/")[-1]] for n, name in zip(annotations.ids.tolist(), annotations.names)]
    write_json(tmp_path / "r.made.json", {
        "model": "m.pth", "sha256": {"model": file_hash(tmp_path / "m.pth")}, "size": [64, 48], "tiles": None,
        "detections": file_hash(tmp_path / "r.json"), "photos": names,
        "trained_on": annotations.fingerprint()})
    return annotations, [sample / "val.json", tmp_path / "r.json"]


def test_threshold_in_a_copy_of_the_checkpoint(world, sample, tmp_path, capsys):
    annotations, files = world
    model, new = tmp_path / "m.pth", tmp_path / "new.pth"
    before = model.read_bytes()
    main([*map(str, files), "false=0.2", "--save", str(model), str(new)])
    out = capsys.readouterr().out
    assert "m.pth was trained on the photos of" in out
    assert "score 0.5 meets it on these photos alone: precision" in out
    assert "score 0.9 meets it, also with one mistake more" in out and "recall 1.000 (1.000 to 1.000)" in out
    assert model.read_bytes() == before
    content, own = read_checkpoint(new), read_checkpoint(model)
    entry = content.pop("threshold")
    assert content.keys() == own.keys() and content["epoch"] == 3 and content["config"] == own["config"]
    assert all(torch.equal(tensor, own["state_dict"][name]) for name, tensor in content["state_dict"].items())
    assert entry["score"] == 0.9 and entry["size"] == [64, 48] and entry["tiles"] is None
    assert entry["target"] == "false=0.2"
    assert entry["data"] == {"file": "val.json", "photos": 6, "faces": (~annotations.ignored).sum(),
                             "fingerprint": annotations.fingerprint()}
    assert load_detector(new).threshold == entry and load_detector(model).threshold is None
    # A run that starts from it makes other weights, which the threshold is not of.
    args = train.parse_args(["--data", str(sample / "train.json"), "--load-from", str(new)])
    save(tmp_path / "next.pth", make_model(args, None))
    assert load_detector(tmp_path / "next.pth").threshold is None


def test_refused(world, tmp_path, refused):
    _, files = world
    model, other = tmp_path / "m.pth", tmp_path / "o.pth"
    torch.save(read_checkpoint(model) | {"epoch": 4}, other)
    (tmp_path / "link.pth").symlink_to(model)
    target = [*files, "false=0.2"]
    for words, line in (([*files, "recall=90"], "precision=0.95 or recall=0.9"),
                        ([*target, "--save", "m.xml", "new.pth"], "two checkpoints (.pth) are expected"),
                        ([*target, "--save", model, tmp_path / "link.pth"], "two checkpoints"),
                        ([*target, "--save", "absent.pth", "n.pth"], "absent.pth: "),
                        ([*target, "--save", other, "n.pth"], "was made by another model (m.pth), not by")):
        assert line in refused(main, *words)
    line = refused(main, *files, "precision=0.999", "--save", model, tmp_path / "n.pth")
    assert "val.json: precision=0.999: score 0.9 meets it on these 6 photos, but they are too few" in line
    (tmp_path / "r.made.json").unlink()
    line = refused(main, *target, "--save", model, tmp_path / "n.pth")
    assert "r.made.json: no such file, so nothing says which model made" in line
    assert not (tmp_path / "n.pth").exists()


GOOD = {"score": 0.5, "size": [300, 300], "tiles": None, "target": "precision=0.95"}


def test_check_threshold():
    assert check_threshold(None, "x.pth") is None and check_threshold(GOOD, "x.pth") == GOOD
    assert check_threshold(GOOD | {"tiles": [400, 0.25], "data": {"photos": 3}}, "x")["data"] == {"photos": 3}
    assert check_threshold(json.dumps(GOOD), "x.onnx") == GOOD
    bad = [GOOD | {"score": "0.5"}, GOOD | {"score": float("nan")},
           GOOD | {"size": [300]}, GOOD | {"size": [0, 300]}, GOOD | {"tiles": [400]}, GOOD | {"tiles": 0},
           GOOD | {"target": 3}, {}, [], 0.5, "{",
           *({key: value for key, value in GOOD.items() if key != left} for left in GOOD)]
    for entry in bad:
        with pytest.raises(InputError, match="^x.pth: its threshold is damaged") as error:
            check_threshold(entry, "x.pth")
        assert "\n" not in str(error.value)
