"""Work that is killed at a moment, by SIGKILL.

A moment is a change of its files: one of the calls that Python audits (open to write, rename, delete, ...), right
before it is done. So a busy machine moves none. For scripts that start no threads, as work is done in forks.
"""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")


def changes(work: Callable[[], object], folder: Path, moment: int | None = None) -> int | None:
    """How many changes `work` made below `folder`; None if it was killed before the one with the number `moment`."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        calls, made = itertools.count(1), 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal made
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not (writes or event in CHANGES):
                return
            # what is relative is in a folder that is being deleted
            if str(folder) in str(arguments[0]) or (event in CHANGES and not os.path.isabs(arguments[0])):
                made = next(calls)
                if made == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            sys.stdout.flush()
            os.write(sender, str(made).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver) as answer:
        made = answer.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), ended
    return int(made) if ended == 0 else None
