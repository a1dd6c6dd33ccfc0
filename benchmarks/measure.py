"""What benchmarks share: the machine, memory of a process and of tensors, processor time, medians with their range."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


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


@contextmanager
def counted_tokens(model: SentenceTransformer) -> Iterator[list[int]]:
    """Tokens that go through the layers, padding included, by forward pass."""
    counts: list[int] = []
    hook = (
        model[0]
        .model.get_input_embeddings()
        .register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    )
    try:
        yield counts
    finally:
        hook.remove()


def timed(work: Callable[[], Any], device: str) -> float:
    """Processor seconds of `work`; seconds of the clock where a GPU does it."""
    import torch

    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def live_memory(work: Callable[[], Any], device: str) -> tuple[Any, int]:
    """What `work` returns, and the most bytes of tensors that were alive in it, on top of those from before it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    with live_tensors() as live:
        result = work()
    return result, live.peak


@dataclass
class Live:
    """Bytes of tensors made so far and still alive, and the most that it has been."""

    now: int = 0
    peak: int = 0

    def change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def live_tensors() -> Iterator[Live]:
    """
    >>> import torch
    >>> with live_tensors() as live:
    ...     kept = torch.zeros(10).add(1).view(2, 5)
    >>> live
    Live(now=40, peak=80)
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from torch.utils.weak import WeakIdKeyDictionary

    live, known = Live(), WeakIdKeyDictionary()

    def count(tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        if storage not in known:
            size = storage.nbytes() if size is None else size
            known[storage] = size
            live.change(size)
            weakref.finalize(storage, live.change, -size)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tree_map_only(torch.Tensor, lambda tensor: count(tensor, 0), (args, kwargs))  # from before
            result = func(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, count, result)
            return result

    with Mode():
        yield live


def matmul_rate() -> float:
    """FLOP/s of large matrix products in bfloat16: what this GPU gives a model at best."""
    import torch

    size, count = 8192, 20
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = timed(lambda: [left @ right for _ in range(count)], "cuda")
    return count * 2 * size**3 / seconds
