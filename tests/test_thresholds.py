"""Tests of thresholds.py: hand-computed curves and choices, what holds for any detections, promises kept."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import threshold as thresholds
from support.script import InputError
from detector import check_threshold
from tools.threshold import (Outcomes, Promise, choose, intervals, parse_promise, refusal,
                        score_curve, thin)

FALSE, PRECISION, RECALL = Promise("false", 0.2), Promise("precision", 0.7), Promise("recall", 0.6)


def outcomes(rows, faces):
    """Outcomes of rows (photo, score, kind): "hit", "false", or anything else for a region to ignore."""
    image, score, kind = zip(*rows) if rows else ((), (), ())
    kind = np.array(kind, dtype=object)
    return Outcomes(np.array(image, np.int64), np.array(score, np.float64), kind == "hit", kind == "false",
                    np.array(faces, np.int64))


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
    return Outcomes(image, score, hit, ~hit & (rng.random(len(hit)) < 0.9), faces)


def measured(found, score):
    """Precision, recall and false detections a photo, counted one by one."""
    shown = found.score >= score
    hits, false = (found.hit & shown).sum(), (found.false & shown).sum()
    return {"precision": hits / max(hits + false, 1), "recall": hits / max(found.faces.sum(), 1),
            "false": false / len(found.faces)}


def test_curve_by_hand():
    curve = score_curve(HAND)
    assert curve.score.tolist() == [0.9, 0.8, 0.7, 0.5]  # the ignored one changes nothing
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 3 / 5])
    np.testing.assert_allclose(curve.recall, [1 / 4, 1 / 4, 2 / 4, 3 / 4])
    np.testing.assert_allclose(curve.false_per_photo, [0, 1 / 4, 1 / 4, 2 / 4])


def test_choice_by_hand_on_the_photos_alone():
    assert choose(HAND, Promise("precision", 0.6))[0] == 0.5   # 3 / 5, and 1 / 2 in between is no obstacle
    assert choose(HAND, Promise("precision", 0.65))[0] == 0.7
    assert choose(HAND, Promise("recall", 0.5))[0] == 0.7
    assert choose(HAND, Promise("false", 0.25))[0] == 0.7
    assert choose(HAND, Promise("false", 0.2))[0] == 0.9
    assert choose(HAND, Promise("recall", 0.8)) == (None, None)


def test_one_mistake_more_is_asked_for():
    """40 photos with a face each, all found: any resample is perfect, and with one mistake 40 of 41."""
    perfect = outcomes([(n, 0.9, "hit") for n in range(40)], [1] * 40)
    for measure in ("precision", "recall"):
        assert choose(perfect, Promise(measure, 0.975)) == (0.9, 0.9)
        assert choose(perfect, Promise(measure, 0.976)) == (0.9, None)
    assert choose(perfect, Promise("false", 1 / 40)) == (0.9, 0.9)
    assert choose(perfect, Promise("false", 0.9 / 40)) == (0.9, None)


def test_mistakes_on_one_photo_are_less_certain_than_as_many_apart():
    hits = [(n, 0.9, "hit") for n in range(100)]
    apart = outcomes(hits + [(n, 0.5, "false") for n in range(8)], [1] * 100)
    together = outcomes(hits + [(0, 0.5, "false")] * 8, [1] * 100)
    promise = Promise("false", 0.14)
    assert [choose(one, promise)[0] for one in (apart, together)] == [0.5, 0.5]
    assert [choose(one, promise)[1] for one in (apart, together)] == [0.5, 0.9]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10 ** 6))
def test_what_is_chosen_keeps_the_promise_and_is_the_cautious_side(seed):
    found = random_outcomes(seed)
    for promise in (FALSE, PRECISION, RECALL):
        here, score = choose(found, promise)
        for chosen in (here, score):
            if chosen is not None:
                value = measured(found, chosen)[promise.measure]
                assert value <= promise.value if promise is FALSE else value >= promise.value
        if score is not None:
            assert score <= here if promise is RECALL else score >= here
        # The order of the detections is nothing to go by.
        order = np.random.default_rng(seed).permutation(len(found.score))
        turned = Outcomes(*(values[order] for values in (found.image, found.score, found.hit, found.false)),
                          found.faces)
        assert choose(turned, promise) == (here, score)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10 ** 6))
def test_a_lower_score_would_not_do_on_the_photos_alone(seed):
    found = random_outcomes(seed)
    here = choose(found, FALSE)[0]
    lower = found.score[(found.hit | found.false) & (found.score < here)].max()
    assert measured(found, lower)["false"] > FALSE.value


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


def test_the_interval_is_that_of_the_standard_error():
    found = random_outcomes(2, 2000)
    _, low, high = intervals(found, 0.3)["false"]
    counts = np.bincount(found.image[found.false & (found.score >= 0.3)], minlength=2000)
    assert high - low == pytest.approx(2 * 1.96 * counts.std() / 2000 ** 0.5, rel=0.1)


def test_blocks_draw_the_same(monkeypatch):
    found = random_outcomes(3)
    before = choose(found, FALSE), intervals(found, 0.4)
    monkeypatch.setattr(thresholds, "CELLS", 100)
    assert (choose(found, FALSE), intervals(found, 0.4)) == before


def test_the_promise_is_kept_on_other_photos():
    """Drawn from one source: chosen on 60 photos, what it gives on 20,000 others, 40 times."""
    other = random_outcomes(99, 20_000, apart=0.4)
    for promise in (FALSE, PRECISION, RECALL):
        kept = []
        for seed in range(40):
            scores = choose(random_outcomes(seed, 60, apart=0.4), promise)
            values = [measured(other, score)[promise.measure] for score in scores]
            kept.append([v <= promise.value if promise is FALSE else v >= promise.value for v in values])
        alone, others = np.mean(kept, 0)
        assert others >= 0.85 > 0.75 > alone, (promise, alone, others)


def test_round_scores_show_the_same():
    found = outcomes([(0, 0.87654321, "hit"), (0, 0.87612345, "false"), (1, 0.3, "false")], [1, 0])
    assert choose(found, Promise("precision", 0.9))[0] == 0.8765
    assert choose(replace(found, score=np.array([0.87654321, 0.87654320, 0.3])),
                  Promise("precision", 0.9))[0] == 0.87654321
    assert choose(replace(found, score=found.score * -1e6), Promise("recall", 0.9))[0] == -876543.21


def test_a_long_curve_is_thinned_evenly():
    found = random_outcomes(4, 2000)
    found.score[:] = np.random.default_rng(0).permutation(len(found.score))  # all of them distinct
    curve = score_curve(found)
    short = thin(curve, 100)
    assert len(curve.score) > 8000 and 50 < len(short.score) <= 101
    assert (short.score[0], short.score[-1]) == (curve.score[0], curve.score[-1])
    assert set(short.score) <= set(curve.score)
    assert np.diff(short.recall).max() < 0.03
    assert thin(short, 200) is short
    right = outcomes([(0, n / 50, "hit") for n in range(50)], [50])  # nothing false at all
    assert len(thin(score_curve(right), 20).score) in range(10, 22)


def test_the_thinned_curve_is_still_kept_exactly(monkeypatch):
    """Between the thresholds that are tried lie other detections, and rounding must not show them."""
    monkeypatch.setattr(thresholds, "POINTS", 20)
    found = random_outcomes(5, 400)
    found.score[:] = found.score + np.random.default_rng(0).uniform(0, 1e-3, len(found.score))
    tried = thin(score_curve(found), 20).score
    for chosen in choose(found, FALSE):
        shown = found.score[(found.hit | found.false) & (found.score >= chosen)]
        assert shown.min() in tried


def test_nothing_to_choose_from():
    nothing = outcomes([], [0, 0])
    assert choose(nothing, FALSE) == (None, None)
    assert "no detections" in refusal(nothing, FALSE, None)
    assert "no faces" in refusal(outcomes([(0, 0.5, "false")], [0]), RECALL, None)
    assert choose(outcomes([], []), FALSE) == (None, None)
    line = refusal(HAND, Promise("recall", 0.8), None)
    assert "no score keeps it" in line and "recall=0.75 at score 0.5" in line
    assert "too few" in refusal(HAND, RECALL, 0.5)


def test_parse_promise():
    assert str(parse_promise("precision=0.95")) == "precision=0.95"
    assert parse_promise("false=2") == Promise("false", 2.0)
    for text in ("precision", "precision=", "precision=1", "recall=0", "recall=-1", "recall=nan", "false=inf",
                 "false=0", "f1=0.5", "=0.5", "recall=0.5=0.6"):
        with pytest.raises(argparse.ArgumentTypeError, match="precision=0.95"):
            parse_promise(text)


GOOD = {"score": 0.5, "size": [300, 300], "tiles": None, "promise": "precision=0.95"}


def test_check_threshold():
    assert check_threshold(None, "x.pth") is None and check_threshold(GOOD, "x.pth") == GOOD
    assert check_threshold(GOOD | {"tiles": [400, 0.25], "data": {"photos": 3}}, "x")["data"] == {"photos": 3}
    assert check_threshold(json.dumps(GOOD), "x.onnx") == GOOD
    bad = [GOOD | {"score": value} for value in ("0.5", True, None, float("nan"), float("inf"), [0.5])]
    bad += [GOOD | {"size": value} for value in (300, [300], ["a", "b"], [0, 300], None)]
    bad += [GOOD | {"tiles": value} for value in ([400], 0, "", [0, 0])]
    bad += [GOOD | {"promise": 3}, GOOD | {"data": {1, 2}}]
    bad += [{}, [], 0.5, "", "{", "[" * 9999]
    bad += [{key: value for key, value in GOOD.items() if key != left} for left in GOOD]
    for entry in bad:
        with pytest.raises(InputError, match="^x.pth: its threshold is damaged") as error:
            check_threshold(entry, "x.pth")
        assert "\n" not in str(error.value)
