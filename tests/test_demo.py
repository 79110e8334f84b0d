"""demo.py: its picture, its table, and how it stops. The whole demo takes minutes: make demo."""

import numpy as np
import pytest
from PIL import ImageColor

from tools import demo
from support.coco import Detections, read_annotations, read_results, to_results
from support.pictures import FACE, FALSE, MISSED
from support.script import InputError, write_json


def results_file(path, annotations, kept, image=(), xywh=(), score=()):
    """A results file with the annotated faces `kept` as detections of score 0.9, and more detections."""
    image = np.concatenate([annotations.image[kept], np.array(image, int)])
    xywh = np.concatenate([annotations.xywh[kept], np.reshape(xywh, (-1, 4))])
    score = np.concatenate([np.full(kept.sum(), 0.9), score])
    write_json(path, to_results(annotations, Detections(image, xywh, score)))
    return path


@pytest.fixture
def before_after(sample, tmp_path):
    """Annotations of 6 photos; before, a face is missed and a detection is false; after, all is right."""
    annotations = read_annotations(sample / "val.json")
    everything = np.ones(len(annotations.image), bool)
    but_first = everything.copy()
    but_first[0] = False
    empty = np.setdiff1d(np.arange(6), annotations.image)[:1]  # the photo without faces
    before = results_file(tmp_path / "before.json", annotations, but_first, empty, [[10, 10, 30, 40]], [0.8])
    after = results_file(tmp_path / "after.json", annotations, everything, empty, [[10, 10, 30, 40]], [0.4])
    return annotations, before, after


def test_mistakes_are_counted_at_the_score(before_after):
    annotations, before, after = before_after
    first, last = (demo.judge(annotations, read_results(path, annotations), demo.SCORE)
                   for path in (before, after))
    assert np.flatnonzero(first.missed).tolist() == [0] and first.false.sum() == 1
    assert not last.missed.any() and not last.false.any()  # its false detection is below SCORE


def test_comparison_has_a_column_for_each_and_all_colours(before_after):
    annotations, before, after = before_after
    sheet = demo.comparison(annotations, [before, after], ["before", "after"], rows=3)
    assert sheet.size == (2 * demo.WIDTH, 3 * demo.WIDTH * 240 // 320 + 2 * demo.LINE)
    pixels = np.asarray(sheet)[demo.LINE:-demo.LINE]  # without the legend
    left, right = pixels[:, :demo.WIDTH], pixels[:, demo.WIDTH:]

    def shows(side, colour):
        return (side == ImageColor.getrgb(colour)).all(2).sum() > 50
    assert all(shows(left, colour) for colour in (FACE, MISSED, FALSE))
    assert shows(right, FACE) and not shows(right, MISSED) and not shows(right, FALSE)


def test_table_has_a_row_for_each_model():
    numbers = {"coco": {"AP": 0.5}, "AP50_by_size": {"all faces": 0.75, "> 19 px": 0.875},
               "operating_points": [{"score": score, "recall": score, "false_per_picture": 1 - score}
                                    for score in (0.3, 0.5, 0.7)]}
    lines = demo.table({"shipped network": numbers, "exported to OpenVINO IR": numbers}).splitlines()
    assert lines[-1].split()[-5:] == lines[-2].split()[-5:] == ["0.500", "0.750", "0.875", "0.500", "0.50"]


def test_run_shows_the_line_and_stops_where_a_script_fails(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('ran'); sys.exit(int(sys.argv[1]))")
    demo.run(script, 0)
    assert capfd.readouterr().out == f"\n$ python {script} 0\nran\n"
    with pytest.raises(InputError, match="script.py ended with exit code 3"):
        demo.run(script, 3)


def test_flags_of_the_recipe_are_where_the_demo_looks():
    from train import parse_args
    args = parse_args([f"@{demo.RECIPE}"])
    assert args.out == str(demo.OUT) and args.data == [str(demo.DATA / "train.json")]
    assert args.val == str(demo.DATA / "val.json") and args.load_from == "weights/face_ssd300.pth"
