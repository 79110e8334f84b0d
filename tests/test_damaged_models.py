"""Model files that are damaged, hostile or none of ours: one line, and nothing of them is run or believed."""

import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from torchvision.models import mobilenet_v2

from model import SSD, Config, checkpoint, load_imagenet, load_model, load_weights, read_checkpoint


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made-by-the-pickle"),)
    for name, write in (("zip.pth", lambda p: torch.save({"state_dict": Payload()}, p)),
                        ("bare.pth", lambda p: p.write_bytes(pickle.dumps(Payload())))):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)
    assert not (tmp_path / "made-by-the-pickle").exists()


def test_files_that_are_no_checkpoint(tmp_path, small):
    torch.save(checkpoint(small), tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    for name, content in (("empty", b""), ("text", b"hello"), ("half", good[:len(good) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)
    for name, content in (("list", [1]), ("other", {"state_dict": {"fc.weight": torch.zeros(1)}}),
                          ("none", {})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)


def refusal(path, read=load_model):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def plain(tmp_path, small):
    """A checkpoint with an average, as a run leaves it."""
    torch.save(checkpoint(small, ema=small.state_dict(), epoch=3), tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


@pytest.mark.slow
def test_a_changed_bit_is_noticed(tmp_path, plain):
    """One in the pickle or in a member; one in the zip's own structures changes nothing unseen."""
    whole, good = plain.read_bytes(), read_checkpoint(plain)
    with zipfile.ZipFile(plain) as archive:
        members, end = archive.infolist(), archive.start_dir
    for n, member in enumerate([members[0], *members[4::len(members) // 40]]):
        name, extra = (int.from_bytes(whole[member.header_offset + at:][:2], "little") for at in (26, 28))
        damaged = bytearray(whole)
        damaged[member.header_offset + 30 + name + extra + n % member.file_size] ^= 1 << n % 8
        (tmp_path / "x.pth").write_bytes(damaged)
        assert "checksums" in refusal(tmp_path / "x.pth", read_checkpoint)
    assert "checksums" in refusal(tmp_path / "x.pth", load_model)
    model = SSD(Config(width=0.25))
    assert "checksums" in refusal(tmp_path / "x.pth", lambda path: load_weights(model, path))
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(end, len(whole), (100,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "x.pth").write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / "x.pth")
        except ValueError as error:
            assert "x.pth: " in str(error)
        else:
            assert found["epoch"] == 3
            for key in ("state_dict", "ema"):
                assert found[key].keys() == good[key].keys()
                assert all(torch.equal(found[key][name], good[key][name]) for name in good[key])


def test_the_format_before_zip_loads(tmp_path, small):
    def save(content, path):
        torch.save(content, path, _use_new_zipfile_serialization=False)
    save(checkpoint(small, epoch=3), tmp_path / "old.pth")
    loaded = load_model(tmp_path / "old.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), small.state_dict().values()))
    assert read_checkpoint(tmp_path / "old.pth")["epoch"] == 3
    save(mobilenet_v2(weights=None).state_dict(), tmp_path / "imagenet.pth")
    load_imagenet(SSD(Config(width=0.25)), tmp_path / "imagenet.pth")
    whole = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[:len(whole) // 2])
    assert "truncated" in refusal(tmp_path / "x.pth")


@pytest.mark.slow
def test_compressed_parts_are_refused_before_they_are_unpacked(tmp_path):
    """200 MB of zeros make a file of 200 kB."""
    torch.save({"state_dict": {"a": torch.zeros(50_000_000)}}, tmp_path / "large.pth")
    with (zipfile.ZipFile(tmp_path / "large.pth") as old,
          zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    (tmp_path / "large.pth").unlink()
    code = """
import resource, sys
from model import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_model(sys.argv[1])
except ValueError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, error)
"""
    said = subprocess.check_output([sys.executable, "-c", code, tmp_path / "packed.pth"], text=True)
    assert float(said.split()[0]) < 100 and "packed.pth: refused, it is compressed" in said


@pytest.mark.slow
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    code = f"import model; model.load_model({str(tmp_path / 'pipe.pth')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pipe.pth: not a checkpoint" in done.stderr


def hostile(small):
    """{name: change of a checkpoint's content} of what the right keys may hold."""
    state = small.state_dict()
    name = "backbone.features.3.conv.0.weight"
    kinds = {"ema list": {"ema": [1]}, "ema text": {"ema": "weights"}, "ema number": {"ema": 3},
             "config list": {"config": [300, 300]},
             "config text": {"config": "small"}, "config none": {"config": None},
             "state list": {"state_dict": [state]}, "ema keys": {"ema": {b"x": state[name]}},
             "keys": {"state_dict": {**state, 5: state[name]}},
             "unexpected": {"state_dict": {**state, "more\nlines": state[name]}}}
    values = {"text": "x", "none": None, "list": [1.0], "nan": state[name] / 0}
    for place in ("state_dict", "ema"):
        kinds |= {f"{key} in {place}": {place: {**state, name: value}} for key, value in values.items()}
    config = checkpoint(small)["config"]
    wrong = {"input_width": [torch.tensor(64), "64", 64.5, 10**400, None], "width": ["1", float("nan"), [1]],
             "anchors": [5, [["1", "2"]], [[1]], [[float("nan"), 1]]], "a\nb": [1]}
    for key, values in wrong.items():
        kinds |= {f"config {key} {n}": {"config": config | {key: value}} for n, value in enumerate(values)}
    return kinds


@pytest.mark.slow
def test_entries_of_the_wrong_kind_are_refused_in_one_line(tmp_path, small):
    for n, (kind, change) in enumerate(hostile(small).items()):
        path = tmp_path / f"{n}.pth"
        torch.save(checkpoint(small) | change, path)
        loads = [load_model] if kind.startswith("config") or kind == "unexpected" else [
            load_model, lambda path: load_weights(SSD(small.config), path)]
        for load in loads:
            try:
                assert refusal(path, load)
            except Exception as error:
                raise AssertionError(kind) from error
    for change in ({"ema": None}, {"ema": {}}, {"meta": None}, {"optimizer": None}):
        torch.save(checkpoint(small) | change, tmp_path / "good.pth")
        assert load_model(tmp_path / "good.pth").config == small.config


def test_wrong_tensors_among_imagenet_weights_are_refused_in_one_line(tmp_path):
    name = "features.3.conv.0.0.weight"
    state = mobilenet_v2(weights=None).state_dict()
    for n, change in enumerate(({name: "x"}, {name: state[name] / 0}, {5: state[name]})):
        torch.save(state | change, tmp_path / f"{n}.pth")
        refusal(tmp_path / f"{n}.pth", lambda path: load_imagenet(SSD(Config(width=0.25)), path))
