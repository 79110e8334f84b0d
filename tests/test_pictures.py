"""Tests of pictures.py: all kinds of files load upright as RGB, and boxes are drawn in the right place."""

import struct

import numpy as np
import pytest
from PIL import Image

from support.pictures import (BLOCKS, FACE, ORIENTATION, contact_sheet, decode_picture, draw_faces,
                              hide_faces, load_picture, open_picture, upright_size)
from support.script import InputError

RAMP = np.add.outer(np.arange(40) * 2, np.arange(60) * 2).astype(np.uint8)  # 60x40, dark at the top left


def save(path, image, **more):
    """Save a picture and load it again; checks that the size read from the header is right."""
    image.save(path, **more)
    loaded = load_picture(path)
    with open_picture(path) as opened:
        assert upright_size(opened) == loaded.size
    return loaded


@pytest.mark.parametrize("name, mode", [
    ("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("cmyk.tif", "CMYK"), ("palette.gif", "P"), ("rgb.webp", "RGB"),
    ("alpha.png", "RGBA"), ("grey-alpha.png", "LA")])
def test_all_kinds_load_as_rgb(tmp_path, name, mode):
    loaded = save(tmp_path / name, Image.fromarray(RAMP).convert(mode))
    assert loaded.mode == "RGB" and loaded.size == (60, 40)
    assert np.abs(np.asarray(loaded).astype(int) - RAMP[..., None]).max() <= 12  # some formats are lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(RAMP).convert("RGB")
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
            5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    loaded = save(tmp_path / "x.jpg", stored, exif=exif, quality=95)
    assert loaded.size == (60, 40)
    assert np.abs(np.asarray(loaded).astype(int) - RAMP[..., None]).max() <= 10
    assert decode_picture(open_picture(tmp_path / "x.jpg"), 0.5).size == (30, 20)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    loaded = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert loaded.getpixel((5, 5)) == (255, 0, 0)


def test_exif_that_cannot_be_written_again_and_odd_orientations(tmp_path):
    """Resolution -1, which Pillow reads but refuses to write; an orientation that is a text, or unknown."""
    def exif(kind, value):
        entries = [(0x011A, 10, struct.pack("<I", 38)), (ORIENTATION, kind, value)]
        rows = b"".join(struct.pack("<HHI", tag, own, 1) + data for tag, own, data in sorted(entries))
        return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + rows + bytes(4) + struct.pack("<ii", -1, 1)
    turned, text, unknown = (3, b"\6\0\0\0", (40, 60)), (2, b"6\0\0\0", (60, 40)), (3, b"c\0\0\0", (60, 40))
    for kind, value, size in (turned, text, unknown):
        assert save(tmp_path / "x.jpg", Image.fromarray(RAMP), exif=exif(kind, value)).size == size


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_may_lack_its_end_marker_but_no_pixel(tmp_path, progressive):
    noise = np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)
    path = tmp_path / "x.jpg"
    whole = np.asarray(save(path, Image.fromarray(noise), progressive=progressive, exif=b""))
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    np.testing.assert_array_equal(load_picture(path), whole)
    assert decode_picture(open_picture(path), 0.5).width in (35, 70)
    for missing in (12, 100, len(data) // 2):
        path.write_bytes(data[:-missing])
        with pytest.raises(InputError, match="truncated"):
            load_picture(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0" + b"x" * 50])
def test_broken_files_are_one_clear_line(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(InputError, match="x.jpg: cannot be read as a picture") as error:
        load_picture(tmp_path / "x.jpg")
    assert "\n" not in str(error.value)


def test_drawn_boxes_are_where_the_faces_are():
    drawn = draw_faces(Image.new("RGB", (100, 80)), [[20, 30, 60, 70]], [0.987])
    assert "#%02x%02x%02x" % drawn.getpixel((20, 50)) == FACE == "#%02x%02x%02x" % drawn.getpixel((40, 70))
    assert drawn.getpixel((40, 50)) == (0, 0, 0)
    assert draw_faces(drawn, np.zeros((0, 4))).tobytes() == drawn.tobytes()


def test_lines_and_labels_scale_with_the_picture_and_stay_inside():
    def label(side):
        box = np.array([[0.97, 0.5, 0.99, 0.8]]) * side
        drawn = np.asarray(draw_faces(Image.new("RGB", (side, side)), box, [0.5])).any(2)
        above = drawn[:int(0.5 * side) - side // 200, :]
        rows, columns = np.flatnonzero(above.any(1)), np.flatnonzero(above.any(0))
        line = np.flatnonzero(drawn[int(0.7 * side), :int(0.98 * side)])
        assert columns[-1] == side - 1 and columns[0] > 0  # its label is wider than the face, and whole
        return np.array([np.ptp(rows), np.ptp(columns), len(line)])
    np.testing.assert_allclose(label(2100) / label(700), 3, rtol=0.12)


def test_labels_in_a_crowd_hide_no_neighbour():
    x, y = np.meshgrid(np.arange(25) * 42 + 20, np.arange(18) * 48 + 30)
    boxes = np.stack([x, y, x + 25, y + 30], -1).reshape(-1, 4)
    drawn = np.asarray(draw_faces(Image.new("RGB", (1100, 900)), boxes, [0.88] * len(boxes)))
    for x1, y1, x2, y2 in boxes:
        assert not drawn[y1 + 4:y2 - 4, x1 + 4:x2 - 4].any()


@pytest.mark.parametrize("side", [12, 40, 400])
def test_a_hidden_face_is_a_few_blocks_and_the_rest_stays(side):
    noise = Image.effect_noise((1000, 1000), 80).convert("RGB")
    box = np.array([500, 500, 500 + side, 500 + side])
    before, after = np.asarray(noise), np.asarray(hide_faces(noise, [box]))
    inside = after[500:500 + side, 500:500 + side]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) <= BLOCKS ** 2
    assert (np.ptp(inside, (0, 1)) < np.ptp(before[500:500 + side, 500:500 + side], (0, 1))).all()
    changed = np.argwhere((before != after).any(2))
    assert changed.min() >= 500 - side / 4 - 1 and changed.max() <= 500 + 1.25 * side + 1
    corner = np.asarray(hide_faces(noise, [[-5, -5, 40, 40], [20, 20, 20, 20]]))  # at the border; empty
    assert corner.shape == before.shape and (corner != before)[:40, :40].any(2).mean() > 0.9


def test_a_contact_sheet_holds_every_picture():
    sheet = contact_sheet([Image.new("RGB", size, "white")
                           for size in [(10, 20), (300, 200), (1, 1), (5, 1), (40, 40)]], columns=2, side=50)
    assert sheet.size == (108, 162)
    for x, y in ((27, 27), (81, 27), (27, 81), (81, 81), (27, 135)):
        assert sheet.getpixel((x, y)) == (255, 255, 255)


@pytest.mark.parametrize("values, name, shown", [
    (np.uint16([0, 32768, 65535]), "x.png", (0, 128, 255)),  # mode I;16
    (np.int32([-5, 32768, 65535]), "x.tif", (0, 128, 255)),  # mode I
    (np.int32([0, 128, 255]), "x.tif", (0, 128, 255)),       # mode I that holds 8 bits
    (np.float32([0, 128, 255]), "x.tif", (0, 128, 255))])    # mode F
def test_grey_of_16_bits_is_neither_black_nor_white(tmp_path, values, name, shown):
    Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / name)
    loaded = np.asarray(load_picture(tmp_path / name)).astype(int)
    assert np.abs(loaded[0, :, 0] - shown).max() <= 1
