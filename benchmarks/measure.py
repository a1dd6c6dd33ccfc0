"""What every benchmark prints and does alike: the machine, a process of its own, medians with their range."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def environment(*packages: str) -> str:
    """Date, processor, threads and versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join(
        [
            f"{datetime.date.today()}",
            f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
            f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
            f"Python {platform.python_version()}",
            *versions,
        ]
    )


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(work: Callable[[], Any]) -> tuple[float, float]:
    """Resident MiB of this process before `work`, and its highest during it. Reads /proc, so on Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the high-water mark so far
    before = status_mib("self", "VmRSS")
    work()
    return before, status_mib("self", "VmHWM")


def status_mib(process: int | str, name: str) -> float:
    """One of the kernel's figures on a process, in MiB: VmRSS (resident), RssAnon (of it, not files), ..."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def median_and_range(values: Sequence[float], digits: int = 1) -> str:
    """
    >>> median_and_range([3.0, 1.0, 2.0])
    '2.0 [1.0-3.0]'
    """
    middle, lowest, highest = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} [{lowest}-{highest}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
