"""How every command of this project reads its arguments and reports bad input.

Bad input is one line on stderr, `error: what, where, what to do`, and exit code 2. `--debug` shows the traceback;
without it, only a defect of ours does.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

_OTHER_FOLDER = "choose another folder"
# Disk errors that the user can fix; any other OSError is a defect and keeps its traceback.
_DISK_ADVICE = {
    errno.ENOSPC: f"the disk is full; free space or {_OTHER_FOLDER}",
    errno.EDQUOT: f"the disk quota is used up; free space or {_OTHER_FOLDER}",
    errno.EACCES: f"permission denied; {_OTHER_FOLDER}",
    errno.EPERM: f"operation not permitted; {_OTHER_FOLDER}",
    errno.EROFS: f"the file system is read-only; {_OTHER_FOLDER}",
    errno.EEXIST: f"a file stands where a folder is needed; {_OTHER_FOLDER}",
    errno.ENOTDIR: f"a file stands where a folder is needed; {_OTHER_FOLDER}",
    errno.EISDIR: f"a folder stands where a file is needed; {_OTHER_FOLDER}",
    errno.ELOOP: f"a symbolic link leads back to itself; {_OTHER_FOLDER}",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
}
# How safetensors and torch.save report a full disk: by no OSError.
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")


class InputError(Exception):
    """Input that cannot be used. The message says what, where and what to do, in one line."""


class Unfinished(InputError):
    """What stopped work that the same command goes on with: what is finished stays."""


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Have an InputError that comes from inside begin with the place it is about; "" adds nothing.

    >>> with at("x.yaml"), at("stage 'a'"): raise InputError("no data")
    Traceback (most recent call last):
    common.cli.InputError: x.yaml: stage 'a': no data
    """
    try:
        yield
    except InputError as error:
        if place:
            error.args = (f"{place}: {error}",)
        raise


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises InputError, so that all commands report errors alike."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def output_folder(name: str) -> Path:
    """The `type` of an argument that names a folder to write: "" would be the current one."""
    if not name or "\0" in name:
        raise argparse.ArgumentTypeError(f"{name!r} names no folder")
    return Path(name)


def at_least_1(text: str) -> int:
    """The `type` of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(argv)` and exit: 0 when it returns, 2 on bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    # it warns that a kernel for some CPUs is not installed, which it does without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # mteb calls a method of sentence-transformers by its former name
    warnings.filterwarnings("ignore", "The `get_sentence_embedding_dimension` method", FutureWarning)
    try:
        main([arg for arg in argv if arg != "--debug"])
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        message = _user_message(error)
        if message is None or debug:
            raise
        print("error: " + one_line(message), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _user_message(error: Exception) -> str | None:
    """The message about bad input or the disk; None for a defect."""
    if isinstance(error, InputError):
        return str(error)
    advice = _DISK_ADVICE.get(error.errno) if isinstance(error, OSError) else None
    if any(words in str(error) for words in _FULL_DISK):
        advice = _DISK_ADVICE[errno.ENOSPC]
    return advice and f"{getattr(error, 'filename', None) or 'output'}: {advice}"


def one_line(message: str, longest: int = 2000) -> str:
    """`message` in one line of at most `longest` characters, control characters escaped.

    >>> one_line("a\\n  b\\x1b[2J" + 3000 * "c" + " end", longest=24)
    'a b\\\\x1b[2J ... ccccc end'
    """
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
    half = (longest - len(" ... ")) // 2
    return line if len(line) <= longest else f"{line[: longest - 5 - half]} ... {line[-half:]}"
