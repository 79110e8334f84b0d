"""tools.benchmark: each command runs and prints a row for what it compares. Its figures are not tested."""
import json
from argparse import Namespace

import numpy as np
import pytest

from tools import benchmark

pytestmark = pytest.mark.slow


def test_training_compares_each_way_with_the_plain_step(sample, monkeypatch, capsys):
    monkeypatch.setattr("torch.compile", lambda model: model)
    data = ["--data", str(sample / "train.json")]
    benchmark.main(["training", "--device", "cpu", *data, "--batch-sizes", "2", "--rounds", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "photos/s" in line]
    assert [row.split(",")[0].split("  ")[0] for row in rows] == ["fp32", "bf16", "bf16 compiled"]
    assert rows[0].endswith("ratio 1.000")


def test_the_recipe_beside_its_parts(sample, capsys):
    benchmark.main(["recipe", "--device", "cpu", "--data", str(sample / "train.json"), "--batch-sizes", "2",
                    "--workers", "0", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "loader alone" in out and "limits it" in out and "1,803,200 views" in out


def test_synthetic_photos_are_drawn_where_none_are_given(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.sample, "draw_sample", lambda folder, **_: (folder / "train.json").touch())
    assert benchmark.photos(Namespace(data=None), tmp_path).exists()


@pytest.mark.parametrize("name", ["yunet_n_320x320", "ultraface_rfb_320x240"])
def test_other_detectors_find_the_faces_of_portraits(shared, tmp_path, name):
    content = json.loads((shared / "data/frontal_val.json").read_text())
    chosen = content["images"][:8]
    for image in chosen:
        image["file_name"] = str(shared / "data" / image["file_name"])
    ids = {image["id"] for image in chosen}
    own = [one for one in content["annotations"] if one["image_id"] in ids]
    (tmp_path / "x.json").write_text(json.dumps(content | {"images": chosen, "annotations": own}))
    benchmark.main(["peer", str(shared / f"peers/{name}.onnx"), "--data", str(tmp_path / "x.json"),
                    "--out", str(tmp_path / "found.json")])
    best = {}
    for one in json.loads((tmp_path / "found.json").read_text()):
        best.setdefault(one["image_id"], one["bbox"])  # best first
    apart = [np.abs(np.array(best[one["image_id"]]) - one["bbox"]).max() / one["bbox"][2] for one in own]
    assert np.median(apart) < 0.1
