"""Tests of script.py: files written whole or not at all, flag types, exit codes."""

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.script import InputError, parse_size, whole_file, write_json


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    for error, seen in ((KeyError("x"), KeyError),
                        (OSError(errno.ENOSPC, "No space left on device"), InputError)):
        with pytest.raises(seen):
            with whole_file(tmp_path / "x.txt") as temporary:
                temporary.write_text("half")
                raise error
        assert (tmp_path / "x.txt").read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]
    with pytest.raises(InputError, match="is a folder"):
        with whole_file(tmp_path):
            pass
    with pytest.raises(InputError, match="No space left"):
        with whole_file(tmp_path / "x.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["n" * 251 + ".txt", "é" * 125 + ".txt", "n" * 255])
def test_the_longest_names_can_be_written(tmp_path, name):
    with whole_file(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(InputError, match="not written"):
        with whole_file(tmp_path / f"{name}xx") as temporary:
            temporary.write_text("new")
    assert os.listdir(tmp_path) == [name]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", [float("nan")])
    assert not os.listdir(tmp_path)


def test_sizes():
    assert parse_size("300") == (300, 300) and parse_size("320x240") == parse_size("320X240") == (320, 240)
    assert parse_size("16x8192") == (16, 8192)


@pytest.mark.parametrize("text", ["", "x", "3x", "300x200x100", "8", "300x8193", "15x300", "-300", "3.5"])
def test_no_sizes(text):
    with pytest.raises(Exception, match="expected"):
        parse_size(text)


@pytest.mark.parametrize("body, code, line", [
    ("raise InputError('x.json: bad')", 2, "tool.py: x.json: bad"),
    ("open('absent/file')", 2, "tool.py: absent/file: No such file or directory"),
    ("raise KeyboardInterrupt", 130, "interrupted"),
    ("import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, ""),
    ("raise ZeroDivisionError", 1, "ZeroDivisionError"),  # our own bugs keep their traceback
])
def test_exit_codes(tmp_path, body, code, line):
    (tmp_path / "tool.py").write_text(
        f"from support.script import *\n@command\ndef main(argv=None):\n    {body}\nmain()\n")
    done = subprocess.run([sys.executable, tmp_path / "tool.py"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert (done.returncode, done.stderr.strip().splitlines()[-1:]) == (code, [line] if line else [])


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"{sys.executable} flops.py | head -1", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("layer")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_commit(tmp_path):
    def ask():
        """What a copy of script.py in the folder says, from another working directory."""
        code = "from support import script; print(script.git_commit())"
        own = os.environ | {"PYTHONPATH": str(folder)}
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=own, text=True, check=True,
                              stdout=subprocess.PIPE).stdout.strip()

    def git(*words, at=None):
        name = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.check_output(["git", *name, *words], cwd=at or folder, text=True).strip()

    folder = tmp_path / "a folder"
    shutil.copytree("support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q", at=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "of something else", at=tmp_path)
    assert ask() == "None"  # our folder merely lies in that repository
    git("init", "-q")
    assert ask() == "None"  # nothing committed yet
    git("add", ".")
    git("commit", "-q", "-m", "x")
    git("tag", "-a", "-m", "v", "v1")
    head = git("rev-parse", "HEAD")
    assert ask() == head
    (folder / "support/script.py").open("a").write("# changed\n")
    assert ask() == head + "-dirty"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["detect.py", "export.py"])
def test_ctrl_c_while_torch_is_imported_is_one_word(script):
    for delay in (0, 0.5):  # the imports take seconds
        process = subprocess.Popen([sys.executable, script, "--help"], stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, text=True)
        maps = Path(f"/proc/{process.pid}/maps")
        if maps.exists():  # numpy comes after script.py and before torch
            while "numpy" not in maps.read_text():
                time.sleep(0.02)
        else:
            time.sleep(0.5)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert (process.communicate()[1], process.returncode) == ("interrupted\n", 130)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")
def test_a_script_keeps_the_memory_that_it_frees():
    """Twenty times the same 64 MB: 16,384 pages are touched for the first time once, or each time."""
    code = ("import resource, torch; from support.script import command\n"
            "def fill():\n"
            "    for _ in range(20): torch.ones(16 * 2 ** 20)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "@command\n"
            "def main(argv=None):\n"
            "    fill(); before = fill(); print(fill() - before)\n"
            "main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16384


def test_ctrl_c_after_the_reader_has_gone_is_130():
    """As `script 2>&1 | tee`, where Ctrl-C ends tee first."""
    code = ("import time\nfrom support.script import command\n"
            "@command\ndef main(argv=None):\n    print('up', flush=True)\n    time.sleep(60)\nmain()\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
