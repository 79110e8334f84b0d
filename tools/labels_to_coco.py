"""Convert labels of other tools to a COCO json of faces, or to YOLO.

    python -m tools.labels_to_coco LABELS [PHOTOS] mine.json
    python -m tools.labels_to_coco export.json photos mine.json --category face mask
    python -m tools.labels_to_coco mine.json --to yolo mine-yolo

LABELS is a file or folder of YOLO, Pascal VOC, CVAT, Label Studio, COCO, CSV or RetinaFace. Photos are where
the labels say, or found by name anywhere below PHOTOS, or around the labels. More in docs/labels.md.
"""

import csv
import os
import re
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from pathlib import Path

from support.script import InputError, command, Parser, read_json, require, write_json

from support.coco import clip
from support.pictures import LISTED, PICTURES, read_sizes
from tools.labels import (FLAGS, LABEL_FOLDERS, Photo, find_files, photos_around, read_coco, read_csv,
                          read_label_studio, read_retinaface, read_xml)
from tools.yolo import begins_with_a_box, read_yolo, write_yolo

KINDS = LABEL_FOLDERS | {"images", "jpegimages"}  # folders that only part labels from photos
KNOWN = "a folder of YOLO txt or Pascal VOC xml, CVAT's xml, json of Label Studio or COCO, or csv is expected"
OTHER_TOOLS = {  # keys of their json: whose it is, and what to do
    ("_via_img_metadata",): "VIA's project; export its annotations as COCO",
    ("filename", "regions"): "VIA's; export COCO instead",
    ("shapes", "imagePath"): "labelme's; its labelme2coco.py makes COCO",
    ("items", "categories"): "Datumaro's; convert it to coco_instances",
    ("image", "annotations"): "CreateML's; export COCO or Pascal VOC instead"}


def read_labels(path, own=None):
    """Read the file or folder `path` of any known format, but for `own`, the file to write. Or InputError."""
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path, own)
    kind = path.suffix.lower()
    readers = {".yaml": read_yolo, ".yml": read_yolo, ".csv": read_csv, ".json": _read_json,
               ".xml": lambda file: read_xml([file], file.parent), ".txt": read_retinaface}
    require(kind in readers, f"{path}: not labels that are known (unpack archives first); {KNOWN}")
    return readers[kind](path)


def _read_folder(folder, own):
    """Read the one kind of labels that is in a folder. A json counts where nothing else is."""
    files = {kind: find_files(folder, {f".{kind}"}) for kind in ("txt", "xml", "csv", "json")}
    files["json"] = [file for file in files["json"] if file.name != "notes.json"  # Label Studio's, by YOLO
                     and os.path.realpath(file) != os.path.realpath(own)]
    kinds = [kind for kind in ("xml", "csv") if files[kind]]
    if any(map(begins_with_a_box, files["txt"])):
        kinds.append("txt")
    if not kinds:
        kinds = [kind for kind in ("json", "txt") if files[kind]][:1]
    found = [file for kind in kinds for file in files[kind]]
    require(found, f"{folder}: no labels in it; {KNOWN}")
    if kinds == ["txt"]:
        return read_yolo(folder)
    if kinds == ["xml"]:
        return read_xml(found, folder)
    labels = read_labels(found[0]) if len(kinds) == 1 else None  # of another tool it is refused
    require(len(found) == 1, f"{folder}: holds {' and '.join(sorted(kinds))} files, such as {found[0]} and "
            f"{found[-1]}; name the file or folder of one kind")
    return labels


def _read_json(path):
    """Read Label Studio's json, full or JSON-MIN, or a COCO file; other tools' is refused."""
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return read_coco(path, content)
    entries = [*content.values()] if isinstance(content, dict) else content
    for own in [content, *entries[:1]] if isinstance(entries, list) else []:
        for keys, message in OTHER_TOOLS.items():
            require(not isinstance(own, dict) or not {*keys} <= own.keys(), f"{path}: is {message}")
    require(isinstance(content, list) and content and all(isinstance(task, dict) for task in content),
            f'{path}: neither COCO, with lists "images" and "annotations", nor Label Studio\'s list of tasks')
    return read_label_studio(path, content)


def _parts(name):
    """The folders of a name from the last on, without those that only part labels from photos."""
    return [part for part in reversed(re.split(r"[\\/]", str(name))[:-1])
            if part not in ("", ".", "..") and part.lower() not in KINDS]


def _forms(name):
    """What a photo may be found by, best first: its name, that without ending, and both made plain."""
    base, plain = (re.split(r"[\\/]", own)[-1] for own in (name, urllib.parse.unquote(name)))
    # Label Studio writes 0123abcd-a_b for a b, and may quote it as a URL; a Mac takes accents off letters.
    plain = re.sub(r"^[0-9a-f]{8}-(?=.)", "", unicodedata.normalize("NFC", plain).replace(" ", "_"))
    return list(enumerate((base, base.rsplit(".", 1)[0], plain, plain.rsplit(".", 1)[0])))


def _candidates(photo, by_form, root, folder):
    """The pictures that `photo` may be: the one at its path, or of those of a like name the nearest."""
    for name in photo.names:
        for file in (os.path.join(folder, name), os.path.join(root, name)):
            if Path(name).suffix.lower() in PICTURES and os.path.isfile(file):
                return [Path(os.path.relpath(file, root)).as_posix()]
    forms = [(name, form) for name in photo.names for form in _forms(name) if form in by_form]
    own, pictures = (_parts(forms[0][0]), by_form[forms[0][1]]) if forms else ([], [])
    shared = [(len(os.path.commonprefix([own, _parts(name)])), own == _parts(name)) for name in pictures]
    return [picture for picture, rank in zip(pictures, shared) if rank == max(shared)]


def find_photos(labels, root, folder):
    """Find each labelled photo from `folder` on or below `root`: ({path from root: Photo}, other photos)."""
    pictures = [file.relative_to(root).as_posix() for file in find_files(root, PICTURES)]
    by_form, found, missing = defaultdict(list), {}, []
    for picture in pictures:
        for form in _forms(picture):
            by_form[form].append(picture)
    for photo in labels.photos:
        candidates = _candidates(photo, by_form, root, folder)
        if not candidates:
            missing.append(photo)
            continue
        require(len(candidates) == 1, f"{photo.place}: {photo.names[0]!r} may be {candidates[0]!r} or "
                f"{candidates[-1]!r} below {root}; name a folder that holds one of them")
        if photo.problem:
            raise photo.problem
        other = found.setdefault(candidates[0], photo)
        if other is not photo:
            require(photo.updated and other.updated,
                    f"{photo.place}: labels {candidates[0]!r} a second time, first {other.place}")
            found[candidates[0]] = max(photo, other, key=lambda one: one.updated)
            labels.left_out["photos labelled again"] += 1
    absent = [repr(photo.names[0]) for photo in missing
              if labels.format != "YOLO" or photo.labels and not photo.problem]
    require(not absent, f"{root}: {len(absent):,} of the {len(labels.photos):,} labelled photos are not "
            f"below it ({', '.join(absent[:LISTED])}); name their folder, and all are needed")
    labels.left_out["txt of no photo"] = len(missing)
    return found, [picture for picture in pictures if picture not in found]


def choose_categories(path, counts, wanted):
    """Which of the categories {name: labels} are faces: `wanted`, the one named so, or the only one."""
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
    for name in wanted:
        require(name in counts, f"{path}: no category {name!r}, there are: {listed}")
    named = [name for name in counts if name.strip().lower() == "face"]
    require(wanted or len(named) == 1 or len(counts) < 2,
            f"{path}: which category is the face? Choose with --category, there are: {listed}")
    return set(wanted or named or counts)


def to_coco(photos, relative, names, sizes, faces):
    """Make the COCO content of photos: (content, counts of what was found). `faces` are categories."""
    images, annotations, met = [], [], Counter()
    for image_id, (photo, name, (width, height)) in enumerate(zip(photos, names, sizes), 1):
        stated = tuple(photo.size) if photo.size and all(photo.size) else (width, height)
        require(stated == (width, height) or relative and stated != (height, width),
                f"{photo.place}: labelled at {stated[0]:g}x{stated[1]:g}, but the photo {photo.names[0]!r} "
                f"is {width}x{height}, upright; was it resized or turned since?")
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        scale = (width, height) if relative else (1, 1)
        for label in [own for own in photo.labels if own.category in faces]:
            x1, y1, x2, y2 = (round(value * scale[n % 2], 4) for n, value in enumerate(label.box))
            box, kind = clip([x1, y1, x2 - x1, y2 - y1], width, height)
            box = [round(value, 4) for value in box]
            ignored = any(label.flags.get(key) for key in ("difficult", "ignore", "iscrowd"))
            face = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": box,
                    "area": min(round(max(box[2], 0) * max(box[3], 0), 4), 1e14), **label.flags,
                    "iscrowd": int(ignored or kind in ("empty", "outside"))}
            annotations.append(face)
            met.update({**label.flags, kind: 1, "marked iscrowd": face["iscrowd"]})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}, met


def convert(path, photos, out, wanted, to):
    """Convert the labels `path` of `photos` to `out`: the format, the photos' folder, the counts found."""
    require(not photos or photos.is_dir(), f"{photos}: no such folder of photos")
    require(os.path.realpath(out) != os.path.realpath(path) and not out.is_dir(),
            f"{out}: is a folder that is there, or the labels themselves; name another for the output")
    try:
        labels = read_labels(path, out)
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:  # a list for an object, say
        raise InputError(f"{path}: cannot be read as labels ({type(error).__name__}: {error})") from None
    around = photos_around(path) if path.is_dir() else path.parent
    shown = photos or photos_around(around)
    root, around = os.path.realpath(shown), os.path.realpath(around)  # ".." after a link leads elsewhere
    found, others = find_photos(labels, Path(root), around)
    require(found, f"{path}: labels no photos (a text of RetinaFace is to be named itself)")
    counts = Counter(dict.fromkeys(labels.categories, 0))
    counts.update(label.category for photo in found.values() for label in photo.labels)
    faces = choose_categories(path, counts, wanted)
    folders = {os.path.dirname(name) for name in found}
    plain = [name for name in others if labels.format == "YOLO" and os.path.dirname(name) in folders]
    found |= {name: Photo([name], name, []) for name in plain}
    labels.left_out["photos without labels"] = (len(others) - len(plain)) * bool(photos)
    sizes = read_sizes(list(found), root)
    files, folder = [os.path.join(root, name) for name in found], os.path.realpath(out.parent)
    names = [Path(os.path.relpath(file, folder)).as_posix() for file in files]
    content, met = to_coco(found.values(), labels.relative, names, sizes, faces)
    annotations = [face for face in content["annotations"] if to == "coco" or not face["iscrowd"]]
    if to == "coco":
        write_json(out, content)
    else:
        labels.left_out["iscrowd"] = met.pop("marked iscrowd", 0)
        names = ["/".join([*reversed(_parts(name)), os.path.basename(name)]) for name in found]
        write_yolo(out, files, names, content["images"], annotations)
    with_faces = len({face["image_id"] for face in annotations})
    report = {f"category {name}{' (face)' if name in faces else ''}": count for name, count in counts.items()}
    report |= {"photos": len(found), "without faces": len(found) - with_faces, "faces": len(annotations),
               "photos without txt": len(plain)}
    report |= {key: met[key] for key in (*FLAGS[:-1], "empty", "clipped", "outside", "marked iscrowd")}
    report |= {f"left out: {what}": count for what, count in labels.left_out.items()}
    return labels.format, shown, report


@command
def main(argv=None):
    """Convert labels, and print what was found in them."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("labels", type=Path, help="file or folder of labels")
    add("photos", type=Path, nargs="?", help="folder that the photos are in (default: around the labels)")
    add("out", type=Path, help="COCO json to write; with --to yolo a new folder")
    add("--category", nargs="+", default=[], metavar="NAME", help="of faces (default: face, or the only one)")
    add("--to", choices=("coco", "yolo"), default="coco", help="what to write (default %(default)s)")
    args = parser.parse_intermixed_args(argv)
    kind, root, counts = convert(args.labels, args.photos, args.out, args.category, args.to)
    print(f"{kind} labels, photos in {root}")
    for what, count in counts.items():
        if count or what in ("faces", "without faces"):
            print(f"{what:32}{count:>9,}")
    if counts["photos without txt"]:
        print("Photos without txt are kept as photos without faces, as YOLO means it. Are they all labelled?")
    if counts.get("left out: iscrowd"):
        print("YOLO has no regions to ignore: what is iscrowd is left out, so it is background there.")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
