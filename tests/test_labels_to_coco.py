"""Tests of labels_to_coco.py: files of real tools (tests/labels), what is refused, and back to YOLO."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from support.coco import InputError, read_annotations
from tools import look
from tools.labels import photos_around
from tools.labels_to_coco import main
from tools.yolo import read_names

SAMPLES = Path(__file__).parent / "labels"
TRUTH = json.loads((SAMPLES / "truth.json").read_text())
NAMES = {image["id"]: image["file_name"] for image in TRUTH["images"]}
FACES = [(NAMES[a["image_id"]], *a["bbox"]) for a in TRUTH["annotations"] if a["category_id"] == 1]


def boxes(path):
    """The faces in a COCO file: `[(photo, x, y, w, h)]` in file order, photos without their folder."""
    faces = read_annotations(path)
    return [(Path(faces.names[n]).name, *box) for n, box in zip(faces.image, faces.xywh.tolist())]


def assert_boxes(found, expected, within=0.01):
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert np.abs(np.array([row[1:] for row in found]) - [row[1:] for row in expected]).max() <= within


def run(*arguments):
    main([str(argument) for argument in arguments])


def report(capsys):
    """What a run printed, as {what: count}."""
    lines = capsys.readouterr().out.splitlines()
    return {line[:32].strip(): int(line[32:]) for line in lines if line[32:].strip().isdecimal()}


@pytest.fixture
def folder(tmp_path):
    """A folder with the photos a.jpg (96x72), b.jpg (60x80) and c.jpg (80x60) in images/."""
    shutil.copytree(SAMPLES / "photos", tmp_path / "images")
    return tmp_path


def whole(rows):
    """Faces with corners rounded to whole pixels."""
    return [(name, round(x), round(y), round(x + w) - round(x), round(y + h) - round(y))
            for name, x, y, w, h in rows]


def turned(rows):
    """The boxes around faces that are turned by 30 degrees about their top left corner, clipped."""
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in TRUTH["images"]}
    cos, sin, found = math.cos(math.pi / 6), math.sin(math.pi / 6), []
    for name, x, y, w, h in rows:
        width, height = sizes[name]
        x1, y1, x2, y2 = x - h * sin, y, x + w * cos, y + w * sin + h * cos
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        found.append((name, x1, y1, x2 - x1, y2 - y1))
    return found


WRITTEN = {  # labels: (what the faces must be, how far off: Ultralytics and supervision write 5 decimals)
    "datumaro-coco_instances": FACES, "datumaro-coco_instances-polygons": FACES, "datumaro-cvat": FACES,
    "datumaro-cvat-polygons": FACES, "datumaro-voc_detection": FACES, "datumaro-yolo": FACES,
    "label-studio/full.json": FACES, "label-studio/min.json": FACES, "label-studio-yolo": FACES,
    "label-studio/turned.json": turned(FACES), "label-studio-yolo-turned": turned(FACES),
    "labelimg-voc": whole(FACES), "labelimg-yolo": whole(FACES), "supervision-coco.json": FACES,
    "supervision-yolo": FACES, "ultralytics-boxes": FACES, "ultralytics-polygons": FACES,
    "hand.csv": FACES, "hand-tensorflow.csv": FACES}


@pytest.mark.parametrize("name", WRITTEN)
def test_boxes_in_are_boxes_out_also_to_yolo_and_back(folder, capsys, name):
    expected = WRITTEN[name]
    run(SAMPLES / name, folder / "images", folder / "out.json", "--category", "face")
    assert_boxes(boxes(folder / "out.json"), expected)
    counts = report(capsys)
    assert (counts["category face (face)"], counts["category mask"], counts["faces"]) == (3, 1, 3)
    run(SAMPLES / name, folder / "images", folder / "yolo", "--to", "yolo", "--category", "face")
    run(folder / "yolo", folder / "back.json")
    if name in ("datumaro-voc_detection", "datumaro-coco_instances"):  # one is difficult; YOLO cannot say so
        expected = [FACES[0], FACES[2]]
    assert_boxes(boxes(folder / "back.json"), expected)


def test_categories_are_chosen_and_merged(folder, capsys, refused):
    run(SAMPLES / "truth.json", folder / "images", folder / "out.json", "--category", "mask", "face")
    assert report(capsys)["faces"] == 4 == len(read_annotations(folder / "out.json").image)
    content = TRUTH | {"categories": [{"id": 1, "name": "head"}, {"id": 2, "name": "mask"}]}
    (folder / "x.json").write_text(json.dumps(content))
    assert refused(main, folder / "x.json", folder / "o.json").endswith(
        "which category is the face? Choose with --category, there are: head 3, mask 1")
    assert "no category 'nose', there are: face 3, mask 1" in refused(
        main, SAMPLES / "truth.json", folder / "o.json", "--category", "nose")
    assert not (folder / "o.json").exists()


def yolo(folder, rows, names="", photos=("a.jpg",)):
    """A YOLO folder of one text for each photo."""
    (folder / "labels").mkdir(exist_ok=True)
    for name in photos:
        (folder / "labels" / name).with_suffix(".txt").write_text(rows)
    if names:
        (folder / "data.yaml").write_text(names)


@pytest.mark.parametrize("where", ["labels", ".", "data.yaml"])
def test_photos_are_found_around_the_labels(folder, where, capsys):
    yolo(folder, "0 0.5 0.5 0.5 0.5\n", "names: [face]\n")
    (folder / "images/._a.jpg").write_bytes(b"a Mac's")
    run(folder / where, folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 24, 18, 48, 36)])
    content = json.loads((folder / "out.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"images/{name}.jpg" for name in "abc"]
    assert report(capsys)["photos without txt"] == 2
    run(folder / where, folder / "images", folder / "out.json")
    assert "left out: photos without labels" not in report(capsys)


def test_a_split_takes_no_photos_of_another(folder, capsys, refused):
    """Photos without txt count as photos without faces only beside labelled ones."""
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        (folder / "images" / split).mkdir()
        (folder / "images" / name).rename(folder / "images" / split / name)
        (folder / "labels" / split).mkdir(parents=True)
        (folder / "labels" / split / name).with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5\n")
    shutil.copy(folder / "images/train/a.jpg", folder / "images/val/a.jpg")  # the same name in another folder
    (folder / "data.yaml").write_text("names: [face]")
    run(folder / "labels/train", folder / "out.json")
    assert report(capsys)["category face (face)"] == 1
    (folder / "labels/train/a.txt").write_text("")  # Label Studio writes notes.json beside
    (folder / "labels/train/notes.json").write_text("{}")
    run(folder / "labels/train", folder / "out.json")
    assert report(capsys)["without faces"] == 1
    (folder / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    assert "class '1'; " in refused(main, folder / "labels/train", folder / "o.json")
    assert read_annotations(folder / "out.json").names == ["images/train/a.jpg"]
    assert photos_around(folder / "labels/train") == folder


def test_flags_mean_what_they_say(folder, capsys):
    kept = {"difficult": 1, "truncated": 1, "occluded": 0}
    objects = "".join(f"<object><name>face</name>{flags}<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax>"
                      "<ymax>22</ymax></bndbox></object>" for flags in (
                          "".join(f"<{key}>{value}</{key}>" for key, value in kept.items()),
                          "<truncated>yes</truncated><occluded>1</occluded>", "<ignore>true</ignore>"))
    (folder / "a.xml").write_text(f"<annotation><filename>old-name.jpg</filename>{objects}</annotation>")
    run(folder / "a.xml", folder / "out.json")
    faces = json.loads((folder / "out.json").read_text())["annotations"]
    assert [face["iscrowd"] for face in faces] == [1, 0, 1]
    assert {key: faces[0][key] for key in kept} == kept
    counts = report(capsys)
    expected = {"difficult": 1, "ignore": 1, "truncated": 2, "occluded": 1, "marked iscrowd": 2}
    assert expected.items() <= counts.items()


def test_unusual_boxes_are_counted_and_marked(folder, capsys):
    (folder / "x.csv").write_text("a.jpg,-10,5,20,30\na.jpg,96,5,120,30\na.jpg,20,20,20,30\n"
                                  "a.jpg,30,30,20,40\nb.jpg,1,2,60.04,10\nb.jpg,1,2,60.3,10\n"
                                  "b.jpg,1e9,1e9,9e11,9e11\nc.jpg,,,,\n")
    run(folder / "x.csv", folder / "out.json")
    content = json.loads((folder / "out.json").read_text())
    assert [(face["bbox"], face["iscrowd"]) for face in content["annotations"]][:4] == [
        ([0, 5, 20, 25], 0), ([96, 5, 24, 25], 1), ([20, 20, 0, 10], 1), ([30, 30, -10, 10], 1)]
    counts = report(capsys)
    assert (counts["clipped"], counts["outside"], counts["empty"], counts["marked iscrowd"]) == (3, 2, 2, 4)
    assert counts["without faces"] == 1 and len(boxes(folder / "out.json")) == 7  # however large they are


def test_upright_size_is_meant(folder, refused):
    """A photo that its EXIF turns is measured upright. Labels of the lying photo are refused."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (100, 60)).save(folder / "images/t.jpg", exif=exif)
    yolo(folder, "0 0.5 0.25 0.5 0.5\n", photos=("t.jpg",))
    run(folder / "labels", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("t.jpg", 15, 0, 30, 50)])
    (folder / "t.csv").write_text("filename\tpath\twidth\theight\txmin\tymin\txmax\tymax\n"
                                  "t.jpg\tother.jpg\t100\t60\t1\t1\t90\t50\n")
    assert "labelled at 100x60, but the photo 't.jpg' is 60x100, upright" in refused(
        main, folder / "t.csv", folder / "x.json")


BOX, MARKS = "0 0.5 0.5 0.25 0.5", " 0.5 0.5" * 5


@pytest.mark.parametrize("rows, box, yaml", [
    (BOX, (36, 18, 24, 36), ""),                                # a box
    ("0 0.5 0.5 0.25 0.5 0.93", (36, 18, 24, 36), ""),                           # with its score
    ("0 0.5 0.5 0.25 0.5 3", (36, 18, 24, 36), ""),                              # with the number of a track
    ("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5", (24, 18, 48, 36), ""),             # an oriented box
    ("0 0.5 0.45 0.55 0.5 0.5 0.55 0.45 0.5", (43.2, 32.4, 9.6, 7.2), ""),       # that might hold points
    ("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5 0.9 4", (24, 18, 48, 36), ""),
    ("0 0.25 0.5 0.5 0.5 0.5 0", (24, 0, 24, 36), ""),
    ("0 0.4 0.4 0.6 0.4 0.6 0.6 0.5 0.7 0.4 0.6", (38.4, 28.8, 19.2, 21.6), "kpt_shape: [0, 0]"),
    ("0 0.9 0.9 0.5 0.9 0.7 0.6 0.95 0.6", (48, 43.2, 43.2, 21.6), ""),          # no box is beyond the photo
    (BOX + " 0.5 0.5 2" * 5, (36, 18, 24, 36), ""),             # a box with landmarks
    (BOX + MARKS, (36, 18, 24, 36), "kpt_shape:\n- 5\n- 2"),
    (BOX + MARKS + " 0.9 7", (36, 18, 24, 36), "kpt_shape:  # points\n  - 5\n  - 2")])
def test_forms_of_yolo(folder, rows, box, yaml):
    yolo(folder, rows + "\n", f"{yaml}\nnames: [face]\n" if yaml else "")
    run(folder / "labels", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", *box)])


@pytest.mark.parametrize("rows", [
    BOX + MARKS + " -1 -1", BOX + " 0.5 0.5 0.7" * 5, f"{BOX}{MARKS} 0.5 0.5 0.9\n{BOX}{MARKS} 0.5 0.5 0.9 2",
    "0 0.5 0.5 0.3 0.5 0.45 0.5 0.55 0.5\n" * 3 + "0 0.5 0.5 0.1 0.5 0 0 1 0.9"])
def test_landmarks_are_taken_for_no_polygon(folder, refused, rows):
    yolo(folder, rows)
    message = refused(main, folder, folder / "o.json")
    assert "a box and its landmarks, or a polygon? Write kpt_shape" in message
    yolo(folder, "0" + " 0.5 0.5" * 30, photos=("b.jpg",))  # polygons have all lengths
    run(folder, folder / "o.json")


@pytest.mark.parametrize("text", ["names:\n- face\n- a b\nnc: 2", "nc: 2\nnames:\n  0: face\n  1: a b\n",
                                  "# names: [x]\nnames: &x [face, 'a b']"])
def test_names_of_data_yaml(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    assert read_names(tmp_path / "data.yaml")[0] == ["face", "a b"]


@pytest.mark.parametrize("text", ["names: [[face]]", "names:", "names:\n  1: face", "names: face.names\n"])
def test_other_names_are_refused(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError, match="names are not understood.*write names: "):
        read_names(tmp_path / "data.yaml")


@pytest.mark.parametrize("name", ["labels", "obj_names", "train.0001"])
def test_a_text_is_a_label_if_it_has_a_photo(folder, capsys, name):
    yolo(folder, "0 0.5 0.5 0.25 0.5\n")
    (folder / "labels" / f"{name}.txt").write_text("face\nmask\n")
    run(folder, folder / "out.json")
    assert len(boxes(folder / "out.json")) == 1 and report(capsys)["left out: txt of no photo"] == 1
    (folder / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "images/b.jpg").rename(folder / "images" / f"{name}.jpg")
    run(folder / "labels", folder / "out.json")
    assert len(boxes(folder / "out.json")) == 2


@pytest.mark.parametrize("photo, label", [
    ("\xe9 1.jpg", "%C3%A9%201"), ("x y.jpg", "cb0618f6-x_y"), ("caf\xe9.jpg", "0a1b2c3d-cafe\u0301")])
def test_photos_are_found_by_names_as_tools_write_them(folder, photo, label):
    (folder / "images/a.jpg").rename(folder / "images" / photo)
    yolo(folder, "0 0.5 0.5 0.5 0.5\n", photos=(label + ".jpg",))
    run(folder, folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [(photo, 24, 18, 48, 36)])
    shutil.copy(folder / "images/b.jpg", folder / "images" / (label + ".png"))  # an exact name comes first
    run(folder, folder / "out.json")
    assert [row[0] for row in boxes(folder / "out.json")] == [label + ".png"]


def coco(name, size=(96, 72), **keys):
    """A COCO content of one face on one photo; `keys` are other ids."""
    key, image, face, category = (keys.get(key, 1) for key in ("key", "image", "face", "category"))
    return json.dumps({"images": [{"id": key, "file_name": str(name), "width": size[0], "height": size[1]}],
                       "categories": [{"id": category, "name": "face"}], "annotations": [
                           {"image_id": image, "category_id": 1, "bbox": [1, 2, 30, 40], "area": None}
                           | ({"id": face} if face else {})]})


@pytest.mark.parametrize("keys", [{"image": "1"}, {"key": 1.0}, {"face": None}, {"category": "1"}])
def test_ids_of_coco_match_by_value(folder, keys):
    (folder / "x.json").write_text(coco("a.jpg", **keys))
    run(folder / "x.json", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 1, 2, 30, 40)])


def test_coco_of_roboflow_and_cvat(folder, capsys):
    """Roboflow declares a category above the others, CVAT turns boxes."""
    content = json.loads(coco("a.jpg"))
    content["categories"] = [{"id": 0, "name": "faces", "supercategory": "none"},
                             {"id": 1, "name": "head", "supercategory": "faces"}]
    content["annotations"][0] |= {"bbox": [40, 20, 20, 10], "attributes": {"rotation": 90, "occluded": True},
                                  "iscrowd": 1}
    (folder / "x.json").write_text(json.dumps(content))
    run(folder / "x.json", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 45, 15, 10, 20)])
    counts = report(capsys)
    assert counts["occluded"] == counts["marked iscrowd"] == 1


@pytest.mark.parametrize("name", ["../images/a.jpg", "{}/images/a.jpg", "../a.jpg"])
def test_a_path_from_the_json_comes_first(folder, name):
    (folder / "j").mkdir()
    for other in ("j/a.jpg", "a.jpg", "j/x.jpg"):
        Image.new("L", (60, 80)).save(folder / other)
    right = folder / "images/a.jpg" if "images" in name else folder / "a.jpg"
    (folder / "j/m.json").write_text(coco(name.format(folder), Image.open(right).size))
    for photos in ([], [folder / "j"]):
        run(folder / "j/m.json", *photos, folder / "out.json")
        assert read_annotations(folder / "out.json").file(0).resolve() == right.resolve()
    (folder / "j/m.json").write_text(coco("C:\\photos\\x.jpg", (60, 80)))
    run(folder / "j/m.json", folder, folder / "out.json")
    assert read_annotations(folder / "out.json").names == ["j/x.jpg"]


@pytest.mark.parametrize("text", ["# d/a.jpg\n10 20 30 40 11 21 0.0 12 22 0.0\n1 2 0 0\n# b.jpg\n",
                                  "# d/a.jpg 96 72\n10 20 40 60 -1 -1 -1\n1 2 1 2\n# b.jpg 60 80\n"])
def test_text_of_retinaface(folder, capsys, text):
    """RetinaFace's has x y w h, SCRFD's sizes and corners."""
    (folder / "label.txt").write_text(text)
    run(folder / "label.txt", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 10, 20, 30, 40), ("a.jpg", 1, 2, 0, 0)])
    counts = report(capsys)
    assert (counts["empty"], counts["without faces"], counts["photos"]) == (1, 1, 2)
    assert "left out: photos without labels" not in counts  # nobody named their folder
    run(folder / "label.txt", folder / "images", folder / "yolo", "--to", "yolo")
    counts = report(capsys)
    left_out = counts["left out: iscrowd"], counts["left out: photos without labels"]
    assert (counts["faces"], *left_out) == (1, 1, 1)


def test_label_studio_tasks_and_uploads(folder, capsys):
    """Tasks that nobody finished are left out, of several annotations the newest counts."""
    value = {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["face"]}

    def annotation(day, x, **more):
        region = {"original_width": 96, "original_height": 72, "value": value | {"x": x}}
        return {"result": [region], "created_at": f"2026-01-0{day}", **more}
    tasks = [{"id": 1, "updated_at": "2026-05", "data": {"image": "/data/upload/7/0123abcd-a.jpg"},
              "annotations": [annotation(2, 25, updated_at="2026-02-01"), annotation(3, 0),
                              annotation(3, 1, was_cancelled=True, updated_at="2026-03")]},
             {"id": 2, "data": {"image": "https://host/x/b.jpg?token=1"}, "annotations": []},
             {"id": 3, "data": {"image": "/data/local-files/?d=some/c.jpg"}, "annotations": [{"result": []}]},
             {"id": 4, "data": {"image": "/data/upload/7/aaaaaaaa-a.jpg"},
              "annotations": [annotation(4, 0, updated_at="2026-04")]}]
    (folder / "x.json").write_text(json.dumps(tasks))
    run(folder / "x.json", folder / "out.json")
    assert [Path(name).name for name in read_annotations(folder / "out.json").names] == ["a.jpg", "c.jpg"]
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 24, 7.2, 48, 36)])
    counts = report(capsys)
    assert counts["left out: older annotations"] == counts["left out: tasks not annotated"] == 1
    assert counts["left out: photos labelled again"] == 1
    least = [{"id": n, "image": name, "annotation_id": own, "label": [value]}
             for n, (name, own) in enumerate((("a.jpg", None), ("c.jpg", 5)))]
    (folder / "x.json").write_text(json.dumps(least))
    run(folder / "x.json", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("c.jpg", 8, 6, 40, 30)])


def test_cvat_shapes(folder, capsys):
    shapes = ('<box label="face" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90">'
              '<attribute name="difficult">true</attribute></box>'
              '<ellipse label="face" cx="30" cy="30" rx="10" ry="5" rotation="0"/>'
              '<mask label="face" left="1" top="2" width="3" height="4" rle="1"/>'
              '<polyline label="face" points="1,1"/>')
    (folder / "x.xml").write_text(f'<annotations><image id="0" name="d/a.jpg" width="96" height="72">{shapes}'
                                  "</image></annotations>")
    run(folder / "x.xml", folder / "out.json")
    assert_boxes(boxes(folder / "out.json"), [("a.jpg", 45, 15, 10, 20), ("a.jpg", 1, 2, 3, 4)])
    counts = report(capsys)
    assert counts["left out: shapes: polyline"] == counts["left out: shapes: ellipse"] == 1
    assert counts["marked iscrowd"] == 1


BOMB = '<!DOCTYPE x [<!ENTITY a "aa">]><annotation>&a;</annotation>'
IMAGES = '"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "%s"}]'
TASK = ('[{"data": {"image": "a.jpg"}, "annotations": [{"result": [{%s, "value": '
        '{"rotation": %d, "x": 1, "y": 1, "width": 9, "height": 9}}]}]}]')
REFUSED = {  # the file: (its content, part of the message)
    "x.txt": ("0 0.5 0.5 0.1 0.1", "x.txt: of YOLO, name the folder"),
    "x.zip": ("PK", "x.zip: not labels that are known (unpack archives first)"),
    "x.json": ("{}", "x.json: neither COCO, with lists"),
    "id.json": ('{"images": [1], "annotations": []}', 'id.json: "images" must be a list of objects'),
    "orphan.json": ('{"images": [], "annotations": [{"id": 4, "image_id": 9, "bbox": [1, 1, 1, 1]}]}',
                    "orphan.json: annotation 4: belongs to image 9"),
    "rle.json": ('{%s, "annotations": [{"id": 4, "image_id": 1, "segmentation": {"counts": "x"}}]}'
                 % IMAGES, "rle.json: annotation 4: has neither a bbox"),
    "twice.json": ("{%s}" % IMAGES % "x/a.jpg", "twice.json: image 2: labels 'images/a.jpg' a second time"),
    "absent.json": ("{%s}" % IMAGES % "no.jpg", "1 of the 2 labelled photos are not below it ('no.jpg')"),
    "turned.json": (TASK % ('"id": 1', 5), "task 0: original_width is 'None', a number is"),
    "swapped.json": (TASK % ('"original_width": 72, "original_height": 96', 0),
                     "swapped.json: task 0: labelled at 72x96, but the photo 'a.jpg' is 96x72"),
    "lists.json": ('[{"data": {"image": "a.jpg"}, "annotations": [{"result": [5]}]}]',
                   "lists.json: cannot be read as labels (AttributeError"),
    "tasks.json": ('[{"data": {"text": "x"}, "annotations": []}]', "tasks.json: task 0: names no picture"),
    "createml.json": ('[{"image": "a.jpg", "annotations": []}]', "is CreateML's; export COCO"),
    "labelme.json": ('{"shapes": [], "imagePath": "a.jpg"}', "labelme.json: is labelme's; its labelme2coco"),
    "regions.json": ('{"a.jpg9": {"filename": "a.jpg", "regions": []}}', "is VIA's; export COCO"),
    "datumaro.json": ('{"items": [], "categories": {}}', "datumaro.json: is Datumaro's; convert it to coco"),
    "label.txt": ("# a.jpg\n1 2 3", "label.txt:2: '1 2 3' is neither '# photo' nor x y w h of a face"),
    "shape.yaml": ("kpt_shape: five", "shape.yaml: kpt_shape is not understood, 'five'"),
    "open.yaml": ("names: [face", "open.yaml: not YAML (while parsing"),
    "bomb.xml": (BOMB, "bomb.xml: declares a document type or entities"),
    "broken.xml": ("<annotation>", "broken.xml: not XML"),
    "other.xml": ("<svg/>", "other.xml: <svg> is neither Pascal VOC's"),
    "unnamed.xml": ("<annotations><image/></annotations>", "unnamed.xml: image 0: has no name"),
    "points.xml": ('<annotations><image name="a.jpg"><polygon points="1,2,3;4,5,6"/></image></annotations>',
                   "points.xml: image 0: <polygon>: points are not all pairs"),
    "video.xml": ("<annotations><track/></annotations>", "video.xml: holds tracks of a video; export"),
    "x.csv": ("a,b\n1,2\n", "x.csv: rows of file,x1,y1,x2,y2 and maybe a label are expected"),
    "unit.csv": ("a.jpg,0.1,0.1,1,0.5", "unit.csv: all boxes are within 0 to 1, pixels are expected"),
    "long.csv": ("a.jpg,1,2,3,4,face,9", "long.csv:1: 'a.jpg,1,2,3,4,face,9' is no row of file,x1"),
    "under.csv": ("a.jpg,1,2,3,1_0", "under.csv:1: y2 is '1_0', a number is expected"),
    "inf.csv": ("a.jpg,1,2,3,4\na.jpg,1,2,3,1e999", "inf.csv:2: y2 is '1e999', a number is expected"),
    "out.csv": ("../../secret.jpg,1,2,3,4",
                "1 of the 1 labelled photos are not below it ('../../secret.jpg')"),
    "utf-16.csv": ("\udcff\udcfe", "utf-16.csv: not UTF-8 text (byte 0)"),
    "labels/a.txt": ("0 48 36 24 24", "a.txt:1: 48 is no fraction of a photo's side"),
    "labels/short/a.txt": ("0 0.5 0.5 0.1", "a.txt:1: 4 numbers; class cx cy w h"),
    "labels/class/a.txt": ("0.5 0.5 0.5 0.1 0.1", "a.txt:1: class '0.5'; a whole number"),
    "labels/15/a.txt": ("0" + " 0.5" * 14, "lines have 15 numbers: a box and its landmarks, or a polygon"),
    "labels/none.txt": ("0 0.5 0.5 0.1 0.1", "1 of the 1 labelled photos are not below it ('labels/none")}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_labels_are_refused(folder, refused, name):
    (folder.parent / "secret.jpg").write_bytes((folder / "images/a.jpg").read_bytes())
    content, message = REFUSED[name]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    for to in ("coco", "yolo"):
        labels = path.parent if "/" in name else path
        assert message in refused(main, labels, folder / "new" / "out", "--to", to)
    assert not list(folder.glob("new/*")) and not list(folder.glob("new/.*"))


def test_mixed_and_ambiguous_folders_are_refused(folder, refused):
    yolo(folder, "0 0.5 0.5 0.5 0.5\n")
    shutil.copy(SAMPLES / "labelimg-voc/a.xml", folder / "a.xml")
    assert "holds txt and xml files" in refused(main, folder, folder / "o.json")
    (folder / "old").mkdir()
    shutil.copy(folder / "images/a.jpg", folder / "old/a.jpg")
    (folder / "z.csv").write_text("q/a.jpg,1,2,30,40\n")
    assert "'q/a.jpg' may be 'images/a.jpg' or 'old/a.jpg' below" in refused(
        main, folder / "z.csv", folder / "o.json")
    (folder / "z.csv").write_text("old/JPEGImages/a.jpg,1,2,30,40\n")
    run(folder / "z.csv", folder / "o.json")
    assert read_annotations(folder / "o.json").names == ["old/a.jpg"]


def test_nothing_is_written_over(folder, refused):
    shutil.copy(SAMPLES / "truth.json", folder / "x.json")
    assert "or the labels themselves" in refused(main, folder / "x.json", folder / "x.json")
    assert "is a folder that is there" in refused(main, folder / "x.json", folder / "images", "--to", "yolo")
    for _ in range(2):  # the output in the labels' folder is no input the second time
        run(folder, folder / "o.json")
    before = (folder / "o.json").read_bytes()
    Image.new("L", (9, 9)).save(folder / "images/a.png")
    (folder / "x.csv").write_text("a.jpg,1,2,30,40\na.png,1,2,3,4\n")
    assert "would share the label a.txt" in refused(main, folder / "x.csv", folder / "new", "--to", "yolo")
    (folder / "images/a.jpg").write_text("no picture")
    assert "1 unreadable ('images/a.jpg')" in refused(main, folder / "x.json", folder / "o.json")
    assert (folder / "o.json").read_bytes() == before and not (folder / "new").exists()


@pytest.mark.parametrize("name, content", [
    (".", None), ("x.xml", "<annotation/>"), ("absent.json", None),
    ("y.json", json.dumps(TRUTH | {"categories": [{"id": 1, "name": "head"}, {"id": 2, "name": "mask"}]}))])
def test_other_scripts_name_this_one(tmp_path, refused, name, content):
    if content:
        (tmp_path / name).write_text(content)
    assert "python -m tools.labels_to_coco" in refused(evaluate.main, "--data", tmp_path / name)


@pytest.mark.parametrize("name", ["/absent/a.jpg", "C:\\photos\\a.jpg"])
def test_photos_that_are_elsewhere_are_found_by_this_one(folder, refused, name):
    """As in COCO's own layout, annotations/x.json and a folder of photos, or with another machine's paths."""
    (folder / "annotations").mkdir()
    path = folder / "annotations/x.json"
    path.write_text(coco(name, face=5))
    for script, flags in ((evaluate, []), (look, []), (train, ["--out", folder / "run"])):
        assert f"python -m tools.labels_to_coco {path} PHOTOS" in refused(script.main, "--data", path, *flags)
    run(path, folder / "out.json")
    assert read_annotations(folder / "out.json").names == ["images/a.jpg"]
