"""What every script shares: errors in one line, exit codes, flag types, files written whole, JSON.

Scripts import it first: threads are settled before numpy and torch are imported, which takes seconds, and
Ctrl-C meanwhile ends in one word.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from support.threads import settle

settle()
ROOT = Path(__file__).resolve().parents[1]  # the repository's folder
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}  # file names may hold them
PATIENCE = 3  # seconds in which another process on this machine reports what all of them meet
TROUBLE = {  # what libraries say when the machine gives up: what we say
    "DataLoader worker": "a loading process was killed, perhaps for want of memory: lower --workers",
    "out of memory": "out of memory: lower --batch-size, --size or --workers",
    "allocate": "out of memory: lower --batch-size, --size or --workers",
    "by peer": "another process of this run has ended"}


class InputError(Exception):
    """Bad input, in one line: which file, which entry, what to do. `reported`: another process prints it."""

    def __init__(self, message, reported=False):
        super().__init__(message)
        self.reported = reported


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def one_line(error):
    """What an InputError or OSError says, without "[Errno 28]" but with the file."""
    if getattr(error, "strerror", None):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def first_line(error):
    """The first useful line of a library's error message."""
    lines = [line.strip() for line in (*str(error).splitlines(), type(error).__name__)]
    return next(line for line in lines if line and not line.startswith("Exception from"))[:160]


@contextmanager
def bad_values(place=""):
    """Turn a ValueError, which model.py raises, into an InputError: `place` and its text."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{place}{error}") from None


def _interrupted(*_):
    """End by Ctrl-C while torch is imported. (Some imports turn an exception into a failure.)"""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _end_workers():
    """End the loading processes that an error or a signal has left. They heed no SIGTERM and hold nothing."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise about dead workers
    for child in children:
        child.kill()
        child.join()


def keep_memory():
    """Keep the memory that is freed (man 3 mallopt): else glibc spends a training step in page faults."""
    with suppress(AttributeError, OSError, TypeError):  # musl, macOS; Windows has no CDLL(None)
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)   # M_MMAP_MAX


def _fail(main, text, reported=False):
    """Print one line, with the name of `main`'s script, and exit with 2: under torchrun one a machine."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for torchrun's summary, in torch's form
        content = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(InputError, OSError):
            write_json(os.environ["TORCHELASTIC_ERROR_FILE"], {"message": content})
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    if reported or not joined and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)  # the one that reports comes first: torchrun ends all once one has ended
    if not reported:
        name = Path(sys.modules[main.__module__].__file__).name
        print(f"{name}: {text.translate(CONTROL)}", file=sys.stderr)
    sys.exit(2)


def command(main):
    """Decorate a script's `main(argv=None)`: bad input becomes one line on stderr and exit code 2.

    So does a machine that gives up. Ctrl-C exits with 130, SIGTERM with 143. A closed pipe is no error."""
    @functools.wraps(main)
    def wrapped(argv=None):
        keep_memory()  # loading processes inherit it where they are forked
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # file names may be no text
        with suppress(ValueError):  # only the main thread may set handlers
            if signal.getsignal(signal.SIGINT) is _interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            return main(argv)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush at exit
            sys.exit(0)
        except (InputError, OSError) as error:
            _fail(main, one_line(error), getattr(error, "reported", False))
        except (RuntimeError, MemoryError) as error:
            text = "out of memory" if isinstance(error, MemoryError) else str(error)
            for words, line in TROUBLE.items():
                if words in text:
                    _fail(main, line)
            raise  # a bug of ours
        except KeyboardInterrupt:
            with suppress(OSError):  # Ctrl-C may have ended a reader, such as tee, as well
                print("interrupted", file=sys.stderr)
            sys.exit(130)
        finally:
            _end_workers()
    return wrapped


def parse_size(text):
    """Parse `S` or `WxH` (such as 320x240) to (width, height) in pixels, for argparse."""
    width, _, height = text.lower().partition("x")
    sides = width, height if "x" in text.lower() else width
    if not all(side.isdecimal() and 16 <= int(side) <= 8192 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: S or WxH, sides between 16 and 8192 pixels expected")
    return int(sides[0]), int(sides[1])


def parse_sides(text):
    """Parse `WxH` in fractions of pixels (such as 9.4x15) to (width, height), for argparse."""
    width, height = (float(side) for side in text.lower().split("x"))
    return width, height


def parse_picture(text):
    """Accept the name of a picture to write, for argparse: its ending must be one that can be written."""
    if Path(text).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a picture, {Path(text).stem}.png would be")
    return text


class Parser(argparse.ArgumentParser):
    """An argument parser that shows a script's docstring as it is written, and says errors in one line."""

    def __init__(self, description=None, **more):
        more["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **more)

    def error(self, message):
        """Print the line alone: the usage before it would fill the screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class FlagFileParser(Parser):
    """An argument parser that takes `@FILE`: flags as on the command line, with # comments."""

    def convert_arg_line_to_args(self, line):
        """Split one line of the file (argparse calls this)."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a file of flags cannot be read: {error}")


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`. On success it replaces `path`; on any error it is removed.

    A reader sees the old file or the new one, never half. Raises InputError if it cannot be written."""
    path = Path(path)
    # Short, since a file system refuses a long name and more. Threads may write to names that begin alike.
    require(path.name and not os.path.isdir(path), f"{path}: is a folder, a file is to be written there")
    temporary = path.with_name(f".{path.stem[:20]}.{os.getpid()}{threading.get_ident()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        raise InputError(f"{path}: {error.strerror or error}; not written, what was there is kept") from None
    finally:
        with suppress(OSError):  # it may not be there, nor its folder
            temporary.unlink()


def csv_cell(text):
    """A cell that a spreadsheet takes as text: one that begins like a formula gets a quote before it."""
    return f"'{text}" if str(text)[:1] in ("=", "+", "-", "@") else text


def write_json(path, content):
    """Write `content` as JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8")


def read_text(path):
    """Read a UTF-8 text file, with a byte order mark or without. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # universal newlines: CRLF becomes LF
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path):
    """Read a JSON file. Raises InputError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of too many digits
        raise InputError(f"{path}: not JSON ({error})") from None


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit():
    """The commit that these scripts are of, with "-dirty" if a tracked file was changed; None if unknown."""
    if not (ROOT / ".git").exists():  # another repository may hold this folder
        return None
    words = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):  # git is not installed
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


# Importers from elsewhere keep their handler of Ctrl-C, and so does a shell that has a script ignore it.
_started = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve().parent
if _started in (ROOT, ROOT / "tools") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
