"""Tests of wider_to_coco.py: every quirk of WIDER FACE's text, and what is refused."""

import json
import lzma
import os
from pathlib import Path

import pytest
from PIL import Image

from support.coco import read_annotations
from wider_to_coco import main, read_wider

ZEROS = "0 0 0 0 0 0 0 0 0 0"
FACE = "10 12 20 24 1 0 1 0 2 1"
REAL = Path(__file__).resolve().parents[2] / "shared/data/wider_eval/wider_face_val_bbx_gt.txt.xz"


@pytest.fixture
def folder(tmp_path):
    """A folder with images/e/a.jpg and images/e/b.jpg, both 100x80."""
    (tmp_path / "images/e").mkdir(parents=True)
    for name in "ab":
        Image.new("L", (100, 80)).save(tmp_path / f"images/e/{name}.jpg")
    return tmp_path


def run(folder, text, *options):
    """Convert `text` and return the COCO content."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "wider.txt").write_bytes(content)
    main([str(folder / "wider.txt"), str(folder / "images"), str(folder / "out.json"), *options])
    return json.loads((folder / "out.json").read_text())


def lines(*parts):
    return "\n".join(parts) + "\n"


def test_a_face_keeps_its_box_and_its_six_attributes(folder, capsys):
    coco = run(folder, lines("e/a.jpg", "1", FACE + " ", "e/b.jpg", "0", ZEROS))
    assert coco["categories"] == [{"id": 1, "name": "face"}]
    assert coco["images"] == [{"id": 1, "file_name": "images/e/a.jpg", "width": 100, "height": 80},
                              {"id": 2, "file_name": "images/e/b.jpg", "width": 100, "height": 80}]
    assert coco["annotations"] == [{
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 12, 20, 24], "area": 480, "iscrowd": 0,
        "blur": 1, "expression": 0, "illumination": 1, "invalid": 0, "occlusion": 2, "pose": 1}]
    report = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert report == {"pictures": "2", "without annotation": "1", "annotations": "1",
                      "invalid": "0", "empty": "0", "rows of zeros": "0",
                      "clipped": "0", "outside": "0", "marked iscrowd": "0", "missing": "0"}


@pytest.mark.parametrize("row, bbox, area, iscrowd", [
    ("-5 -6 20 30 0 0 0 0 0 0", [0, 0, 15, 24], 360, 0),                  # partly outside at the top left
    ("-9 -9 9999999 9999999 0 0 0 0 0 0", [0, 0, 100, 80], 8000, 0),      # huge
    ("100 5 20 30 0 0 0 0 0 0", [100, 5, 20, 30], 600, 1),                # outside, touching the right edge
    ("5 5 0 9 0 0 0 0 0 0", [5, 5, 0, 9], 0, 1),                          # empty
    ("5 5 -4 -9 0 0 0 0 0 0", [5, 5, -4, -9], 0, 1),                      # reversed
    (ZEROS, [0, 0, 0, 0], 0, 1),                                          # val's four pictures without faces
    ("5 5 4 9 0 0 0 1 0 0", [5, 5, 4, 9], 36, 1),                         # flagged invalid
    ("1.5 2.25 4 8.5 0 0 0 0 0 0", [1.5, 2.25, 4, 8.5], 34, 0),           # fractions
])
def test_unusual_boxes_are_kept(folder, row, bbox, area, iscrowd):
    coco = run(folder, lines("e/a.jpg", "1", row))
    (face,) = coco["annotations"]
    assert (face["bbox"], face["area"], face["iscrowd"]) == (bbox, area, iscrowd)
    faces = read_annotations(folder / "out.json")  # the other scripts read it, with the same flag
    assert faces.ignored.tolist() == [bool(iscrowd)]


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf" + lines("e/a.jpg", "1", FACE, "e/b.jpg", "0", ZEROS).encode(),
    lines("e/a.jpg", "1", FACE, "e/b.jpg", "0", ZEROS).replace("\n", "\r\n"),
    lines("", "e/a.jpg", "", "1", "  ", FACE, "", "e/b.jpg", "0", ZEROS, "", ""),
    lines("e/a.jpg", "1", FACE.replace(" ", "\t"), "e/b.jpg", "0"),         # no row of zeros
    lines("e/a.jpg ", " 1", FACE, "./e//b.jpg", "0", ZEROS).rstrip("\n"),   # no newline at the end
], ids=["byte order mark", "CRLF", "blank lines", "tabs", "untidy names"])
def test_untidy_text_is_accepted(folder, text):
    coco = run(folder, text)
    assert [image["file_name"] for image in coco["images"]] == ["images/e/a.jpg", "images/e/b.jpg"]
    assert [face["bbox"] for face in coco["annotations"]] == [[10, 12, 20, 24]]


REFUSED = {  # case: (text, part of the message)
    "not text": (b"\xff\xd8\xff\xe0", "wider.txt: not UTF-8 text (byte 0)"),
    "cut after a name": (lines("e/a.jpg", "1", FACE, "e/b.jpg"), "wider.txt:4: the file ends after the name"),
    "cut in the rows": (lines("e/a.jpg", "3", FACE, FACE), "wider.txt:2: the file ends after 2 faces, but"),
    "a row too many": (lines("e/a.jpg", "1", FACE, FACE), "wider.txt:4: a row too many, 'e/a.jpg' has 1"),
    "two rows of zeros": (lines("e/a.jpg", "0", ZEROS, ZEROS), "wider.txt:4: a picture's name is expected"),
    "a row too few": (lines("e/a.jpg", "2", FACE, "e/b.jpg", "1", FACE), "found 'e/b.jpg'; 'e/a.jpg' has 2"),
    "absurd count": (lines("e/a.jpg", "9" * 5000, FACE), "wider.txt:2: the number of faces"),
    "no name": (lines(FACE, "1"), "wider.txt:1: a picture's name is expected"),
    "nan": (lines("e/a.jpg", "1", "nan 12 20 24 0 0 0 0 0 0"), "wider.txt:3: x y w h and six whole"),
    "underscore": (lines("e/a.jpg", "1", "1_0 12 20 24 0 0 0 0 0 0"), "wider.txt:3: x y w h and six whole"),
    "bare signs": (lines("e/a.jpg", "1", "- . e + 0 0 0 0 0 0"), "wider.txt:3: x y w h and six whole"),
    "fractional blur": (lines("e/a.jpg", "1", "1 2 3 4 0.5 0 0 0 0 0"), "wider.txt:3: x y w h and six whole"),
    "listed twice": (lines("e/a.jpg", "0", ZEROS, "e/./a.jpg", "1", FACE),
                     "wider.txt:4: picture 'e/a.jpg' is listed twice"),
    "traversal": (lines("e/../e/a.jpg", "1", FACE), "wider.txt:1: 'e/../e/a.jpg' is not plainly inside"),
    "absolute": (lines("/etc/a.jpg", "1", FACE), "wider.txt:1: '/etc/a.jpg' is not plainly inside"),
    "escape codes": (lines("e/\x1b[2J.jpg", "0"), "1 are missing, such as ['e/\\x1b[2J.jpg']"),
    "name too long": (lines("e/" + "a" * 5000 + ".jpg", "0"), "1 are missing"),
    "a folder as picture": (lines("e", "0"), "of 1 pictures 1 are missing, such as ['e']"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_refused(folder, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        run(folder, text)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("wider_to_coco.py: ")
    # nothing was written
    assert sorted(p.name for p in folder.iterdir()) == ["images", "wider.txt"]


@pytest.mark.parametrize("case, message", [
    (["none.txt", "images", "out.json"], "none.txt: no such file"),
    (["wider.txt", "none", "out.json"], "none: no such folder of pictures"),
    (["wider.txt", "images", "images"], "images: is a folder or the annotation text"),
    (["wider.txt", "images", "wider.txt"], "wider.txt: is a folder or the annotation text"),
    (["wider.txt", "images", "wider.txt/out.json"], "wider.txt"),
    (["wider.txt", "images/e", "out.json"], "of 1 pictures 1 are missing, such as ['e/a.jpg']"),
])
def test_wrong_arguments(folder, capsys, monkeypatch, case, message):
    monkeypatch.chdir(folder)
    Path("wider.txt").write_text(lines("e/a.jpg", "1", FACE))
    with pytest.raises(SystemExit) as stop:
        main(case)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert Path("wider.txt").read_text() == lines("e/a.jpg", "1", FACE) and not Path("out.json").exists()


def test_missing_and_unreadable_pictures_are_named(folder, capsys):
    (folder / "images/e/empty.jpg").touch()
    (folder / "images/e/text.jpg").write_text("not a picture")
    os.mkfifo(folder / "images/e/pipe.jpg")  # opening it would block for ever
    names = ["a", "gone", "empty", "text", "pipe", *(f"none{n}" for n in range(30))]
    text = lines(*(line for name in names for line in (f"e/{name}.jpg", "0", ZEROS)))
    missing = ("of 35 pictures 32 are missing, such as ['e/gone.jpg', 'e/pipe.jpg', 'e/none0.jpg']; of a "
               "partial download --skip-missing converts those that are there")
    unreadable = "2 unreadable ('e/empty.jpg', 'e/text.jpg')"
    for options, message in (((), missing), (["--skip-missing"], unreadable)):
        with pytest.raises(SystemExit):
            run(folder, text, *options)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_partial_download_is_converted_on_request(folder, capsys):
    text = lines("e/gone.jpg", "2", FACE, FACE, "e/a.jpg", "1", FACE, "e/b.jpg", "0", ZEROS)
    coco = run(folder, text, "--skip-missing")
    assert [image["file_name"] for image in coco["images"]] == ["images/e/a.jpg", "images/e/b.jpg"]
    assert [face["image_id"] for face in coco["annotations"]] == [1] and coco["images"][0]["id"] == 1
    report = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert (report["pictures"], report["missing"], report["annotations"]) == ("2", "1", "1")
    with pytest.raises(SystemExit):  # nothing at all is no part
        run(folder, lines("e/gone.jpg", "1", FACE), "--skip-missing")
    assert "1 are missing, such as ['e/gone.jpg']" in capsys.readouterr().err
    assert json.loads((folder / "out.json").read_text()) == coco  # an older output survives an error


def test_names_are_relative_to_the_output(folder, monkeypatch):
    (folder / "wider.txt").write_text(lines("e/a.jpg", "1", FACE))
    (folder / "far/away").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "far/away")
    monkeypatch.chdir(folder)
    for out, name in (("out.json", "images/e/a.jpg"), ("new/sub/out.json", "../../images/e/a.jpg"),
                      ("images/out.json", "e/a.jpg"), ("images/e/out.json", "../e/a.jpg"),
                      ("link/out.json", "../../images/e/a.jpg")):  # relative to where the link leads
        main(["wider.txt", "images", out])
        faces = read_annotations(out)
        assert faces.names == [name] and faces.file(0).is_file()


@pytest.mark.slow
def test_the_real_validation_text(tmp_path):
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there (WIDER FACE's validation text, xz)")
    text = tmp_path / "wider_face_val_bbx_gt.txt"
    text.write_bytes(lzma.decompress(REAL.read_bytes()))
    blank = tmp_path / "blank.png"
    Image.new("1", (1024, 1400)).save(blank)
    for name in read_wider(text):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).symlink_to(blank)
    main([str(text), str(tmp_path / "images"), str(tmp_path / "val.json")])
    coco = json.loads((tmp_path / "val.json").read_text())
    assert (len(coco["images"]), len(coco["annotations"])) == (3226, 39708)
    assert sum(a["invalid"] for a in coco["annotations"]) == 585
    assert sum(min(a["bbox"][2:]) <= 0 for a in coco["annotations"]) == 11
    assert sum(not any(a["bbox"]) for a in coco["annotations"]) == 4
    assert len(read_annotations(tmp_path / "val.json").names) == 3226
