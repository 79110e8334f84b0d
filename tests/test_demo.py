"""tools.demo: its table, and how it stops. The whole demo takes minutes: make demo."""

import pytest

from support.script import InputError
from tools import demo
from train import parse_args


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
    args = parse_args([f"@{demo.RECIPE}"])
    assert args.out == str(demo.OUT) and args.data == [str(demo.DATA / "train.json")]
    assert args.val == str(demo.DATA / "val.json") and args.load_from == "weights/face_ssd300.pth"
