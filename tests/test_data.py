"""Tests of data.py: reading, augmentation, batches, the order of an epoch, the command."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from tools import look as module
from data import (FaceDataset, TrainBatches, collate, distort_colours,
                  eval_batches, make_loader, random_view, resize_view)
from support.coco import UNLABELLED, read_annotations
from support.pictures import load_picture
from tools.sample import draw_sample


def dataset_of(folder, boxes, sizes, width=96, height=64, draw=None, **more):
    """Draw photos and make a FaceDataset of them: boxes[i] are the xywh boxes of photo i."""
    images, annotations = [], []
    for n, (own, size) in enumerate(zip(boxes, sizes)):
        picture = Image.new("RGB", size, (10, 20, 30))
        for x, y, w, h in own:
            picture.paste((250, 40, 40), (x, y, x + w, y + h))
        picture.save(folder / f"{n}.png")
        images.append({"id": n + 1, "file_name": f"{n}.png", "width": size[0], "height": size[1]})
        annotations += [{"id": len(annotations) + k + 1, "image_id": n + 1,
                         "category_id": 1, "bbox": list(box)} for k, box in enumerate(own)]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": annotations,
                                               "categories": [{"id": 1, "name": "face"}]}))
    return FaceDataset(read_annotations(folder / "x.json"), width, height, **more)


def red(picture):
    """Find the drawn faces (red) on a picture `[3, H, W]`, for any change of its colours: `[H, W]` bool."""
    r, g, b = picture.float()
    return (r > g + 40) & (r > b + 40)


def test_a_photo_as_it_is(tmp_path):
    dataset = dataset_of(tmp_path, [[(40, 20, 60, 50)], []], [(200, 100), (50, 80)])
    item = dataset[0, None]
    assert item.picture.shape == (3, 64, 96) and item.picture.dtype == torch.uint8 and item.size == (200, 100)
    assert item.faces.tolist() == [pytest.approx((40 * .48, 20 * .64, 100 * .48, 70 * .64))]
    expected = Image.open(tmp_path / "0.png").resize((96, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(item.picture.permute(1, 2, 0), expected)
    assert dataset[1, None].faces.shape == (0, 4)


def test_boxes_stay_on_their_faces_through_the_augmentation(tmp_path):
    """Faces are drawn as red rectangles. After any augmentation, boxes and red areas must agree."""
    dataset = dataset_of(tmp_path, [[(60, 40, 80, 70)], [(150, 20, 30, 60)]],
                         [(240, 200), (220, 240)], 128, 128)
    agreements = []
    for seed in range(200):
        item = dataset[seed % 2, (seed,)]
        if (item.faces[0, 2:] - item.faces[0, :2]).min() > 12:
            ys, xs = torch.nonzero(red(item.picture), as_tuple=True)
            seen = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)
            agreements.append(box_iou(seen, torch.from_numpy(item.faces)).item())
    assert len(agreements) > 150 and np.min(agreements) > 0.8 and np.mean(agreements) > 0.95


def test_boxes_are_exact_where_a_photo_is_only_flipped(tmp_path):
    """Where no face is to be learned nothing is cropped, and at the photo's own size each pixel stays one."""
    dataset = dataset_of(tmp_path, [[(10, 20, 30, 50)]], [(96, 96)], 96, 96, min_face=99)
    found = Counter()
    for seed in range(120):
        item = dataset[0, (seed,)]
        assert item.ignored.tolist() == [True] and 15 <= item.faces[0, 2] - item.faces[0, 0] <= 30
        if (item.faces[0, 2:] - item.faces[0, :2]).tolist() == [30, 50]:  # not expanded
            ys, xs = torch.nonzero((item.picture != item.picture[:, :1, :1]).any(0), as_tuple=True)
            assert item.faces[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            found[tuple(item.faces[0].tolist())] += 1
    assert found.keys() == {(10, 20, 40, 70), (96 - 40, 20, 96 - 10, 70)}
    assert 0.35 < found[10, 20, 40, 70] / found.total() < 0.65 and found.total() > 40


def test_views_follow_the_recipe():
    rng, faces, size = (np.random.default_rng(0),
                        np.array([[100.0, 50, 160, 130], [10, 10, 30, 40]]), (400, 300))
    centres = (faces[:, :2] + faces[:, 2:]) / 2
    for _ in range(600):
        x1, y1, x2, y2 = random_view(rng, size, faces)
        assert 0.1 * 400 <= x2 - x1 <= 800 + 1e-6 and 0.1 * 300 <= y2 - y1 <= 600 + 1e-6
        assert -400 <= x1 and x2 <= 800 and -300 <= y1 and y2 <= 600
        assert ((centres > (x1, y1)) & (centres < (x2, y2))).all(1).any()
        assert 0.5 <= (x2 - x1) / (y2 - y1) <= 2
    view = random_view(rng, size, np.zeros((0, 4)))  # without faces it is always the whole canvas
    assert view[0] <= 0 and view[2] >= 400 and view[1] <= 0 and view[3] >= 300


def textbook_colours(image, rng):
    """SSD's photometric distortion in single steps, each rounded and clipped, with the colours in HSV."""
    coins, levels = rng.random(5) < 0.5, np.arange(256.0)
    def table(values):
        return values.round().clip(0, 255).astype(np.uint8).tolist()
    def contrast(image, wanted):
        return image.point(table(levels * factor) * 3) if coins[1] and coins[4] == wanted else image
    factor = rng.uniform(0.5, 1.5)
    image = image.point(table(levels + rng.uniform(-32, 32) * coins[0]) * 3)
    hue = ((levels + rng.uniform(-18, 18) * coins[3] * 256 / 360).round() % 256).astype(np.uint8).tolist()
    saturation = table(levels * (rng.uniform(0.5, 1.5) if coins[2] else 1))
    image = contrast(image, True).convert("HSV").point(hue + saturation + table(levels)).convert("RGB")
    return contrast(image, False)


def straightforward(dataset, index, rng):
    """The picture `[3, H, W]` and its faces, by torchvision's zoom out, crop, resize and flip."""
    image = textbook_colours(load_picture(dataset.folder / dataset.names[index].decode()), rng)
    faces = dataset.faces[dataset.starts[index]:dataset.starts[index + 1]]
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(faces), format="XYXY", canvas_size=image.size[::-1])
    steps = [v2.RandomZoomOut(0, (1, 2), 0.5), *([v2.RandomIoUCrop(0.1, 1, 0.5, 2)] if len(faces) else []),
             v2.Resize((dataset.height, dataset.width)), v2.RandomHorizontalFlip()]
    picture, boxes = v2.Compose(steps)(tv_tensors.Image(image), boxes)
    # Rounding in Resize may put a box a millionth outside the picture; the sanitizer would drop it.
    return picture, (v2.SanitizeBoundingBoxes(labels_getter=None)(v2.ClampBoundingBoxes()(boxes))
                     if len(boxes) else boxes)


@pytest.mark.slow
def test_statistics_are_those_of_the_straightforward_order(tmp_path):
    """data.py scales while decoding, crops early, distorts colours last: statistics must not change."""
    torch.manual_seed(0)
    draw_sample(tmp_path, train=12, val=1, size=(400, 300))
    dataset = FaceDataset(read_annotations(tmp_path / "train.json"), 96, 96)
    figures = {"theirs": [], "ours": []}
    for turn in range(60):
        for index in range(12):
            item = dataset[index, (turn, index)]
            figures["ours"].append((item.picture, torch.from_numpy(item.faces)))
            figures["theirs"].append(straightforward(dataset, index, np.random.default_rng((turn, index, 1))))
    statistics = {}
    for name, shown in figures.items():
        boxes = torch.cat([faces for _, faces in shown]).double()
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        pictures = torch.stack([picture for picture, _ in shown]).double()
        lit = pictures.sum(1) > 30  # not the black canvas
        statistics[name] = {
            "faces kept": len(boxes) / len(shown),
            "small": sides.quantile(0.25), "median": sides.median(),
            "share of the view": (sides**2).mean() / 96**2,  # the IoU of a face within the crop with the crop
            "x": boxes[:, [0, 2]].mean(), "y": boxes[:, [1, 3]].mean(),
            "canvas": 1 - lit.double().mean(),
            "mean": pictures.mean(), "deviation": pictures.std(),
            "colourful": (pictures.amax(1) - pictures.amin(1)).mean(),
            "contrast within": pictures.flatten(1).std(1).mean(),
        }
    for key, value in statistics["theirs"].items():
        assert float(statistics["ours"][key]) == pytest.approx(float(value), rel=0.1), (key, statistics)


@pytest.mark.slow
def test_colours_follow_the_recipe():
    rng = np.random.default_rng(0)
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    means = np.array([np.asarray(distort_colours(grey, rng)).mean() for _ in range(2000)])
    assert np.mean(means == 128) == pytest.approx(0.25, abs=0.03)  # neither brightness nor contrast changed
    assert (means.min() > (128 - 33) * 0.49 and means.max() <= 255
            and means.mean() == pytest.approx(128, abs=3))
    colour = Image.new("RGB", (4, 4), (50, 150, 100))
    for distort in (distort_colours, textbook_colours):
        hsv = np.array([np.asarray(distort(colour, rng).convert("HSV"))[0, 0]
                        for _ in range(3000)]) * (360 / 256, 1, 1)
        # half are unchanged, half are turned by up to 18 degrees
        assert np.quantile(hsv[:, 0], (0.05, 0.5, 0.95)) == pytest.approx((150 - 16, 150, 150 + 16), abs=6)
        assert np.quantile(hsv[:, 1], (0.05, 0.5, 0.95)) == pytest.approx((98, 170, 240), abs=20)
        assert hsv[:, 2].mean() == pytest.approx(150, abs=6)


@pytest.mark.parametrize(
    "view", [(0, 0, 100, 80), (-50, -40, 150, 120), (10.5, 20.25, 40.75, 70.5), (-30, 10, 20, 200)]
)
def test_a_resized_view_shows_the_right_place(view):
    """The colours of this picture encode the place, so each output pixel shows where it came from."""
    x, y = np.meshgrid(np.arange(100) * 2.5, np.arange(80) * 3.0)
    image = Image.fromarray(np.stack([x, y, x], 2).round().astype(np.uint8))
    inside, (left, top) = resize_view(image, view, 60, 60)
    xs = view[0] + (np.arange(inside.width) + left + 0.5) * (view[2] - view[0]) / 60
    ys = view[1] + (np.arange(inside.height) + top + 0.5) * (view[3] - view[1]) / 60
    got = np.asarray(inside).astype(float)
    inner = np.s_[4:-4, 4:-4]
    assert np.abs(got[..., 0] - ((xs - 0.5) * 2.5)[None])[inner].max() < 3.5
    assert np.abs(got[..., 1] - ((ys - 0.5) * 3)[:, None])[inner].max() < 3.5


def test_small_and_crowd_faces_are_ignored(tmp_path):
    dataset = dataset_of(tmp_path, [[(10, 10, 16, 40), (50, 10, 17, 17)]], [(200, 100)], min_face=17)
    assert dataset[0, None].ignored.tolist() == [True, False]
    assert not dataset_of(tmp_path, [[(10, 10, 16, 40)]], [(200, 100)], min_face=0)[0, None].ignored.any()


def test_collate_keeps_faces_with_their_images(tmp_path):
    dataset = dataset_of(tmp_path, [[(1, 2, 30, 40)], [], [(5, 6, 7, 8), (50, 60, 20, 20)]], [(100, 100)] * 3)
    batch = collate([dataset[n, None] for n in (2, 1, 0)])
    assert (batch.images.shape == (3, 3, 64, 96)
            and batch.image[:3].tolist() == [0, 0, 2] and batch.index == [2, 1, 0])
    assert len(collate([dataset[2, None]], few_shapes=True).faces) == 64
    nothing = collate([dataset[1, None]])
    assert not nothing.faces.any() and not nothing.has_faces.any()


def test_an_unreadable_photo_is_black_and_named(tmp_path):
    dataset = dataset_of(tmp_path, [[(1, 2, 30, 40)], [], []], [(100, 100)] * 3)
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "1.png").unlink()
    Image.new("RGB", (50, 100)).save(tmp_path / "2.png")
    batch = collate([dataset[n, None] for n in range(3)])
    assert not batch.images.any() and not batch.faces.any() and not batch.has_faces.any()
    assert (batch.labels == UNLABELLED).all()  # nothing is learned from them
    assert not batch.ignored.any() and len(batch.ignored) == len(batch.crowd) == len(batch.faces)
    assert ("cannot be read" in batch.errors[0]
            and "no such picture" in batch.errors[1] and "50x100" in batch.errors[2])


@pytest.mark.parametrize("world, batch", [(1, 4), (2, 2), (4, 1)])
def test_processes_share_the_batches_of_one(world, batch):
    whole = TrainBatches(10, 4, repeat=2, seed=5)
    parts = [TrainBatches(10, batch, 2, 5, rank, world) for rank in range(world)]
    for sampler in (whole, *parts):
        sampler.epoch = 3
    together = [sum((list(part) for part in group), []) for group in zip(*parts)]
    assert [sorted(group) for group in together] == [sorted(group) for group in whole]
    assert (len(list(whole)) == len(whole) == 5
            and sorted(i for group in whole for i, _ in group) == sorted(list(range(10)) * 2))


def test_batches_can_be_resumed_and_differ_between_epochs():
    batches = TrainBatches(7, 2, repeat=3)
    first = list(batches)
    assert batches.skip(9) == 8
    assert list(batches) == first[4:] and len(batches) == 11 - 4
    batches.start, batches.epoch = 0, 1
    photos = [[index for group in groups for index, _ in group] for groups in (batches, first)]
    assert photos[0] != photos[1] and sorted(photos[0]) == sorted(photos[1])


def test_no_photo_is_shown_twice_in_the_same_way():
    """Neither in the passes of an epoch, nor in another epoch, process, or run of another seed."""
    seeds = []
    for run, epoch, rank in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)):
        batches = TrainBatches(6, 3, 2, run, rank, 2)
        batches.epoch = epoch
        seeds += [seed for group in batches for _, seed in group]
    assert len(set(seeds)) == len(seeds) == 6 * 6
    numbers = [np.random.default_rng(seed).random() for seed in seeds]
    assert len(set(numbers)) == len(numbers)
    assert {key for group in TrainBatches(6, 3, augment=False) for _, key in group} == {None}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_shows_each_photo_once(world):
    parts = [eval_batches(11, 2, rank, world) for rank in range(world)]
    assert sorted(index for part in parts for group in part for index, _ in group) == list(range(11))


def test_workers_change_nothing(sample):
    annotations = read_annotations(sample / "train.json")
    loads = []
    for workers in (0, 2):
        batches = TrainBatches(len(annotations.ids), 5)
        loads.append(list(make_loader(FaceDataset(annotations, 64, 64), batches, workers)))
    for one, two in zip(*loads, strict=True):
        assert (torch.equal(one.images, two.images)
                and torch.equal(one.faces, two.faces) and one.index == two.index)


def test_command(sample, tmp_path, capsys, refused):
    for flags in ([], ["--augment"]):
        module.main(["--data", str(sample / "train.json"),
                     "--out", str(tmp_path / "g.png"), "--count", "4", *flags])
        assert Image.open(tmp_path / "g.png").width > 1000 and "4 photos" in capsys.readouterr().out
        (tmp_path / "g.png").unlink()
    shutil.copy(sample / "val.json", tmp_path / "val.json")  # without its photos
    assert "its photos are not there" in refused(module.main, "--data", tmp_path / "val.json",
                                        "--out", tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()


def test_split_deals_out_photos_with_their_faces(sample, tmp_path, refused):
    flags = ["--data", sample / "train.json", "--out", tmp_path / "g.png", "--split"]
    module.main([str(word) for word in (*flags, 5, tmp_path / "a/train.json", tmp_path / "val.json")])
    files = sample / "train.json", tmp_path / "a/train.json", tmp_path / "val.json"
    whole, train, val = map(read_annotations, files)
    kept_out = np.arange(len(whole.ids)) % 5 == 4
    for part, own in ((train, ~kept_out), (val, kept_out)):
        assert part.ids.tolist() == whole.ids[own].tolist() and (part.sizes == whole.sizes[own]).all()
        assert (part.xywh == whole.xywh[own[whole.image]]).all()
        assert [part.file(n).resolve()
                for n in range(len(part.ids))] == [whole.file(n).resolve() for n in np.flatnonzero(own)]
    for bad in ((1, "t.json", "v.json"), ("x", "t.json", "v.json")):
        assert "from 2 on" in refused(module.main, *flags, *bad)
    assert "has only" in refused(module.main, *flags, 99, tmp_path / "t.json", tmp_path / "v.json")
    assert "two other files" in refused(module.main, *flags, 2, tmp_path / "t.json", sample / "train.json")
    assert "two other files" in refused(module.main, *flags, 2, tmp_path / "t.json", tmp_path / "t.json")
