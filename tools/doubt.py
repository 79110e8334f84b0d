"""Find probable label errors by a model's detections, and suggest corrections.

    python -m tools.doubt train.json detections.json --count 50        # what evaluate.py --out has written

doubt.json is the whole set with the corrections made, doubt.png shows the first. Each has a doubt from 0 to 1
(those of ObjectLab, Tkachenko, Thyagarajan and Mueller 2023, beside what the model usually does):

    unlabelled   the score of a detection far from every label
    off          score * (1 - (IoU / usual IoU) ** 2) of a label and the detection that stands for it
    not found    usual score * (usual score - score of that detection, 0 if there is none)
    doubled      the IoU of two labels

"Usual" is the mean over labels of about the same size: a face of 6 px that no model finds is no suspect.
"""

from pathlib import Path

from support.script import command, Parser, write_json

import numpy as np
import torch
from torchvision.ops import box_iou

from anchors import covered
from evaluate import read_detections
from support.coco import Annotations, Detections, face_entries, moved_images, to_xywh, to_xyxy
from support.options import at_least
from tools.suspects import Suspect, doubled, draw_suspects

PARTNER_IOU = 0.1       # a detection that overlaps a label as much may be meant for it
FOUND_IOU = 0.5         # a label that counts as found, to say what is usual
NEAR_IOU = 0.3          # a detection that overlaps any label as much is not unlabelled
IN_IGNORED = 0.5        # of its area: then it may be what is ignored there
LEAST = 0.5             # with one label in eight wrong, doubts of 0.4 to 0.5 were right once in eight times
TO_IGNORE = "doubled", "not found"  # a person must say whether these are faces
ALIKE = 20, 0.05        # labels of about the same size: so many at least, or this share of all


def find_doubts(annotations: Annotations, detections: Detections, count: int) -> list[Suspect]:
    """The `count` most doubtful labels and unlabelled faces of LEAST and more, the most doubtful first."""
    kept, image = np.flatnonzero(~annotations.ignored), annotations.image
    labels, found = to_xyxy(annotations.xywh), to_xyxy(detections.xywh)
    partner, iou, free = match(annotations, detections)
    score = np.where(partner < 0, 0, np.append(detections.score, 0)[partner])

    size = np.sqrt(annotations.xywh[:, 2:].clip(min=0).prod(1))
    if (annotations.sizes > 0).all():  # the network sees a photo at its input's size
        size = size / np.sqrt(annotations.sizes.prod(1))[annotations.image]
    good = iou[kept] >= FOUND_IOU
    usual_score, usual_iou = np.zeros(len(labels)), np.ones(len(labels))
    usual_score[kept] = mean_of_alike(size[kept], score[kept] * good)
    share = mean_of_alike(size[kept], good)
    usual_iou[kept] = np.where(share > 0, mean_of_alike(size[kept], iou[kept] * good) / share.clip(1e-9), 1)

    off = score * (1 - (iou / usual_iou) ** 2).clip(0)
    missed = (usual_score * (usual_score - score)).clip(0)
    rows = [(detections.score[n], "unlabelled", detections.image[n], [], [n], "") for n in free]
    rows += [(off[n], "off", image[n], [n], [partner[n]], f"IoU {iou[n]:.2f}, usual {usual_iou[n]:.2f}")
             for n in kept[off[kept] > missed[kept]]]  # then there is a detection
    rows += [(missed[n], "not found", image[n], [n], [], f"usual score {usual_score[n]:.2f}")
             for n in kept[off[kept] <= missed[kept]]]
    for first, second, shared in doubled(image[kept], labels[kept]):
        pair = sorted((kept[first], kept[second]), key=lambda n: iou[n] * score[n])  # the worse first
        rows.append((shared, "doubled", image[pair[0]], pair, [], f"IoU {shared:.2f}"))
    doubts, seen = [], set()
    for doubt, reason, photo, shown, other, detail in sorted(rows, key=lambda row: -row[0]):
        if doubt >= LEAST and not seen & {*shown[:1]}:  # one for each label
            seen.update(shown[:1])
            doubts.append(Suspect(float(min(doubt, 1)), reason, annotations.file(photo), labels[shown],
                                found[other], None, detail, int(photo), int(shown[0]) if shown else -1))
    return doubts[:count]


def match(annotations: Annotations, detections: Detections) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each label the detection that stands for it, one to one, the highest score x IoU first: its index,
    -1 for none, and IoU `[M]`; and the detections that are far from every label and from what is ignored."""
    partner, ious = np.full(len(annotations.image), -1), np.zeros(len(annotations.image))
    labels, found = to_xyxy(annotations.xywh), to_xyxy(detections.xywh)
    free = [np.zeros(0, np.int64)]
    for photo in np.unique(detections.image):
        own, seen = np.flatnonzero(annotations.image == photo), np.flatnonzero(detections.image == photo)
        faces, boxes = torch.from_numpy(labels[own]), torch.from_numpy(found[seen])
        iou = box_iou(faces, boxes).numpy()       # [N, K]
        within = covered(boxes, faces[annotations.crowd[own]]).numpy() >= IN_IGNORED
        near = (iou >= NEAR_IOU).any(0) | within.any(0)
        iou[annotations.ignored[own]] = 0
        value = np.where(iou >= PARTNER_IOU, iou * detections.score[seen], 0)
        while value.any():
            n, k = np.unravel_index(value.argmax(), value.shape)
            partner[own[n]] = seen[k]
            ious[own[n]] = iou[n, k]
            near[k] = True
            value[n] = value[:, k] = 0
        free.append(seen[~near])
    return partner, ious, np.concatenate(free)


def mean_of_alike(size: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of `values` `[M]` over the labels of about the same `size`."""
    order = np.argsort(size, kind="stable")
    width = min(len(size), max(ALIKE[0], round(ALIKE[1] * len(size))))
    start = np.clip(np.arange(len(size)) - width // 2, 0, len(size) - width)
    total = np.append(0.0, np.cumsum(values[order]))
    result = np.zeros(len(size))
    result[order] = (total[start + width] - total[start]) / max(width, 1)
    return result


def corrected(annotations: Annotations, doubts: list[Suspect], path: str) -> dict:
    """The COCO content of the whole set, to be written to `path`, with all corrections made.

    The most doubtful photos come first. Changed annotations say "doubt", "reason" and maybe "bbox_before"."""
    content, faces = face_entries(annotations)
    number = max((face["id"] for face in content["annotations"]), default=0)
    doubt_of = {}
    for doubt in doubts:
        photo = annotations.ids[doubt.photo].item()
        doubt_of.setdefault(photo, doubt.score)
        if doubt.label < 0:
            number += 1
            face = {"id": number, "image_id": photo, "category_id": annotations.category, "iscrowd": 0}
            content["annotations"].append(face)
        else:
            face = faces[doubt.label]
        face |= {"doubt": round(doubt.score, 4), "reason": doubt.reason}
        if doubt.reason in TO_IGNORE:
            face["iscrowd"] = 1
            continue
        if "bbox" in face:
            face["bbox_before"] = face["bbox"]
        x, y, w, h = to_xywh(doubt.found).round(2).tolist()[0]
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]  # which pycocotools' annToMask needs
        face |= {"bbox": [x, y, w, h], "area": round(w * h, 2), "segmentation": [outline]}
    images = moved_images(content["images"], annotations.path, path)
    return content | {"images": sorted(images, key=lambda image: -doubt_of.get(image["id"], 0))}


@command
def main(argv=None):
    """Read, rank, write."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", help="COCO json")
    add("detections", help="detections on its photos, as evaluate.py --out writes them")
    add("--count", type=at_least(1), default=50, help="doubts at most (default %(default)s)")
    add("--out", default="doubt.json", metavar="JSON", help="default %(default)s; the picture lies beside it")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".json":
        parser.error(f"{args.out}: the name of a .json is expected")
    annotations, detections, _ = read_detections(args.data, args.detections)
    doubts = find_doubts(annotations, detections, args.count)
    write_json(args.out, corrected(annotations, doubts, args.out))
    print(f"wrote {args.out}, with {len(doubts)} corrections suggested")
    if len(doubts) < args.count:
        print(f"  not {args.count}: doubts below {LEAST} are right no more often than chance")
    ignored = sum(doubt.reason in TO_IGNORE for doubt in doubts)
    if ignored:
        print(f"  {ignored} of them are labels to delete or keep by hand: they have iscrowd 1, "
              "which labelling tools show as ordinary faces")
    if doubts:
        picture = Path(args.out).with_suffix(".png")
        draw_suspects(doubts, picture)
        print(f"wrote {picture}: labels in question red, the model's boxes yellow")


if __name__ == "__main__":
    main()
