"""Convert labels of other tools to a COCO json of faces, or to YOLO.

    python -m tools.labels_to_coco LABELS [PHOTOS] mine.json
    python -m tools.labels_to_coco export.json photos mine.json --category face mask
    python -m tools.labels_to_coco mine.json --to yolo mine-yolo

LABELS is a folder of YOLO txt or Pascal VOC xml, CVAT's xml for images, a json of Label Studio or COCO, or
CSV: which one, is recognised. Photos are found by name anywhere below PHOTOS, or around the labels.

Every label of the face is kept. Those that are flagged difficult or ignore, or whose box is empty or outside
the photo, get `"iscrowd": 1`: training skips them and evaluation ignores them. More in docs/labels.md.
"""

import os
import re
import time
from collections import Counter
from pathlib import Path, PurePosixPath

# First, so that Ctrl-C during the slow imports below ends in one line.
from support.script import InputError, command, new_parser, read_json, write_json

from tools.labels import (FLAGS, LABEL_FOLDERS, Photo, find_files, photos_around, read_coco, read_csv, read_cvat,
                    read_label_studio, read_voc, read_xml)
from support.coco import clip
from support.pictures import LISTED, PICTURES, read_sizes
from tools.yolo import NAME_FILES, is_other_text, read_yolo, write_yolo

KINDS = LABEL_FOLDERS | {"images", "jpegimages"}  # folders that only part labels from photos
KNOWN = ("a folder of YOLO txt or Pascal VOC xml, CVAT's xml for images, json of Label Studio or COCO, "
         "or csv is expected")


def read_labels(path, own=None):
    """Read the file or folder `path` of any known format into `Labels`.

    `own` is a file in the folder that is no input, since it will be written. Raises InputError where the
    format is not recognised, or an entry cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, own)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".xml":
        root = read_xml(path)
        return read_cvat(path, root) if root.tag == "annotations" else read_voc([path], path.parent)
    if suffix == ".csv":
        return read_csv(path)
    if suffix in (".yaml", ".yml"):
        return read_yolo(path.parent)
    hint = {
        ".zip": "unpack it first",
        ".txt": "of YOLO, name the folder; WIDER FACE's text is for wider_to_coco.py",
    }.get(suffix, KNOWN)
    raise InputError(f"{path}: not labels that are known; {hint}")


def _read_folder(folder, own):
    """Read the one kind of labels that is in a folder. A json counts where nothing else is."""
    files = {kind: find_files(folder, {f".{kind}"}, own) for kind in ("txt", "xml", "csv", "json")}
    files["txt"] = [file for file in files["txt"] if not is_other_text(file)]
    files["json"] = [file for file in files["json"] if file.name != "notes.json"]  # Label Studio's, by YOLO
    kinds = [kind for kind in ("txt", "xml", "csv") if files[kind]] or ["json"]
    if len(kinds) > 1:
        raise InputError(
            f"{folder}: holds {' and '.join(kinds)} files, such as {files[kinds[0]][0]} and "
            f"{files[kinds[1]][0]}; name the file or folder of one kind")
    found = files[kinds[0]]
    if kinds == ["txt"] or not found and any((folder / name).exists() for name in NAME_FILES):
        return read_yolo(folder)
    if not found:
        raise InputError(f"{folder}: no labels in it; {KNOWN}")
    if kinds == ["xml"] and (len(found) > 1 or read_xml(found[0]).tag == "annotation"):
        return read_voc(found, folder)
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {len(found)} {kinds[0]} files, such as {found[0]} and {found[1]}; name one")
    return read_labels(found[0])


def _read_json(path):
    """Read Label Studio's json, full or JSON-MIN, or a COCO file."""
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return read_coco(path, content)
    if not isinstance(content, list) or not content or not all(isinstance(task, dict) for task in content):
        raise InputError(
            f'{path}: neither COCO, with lists "images" and "annotations", nor a list of '
            "Label Studio's tasks")
    return read_label_studio(path, content)


def _parts(name):
    """The folders of a name from the last on, without those that only part labels from photos."""
    return [part for part in reversed(re.split(r"[\\/]", str(name))[:-1])
            if part not in ("", ".", "..") and part.lower() not in KINDS]


def find_photos(photos, root):
    """Find each of `photos` below `root` by its name: (their paths relative to root, all other pictures).

    Of several with that name the one whose folders agree best is taken. A name never leads out of `root`.
    Raises InputError for photos that are missing, ambiguous, or labelled twice.
    """
    pictures = [file.relative_to(root).as_posix() for file in find_files(root, PICTURES)]
    by_name, by_stem = {}, {}
    for picture in pictures:
        base = picture.rsplit("/", 1)[-1]
        by_name.setdefault(base, []).append(picture)
        by_stem.setdefault(base.rsplit(".", 1)[0], []).append(picture)
    found, missing = {}, []
    for photo in photos:
        candidates = []
        for name in photo.names:
            base, own = re.split(r"[\\/]", name)[-1], _parts(name)
            candidates = by_name.get(base) or by_stem.get(base.rsplit(".", 1)[0]) or []
            if candidates:
                break

        def agreement(picture, own=own):
            theirs = _parts(picture)
            return len(os.path.commonprefix([own, theirs])), own == theirs

        best = max(map(agreement, candidates), default=None)
        candidates = [picture for picture in candidates if agreement(picture) == best]
        if len(candidates) > 1:
            raise InputError(
                f"{photo.place}: {photo.names[0]!r} may be {candidates[0]!r} or {candidates[1]!r} below "
                f"{root}; name a folder that holds one of them")
        if not candidates:
            missing.append(photo.names[0])
        elif candidates[0] in found:
            raise InputError(
                f"{photo.place}: labels {candidates[0]!r} a second time, first {found[candidates[0]].place}")
        else:
            found[candidates[0]] = photo
    if missing:
        more = ", ..." if len(missing) > LISTED else ""
        raise InputError(
            f"{root}: {len(missing):,} of the {len(photos):,} labelled photos are not below it "
            f"({', '.join(map(repr, missing[:LISTED]))}{more}); name their folder, and all are needed")
    return list(found), [picture for picture in pictures if picture not in found]


def choose_categories(path, counts, wanted):
    """The categories that are faces: those `wanted`, or the one named face, or the only one there is.

    `counts` is `{category: labels}`. Raises InputError.
    """
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
    if wanted:
        unknown = [name for name in wanted if name not in counts]
        if unknown:
            raise InputError(f"{path}: no category {unknown[0]!r}, there are: {listed}")
        return set(wanted)
    named = [name for name in counts if name.strip().lower() == "face"]
    if len(named) != 1 and len(counts) > 1:
        raise InputError(f"{path}: which category is the face? Choose with --category, there are: {listed}")
    return set(named or counts)


def to_coco(labels, names, sizes, faces):
    """Make the COCO content of labelled photos: (content, counts of what was found).

    `names` and `sizes` are those of the photos, `faces` the categories to take.
    """
    images, annotations = [], []
    met = dict.fromkeys((*FLAGS[:-1], "empty", "clipped", "outside"), 0)
    for image_id, (photo, name, (width, height)) in enumerate(zip(labels.photos, names, sizes), 1):
        _check_size(photo, (width, height), labels.relative)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        scale = (width, height) if labels.relative else (1, 1)
        for label in photo.labels:
            if label.category not in faces:
                continue
            x1, y1, x2, y2 = (round(value * scale[n % 2], 4) for n, value in enumerate(label.box))
            whole = [x1, y1, x2 - x1, y2 - y1]
            box, kind = clip(whole, width, height)
            if kind == "clipped" and max(abs(a - b) for a, b in zip(box, whole)) < 0.05:
                kind = "inside"  # the tool's rounding
            ignored = any(label.flags.get(key) for key in ("difficult", "ignore", "iscrowd"))
            box = [round(value, 4) for value in box]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                                "bbox": box, "area": min(round(max(box[2], 0) * max(box[3], 0), 4), 1e14),
                                **label.flags, "iscrowd": int(ignored or kind in ("empty", "outside"))})
            for key in (*label.flags, kind):
                if key in met:
                    met[key] += label.flags.get(key, 1)
    with_faces = len({a["image_id"] for a in annotations})
    counts = {"photos": len(images), "without faces": len(images) - with_faces, "faces": len(annotations),
              **met, "marked iscrowd": sum(a["iscrowd"] for a in annotations)}
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}, counts


def _check_size(photo, size, relative):
    """Refuse labels of a photo that was resized or turned since: their boxes would be somewhere else."""
    stated = photo.size if photo.size and all(photo.size) else size
    if tuple(stated) != size and (not relative or tuple(stated) == size[::-1]):
        raise InputError(
            f"{photo.place}: labelled at {stated[0]:g}x{stated[1]:g}, but the photo {photo.names[0]!r} is "
            f"{size[0]}x{size[1]}, upright; was it resized or turned since?")


def convert(path, photos, out, wanted=(), to="coco", jobs=1):
    """Convert the labels `path` of photos below `photos` (None: around the labels) to `out`.

    Returns the format, the folder of the photos, and the counts of what was found. Raises InputError.
    """
    path, out = Path(path), Path(out)
    if photos and not Path(photos).is_dir():
        raise InputError(f"{photos}: no such folder of photos")
    if os.path.realpath(out) == os.path.realpath(path) or out.is_dir():
        raise InputError(
            f"{out}: is a folder that is there, or the labels themselves; name another for the output")
    labels = read_labels(path, out)
    if not labels.photos:
        raise InputError(f"{path}: labels no photos")
    root = Path(photos) if photos else photos_around(path if path.is_dir() else path.parent)
    counts = Counter(dict.fromkeys(labels.categories, 0))
    counts.update(label.category for photo in labels.photos for label in photo.labels)
    faces = choose_categories(path, counts, wanted)
    names, others = find_photos(labels.photos, root)
    folders = {os.path.dirname(name) for name in names}
    plain = [name for name in others if labels.format == "YOLO" and os.path.dirname(name) in folders]
    labels.photos += [Photo([name], name, []) for name in plain]
    names += plain
    prefix = os.path.relpath(root, out.parent)
    if prefix.startswith(".."):  # the system resolves ".." after symbolic links, so resolve them first
        prefix = os.path.relpath(os.path.realpath(root), os.path.realpath(out.parent))
    prefix = PurePosixPath(Path(prefix).as_posix())
    sizes = read_sizes([(name, None) for name in names], root, jobs)
    content, met = to_coco(labels, [str(prefix / name) for name in names], sizes, faces)
    report = {f"category {name}{' (face)' if name in faces else ''}": count for name, count in counts.items()}
    report |= met | {f"left out: {what}": count for what, count in labels.left_out.items() if count}
    if plain:
        report["photos without txt"] = len(plain)
    if len(others) > len(plain):
        report["left out: photos without labels"] = len(others) - len(plain)
    if to == "coco":
        write_json(out, content)
    else:
        of_photo = {image["id"]: [] for image in content["images"]}
        for face in content["annotations"]:
            if not face["iscrowd"]:
                of_photo[face["image_id"]].append(face["bbox"])
        plain_names = ["/".join([*reversed(_parts(name)), os.path.basename(name)]) for name in names]
        write_yolo(out, list(zip([root / name for name in names], plain_names, sizes, of_photo.values())))
    return labels.format, root, report


@command
def main(argv=None):
    """Convert labels, and print what was found in them."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("labels", help="file or folder of labels")
    add("photos", nargs="?", help="folder that the photos are in (default: around the labels)")
    add("out", help="COCO json to write; with --to yolo a new folder")
    add("--category", nargs="+", default=[], metavar="NAME",
        help="what is a face (default: face, or the only one)")
    add("--to", choices=("coco", "yolo"), default="coco", help="what to write (default %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="threads to read photo sizes (default: all cores)")
    args = parser.parse_intermixed_args(argv)
    if not 1 <= args.jobs <= 256:
        raise InputError(f"--jobs {args.jobs}: 1 to 256 threads are expected")
    start = time.perf_counter()
    kind, root, counts = convert(args.labels, args.photos, args.out, args.category, args.to, args.jobs)
    print(f"{kind} labels, photos in {root}")
    for what, count in counts.items():
        print(f"{what:32}{count:>9,}")
    if counts.get("photos without txt"):
        print("Photos without txt are kept as photos without faces, as YOLO means it. Are they all labelled?")
    if args.to == "yolo" and counts["marked iscrowd"]:
        print("YOLO has no regions to ignore: what is marked iscrowd is left out, so it is background there.")
    print(f"wrote {args.out} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
