"""Write the samples beside this file with the tools themselves: README.md says which and how to install them.

PYTHONPATH=../.. python make.py    # in this folder; everything but the hand-written csv is made again
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SIZES = {"a.jpg": (96, 72), "b.jpg": (60, 80), "c.jpg": (80, 60)}  # c.jpg has no label
BOXES = [
    ("a.jpg", "face", (10.25, 8.5, 40.75, 45.25)),
    ("a.jpg", "mask", (15.5, 30.0, 36.0, 44.5)),
    ("a.jpg", "face", (55.0, 20.0, 73.5, 44.0)),
    ("b.jpg", "face", (0.0, 12.25, 31.5, 52.0)),
]  # xyxy
NAMES = ["face", "mask"]


def photos(folder):
    """Draw the three photos."""
    from tools.sample import photo

    folder.mkdir(parents=True)
    for n, (name, size) in enumerate(SIZES.items()):
        image = photo(np.random.default_rng(n), *size, empty=name == "c.jpg")[1]
        image.save(folder / name, quality=40)


def truth(path):
    """The labels in COCO form, from which the other tools start."""
    images = [
        {"id": n, "file_name": name, "width": w, "height": h}
        for n, (name, (w, h)) in enumerate(SIZES.items(), 1)
    ]
    ids = {image["file_name"]: image["id"] for image in images}
    boxes = [
        {
            "id": n,
            "image_id": ids[name],
            "category_id": NAMES.index(label) + 1,
            "iscrowd": 0,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
        }
        for n, (name, label, (x1, y1, x2, y2)) in enumerate(BOXES, 1)
    ]
    path.write_text(
        json.dumps(
            {
                "images": images,
                "annotations": boxes,
                "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)],
            }
        )
    )


def by_datumaro():
    """YOLO, Pascal VOC, CVAT and COCO, the last two also of polygons."""
    import datumaro as dm
    from datumaro.components.media import Image

    items = [
        dm.DatasetItem(
            Path(name).stem,
            subset="train",
            media=Image.from_file(path=str(HERE / "photos" / name)),
            attributes={"frame": n},
            annotations=[
                dm.Bbox(
                    x1,
                    y1,
                    x2 - x1,
                    y2 - y1,
                    label=NAMES.index(label),
                    id=m,
                    group=m,
                    attributes={"occluded": m == 2, "difficult": m == 2, "truncated": m == 3},
                )
                for m, (own, label, (x1, y1, x2, y2)) in enumerate(BOXES)
                if own == name
            ],
        )
        for n, name in enumerate(SIZES)
    ]
    dataset = dm.Dataset.from_iterable(items, categories=NAMES)
    for form in ("yolo", "voc_detection", "cvat", "coco_instances"):
        dataset.export(str(HERE / f"datumaro-{form}"), form, save_media=False)
    polygons = [
        item.wrap(
            annotations=[
                dm.Polygon(
                    [box.x, box.y, box.x + box.w, box.y, box.x + box.w / 2, box.y + box.h],
                    label=box.label,
                    id=box.id,
                    group=box.group,
                )
                for box in item.annotations
            ]
        )
        for item in items
    ]
    dataset = dm.Dataset.from_iterable(polygons, categories=NAMES)
    for form in ("cvat", "coco_instances"):
        dataset.export(str(HERE / f"datumaro-{form}-polygons"), form, save_media=False)


def by_label_studio():
    """Label Studio's full json, and of it JSON-MIN and YOLO, also with turned boxes."""
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.converter.imports.coco import convert_coco_to_ls

    folder = HERE / "label-studio"
    folder.mkdir()
    convert_coco_to_ls(
        str(HERE / "truth.json"),
        str(folder / "full.json"),
        out_type="annotations",
        image_root_url="/data/local-files/?d=photos",
    )
    tasks = json.loads((folder / "full.json").read_text())
    for n, task in enumerate(tasks, 1):
        task["id"] = n  # the server gives these
        for m, annotation in enumerate(task["annotations"]):
            annotation |= {"id": 10 * n + m, "completed_by": 1, "created_at": "2026-11-24T00:00:00Z"}
    (folder / "full.json").write_text(json.dumps(tasks))
    config = (folder / "full.label_config.xml").read_text()
    converter = Converter(config, project_dir=str(HERE), upload_dir=str(HERE / "photos"))
    converter.convert_to_json_min(str(folder / "full.json"), str(folder), is_dir=False)
    (folder / "result.json").rename(folder / "min.json")
    converter.convert_to_yolo(str(folder / "full.json"), str(HERE / "label-studio-yolo"), is_dir=False)
    for task in tasks:
        for region in task["annotations"][0]["result"]:
            region["value"]["rotation"] = 30
    (folder / "turned.json").write_text(json.dumps(tasks))
    converter.convert_to_yolo(
        str(folder / "turned.json"), str(HERE / "label-studio-yolo-turned"), is_dir=False, is_obb=True
    )


def by_labelimg():
    """Pascal VOC and YOLO, in whole pixels."""
    from libs.pascal_voc_io import PascalVocWriter
    from libs.yolo_io import YOLOWriter

    for form in ("voc", "yolo"):
        folder = HERE / f"labelimg-{form}"
        folder.mkdir()
        for name, (width, height) in SIZES.items():
            own = [(label, box) for photo, label, box in BOXES if photo == name]
            if own:
                writer = (PascalVocWriter if form == "voc" else YOLOWriter)(
                    "photos", name, (height, width, 3)
                )
                for label, box in own:
                    writer.add_bnd_box(*map(round, box), label, 0)
                if form == "voc":
                    writer.save(str(folder / Path(name).with_suffix(".xml")))
                else:
                    writer.save(
                        class_list=list(NAMES), target_file=str(folder / Path(name).with_suffix(".txt"))
                    )


def by_ultralytics():
    """YOLO: boxes, and polygons, from COCO."""
    from ultralytics.data.converter import convert_coco

    for form, segments in (("boxes", False), ("polygons", True)):
        source = HERE / "coco-source"
        source.mkdir()
        content = json.loads((HERE / "truth.json").read_text())
        for box in content["annotations"]:
            x, y, w, h = box["bbox"]
            box["segmentation"] = [[x, y, x + w, y, x + w / 2, y + h]] if segments else []
        (source / "train.json").write_text(json.dumps(content))
        convert_coco(str(source), str(HERE / f"ultralytics-{form}"), use_segments=segments, cls91to80=False)
        shutil.rmtree(source)
        (HERE / f"ultralytics-{form}/data.yaml").write_text("names:\n  0: face\n  1: mask\n")


def by_supervision():
    """Roboflow's library: YOLO and COCO."""
    import supervision as sv

    files = {str(HERE / "photos" / name): name for name in SIZES}
    detections = {}
    for file, name in files.items():
        own = [(NAMES.index(label), box) for photo, label, box in BOXES if photo == name]
        detections[file] = (
            sv.Detections(
                xyxy=np.array([box for _, box in own], float).reshape(-1, 4),
                class_id=np.array([label for label, _ in own], int),
            )
            if own
            else sv.Detections.empty()
        )
    dataset = sv.DetectionDataset(classes=NAMES, images=list(files), annotations=detections)
    folder = HERE / "supervision-yolo"
    dataset.as_yolo(
        annotations_directory_path=str(folder / "labels"), data_yaml_path=str(folder / "data.yaml")
    )
    dataset.as_coco(annotations_path=str(HERE / "supervision-coco.json"))


def by_hand():
    """CSV, as many notebooks write it with Python's csv."""
    with open(HERE / "hand.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([name, *box, label] for name, label, box in BOXES)
        writer.writerow(["c.jpg", "", "", "", "", ""])
    with open(HERE / "hand-tensorflow.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("filename width height class xmin ymin xmax ymax".split())
        writer.writerows([name, *SIZES[name], label, *box] for name, label, box in BOXES)


if __name__ == "__main__":
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    photos(HERE / "photos")
    truth(HERE / "truth.json")
    for make in (by_hand, by_labelimg, by_datumaro, by_label_studio, by_supervision, by_ultralytics):
        make()
