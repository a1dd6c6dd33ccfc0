"""How every command of this project reads its arguments and reports bad input.

Bad input is one line on stderr, `error: what, where, what to do`, and exit code 2. A traceback is shown for
`--debug`, and for what is a defect of ours rather than of the input.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# What a user's disk can answer; anything else that is an OSError is a defect and keeps its traceback.
_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free space or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ELOOP: "a symbolic link leads back to itself; choose another path",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
}
# How libraries that are not written in Python tell of a full disk: safetensors, and torch.save.
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")


class InputError(Exception):
    """Input that cannot be used. The message says what, where and what to do, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports through `InputError`, so that every error of every command looks the same."""

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
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        main(argv)
    except InputError as error:
        _report(str(error), debug)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        advice = _disk_advice(error)
        if advice is None:
            raise
        _report(f"{getattr(error, 'filename', None) or 'output'}: {advice}", debug)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _disk_advice(error: Exception) -> str | None:
    """What to do about the disk, if that is what the error is about."""
    if isinstance(error, OSError) and error.errno in _DISK_ADVICE:
        return _DISK_ADVICE[error.errno]
    if any(words in str(error) for words in _FULL_DISK):
        return _DISK_ADVICE[errno.ENOSPC]
    return None


def _report(message: str, debug: bool) -> NoReturn:
    if debug:
        raise
    print("error: " + one_line(message), file=sys.stderr)
    raise SystemExit(2) from None


def one_line(message: str, longest: int = 2000) -> str:
    """`message` in one line of at most `longest` characters that a terminal shows as they are.

    A value out of a file may be a megabyte long, or hold codes that move the cursor.

    >>> one_line("a\\n  b\\x1b[2J" + 3000 * "c" + " end", longest=24)
    'a b\\\\x1b[2J ... ccccc end'
    """
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
    half = (longest - len(" ... ")) // 2
    return line if len(line) <= longest else f"{line[: longest - 5 - half]} ... {line[-half:]}"
