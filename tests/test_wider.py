"""Tests of support.wider: the official files, real prediction files, and our own written and read back."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from support.script import InputError
from test_metrics import assert_as_pycocotools
from support.coco import Detections
from support.wider import GROUND_TRUTH, read_ground_truth, read_predictions, wider_names, write_predictions

OFFICIAL = Path(__file__).parent.parent / "../shared/data/wider_eval"
NAMES = ["0--Parade/0_Parade_1", "0--Parade/0_Parade_2", "1--Handshaking/1_Handshaking_7"]


def put(folder, name, content):
    path = folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def cells(values):
    """Make a column of MATLAB cells."""
    column = np.empty((len(values), 1), object)
    for row, value in enumerate(values):
        column[row, 0] = value
    return column


def write_ground_truth(folder, events=("a", "b"), boxes=(2, 1), kept=((1, 2), ())):
    """Write a small ground truth in the structure of the official .mat files."""
    rows = [np.arange(4 * n, dtype=np.int32).reshape(n, 4) for n in boxes]
    savemat(folder / "wider_face_val.mat", {
        "event_list": cells(events), "file_list": cells([cells([f"{e}_1"]) for e in events]),
        "face_bbx_list": cells([cells([r]) for r in rows])})
    for level in ("easy", "medium", "hard"):
        numbers = [np.array(k, np.uint8).reshape(-1, 1) for k in kept]
        savemat(folder / f"wider_{level}_val.mat", {"gt_list": cells([cells([n]) for n in numbers])})


# Ground truth

def test_ground_truth_structure(tmp_path):
    write_ground_truth(tmp_path)
    truth = read_ground_truth(tmp_path)
    assert truth.names == ["a/a_1", "b/b_1"]
    assert (truth.image.tolist() == [0, 0, 1]
            and truth.xywh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
    assert {level: kept.tolist() for level, kept in truth.kept.items()} == dict.fromkeys(
        ("easy", "medium", "hard"), [True, True, False])


def test_missing_ground_truth_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError,
                       match=rf"no such file; download eval_tools .*WIDERFACE .*{GROUND_TRUTH}"):
        read_ground_truth(tmp_path)
    write_ground_truth(tmp_path)
    (tmp_path / "wider_hard_val.mat").unlink()
    with pytest.raises(InputError, match="wider_hard_val.mat: no such file") as error:
        read_ground_truth(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [
    {"kept": ((3,), ())}, {"kept": ((0,), ())}, {"kept": ((1,),)}, {"events": ("..", "b")},
    {"events": ("a", "a")}])
def test_wrong_ground_truth_is_refused(tmp_path, wrong):
    write_ground_truth(tmp_path, **wrong)
    with pytest.raises(InputError):
        read_ground_truth(tmp_path)


def test_damaged_ground_truth_is_refused(tmp_path):
    write_ground_truth(tmp_path)
    path = tmp_path / "wider_easy_val.mat"
    for damaged in (b"", b"no MATLAB file", path.read_bytes()[:200]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="wider_easy_val.mat: not a MATLAB file"):
            read_ground_truth(tmp_path)


# Predictions

@pytest.mark.parametrize("content", [
    "0_Parade_1\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n",
    "0--Parade/0_Parade_1.jpg\n2\n1 2 3 4 0.5 \n5 6 7 8 0.25 \n\n",  # trailing blanks, as RetinaFace writes
    "0_Parade_1.jpg\r\n2\r\n1.0 2.0 3.0 4.0 5e-1\r\n5 6 7 8 .25",  # CRLF, no end of the last line
    "\ufeff0_Parade_1\n2.0\n  1 2\t3 4  0.5\n5 6 7 8 0.25\n",     # a byte order mark, tabs
    "0_Parade_1\n2\n5 6 7 8 0.25\n1 2 3 4 0.5\n",                  # not sorted
    b"\xff\xfe photo\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n",            # a name in another encoding
])
def test_predictions_as_they_are_met(tmp_path, content):
    put(tmp_path, NAMES[0], content)
    put(tmp_path, NAMES[1], "0_Parade_2\n0\n")
    put(tmp_path, NAMES[2], "")
    found, missing = read_predictions(tmp_path, NAMES)
    assert found.image.tolist() == [0, 0] and found.score.tolist() == [0.5, 0.25] and missing == []
    assert found.xywh.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_missing_files_are_named_and_equal_scores_stay_in_order(tmp_path):
    put(tmp_path, NAMES[2], "x\n3\n1 0 9 9 0.5\n2 0 9 9 0.75\n3 0 9 9 0.5\n")
    found, missing = read_predictions(tmp_path, NAMES)
    assert (missing == NAMES[:2] and found.image.tolist() == [2, 2, 2]
            and found.xywh[:, 0].tolist() == [2, 1, 3])


@pytest.mark.parametrize("content, message", [
    ("x\n2\n1 2 3 4 0.5\n1 2 nan 4 0.5\n", r"0_Parade_2\.txt:4: .*'1 2 nan 4 0.5'"),
    ("x\n1\n\n1 2 3 4 inf\n", r"0_Parade_2\.txt:4: "),
    ("x\n1\n1 2 3 4 5 6\n", r"0_Parade_2\.txt:3: "),
    ("x\n1\n1,2,3,4,5\n", r"0_Parade_2\.txt:3: "),
    ("x\n3\n1 2 3 4 0.5\n", r"0_Parade_2\.txt: 1 boxes, but line 2 says 3"),
    ("x\nnan\n1 2 3 4 0.5\n", r"0_Parade_2\.txt: 1 boxes, but line 2 says nan"),
    ("x\n", r"0_Parade_2\.txt:2: the number of boxes"),
    (b"\x00\x01\xff" * 9, r"0_Parade_2\.txt:2: the number of boxes"),
])
def test_bad_predictions_are_refused_with_file_and_line(tmp_path, content, message):
    put(tmp_path, NAMES[0], "x\n1\n1 2 3 4 0.5\n")
    put(tmp_path, NAMES[1], content)
    with pytest.raises(InputError, match=message) as error:
        read_predictions(tmp_path, NAMES)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="no predictions"):
        read_predictions(tmp_path / "none", NAMES)
    with pytest.raises(InputError, match="no predictions for WIDER FACE val, such as .*_7.txt"):
        read_predictions(tmp_path, NAMES)


def test_predictions_written_and_read_back_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    image, xywh = rng.choice([0, 2], 50), rng.normal(0, 300, (50, 4))
    score = np.round(rng.uniform(size=50), 1) / 3
    write_predictions(tmp_path / "out", NAMES, Detections(image, xywh, score))
    assert (tmp_path / f"out/{NAMES[1]}.txt").read_text() == "0_Parade_2\n0\n"
    first = (tmp_path / f"out/{NAMES[0]}.txt").read_text().splitlines()
    assert first[:2] == ["0_Parade_1", str((image == 0).sum())] and len(first[2].split()) == 5
    order = np.lexsort((-score, image))
    again, missing = read_predictions(tmp_path / "out", NAMES)
    for read, written in zip((again.image, again.xywh, again.score), (image, xywh, score)):
        np.testing.assert_array_equal(read, written[order])
    assert missing == []


def one(box, score):
    """Make one detection, on the first image."""
    return Detections(np.zeros(1, np.int64), np.array([box], float), np.array([score], float))


@pytest.mark.parametrize("name", [
    "../x", "../../a/x", "/etc/x", "/x", "a/..", "./x", "a/b/x", "x", "", "a/ ", "a\\b/x", "C:/x", "a/x\0",
    "a/x\n1", "a/\ud800"])
def test_hostile_names_are_refused_before_anything_is_written(tmp_path, name):
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="is not the name of a WIDER FACE image") as error:
        write_predictions(folder, ["a/b", name], one([0, 0, 9, 9], 0.5))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_two_images_of_one_name_are_not_written(tmp_path):
    with pytest.raises(InputError, match="'a/b' is there twice"):
        write_predictions(tmp_path / "out", ["a/b", "a/b"], one([0, 0, 9, 9], 0.5))
    assert not list(tmp_path.iterdir())


def test_names_of_coco_files():
    files = ["WIDER_val/images/0--Parade/0_Parade_1.jpg", "../x/a/b.c.JPEG", "/data/e/f.png", "g/h"]
    assert wider_names("val.json", files) == ["0--Parade/0_Parade_1", "a/b.c", "e/f", "g/h"]
    for wrong in (["photo.jpg"], ["../x.jpg"], ["a/b.jpg", "c/a/b.jpg"], ["a\\b.jpg"]):
        with pytest.raises(InputError, match="val.json: "):
            wider_names("val.json", wrong)


# The official files

@pytest.fixture(scope="module")
def official():
    if not OFFICIAL.is_dir():
        pytest.skip(f"{OFFICIAL} is not there: the official ground truth and a set of predictions")
    return read_ground_truth(OFFICIAL / "ground_truth")


def test_official_ground_truth(official):
    assert len(official.names) == len(set(official.names)) == 3226 and len(official.xywh) == 39708
    assert official.names[0] == "0--Parade/0_Parade_marchingband_1_465"
    kept = {level: flags.sum() for level, flags in official.kept.items()}
    assert kept == {"easy": 7211, "medium": 13319, "hard": 31958}


@pytest.mark.slow
def test_coco_numbers_of_published_predictions_equal_pycocotools(official, tmp_path):
    with tarfile.open(OFFICIAL / "retinaface_mnet025_predictions.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found, missing = read_predictions(tmp_path / "retinaface_mnet025", official.names)
    assert len(found.score) == 297333 and missing == []
    image, xywh, score = found.image, found.xywh, found.score
    # One image in 20: pycocotools takes half a minute for all (they agree as well).
    gt, dt = official.image % 20 == 0, image % 20 == 0
    area = official.xywh[gt, 2] * official.xywh[gt, 3]
    assert_as_pycocotools((official.image[gt], official.xywh[gt], area == 0,
                           area, image[dt], xywh[dt], score[dt]))
